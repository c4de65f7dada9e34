"""Every public algorithm has an oracle, in one dimension and in several; and every oracle sees a planted bug."""

import inspect
from collections.abc import Callable
from importlib import import_module

import pytest
import test_finite_differences as differences
import test_metamorphic as relations
import test_networks as networks
import test_normalisation as norms
import test_quadratics as forms
import torch
import torch.nn.functional as F
from cases import F64, assert_same, assert_slopes
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from metalearn_utils import convnets, meta, parallel, prototypes, rules
from metalearn_utils.meta import Learner, MetaGradient
from metalearn_utils.parallel import mse
from metalearn_utils.rules import sgd
from metalearn_utils.tasks.base import Batch, Tasks

inner = import_module("metalearn_utils.adapt")  # the package's attribute `adapt` is the function


def check_supervised(inputs: int) -> None:
    """∇ of mean (x · w − y)² is 2 Xᵀ (X w − y) / n."""
    torch.manual_seed(0)
    model = nn.Linear(inputs, 1, bias=False, dtype=F64)
    x, w = torch.randn(6, inputs, dtype=F64), torch.randn(1, inputs, dtype=F64)
    y = torch.sin(x.sum(1, keepdim=True))
    expected = 2 * (x @ w.T - y).T @ x / 6
    found = meta.supervised(Learner(model, mse, sgd(0.1), 1), {"weight": w}, Batch(x, y))
    assert_same(found.theta, {"weight": expected}, 1e-12)


def check_prototypical(inputs: int) -> None:
    """Central differences, with a linear embedding of the inputs in as many dimensions."""
    g = torch.Generator().manual_seed(0)
    model = nn.Linear(inputs, inputs, dtype=F64)
    theta = {k: torch.randn(v.shape, generator=g, dtype=F64) for k, v in model.named_parameters()}
    y = torch.tensor([0, 1, 0, 1]).expand(3, -1)
    tasks = Tasks(*(Batch(torch.randn(3, 4, inputs, generator=g, dtype=F64), y) for _ in range(2)))
    learner = prototypes.Prototypes(model, temperature=1.0)
    found = prototypes.prototypical(learner, theta, tasks)
    assert_slopes(lambda at: prototypes.prototypical(learner, at, tasks).loss.item(), theta, found.theta)
    assert found.loss.item() == pytest.approx(plain_prototypical_loss(theta, tasks), rel=1e-12)


def plain_prototypical_loss(theta: dict[str, Tensor], tasks: Tasks) -> float:
    """−log of exp(−|f(q) − c_y|²) / Σ_k exp(−|f(q) − c_k|²), query by query, mean over queries and tasks."""
    losses = []
    for xs, ys, xq, yq in zip(*tasks.support, *tasks.query):
        embed = [F.linear(x, theta["weight"], theta["bias"]) for x in (xs, xq)]
        centres = [embed[0][ys == k].mean(0) for k in (0, 1)]
        for q, label in zip(embed[1], yq):
            weights = [(-((q - c) ** 2).sum()).exp().item() for c in centres]
            losses.append(-torch.tensor(weights[label] / sum(weights), dtype=F64).log().item())
    return sum(losses) / len(losses)


ANIL_SIZES = {1: (1, 1, 1), 3: (3, 4, 2)}
TABLE: dict[str, Callable[[int], None]] = {
    "maml": lambda dim: forms.test_maml_gradient_is_contraction_times_query_gradient(dim, 4),
    "fomaml": lambda dim: forms.test_fomaml_gradient_is_the_query_gradient_at_the_adapted_parameters(dim, 4),
    "reptile": lambda dim: forms.test_reptile_step_is_the_mean_displacement(dim, 5),
    "joint": forms.test_joint_gradient_is_the_mean_gradient_over_all_examples,
    "supervised": check_supervised,
    "prototypical": check_prototypical,
    "Meta-SGD": forms.test_meta_sgd_gradients,
    "one learned rate": forms.test_gradient_of_a_learned_rate,
    "one learned rate per step": forms.test_gradient_of_one_learned_rate_per_step,
    "ANIL": lambda dim: networks.test_anil_on_a_two_layer_linear_network(*ANIL_SIZES[dim]),
}


