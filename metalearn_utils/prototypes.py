"""Contrasts without an inner loop: prototypical networks, nearest centroid and nearest neighbour."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .meta import MetaGradient
from .probe import call, check_theta
from .rules import Params, Phi
from .tasks.base import Tasks, check_labels, check_tasks


@dataclass(frozen=True)
class Prototypes:
    """Classify a query by the nearest class mean in feature space: Snell et al. (2017), equations 1 and 2.

    Attributes:
        model: the embedding, x -> features [n, ...]; `nn.Flatten()` compares pixels.
        metric: "euclidean" (squared distance) or "cosine".
        temperature: the logits are -distance / temperature.
        transductive: normalise the queries by their own batch, or by the support set's statistics.
    """

    model: nn.Module
    metric: str = "euclidean"
    temperature: float = 16.0
    transductive: bool = True

    def __post_init__(self) -> None:
        _check_metric(self.metric)
        if not self.temperature > 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature!r}")

    def logits(self, theta: Params, x: Tensor, y: Tensor, queries: Tensor) -> Tensor:
        """Support images x with labels y, query images -> logits [queries, ways], for one task."""
        support, query = embed(self.model, theta, x, queries, self.transductive)
        members = F.one_hot(y).to(support.dtype)
        centroids = (members / members.sum(0)).T @ support
        return -distances(query, centroids, self.metric) / self.temperature

    def predict(self, theta: Params, tasks: Tasks, phi: Phi | None = None, steps: int | None = None) -> Tensor:
        """Logits of the query examples, [1, tasks, queries, ways]: there are no inner steps."""
        check_classes(tasks)
        check_theta(self.model, theta, tasks.support.x)
        with torch.no_grad():
            found = [self.logits(theta, *parts) for parts in zip(*tasks.support, tasks.query.x)]
        return torch.stack(found).unsqueeze(0)


@dataclass(frozen=True)
class NearestNeighbour:
    """Give a query the label of the closest support example; `model` and `metric` as for `Prototypes`."""

    model: nn.Module
    metric: str = "euclidean"
    transductive: bool = True

    def __post_init__(self) -> None:
        _check_metric(self.metric)

    def predict(self, theta: Params, tasks: Tasks, phi: Phi | None = None, steps: int | None = None) -> Tensor:
        """Scores of the query examples, [1, tasks, queries, ways]: minus the distance to the class's closest."""
        check_classes(tasks)
        check_theta(self.model, theta, tasks.support.x)
        with torch.no_grad():
            found = [self._scores(theta, *parts) for parts in zip(*tasks.support, tasks.query.x)]
        return torch.stack(found).unsqueeze(0)

    def _scores(self, theta: Params, x: Tensor, y: Tensor, queries: Tensor) -> Tensor:
        support, query = embed(self.model, theta, x, queries, self.transductive)
        far = distances(query, support, self.metric).unsqueeze(-1)
        other = ~F.one_hot(y).bool()
        return -far.expand(*far.shape[:2], other.shape[1]).masked_fill(other, torch.inf).amin(1)


def prototypical(learner: Prototypes, theta: Params, tasks: Tasks, phi: Phi | None = None) -> MetaGradient:
    """The gradient that trains a prototypical network: Snell et al. (2017), Algorithm 1; mean over tasks."""
    check_classes(tasks)
    theta = check_theta(learner.model, theta, tasks.support.x)
    leaves = {k: v.detach().requires_grad_() for k, v in theta.items()}
    parts = list(zip(*tasks.support, *tasks.query))
    total, grads = 0.0, [torch.zeros_like(v) for v in leaves.values()]
    for x, y, queries, labels in parts:
        loss = F.cross_entropy(learner.logits(leaves, x, y, queries), labels) / len(parts)
        new = torch.autograd.grad(loss, list(leaves.values()))
        total, grads = total + loss.detach(), [a + b for a, b in zip(grads, new)]
    return MetaGradient(total, dict(zip(leaves, grads)), None)


def check_classes(tasks: Tasks) -> None:
    """Raise a ValueError for malformed tasks, or if a class of the queries has no support example in some task."""
    check_tasks(tasks)
    ways = 1 + int(tasks.support.y.max())
    for part, y in (("support", tasks.support.y), ("query", tasks.query.y)):
        check_labels(f"tasks.{part}.y", y, ways)
    for task, label in (F.one_hot(tasks.support.y, ways).sum(1) == 0).nonzero().tolist():
        raise ValueError(f"tasks.support.y must hold every label from 0 to {ways - 1}, but task {task} lacks {label}")


def embed(model: nn.Module, theta: Params, x: Tensor, queries: Tensor, transductive: bool) -> tuple[Tensor, Tensor]:
    """Features [n, d] of the support and of the query images of one task."""
    if transductive or not getattr(model, "takes_stats_from", False):
        return call(model, theta, x).flatten(1), call(model, theta, queries).flatten(1)
    both = call(model, theta, torch.cat([x, queries]), len(x)).flatten(1)
    return both[: len(x)], both[len(x) :]


def distances(a: Tensor, b: Tensor, metric: str) -> Tensor:
    """Distances [n, m] between rows a [n, d] and b [m, d]: squared Euclidean, or one minus the cosine."""
    if metric == "cosine":
        return 1 - F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
    return ((a[:, None] - b[None]) ** 2).sum(-1)


def _check_metric(metric: str) -> None:
    if metric not in ("euclidean", "cosine"):
        raise ValueError(f"metric must be 'euclidean' or 'cosine', got {metric!r}")
