"""One run of any rule, what it is judged by, and the mean over tasks or seeds with its interval."""

import math
from functools import partial

import torch
from torch import Tensor

from .evaluate import t_quantile
from .progress import check_counts
from .rules import Params, UpdateRule
from .tasks.problems import Problem
from .unrolls import Carry, begin, run

FLOOR = 1e-16  # the smallest excess of which the logarithm is taken
LABELS = {
    "final": "loss after {} steps",
    "mean": "mean loss over {} steps",
    "log final": "log10 of the loss above its optimum, after {} steps",
    "log mean": "log10 of the loss above its optimum, mean over {} steps",
}


def started(rule: UpdateRule, problem: Problem, source: Problem | None = None) -> Carry:
    """The start of a run, with what the rule's state asks for filled in.

    Args:
        source: the problem before it was repeated for several copies of the rule, for the slot "gradient".

    Raises:
        ValueError: the problem does not know a fact that the rule needs.
    """
    carry = begin(rule, problem)
    wanted = carry.state.get("facts", {})
    if missing := [k for k in wanted if k not in problem.facts]:
        raise ValueError(f"problem.facts must hold {missing}, which the rule needs; it holds {sorted(problem.facts)}")
    filled = {"facts": {k: problem.facts[k] for k in wanted}} if wanted else {}
    if "gradient" in carry.state:
        filled["gradient"] = partial(_gradient, source or problem)
    return carry._replace(state=carry.state | filled)


def _gradient(problem: Problem, params: Params, step: int) -> Params:
    data = problem.data(step)
    if problem.gradient is not None:
        return problem.gradient(params, data)[1]
    return torch.func.grad(lambda at: problem.loss(at, data).sum())(params)


def trajectory(rule: UpdateRule, problem: Problem, steps: int) -> tuple[Tensor, Params]:
    """Run any rule without a graph: the losses after each step, [steps, tasks], and the last parameters."""
    return follow(rule, problem, steps, problem)


def follow(rule: UpdateRule, problem: Problem, steps: int, source: Problem) -> tuple[Tensor, Params]:
    """As `trajectory`, of several copies of a rule on a repeated problem; `source` as for `started`."""
    check_counts(steps=steps)
    with torch.no_grad():
        losses, after = run(rule, rule.phi, problem, started(rule, problem, source), steps)
    return losses, after.params


# What a run is judged by.


def judge(metric: str, problem: Problem, losses: Tensor, params: Params) -> Tensor:
    """The metric of each task's run, [tasks], in float64; a run that diverged is infinitely bad.

    Args:
        metric: "final", the loss after the last step; "mean", the mean over the losses after each step; "log final" or
            "log mean", the same of log10 of the loss above the optimum (0 where it is not known), at least -16; or a
            name in `problem.scores`.
        problem: the tasks.
        losses: [steps, tasks].
        params: the last parameters.
    """
    kind, values = metric.removeprefix("log "), losses.double()
    if kind in ("final", "mean"):
        values = problem.excess(values).clamp_min(FLOOR).log10() if metric != kind else values
        found = values[-1] if kind == "final" else values.mean(0)
    else:
        found = problem.scores[metric](params).double()
    worst = -math.inf if higher(metric) else math.inf
    return torch.where(losses[-1].isfinite() & found.isfinite(), found, worst)


def higher(metric: str) -> bool:
    """Whether more is better: of the metrics with "accuracy" in their name."""
    return "accuracy" in metric


def label(metric: str, steps: int) -> str:
    """The metric in words."""
    return LABELS.get(metric, metric + ", after {} steps").format(steps)


def check_metric(metric: str, problem: Problem) -> None:
    """Raise a ValueError unless `judge` knows the metric for this problem."""
    known = [*LABELS, *problem.scores]
    if metric not in known:
        raise ValueError(f"metric must be one of {known}, got {metric!r}")


def interval(scores: Tensor) -> tuple[float, float, str]:
    """Mean of [seeds, tasks], half width of its 95 % interval, and what it is over.

    Over the seeds' means where there are several, over tasks where there is one, by Student's t; infinite where the mean
    is, or where there is one task.
    """
    over, values = ("seeds", scores.mean(1)) if len(scores) > 1 else ("tasks", scores[0])
    mean, n = values.mean().item(), len(values)
    if n == 1 or not math.isfinite(mean):
        return mean, math.inf, f"{n} {over}"
    return mean, t_quantile(n - 1) * values.std().item() / n**0.5, f"{n} {over}"
