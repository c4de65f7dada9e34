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
    """Linear centred kernel alignment of two representations, debiased: Nguyen et al. (2021), equation 3.

    hsic(A, B) / sqrt(hsic(A, A) hsic(B, B)), each an unbiased estimate of ||A'B||_F^2 for centred A and B: 1 if they
    agree up to rotation and scale, 0 on average if they are unrelated, however wide they are.

    Args:
        a, b: representations of the same n examples, [n, p] and [n, q].

    Raises:
        ValueError: different numbers of examples, or fewer than four.
    """
    if len(a) != len(b) or len(a) < 4:
        raise ValueError(f"a and b must hold the same examples, at least four, got {len(a)} and {len(b)}")
    k, m = ((x - x.mean(0)) @ (x - x.mean(0)).T for x in (a, b))
    return (hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt()).item()


def hsic(k: Tensor, m: Tensor) -> Tensor:
    """Unbiased Hilbert-Schmidt independence criterion of two kernel matrices [n, n]: Song et al. (2012), equation 5."""
    n = len(k)
    k, m = k - k.diag().diag(), m - m.diag().diag()
    mixed = k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 * (k.sum(0) @ m.sum(0)) / (n - 2)
    return ((k * m).sum() + mixed) / (n * (n - 3))
