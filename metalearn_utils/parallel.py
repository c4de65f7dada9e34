"""Evaluating one model under many tasks' parameters: one matrix product, one vmap, or a loop.

The library chooses, and every choice gives the same numbers: batched for its own MLP, `vmap` for other modules,
a loop for large convolutions on a CPU (vmap is slower there) and for every operation that vmap differentiates wrongly.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap

from .probe import WRONG_UNDER_VMAP, caller, check_theta, probe
from .rules import Params
from .tasks.base import Batch, Tasks, check_labels, check_tasks

FEW_TASKS = 3
# Above this many activations per layer, over all tasks, a loop is faster than vmap's grouped convolutions on a CPU.
MANY_ACTIVATIONS = 1_000_000
RANDOM = ("dropout", "bernoulli", "rand", "normal_", "uniform_")


def mse(outputs: Tensor, y: Tensor) -> Tensor:
    """Mean squared error over the examples and outputs of one task."""
    return F.mse_loss(outputs, y)


def cross_entropy(outputs: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy over the examples of one task: logits [n, classes], labels [n]."""
    return F.cross_entropy(outputs, y)


def _mse_slope(outputs: Tensor, y: Tensor) -> Tensor:
    return (outputs - y) * (2 / outputs[0].numel())


def _cross_entropy_slope(outputs: Tensor, y: Tensor) -> Tensor:
    return (outputs.softmax(-1) - F.one_hot(y, outputs.shape[-1]).to(outputs.dtype)) / y.shape[1]


# The derivative of each task's loss in its outputs, [tasks, n, outputs].
SLOPES = {mse: _mse_slope, cross_entropy: _cross_entropy_slope}


class Forward(NamedTuple):
    """How to evaluate a model and a loss on the tasks at hand.

    Attributes:
        outputs: (params, x, stats_from) -> outputs, for one task or for stacked ones.
        losses: (outputs, y) -> the loss of one task, or [tasks].
        stacked: whether parameters and data carry a leading task axis.
        gradient: (params, batch) -> losses and their gradients, where they are written out; None where autograd is used.
    """

    outputs: Callable[[Params, Tensor, int | None], Tensor]
    losses: Callable[[Tensor, Tensor], Tensor]
    stacked: bool
    gradient: Callable[[Params, Batch], tuple[Tensor, Params]] | None = None

    def start(self, theta: Params, tasks: Tasks) -> Params:
        """theta for every task: expanded on the task axis, or as it is for one task."""
        n = len(tasks.support.x)
        return {k: v.expand(n, *v.shape) for k, v in theta.items()} if self.stacked else theta

    def parts(self, tasks: Tasks) -> list[Tasks]:
        """The pieces that one evaluation takes: all tasks at once, or each task alone."""
        return [tasks] if self.stacked else list(unstack(tasks))


def forward_of(model: nn.Module, loss: Callable, tasks: Tasks, theta: Params | None = None) -> Forward:
    """The fastest exact way to evaluate `model` and `loss`; a ValueError that names what does not fit together."""
    check_tasks(tasks)
    if theta is not None:
        check_theta(model, theta, tasks.support.x)
    check_fit(model, loss, {"tasks.support": tasks.support, "tasks.query": tasks.query})
    kind = choose(model, tasks)
    return {"batched": batched, "vmap": vmapped, "loop": looped}[kind](model, loss)


def check_fit(model: nn.Module, loss: Callable, batches: dict[str, Batch]) -> None:
    """Raise a ValueError if the model cannot take the stacked examples or its outputs do not fit the labels."""
    for name, (x, y) in batches.items():
        shape = probe(model, x[0]).outputs
        if loss is cross_entropy:
            check_labels(f"{name}.y", y, shape[-1])
        if loss is mse and y.shape[2:] != shape:
            wanted, got = tuple(shape), tuple(y.shape[2:])
            raise ValueError(f"{name}.y must have examples of shape {wanted}, as the outputs, got {got}")


