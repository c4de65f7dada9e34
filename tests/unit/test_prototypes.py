"""Nearest class mean and nearest neighbour against a few lines written out; their gradients: tests/oracles."""

import pytest
import torch
from cases import F64, image_learner, images
from torch import Tensor, nn

from metalearn_utils.evaluate import evaluate
from metalearn_utils.prototypes import NearestNeighbour, Prototypes, distances
from metalearn_utils.tasks.base import Batch, Tasks


def plane() -> Tasks:
    """Two tasks in the plane; class 0 lies around (0, 0), class 1 around (4, 0), and a far outlier belongs to it."""
    support = torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, 0.0], [13.0, 0.0]], dtype=F64)
    query = torch.tensor([[0.4, 0.0], [2.4, 0.0], [9.0, 0.0]], dtype=F64)
    x, q = support.expand(2, -1, -1), query.expand(2, -1, -1)
    return Tasks(Batch(x, torch.tensor([[0, 0, 1, 1]] * 2)), Batch(q, torch.tensor([[0, 1, 1], [0, 0, 1]])))


PIXELS = nn.Flatten()


def test_logits_are_minus_squared_distances_to_the_class_means() -> None:
    """−|q − c_k|² / temperature with c_0 = (0.5, 0), c_1 = (8, 0)"""
    found = Prototypes(PIXELS, temperature=2.0).predict({}, plane())
    expected = [[-((q - c) ** 2) / 2 for c in (0.5, 8.0)] for q in (0.4, 2.4, 9.0)]
    assert found.shape == (1, 2, 3, 2)
    assert torch.allclose(found[0, 0], torch.tensor(expected, dtype=F64), rtol=1e-14)


def test_nearest_neighbour_looks_at_single_examples() -> None:
    """2.4 is closer to 3 (class 1) than to 1 (class 0), though closer to the mean of class 0."""
    centroid, neighbour = (make(PIXELS).predict({}, plane())[0, 0].argmax(1) for make in (Prototypes, NearestNeighbour))
    assert centroid.tolist() == [0, 0, 1]
    assert neighbour.tolist() == [0, 1, 1]


def test_cosine_is_the_angle_alone() -> None:
    """1 − a · b / (|a| |b|)"""
    a, b = torch.randn(3, 5, dtype=F64), torch.randn(4, 5, dtype=F64)
    expected = [[1 - (u @ v / (u.norm() * v.norm())).item() for v in b] for u in a]
    assert torch.allclose(distances(a, b, "cosine"), torch.tensor(expected, dtype=F64), rtol=1e-12)
    assert torch.allclose(distances(2 * a, b, "cosine"), distances(a, b, "cosine"), rtol=1e-12)


def test_squared_distances() -> None:
    a, b = torch.randn(3, 5, dtype=F64), torch.randn(4, 5, dtype=F64)
    assert torch.allclose(distances(a, b, "euclidean"), torch.cdist(a, b) ** 2, rtol=1e-10)


@pytest.mark.parametrize("make", [Prototypes, NearestNeighbour])
def test_the_order_of_support_examples_changes_nothing(make) -> None:
    (learner, theta), tasks = image_learner(), images(3, 3, 2, 2)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    other = tasks._replace(support=Batch(tasks.support.x[:, order], tasks.support.y[:, order]))
    classifier = make(learner.model)
    assert (classifier.predict(theta, tasks) - classifier.predict(theta, other)).abs().max() < 1e-11


def test_an_exact_copy_of_a_support_image_is_recognised() -> None:
    """Queries that are the support images themselves are all right."""
    tasks = images(20, 3, 1, 1)
    scores = evaluate(NearestNeighbour(PIXELS), {}, Tasks(tasks.support, tasks.support))
    assert (scores.per_task == 100).all()


@pytest.mark.parametrize("settings", [{"metric": "manhattan"}, {"temperature": 0.0}, {"temperature": -1.0}])
def test_bad_settings_are_named(settings: dict) -> None:
    (name,) = settings
    with pytest.raises(ValueError, match=f"{name} must be .*, got {settings[name]!r}"):
        Prototypes(PIXELS, **settings)


def test_a_bad_metric_of_nearest_neighbour_is_named() -> None:
    with pytest.raises(ValueError, match="metric must be 'euclidean' or 'cosine', got 'manhattan'"):
        NearestNeighbour(PIXELS, metric="manhattan")


def apart(model: nn.Module, theta: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.func.functional_call(model, theta, (x,)).flatten(1)


def test_transductive_normalises_queries_by_their_own_batch() -> None:
    """The features of the queries are those of the model run on the queries alone."""
    (learner, theta), tasks = image_learner(), images(1, 3, 2, 2)
    support, query = (apart(learner.model, theta, b.x[0]) for b in tasks)
    means = torch.stack([support[tasks.support.y[0] == k].mean(0) for k in range(3)])
    expected = -distances(query, means, "euclidean") / 16
    assert torch.allclose(Prototypes(learner.model).predict(theta, tasks)[0, 0], expected, rtol=1e-12)
