"""Hand-made rules that know more of their task than the gradient: L, m, or what lies along a line.

What they know comes to them through their state, in slots that `judging.started` fills: "lr" with 1 / L, "facts" with
those of the problem's facts that it names, and "gradient" with a function (params, step) -> gradients.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .features import inner, spread
from .progress import check_counts
from .rules import Params, Phi, State, UpdateRule


class Move(NamedTuple):
    """u_t = -a g_t + b u_{t-1} + c g_{t-1}, a number or [tasks] each, and what the state keeps beside it."""

    a: Tensor
    b: Any = 0.0
    c: Any = 0.0
    keep: State = {}


def informed(
    move: Callable[[Phi, Params, State], Move],
    facts: tuple[str, ...] = ("L",),
    slots: tuple[str, ...] = (),
    **phi: float,
) -> UpdateRule:
    """A rule u_t = -a_t g_t + b_t u_{t-1} + c_t g_{t-1} whose coefficients follow from what it knows of its task.

    Args:
        move: (phi, gradients, state) -> the coefficients.
        facts: names of the facts of the problem that the state's slot "facts" holds.
        slots: of "gradient" and "theta" (the present parameters), those that `move` reads.
        phi: the rule's hyperparameters.
    """

    def init(theta: Params) -> State:
        zeros = {k: torch.zeros_like(v) for k, v in theta.items()}
        given = {"gradient": None, "theta": dict(theta)}
        state = {"step": 0, "lr": None, "facts": dict.fromkeys(facts), "u": zeros, "last": zeros}
        return state | {k: given[k] for k in slots}

    def update(phi: Phi, grads: Params, state: State) -> tuple[Params, State]:
        a, b, c, keep = move(phi, grads, state)
        past = ((k, g, state["u"][k], state["last"][k]) for k, g in grads.items())
        u = {k: -spread(a, g) * g + spread(b, g) * before + spread(c, g) * last for k, g, before, last in past}
        if "theta" in state:
            keep = keep | {"theta": {k: state["theta"][k] + u[k] for k in u}}
        return u, state | keep | {"step": state["step"] + 1, "u": u, "last": grads}

    return UpdateRule({k: torch.tensor(float(v), dtype=torch.float64) for k, v in phi.items()}, init, update)


def constant(c: float = 1.0) -> UpdateRule:
    """Gradient descent with the step c / L."""
    return informed(lambda phi, grads, state: Move(phi["c"] * state["lr"]), c=c)


def silver() -> UpdateRule:
    """alpha_t = (1 + (1 + sqrt 2)^(v - 1)) / L, 2^v the largest power of 2 that divides t = 1, 2, ...

    Altschuler and Parrilo (2023), https://arxiv.org/abs/2309.16530.
    """

    def move(phi: Phi, grads: Params, state: State) -> Move:
        t = state["step"] + 1
        return Move((1 + (1 + 2**0.5) ** ((t & -t).bit_length() - 2)) * state["lr"])

    return informed(move)


def heavy_ball(beta: float) -> UpdateRule:
    """u_t = -g_t / L + beta u_{t-1}."""
    return informed(lambda phi, grads, state: Move(state["lr"], phi["beta"]), beta=beta)


def best_heavy_ball() -> UpdateRule:
    """alpha = 4 / (sqrt L + sqrt m)^2, beta = ((sqrt L - sqrt m) / (sqrt L + sqrt m))^2 (Polyak 1964)."""

    def move(phi: Phi, grads: Params, state: State) -> Move:
        large, small = state["facts"]["L"].sqrt(), state["facts"]["m"].sqrt()
        return Move(4 / (large + small) ** 2, ((large - small) / (large + small)) ** 2)

    return informed(move, ("L", "m"))


def nesterov_convex() -> UpdateRule:
    """x_{t+1} = y_t - g(y_t) / L, y_{t+1} = x_{t+1} + beta_t (x_{t+1} - x_t), beta_t = t / (t + 3) (Nesterov 1983).

    theta is y, where the gradient is taken.
    """
    return informed(lambda phi, grads, state: _nesterov(state["step"] / (state["step"] + 3), state["lr"]))


def nesterov_strong() -> UpdateRule:
    """As `nesterov_convex` with beta = (sqrt kappa - 1) / (sqrt kappa + 1), kappa = L / m (Nesterov 2004)."""

    def move(phi: Phi, grads: Params, state: State) -> Move:
        root = (state["facts"]["L"] / state["facts"]["m"]).sqrt()
        return _nesterov((root - 1) / (root + 1), state["lr"])

    return informed(move, ("L", "m"))


def _nesterov(beta: Tensor | float, lr: Tensor) -> Move:
    return Move((1 + beta) * lr, beta, beta * lr)


def chebyshev() -> UpdateRule:
    """After every t the error polynomial is T_t's, the smallest on [m, L] (Young 1953); as a three-term recurrence."""

    def move(phi: Phi, grads: Params, state: State) -> Move:
        total = state["facts"]["L"] + state["facts"]["m"]
        ratio = (state["facts"]["L"] - state["facts"]["m"]) / total
        if state["step"] == 0:
            return Move(2 / total, keep={"rho": ratio})
        under = 2 - ratio * state["rho"]
        return Move(4 / (total * under), ratio / under * state["rho"], keep={"rho": ratio / under})

    return informed(move, ("L", "m"))


