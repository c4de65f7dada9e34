"""Tuning one number of a hand-made optimizer by a fixed number of trials, for the metric that is shown."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .baselines import Method
from .judging import check_metric, follow, higher, judge, started, trajectory
from .population import population, repeat
from .progress import check_counts
from .rules import Params, UpdateRule
from .tasks.problems import Problem

CHECKED = 3  # steps in which the batch of all trials must agree with trials one by one


@dataclass(frozen=True)
class Tuned:
    """How a method was tuned.

    Attributes:
        values: the tried values, in the order of trial.
        scores: for each the mean over the training tasks; infinite where a run diverged, never NaN.
        chosen: the best value.
        edge: whether a better one may lie beyond: it is the smallest or largest that was tried, or all score the same.
        seconds: CPU seconds of all trials.
    """

    values: list[float]
    scores: list[float]
    chosen: float
    edge: bool
    seconds: float


def tune(method: Method, problem: Problem, steps: int, metric: str = "final", trials: int = 16) -> Tuned:
    """Choose the method's value on meta-training tasks, by exactly `trials` trials.

    Half of the trials form a geometric grid over `method.grid`. The others come in two rounds: each refines around the
    best value so far, between its neighbours, or goes on beyond it if it lies on the edge of what was tried.

    Args:
        method: what to tune.
        problem: the training tasks.
        steps: steps of a run.
        metric: what is to be smallest on average over the tasks, see `judge`.
        trials: >= 4.

    Raises:
        ValueError: nothing to tune, fewer than 4 trials, or an unknown metric.
    """
    check_counts(steps=steps, trials=trials)
    check_metric(metric, problem)
    if method.grid is None or trials < 4:
        raise ValueError(f"{method.name!r} must have a grid and at least 4 trials, got {method.grid} and {trials}")
    begun, sign, tried, costs = time.process_time(), -1 if higher(metric) else 1, [], []
    for count in _rounds(trials):
        new = _further(tried, costs, count) if tried else _geometric(*method.grid, count)
        found = try_values(method, [method.value(x) for x in new], problem, steps, metric)
        tried, costs = tried + new, costs + (sign * found.mean(1)).tolist()
    order, at = _best(tried, costs)
    values, seconds = [method.value(x) for x in tried], time.process_time() - begun
    edge = at in (0, trials - 1) or len(set(costs)) == 1
    return Tuned(values, [sign * c for c in costs], values[order[at]], edge, seconds)


def try_values(method: Method, values: Sequence[float], problem: Problem, steps: int, metric: str) -> Tensor:
    """The metric for each value on each task, [values, tasks]: all values as one stacked batch where that is exact."""
    rules = [method.make(v) for v in values]
    if len(rules) > 1 and _stack_is_exact(rules[0], rules[-1], problem):
        losses, params = follow(*_stacked(rules, problem), steps, problem)
        parts = [{k: v.unflatten(0, (len(rules), -1))[i] for k, v in params.items()} for i in range(len(rules))]
        runs = list(zip(losses.unflatten(1, (len(rules), -1)).unbind(1), parts))
    else:
        runs = [trajectory(rule, problem, steps) for rule in rules]
    return torch.stack([judge(metric, problem, *one) for one in runs])


# Where to try next.


def _rounds(trials: int) -> list[int]:
    first, each = max(3, trials // 2), max(1, trials // 4)
    rest = trials - first
    return [first] + [each] * (rest // each) + ([rest % each] if rest % each else [])


def _geometric(low: float, high: float, count: int) -> list[float]:
    return [low * (high / low) ** (i / (count - 1)) for i in range(count)]


def _best(tried: Sequence[float], costs: Sequence[float]) -> tuple[list[int], int]:
    """The order of the positions from low to high, and where in it the best stands; of equals, the middle one."""
    order = sorted(range(len(tried)), key=lambda i: tried[i])
    least = min(costs)
    equal = [at for at, i in enumerate(order) if costs[i] == least]
    return order, equal[len(equal) // 2] if math.isfinite(least) else 0


def _further(tried: Sequence[float], costs: Sequence[float], count: int) -> list[float]:
    """Positions beyond the edge on which the best one lies, farther and farther apart; or on both sides of the best."""
    order, at = _best(tried, costs)
    x = [tried[i] for i in order]
    if at in (0, len(x) - 1):
        ratio = x[0] / x[1] if at == 0 else x[-1] / x[-2]
        return [x[at] * ratio ** (2**n if n < 4 else 8 * (n - 2)) for n in range(count)]
    below = count // 2
    return _geometric(x[at - 1], x[at], below + 2)[1:-1] + _geometric(x[at], x[at + 1], count - below + 2)[1:-1]


# All values as one batch.


def _stacked(rules: Sequence[UpdateRule], problem: Problem) -> tuple[UpdateRule, Problem]:
    """One rule and one problem, [copies * tasks], that stand for all rules on the problem."""
    phi = pytree.tree_map(lambda *v: torch.stack(v), *[rule.phi for rule in rules])
    return population(rules[0]._replace(phi=phi), len(rules)), repeat(problem, len(rules))


def _stack_is_exact(one: UpdateRule, other: UpdateRule, problem: Problem) -> bool:
    """Whether two rules differ in phi alone and can be vectorised: seen from their updates for made-up gradients."""
    if all(torch.equal(a, b) for a, b in zip(pytree.tree_leaves(one.phi), pytree.tree_leaves(other.phi))):
        return False
    try:
        together = _updates(*_stacked([one, other], problem), problem, 2)
    except (RuntimeError, TypeError):
        return False
    apart = [torch.cat(pair) for pair in zip(*(_updates(rule, problem, problem, 1) for rule in (one, other)))]
    return all((a - b).abs().max() <= 1e3 * torch.finfo(a.dtype).eps * b.abs().max() for a, b in zip(together, apart))


def _updates(rule: UpdateRule, problem: Problem, source: Problem, copies: int) -> list[Tensor]:
    """The updates for the same normal gradients and losses of 1, every parameter in each of the first steps."""
    generator, state, found = torch.Generator().manual_seed(0), started(rule, problem, source).state, []
    for _ in range(CHECKED):
        normal = {k: torch.randn(v.shape, generator=generator).to(v) for k, v in source.theta.items()}
        grads = {k: g.repeat(copies, *[1] * (g.dim() - 1)) for k, g in normal.items()}
        filled = state | ({"loss": torch.ones(len(problem))} if "loss" in state else {})
        updates, state = rule.update(rule.phi, grads, filled)
        found += updates.values()
    return found
