"""Outer objectives: MAML, FOMAML, Reptile and joint training, each (learner, theta, tasks, phi) -> MetaGradient."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .adapt import Adapted, adapt
from .parallel import (
    Forward,
    check_fit,
    everything,
    forward_of,
    looped,
    mean_over_tasks,
    minibatches,
    scalar_per_task,
)
from .probe import check_theta, uses_support_statistics
from .rules import Params, Phi, UpdateRule
from .tasks.base import Batch, Tasks, check_values


class MetaGradient(NamedTuple):
    """What one outer step needs.

    Attributes:
        loss: the meta-loss, a scalar: mean over tasks.
        theta: its gradient in the initial parameters (for Reptile: the step it takes, with the opposite sign).
        phi: its gradient in the rule's hyperparameters, or None if phi was not passed.
    """

    loss: Tensor
    theta: Params
    phi: Phi | None


@dataclass(frozen=True)
class Learner:
    """All that adaptation to a task needs, owned in one place so that training and test agree.

    Attributes:
        model: any module that maps x to outputs.
        loss: (outputs, y) -> scalar, the mean over examples; `mse`, `cross_entropy` or your own.
        rule: the inner update rule.
        steps: number of inner steps K.
        transductive: normalise query examples by their own batch (the papers' habit), or, if False, by the
            statistics of the support set, so that predictions do not depend on the other queries.
        adapt_only: names, or prefixes that end in a dot, of the parameters to adapt (ANIL: ("head.",)); None for all.
        recompute: trade time for memory in the backward pass, see `adapt`.
    """

    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    rule: UpdateRule
    steps: int
    transductive: bool = True
    adapt_only: Sequence[str] | None = None
    recompute: bool = False

    def inner(self, forward: Forward, theta: Params, data: Batch | list[Batch], phi: Phi | None, **flags) -> Adapted:
        """The inner loop on one task or on stacked ones; `theta` as `forward.start` gives it."""

        def loss(params: Params, batch: Batch) -> Tensor:
            return scalar_per_task(forward, forward.outputs(params, batch.x, None), batch.y)

        flags = {"recompute": self.recompute, "only": self.adapt_only, "gradient": forward.gradient} | flags
        return adapt(loss, theta, data, self.rule, flags.pop("steps", self.steps), phi=phi, **flags)

    def query_outputs(self, forward: Forward, params: Params, tasks: Tasks) -> Tensor:
        """Predictions for the query examples, normalised as `transductive` says."""
        one = tasks.support.x[0] if forward.stacked else tasks.support.x
        if self.transductive or not uses_support_statistics(self.model, one):
            return forward.outputs(params, tasks.query.x, None)
        axis = 1 if forward.stacked else 0
        n = tasks.support.x.shape[axis]
        both = torch.cat([tasks.support.x, tasks.query.x], dim=axis)
        return forward.outputs(params, both, n).narrow(axis, n, both.shape[axis] - n)

    def predict(self, theta: Params, tasks: Tasks, phi: Phi | None = None, steps: int | None = None) -> Tensor:
        """Query predictions after 0, 1, ..., steps inner steps: [steps + 1, tasks, queries, ...]; no graph."""
        steps = self.steps if steps is None else steps
        forward = forward_of(self.model, self.loss, tasks, theta)
        with torch.no_grad():
            found = [self._predict_part(forward, theta, part, phi, steps) for part in forward.parts(tasks)]
        return found[0] if forward.stacked else torch.stack(found, dim=1)

    def _predict_part(self, forward: Forward, theta: Params, part: Tasks, phi: Phi | None, steps: int) -> Tensor:
        adapted = self.inner(forward, forward.start(theta, part), part.support, phi, steps=steps)
        return torch.stack([self.query_outputs(forward, params, part) for params in adapted.path])


def maml(learner: Learner, theta: Params, tasks: Tasks, phi: Phi | None = None) -> MetaGradient:
    """The exact meta-gradient of mean_i L_query_i(theta_K_i): Finn et al. (2017), Algorithm 2, with second order.

    Args:
        learner: model, loss, inner rule and steps.
        theta: the initialisation, one dict for all tasks.
        tasks: stacked tasks.
        phi: pass it to get the gradient of the rule's hyperparameters as well (Meta-SGD); `rule.phi` is used if not.

    Raises:
        ValueError: malformed tasks, misspelt or missing parameters, or bad settings, each named.
    """
    return _differentiate(_after_adaptation(first_order=False), learner, theta, tasks, phi)


def fomaml(learner: Learner, theta: Params, tasks: Tasks, phi: Phi | None = None) -> MetaGradient:
    """MAML with inner gradients held constant: Finn et al. (2017), section 5.2. Arguments as for `maml`."""
    return _differentiate(_after_adaptation(first_order=True), learner, theta, tasks, phi)


def joint(learner: Learner, theta: Params, tasks: Tasks, phi: Phi | None = None) -> MetaGradient:
    """Gradient of the mean loss over all examples of all tasks, without adaptation: joint training."""

    def objective(learner: Learner, forward: Forward, start: Params, part: Tasks, phi: Phi | None) -> Tensor:
        data = everything(forward, part)
        return scalar_per_task(forward, forward.outputs(start, data.x, None), data.y)

    return _differentiate(objective, learner, theta, tasks, None)


def reptile(
    learner: Learner,
    theta: Params,
    tasks: Tasks,
    phi: Phi | None = None,
    *,
    batch_size: int | None = None,
    reduction: str = "mean",
) -> MetaGradient:
    """Reptile's step mean_i(theta_K_i - theta), with the sign of a gradient: Nichol et al. (2018), Algorithm 2.

    Gradient descent on it with step size epsilon is theta <- theta + epsilon * mean_i(theta_K_i - theta); one task
    at a time is the serial Algorithm 1. Support and query examples are used alike, since Reptile has no split.

    Args:
        batch_size: take a different minibatch of the task at each inner step, in order and around; all by default.
        reduction: "mean", or "sum" to show what a sum does to the step.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    forward, found, loss = forward_of(learner.model, learner.loss, tasks, theta), [], []
    with torch.no_grad():
        for part in forward.parts(tasks):
            data = minibatches(forward, everything(forward, part), batch_size, learner.steps)
            adapted = learner.inner(forward, forward.start(theta, part), data, phi)
            found.append(adapted.params)
            loss.append(adapted.losses[-1] if learner.steps else tasks.support.x.new_zeros(()))
    scale = len(tasks.support.x) if reduction == "sum" else 1
    step = {k: scale * mean_over_tasks(forward, [theta[k] - p[k] for p in found]) for k in theta}
    return MetaGradient(torch.stack(loss).mean(), step, None)


def supervised(learner: Learner, theta: Params, batch: Batch, phi: Phi | None = None) -> MetaGradient:
    """Gradient of the ordinary loss on one batch of examples: the pretraining baseline."""
    check_values("batch.x", batch.x)
    check_fit(learner.model, learner.loss, {"batch": Batch(batch.x[None], batch.y[None])})
    leaves = {k: v.detach().requires_grad_() for k, v in check_theta(learner.model, theta, batch.x).items()}
    forward = looped(learner.model, learner.loss)
    loss = learner.loss(forward.outputs(leaves, batch.x, None), batch.y)
    return MetaGradient(loss.detach(), dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())))), None)


