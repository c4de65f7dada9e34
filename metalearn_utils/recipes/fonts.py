"""The networks of the page "From fonts to handwriting": trained on glyphs of the training scripts alone.

Each recipe takes at most 120 CPU seconds on the 2-core machine where it was written; the number of iterations is
fixed. The best of the validated parameters is kept, and validation uses the validation scripts only.
"""

import math
from collections.abc import Callable
from functools import partial

import torch

from ..convnets import conv4
from ..evaluate import evaluate
from ..meta import Learner, fomaml, maml, supervised
from ..models import params_of
from ..parallel import cross_entropy
from ..prototypes import Prototypes, prototypical
from ..rules import Params, sgd
from ..tasks.base import Tasks
from ..tasks.glyphs import Glyphs
from ..train import Trained, meta_train

WAYS, QUERIES = 5, 5
VALIDATION_TASKS = 100


def network(outputs: int | None, seed: int = 0):
    """The small network of every recipe: four strided blocks of 32 channels."""
    return conv4(outputs, 32, "stride", generator=torch.Generator().manual_seed(seed))


def maml_learner(transductive: bool = True) -> Learner:
    """One inner step of rate 0.4, on a mean loss."""
    return Learner(network(WAYS), cross_entropy, sgd(0.4), 1, transductive)


def fomaml_learner(transductive: bool = True) -> Learner:
    """Three inner steps of rate 0.1: at MAML's single step of 0.4 the neglected curvature term is largest."""
    return Learner(network(WAYS), cross_entropy, sgd(0.1), 3, transductive)


def prototype_learner(transductive: bool = True) -> Prototypes:
    """A prototypical network on the same embedding, squared distances divided by 16."""
    return Prototypes(network(None), transductive=transductive)


def train_maml(seed: int, iterations: int, algorithm: Callable = maml, shots: int = 1, **options) -> Trained:
    """Meta-train an initialisation: 4 tasks of 5 ways per iteration, Adam with a cosine schedule."""
    learner = maml_learner() if algorithm is maml else fomaml_learner()
    sample = partial(Glyphs("train").sample, 4, ways=WAYS, shots=shots, queries=QUERIES)
    theta = params_of(network(WAYS, seed))
    return _train(algorithm, learner, sample, iterations, theta, seed, shots, **options)


def train_prototypes(seed: int, iterations: int, tasks: int = 1, ways: int = 20, **options) -> Trained:
    """Train an embedding as a prototypical network: by default one task of 20 ways per iteration."""
    sample = partial(Glyphs("train").sample, tasks, ways=ways, shots=1, queries=QUERIES)
    theta = params_of(network(None, seed))
    return _train(prototypical, prototype_learner(), sample, iterations, theta, seed, 1, **options)


def train_pretrained(seed: int, iterations: int, **options) -> Trained:
    """Supervised pretraining: classify all training characters, batches of 128."""
    glyphs = Glyphs("train")
    learner = Learner(network(glyphs.n_classes), cross_entropy, sgd(0.0), 0)
    theta = params_of(network(glyphs.n_classes, seed))
    return _train(supervised, learner, partial(glyphs.batch, 128), iterations, theta, seed, None, **options)


def _train(algorithm, learner, sample, iterations, theta, seed, shots, dtype=torch.float32, **options) -> Trained:
    def draw(generator: torch.Generator):
        return sample(generator=generator, dtype=dtype)

    theta = {name: value.to(dtype) for name, value in theta.items()}
    settings = {"lr": 4e-3, "schedule": cosine, "every": 200} | options
    validate = validator(learner, shots) if settings.pop("validated", True) else None
    return meta_train(algorithm, learner, draw, iterations, theta=theta, seed=seed, validate=validate, **settings)


def validator(learner: Learner | Prototypes, shots: int | None) -> Callable[[Params, None], float]:
    """Accuracy on fixed tasks of the validation scripts; a pretrained network is judged by its nearest centroid."""
    tasks = tasks_of(Glyphs("val"), VALIDATION_TASKS, shots or 1, seed=1)
    if shots is None:
        judge = Prototypes(network(None), metric="cosine")
        return lambda theta, _: evaluate(judge, without_head(theta), tasks).mean[-1].item()
    return lambda theta, _: evaluate(learner, theta, tasks).mean[-1].item()


def tasks_of(images, tasks: int, shots: int, seed: int, dtype: torch.dtype = torch.float32) -> Tasks:
    """Fixed 5-way test tasks drawn from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    return images.sample(tasks, ways=WAYS, shots=shots, queries=QUERIES, generator=generator, dtype=dtype)


def without_head(theta: Params) -> Params:
    """The embedding's parameters alone."""
    return {name: value for name, value in theta.items() if not name.startswith("head.")}


def cosine(progress: float) -> float:
    """Cosine decay from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * progress))


RECIPES: dict[str, Callable[..., Trained]] = {
    "fonts-maml-1shot": partial(train_maml, iterations=3000),
    "fonts-maml-5shot": partial(train_maml, iterations=1300, shots=5, optimizer=torch.optim.Adam),
    "fonts-fomaml-1shot": partial(train_maml, iterations=2000, algorithm=fomaml),
    "fonts-prototypes": partial(train_prototypes, iterations=3000),
    "fonts-prototypes-5way": partial(train_prototypes, iterations=3000, tasks=4, ways=WAYS),
    "fonts-pretrained": partial(train_pretrained, iterations=4000),
}