@pytest.mark.parametrize("dim", [1, 3])
@pytest.mark.parametrize("algorithm", TABLE)
def test_algorithm_agrees_with_its_oracle(algorithm: str, dim: int, every_path: str) -> None:
    TABLE[algorithm](dim)


def test_every_public_algorithm_is_in_the_table() -> None:
    """All functions of the library that take a learner and return a meta-gradient."""
    functions = [f for m in (meta, prototypes) for _, f in inspect.getmembers(m, inspect.isfunction)]
    algorithms = {f.__name__ for f in functions if inspect.signature(f).return_annotation is MetaGradient}
    variants = {"Meta-SGD", "one learned rate", "one learned rate per step", "ANIL"}
    assert {name for name in algorithms if not name.startswith("_")} == TABLE.keys() - variants


# Planted bugs: each is a change to the library, and the checks that must turn red.

Patch = Callable[[pytest.MonkeyPatch], None]


def inner_loop(**forced) -> Patch:
    """The inner loop with other flags than it is asked for."""
    return lambda patch: patch.setattr(meta, "adapt", lambda *a, **k: inner.adapt(*a, **(k | forced)))


def one_step_less(patch: pytest.MonkeyPatch) -> None:
    def shorter(loss, theta, data, rule, steps, **flags):
        return inner.adapt(loss, theta, data, rule, steps - 1, **flags)

    patch.setattr(meta, "adapt", shorter)


def detached_phi(patch: pytest.MonkeyPatch) -> None:
    def cut(*args, phi=None, **flags):
        return inner.adapt(*args, phi=pytree.tree_map(torch.Tensor.detach, phi), **flags)

    patch.setattr(meta, "adapt", cut)


def wrong_sign(patch: pytest.MonkeyPatch) -> None:
    right = rules._descend
    patch.setattr(rules, "_descend", lambda *args: {k: -v for k, v in right(*args).items()})


