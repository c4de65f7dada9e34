"""Gaussian process regression: a rival that knows no other task, only that curves are smooth."""

import torch
from torch import Tensor

from .tasks.base import Batch


def gaussian_process(support: Batch, x: Tensor, length: float, noise: float = 1e-6) -> Tensor:
    """Posterior mean of stacked tasks: k(x, X) (k(X, X) + noise I)^-1 Y, Rasmussen and Williams (2006), equation 2.25.

    The kernel is `k(a, b) = exp(-(a - b)^2 / (2 length^2))`, the prior mean zero.

    Args:
        support: examples x [tasks, n, inputs] and y [tasks, n, outputs].
        x: query inputs [tasks, m, inputs].
        length: the distance over which outputs stay similar, in units of x.
        noise: variance added to the diagonal, which keeps the system solvable.

    Returns:
        Predictions [tasks, m, outputs].
    """
    for name, value in (("length", length), ("noise", noise)):
        if not value > 0:
            raise ValueError(f"{name} must be > 0, got {value!r}")

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-(torch.cdist(a, b) ** 2) / (2 * length**2))

    gram = kernel(support.x, support.x) + noise * torch.eye(support.x.shape[1], dtype=x.dtype, device=x.device)
    return kernel(x, support.x) @ torch.linalg.solve(gram, support.y)
