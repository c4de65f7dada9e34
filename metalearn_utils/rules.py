"""Update rules as a triple (phi, init, update): SGD and Adam here, learned optimizers with the same type.

Every inner loop of the book reads theta_{t+1} = theta_t + u_phi(g_t, s_t). A rule is u_phi together with
its hyperparameters phi, so a learning rate, a vector of rates and the weights of a network are all meta-learned alike.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

Params = dict[str, Tensor]
Phi = dict[str, Any]
State = dict[str, Any]
StepSize = float | Tensor | Mapping[str, Tensor]


class UpdateRule(NamedTuple):
    """An update rule theta + u_phi(g, s).

    Attributes:
        phi: hyperparameters or weights of the rule, a dict of tensors (or of dicts of tensors).
        init: theta -> the state s_0.
        update: (phi, gradients, state) -> (updates to be added to theta, next state).
    """

    phi: Phi
    init: Callable[[Params], State]
    update: Callable[[Phi, Params, State], tuple[Params, State]]


def sgd(lr: StepSize = 0.01) -> UpdateRule:
    """Gradient descent, u = -lr * g.

    Args:
        lr: step size: a number, one tensor per parameter name (Meta-SGD, Li et al. 2017, equation 2),
            or a tensor of shape [steps] with one rate per inner step (Antoniou et al. 2019, section 4).
    """

    def update(phi: Phi, grads: Params, state: State) -> tuple[Params, State]:
        return _descend(phi, grads, state), {"step": state["step"] + 1}

    return UpdateRule({"lr": _step_size(lr)}, lambda theta: {"step": 0}, update)


def momentum(lr: StepSize = 0.01, beta: float = 0.9, nesterov: bool = False) -> UpdateRule:
    """Heavy-ball momentum m <- beta * m + g, u = -lr * m (or -lr * (g + beta * m) with `nesterov`).

    The convention is that of `torch.optim.SGD` without dampening; `lr` as in `sgd`.
    """

    def update(phi: Phi, grads: Params, state: State) -> tuple[Params, State]:
        m = {k: phi["beta"] * state["m"][k] + g for k, g in grads.items()}
        direction = {k: g + phi["beta"] * m[k] for k, g in grads.items()} if nesterov else m
        return _descend(phi, direction, state), {"step": state["step"] + 1, "m": m}

    return UpdateRule({"lr": _step_size(lr), "beta": _scalar("beta", beta)}, _zeros("m"), update)


def rmsprop(lr: StepSize = 0.01, decay: float = 0.99, eps: float = 1e-8) -> UpdateRule:
    """RMSprop: v <- decay * v + (1 - decay) * g^2, u = -lr * g / (sqrt(v) + eps); `lr` as in `sgd`."""

    def update(phi: Phi, grads: Params, state: State) -> tuple[Params, State]:
        v = {k: phi["decay"] * state["v"][k] + (1 - phi["decay"]) * g * g for k, g in grads.items()}
        direction = {k: g / (safe_sqrt(v[k]) + phi["eps"]) for k, g in grads.items()}
        return _descend(phi, direction, state), {"step": state["step"] + 1, "v": v}

    phi = {"lr": _step_size(lr), "decay": _scalar("decay", decay), "eps": _scalar("eps", eps)}
    return UpdateRule(phi, _zeros("v"), update)


def adam(lr: StepSize = 0.001, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> UpdateRule:
    """Adam with bias correction and eps outside the root (Kingma and Ba 2015, Algorithm 1); `lr` as in `sgd`."""

    def update(phi: Phi, grads: Params, state: State) -> tuple[Params, State]:
        b1, b2, t = phi["beta1"], phi["beta2"], state["step"] + 1
        m = {k: b1 * state["m"][k] + (1 - b1) * g for k, g in grads.items()}
        v = {k: b2 * state["v"][k] + (1 - b2) * g * g for k, g in grads.items()}
        root = {k: safe_sqrt(v[k] / (1 - b2**t)) for k in grads}
        direction = {k: m[k] / (1 - b1**t) / (root[k] + phi["eps"]) for k in grads}
        return _descend(phi, direction, state), {"step": t, "m": m, "v": v}

    phi = {"lr": _step_size(lr), "beta1": _scalar("beta1", beta1), "beta2": _scalar("beta2", beta2)}
    return UpdateRule({**phi, "eps": _scalar("eps", eps)}, _zeros("m", "v"), update)


def per_parameter(lr: float, theta: Params) -> Params:
    """One step size per weight, all equal to `lr`: the starting point of Meta-SGD. Shapes follow `theta`."""
    return {name: torch.full_like(value, lr) for name, value in theta.items()}


def per_step(lr: float, steps: int) -> Tensor:
    """One step size per inner step, all equal to `lr`: a float64 tensor of shape [steps]."""
    return torch.full((steps,), lr, dtype=torch.float64)


def safe_sqrt(v: Tensor) -> Tensor:
    """Square root whose derivative at 0 is 0 instead of infinity, so that meta-gradients stay finite."""
    positive = v > 0
    return torch.where(positive, torch.where(positive, v, 1.0).sqrt(), 0.0)


def _descend(phi: Phi, direction: Params, state: State) -> Params:
    lr = phi["lr"]
    if isinstance(lr, Mapping):
        if missing := direction.keys() - lr.keys():
            raise KeyError(f"lr has no step size for parameter {min(missing)!r}; it has {sorted(lr)}")
        return {name: -lr[name] * d for name, d in direction.items()}
    # Cast once, not once per parameter.
    rate = {dtype: -_rate_at(lr, state["step"]).to(dtype) for dtype in {d.dtype for d in direction.values()}}
    return {name: rate[d.dtype] * d for name, d in direction.items()}


def _rate_at(lr: Tensor, step: int) -> Tensor:
    if lr.dim() == 0:
        return lr
    if step >= len(lr):
        raise ValueError(f"lr holds one rate for each of {len(lr)} steps, but step {step + 1} was asked for")
    return lr[step]


def _step_size(lr: StepSize) -> Tensor | Params:
    if isinstance(lr, Mapping):
        return dict(lr)
    value = _scalar("lr", lr) if not isinstance(lr, Tensor) else lr
    if value.dim() > 1:
        raise ValueError(f"lr must be a number, a tensor [steps] or a dict of tensors, got shape {tuple(value.shape)}")
    return value


def _scalar(name: str, value: float) -> Tensor:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
    return torch.tensor(float(value), dtype=torch.float64)


def _zeros(*slots: str) -> Callable[[Params], State]:
    def init(theta: Params) -> State:
        return {"step": 0} | {s: {k: torch.zeros_like(v) for k, v in theta.items()} for s in slots}

    return init
