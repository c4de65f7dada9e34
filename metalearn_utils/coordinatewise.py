"""Learned rules that apply one small network to every parameter: its size does not depend on the model's."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .features import log_sign, perceptron, rms, row, run_perceptron, spread, unrow
from .rules import Params, Phi, State, UpdateRule, safe_sqrt

MEANS = (0.5, 0.9, 0.99)
HORIZONS = (10, 30, 100)


def per_parameter_mlp(
    *, base: float = 0.05, use_time: bool = True, hidden: int = 8, generator: torch.Generator | None = None
) -> UpdateRule:
    """Adam's direction, corrected by a network that sees each parameter's recent gradients.

    u = -lr * base * (a + d) * exp(s), where a is Adam's direction (decays 0.9 and 0.999) and (d, s) the outputs of a
    network of two hidden layers, s within [-4, 4]. It sees, per parameter: the gradient and its running means with
    decays 0.5, 0.9 and 0.99, divided by the root mean square of the tensor's gradient and, clipped to [-5, 5], by
    Adam's root of the second moment; the logarithms of both divisors; and the time. Untrained, it is Adam at rate
    lr * base. In the manner of Metz et al. (2020), https://arxiv.org/abs/2009.11243.

    Args:
        base: the step size of the Adam that it starts from.
        use_time: let the network see tanh(t / 10 - 1), tanh(t / 30 - 1) and tanh(t / 100 - 1).
        hidden: units of each hidden layer.
        generator: source of the initial weights, which are float64.
    """
    phi = perceptron((10 + 3 * use_time, hidden, hidden, 2), generator)

    def init(theta: Params) -> State:
        return {"step": 0, "lr": 1.0, "loss": None, "m": 0.0, "v": 0.0}

    def update(phi: Phi, grads: Params, state: State) -> tuple[Params, State]:
        lead, t = state["loss"].dim(), state["step"] + 1
        g, size = row(grads, lead), rms(grads, lead)
        decay = torch.tensor(MEANS, dtype=g.dtype, device=g.device)
        m = decay * state["m"] + (1 - decay) * g.unsqueeze(-1)
        v = 0.999 * state["v"] + 0.001 * g * g
        root = safe_sqrt(v / (1 - 0.999**t))
        adam = m[..., 1] / (1 - 0.9**t) / (root + 1e-8)
        out = run_perceptron(phi, _seen(g, m, size, root, t if use_time else None), torch.relu)
        u = -base * (adam + out[..., 0]) * out[..., 1].clamp(-4, 4).exp()
        return unrow(spread(state["lr"], u) * u, grads, lead), state | {"step": t, "m": m, "v": v}

    return UpdateRule(phi, init, update)


def _seen(g: Tensor, m: Tensor, size: Tensor, root: Tensor, t: int | None) -> Tensor:
    """The features of every coordinate, [..., n, features]."""
    moments = torch.cat([g.unsqueeze(-1), m], -1)
    logs = [size.log(), (root + 1e-16).log()]
    by_root = (moments / (root + 1e-16).unsqueeze(-1)).clamp(-5, 5)
    found = [moments / size.unsqueeze(-1), by_root, torch.stack(logs, -1) / 10]
    if t is not None:
        clock = torch.tanh(t / torch.tensor(HORIZONS, dtype=g.dtype, device=g.device) - 1)
        found.append(clock.expand(*g.shape, 3))
    return torch.cat(found, -1)


def lstm(*, hidden: int = 20, scale: float = 0.1, generator: torch.Generator | None = None) -> UpdateRule:
    """The coordinatewise LSTM of Andrychowicz et al. (2016), section 2.1 and appendix A: two layers, one per parameter.

    u = lr * scale * (w h_2 + b), where h_2 is the second layer's output for the preprocessed gradient, see `log_sign`.

    Args:
        hidden: units of each layer; 20 in the paper.
        scale: factor on the output; 0.1 in the paper.
        generator: source of the initial weights, which are float64 (uniform, as `torch.nn.LSTMCell`).
    """

    def uniform(*shape: int) -> Tensor:
        return (2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1) * hidden**-0.5

    phi = {"w1": uniform(4 * hidden, 2 + hidden), "b1": uniform(4 * hidden)}
    phi |= {"w2": uniform(4 * hidden, 2 * hidden), "b2": uniform(4 * hidden)}
    phi |= {"w": uniform(1, hidden), "b": torch.zeros(1, dtype=torch.float64)}

    def init(theta: Params) -> State:
        return {"step": 0, "lr": 1.0, "loss": None, "cells": None}

    def update(phi: Phi, grads: Params, state: State) -> tuple[Params, State]:
        lead = state["loss"].dim()
        x = log_sign(row(grads, lead))
        weights = {k: w.to(x.dtype) for k, w in phi.items()}
        h1, c1, h2, c2 = map(_columns, state["cells"] or [x.new_zeros(*x.shape[:-1], hidden)] * 4)
        h1, c1 = _cell(weights["w1"], weights["b1"], _columns(x), h1, c1)
        h2, c2 = _cell(weights["w2"], weights["b2"], h1, h2, c2)
        u = scale * (weights["w"] @ h2 + weights["b"]).reshape(x.shape[:-1])
        cells = [v.T.reshape(*x.shape[:-1], hidden) for v in (h1, c1, h2, c2)]
        return unrow(spread(state["lr"], u) * u, grads, lead), state | {"step": state["step"] + 1, "cells": cells}

    return UpdateRule(phi, init, update)


def _columns(x: Tensor) -> Tensor:
    """[..., n, features] -> [features, all coordinates], in which each gate is one block of memory."""
    return x.flatten(0, -2).T


def _cell(w: Tensor, b: Tensor, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """One LSTM cell on columns; the gates in the order of `torch.nn.LSTMCell`: input, forget, candidate, output."""
    i, f, g, o = torch.addmm(b.unsqueeze(-1), w, torch.cat([x, h])).chunk(4)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def gated(*, generator: torch.Generator | None = None) -> UpdateRule:
    """A minimal form of Ravi and Larochelle (2017): theta is the cell state of an LSTM whose gates are learned.

    theta_{t+1} = f * theta_t - i * g_t, with gates (f, i) = sigmoid(W [g, loss, theta, f_t, i_t] + b) per parameter
    (their equations 4 and 5, without the first LSTM layer); gradient and loss are preprocessed by `log_sign`. It starts
    close to gradient descent: f = 0.9999, i = 0.01. Meta-train theta_0 with it: `meta_train(maml, learn_rule=True)`.
    """
    phi = {"w": 0.01 * torch.randn(2, 7, generator=generator, dtype=torch.float64)}
    phi |= {"b": torch.logit(torch.tensor([0.9999, 0.01], dtype=torch.float64))}

    def init(theta: Params) -> State:
        return {"step": 0, "lr": 1.0, "loss": None, "theta": dict(theta), "gates": None}

    def update(phi: Phi, grads: Params, state: State) -> tuple[Params, State]:
        lead = state["loss"].dim()
        g, theta = row(grads, lead), row(state["theta"], lead)
        bias = torch.sigmoid(phi["b"]).to(g.dtype)
        gates = bias.expand(*g.shape, 2) if state["gates"] is None else state["gates"]
        loss = log_sign(state["loss"]).unsqueeze(-2).expand(*g.shape, 2).to(g.dtype)
        x = torch.cat([log_sign(g), loss, theta.unsqueeze(-1), gates], -1)
        gates = torch.sigmoid(F.linear(x, phi["w"].to(g.dtype), phi["b"].to(g.dtype)))
        u = (gates[..., 0] - 1) * theta - spread(state["lr"], g) * gates[..., 1] * g
        updates = unrow(u, grads, lead)
        moved = {k: state["theta"][k] + updates[k] for k in grads}
        return updates, state | {"step": state["step"] + 1, "theta": moved, "gates": gates}

    return UpdateRule(phi, init, update)
