"""Meta-training a rule: runs on freshly drawn problems, one estimate of the meta-gradient after the other."""

from collections.abc import Callable
from typing import Any

import torch

from .estimators import Estimate
from .meta import MetaGradient
from .rules import Params, UpdateRule
from .runs import Trained
from .tasks.problems import Problem
from .train import meta_train
from .unrolls import Carry


class Episodes:
    """The runs of one meta-training, as `meta_train` takes a learner: where the present run stands is part of it."""

    def __init__(
        self, rule: UpdateRule, sample: Callable[[torch.Generator], Problem], estimator: Callable[..., Estimate]
    ) -> None:
        self.rule, self.sample, self.estimator = rule, sample, estimator
        self.problem: Problem | None = None
        self.carry: Carry | None = None
        self.drawn: Any = None

    def estimate(self, learner: Any, phi: Params, generator: torch.Generator, _: Any = None) -> MetaGradient:
        """The next window's meta-gradient; a new problem is drawn where a run has ended or left the finite numbers."""
        if self.problem is None:
            self.drawn = generator.get_state()
            self.problem = self.sample(generator)
        found = self.estimator(self.rule, phi, self.problem, self.carry, generator)
        self.carry = found.carry
        if self.carry is None or not found.loss.isfinite():
            self.problem = self.carry = None
        return MetaGradient(found.loss, found.phi, None)

    def standing(self) -> dict[str, Any]:
        """What a checkpoint needs to go on in the middle of a run."""
        return {"drawn": None if self.problem is None else self.drawn, "carry": self.carry and tuple(self.carry)}

    def restore(self, saved: dict[str, Any]) -> None:
        """The inverse of `standing`; the problem is drawn again from the same random numbers."""
        self.drawn, self.carry = saved["drawn"], saved["carry"] and Carry(*saved["carry"])
        self.problem = None if self.drawn is None else self.sample(_generator(self.drawn))


def train_rule(
    rule: UpdateRule,
    sample: Callable[[torch.Generator], Problem],
    estimator: Callable[..., Estimate],
    iterations: int,
    *,
    lr: float = 3e-3,
    clip: float | None = 1.0,
    **options: Any,
) -> Trained:
    """Meta-train a rule's phi: `meta_train` with an estimator of the gradient of training runs.

    Args:
        rule: the rule to start from.
        sample: generator -> a `Problem`, drawn anew for each run.
        estimator: see `metalearn_utils.estimators`.
        iterations: outer steps, one per window.
        lr: outer step size, for Adam.
        clip: scale a meta-gradient down to this norm where it is longer.
        options: as for `meta_train`; iterations that are not finite are skipped and counted in `skipped` by default.

    Returns:
        A `Trained` whose `theta` is phi: use it as `rule._replace(phi=trained.theta)`.
    """
    episodes = Episodes(rule, sample, estimator)
    options = {"theta": rule.phi, "skip": True} | options
    return meta_train(episodes.estimate, episodes, lambda generator: generator, iterations, lr=lr, clip=clip, **options)


def _generator(state: torch.Tensor) -> torch.Generator:
    generator = torch.Generator()
    generator.set_state(state)
    return generator