def barzilai_borwein() -> UpdateRule:
    """alpha_t = s's / s'y, s = theta_t - theta_{t-1}, y = g_t - g_{t-1}; 1 / L at first and where s'y is not positive.

    The long step of Barzilai and Borwein (1988). It amplifies rounding: after 20 steps on the book's quadratics, single
    tasks differ by orders of magnitude between machines, and the mean over 2,048 tasks in its third digit.
    """

    def move(phi: Phi, grads: Params, state: State) -> Move:
        lead = state["lr"].dim()
        s, y = state["u"], {k: g - state["last"][k] for k, g in grads.items()}
        along = inner(s, y, lead)
        return Move(torch.where(along > 0, inner(s, s, lead) / along, state["lr"]))

    return informed(move)


def line_search(factor: float = 1.0, probes: int = 1) -> UpdateRule:
    """`factor` times the step to the minimum along the gradient, the zero of the derivative along it.

    Regula falsi (Illinois) from 0 and 1 / L; on a quadratic the first guess is exact, g'g / g'Ag.

    Args:
        factor: 1 is exact line search; it is phi["c"].
        probes: gradients that are taken along the line in each step, >= 1.
    """
    check_counts(probes=probes)

    def move(phi: Phi, grads: Params, state: State) -> Move:
        def slope(a: Tensor) -> Tensor:
            at = {k: state["theta"][k] - spread(a, g) * g for k, g in grads.items()}
            return -inner(grads, state["gradient"](at, state["step"]), a.dim())

        lr = state["lr"]
        return Move(phi["c"] * _zero(slope, -inner(grads, grads, lr.dim()), lr, probes))

    return informed(move, slots=("gradient", "theta"), c=factor)


def _zero(slope: Callable[[Tensor], Tensor], f0: Tensor, x1: Tensor, probes: int) -> Tensor:
    """Where an increasing function, f0 < 0 at 0, is zero; x1 > 0 is where it is looked at first."""
    x0, f1 = torch.zeros_like(x1), slope(x1)
    for _ in range(probes - 1):
        x2 = _secant(x0, f0, x1, f1)
        f2 = slope(x2)
        kept = (f0 * f1 < 0) & (f1 * f2 > 0)
        x0, f0 = torch.where(kept, x0, x1), torch.where(kept, f0 / 2, f1)
        x1, f1 = x2, f2
    return _secant(x0, f0, x1, f1)


def _secant(x0: Tensor, f0: Tensor, x1: Tensor, f1: Tensor) -> Tensor:
    return torch.where(f1 == f0, x1, x1 - f1 * (x1 - x0) / (f1 - f0))
