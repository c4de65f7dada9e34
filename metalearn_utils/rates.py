"""Rates that change while training: schedules, learned schedules, hypergradient descent, rates per layer and step."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .features import cosine, inner, spread
from .progress import check_counts
from .rules import Params, Phi, State, UpdateRule, _descend, sgd


def decayed(rule: UpdateRule, horizon: int) -> UpdateRule:
    """`rule` with its updates multiplied by the cosine (1 + cos(pi t / T)) / 2, zero from step T = `horizon` on."""
    if not isinstance(horizon, int) or horizon < 1:
        raise ValueError(f"horizon must be an integer >= 1, got {horizon!r}")

    def update(phi: Phi, grads: Params, state: State) -> tuple[Params, State]:
        factor = 0.5 * (1 + math.cos(math.pi * min(state["step"] / horizon, 1.0)))
        updates, state = rule.update(phi, grads, state)
        return {k: factor * u for k, u in updates.items()}, state

    return UpdateRule(rule.phi, rule.init, update)


def per_layer(lr: float, theta: Params) -> Params:
    """One step size per tensor, all equal to `lr`: scalars named as `theta`. For `sgd(per_layer(...))`."""
    return {name: torch.full((), lr, dtype=value.dtype) for name, value in theta.items()}


def per_layer_and_step(lr: float, theta: Params, steps: int) -> UpdateRule:
    """Gradient descent with one rate per tensor and inner step (Antoniou et al. 2019, section 4, LSLR)."""
    check_counts(steps=steps)
    phi = {name: torch.full((steps,), lr, dtype=value.dtype) for name, value in theta.items()}

    def update(phi: Phi, grads: Params, state: State) -> tuple[Params, State]:
        t = state["step"]
        if t >= steps:
            raise ValueError(f"the rule holds rates for {steps} steps, but step {t + 1} was asked for")
        return _descend({"lr": {k: rates[t] for k, rates in phi["lr"].items()}}, grads, state), {"step": t + 1}

    return UpdateRule({"lr": phi}, lambda theta: {"step": 0}, update)


def schedule(lr: float, knots: int, horizon: int) -> UpdateRule:
    """Gradient descent on a learned schedule: log rates at `knots` even steps of 0 .. horizon - 1, linear in between.

    phi = {"log_lr": [knots]}, all log(lr) at first. Beyond the horizon the last rate stays.
    """
    check_counts(knots=knots, horizon=horizon)
    if knots < 2 or horizon < 2 or not 0 < lr < math.inf:
        raise ValueError(f"knots and horizon must be >= 2, lr finite and > 0, got {knots!r}, {horizon!r} and {lr!r}")

    def update(phi: Phi, grads: Params, state: State) -> tuple[Params, State]:
        at = min(state["step"] / (horizon - 1), 1.0) * (knots - 1)
        left = min(int(at), knots - 2)
        log_lr = phi["log_lr"][left] + (at - left) * (phi["log_lr"][left + 1] - phi["log_lr"][left])
        return {k: -log_lr.exp().to(g.dtype) * g for k, g in grads.items()}, {"step": state["step"] + 1}

    start = torch.full((knots,), math.log(lr), dtype=torch.float64)
    return UpdateRule({"log_lr": start}, lambda theta: {"step": 0}, update)


def hypergradient(lr: float, beta: float, multiplicative: bool = True) -> UpdateRule:
    """Gradient descent that descends on its own rate while it runs (Baydin et al. 2018).

    The loss after a step of rate alpha has the derivative -<g_t, g_{t-1}> in alpha. Additive (equation 5):
    alpha_t = alpha_{t-1} + beta <g_t, g_{t-1}>; multiplicative and scale-free:
    alpha_t = alpha_{t-1} exp(beta cos(g_t, g_{t-1})).

    Args:
        lr: the first rate.
        beta: step size of the rate's own descent; 0 is gradient descent.
        multiplicative: which of the two forms.
    """
    phi = {"lr": sgd(lr).phi["lr"], "beta": sgd(beta).phi["lr"]}

    def init(theta: Params) -> State:
        return {"step": 0, "loss": None, "rate": None, "last": {k: torch.zeros_like(v) for k, v in theta.items()}}

    def update(phi: Phi, grads: Params, state: State) -> tuple[Params, State]:
        lead = state["loss"].dim()
        rate = phi["lr"].expand(state["loss"].shape) if state["rate"] is None else state["rate"]
        agreement = (cosine if multiplicative else inner)(grads, state["last"], lead)
        rate = rate * (phi["beta"] * agreement).exp() if multiplicative else rate + phi["beta"] * agreement
        updates = {k: -spread(rate, g) * g for k, g in grads.items()}
        return updates, state | {"step": state["step"] + 1, "rate": rate, "last": grads}

    return UpdateRule(phi, init, update)


def rates_of(phi: Phi) -> Mapping[str, Tensor] | Tensor:
    """The learned rates of a rule of this module, for looking at: the exponential of "log_lr", or "lr"."""
    return phi["log_lr"].exp() if "log_lr" in phi else phi["lr"]
