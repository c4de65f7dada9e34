"""Scores over many tasks, after every inner step, with 95 % intervals over the tasks."""

from dataclasses import dataclass
from typing import Any

import torch
from scipy.special import stdtrit
from torch import Tensor

from .rules import Params, Phi
from .tasks.base import Tasks, check_tasks

CHUNK = 100


@dataclass(frozen=True)
class Scores:
    """Per-task scores after 0, 1, ..., K inner steps.

    Attributes:
        per_task: [steps + 1, tasks]; accuracy in percent, or mean squared error.
        metric: "accuracy" or "mse".
        transductive: whether queries were normalised by their own batch.
    """

    per_task: Tensor
    metric: str
    transductive: bool

    @property
    def mean(self) -> Tensor:
        """Mean over tasks after each step, [steps + 1]."""
        return self.per_task.mean(1)

    @property
    def interval(self) -> Tensor:
        """Half width of the 95 % interval of the mean over tasks, 1.96 sd / sqrt(tasks), [steps + 1]."""
        return 1.96 * self.per_task.std(1) / self.per_task.shape[1] ** 0.5

    def __str__(self) -> str:
        unit, digits = (" %", 1) if self.metric == "accuracy" else ("", 3)
        mean, half = self.mean[-1].item(), self.interval[-1].item()
        mode = "transductive" if self.transductive else "not transductive"
        return (
            f"{self.metric} {mean:.{digits}f} ± {half:.{digits}f}{unit} "
            f"(95 % over {self.per_task.shape[1]} tasks, {self.per_task.shape[0] - 1} steps, {mode})"
        )


def evaluate(
    learner: Any,
    theta: Params,
    tasks: Tasks,
    *,
    phi: Phi | None = None,
    steps: int | None = None,
    metric: str = "accuracy",
) -> Scores:
    """Adapt to each task's support set and score its query set after every step.

    Args:
        learner: a `Learner`, `Prototypes` or `NearestNeighbour`: anything with `predict` and `transductive`.
        theta: initial parameters.
        tasks: stacked tasks; at least 600 for a figure that is to be quoted.
        phi: the rule's hyperparameters, `rule.phi` by default.
        steps: inner steps at test time, the learner's own by default.
        metric: "accuracy" (percent of the queries) or "mse".

    Raises:
        ValueError: malformed tasks or an unknown metric.
    """
    if metric not in ("accuracy", "mse"):
        raise ValueError(f"metric must be 'accuracy' or 'mse', got {metric!r}")
    check_tasks(tasks)
    found = [_score(learner.predict(theta, part, phi, steps), part.query.y, metric) for part in chunks(tasks, CHUNK)]
    return Scores(torch.cat(found, dim=1), metric, learner.transductive)


def chunks(tasks: Tasks, size: int) -> list[Tasks]:
    """The tasks in groups of at most `size`."""
    parts = [torch.split(t, size) for batch in tasks for t in batch]
    return [Tasks(type(tasks.support)(*p[:2]), type(tasks.query)(*p[2:])) for p in zip(*parts)]


def over_seeds(scores: list[Scores]) -> tuple[float, float]:
    """Mean over seeds of the last step's score, and the half width of its 95 % interval (Student's t, seeds)."""
    means = torch.stack([s.mean[-1] for s in scores])
    return means.mean().item(), t_quantile(len(scores) - 1) * means.std().item() / len(scores) ** 0.5


def t_quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t, to three decimals, as the printed tables have it."""
    if degrees < 1:
        raise ValueError(f"degrees must be at least 1, got {degrees}: an interval needs two values or more")
    return round(float(stdtrit(degrees, 0.975)), 3)


def _score(outputs: Tensor, y: Tensor, metric: str) -> Tensor:
    if metric == "mse":
        return ((outputs - y) ** 2).flatten(2).mean(2)
    return 100 * (outputs.argmax(-1) == y).double().mean(2)
