"""What an optimizer refuses before it changes anything, each with an error that names what came."""

from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .rules import Params

DTYPES = (torch.float32, torch.float64)


class NonFiniteGradient(ValueError):
    """A gradient holds NaN or infinity; neither weights nor state were changed."""


class NonFiniteUpdate(ValueError):
    """The rule made NaN or infinity of finite gradients; neither weights nor state were changed."""


class UnreadLoss(Tensor):
    """Stands for a loss that was not given: a rule may ask how many axes it has, not what it is."""

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func not in (Tensor.dim, Tensor.ndim.__get__, Tensor.size, Tensor.shape.__get__):
            raise ValueError("the rule reads the loss: call step(closure), whose closure returns it, or step(loss=...)")
        return super().__torch_function__(func, types, args, kwargs or {})


def one_number(loss: Any) -> Tensor | None:
    """The loss as a tensor without axes or graph (a Python number in float64); None stays None."""
    if loss is None:
        return None
    if isinstance(loss, Real):
        return torch.tensor(float(loss), dtype=torch.float64)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise ValueError(f"loss must be one number, got {found}")
    return loss.detach().reshape(())


def check_lr(lr: Any) -> float:
    """lr as a float, if it is a finite number >= 0."""
    if not isinstance(lr, Real) or isinstance(lr, bool) or not 0 <= lr < float("inf"):
        raise ValueError(f"lr must be a finite number >= 0, got {lr!r}")
    return float(lr)


def check_dense(what: str, v: Tensor) -> None:
    """Refuse sparse tensors and other types than float32 and float64."""
    if v.layout != torch.strided:
        raise ValueError(f"{what} is sparse: a rule sees all entries; build the layer with sparse=False")
    if v.dtype not in DTYPES:
        raise ValueError(f"{what} must be float32 or float64, got {v.dtype}; `torch.autocast` keeps weights in float32")


def finite(*tensors: Tensor) -> bool:
    """Whether all values are finite; tensors on the meta device have none."""
    flags = [v.isfinite().all() for v in tensors if not v.is_meta]
    return not flags or bool(torch.stack(flags).all())


def check_finite(error: type[ValueError], what: str, tensors: Params) -> None:
    """Raise `error` with the first parameter whose tensor is not finite."""
    if finite(*tensors.values()):
        return
    name, v = next((name, v) for name, v in tensors.items() if not finite(v))
    odd = f"{v.numel() - int(v.isfinite().sum())} of {v.numel()} values"
    raise error(f"{what} parameter {name!r} holds NaN or infinity ({odd}); nothing was changed")


def check_members(grads: Params, members: list[str]) -> None:
    """Refuse a group in which other parameters have a gradient than in its first step."""
    if changed := [name for name in [*members, *grads] if (name in grads) != (name in members)]:
        now, before = ("a", "none") if changed[0] in grads else ("no", "one")
        raise ValueError(
            f"parameter {changed[0]!r} has {now} gradient, but had {before} in the first step of its group. A rule "
            "sees a group as one: give parameters that have a gradient in some steps only a group of their own"
        )
