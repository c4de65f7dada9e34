"""Rules, a small network and training loops that the tests of `LearnedOptimizer` and of rule files share."""

from collections.abc import Callable, Iterable

import torch
from cases import F64, regression, seeded, tanh_net
from torch import Tensor
from torch.func import functional_call
from torch.utils import _pytree as pytree

from metalearn_utils.coordinatewise import gated, lstm, per_parameter_mlp
from metalearn_utils.learned import step_size
from metalearn_utils.optimizer import LearnedOptimizer
from metalearn_utils.parallel import mse
from metalearn_utils.rates import decayed, hypergradient, schedule
from metalearn_utils.rules import Params, UpdateRule, adam, momentum


def noisy(rule: UpdateRule, scale: float = 0.3) -> UpdateRule:
    """The rule with noise on phi: as if trained, so that its network has a say."""
    g = seeded(5)
    phi = pytree.tree_map(lambda v: v + scale * torch.randn(v.shape, generator=g, dtype=v.dtype), rule.phi)
    return rule._replace(phi=phi)


LEARNED: dict[str, UpdateRule] = {
    "step_size": noisy(step_size(generator=seeded())),
    "step_size, absolute": noisy(step_size(scale_free=False, generator=seeded())),
    "step_size, momentum": noisy(step_size(momentum=True, generator=seeded())),
    "step_size, loss": noisy(step_size(use_loss=True, momentum=True, generator=seeded())),
    "step_size, absolute, loss": noisy(step_size(scale_free=False, use_loss=True, generator=seeded())),
    "per_parameter_mlp": noisy(per_parameter_mlp(generator=seeded())),
    "per_parameter_mlp without time": noisy(per_parameter_mlp(use_time=False, generator=seeded())),
    "lstm": noisy(lstm(generator=seeded())),
    "gated": noisy(gated(generator=seeded()), 0.01),
}
FIXED: dict[str, UpdateRule] = {
    "momentum": momentum(0.05),
    "adam": adam(0.05),
    "hypergradient": hypergradient(0.05, 0.1),
    "hypergradient, additive": hypergradient(0.05, 0.01, multiplicative=False),
    "schedule": schedule(0.1, 4, 10),
    "decayed": decayed(adam(0.05), 10),
}
EVERY = LEARNED | FIXED
READS_LOSS = ("step_size, loss", "step_size, absolute, loss", "gated")


def problem(dtype: torch.dtype = F64) -> tuple[Params, Callable[..., Tensor]]:
    """A network's parameters and its mean squared error, a function of (params, None)."""
    model, theta = tanh_net()
    x, y = (t[0].to(dtype) for t in regression(1, 8, 1).support)
    theta = {k: v.to(dtype) for k, v in theta.items()}
    return theta, lambda params, _=None: mse(functional_call(model, params, (x,)), y)


def leaves_of(theta: Params) -> Params:
    """Copies that require a gradient."""
    return {k: v.detach().clone().requires_grad_() for k, v in theta.items()}


def deployed(rule: UpdateRule, **options) -> tuple[LearnedOptimizer, Params, Callable[..., Tensor]]:
    """An optimizer on the small network, the network's parameters, and its loss."""
    theta, loss = problem()
    params = leaves_of(theta)
    return LearnedOptimizer(params.items(), rule, **options), params, loss


def steps(optimizer, params: Params, loss: Callable[..., Tensor], count: int, set_to_none: bool = True) -> list[Params]:
    """theta after each of `count` steps of an ordinary training loop; the loss is handed on where that is possible."""
    path = []
    for _ in range(count):
        optimizer.zero_grad(set_to_none=set_to_none)
        value = loss(params)
        value.backward()
        optimizer.step(**({"loss": value} if isinstance(optimizer, LearnedOptimizer) else {}))
        path.append({k: v.detach().clone() for k, v in params.items()})
    return path


def functional(rule: UpdateRule, theta: Params, loss: Callable[..., Tensor], rates: Iterable[float]) -> list[Params]:
    """theta after each step of the rule as a function, its slot "lr" filled with one rate after the other."""
    state, path = rule.init(theta), []
    for lr in rates:
        params = leaves_of(theta)
        value = loss(params)
        grads = dict(zip(params, torch.autograd.grad(value, list(params.values()))))
        slots = {k: v for k, v in {"lr": lr, "loss": value.detach()}.items() if k in state}
        updates, state = rule.update(rule.phi, grads, state | slots)
        factor = 1.0 if "lr" in slots else lr
        theta = {k: theta[k] + factor * updates[k] for k in theta}
        path.append(theta)
    return path


def gap(a: list[Params], b: list[Params]) -> float:
    """The largest difference between two paths, which must move."""
    assert len(a) == len(b) > 1 and any(not torch.equal(a[0][k], a[-1][k]) for k in a[0]), "nothing moves"
    return max((p[k] - q[k]).abs().max().item() for p, q in zip(a, b) for k in p)


def tensors_of(tree) -> list[Tensor]:
    """All tensors in a state."""
    return [v for v in pytree.tree_leaves(tree) if isinstance(v, Tensor)]
