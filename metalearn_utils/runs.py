"""One meta-training run: the state that a checkpoint holds, and how a step changes it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.utils import _pytree as pytree

from .checkpoints import FORMAT, CheckpointError, read_checkpoint, write_atomically
from .meta import MetaGradient
from .rules import Params, Phi
from .trace import WORTH_TRACING, Replay


RECORDED = ("losses", "validation", "seconds", "skipped")


class DivergedError(RuntimeError):
    """Meta-training met a loss or gradient that is not finite."""


@dataclass
class Trained:
    """The result of `meta_train`.

    Attributes:
        theta, phi: meta-trained parameters (the best validated ones if `validate` was given) and hyperparameters.
        losses: the meta-loss of every iteration.
        validation: (iteration, score) pairs.
        seconds: CPU seconds spent, over all sessions of the run.
        skipped: iterations whose loss or gradient was not finite and which changed nothing (with `skip`).
        finished: False if the run was interrupted.
    """

    theta: Params
    phi: Phi | None
    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    skipped: list[int] = field(default_factory=list)
    finished: bool = False


class Run:
    """One meta-training run: the state that a checkpoint holds, and how a step changes it."""

    def __init__(
        self, algorithm, learner, theta, lr, optimizer, schedule, learn_rule, seed, iterations, clip, skip
    ) -> None:
        traced = iterations > WORTH_TRACING and hasattr(getattr(learner, "model", None), "stacked")
        self.algorithm, self.learner = Replay(algorithm, learner) if traced else algorithm, learner
        self.lr, self.schedule, self.iterations, self.clip, self.skip = lr, schedule, iterations, clip, skip
        phi = learner.rule.phi if learn_rule else {}
        leaves, self.spec = pytree.tree_flatten((dict(theta), phi))
        self.leaves = [leaf.detach().clone() for leaf in leaves]
        self.optimizer = optimizer(self.leaves, lr=lr)
        self.generator = torch.Generator().manual_seed(seed)
        self.result = Trained(*self.parameters)
        self.best: list[Tensor] | None = None
        self.identity = _identity(algorithm, learner, self.leaves, self.optimizer, lr, seed, iterations)

    @property
    def parameters(self) -> tuple[Params, Phi | None]:
        theta, phi = pytree.tree_unflatten(self.leaves, self.spec)
        return theta, phi or None

    @property
    def done(self) -> int:
        return len(self.result.losses)

    def step(self, sample: Callable, path: Path | None) -> None:
        start = time.process_time()
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * (self.schedule(self.done / self.iterations) if self.schedule else 1.0)
        theta, phi = self.parameters
        found = self.algorithm(self.learner, theta, sample(self.generator), phi)
        if self._guard(found, path):
            self._descend(pytree.tree_leaves((found.theta, found.phi or {})))
        self.result.losses.append(found.loss.item())
        self.result.seconds += time.process_time() - start

    def _descend(self, grads: list[Tensor]) -> None:
        if len(grads) != len(self.leaves):
            raise ValueError("learn_rule=True needs an algorithm that gives the gradient of the rule: maml or fomaml")
        for leaf, grad in zip(self.leaves, grads):
            leaf.grad = grad
        if self.clip is not None:
            clip_grad_norm_(self.leaves, self.clip)
        self.optimizer.step()

    def _guard(self, found: MetaGradient, path: Path | None) -> bool:
        """Whether the iteration counts: all its values are finite."""
        values = [found.loss, *pytree.tree_leaves((found.theta, found.phi or {}))]
        if all(v.isfinite().all() for v in values):
            return True
        if self.skip:
            self.result.skipped.append(self.done + 1)
            return False
        kept = f"the last good checkpoint is {path}" if path is not None and path.exists() else "no checkpoint is kept"
        raise DivergedError(
            f"loss or meta-gradient is not finite at iteration {self.done + 1} (loss {found.loss.item():.3g}); {kept}. "
            "Try a smaller inner or outer step size, fewer inner steps, or float64."
        )

    def validate(self, score: Callable | None) -> None:
        if score is None:
            return
        value = float(score(*self.parameters))
        if not self.result.validation or value > max(v for _, v in self.result.validation):
            self.best = [leaf.detach().clone() for leaf in self.leaves]
        self.result.validation.append((self.done, value))

    def save(self, path: Path | None) -> None:
        if path is None:
            return
        state = {name: getattr(self, name) for name in ("leaves", "best", "identity")}
        if hasattr(self.learner, "standing"):
            state["standing"] = self.learner.standing()
        state |= {"format": FORMAT, "optimizer": self.optimizer.state_dict(), "generator": self.generator.get_state()}
        record = self.result
        write_atomically(path, state | {k: getattr(record, k) for k in RECORDED})

    def load(self, path: Path) -> None:
        state = read_checkpoint(path)
        if state["identity"] != self.identity:
            raise CheckpointError(f"{path} belongs to another run: expected {self.identity}, got {state['identity']}")
        for leaf, saved in zip(self.leaves, state["leaves"]):
            leaf.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.best = state["best"]
        if "standing" in state:
            self.learner.restore(state["standing"])
        for k in RECORDED:
            setattr(self.result, k, state[k])

    def finish(self, validated: bool) -> Trained:
        leaves = self.best if validated and self.best is not None else self.leaves
        theta, phi = pytree.tree_unflatten([v.detach().clone() for v in leaves], self.spec)
        self.result.theta, self.result.phi = theta, phi or None
        self.result.finished = self.done == self.iterations
        return self.result


def _identity(algorithm, learner, leaves, optimizer, lr: float, seed: int, iterations: int) -> dict[str, Any]:
    name = getattr(getattr(algorithm, "func", algorithm), "__name__", str(algorithm))
    settings = {k: getattr(learner, k, None) for k in ("steps", "transductive")}
    settings["rule"] = [v.double().sum().item() for v in pytree.tree_leaves(getattr(learner, "rule", ((),))[0])]
    settings["optimizer"] = type(optimizer).__name__
    shapes = [list(leaf.shape) for leaf in leaves]
    return {"algorithm": name, "lr": lr, "seed": seed, "iterations": iterations, "shapes": shapes} | settings
