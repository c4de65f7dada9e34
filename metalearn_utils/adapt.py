"""The inner loop: K steps of an update rule on one task's loss, differentiable in theta and phi."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from .rules import Params, Phi, State, UpdateRule

Loss = Callable[[Params, Any], Tensor]
# With `recompute`, the last steps keep their graph: it bounds the price in time, and its memory does not grow with K.
KEPT = 6


class Adapted(NamedTuple):
    """What the inner loop returns.

    Attributes:
        params: theta_K.
        losses: the loss before each step, shape [steps] (or [steps, tasks] for stacked parameters); differentiable as
            `params` is. In first order only if phi is learned, and then its derivative in theta_k is the constant g_k.
        path: theta_0, ..., theta_K, so that every step can be scored.
        state: the rule's last state.
    """

    params: Params
    losses: Tensor
    path: list[Params]
    state: State


def adapt(
    loss: Loss,
    theta: Params,
    data: Any,
    rule: UpdateRule,
    steps: int,
    *,
    phi: Phi | None = None,
    state: State | None = None,
    first_order: bool = False,
    recompute: bool = False,
    only: Sequence[str] | None = None,
    gradient: Callable[[Params, Any], tuple[Tensor, Params]] | None = None,
) -> Adapted:
    """Take K inner steps theta_{k+1} = theta_k + u_phi(g_k, s_k) with g_k = grad loss(theta_k).

    Finn et al. (2017), equation 1, with any rule in place of gradient descent. The result is differentiable in
    theta and phi when gradients are enabled; under `torch.no_grad()` no graph is kept.

    Args:
        loss: (params, batch) -> a scalar, or [tasks] for parameters stacked on a leading task axis.
        theta: initial parameters.
        data: one batch for all steps, or a list with one batch per step.
        rule: the update rule.
        steps: K >= 0.
        phi: the rule's hyperparameters; `rule.phi` by default.
        state: the rule's state to go on from; by default `rule.init` of the parameters to adapt. A rule that reads the
            loss keeps a slot "loss" in it, which is filled before each update.
        first_order: treat g_k as constants in theta (FOMAML). phi keeps its gradient.
        recompute: recompute each step but the last 6 in the backward pass instead of storing its graph: memory per
            further step falls to about the size of the parameters.
        only: names, or prefixes that end in a dot, of the parameters to adapt; all by default.
        gradient: (params, batch) -> the loss and its gradient, if it is written out; by autograd if not.

    Raises:
        ValueError: steps < 0, unknown names in `only`, a loss of the wrong shape, or a parameter the loss ignores.
    """
    if not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps must be an integer >= 0, got {steps!r}")
    if isinstance(data, list) and len(data) < steps:
        raise ValueError(f"data must hold one batch per step, {steps} in all, got {len(data)}")
    phi = rule.phi if phi is None else phi
    names = selected(theta, only)
    step = partial(_inner_step, gradient or partial(_by_autograd, loss, names), rule, names, first_order)
    recomputed = steps - KEPT if recompute and not first_order and torch.is_grad_enabled() else 0
    state = rule.init({k: theta[k] for k in names}) if state is None else state
    path, losses = [dict(theta)], []
    for k in range(steps):
        run = partial(_recomputed_step, step) if k < recomputed else step
        params, state, value = run(path[-1], phi, state, data[k] if isinstance(data, list) else data)
        path.append(params)
        losses.append(value)
    return Adapted(path[-1], torch.stack(losses) if losses else torch.empty(0), path, state)


def selected(theta: Params, only: Sequence[str] | None) -> list[str]:
    """The parameter names that `only` names, by full name or by a prefix that ends in a dot."""
    if only is None:
        return list(theta)
    for wanted in only:
        if not any(_matches(name, wanted) for name in theta):
            raise ValueError(f"only names {wanted!r}, but the parameters are {sorted(theta)}")
    return [name for name in theta if any(_matches(name, wanted) for wanted in only)]


def _matches(name: str, wanted: str) -> bool:
    return name == wanted or (wanted.endswith(".") and name.startswith(wanted))


def _inner_step(
    gradient: Callable, rule: UpdateRule, names: list[str], first_order: bool,
    params: Params, phi: Phi, state: State, data: Any,
) -> tuple[Params, State, Tensor]:  # fmt: skip
    with torch.set_grad_enabled(torch.is_grad_enabled() and not first_order):
        value, grads = gradient(params, data)
    if first_order and learned(phi):
        value = with_gradient(value, grads, params)
    if "loss" in state:
        state = state | {"loss": value.detach() if first_order else value}
    updates, state = rule.update(phi, {k: grads[k] for k in names}, state)
    return params | {k: params[k] + updates[k].to(params[k].dtype) for k in names}, state, value


def _by_autograd(loss: Loss, names: list[str], params: Params, data: Any) -> tuple[Tensor, Params]:
    second_order = torch.is_grad_enabled()
    with torch.enable_grad():
        kept = {k: second_order and v.requires_grad for k, v in params.items()}
        at = {k: v if kept[k] else v.detach().requires_grad_(k in names) for k, v in params.items()}
        value = _checked(loss(at, data))
        wanted, ones = [at[k] for k in names], torch.ones_like(value)
        grads = torch.autograd.grad(value, wanted, ones, create_graph=second_order, allow_unused=True)
    return value if second_order else value.detach(), {k: _used(k, g) for k, g in zip(names, grads)}


def learned(phi: Phi) -> bool:
    """Whether a derivative in phi is wanted here."""
    return torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in pytree.tree_leaves(phi))


def with_gradient(value: Tensor, grads: Params, params: Params) -> Tensor:
    """`value` [] or [tasks], with `grads` as its constant derivative in `params`: value + <g, theta - detach(theta)>."""
    lead = value.dim()
    moved = [(g.detach() * (params[k] - params[k].detach())).reshape(*g.shape[:lead], -1).sum(-1) for k, g in grads.items()]
    return value.detach() + sum(moved)


def _checked(value: Tensor) -> Tensor:
    if value.dim() > 1:
        raise ValueError(f"loss must return a scalar (or [tasks]), the mean over examples; got {tuple(value.shape)}")
    return value


def _used(name: str, grad: Tensor | None) -> Tensor:
    if grad is None:
        raise ValueError(f"theta holds {name!r}, but the loss does not use it: remove it or leave it out with `only`")
    return grad


def _recomputed_step(step: Callable, params: Params, phi: Phi, state: State, data: Any) -> tuple:
    leaves, spec = pytree.tree_flatten((params, phi, state))
    where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    layout: list = []

    def run(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        filled = list(leaves)
        for i, t in zip(where, tensors):
            filled[i] = t
        out, out_spec = pytree.tree_flatten(step(*pytree.tree_unflatten(filled, spec), data))
        layout[:] = [out, out_spec]
        return tuple(o for o in out if isinstance(o, Tensor))

    tensors = iter(_Recompute.apply(run, *[leaves[i] for i in where]))
    filled = [next(tensors) if isinstance(o, Tensor) else o for o in layout[0]]
    return pytree.tree_unflatten(filled, layout.pop())


class _Recompute(torch.autograd.Function):
    """Run a step without a graph; build the graph again when the backward pass reaches it."""

    @staticmethod
    def forward(ctx: Any, run: Callable, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.run = run
        ctx.save_for_backward(*inputs)
        return run(inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple:
        inputs = [t.detach().requires_grad_(needed) for t, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[1:])]
        with torch.enable_grad():
            pairs = [(o, c) for o, c in zip(ctx.run(inputs), cotangents) if o.requires_grad]
        wanted = [t for t in inputs if t.requires_grad]
        outs, grads = zip(*pairs)
        found = iter(torch.autograd.grad(outs, wanted, grads, allow_unused=True))
        return None, *(next(found) if t.requires_grad else None for t in inputs)