def wrapped(algorithm: str, change: Callable) -> Patch:
    """The algorithm with its result changed."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        for module in (meta, prototypes, forms):
            if right := getattr(module, algorithm, None):
                patch.setattr(module, algorithm, lambda *args, right=right: change(right, *args))

    return apply


def negated(right: Callable, *args) -> MetaGradient:
    found = right(*args)
    return found._replace(theta={k: -v for k, v in found.theta.items()})


def times_examples(right: Callable, learner, theta, batch: Batch) -> MetaGradient:
    found = right(learner, theta, batch)
    return found._replace(theta={k: len(batch.x) * v for k, v in found.theta.items()})


def last_of(tasks: Tasks) -> Tasks:
    return Tasks(*(Batch(b.x[-1:], b.y[-1:]) for b in tasks))


def sum_over_tasks(patch: pytest.MonkeyPatch) -> None:
    """Losses are divided by 1, not by the number of tasks."""
    for module in (meta, prototypes):
        patch.setattr(module, "len", lambda parts: 1, raising=False)
    patch.setattr(meta, "mean_over_tasks", lambda forward, values: sum(values))


def last_task_only(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(parallel.Forward, "parts", lambda self, tasks: list(parallel.unstack(tasks))[-1:])


def support_only(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(meta, "everything", lambda forward, tasks: tasks.support)


def frozen_support(patch: pytest.MonkeyPatch) -> None:
    right = prototypes.embed
    patch.setattr(prototypes, "embed", lambda *a: (lambda s, q: (s.detach(), q))(*right(*a)))


def adapt_everything(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(inner, "selected", lambda theta, only: list(theta))


def weights_inside_the_kernel(patch: pytest.MonkeyPatch) -> None:
    fused = lambda self, x, _=None: F.batch_norm(x, None, None, self.weight, self.bias, training=True)  # noqa: E731
    patch.setattr(convnets.Norm, "forward", fused)


def statistics_of_everything(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(convnets, "normalise", lambda x, _=None: F.batch_norm(x, None, None, training=True))


def shared_buffers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(parallel, "caller", lambda model: lambda params, x, _=None: functional_call(model, params, (x,)))


def constant_statistics(patch: pytest.MonkeyPatch) -> None:
    """Mean and variance without their derivative."""

    def apply(x: Tensor, _=None) -> Tensor:
        var, mean = torch.var_mean(x.detach(), dim=(0, 2, 3), correction=0, keepdim=True)
        return (x - mean) * (var + 1e-5).rsqrt()

    patch.setattr(convnets, "normalise", apply)


def one_task_after_the_other(patch: pytest.MonkeyPatch) -> None:
    """θ_0 is lost: each task starts where the one before ended."""
    right, last = inner.adapt, []

    def carried(loss, theta, *args, **flags):
        start = {k: v + (last[-1][k] - v).detach() for k, v in theta.items()} if last else theta
        found = right(loss, start, *args, **flags)
        last.append({k: v.detach() for k, v in found.params.items()})
        return found

    patch.setattr(meta, "adapt", carried)


def check_norms_in_any_mode(_: int) -> None:
    norms.test_weights_outside_the_kernel_are_exact_under_vmap_of_grad("Norm")


def check_independence(_: int) -> None:
    norms.test_with_support_statistics_a_prediction_does_not_depend_on_other_queries("Learner", "loop", lambda kind: 0)


def check_conv4(_: int) -> None:
    differences.test_every_rule_on_a_smooth_conv4("sgd")


def check_buffers(_: int) -> None:
    norms.test_buffers_of_a_users_model_stay_as_they_are(meta.maml)


def check_order(_: int) -> None:
    relations.test_the_order_of_tasks_changes_nothing("maml")


ADAPTIVE = ("maml", "fomaml", "reptile", "Meta-SGD", "one learned rate", "one learned rate per step", "ANIL")
SECOND_ORDER = ("maml", "Meta-SGD", "ANIL")
LEARNED = ("Meta-SGD", "one learned rate", "one learned rate per step")
MEANS = ("maml", "fomaml", "reptile", "joint", "prototypical", "Meta-SGD", "one learned rate per step", "ANIL")
BUGS: list[tuple[str, Patch, tuple]] = [
    ("a detach in the inner gradient", inner_loop(first_order=True), SECOND_ORDER),
    ("a detach forgotten in first order", inner_loop(first_order=False), ("fomaml",)),
    ("a detach of the step sizes", detached_phi, LEARNED),
    ("a detach of the class means", frozen_support, ("prototypical",)),
    ("a sign in the update", wrong_sign, ADAPTIVE),
    ("a sign in joint training", wrapped("joint", negated), ("joint",)),
    ("a sign in supervised training", wrapped("supervised", negated), ("supervised",)),
    ("a sign in prototypical networks", wrapped("prototypical", negated), ("prototypical",)),
    ("a sum over tasks", sum_over_tasks, MEANS),
    ("a sum over examples", wrapped("supervised", times_examples), ("supervised",)),
    ("the last task only", last_task_only, [m for m in MEANS if m != "prototypical"]),
    ("the last task only", wrapped("prototypical", lambda f, a, b, t: f(a, b, last_of(t))), ("prototypical",)),
    ("one inner step too few", one_step_less, ("maml", "fomaml", "reptile", "one learned rate")),
    ("support examples only", support_only, ("reptile", "joint")),
    ("frozen layers that adapt", adapt_everything, ("ANIL",)),
    ("parameters carried from task to task", one_task_after_the_other, ("maml", "reptile", check_order)),
    ("normalisation weights inside the kernel", weights_inside_the_kernel, (check_norms_in_any_mode,)),
    ("statistics of support and query together", statistics_of_everything, (check_independence,)),
    ("statistics without their derivative", constant_statistics, (check_conv4,)),
    ("buffers of the model written to", shared_buffers, (check_buffers,)),
]
PLANTED = [
    pytest.param(patch, TABLE.get(check, check), id=f"{name} -> {check if isinstance(check, str) else check.__name__}")
    for name, patch, checks in BUGS
    for check in checks
]


@pytest.mark.parametrize(("plant", "check"), PLANTED)
def test_a_planted_bug_turns_its_check_red(plant: Patch, check: Callable[[int], None], force, monkeypatch) -> None:
    force("loop")
    check(3)
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check(3)
