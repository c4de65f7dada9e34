"""The networks of the page "MAML from scratch": sinusoid regression, float64, 1-40-40-1 ReLU units."""

from collections.abc import Callable
from functools import partial

import torch

from ..meta import Learner, fomaml, joint, maml, reptile
from ..models import mlp, params_of
from ..parallel import mse
from ..rules import Params, sgd
from ..tasks.sinusoids import Sinusoids
from ..train import Trained, meta_train

META_BATCH = 25


def network(seed: int = 0):
    """The network of Finn et al. (2017), section 5.1."""
    return mlp((1, 40, 40, 1), generator=torch.Generator().manual_seed(seed))


def learner(lr: float = 0.01, steps: int = 1) -> Learner:
    """Gradient descent on the mean squared error; the paper trains with one step of rate 0.01."""
    return Learner(network(), mse, sgd(lr), steps)


def initial(seed: int) -> Params:
    """Initial parameters in float64."""
    return params_of(network(seed), torch.float64)


def train(
    seed: int, iterations: int, algorithm: Callable, shots: int = 10, lr: float = 0.01, steps: int = 1, **options
) -> Trained:
    """Meta-train on 25 tasks per iteration with as many query examples as shots."""

    def sample(generator: torch.Generator):
        return Sinusoids().sample(META_BATCH, shots=shots, queries=shots, generator=generator)

    options = {"theta": initial(seed), "seed": seed, "every": 1000} | options
    return meta_train(algorithm, learner(lr, steps), sample, iterations, **options)


def reptile_options() -> dict:
    """Reptile's outer step: epsilon falls linearly from 1 to 0, without Adam (Nichol et al. 2018, section 6)."""
    return {"optimizer": torch.optim.SGD, "lr": 1.0, "schedule": lambda progress: 1 - progress}


def train_reptile(seed: int, iterations: int, inner_lr: float = 0.003, **options) -> Trained:
    """Reptile: five inner steps on all 20 examples of a task."""

    def sample(generator: torch.Generator):
        return Sinusoids().sample(META_BATCH, shots=10, queries=10, generator=generator)

    options = {"theta": initial(seed), "seed": seed, "every": 1000} | reptile_options() | options
    return meta_train(reptile, learner(inner_lr, 5), sample, iterations, **options)


RECIPES: dict[str, Callable[..., Trained]] = {
    "sinusoid-maml-5": partial(train, iterations=15000, algorithm=maml, shots=5),
    "sinusoid-maml-10": partial(train, iterations=15000, algorithm=maml, shots=10),
    "sinusoid-maml-20": partial(train, iterations=15000, algorithm=maml, shots=20),
    "sinusoid-fomaml": partial(train, iterations=15000, algorithm=fomaml),
    "sinusoid-reptile": partial(train_reptile, iterations=15000),
    "sinusoid-joint": partial(train, iterations=6000, algorithm=joint),
}
