"""Training problems and rules that the tests of learned optimizers share."""

from collections.abc import Callable, Iterator

import torch
from cases import F64, jittered, seeded
from torch import Tensor
from torch.utils import _pytree as pytree

from metalearn_utils.coordinatewise import gated, lstm, per_parameter_mlp
from metalearn_utils.estimators import Carry, Estimate
from metalearn_utils.learned import step_size
from metalearn_utils.rates import decayed, hypergradient, per_layer, per_layer_and_step, schedule
from metalearn_utils.rules import Params, Phi, UpdateRule, adam, momentum, per_parameter, sgd
from metalearn_utils.tasks.problems import Problem, quadratic_gradient, quadratic_loss

HORIZON = 4


def net_loss(params: Params, data: tuple[Tensor, Tensor]) -> Tensor:
    """Mean over examples of (v · tanh(W x + b) - y)², of one task or of stacked ones: [] or [tasks]."""
    x, y = data
    hidden = torch.tanh(x @ params["w"].mT + params["b"].unsqueeze(-2))
    return ((hidden @ params["v"].unsqueeze(-1)).squeeze(-1) - y).square().mean(-1)


def net_problem(tasks: int = 3, seed: int = 0) -> Problem:
    """Small networks to be trained, w [tasks, 3, 2], b and v [tasks, 3], with other examples at every step."""
    g = seeded(seed)
    shapes = {"w": (3, 2), "b": (3,), "v": (3,)}
    theta = {k: torch.randn(tasks, *shape, generator=g, dtype=F64) for k, shape in shapes.items()}
    x = torch.randn(40, tasks, 6, 2, generator=g, dtype=F64)
    y = torch.sin(x.sum(-1)) + 0.3
    known = {"L": torch.tensor([5.0, 8.0, 3.5], dtype=F64)[torch.arange(tasks) % 3]}
    validation = {"validation loss": lambda params: net_loss(params, (x[-1], y[-1]))}
    return Problem(theta, net_loss, lambda t: (x[t], y[t]), known, scores=validation)


def bowls(h: list[list[float]], start: float = 1.0) -> Problem:
    """Quadratics ½ Σ_i h_i x_i² of the given curvatures [tasks][dim], with x_0 = `start` in every coordinate."""
    matrix = torch.diag_embed(torch.tensor(h, dtype=F64))
    theta = torch.full(matrix.shape[:-1], start, dtype=F64)
    data = (matrix, torch.zeros_like(theta))
    return Problem({"theta": theta}, quadratic_loss, lambda t: data, {}, quadratic_gradient)


def single(problem: Problem, task: int) -> tuple[Params, list]:
    """The parameters of one task without a task axis, and its data at each step."""
    pick = lambda tree: pytree.tree_map(lambda v: v[task], tree)  # noqa: E731
    return pick(problem.theta), [pick(problem.data(t)) for t in range(20)]


def shaken(rule: UpdateRule, by: float, seed: int = 1) -> UpdateRule:
    """The rule with noise on every entry of phi, so that no weight sits at a special value."""
    leaves, spec = pytree.tree_flatten(rule.phi)
    moved = jittered(dict(enumerate(leaves)), seed)
    return rule._replace(phi=pytree.tree_unflatten([v + 10 * by * (moved[i] - v) for i, v in enumerate(leaves)], spec))


def one_of(theta: Params) -> Params:
    """One task's parameters."""
    return {k: v[0] for k, v in theta.items()}


THETA = one_of(net_problem().theta)
FIXED = {
    "sgd": lambda: sgd(0.2),
    "Meta-SGD": lambda: shaken(sgd(per_parameter(0.2, THETA)), 0.03),
    "momentum": lambda: momentum(0.1, 0.8),
    "adam": lambda: adam(0.05, 0.8, 0.9, eps=0.1),
}
LEARNED: dict[str, Callable[[], UpdateRule]] = {
    "step size": lambda: shaken(step_size(hidden=5, generator=seeded(2)), 0.3),
    "step size from the loss too": lambda: shaken(step_size(use_loss=True, hidden=5, generator=seeded(2)), 0.3),
    "step size and momentum": lambda: shaken(step_size(momentum=True, hidden=5, generator=seeded(2)), 0.3),
    "absolute step size": lambda: shaken(step_size(scale_free=False, hidden=5, generator=seeded(2)), 0.3),
    "absolute step size, all options": lambda: shaken(
        step_size(scale_free=False, use_loss=True, momentum=True, hidden=5, generator=seeded(2)), 0.3
    ),
    "MLP": lambda: shaken(per_parameter_mlp(hidden=5, generator=seeded(2)), 0.1),
    "MLP without time": lambda: shaken(per_parameter_mlp(use_time=False, hidden=5, generator=seeded(2)), 0.1),
    "LSTM": lambda: shaken(lstm(hidden=4, scale=0.5, generator=seeded(2)), 0.1),
    "gated": lambda: shaken(gated(generator=seeded(2)), 0.1),
    "schedule": lambda: shaken(schedule(0.2, 3, HORIZON), 0.1),
    "hypergradient": lambda: hypergradient(0.2, 0.3),
    "additive hypergradient": lambda: hypergradient(0.1, 0.01, multiplicative=False),
    "rates per layer": lambda: shaken(sgd(per_layer(0.2, THETA)), 0.03),
    "rates per layer and step": lambda: shaken(per_layer_and_step(0.2, THETA, HORIZON), 0.03),
    "decayed sgd": lambda: decayed(sgd(0.2), HORIZON + 1),
    "decayed momentum": lambda: decayed(momentum(0.1, 0.8), HORIZON + 1),
}
RULES = FIXED | LEARNED


def windows(estimator: Callable, rule: UpdateRule, phi: Phi, problem: Problem, generator=None) -> Iterator[Estimate]:
    """The estimates of one run, window by window, with the same phi."""
    carry: Carry | None = None
    while True:
        found = estimator(rule, phi, problem, carry, generator or seeded())
        yield found
        carry = found.carry
        if carry is None:
            return


def mean_of(estimates: list[Estimate]) -> Phi:
    """The mean of their gradients."""
    return pytree.tree_map(lambda *v: sum(v) / len(v), *[found.phi for found in estimates])


def flat(phi: Phi) -> Params:
    """phi with one level of names."""
    return {pytree.keystr(path): leaf for path, leaf in pytree.tree_flatten_with_path(phi)[0]}


def unflat(values: Params, like: Phi) -> Phi:
    """The inverse of `flat`."""
    return pytree.tree_unflatten([values[k] for k in flat(like)], pytree.tree_flatten(like)[1])
