"""A meta-gradient recorded once and replayed: the same arithmetic without Python in between."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from .meta import MetaGradient
from .rules import Params, Phi

WORTH_TRACING = 1000


class Replay:
    """`algorithm(learner, theta, tasks, phi)` recorded on the first call and replayed on inputs of the same shapes.

    Inputs of other shapes, and algorithms that cannot be recorded, are computed in the ordinary way.
    """

    def __init__(self, algorithm: Callable[..., MetaGradient], learner: Any) -> None:
        self.algorithm, self.learner = algorithm, learner
        self.graph: Callable | None = None
        self.spec, self.signature = None, None

    def __call__(self, learner: Any, theta: Params, tasks: Any, phi: Phi | None = None) -> MetaGradient:
        leaves, spec = pytree.tree_flatten((theta, tasks, phi or {}))
        signature = [spec, *((leaf.shape, leaf.dtype) for leaf in leaves)]
        if self.signature is None:
            self.signature = signature
            self._record(leaves, spec)
        if self.graph is None or signature != self.signature:
            return self.algorithm(learner, theta, tasks, phi)
        loss, d_theta, d_phi = pytree.tree_unflatten(list(self.graph(*leaves)), self.spec)
        return MetaGradient(loss, d_theta, d_phi or None)

    def _record(self, leaves: list[Tensor], spec: Any) -> None:
        def run(*leaves: Tensor) -> tuple[Tensor, ...]:
            theta, tasks, phi = pytree.tree_unflatten(list(leaves), spec)
            loss, d_theta, d_phi = self.algorithm(self.learner, theta, tasks, phi or None)
            out, self.spec = pytree.tree_flatten((loss, d_theta, d_phi or {}))
            return tuple(out)

        expected = run(*leaves)  # first, so that faulty input is refused with its own error
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                graph = make_fx(run)(*leaves)
                self.graph = torch.jit.trace(graph, leaves, check_trace=False)
                replayed = self.graph(*leaves)
        except Exception:  # what cannot be recorded is computed in the ordinary way
            self.graph = None
            return
        if not all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(replayed, expected)):
            self.graph = None
