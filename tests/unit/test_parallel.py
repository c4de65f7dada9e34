"""How the library chooses a way to evaluate many tasks, and that no tensor strays to another device."""

import pytest
import torch
from cases import image_learner, images, regression, regression_learner, small_conv
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from metalearn_utils.evaluate import evaluate
from metalearn_utils.meta import Learner, fomaml, joint, maml, reptile
from metalearn_utils.convnets import conv4
from metalearn_utils.parallel import choose, cross_entropy, forward_of, mse, unstack
from metalearn_utils.probe import probe
from metalearn_utils.rules import adam, momentum, per_parameter, per_step, rmsprop, sgd

SEQUENTIAL = lambda: nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))  # noqa: E731


def test_few_tasks_are_looped_over() -> None:
    model = SEQUENTIAL()
    assert [choose(model, regression(n, 2, 2)) for n in (1, 3, 4, 20)] == ["loop", "loop", "vmap", "vmap"]


def test_large_convolutions_are_looped_over_on_a_cpu_only() -> None:
    model, tasks = conv4(5), images(8, 5, 1, 1)
    assert choose(model, tasks) == "loop"
    assert choose(model, tasks.to("meta")) == "vmap"
    assert choose(small_conv(5, 2)[0], tasks) == "vmap"


def test_random_operations_are_looped_over() -> None:
    model = nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    assert choose(model, regression(8, 2, 2)) == "loop"


def test_the_model_is_probed_once_for_each_shape() -> None:
    calls = []
    model = SEQUENTIAL()
    model.register_forward_hook(lambda *_: calls.append(1))
    for n in (3, 3, 5):
        probe(model, torch.zeros(n, 1))
    assert len(calls) == 1
    assert probe(model, torch.zeros(3, 1)).outputs == (1,)


def test_unstack_gives_the_tasks_back() -> None:
    tasks = images(3, 2, 1, 2)
    parts = list(unstack(tasks))
    assert len(parts) == 3
    assert torch.equal(torch.stack([p.query.x for p in parts]), tasks.query.x)
    assert torch.equal(torch.stack([p.support.y for p in parts]), tasks.support.y)


RULES = {
    "sgd": lambda theta: sgd(0.1),
    "momentum": lambda theta: momentum(0.1),
    "rmsprop": lambda theta: rmsprop(0.1),
    "adam": lambda theta: adam(0.1),
    "one rate per weight": lambda theta: sgd(per_parameter(0.1, theta)),
    "one rate per step": lambda theta: sgd(per_step(0.1, 2)),
}
ON_META = {
    "MLP": lambda: (*regression_learner(), regression(5, 4, 6)),
    "conv4": lambda: (*image_learner(), images(5, 3, 2, 2)),
    "conv4 with support statistics": lambda: (*image_learner(transductive=False), images(5, 3, 2, 2)),
    "conv4, one task after the other": lambda: (*image_learner(), images(2, 3, 2, 2)),
    "conv4, recomputed": lambda: (*image_learner(recompute=True), images(5, 3, 2, 2)),
    "a user's model": lambda: (
        Learner(module := SEQUENTIAL().double(), regression_learner()[0].loss, sgd(0.1), 2),
        {k: v.detach() for k, v in module.named_parameters()},
        regression(5, 4, 6),
    ),
}


def devices(found) -> set[str]:
    return {v.device.type for v in [found.loss, *found.theta.values()]}


def on_meta(values):
    """Nested dicts of tensors, without their data."""
    return tree_map(lambda v: v.to("meta"), values)


@pytest.mark.parametrize(("case", "rule"), [("MLP", rule) for rule in RULES] + [(c, "momentum") for c in ON_META])
@pytest.mark.parametrize("algorithm", [maml, fomaml, reptile, joint])
def test_every_tensor_follows_its_inputs_to_another_device(algorithm, case: str, rule: str) -> None:
    """On the meta device any operation with a stray CPU tensor raises (numbers excepted, as on a GPU)."""
    learner, theta, tasks = ON_META[case]()
    theta = on_meta(theta)
    learner = Learner(**(vars(learner) | {"rule": RULES[rule](theta)}))
    assert devices(algorithm(learner, theta, tasks.to("meta"))) == {"meta"}
    if algorithm in (maml, fomaml):
        found = algorithm(learner, theta, tasks.to("meta"), on_meta(learner.rule.phi))
        assert {v.device.type for v in tree_leaves(found.phi)} == {"meta"}


@pytest.mark.parametrize("case", ON_META)
def test_evaluation_follows_its_inputs_to_another_device(case: str) -> None:
    learner, theta, tasks = ON_META[case]()
    metric = "accuracy" if learner.loss is cross_entropy else "mse"
    scores = evaluate(learner, on_meta(theta), tasks.to("meta"), metric=metric)
    assert scores.per_task.device.type == "meta"
    assert scores.per_task.shape == (3, len(tasks.support.x))


@pytest.mark.parametrize("algorithm", [maml, reptile])
def test_minibatches_and_no_steps_follow_too(algorithm) -> None:
    learner, theta, tasks = ON_META["MLP"]()
    theta, settings = on_meta(theta), {"batch_size": 3} if algorithm is reptile else {}
    for steps in (0, 2):
        learner = Learner(**(vars(learner) | {"steps": steps}))
        assert devices(algorithm(learner, theta, tasks.to("meta"), **settings)) == {"meta"}


def test_a_stray_cpu_tensor_would_be_found() -> None:
    """The check can fail: a model that makes a tensor of its own without a device."""

    class Stray(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + torch.zeros(len(x), 1, dtype=x.dtype)

    learner, theta, tasks = ON_META["a user's model"]()
    model = Stray(1, 1).double()
    theta = {k: v.detach().to("meta") for k, v in model.named_parameters()}
    with pytest.raises(ValueError, match="the model takes no examples .* device"):
        maml(Learner(model, learner.loss, sgd(0.1), 1), theta, tasks.to("meta"))


class Tied(nn.Module):
    """One weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


@pytest.mark.parametrize("kind", ["vmap", "loop"])
def test_tied_weights_stay_tied(kind: str, force) -> None:
    """y = w^2 x with w = 3 handed in: both names follow."""
    force(kind)
    model = Tied().double()
    y = forward_of(model, mse, regression(4, 2, 2)).outputs
    theta, x = {"first.weight": torch.full((1, 1), 3.0, dtype=torch.float64)}, torch.ones(2, 1, dtype=torch.float64)
    out = y({k: v.expand(4, 1, 1) for k, v in theta.items()}, x.expand(4, 2, 1), None) if kind == "vmap" else y(theta, x, None)
    assert torch.equal(out, torch.full_like(out, 9.0))
