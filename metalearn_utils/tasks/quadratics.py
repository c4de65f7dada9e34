"""Quadratic tasks, for which every algorithm of the book has a closed form: support loss ½ (θ - c)ᵀ A (θ - c)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..rules import Params
from .base import Batch, Tasks


class Point(nn.Module):
    """A model that is nothing but its parameters: it answers theta [dim] to every example."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(dim, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """x [n, ...] -> theta, n times: [n, dim]."""
        return self.theta.expand(len(x), -1)

    def stacked(self, params: Params, x: Tensor) -> Tensor:
        """x [tasks, n, ...] -> [tasks, n, dim], with theta stacked on a leading task axis."""
        return params["theta"].unsqueeze(1).expand(-1, x.shape[1], -1)


def quadratic(outputs: Tensor, y: Tensor) -> Tensor:
    """The loss of a `Point`: mean over examples of ½ (θ - c)ᵀ A (θ - c), y [n, dim + 1, dim] holding A above the row c."""
    matrix, centre = y[..., :-1, :], y[..., -1, :]
    gap = (outputs - centre).unsqueeze(-1)
    return 0.5 * (gap * (matrix @ gap)).sum((-2, -1)).mean()


class Quadratics(NamedTuple):
    """Stacked quadratic tasks.

    Attributes:
        A: curvature of the support loss, [tasks, dim, dim].
        c: minimum of the support loss, [tasks, dim].
        B: curvature of the query loss.
        d: minimum of the query loss.
    """

    A: Tensor
    c: Tensor
    B: Tensor
    d: Tensor

    def tasks(self) -> Tasks:
        """The same as `Tasks` for a `Learner(Point(dim), quadratic, ...)`: one support and one query example each."""
        halves = ((self.A, self.c), (self.B, self.d))
        ys = [torch.cat([m, v.unsqueeze(1)], dim=1).unsqueeze(1) for m, v in halves]
        return Tasks(*(Batch(y.new_zeros(len(y), 1, 1), y) for y in ys))


def scalar_quadratics(a: list[float], c: list[float]) -> Quadratics:
    """One-dimensional tasks ½ a (θ - c)² whose query loss is their support loss."""
    matrix = torch.tensor(a, dtype=torch.float64).reshape(-1, 1, 1)
    centre = torch.tensor(c, dtype=torch.float64).reshape(-1, 1)
    return Quadratics(matrix, centre, matrix, centre)


def random_quadratics(
    tasks: int,
    dim: int,
    *,
    kappa: float = 100.0,
    largest: float = 1.0,
    spread: float = 1.0,
    generator: torch.Generator,
) -> Quadratics:
    """Randomly rotated quadratics of a given conditioning whose query loss is their support loss.

    The eigenvalues of A are `largest / kappa`, `largest`, and log-uniform between them; c is normal.

    Args:
        tasks, dim: how many tasks, and the number of parameters (at least 2).
        kappa: condition number, the largest eigenvalue over the smallest; >= 1.
        largest: the largest eigenvalue L.
        spread: standard deviation of the minima c, in each coordinate.
        generator: a CPU generator, the only source of randomness.

    Raises:
        ValueError: dim < 2, tasks < 1, kappa < 1, or another value that is not positive.
    """
    for name, value, least in (("tasks", tasks, 1), ("dim", dim, 2), ("kappa", kappa, 1)):
        if not value >= least:
            raise ValueError(f"{name} must be >= {least}, got {value!r}")
    for name, value in (("largest", largest), ("spread", spread)):
        if not value > 0:
            raise ValueError(f"{name} must be > 0, got {value!r}")
    exponent = torch.rand(tasks, dim, generator=generator, dtype=torch.float64)
    exponent[:, 0], exponent[:, 1] = 0.0, 1.0
    values = largest * kappa**-exponent
    turn = torch.linalg.qr(torch.randn(tasks, dim, dim, generator=generator, dtype=torch.float64)).Q
    matrix = turn @ (values.unsqueeze(-1) * turn.mT)
    centre = spread * torch.randn(tasks, dim, generator=generator, dtype=torch.float64)
    return Quadratics(matrix, centre, matrix, centre)
