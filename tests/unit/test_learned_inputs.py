"""What learned rules, estimators and schedules refuse, naming the argument, what was expected and what came."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from cases import F64, seeded
from training_cases import RULES, THETA, net_loss, net_problem

from metalearn_utils.episodes import train_rule
from metalearn_utils.estimators import MetaLoss, es, pes, truncated, truncated_es, unrolled
from metalearn_utils.rates import decayed, hypergradient, per_layer, per_layer_and_step, schedule
from metalearn_utils.rules import sgd

MAKE: dict[str, Callable[[int], Callable]] = {
    "unrolled": lambda horizon: unrolled(horizon),
    "truncated": lambda horizon: truncated(2, horizon),
    "es": lambda horizon: es(horizon, 2, 0.1),
    "truncated es": lambda horizon: truncated_es(2, horizon, 2, 0.1),
    "pes": lambda horizon: pes(2, horizon, 2, 0.1),
}
WINDOWED = {
    "truncated": truncated,
    "truncated es": lambda window, horizon: truncated_es(window, horizon, 2, 0.1),
    "pes": lambda window, horizon: pes(window, horizon, 2, 0.1),
}


@pytest.mark.parametrize("horizon", [0, -4, 2.5])
@pytest.mark.parametrize("name", MAKE)
def test_a_bad_horizon_is_named(name: str, horizon) -> None:
    with pytest.raises(ValueError, match=f"horizon must be an integer >= 1, got {horizon}"):
        MAKE[name](horizon)


@pytest.mark.parametrize(("window", "horizon"), [(3, 10), (20, 10)])
@pytest.mark.parametrize("name", WINDOWED)
def test_a_window_that_does_not_divide_the_horizon_is_refused(name: str, window: int, horizon: int) -> None:
    message = f"horizon must be a positive multiple of window, got horizon={horizon} and window={window}"
    with pytest.raises(ValueError, match=message):
        WINDOWED[name](window, horizon)


@pytest.mark.parametrize("window", [0, -2, 1.5])
@pytest.mark.parametrize("name", WINDOWED)
def test_a_bad_window_is_named(name: str, window) -> None:
    with pytest.raises(ValueError, match=f"window must be an integer >= 1, got {window}"):
        WINDOWED[name](window, 4)


PERTURBED: dict[str, Callable] = {
    "es": lambda pairs, sigma: es(4, pairs, sigma),
    "truncated es": lambda pairs, sigma: truncated_es(2, 4, pairs, sigma),
    "pes": lambda pairs, sigma: pes(2, 4, pairs, sigma),
}


@pytest.mark.parametrize("sigma", [0.0, -0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("name", PERTURBED)
def test_a_perturbation_without_size_is_refused(name: str, sigma: float) -> None:
    """Divided by sigma squared, it would give NaN, and every iteration would be skipped."""
    with pytest.raises(ValueError, match=f"sigma must be a finite number > 0, got {sigma}"):
        PERTURBED[name](2, sigma)


@pytest.mark.parametrize("pairs", [0, -1, 1.5])
@pytest.mark.parametrize("name", PERTURBED)
def test_a_bad_number_of_pairs_is_named(name: str, pairs) -> None:
    with pytest.raises(ValueError, match=f"pairs must be an integer >= 1, got {pairs}"):
        PERTURBED[name](pairs, 0.1)


LOSSES: dict[str, tuple[Callable, str]] = {
    "the mean over tasks": (lambda value: value.mean(), "()"),
    "one number per example": (lambda value: value[:, None].expand(-1, 6), "({tasks}, 6)"),
    "two numbers per task": (lambda value: value.repeat(2), "({twice},)"),
}


@pytest.mark.parametrize("rule", ["sgd", "step size", "LSTM"])
@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_that_is_not_one_number_per_task_is_refused(loss: str, name: str, rule: str) -> None:
    """Whatever the rule reads of it, and for perturbed copies too."""
    change, shape = LOSSES[loss]
    problem = replace(net_problem(), loss=lambda params, data: change(net_loss(params, data)))
    tasks = 3 if name in ("unrolled", "truncated") else 3 * 4
    with pytest.raises(ValueError) as caught:
        MAKE[name](4)(RULES[rule](), RULES[rule]().phi, problem, None, seeded())
    got = shape.format(tasks=tasks, twice=2 * tasks)
    assert str(caught.value) == f"problem.loss must return one number per task, [{tasks}], got {got}"


def test_a_misspelt_score_is_named() -> None:
    estimator, rule = unrolled(2, MetaLoss(score="accuracy")), sgd(0.1)
    with pytest.raises(ValueError, match=r"score names 'accuracy', but the problem's scores are \['validation loss'\]"):
        estimator(rule, rule.phi, net_problem(), None, seeded())


OTHER = {"other": torch.ones(2, dtype=F64)}


@pytest.mark.parametrize("rule", [sgd(per_layer(0.1, OTHER)), per_layer_and_step(0.1, OTHER, 4)])
def test_a_layer_without_a_rate_is_named(rule) -> None:
    with pytest.raises(KeyError, match=r"lr has no step size for parameter 'b'; it has \['other'\]"):
        unrolled(2)(rule, rule.phi, net_problem(), None, seeded())


def test_a_parameter_that_the_loss_does_not_use_is_named() -> None:
    problem, rule = net_problem(), sgd(0.1)
    spare = replace(problem, theta=problem.theta | {"spare": torch.ones(3, 2, dtype=F64)})
    with pytest.raises(ValueError, match="theta holds 'spare', but the loss does not use it"):
        unrolled(2)(rule, rule.phi, spare, None, seeded())


def test_one_step_more_than_there_are_rates_is_refused() -> None:
    rule = per_layer_and_step(0.1, THETA, 4)
    with pytest.raises(ValueError, match="the rule holds rates for 4 steps, but step 5 was asked for"):
        unrolled(5)(rule, rule.phi, net_problem(), None, seeded())


BUILD: list[tuple[Callable, str]] = [
    (lambda: decayed(sgd(), 0), "horizon must be an integer >= 1, got 0"),
    (lambda: decayed(sgd(), 2.5), "horizon must be an integer >= 1, got 2.5"),
    (lambda: schedule(0.1, 3, 0), "horizon must be an integer >= 1, got 0"),
    (lambda: schedule(0.1, 2.5, 9), "knots must be an integer >= 1, got 2.5"),
    (lambda: schedule(0.1, 1, 9), "knots and horizon must be >= 2, lr finite and > 0, got 1, 9 and 0.1"),
    (lambda: schedule(0.1, 3, 1), "knots and horizon must be >= 2, lr finite and > 0, got 3, 1 and 0.1"),
    (lambda: schedule(0.0, 3, 9), "knots and horizon must be >= 2, lr finite and > 0, got 3, 9 and 0.0"),
    (lambda: per_layer_and_step(0.1, THETA, 0), "steps must be an integer >= 1, got 0"),
    (lambda: hypergradient(-0.1, 0.1), "lr must be a finite number >= 0, got -0.1"),
    (lambda: train_rule(sgd(), lambda g: net_problem(), unrolled(2), 0), "iterations must be an integer >= 1, got 0"),
]


@pytest.mark.parametrize(("build", "message"), BUILD)
def test_bad_settings_are_named(build: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
