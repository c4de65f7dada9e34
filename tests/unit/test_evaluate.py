"""Scores after every step against a computation by hand; intervals; chunks; what is printed."""

import math

import pytest
import torch
from cases import F64, image_learner, images, regression, regression_learner
from torch.func import functional_call

from metalearn_utils import evaluate as public
from metalearn_utils.evaluate import Scores, evaluate, over_seeds, t_quantile
from metalearn_utils.prototypes import Prototypes
from metalearn_utils.rules import sgd


def by_hand(learner, theta, tasks, alpha: float, steps: int, score) -> torch.Tensor:
    """[steps + 1, tasks]: adapt each task by plain gradient descent and score its queries after every step."""
    columns = []
    for xs, ys, xq, yq in zip(*tasks.support, *tasks.query):
        params, column = theta, []
        for k in range(steps + 1):
            column.append(score(functional_call(learner.model, params, (xq,)), yq))
            leaves = {n: v.detach().requires_grad_() for n, v in params.items()}
            loss = learner.loss(functional_call(learner.model, leaves, (xs,)), ys)
            grads = torch.autograd.grad(loss, list(leaves.values()))
            params = {n: v.detach() - alpha * g for (n, v), g in zip(leaves.items(), grads)}
        columns.append(torch.tensor(column, dtype=F64))
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("kind", ["loop", "vmap"])
def test_accuracy_after_every_step_equals_a_computation_by_hand(kind: str, force) -> None:
    """100 · (queries whose largest logit is their label) / queries"""
    force(kind)
    (learner, theta), tasks = image_learner(sgd(0.3), 2), images(6, 3, 1, 3)
    right = lambda outputs, y: 100 * sum(int(o.argmax()) == int(t) for o, t in zip(outputs, y)) / len(y)  # noqa: E731
    expected = by_hand(learner, theta, tasks, 0.3, 4, right)
    found = evaluate(learner, theta, tasks, steps=4)
    assert torch.allclose(found.per_task, expected, atol=1e-9)
    assert found.per_task.std() > 0


def test_squared_error_after_every_step_equals_a_computation_by_hand(every_path: str) -> None:
    """mean over queries of (f(x) − y)²"""
    (learner, theta), tasks = regression_learner(sgd(0.2), 3), regression(6, 5, 7)
    expected = by_hand(learner, theta, tasks, 0.2, 3, lambda outputs, y: ((outputs - y) ** 2).mean().item())
    assert torch.allclose(evaluate(learner, theta, tasks, metric="mse").per_task, expected, rtol=1e-11)


def test_mean_and_interval_over_tasks() -> None:
    """mean ± 1.96 sd / sqrt(tasks), sd with tasks − 1"""
    scores = Scores(torch.tensor([[10.0, 20.0, 60.0], [40.0, 40.0, 40.0]]), "accuracy", True)
    assert scores.mean.tolist() == pytest.approx([30.0, 40.0])
    assert scores.interval.tolist() == pytest.approx([1.96 * 700**0.5 / 3**0.5, 0.0], abs=1e-5)


def test_the_interval_covers_the_mean_in_95_of_100_draws() -> None:
    """Coverage over 2000 sets of 100 tasks: 95 % ± 1.5"""
    draws = 5 + 2 * torch.randn(2000, 100, generator=torch.Generator().manual_seed(0))
    scores = Scores(draws, "mse", True)
    covered = ((scores.mean - 5).abs() < scores.interval).double().mean().item()
    assert covered == pytest.approx(0.95, abs=0.015)


def test_chunks_do_not_change_results(monkeypatch) -> None:
    (learner, theta), tasks = image_learner(), images(11, 3, 1, 2)
    whole = evaluate(learner, theta, tasks, metric="accuracy").per_task
    monkeypatch.setitem(evaluate.__globals__, "CHUNK", 4)
    assert torch.equal(evaluate(learner, theta, tasks).per_task, whole)


@pytest.mark.parametrize(("transductive", "words"), [(True, ", transductive)"), (False, ", not transductive)")])
@pytest.mark.parametrize("make", ["Learner", "Prototypes"])
def test_the_printed_result_says_how_it_was_made(make: str, transductive: bool, words: str) -> None:
    (learner, theta), tasks = image_learner(transductive=transductive), images(5, 3, 1, 2)
    learner = learner if make == "Learner" else Prototypes(learner.model, transductive=transductive)
    printed = str(evaluate(learner, theta, tasks))
    assert printed.endswith(words)
    assert f"95 % over 5 tasks, {2 if make == 'Learner' else 0} steps" in printed
    assert printed.startswith("accuracy ") and "±" in printed and " % (" in printed


def test_the_printed_figures_are_those_of_the_last_step() -> None:
    scores = Scores(torch.tensor([[1.0, 1.0], [0.25, 0.35]]), "mse", True)
    assert str(scores).startswith("mse 0.300 ± 0.098 (")


def test_intervals_over_seeds_use_students_t() -> None:
    """Three seeds with means 1, 2, 3: 2 ± 4.303 · 1 / sqrt(3)"""
    seeds = [Scores(torch.tensor([[0.0, 0.0], [m - 1, m + 1]]), "accuracy", True) for m in (1.0, 2.0, 3.0)]
    mean, half = over_seeds(seeds)
    assert (mean, half) == pytest.approx((2.0, 4.303 / 3**0.5), rel=1e-6)


@pytest.mark.parametrize("degrees", [*range(1, 11), 19, 99])
def test_quantiles_of_students_t_are_right(degrees: int) -> None:
    """Simpson's rule on the density from 0 to t gives 0.475."""
    t, n = t_quantile(degrees), 20_000
    x = torch.linspace(0, t, 2 * n + 1, dtype=F64)
    scale = math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / math.sqrt(degrees * math.pi)
    density = scale * (1 + x**2 / degrees) ** (-(degrees + 1) / 2)
    area = (density[0] + density[-1] + 4 * density[1::2].sum() + 2 * density[2:-1:2].sum()) * t / (6 * n)
    assert area.item() == pytest.approx(0.475, abs=2e-5)


def test_one_seed_has_no_interval() -> None:
    with pytest.raises(ValueError, match="degrees must be at least 1, got 0: an interval needs two values or more"):
        over_seeds([Scores(torch.ones(1, 2), "mse", True)])


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(ValueError, match="metric must be 'accuracy' or 'mse', got 'f1'"):
        evaluate(*regression_learner(), regression(4, 5, 6), metric="f1")


def test_the_package_exports_the_function() -> None:
    assert public is evaluate
