"""How much adaptation changes each layer: linear CKA between a layer's outputs before and after."""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .rules import Params


class _Layers(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> list[Tensor]:
        blocks = self.model.layers(x)
        return [*blocks, self.model.head(blocks[-1].flatten(1))]


def layer_outputs(model: nn.Module, params: Params, x: Tensor) -> list[Tensor]:
    """The outputs of a `conv4`'s four blocks and of its head, each flattened to [n, features]; no graph."""
    with torch.no_grad():
        found = functional_call(_Layers(model), {f"model.{k}": v for k, v in params.items()}, (x,))
    return [layer.flatten(1) for layer in found]


def cka(a: Tensor, b: Tensor) -> float:
    """Linear centred kernel alignment of two representations: Kornblith et al. (2019), section 3.

    ||A'B||_F^2 / (||A'A||_F ||B'B||_F) for centred A and B: 1 if they agree up to rotation and scale, 0 if unrelated.

    Args:
        a, b: representations of the same n examples, [n, p] and [n, q].

    Raises:
        ValueError: different numbers of examples, or fewer than two.
    """
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"a and b must hold the same examples, at least two, got {len(a)} and {len(b)}")
    ka, kb = (m @ m.T for m in (a - a.mean(0), b - b.mean(0)))
    return ((ka * kb).sum() / (ka.norm() * kb.norm())).item()
