"""Sinusoid regression (Finn et al. 2017, section 5.1), its exact constants, and its exact solution."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Batch, Tasks


@dataclass(frozen=True)
class Sinusoids:
    """Tasks y = A sin(x - b) with A, b and x uniform on their ranges.

    Attributes:
        amplitude: range of A; the paper's by default.
        phase: range of b, in radians.
        x: range of the inputs.
    """

    amplitude: tuple[float, float] = (0.1, 5.0)
    phase: tuple[float, float] = (0.0, math.pi)
    x: tuple[float, float] = (-5.0, 5.0)

    def sample(
        self, tasks: int, *, shots: int, queries: int, generator: torch.Generator, dtype: torch.dtype = torch.float64
    ) -> Tasks:
        """Draw tasks; every x and y has shape [tasks, shots or queries, 1].

        Args:
            tasks, shots, queries: how many tasks, support examples and query examples; each >= 1.
            generator: a CPU generator, the only source of randomness.
        """
        for name, value in (("tasks", tasks), ("shots", shots), ("queries", queries)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        a = _uniform(self.amplitude, (tasks, 1, 1), generator)
        b = _uniform(self.phase, (tasks, 1, 1), generator)
        x = _uniform(self.x, (tasks, shots + queries, 1), generator)
        x, y = x.to(dtype), (a * torch.sin(x - b)).to(dtype)
        return Tasks(Batch(x[:, :shots], y[:, :shots]), Batch(x[:, shots:], y[:, shots:]))

    def predict_zero(self) -> float:
        """The exact mean squared error of y = 0: E[A^2] E[sin^2(x - b)]. 4.2517 for the defaults."""
        return _second_moment(self.amplitude) * (0.5 - 0.5 * self._mean_cosine())

    def best_unadapted(self) -> float:
        """The least mean squared error of any fixed function: E[y^2] - E[E[y | x]^2]. 3.0057 for the defaults.

        For phases on [0, pi] the mean function is E[A] (-2/pi) cos x; the formula holds for any range of phases.
        """
        lo, hi = self.phase
        c, s = (math.sin(hi) - math.sin(lo)) / (hi - lo), (math.cos(lo) - math.cos(hi)) / (hi - lo)
        mean = 0.5 * sum(self.amplitude)
        x = torch.linspace(*self.x, 20001, dtype=torch.float64)
        explained = torch.trapezoid((c * x.sin() - s * x.cos()) ** 2, x).item() / (self.x[1] - self.x[0])
        return self.predict_zero() - mean**2 * explained

    def _mean_cosine(self) -> float:
        (a, b), (lo, hi) = self.x, self.phase
        grid = torch.linspace(lo, hi, 20001, dtype=torch.float64)
        inner = (torch.sin(2 * (b - grid)) - torch.sin(2 * (a - grid))) / (2 * (b - a))
        return torch.trapezoid(inner, grid).item() / (hi - lo)


def least_squares(support: Batch, x: Tensor) -> Tensor:
    """The adapted oracle: fit y = p sin x + q cos x to the support set, exact from two noise-free points.

    Args:
        support: x and y of shape [tasks, shots, 1] with at least two different points.
        x: query inputs [tasks, queries, 1].

    Returns:
        predictions [tasks, queries, 1].
    """
    solution = torch.linalg.lstsq(_waves(support.x), support.y).solution
    return _waves(x) @ solution


def _waves(x: Tensor) -> Tensor:
    return torch.cat([x.sin(), x.cos()], dim=-1)


def _uniform(limits: tuple[float, float], shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    lo, hi = limits
    return lo + (hi - lo) * torch.rand(shape, generator=generator, dtype=torch.float64)


def _second_moment(limits: tuple[float, float]) -> float:
    lo, hi = limits
    return (hi**3 - lo**3) / (3 * (hi - lo))
