"""The shape of a task: support examples to adapt on, query examples to be judged by."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode


class Batch(NamedTuple):
    """Examples of one task, x [n, ...] and y [n, ...]; with a leading task axis for stacked tasks."""

    x: Tensor
    y: Tensor


class Tasks(NamedTuple):
    """Tasks stacked on a leading axis: support.x [tasks, n, ...], query.x [tasks, m, ...], likewise y."""

    support: Batch
    query: Batch

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Tasks":
        """The same tasks on another device, floating-point tensors in another dtype."""
        return Tasks(*(Batch(*(_move(t, device, dtype) for t in batch)) for batch in self))


def check_tasks(tasks: Tasks) -> None:
    """Raise a ValueError that names the first fault in shape or value; values are not read on meta tensors, nor while a
    computation is being traced.
    """
    counts = set()
    for part, batch in (("support", tasks.support), ("query", tasks.query)):
        for name, value in (("x", batch.x), ("y", batch.y)):
            where = f"tasks.{part}.{name}"
            if value.dim() < 2 or value.shape[0] == 0 or value.shape[1] == 0:
                raise ValueError(f"{where} must have shape [tasks >= 1, examples >= 1, ...], got {tuple(value.shape)}")
            check_values(where, value)
            counts.add(len(value))
        if batch.x.shape[1] != batch.y.shape[1]:
            raise ValueError(f"tasks.{part}: x has {batch.x.shape[1]} examples per task, y has {batch.y.shape[1]}")
    if len(counts) > 1:
        raise ValueError(f"tasks: support and query must hold the same number of tasks, got {sorted(counts)}")
    shapes = [tuple(batch.x.shape[2:]) for batch in tasks]
    if shapes[0] != shapes[1]:
        raise ValueError(f"tasks.query.x must have examples of shape {shapes[0]}, as tasks.support.x, got {shapes[1]}")


def check_labels(where: str, y: Tensor, classes: int) -> None:
    """Raise a ValueError unless y holds integers from 0 to classes - 1; not on meta tensors or in a trace."""
    if y.dtype != torch.int64:
        raise ValueError(f"{where} must hold class labels of dtype int64, got {y.dtype}")
    if not _readable(y):
        return
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= classes:
        raise ValueError(f"{where} must hold labels from 0 to {classes - 1}, got labels from {low} to {high}")


def check_values(where: str, value: Tensor) -> None:
    """Raise a ValueError if a floating-point tensor holds NaN or infinity; not on meta tensors or in a trace."""
    if not (_readable(value) and value.is_floating_point()):
        return
    # A sum is several times cheaper, and never finite if a value is not; only where it overflows must all be looked at.
    if not math.isfinite(value.sum().item()) and not value.isfinite().all():
        raise ValueError(f"{where} must be finite, got NaN or infinity")


def _readable(value: Tensor) -> bool:
    return value.device.type != "meta" and get_proxy_mode() is None


def _move(t: Tensor, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
    return t.to(device=device, dtype=dtype if t.is_floating_point() else None)
