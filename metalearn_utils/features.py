"""What learned rules see of a gradient: sums per task, cosines, and the coordinates of all tensors in one row.

Parameters of one task have no leading axis; stacked ones have [tasks], and `lead` counts these axes (0 or 1).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .rules import Params, Phi

TINY = 1e-30


def inner(a: Params, b: Params, lead: int) -> Tensor:
    """The inner product over all parameters of a task: [] or [tasks]."""
    return sum((a[k] * b[k]).reshape(*a[k].shape[:lead], -1).sum(-1) for k in a)


def log_norm(a: Params, lead: int) -> Tensor:
    """The logarithm of the norm of a, over all parameters of a task; finite at zero."""
    return 0.5 * (inner(a, a, lead) + TINY).log()


def cosine(a: Params, b: Params, lead: int) -> Tensor:
    """cos(a, b) over all parameters of a task; 0 where one of them is zero."""
    return inner(a, b, lead) * (inner(a, a, lead) * inner(b, b, lead) + TINY).rsqrt()


def spread(value: Tensor | float, like: Tensor) -> Tensor | float:
    """A value per task, [] or [tasks], shaped to multiply a parameter `like` [tasks, ...]."""
    if not isinstance(value, Tensor):
        return value
    return value.reshape(value.shape + (1,) * (like.dim() - value.dim())).to(like.dtype)


def row(params: Params, lead: int) -> Tensor:
    """All coordinates of a task side by side, [n] or [tasks, n]."""
    return torch.cat([v.reshape(*v.shape[:lead], -1) for v in params.values()], -1)


def unrow(values: Tensor, like: Params, lead: int) -> Params:
    """The inverse of `row`, with the names and shapes of `like`."""
    sizes = [v[(0,) * lead].numel() for v in like.values()]
    return {k: part.reshape(v.shape) for (k, v), part in zip(like.items(), values.split(sizes, -1))}


def rms(params: Params, lead: int) -> Tensor:
    """For each coordinate the root mean square of the tensor that it belongs to: the shape of `row`."""
    parts = [v.reshape(*v.shape[:lead], -1) for v in params.values()]
    return torch.cat([(p.square().mean(-1, keepdim=True) + TINY).sqrt().expand_as(p) for p in parts], -1)


def perceptron(sizes: tuple[int, ...], generator: torch.Generator | None, dtype: torch.dtype = torch.float64) -> Phi:
    """Weights w0, b0, w1, ... of a small network whose last layer is zero: it starts with output 0."""
    phi: Phi = {}
    for i, (a, b) in enumerate(zip(sizes, sizes[1:])):
        scale = 0.0 if i == len(sizes) - 2 else a**-0.5
        phi[f"w{i}"] = scale * torch.randn(b, a, generator=generator, dtype=dtype)
        phi[f"b{i}"] = torch.zeros(b, dtype=dtype)
    return phi


def run_perceptron(phi: Phi, x: Tensor, activation=torch.tanh) -> Tensor:
    """x [..., inputs] -> [..., outputs]; the weights follow the dtype of x."""
    last = sum(name.startswith("w") for name in phi) - 1
    for i in range(last + 1):
        x = F.linear(x, phi[f"w{i}"].to(x.dtype), phi[f"b{i}"].to(x.dtype))
        x = activation(x) if i < last else x
    return x


def log_sign(g: Tensor, p: float = 10.0) -> Tensor:
    """Andrychowicz et al. (2016), appendix A, [..., 2].

    (log abs(g) / p, sign g) where abs(g) >= e^-p, else (-1, e^p g).
    """
    size = g.abs()
    large = size >= math.exp(-p)
    first = torch.where(large, size.clamp_min(TINY).log() / p, -1.0)
    second = torch.where(large, g.sign(), g * math.exp(p))
    return torch.stack([first, second], -1)