def _after_adaptation(first_order: bool) -> Callable:
    def objective(learner: Learner, forward: Forward, start: Params, part: Tasks, phi: Phi | None) -> Tensor:
        adapted = learner.inner(forward, start, part.support, phi, first_order=first_order)
        return scalar_per_task(forward, learner.query_outputs(forward, adapted.params, part), part.query.y)

    return objective


def _differentiate(
    objective: Callable, learner: Learner, theta: Params, tasks: Tasks, phi: Phi | None
) -> MetaGradient:
    """Mean over tasks of the objective, and its gradient in theta (and phi): all tasks at once, or task by task."""
    forward = forward_of(learner.model, learner.loss, tasks, theta)
    leaves, spec = pytree.tree_flatten((dict(theta), phi or {}))
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    theta, phi = pytree.tree_unflatten(leaves, spec)
    total, grads = 0.0, None
    for part in (parts := forward.parts(tasks)):
        loss = objective(learner, forward, forward.start(theta, part), part, phi or None).mean() / len(parts)
        new = torch.autograd.grad(loss, leaves, allow_unused=True)
        total, grads = total + loss.detach(), new if grads is None else [_add(a, b) for a, b in zip(grads, new)]
    for name, g in zip(theta, grads):
        if g is None:
            raise ValueError(f"theta holds {name!r}, but the loss does not use it")
    grads = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, grads)]
    d_theta, d_phi = pytree.tree_unflatten(grads, spec)
    return MetaGradient(total, d_theta, d_phi or None)


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b
