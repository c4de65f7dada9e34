"""The networks of the book, `mlp` and `conv4`, their one exact normalisation layer, and a blur for comparison."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .rules import Params

ACTIVATIONS = {"relu": F.relu, "tanh": torch.tanh, "softplus": F.softplus}


def params_of(model: nn.Module, dtype: torch.dtype | None = None) -> Params:
    """The model's parameters as a dict of detached copies, the form that every algorithm here takes."""
    return {name: p.detach().clone().to(dtype or p.dtype) for name, p in model.named_parameters()}


class MLP(nn.Module):
    """Fully connected network; `mlp` builds one. `stacked` evaluates many parameter sets in one matrix product."""

    def __init__(self, sizes: Sequence[int], activation: str, generator: torch.Generator | None) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:]))
        gain = 2**0.5 if activation != "tanh" else 1.0
        for layer in self.layers:
            _initialise(layer, gain, generator)

    def forward(self, x: Tensor) -> Tensor:
        """x [n, inputs] -> outputs [n, outputs]."""
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)

    def stacked(self, params: Params, x: Tensor) -> Tensor:
        """x [tasks, n, inputs] -> [tasks, n, outputs], with parameters stacked on a leading task axis."""
        last = len(self.layers) - 1
        for i in range(last + 1):
            x = _stacked_linear(x, params[f"layers.{i}.weight"], params[f"layers.{i}.bias"])
            x = self.activation(x) if i < last else x
        return x


def mlp(
    sizes: Sequence[int] = (1, 40, 40, 1), activation: str = "relu", generator: torch.Generator | None = None
) -> MLP:
    """The sinusoid network of Finn et al. (2017, section 5.1): two hidden layers of 40 units.

    Args:
        sizes: inputs, hidden units ..., outputs; at least two numbers.
        activation: "relu", "tanh" or "softplus".
        generator: source of the initial weights (normal, variance gain^2 / inputs; biases zero).

    Raises:
        ValueError: fewer than two sizes, a size below 1, or an unknown activation.
    """
    if len(sizes) < 2 or any(not isinstance(s, int) or s < 1 for s in sizes):
        raise ValueError(f"sizes must hold at least two integers >= 1, got {tuple(sizes)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}")
    return MLP(sizes, activation, generator)


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
            _initialise(layer, 2**0.5 if layer is not self.head else 1.0, generator)

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


def _stacked_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [tasks, n, inputs] times weight [tasks, outputs, inputs]; a single input or output needs no matrix product."""
    if weight.shape[2] == 1:
        out = x * weight.transpose(1, 2)
    elif weight.shape[1] == 1:
        out = (x * weight).sum(2, keepdim=True)
    else:
        out = torch.bmm(x, weight.transpose(1, 2))
    return out + bias.unsqueeze(1)


def _initialise(layer: nn.Linear | nn.Conv2d, gain: float, generator: torch.Generator | None) -> None:
    fan_in = layer.weight[0].numel()
    with torch.no_grad():
        layer.weight.normal_(0.0, gain / fan_in**0.5, generator=generator)
        layer.bias.zero_()
