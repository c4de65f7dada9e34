"""A run of an optimizer on stacked problems, window by window, and what it is judged by."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .adapt import adapt
from .rules import Params, Phi, State, UpdateRule
from .tasks.problems import Problem

# Steps whose data and parameters are held in memory together where no graph is built.
AT_ONCE = 10


class Carry(NamedTuple):
    """Where a run stands between windows.

    Attributes:
        step: steps taken.
        params: of every task (and copy of the rule).
        state: the rule's, likewise.
        noise: PES: the sum of each pair's perturbations so far, [pairs, ...]; None otherwise.
    """

    step: int
    params: Params
    state: State
    noise: Phi | None = None


@dataclass(frozen=True)
class MetaLoss:
    """What a run is judged by: the mean over its losses after each step, or the last one alone.

    Attributes:
        final: judge by the loss after the last step only.
        log: take log10 of the loss above the optimum, held within [-16, 16].
        score: judge by the mean of `problem.scores[score]` at the last parameters instead, e.g. "validation loss".
    """

    final: bool = False
    log: bool = False
    score: str | None = None

    def __call__(self, problem: Problem, losses: Tensor, params: Params, done: bool) -> Tensor:
        """Meta-losses [tasks] of a window with losses [steps, tasks]; `done` says whether the run ends with it."""
        if self.score is not None:
            return problem.score(self.score, params) if done else torch.zeros_like(losses[-1])
        if self.log:
            losses = problem.excess(losses).clamp(1e-16, 1e16).log10()
        if self.final:
            return losses[-1] if done else torch.zeros_like(losses[-1])
        return losses.mean(0)


def run(
    rule: UpdateRule, phi: Phi, problem: Problem, carry: Carry | None, steps: int, stop_gradient: bool = False
) -> tuple[Tensor, Carry]:
    """Take `steps` steps on every task; the loss after each of them, [steps, tasks], and where the run then stands.

    Without gradients (`torch.no_grad`) memory does not grow with the number of steps.

    Args:
        carry: where to go on; None starts at `problem.theta`, with the scale 1 / L of each task where it is known.
        stop_gradient: treat the gradients that the rule sees as constants, as Andrychowicz et al. (2016) do.
    """
    carry, losses = begin(rule, problem) if carry is None else carry, []
    if torch.is_grad_enabled():
        return _window(rule, phi, problem, carry, steps, stop_gradient)
    for start in range(0, steps, AT_ONCE):
        part, carry = _window(rule, phi, problem, carry, min(AT_ONCE, steps - start), stop_gradient)
        losses.append(part)
    return torch.cat(losses), carry


def _window(rule, phi: Phi, problem: Problem, carry: Carry, steps: int, stop_gradient: bool) -> tuple[Tensor, Carry]:
    data = [problem.data(carry.step + k) for k in range(steps)]
    found = adapt(
        problem.losses, carry.params, data, rule, steps,
        phi=phi, state=carry.state, first_order=stop_gradient, gradient=problem.gradient,
    )  # fmt: skip
    last = problem.losses(found.params, problem.data(carry.step + steps))
    return torch.stack([*found.losses[1:], last]), Carry(carry.step + steps, found.params, found.state, carry.noise)


def begin(rule: UpdateRule, problem: Problem) -> Carry:
    """The start of a run: a learned rule's scale "lr" is 1 / L where the problem knows it."""
    state = rule.init(problem.theta)
    if "lr" in state and "L" in problem.facts:
        state = state | {"lr": 1 / problem.facts["L"]}
    return Carry(0, problem.theta, state)
