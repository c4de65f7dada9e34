"""Hand-made optimizers that a learned one is compared with, grouped by what they know of the task."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from . import informed as known
from .rates import decayed
from .rules import UpdateRule, adam, momentum, rmsprop, sgd

KNOWS = ("nothing", "L", "m and L", "extra line evaluations")  # beyond gradients; the last group knows L, too


@dataclass(frozen=True)
class Method:
    """A hand-made optimizer with at most one number to tune.

    Attributes:
        name: as shown.
        make: value -> the rule; called without arguments where nothing is tuned. The value must reach the rule through
            phi for all trials to run as one batch.
        knows: one of `KNOWS`.
        grid: the first range of positions x, 0 < low < high, on a geometric scale; None where nothing is tuned.
        value: position x -> value; the same by default.
    """

    name: str
    make: Callable[..., UpdateRule]
    knows: str = "nothing"
    grid: tuple[float, float] | None = None
    value: Callable[[float], float] = float

    def __post_init__(self) -> None:
        if self.knows not in KNOWS:
            raise ValueError(f"knows must be one of {KNOWS}, got {self.knows!r}")
        if self.grid is not None and not 0 < self.grid[0] < self.grid[1] < float("inf"):
            raise ValueError(f"grid must hold two bounds, 0 < low < high, got {self.grid!r}")


def baselines(horizon: int) -> list[Method]:
    """SGD, momentum, Nesterov (both 0.9), RMSprop and Adam, at a constant rate and with cosine decay to 0 at `horizon`.

    Their learning rate is tuned; they know nothing of the task. `horizon` is the number of steps that they will run.
    """
    nesterov = partial(momentum, beta=0.9, nesterov=True)
    table = {"SGD": (sgd, 1e-2, 10.0), "momentum": (momentum, 1e-3, 1.0), "Nesterov": (nesterov, 1e-3, 1.0)}
    table |= {"RMSprop": (rmsprop, 1e-4, 1.0), "Adam": (adam, 1e-3, 1.0)}
    found = []
    for name, (make, low, high) in table.items():
        found.append(Method(name, make, grid=(low, high)))
        found.append(Method(f"{name}, cosine", lambda lr, make=make: decayed(make(lr), horizon), grid=(low, high)))
    return found


def known_scale(probes: int = 1) -> list[Method]:
    """Rules for problems with facts "L" and "m": what one may do who knows them, or may look along a line.

    Args:
        probes: gradients per step along the line for the line searches; one is exact on quadratics,
            eight on logistic regression to about 1 %.
    """
    factor, momenta = (0.25, 4.0), (0.01, 4.0)
    return [
        Method("1/L", known.constant, "L"),
        Method("c/L", known.constant, "L", factor),
        Method("silver steps", known.silver, "L"),
        Method("heavy ball, step 1/L", known.heavy_ball, "L", momenta, share),
        Method("Nesterov, convex", known.nesterov_convex, "L"),
        Method("Barzilai-Borwein", known.barzilai_borwein, "L"),
        Method("heavy ball, best (m, L)", known.best_heavy_ball, "m and L"),
        Method("Nesterov, strongly convex", known.nesterov_strong, "m and L"),
        Method("Chebyshev", known.chebyshev, "m and L"),
        Method("exact line search", partial(known.line_search, probes=probes), "extra line evaluations"),
        Method("relaxed line search", partial(known.line_search, probes=probes), "extra line evaluations", factor),
    ]


def share(x: float) -> float:
    """A momentum constant in (0, 1) for each x > 0: beta = 1 / (1 + x), so that x = (1 - beta) / beta."""
    return 1 / (1 + x)
