"""Calling a model as a function of its parameters, and looking at it: which operations it runs, what it returns."""

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from .rules import Params

# Fused with their weights, these kernels give a wrong second-order gradient under vmap of grad (functorch #534).
WRONG_UNDER_VMAP = ("batch_norm", "layer_norm", "instance_norm")


class Probe(NamedTuple):
    """What one forward pass shows.

    Attributes:
        operations: name of each tensor operation -> its largest output, in numbers of elements per example.
        outputs: shape of the model's output for one example.
    """

    operations: dict[str, int]
    outputs: torch.Size


def caller(model: nn.Module) -> Callable[..., Tensor]:
    """(params, x, stats_from) -> the model's outputs, with all that stays the same between calls looked up once.

    The model's buffers stay as they are, since copies (in the dtype of x) are handed in.
    """
    buffers = dict(model.named_buffers())
    names = [dict(model.named_parameters(remove_duplicate=once)).keys() for once in (True, False)]

    def run(params: Params, x: Tensor, stats_from: int | None = None) -> Tensor:
        state = params | {name: _follow(b, x).clone() for name, b in buffers.items()}
        kwargs = {} if stats_from is None else {"stats_from": stats_from}
        return functional_call(model, state, (x,), kwargs, tie_weights=names[0] != names[1])

    return run


def call(model: nn.Module, params: Params, x: Tensor, stats_from: int | None = None) -> Tensor:
    """The model's outputs at `params`, once: see `caller`."""
    return caller(model)(params, x, stats_from)


_seen: WeakKeyDictionary = WeakKeyDictionary()


def probe(model: nn.Module, x: Tensor) -> Probe:
    """Run the model once on the examples of one task, x [n, ...]; remembered for each mode and shape of example.

    Raises:
        ValueError: the model cannot take examples of this shape.
    """
    known, key = _seen.setdefault(model, {}), (model.training, x.shape[1:])
    if key not in known:
        params = {k: _follow(p.detach(), x) for k, p in model.named_parameters()}
        with torch.no_grad(), (recorder := _Recorder()):
            outputs = _try(model, params, x)
        known[key] = Probe({op: size // len(x) for op, size in recorder.seen.items()}, outputs.shape[1:])
    return known[key]


def check_theta(model: nn.Module, theta: Params, x: Tensor) -> Params:
    """theta, if it holds exactly the model's parameters, in the dtype of x; a ValueError that names the first fault."""
    wanted = dict(model.named_parameters())
    for name in theta.keys() ^ wanted.keys():
        fault = "is unknown to the model" if name in theta else "is missing"
        raise ValueError(f"theta: parameter {name!r} {fault}; the model has {sorted(wanted)}")
    for name, value in theta.items():
        if value.shape != wanted[name].shape:
            raise ValueError(
                f"theta[{name!r}] must have shape {tuple(wanted[name].shape)}, got {tuple(value.shape)}"
            )
        if x.is_floating_point() and value.dtype != x.dtype:
            raise ValueError(f"theta[{name!r}] must have dtype {x.dtype}, as the examples, got {value.dtype}")
    return theta


def uses_support_statistics(model: nn.Module, examples: Tensor) -> bool:
    """Whether the model can normalise by other statistics than its batch's; an error if it has to, but cannot."""
    if getattr(model, "takes_stats_from", False):
        return True
    if any("batch_norm" in op for op in probe(model, examples).operations):
        raise ValueError(
            "transductive=False needs a model whose forward takes `stats_from` (as conv4 does): "
            "this one normalises with its own batch statistics"
        )
    return False


def _try(model: nn.Module, params: Params, x: Tensor) -> Tensor:
    try:
        outputs = call(model, params, x)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise ValueError(f"tasks: the model takes no examples of shape {tuple(x.shape)} per task: {error}") from error
    if not isinstance(outputs, Tensor) or outputs.shape[:1] != x.shape[:1]:
        got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(f"model must return one row for each of the {len(x)} examples of a task, got {got}")
    return outputs


def _follow(value: Tensor, x: Tensor) -> Tensor:
    floating = x.is_floating_point() and value.is_floating_point()
    return value.to(device=x.device, dtype=x.dtype if floating else None)


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, out = str(func), func(*args, **(kwargs or {}))
        weighted = any(isinstance(a, Tensor) for a in args[1:])
        if weighted or not any(word in name for word in WRONG_UNDER_VMAP):
            size = out.numel() if isinstance(out, Tensor) else 0
            self.seen[name] = max(size, self.seen.get(name, 0))
        return out