def choose(model: nn.Module, tasks: Tasks) -> str:
    """ "batched", "vmap" or "loop": see the module's first lines."""
    if hasattr(model, "stacked"):
        return "batched"
    x = tasks.support.x
    ops = probe(model, x[0]).operations
    unsafe = any(word in op for op in ops for word in WRONG_UNDER_VMAP + RANDOM)
    unsafe = unsafe or any(isinstance(m, nn.RNNBase) for m in model.modules())  # vmap has no rule for them
    examples = len(x) * max(x.shape[1], tasks.query.x.shape[1])
    large = any("convolution" in op and n * examples > MANY_ACTIVATIONS for op, n in ops.items())
    return "loop" if unsafe or len(x) <= FEW_TASKS or (large and x.device.type == "cpu") else "vmap"


def batched(model: nn.Module, loss: Callable) -> Forward:
    """Stacked parameters through the model's own batched form."""
    losses, slope = _stacked_loss(loss), SLOPES.get(loss)

    def gradient(params: Params, batch: Batch) -> tuple[Tensor, Params]:
        return model.stacked_gradient(params, batch.x, lambda out: losses(out, batch.y), lambda out: slope(out, batch.y))

    known = slope is not None and hasattr(model, "stacked_gradient")
    return Forward(lambda params, x, _: model.stacked(params, x), losses, True, gradient if known else None)


def vmapped(model: nn.Module, loss: Callable) -> Forward:
    """Stacked parameters through `torch.vmap`."""
    run = caller(model)

    def outputs(params: Params, x: Tensor, stats_from: int | None) -> Tensor:
        return vmap(lambda p, v: run(p, v, stats_from))(params, x)

    return Forward(outputs, _stacked_loss(loss), True)


def looped(model: nn.Module, loss: Callable) -> Forward:
    """One task at a time."""
    return Forward(caller(model), loss, False)


def unstack(tasks: Tasks) -> Iterator[Tasks]:
    """Tasks [tasks, n, ...] one by one, each as Tasks of shape [n, ...]."""
    for parts in zip(tasks.support.x, tasks.support.y, tasks.query.x, tasks.query.y):
        yield Tasks(Batch(*parts[:2]), Batch(*parts[2:]))


def everything(forward: Forward, tasks: Tasks) -> Batch:
    """Support and query examples of one task (or of stacked ones) together."""
    axis = 1 if forward.stacked else 0
    return Batch(*(torch.cat(pair, dim=axis) for pair in zip(tasks.support, tasks.query)))


def minibatches(forward: Forward, data: Batch, size: int | None, steps: int) -> Batch | list[Batch]:
    """One minibatch per inner step, in order and around; the whole batch if `size` is None."""
    if size is None:
        return data
    axis = 1 if forward.stacked else 0
    n = data.x.shape[axis]
    if not 1 <= size <= n:
        raise ValueError(f"batch_size must lie between 1 and the {n} examples of a task, got {size}")
    rows = [torch.arange(k * size, (k + 1) * size, device=data.x.device) % n for k in range(steps)]
    return [Batch(data.x.index_select(axis, r), data.y.index_select(axis, r)) for r in rows]


def scalar_per_task(forward: Forward, outputs: Tensor, y: Tensor) -> Tensor:
    """The loss, a scalar or [tasks]; a ValueError if it is anything else, such as one value per example."""
    value = forward.losses(outputs, y)
    if value.dim() != int(forward.stacked):
        raise ValueError(f"loss must return one number per task, the mean over examples; got {tuple(value.shape)}")
    return value


def mean_over_tasks(forward: Forward, values: list[Tensor]) -> Tensor:
    """Mean of values that come stacked in a list of one, or one for each task."""
    return values[0].mean(0) if forward.stacked else torch.stack(values).mean(0)


def _stacked_loss(loss: Callable) -> Callable:
    if loss is mse:
        return lambda outputs, y: F.mse_loss(outputs, y, reduction="none").flatten(1).mean(1)
    if loss is cross_entropy:
        return lambda outputs, y: F.cross_entropy(outputs.transpose(1, -1), y, reduction="none").mean(1)
    return vmap(loss)
