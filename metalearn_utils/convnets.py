"""The convolutional network of the book, `conv4`, its one exact normalisation layer, and a blur for comparison."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .models import initialise


def normalise(x: Tensor, stats_from: int | None = None, eps: float = 1e-5) -> Tensor:
    """Subtract each channel's mean and divide by its standard deviation.

    The weights stay outside the kernel: fused with them, batch and layer norm give a wrong second-order gradient
    under `vmap` (PyTorch functorch issue 534).

    Args:
        x: images [n, channels, height, width].
        stats_from: take the statistics from the first `stats_from` images only; from all of them by default.
    """
    if stats_from is None:
        return F.batch_norm(x, None, None, training=True, eps=eps)
    var, mean = torch.var_mean(x[:stats_from], dim=(0, 2, 3), correction=0, keepdim=True)
    return (x - mean) * (var + eps).rsqrt()


class Norm(nn.Module):
    """Batch normalisation without running statistics: `normalise(x) * weight + bias` per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, stats_from: int | None = None) -> Tensor:
        """x [n, channels, height, width] -> same shape; `stats_from` as in `normalise`."""
        return normalise(x, stats_from) * self.weight[:, None, None] + self.bias[:, None, None]


class Conv4(nn.Module):
    """Four blocks of 3x3 convolution, normalisation and non-linearity; `conv4` builds one."""

    takes_stats_from = True

    def __init__(self, outputs: int | None, channels: int, pool: str, smooth: bool, generator) -> None:
        super().__init__()
        self.pool, self.activation = pool, F.softplus if smooth else F.relu
        stride = 2 if pool == "stride" else 1
        widths = [1] + 4 * [channels]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, stride, padding=1) for a, b in zip(widths, widths[1:]))
        self.norms = nn.ModuleList(Norm(channels) for _ in range(4))
        self.features_out = channels * (4 if pool == "stride" else 1)
        self.head = nn.Linear(self.features_out, outputs) if outputs else None
        for layer in [*self.convs, *([self.head] if outputs else [])]:
            initialise(layer, 2**0.5 if layer is not self.head else 1.0, generator)

    def layers(self, x: Tensor, stats_from: int | None = None) -> list[Tensor]:
        """The output of each block, images [n, 1, 28, 28] -> four tensors [n, channels, ., .]."""
        found = []
        for conv, norm in zip(self.convs, self.norms):
            x = self.activation(norm(conv(x), stats_from))
            x = F.max_pool2d(x, 2) if self.pool == "max" else x
            found.append(x)
        return found

    def forward(self, x: Tensor, stats_from: int | None = None) -> Tensor:
        """x [n, 1, 28, 28] -> logits [n, outputs], or features [n, features_out] without a head."""
        features = self.layers(x, stats_from)[-1].flatten(1)
        return features if self.head is None else self.head(features)


def conv4(
    outputs: int | None = 5,
    channels: int = 64,
    pool: str = "max",
    smooth: bool = False,
    generator: torch.Generator | None = None,
) -> Conv4:
    """The four-block network of Vinyals et al. (2016), as Finn et al. (2017, section 5.2) use it on Omniglot.

    Args:
        outputs: number of classes, or None for an embedding without a head.
        channels: filters per block; 64 in the papers, 32 for the small weights that this package ships.
        pool: "max" (2x2 max pooling) or "stride" (strided convolutions).
        smooth: softplus for relu, so that finite differences exist; needs pool="stride".
        generator: source of the initial weights.
    """
    if pool not in ("max", "stride"):
        raise ValueError(f"pool must be 'max' or 'stride', got {pool!r}")
    if smooth and pool != "stride":
        raise ValueError("smooth needs pool='stride': max pooling has kinks of its own")
    if not isinstance(channels, int) or channels < 1 or (outputs is not None and outputs < 1):
        raise ValueError(f"channels and outputs must be integers >= 1, got {channels!r} and {outputs!r}")
    return Conv4(outputs, channels, pool, smooth, generator)


class Blur(nn.Module):
    """Images with their centre of mass moved to the middle, then blurred: pixels that forgive small shifts.

    Args:
        sigma: standard deviation of the Gaussian, in pixels.
    """

    def __init__(self, sigma: float) -> None:
        super().__init__()
        if not sigma > 0:
            raise ValueError(f"sigma must be > 0, got {sigma!r}")
        self.sigma = sigma

    def forward(self, x: Tensor) -> Tensor:
        """x [n, 1, height, width], at least 0 -> same shape."""
        steps = torch.arange(-math.ceil(3 * self.sigma), math.ceil(3 * self.sigma) + 1, dtype=x.dtype, device=x.device)
        bell = torch.softmax(-(steps**2) / (2 * self.sigma**2), 0)
        return F.conv2d(centred(x), torch.outer(bell, bell)[None, None], padding=len(steps) // 2)


def centred(x: Tensor) -> Tensor:
    """Move each image's centre of mass to the middle, x [n, 1, height, width] -> same shape; bilinear, zeros outside."""
    mass = x.sum((1, 2, 3)).clamp(min=torch.finfo(x.dtype).tiny)
    height, width = (torch.arange(1 - n, n, 2, dtype=x.dtype, device=x.device) / n for n in x.shape[2:])
    across, down = (x.sum((1, 2)) @ width / mass, x.sum((1, 3)) @ height / mass)  # in [-1, 1]
    shift = torch.eye(2, 3, dtype=x.dtype, device=x.device).repeat(len(x), 1, 1)
    shift[:, :, 2] = torch.stack([across, down], 1)
    return F.grid_sample(x, F.affine_grid(shift, list(x.shape), align_corners=False), align_corners=False)
