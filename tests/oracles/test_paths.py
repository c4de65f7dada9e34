"""The real conv4 (relu, max pooling) under every way of computing it, against a plain loop over tasks."""

import pytest
import torch
from cases import (
    assert_same,
    image_learner,
    images,
    jittered,
    plain_gradient,
    regression,
    regression_learner,
    small_conv,
)
from torch import Tensor, nn

from metalearn_utils import rules
from metalearn_utils.meta import Learner, fomaml, joint, maml, reptile
from metalearn_utils.convnets import conv4
from metalearn_utils.models import params_of
from metalearn_utils.parallel import choose, cross_entropy
from metalearn_utils.rules import sgd

ALPHA = 0.4
TASKS = images(4, 3, 2, 2)


@pytest.mark.parametrize("pool", ["max", "stride"])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["loop", "vmap"])
def test_real_conv4_equals_the_plain_loop(kind: str, recompute: bool, first_order: bool, pool: str, force) -> None:
    """mean over tasks of ∂L_Q(θ_K)/∂θ, K = 3, to 1e-10"""
    force(kind)
    model, theta = small_conv(3, 4, pool=pool)
    learner = Learner(model, cross_entropy, sgd(ALPHA), 3, recompute=recompute)
    loss, expected = plain_gradient(learner, theta, TASKS, ALPHA, first_order)
    found = (fomaml if first_order else maml)(learner, theta, TASKS)
    assert found.loss.item() == pytest.approx(loss, rel=1e-12)
    assert_same(found.theta, expected, 1e-10)


@pytest.mark.parametrize("algorithm", [maml, fomaml, reptile, joint])
@pytest.mark.parametrize("transductive", [False, True])
def test_conv4_gives_one_answer_under_loop_and_vmap(algorithm, transductive: bool, force) -> None:
    model, theta = small_conv(3, 4)
    learner, found = Learner(model, cross_entropy, sgd(ALPHA), 2, transductive), {}
    for kind in ("loop", "vmap"):
        force(kind)
        found[kind] = algorithm(learner, theta, TASKS)
    assert found["loop"].loss.item() == pytest.approx(found["vmap"].loss.item(), rel=1e-12)
    assert_same(found["vmap"].theta, found["loop"].theta, 1e-10)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("first_order", [False, True])
def test_mlp_equals_the_plain_loop(every_path: str, first_order: bool, recompute: bool) -> None:
    (learner, theta), tasks = regression_learner(sgd(0.2), 4, recompute=recompute), regression(5, 5, 6)
    loss, expected = plain_gradient(learner, theta, tasks, 0.2, first_order)
    found = (fomaml if first_order else maml)(learner, theta, tasks)
    assert found.loss.item() == pytest.approx(loss, rel=1e-12)
    assert_same(found.theta, expected, 1e-11)


@pytest.mark.parametrize("make", ["momentum", "rmsprop", "adam"])
def test_recomputing_changes_no_gradient_of_a_rule_with_state(make: str, every_path: str) -> None:
    """θ and φ through the rule's state m and v: recomputed and stored graphs agree."""
    rule, tasks, found = getattr(rules, make)(0.05), regression(4, 5, 6), []
    for recompute in (False, True):
        learner, theta = regression_learner(rule, 4, recompute=recompute)
        found.append(maml(learner, theta, tasks, rule.phi))
    assert_same(found[1].theta, found[0].theta, 1e-10)
    assert_same(found[1].phi, found[0].phi, 1e-10)


def test_predictions_agree_under_loop_and_vmap(force) -> None:
    """[steps + 1, tasks, queries, classes] from one task at a time and from all at once"""
    (learner, theta), found = image_learner(), {}
    for kind in ("loop", "vmap"):
        force(kind)
        found[kind] = learner.predict(theta, TASKS)
    assert found["loop"].shape == (3, 4, 6, 3)
    assert (found["loop"] - found["vmap"]).abs().max() < 1e-11


def test_the_library_chooses_the_fast_way() -> None:
    """Its own MLP in one product, large convolutions on a CPU one task after the other, other modules by vmap."""
    assert choose(regression_learner()[0].model, regression(8, 2, 2)) == "batched"
    assert choose(conv4(5), images(8, 5, 1, 1)) == "loop"
    assert choose(nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)), regression(8, 2, 2)) == "vmap"


class Recurrent(nn.Module):
    """Reads the columns of an image one after the other."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cells, self.head = kind(6, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x[:, 0])[0][:, -1])


USERS_LAYERS = {
    "attention-like softmax": lambda: nn.Sequential(nn.Flatten(2), nn.Softmax(-1), nn.Flatten(), nn.Linear(36, 3)),
    "grouped convolution": lambda: nn.Sequential(
        nn.Flatten(1, 2), nn.Conv1d(6, 3, 3, groups=3), nn.Flatten(), nn.Linear(12, 3)
    ),
    "PReLU and average pooling": lambda: nn.Sequential(nn.PReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(9, 3)),
    "GELU and upsampling": lambda: nn.Sequential(
        nn.GELU(), nn.Upsample(scale_factor=2), nn.Flatten(), nn.Linear(144, 3)
    ),
    "GRU": lambda: Recurrent(nn.GRU),
    "LSTM": lambda: Recurrent(nn.LSTM),
}


@pytest.mark.parametrize("name", USERS_LAYERS)
def test_a_users_model_equals_the_plain_loop(name: str) -> None:
    """Whatever the library chooses, to 1e-10."""
    torch.manual_seed(0)
    model, tasks = USERS_LAYERS[name]().double(), images(5, 3, 2, 2, side=6)
    theta, learner = jittered(params_of(model)), Learner(model, cross_entropy, sgd(ALPHA), 2)
    assert_same(maml(learner, theta, tasks).theta, plain_gradient(learner, theta, tasks, ALPHA)[1], 1e-10)
