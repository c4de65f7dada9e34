"""The meta-training loop: progress bar, interrupt, checkpoint and resume, validation, divergence guard."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .checkpoints import FORMAT, CheckpointError, check_writable, read_checkpoint, write_atomically
from .meta import MetaGradient
from .progress import bar_of, check_counts, interrupts
from .rules import Params, Phi
from .trace import WORTH_TRACING, Replay

ADAM = partial(torch.optim.Adam, fused=True)


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
        finished: False if the run was interrupted.
    """

    theta: Params
    phi: Phi | None
    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    finished: bool = False


def meta_train(
    algorithm: Callable[..., MetaGradient],
    learner: Any,
    sample: Callable[[torch.Generator], Any],
    iterations: int,
    *,
    theta: Params,
    lr: float = 1e-3,
    optimizer: Callable[..., torch.optim.Optimizer] = ADAM,
    schedule: Callable[[float], float] | None = None,
    learn_rule: bool = False,
    seed: int = 0,
    validate: Callable[[Params, Phi | None], float] | None = None,
    every: int = 100,
    stop: int | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> Trained:
    """Minimise the meta-loss with an outer optimizer.

    Args:
        algorithm: `maml`, `fomaml`, `reptile`, `joint`, `prototypical`, `supervised`, or a `functools.partial` of one.
        learner: what the algorithm takes.
        sample: draws one meta-batch from a generator.
        iterations: outer steps in all.
        theta: the initial parameters to start from; they are not changed.
        lr: outer step size. For Reptile with `torch.optim.SGD` it is epsilon.
        optimizer: builds the outer optimizer from (tensors, lr=...).
        schedule: progress in [0, 1) -> factor on `lr`; constant by default.
        learn_rule: meta-train the rule's phi as well (Meta-SGD).
        seed: seeds the generator that `sample` gets.
        validate: (theta, phi) -> score, higher is better; called every `every` iterations and at the end, and the
            best parameters are returned.
        every: iterations between validations and between checkpoints.
        stop: end after this many iterations, as an interrupt would: the schedule stays that of the whole run, and a
            checkpoint can be resumed.
        checkpoint: file to save to and to resume from. A resumed run equals an uninterrupted one bit for bit.
        progress: show a bar.

    Raises:
        DivergedError: a loss or gradient is not finite; names the iteration, the checkpoint, and what to try.
        CheckpointError: the checkpoint is truncated, foreign, of another run, or cannot be written.
    """
    stop = iterations if stop is None else stop
    check_counts(iterations=iterations, every=every, stop=stop)
    run = _Run(algorithm, learner, theta, lr, optimizer, schedule, learn_rule, seed, iterations)
    path = Path(checkpoint) if checkpoint is not None else None
    if path is not None and path.exists():
        run.load(path)
    check_writable(path)
    with interrupts() as interrupted, bar_of(run.done, iterations, progress) as bar:
        while run.done < min(stop, iterations) and not interrupted():
            run.step(sample, path)
            bar.update()
            if run.done % every == 0 or run.done == iterations:
                run.validate(validate)
                bar.set_postfix_str(f"loss {run.result.losses[-1]:.3f}")
                run.save(path)
        run.save(path)
    return run.finish(validate is not None)


class _Run:
    """One meta-training run: the state that a checkpoint holds, and how a step changes it."""

    def __init__(self, algorithm, learner, theta, lr, optimizer, schedule, learn_rule, seed, iterations) -> None:
        traced = iterations > WORTH_TRACING and hasattr(learner.model, "stacked")
        self.algorithm, self.learner = Replay(algorithm, learner) if traced else algorithm, learner
        self.lr, self.schedule, self.iterations = lr, schedule, iterations
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
        self._guard(found, path)
        grads = pytree.tree_leaves((found.theta, found.phi or {}))
        if len(grads) != len(self.leaves):
            raise ValueError("learn_rule=True needs an algorithm that gives the gradient of the rule: maml or fomaml")
        for leaf, grad in zip(self.leaves, grads):
            leaf.grad = grad
        self.optimizer.step()
        self.result.losses.append(found.loss.item())
        self.result.seconds += time.process_time() - start

    def _guard(self, found: MetaGradient, path: Path | None) -> None:
        values = [found.loss, *pytree.tree_leaves((found.theta, found.phi or {}))]
        if all(v.isfinite().all() for v in values):
            return
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
        state |= {"format": FORMAT, "optimizer": self.optimizer.state_dict(), "generator": self.generator.get_state()}
        record = self.result
        write_atomically(path, state | {k: getattr(record, k) for k in ("losses", "validation", "seconds")})

    def load(self, path: Path) -> None:
        state = read_checkpoint(path)
        if state["identity"] != self.identity:
            raise CheckpointError(f"{path} belongs to another run: expected {self.identity}, got {state['identity']}")
        for leaf, saved in zip(self.leaves, state["leaves"]):
            leaf.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.best = state["best"]
        self.result.losses, self.result.validation = state["losses"], [tuple(v) for v in state["validation"]]
        self.result.seconds = state["seconds"]

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
