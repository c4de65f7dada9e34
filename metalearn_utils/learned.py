"""Learned step sizes: alpha_t = f_phi(s_t), one number per step, from the state of the optimizer.

A learned rule's state has two slots that others fill: "loss", the loss at theta_t (by the inner loop, before each
update), and "lr", a scale for the whole update (1 by default; one per task where a family knows its scale).
"""

import torch
from torch import Tensor

from .features import cosine, log_norm, perceptron, run_perceptron, spread
from .rules import Params, Phi, State, UpdateRule

LARGEST_CHANGE = 0.75


def step_size(
    *,
    scale_free: bool = True,
    momentum: bool = False,
    use_loss: bool = False,
    hidden: int = 16,
    generator: torch.Generator | None = None,
) -> UpdateRule:
    """theta_{t+1} = theta_t - alpha_t g_t with alpha_t = lr * f_phi(s_t), f_phi a network of two hidden layers.

    s_t holds cos(g_t, m_t), cos(g_t, g_{t-1}) with m_t a running mean of gradients, and a norm. Scale-free, the norm is
    the logarithm of the ratio of norms of g_t and g_{t-1}, and the network changes the step size by a factor,
    log alpha_t = log alpha_{t-1} + 0.75 tanh(.): multiplying the loss or theta by a constant changes nothing but lr.
    Otherwise, as the source article writes it, the norm is the logarithm of the norm of g_t, and the network gives
    log alpha_t itself. An untrained rule is gradient descent at rate lr; with momentum, heavy ball with beta 0.5.

    Args:
        scale_free: change the step size by a factor, instead of giving it absolutely.
        momentum: learn (alpha_t, beta_t): v_t = beta_t v_{t-1} + g_t, theta_{t+1} = theta_t - alpha_t v_t.
        use_loss: let s_t hold the loss as well: log f_t / f_{t-1} (scale-free; needs losses > 0), or log f_t.
        hidden: units of each hidden layer.
        generator: source of the initial weights, which are float64.
    """
    phi = perceptron((3 + use_loss, hidden, hidden, 1 + momentum), generator)

    def init(theta: Params) -> State:
        zeros = {k: torch.zeros_like(v) for k, v in theta.items()}
        slots = {"last": zeros, "mean": zeros} | ({"v": zeros} if momentum else {})
        return {"step": 0, "lr": 1.0, "loss": None, "last_loss": None, "log_alpha": 0.0} | slots

    def update(phi: Phi, grads: Params, state: State) -> tuple[Params, State]:
        mean = {k: 0.9 * state["mean"][k] + 0.1 * g for k, g in grads.items()}
        out = run_perceptron(phi, _features(grads, mean, state, scale_free, use_loss))
        change = LARGEST_CHANGE * torch.tanh(out[..., 0])
        log_alpha = state["log_alpha"] + change if scale_free else out[..., 0]
        state = state | {"step": state["step"] + 1, "last": grads, "mean": mean, "log_alpha": log_alpha}
        state["last_loss"] = state["loss"]
        alpha, direction = state["lr"] * log_alpha.exp(), grads
        if momentum:
            beta = torch.sigmoid(out[..., 1])
            direction = {k: spread(beta, g) * state["v"][k] + g for k, g in grads.items()}
            state["v"] = direction
        return {k: -spread(alpha, d) * d for k, d in direction.items()}, state

    return UpdateRule(phi, init, update)


def _features(grads: Params, mean: Params, state: State, scale_free: bool, use_loss: bool) -> Tensor:
    """s_t, [features] or [tasks, features]."""
    lead, first = state["loss"].dim(), state["step"] == 0
    norm = log_norm(grads, lead)
    if scale_free:
        norm = torch.zeros_like(norm) if first else norm - log_norm(state["last"], lead)
    found = [norm, cosine(grads, mean, lead), cosine(grads, state["last"], lead)]
    if use_loss:
        now = state["loss"].clamp_min(1e-30).log()
        last = now if first else state["last_loss"].clamp_min(1e-30).log()
        found.append(now - last if scale_free else now)
    return torch.stack(found, -1)
