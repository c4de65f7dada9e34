"""The fully connected network of the book, `mlp`, which evaluates many tasks' parameters at once."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .rules import Params

ACTIVATIONS = {"relu": F.relu, "tanh": torch.tanh, "softplus": F.softplus}
# The derivative of each, as a function of its output.
DERIVATIVES = {"relu": torch.sign, "tanh": lambda h: 1 - h * h, "softplus": lambda h: -torch.expm1(-h)}


def params_of(model: nn.Module, dtype: torch.dtype | None = None) -> Params:
    """The model's parameters as a dict of detached copies, the form that every algorithm here takes."""
    return {name: p.detach().clone().to(dtype or p.dtype) for name, p in model.named_parameters()}


class MLP(nn.Module):
    """Fully connected network; `mlp` builds one. `stacked` evaluates many parameter sets in one matrix product."""

    def __init__(self, sizes: Sequence[int], activation: str, generator: torch.Generator | None) -> None:
        super().__init__()
        self.activation, self.derivative = ACTIVATIONS[activation], DERIVATIVES[activation]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:]))
        gain = 2**0.5 if activation != "tanh" else 1.0
        for layer in self.layers:
            initialise(layer, gain, generator)

    def forward(self, x: Tensor) -> Tensor:
        """x [n, inputs] -> outputs [n, outputs]."""
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)

    def stacked(self, params: Params, x: Tensor) -> Tensor:
        """x [tasks, n, inputs] -> [tasks, n, outputs], with parameters stacked on a leading task axis."""
        return self._units(params, x)[-1]

    def stacked_gradient(self, params: Params, x: Tensor, loss: Callable, slope: Callable) -> tuple[Tensor, Params]:
        """Backpropagation written out, for stacked parameters: a third of autograd's time, and differentiable itself.

        Args:
            params: stacked on a leading task axis.
            x: inputs [tasks, n, inputs].
            loss: outputs [tasks, n, outputs] -> losses [tasks].
            slope: outputs -> the derivative of each task's loss in its outputs, of the same shape.

        Returns:
            losses [tasks], and their gradients, shaped as `params`.
        """
        units, grads = [x, *self._units(params, x)], {}
        delta = slope(units[-1])
        for i in reversed(range(len(self.layers))):
            grads[f"layers.{i}.bias"] = delta.sum(1)
            grads[f"layers.{i}.weight"] = torch.bmm(delta.transpose(1, 2), units[i])
            if i > 0:
                delta = torch.bmm(delta, params[f"layers.{i}.weight"]) * self.derivative(units[i])
        return loss(units[-1]), {name: grads[name] for name in params}

    def _units(self, params: Params, x: Tensor) -> list[Tensor]:
        """The output of every layer, each [tasks, n, units]."""
        last, units = len(self.layers) - 1, []
        for i in range(last + 1):
            x = _stacked_linear(x, params[f"layers.{i}.weight"], params[f"layers.{i}.bias"])
            x = self.activation(x) if i < last else x
            units.append(x)
        return units


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


def _stacked_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [tasks, n, inputs] times weight [tasks, outputs, inputs]; a single input or output needs no matrix product."""
    if weight.shape[2] == 1:
        out = x * weight.transpose(1, 2)
    elif weight.shape[1] == 1:
        out = (x * weight).sum(2, keepdim=True)
    else:
        out = torch.bmm(x, weight.transpose(1, 2))
    return out + bias.unsqueeze(1)


def initialise(layer: nn.Linear | nn.Conv2d, gain: float, generator: torch.Generator | None) -> None:
    """Normal weights of variance gain^2 / inputs, biases zero."""
    fan_in = layer.weight[0].numel()
    with torch.no_grad():
        layer.weight.normal_(0.0, gain / fan_in**0.5, generator=generator)
        layer.bias.zero_()
