"""The meta-training loop: progress bar, interrupt, checkpoint and resume, validation, divergence guard."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .checkpoints import check_writable
from .meta import MetaGradient
from .progress import bar_of, check_counts, interrupts
from .rules import Params, Phi
from .runs import DivergedError, Run, Trained

__all__ = ["ADAM", "DivergedError", "Trained", "meta_train"]
ADAM = partial(torch.optim.Adam, fused=True)


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
    clip: float | None = None,
    skip: bool = False,
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
        clip: scale a meta-gradient down to this norm where it is longer; no clipping by default.
        skip: skip an iteration whose loss or gradient is not finite and count it in `Trained.skipped`, instead of raising.
        validate: (theta, phi) -> score, higher is better; called every `every` iterations and at the end, and the
            best parameters are returned.
        every: iterations between validations and between checkpoints.
        stop: end after this many iterations, as an interrupt would: the schedule stays that of the whole run, and a
            checkpoint can be resumed.
        checkpoint: file to save to and to resume from. A resumed run equals an uninterrupted one bit for bit.
        progress: show a bar.

    Raises:
        DivergedError: a loss or gradient is not finite (unless `skip`); names the iteration, the checkpoint, and what to try.
        CheckpointError: the checkpoint is truncated, foreign, of another run, or cannot be written.
    """
    stop = iterations if stop is None else stop
    check_counts(iterations=iterations, every=every, stop=stop)
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be a number > 0 or None, got {clip!r}")
    run = Run(algorithm, learner, theta, lr, optimizer, schedule, learn_rule, seed, iterations, clip, skip)
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
