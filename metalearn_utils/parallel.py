"""Evaluating one model under many tasks' parameters: one matrix product, one vmap, or a loop.

The library chooses, and every choice gives the same numbers: batched for its own MLP, `vmap` for other modules,
a loop for large convolutions on a CPU (vmap is slower there) and for every operation that vmap differentiates wrongly.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from .rules import Params
from .tasks.base import Batch, Tasks

FEW_TASKS = 3
# Above this many activations per layer, over all tasks, a loop is faster than vmap's grouped convolutions on a CPU.
MANY_ACTIVATIONS = 1_000_000
# Fused with their weights, these kernels give a silently wrong second-order gradient under vmap (functorch #534).
WRONG_UNDER_VMAP = ("batch_norm", "layer_norm", "instance_norm")
RANDOM = ("dropout", "bernoulli", "rand", "normal_", "uniform_")


def mse(outputs: Tensor, y: Tensor) -> Tensor:
    """Mean squared error over the examples and outputs of one task."""
    return ((outputs - y) ** 2).mean()


def cross_entropy(outputs: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy over the examples of one task: logits [n, classes], labels [n]."""
    return F.cross_entropy(outputs, y)


class Forward(NamedTuple):
    """How to evaluate a model and a loss on the tasks at hand.

    Attributes:
        outputs: (params, x, stats_from) -> outputs, for one task or for stacked ones.
        losses: (outputs, y) -> the loss of one task, or [tasks].
        stacked: whether parameters and data carry a leading task axis.
    """

    outputs: Callable[[Params, Tensor, int | None], Tensor]
    losses: Callable[[Tensor, Tensor], Tensor]
    stacked: bool

    def start(self, theta: Params, tasks: Tasks) -> Params:
        """theta for every task: expanded on the task axis, or as it is for one task."""
        n = len(tasks.support.x)
        return {k: v.expand(n, *v.shape) for k, v in theta.items()} if self.stacked else theta

    def parts(self, tasks: Tasks) -> list[Tasks]:
        """The pieces that one evaluation takes: all tasks at once, or each task alone."""
        return [tasks] if self.stacked else list(unstack(tasks))


def forward_of(model: nn.Module, loss: Callable, tasks: Tasks) -> Forward:
    """The fastest exact way to evaluate `model` and `loss` on these tasks."""
    kind = choose(model, tasks)
    return {"batched": batched, "vmap": vmapped, "loop": looped}[kind](model, loss)


def choose(model: nn.Module, tasks: Tasks) -> str:
    """ "batched", "vmap" or "loop": see the module's first lines."""
    if hasattr(model, "stacked"):
        return "batched"
    x = tasks.support.x
    ops = operations(model, x[0])
    unsafe = any(word in op for op in ops for word in WRONG_UNDER_VMAP + RANDOM)
    examples = len(x) * max(x.shape[1], tasks.query.x.shape[1])
    large = any("convolution" in op and n * examples > MANY_ACTIVATIONS for op, n in ops.items())
    return "loop" if unsafe or len(x) <= FEW_TASKS or (large and x.device.type == "cpu") else "vmap"


def batched(model: nn.Module, loss: Callable) -> Forward:
    """Stacked parameters through the model's own batched form."""
    return Forward(lambda params, x, _: model.stacked(params, x), _stacked_loss(loss), True)


def vmapped(model: nn.Module, loss: Callable) -> Forward:
    """Stacked parameters through `torch.vmap`."""

    def outputs(params: Params, x: Tensor, stats_from: int | None) -> Tensor:
        return vmap(lambda p, v: call(model, p, v, stats_from))(params, x)

    return Forward(outputs, _stacked_loss(loss), True)


def looped(model: nn.Module, loss: Callable) -> Forward:
    """One task at a time."""
    return Forward(lambda params, x, stats_from: call(model, params, x, stats_from), loss, False)


def call(model: nn.Module, params: Params, x: Tensor, stats_from: int | None = None) -> Tensor:
    """The model's outputs at `params`; its buffers stay as they are, since copies are handed in."""
    state = params | {name: b.clone() for name, b in model.named_buffers()}
    return functional_call(model, state, (x,), {} if stats_from is None else {"stats_from": stats_from})


def unstack(tasks: Tasks) -> Iterator[Tasks]:
    """Tasks [tasks, n, ...] one by one, each as Tasks of shape [n, ...]."""
    for parts in zip(tasks.support.x, tasks.support.y, tasks.query.x, tasks.query.y):
        yield Tasks(Batch(*parts[:2]), Batch(*parts[2:]))


_operations: WeakKeyDictionary = WeakKeyDictionary()


def operations(model: nn.Module, x: Tensor) -> dict[str, int]:
    """The tensor operations of the model's forward pass, found by running it once, with their largest output.

    Args:
        x: the examples of one task, [n, ...]; the sizes are numbers of elements per example.
    """
    if model not in _operations:
        recorder = _Recorder()
        with torch.no_grad(), recorder:
            call(model, params_like(model, x), x)
        _operations[model] = {op: size // len(x) for op, size in recorder.seen.items()}
    return _operations[model]


def params_like(model: nn.Module, x: Tensor) -> Params:
    """The model's own parameters with the dtype and device of `x`."""
    dtype = x.dtype if x.is_floating_point() else None
    return {k: p.detach().to(device=x.device, dtype=dtype) for k, p in model.named_parameters()}


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        weighted = len(args) > 1 and isinstance(args[1], Tensor)
        name = str(func)
        out = func(*args, **(kwargs or {}))
        if weighted or not any(word in name for word in WRONG_UNDER_VMAP):
            size = out.numel() if isinstance(out, Tensor) else 0
            self.seen[name] = max(size, self.seen.get(name, 0))
        return out


def _stacked_loss(loss: Callable) -> Callable:
    if loss is mse:
        return lambda outputs, y: ((outputs - y) ** 2).flatten(1).mean(1)
    if loss is cross_entropy:
        return lambda outputs, y: F.cross_entropy(outputs.transpose(1, -1), y, reduction="none").mean(1)
    return vmap(loss)
