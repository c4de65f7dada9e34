"""The gradient of a training run in the rule's phi: six estimators behind one signature.

Each is (rule, phi, problem, carry, generator) -> Estimate, made by a function that takes its settings. `carry` is None
at the start of a run and is handed on from window to window; an estimator of whole runs returns None again.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .population import antithetic, population, repeat
from .progress import check_counts
from .rules import Phi
from .tasks.problems import Problem
from .unrolls import Carry, MetaLoss, begin, run

__all__ = ["Carry", "Estimate", "MetaLoss", "begin", "es", "pes", "run", "truncated", "truncated_es", "unrolled"]


class Estimate(NamedTuple):
    """An estimate of a meta-gradient.

    Attributes:
        loss: the meta-loss of this window, a scalar; for perturbed rules its mean over the copies.
        phi: the estimated gradient.
        carry: where to go on; None when the run has reached its horizon.
    """

    loss: Tensor
    phi: Phi
    carry: Carry | None


def unrolled(horizon: int, meta_loss: MetaLoss = MetaLoss(), stop_gradient: bool = False) -> Callable[..., Estimate]:
    """Back-propagation through a whole run of `horizon` steps: exact, or with constant gradients."""
    return truncated(horizon, horizon, meta_loss, stop_gradient)


def truncated(
    window: int, horizon: int, meta_loss: MetaLoss = MetaLoss(), stop_gradient: bool = False
) -> Callable[..., Estimate]:
    """Back-propagation through windows of a run; parameters and state are constants where a window begins."""
    _check(window, horizon)

    def estimate(rule, phi, problem, carry, generator) -> Estimate:
        leaves = pytree.tree_map(lambda v: v.detach().requires_grad_(), phi)
        with torch.enable_grad():
            losses, after = run(rule, leaves, problem, carry, window, stop_gradient)
            loss = meta_loss(problem, losses, after.params, after.step >= horizon).mean()
        grads = _gradient(loss, leaves)
        return Estimate(loss.detach(), grads, None if after.step >= horizon else _detached(after))

    return estimate


def es(horizon: int, pairs: int, sigma: float, meta_loss: MetaLoss = MetaLoss()) -> Callable[..., Estimate]:
    """Antithetic evolution strategies on whole runs: mean of e (F(phi + e) - F(phi - e)) / (2 sigma^2).

    It is the gradient of the smoothed meta-loss E F(phi + e), e normal with standard deviation sigma. All copies run
    as one stacked batch, and nothing is stored for a backward pass.
    """
    _check(horizon, horizon, sigma, pairs=pairs)

    def estimate(rule, phi, problem, carry, generator) -> Estimate:
        copies, noise = antithetic(phi, pairs, sigma, generator)
        losses, _ = _run_copies(rule, copies, problem, None, horizon, horizon, meta_loss)
        return Estimate(losses.mean(), _weigh(noise, losses, sigma), None)

    return estimate


def truncated_es(
    window: int, horizon: int, pairs: int, sigma: float, meta_loss: MetaLoss = MetaLoss()
) -> Callable[..., Estimate]:
    """Evolution strategies window by window; every window starts where the unperturbed rule stands (biased)."""
    _check(window, horizon, sigma, pairs=pairs)

    def estimate(rule, phi, problem, carry, generator) -> Estimate:
        copies, noise = antithetic(phi, pairs, sigma, generator)
        carry = begin(rule, problem) if carry is None else carry
        losses, _ = _run_copies(rule, copies, problem, _copied(carry, 2 * pairs), window, horizon, meta_loss)
        with torch.no_grad():
            _, after = run(rule, phi, problem, carry, window)
        return Estimate(losses.mean(), _weigh(noise, losses, sigma), None if after.step >= horizon else after)

    return estimate


def pes(
    window: int, horizon: int, pairs: int, sigma: float, meta_loss: MetaLoss = MetaLoss()
) -> Callable[..., Estimate]:
    """Persistent evolution strategies (Vicol et al. 2021, Algorithm 2): windows without truncation bias.

    Every perturbed copy keeps its own parameters and state from window to window, and its loss is weighed by the sum of
    all perturbations that it has met, not by the last one.
    """
    _check(window, horizon, sigma, pairs=pairs)

    def estimate(rule, phi, problem, carry, generator) -> Estimate:
        copies, noise = antithetic(phi, pairs, sigma, generator)
        met = noise if carry is None else pytree.tree_map(torch.add, carry.noise, noise)
        losses, after = _run_copies(rule, copies, problem, carry, window, horizon, meta_loss)
        after = None if after.step >= horizon else after._replace(noise=met)
        return Estimate(losses.mean(), _weigh(met, losses, sigma), after)

    return estimate


def _run_copies(rule, copies: Phi, problem: Problem, carry, steps: int, horizon: int, meta_loss) -> tuple[Tensor, Carry]:
    """The meta-loss of each perturbed copy of the rule, [copies], and where all of them stand."""
    n = len(pytree.tree_leaves(copies)[0])
    many = repeat(problem, n)
    with torch.no_grad():
        losses, after = run(population(rule, n), copies, many, carry, steps)
        found = meta_loss(many, losses, after.params, after.step >= horizon)
    return found.reshape(n, -1).mean(1), after


def _weigh(noise: Phi, losses: Tensor, sigma: float) -> Phi:
    """Mean over pairs of noise * (loss of phi + e minus loss of phi - e) / (2 sigma^2)."""
    plus, minus = losses.chunk(2)
    weight = (plus - minus) / (2 * sigma**2 * len(plus))
    return pytree.tree_map(lambda v: torch.tensordot(weight.to(v.dtype), v, 1), noise)


def _copied(carry: Carry, copies: int) -> Carry:
    """The same standing for every copy."""

    def many(v):
        return v.repeat(copies, *[1] * (v.dim() - 1)) if isinstance(v, Tensor) else v

    return carry._replace(params=pytree.tree_map(many, carry.params), state=pytree.tree_map(many, carry.state))


def _detached(carry: Carry) -> Carry:
    return pytree.tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, carry)


def _gradient(loss: Tensor, phi: Phi) -> Phi:
    """d loss / d phi; zero where the loss does not depend on a leaf in this window."""
    leaves, spec = pytree.tree_flatten(phi)
    if not loss.requires_grad:
        return pytree.tree_map(torch.zeros_like, phi)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return pytree.tree_unflatten([torch.zeros_like(v) if g is None else g for v, g in zip(leaves, grads)], spec)


def _check(window: int, horizon: int, sigma: float = 1.0, **counts: int) -> None:
    check_counts(horizon=horizon, window=window, **counts)
    if not 0 < sigma < float("inf"):
        raise ValueError(f"sigma must be a finite number > 0, got {sigma!r}")
    if horizon % window:
        raise ValueError(f"horizon must be a positive multiple of window, got horizon={horizon} and window={window}")
