"""The learned rules that ship with the package: how each was meta-trained, in float64, from a seed.

The number of iterations is fixed; each recipe takes at most 120 CPU seconds on the 2-core machine where it was written.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from ..coordinatewise import lstm, per_parameter_mlp
from ..episodes import train_rule
from ..estimators import Estimate, MetaLoss, es, pes, truncated
from ..learned import step_size
from ..rules import UpdateRule
from ..tasks.networks import Digits, GlyphClasses
from ..tasks.problems import LogisticRegression, Quadratics
from ..runs import Trained
from .fonts import cosine

LOG = MetaLoss(log=True)


class RuleRecipe(NamedTuple):
    """How a rule is meta-trained.

    Attributes:
        kind, config: what builds the untrained rule, see `metalearn_utils.rule_files.RULES`.
        family: builds the family of problems.
        tasks: problems per run.
        estimator: of the meta-gradient.
        iterations, lr: outer steps, and the outer step size of Adam, which falls as a cosine.
    """

    kind: Callable[..., UpdateRule]
    config: dict[str, Any]
    family: Callable[[], Any]
    tasks: int
    estimator: Callable[..., Estimate]
    iterations: int
    lr: float

    def untrained(self, seed: int) -> UpdateRule:
        """The rule before meta-training."""
        return self.kind(**self.config, generator=torch.Generator().manual_seed(seed))

    def __call__(self, seed: int, **options: Any) -> Trained:
        """Meta-train; `theta` of the result is phi."""
        family = self.family()

        def sample(generator: torch.Generator):
            return family.sample(self.tasks, generator=generator)

        options = {"schedule": cosine, "seed": seed} | options
        return train_rule(self.untrained(seed), sample, self.estimator, self.iterations, lr=self.lr, **options)


_steps = partial(RuleRecipe, step_size, tasks=16, estimator=es(50, 16, 0.05, LOG), lr=1e-2)
_mlp = partial(RuleRecipe, per_parameter_mlp, {"base": 0.1}, tasks=1, estimator=pes(20, 100, 4, 0.05, LOG), lr=5e-3)
_lstm = partial(RuleRecipe, lstm, {}, tasks=1, estimator=truncated(20, 100, stop_gradient=True), lr=3e-3)

RULE_RECIPES: dict[str, RuleRecipe] = {
    "step-size": _steps({}, Quadratics, iterations=600),
    "step-size-momentum": _steps({"momentum": True}, Quadratics, iterations=400),
    "step-size-logistic": _steps({}, LogisticRegression, iterations=300),
    "digits-mlp": _mlp(Digits, iterations=900),
    "glyphs-mlp": _mlp(partial(GlyphClasses, "train"), iterations=600),
    "digits-lstm": _lstm(Digits, iterations=800),
    "glyphs-lstm": _lstm(partial(GlyphClasses, "train"), iterations=400),
}
