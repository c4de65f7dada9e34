"""Helper library of the book "Learning to Optimize": one update rule, one inner loop, and what is meta-learned."""

from .adapt import Adapted, adapt
from .claims import ClaimError, claim
from .convnets import conv4
from .episodes import train_rule
from .evaluate import Scores, evaluate, over_seeds
from .meta import Learner, MetaGradient, fomaml, joint, maml, reptile, supervised
from .models import mlp, params_of
from .parallel import cross_entropy, mse
from .frames import scrub
from .optimizer import LearnedOptimizer
from .plots import show
from .prototypes import NearestNeighbour, Prototypes, prototypical
from .rule_files import load_rule, save_rule
from .rules import UpdateRule, adam, momentum, per_parameter, per_step, rmsprop, sgd
from .settings import require, settings
from .tasks.base import Batch, Tasks
from .train import Trained, meta_train
from .weights import load_weights

__all__ = [name for name in dir() if not name.startswith("_")]
