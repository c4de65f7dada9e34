"""The fair comparison: hand-made rules against their formulas, tuning, scores, intervals, and what makes it unfair."""

import math
import re
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from cases import F64, seeded
from torch import Tensor
from torch.utils import _pytree as pytree

from metalearn_utils import informed, judging, tuning, unrolls
from metalearn_utils.baselines import KNOWS, Method, baselines, known_scale
from metalearn_utils.compare import Comparison, Row, check_fair, compare
from metalearn_utils.dotplots import Bar, dot_groups
from metalearn_utils.judging import interval, judge, trajectory
from metalearn_utils.learned import step_size
from metalearn_utils.plots import summary
from metalearn_utils.population import repeat
from metalearn_utils.rates import decayed
from metalearn_utils.rules import UpdateRule, momentum, sgd
from metalearn_utils.tasks.problems import LeastSquares, LogisticRegression, Problem, Quadratics
from metalearn_utils.tuning import Tuned, try_values, tune

QUADRATICS = Quadratics(dim=6, kappa=20.0).sample(5, generator=seeded(1))
SGD = Method("SGD", sgd, grid=(1e-2, 10.0))


def spectrum(values: Tensor) -> Problem:
    """½ Σ λ_i (θ_i − 1)² from θ = 0 for one task: the gap of coordinate i is the error polynomial p(λ_i)."""
    problem = Quadratics(dim=len(values)).sample(1, generator=seeded())
    data = (torch.diag(values)[None], torch.ones(1, len(values), dtype=F64))
    facts = {"L": values.max()[None], "m": values.min()[None], "optimum": torch.zeros(1, dtype=F64)}
    return replace(problem, theta={"theta": torch.zeros(1, len(values), dtype=F64)}, data=lambda t: data, facts=facts)


def gap(rule: UpdateRule, problem: Problem, steps: int) -> Tensor:
    """|θ_T − c| of every coordinate."""
    return (trajectory(rule, problem, steps)[1]["theta"] - problem.data(0)[1]).abs()


def path(rule: UpdateRule, problem: Problem = QUADRATICS, steps: int = 6) -> list[Tensor]:
    """θ_0, ..., θ_T, each [tasks, dim]."""
    return [problem.theta["theta"]] + [trajectory(rule, problem, t)[1]["theta"] for t in range(1, steps + 1)]


def gradient(theta: Tensor, problem: Problem = QUADRATICS) -> Tensor:
    matrix, centre = problem.data(0)
    return (matrix @ (theta - centre).unsqueeze(-1)).squeeze(-1)


def dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def fact(name: str) -> Tensor:
    return QUADRATICS.facts[name].unsqueeze(-1)


def assert_path(rule: UpdateRule, expected: list[Tensor]) -> None:
    for found, wanted in zip(path(rule), expected, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-10, atol=1e-13)


# Each rule against its formula.


def by_torch(lr: float, **settings) -> list[Tensor]:
    """The path of `torch.optim.SGD`, each task with its own rate lr / L."""
    runs = []
    for i, (matrix, centre) in enumerate(zip(*QUADRATICS.data(0))):
        theta = torch.zeros(6, dtype=F64, requires_grad=True)
        optimizer, steps = torch.optim.SGD([theta], lr=lr / QUADRATICS.facts["L"][i].item(), **settings), []
        for _ in range(7):
            steps.append(theta.detach().clone())
            optimizer.zero_grad()
            (0.5 * (theta - centre) @ matrix @ (theta - centre)).backward()
            optimizer.step()
        runs.append(torch.stack(steps))
    return list(torch.stack(runs, 1))


def test_c_over_l_is_gradient_descent_of_torch() -> None:
    assert_path(informed.constant(1.7), by_torch(1.7))
    assert_path(informed.constant(), by_torch(1.0))


def test_heavy_ball_is_momentum_of_torch() -> None:
    assert_path(informed.heavy_ball(0.8), by_torch(1.0, momentum=0.8))


def best_heavy_ball() -> list[Tensor]:
    """θ_{t+1} = θ_t − 4 / (√L + √m)² g + ((√L − √m) / (√L + √m))² (θ_t − θ_{t−1})"""
    large, small = fact("L") ** 0.5, fact("m") ** 0.5
    found = [torch.zeros(5, 6, dtype=F64)] * 2
    for _ in range(6):
        push = ((large - small) / (large + small)) ** 2 * (found[-1] - found[-2])
        found.append(found[-1] - 4 / (large + small) ** 2 * gradient(found[-1]) + push)
    return found[1:]


def nesterov(beta) -> list[Tensor]:
    """x_{t+1} = y_t − g(y_t) / L, y_{t+1} = x_{t+1} + β_t (x_{t+1} − x_t)"""
    x = y = torch.zeros(5, 6, dtype=F64)
    found = [y]
    for t in range(6):
        x, before = y - gradient(y) / fact("L"), x
        y = x + beta(t) * (x - before)
        found.append(y)
    return found


def strong(t: int) -> Tensor:
    root = (fact("L") / fact("m")) ** 0.5
    return (root - 1) / (root + 1)


def barzilai_borwein() -> list[Tensor]:
    """α_t = s's / s'y, the first 1 / L"""
    found = [torch.zeros(5, 6, dtype=F64)]
    alpha = 1 / fact("L")
    for _ in range(6):
        found.append(found[-1] - alpha * gradient(found[-1]))
        s, y = found[-1] - found[-2], gradient(found[-1]) - gradient(found[-2])
        alpha = dot(s, s) / dot(s, y)
    return found


def searched(factor: float) -> list[Tensor]:
    """α = factor g'g / g'Ag"""
    found = [torch.zeros(5, 6, dtype=F64)]
    for _ in range(6):
        g = gradient(found[-1])
        curved = (QUADRATICS.data(0)[0] @ g.unsqueeze(-1)).squeeze(-1)
        found.append(found[-1] - factor * dot(g, g) / dot(g, curved) * g)
    return found


def silver() -> list[Tensor]:
    """L α = √2, 2, √2, 2 + √2, √2, 2"""
    found = [torch.zeros(5, 6, dtype=F64)]
    for rate in (2**0.5, 2, 2**0.5, 2 + 2**0.5, 2**0.5, 2):
        found.append(found[-1] - rate / fact("L") * gradient(found[-1]))
    return found


FORMULAS = {
    "heavy ball, best (m, L)": (informed.best_heavy_ball, best_heavy_ball),
    "Nesterov, convex": (informed.nesterov_convex, partial(nesterov, lambda t: t / (t + 3))),
    "Nesterov, strongly convex": (informed.nesterov_strong, partial(nesterov, strong)),
    "Barzilai-Borwein": (informed.barzilai_borwein, barzilai_borwein),
    "exact line search": (informed.line_search, partial(searched, 1.0)),
    "relaxed line search": (partial(informed.line_search, 0.9), partial(searched, 0.9)),
    "silver steps": (informed.silver, silver),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_rule_follows_its_formula(name: str) -> None:
    make, formula = FORMULAS[name]
    assert_path(make(), formula())


@pytest.mark.parametrize("steps", [1, 2, 7, 30])
def test_chebyshev_reaches_the_smallest_possible_worst_case(steps: int) -> None:
    """max over [m, L] of |p_T| = 1 / T_T((κ + 1) / (κ − 1)), here at 401 eigenvalues with the ends, κ = 50"""
    values = torch.linspace(0.04, 2.0, 401, dtype=F64)
    bound = 1 / math.cosh(steps * math.acosh(51 / 49))
    assert gap(informed.chebyshev(), spectrum(values), steps).max().item() == pytest.approx(bound, rel=1e-9)
    other = gap(informed.best_heavy_ball(), spectrum(values), steps).max().item()
    assert other > 1.001 * bound or steps == 1


def test_chebyshev_is_gradient_descent_with_steps_at_the_roots() -> None:
    """p_T(λ) = Π (1 − α_t λ), 1 / α_t = (L + m) / 2 − (L − m) / 2 cos(π (2t + 1) / 2T)"""
    values, steps = torch.linspace(0.1, 3.0, 7, dtype=F64), 5
    roots = [1.55 - 1.45 * math.cos(math.pi * (2 * t + 1) / (2 * steps)) for t in range(steps)]
    product = torch.stack([1 - values / r for r in roots]).prod(0)
    assert torch.allclose(gap(informed.chebyshev(), spectrum(values), steps)[0], product.abs(), rtol=1e-10)


def test_chebyshev_solves_a_sphere_in_one_step() -> None:
    assert gap(informed.chebyshev(), spectrum(torch.full((3,), 0.7, dtype=F64)), 3).max() < 1e-15


def test_line_search_stops_where_the_next_gradient_is_orthogonal_on_other_functions_too() -> None:
    """<∇f(θ − α g), g> = 0, with enough looks along the line; one look is not enough there"""
    problem = LogisticRegression(examples=30, dim=4).sample(6, generator=seeded(2))
    for probes, largest, least in ((20, 1e-8, 0.0), (1, 1.0, 0.05)):
        at = path(informed.line_search(1.0, probes), problem, 3)
        grads = [problem.gradient({"theta": theta}, problem.data(0))[1]["theta"] for theta in at]
        cosines = torch.stack([torch.cosine_similarity(a, b, -1) for a, b in zip(grads, grads[1:])])
        assert least <= cosines.abs().max() < largest


def test_line_search_finds_gradients_that_are_not_written_out() -> None:
    """By autograd, alone and in a batch of trials"""
    bare = replace(QUADRATICS, gradient=None)
    method = Method("line search", informed.line_search, "extra line evaluations", (0.25, 4.0))
    assert torch.allclose(path(informed.line_search(), bare)[-1], searched(1.0)[-1], rtol=1e-10)
    found = [try_values(method, [0.5, 0.9], problem, 4, "final") for problem in (bare, QUADRATICS)]
    assert torch.allclose(*found, rtol=1e-10)


def wrong_momentum(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(informed, "Move", lambda a, b=0.0, c=0.0, keep={}: (a, b * 0.99, c, keep))


def late_state(patch: pytest.MonkeyPatch) -> None:
    """The last update and gradient are never stored."""
    right = informed.informed

    def broken(*args, **settings):
        rule = right(*args, **settings)

        def update(phi, grads, state):
            u, after = rule.update(phi, grads, state)
            return u, after | {"u": state["u"], "last": state["last"]}

        return rule._replace(update=update)

    patch.setattr(informed, "informed", broken)


def scaled(place, name: str):
    """A function of a module gives 1 % more."""
    right = getattr(place, name)

    def apply(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(place, name, lambda *args: pytree.tree_map(lambda v: 1.01 * v, right(*args)))

    return apply


def no_c(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(informed, "_nesterov", lambda beta, lr: informed.Move((1 + beta) * lr, beta))


RULE = partial(partial, test_rule_follows_its_formula)
WORST = partial(test_chebyshev_reaches_the_smallest_possible_worst_case, 7)
BUGS = {
    "momentum": (wrong_momentum, [test_heavy_ball_is_momentum_of_torch, *map(RULE, list(FORMULAS)[:3]), WORST]),
    "state": (late_state, [test_heavy_ball_is_momentum_of_torch, *map(RULE, list(FORMULAS)[1:4]), WORST]),
    "line": (scaled(informed, "_secant"), [RULE("exact line search"), RULE("relaxed line search")]),
    "looks along the line": (scaled(judging, "_gradient"), [RULE("exact line search")]),
    "last gradient": (no_c, [RULE("Nesterov, convex"), RULE("Nesterov, strongly convex")]),
}


@pytest.mark.parametrize(("bug", "check"), [(b, i) for b, (_, checks) in BUGS.items() for i in range(len(checks))])
def test_a_bug_in_a_rule_is_noticed(bug: str, check: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, checks = BUGS[bug]
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        checks[check]()


def test_there_are_five_hand_made_optimizers_at_a_constant_rate_and_with_cosine_decay() -> None:
    """From the horizon on, a decayed rule stands still."""
    names = ["SGD", "momentum", "Nesterov", "RMSprop", "Adam"]
    assert [m.name for m in baselines(4)] == [n for name in names for n in (name, f"{name}, cosine")]
    for method in baselines(4):
        ends = [path(method.make(0.05), steps=6)[t] for t in (3, 4, 6)]
        assert not torch.equal(ends[0], ends[1])
        assert torch.equal(ends[1], ends[2]) == ("cosine" in method.name)
        assert method.grid is not None and method.knows == "nothing"
    assert_path(decayed(baselines(4)[4].make(0.05), 4), path(baselines(4)[5].make(0.05)))


# What a run is judged by.


def test_metrics_are_what_they_are_called() -> None:
    losses = torch.tensor([[1.1, 3.0], [0.2, 2.0], [0.1001, 7.0]], dtype=F64)
    facts = {"optimum": torch.tensor([0.1, 2.0], dtype=F64)}
    problem = replace(QUADRATICS, facts=facts, scores={"size": lambda p: p["a"]})
    expected = {
        "final": [0.1001, 7.0],
        "mean": [1.4001 / 3, 4.0],
        "log final": [-4.0, math.log10(5)],
        "log mean": [(0 - 1 - 4) / 3, (0 - 16 + math.log10(5)) / 3],
        "size": [3.0, 4.0],
    }
    for metric, values in expected.items():
        found = judge(metric, problem, losses, {"a": torch.tensor([3.0, 4.0])})
        assert found.tolist() == pytest.approx(values, rel=1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("metric", ["final", "mean", "log final", "log mean", "size", "accuracy"])
def test_a_run_that_diverged_is_infinitely_bad_and_never_nan(metric: str, bad: float) -> None:
    scores = {"size": lambda p: torch.ones(2), "accuracy": lambda p: torch.ones(2)}
    losses = torch.tensor([[1.0, 1.0], [2.0, bad]], dtype=F64)
    found = judge(metric, replace(QUADRATICS, facts={}, scores=scores), losses, {})
    assert found[0].isfinite()
    assert found[1] == (-math.inf if metric == "accuracy" else math.inf)


def test_interval_is_over_tasks_for_one_seed_and_over_seeds_for_several() -> None:
    """Student's t: 3.182 sd / √4 over four tasks; 4.303 sd / √3 over the means of three seeds"""
    scores = torch.tensor([[1.0, 2.0, 6.0, 7.0]], dtype=F64)
    assert interval(scores) == (4.0, pytest.approx(3.182 * (26 / 3) ** 0.5 / 2), "4 tasks")
    three = torch.cat([scores, scores + 1, scores - 1])
    assert interval(three) == (4.0, pytest.approx(4.303 / 3**0.5), "3 seeds")
    assert interval(scores[:, :1]) == (1.0, math.inf, "1 tasks")
    assert interval(torch.tensor([[1.0, math.inf]])) == (math.inf, math.inf, "2 tasks")


def test_windows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data that differ from step to step, and a rule with a state"""
    centres = torch.randn(40, 5, 6, generator=seeded(4), dtype=F64)
    moving = replace(QUADRATICS, data=lambda t: (QUADRATICS.data(0)[0], centres[t]))
    whole = trajectory(momentum(0.1), moving, 23)
    monkeypatch.setattr(unrolls, "AT_ONCE", 4)
    parts = trajectory(momentum(0.1), moving, 23)
    assert torch.equal(whole[0], parts[0])
    assert torch.equal(whole[1]["theta"], parts[1]["theta"])
    expected = [judge_at(moving, t, theta) for t, theta in enumerate(path(momentum(0.1), moving, 23))]
    assert torch.allclose(parts[0], torch.stack(expected[1:]), rtol=1e-12)


def judge_at(problem: Problem, t: int, theta: Tensor) -> Tensor:
    return problem.loss({"theta": theta}, problem.data(t))


# Trials as one batch.


def everything(steps: int) -> list[Method]:
    return baselines(steps) + known_scale()


TUNED = {m.name: m for m in everything(12) if m.grid}


def one_by_one(method: Method, values: list[float], problem: Problem, metric: str = "mean", steps: int = 12) -> Tensor:
    return torch.stack([judge(metric, problem, *trajectory(method.make(v), problem, steps)) for v in values])


@pytest.mark.parametrize("name", TUNED)
def test_trials_in_one_batch_equal_trials_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To 1e-10, values that diverge included, and the batch was really used."""
    values, used = [TUNED[name].value(x) for x in (0.05, 0.3, 1.5, 60.0)], []
    right = tuning._stacked
    monkeypatch.setattr(tuning, "_stacked", lambda rules, problem: (used.append(len(rules)), right(rules, problem))[1])
    found = try_values(TUNED[name], values, QUADRATICS, 12, "mean")
    assert used == [2, 4]
    assert torch.allclose(found, one_by_one(TUNED[name], values, QUADRATICS), rtol=1e-10)
    assert found.std(0).min() > 0, "all values give the same: this check could not fail"


@pytest.mark.parametrize("name", TUNED)
def test_single_precision_runs_as_one_batch_too(name: str) -> None:
    problem = Quadratics(dim=6).sample(3, generator=seeded(1), dtype=torch.float32)
    values = [TUNED[name].value(x) for x in (0.1, 0.7)]
    assert tuning._stack_is_exact(*map(TUNED[name].make, values), problem)
    found = try_values(TUNED[name], values, problem, 5, "mean")
    assert torch.allclose(found, one_by_one(TUNED[name], values, problem, steps=5), rtol=1e-4)


def hidden(lr: float) -> UpdateRule:
    """The value does not reach the rule through phi."""
    def update(phi, grads, state):
        return {k: -lr * g for k, g in grads.items()}, state

    return UpdateRule({"scale": torch.ones(())}, lambda theta: {}, update)


def half_hidden(lr: float) -> UpdateRule:
    """A part of it does."""
    return UpdateRule(sgd(lr).phi, lambda theta: {"step": 0}, lambda phi, g, s: (hidden(lr).update({}, g, s)[0], s))


def reading(lr: float) -> UpdateRule:
    """It reads a number out of a tensor, which vmap refuses."""
    def update(phi, grads, state):
        return {k: -phi["lr"].item() * g for k, g in grads.items()}, state

    return UpdateRule(sgd(lr).phi, lambda theta: {}, update)


@pytest.mark.parametrize("make", [hidden, half_hidden, reading])
def test_a_rule_that_a_batch_would_get_wrong_is_tried_value_by_value(make, monkeypatch: pytest.MonkeyPatch) -> None:
    method, values = Method("odd", make, grid=(0.1, 1.0)), [0.1, 0.3, 0.5]
    expected = one_by_one(SGD, values, QUADRATICS, "final")
    assert torch.allclose(try_values(method, values, QUADRATICS, 12, "final"), expected, rtol=1e-12)
    monkeypatch.setattr(tuning, "_stack_is_exact", lambda *_: True)
    if make is reading:
        with pytest.raises(RuntimeError):
            try_values(method, values, QUADRATICS, 12, "final")
    else:
        assert not torch.allclose(try_values(method, values, QUADRATICS, 12, "final"), expected, rtol=1e-2)


def test_scores_of_the_problem_are_taken_value_by_value() -> None:
    """They may hold data of their own, one for each task."""
    weights = torch.rand(5, generator=seeded(3), dtype=F64)
    problem = replace(QUADRATICS, scores={"weighed": lambda p: weights * p["theta"].square().sum(-1)})
    values = [0.1, 0.2, 0.4]
    expected = [weights * path(sgd(v), problem, 4)[-1].square().sum(-1) for v in values]
    assert torch.allclose(try_values(SGD, values, problem, 4, "weighed"), torch.stack(expected), rtol=1e-12)


def test_data_are_copied_once_if_they_stay_and_anew_if_they_change() -> None:
    still, centres = repeat(QUADRATICS, 3), torch.randn(4, 5, 6, generator=seeded(4), dtype=F64)
    assert still.data(0)[0] is still.data(7)[0]
    moving = repeat(replace(QUADRATICS, data=lambda t: (QUADRATICS.data(0)[0], centres[t])), 3)
    for t in (0, 1, 1, 3, 0):
        assert torch.equal(moving.data(t)[1], centres[t].repeat(3, 1))


# Tuning.


def bowl(best: float) -> Method:
    """A method whose final loss on `FLAT` is log²(x / best), whatever the step size does."""
    def make(x: float) -> UpdateRule:
        phi = {"x": torch.tensor(float(x), dtype=F64)}
        return UpdateRule(phi, lambda theta: {}, lambda phi, g, s: ({k: phi["x"] + 0 * v for k, v in g.items()}, s))

    return Method(f"bowl at {best:g}", make, grid=(1e-2, 1.0), value=lambda x: x / best)


def one_number(score) -> Problem:
    """One task from θ = 0; the loss is score(θ)."""
    theta = {"theta": torch.zeros(1, 1, dtype=F64)}
    given = lambda p, d: (score(p["theta"][:, 0]), {"theta": torch.zeros_like(p["theta"])})  # noqa: E731
    return Problem(theta, lambda p, d: given(p, d)[0], lambda t: (), gradient=given)


BOWL = one_number(lambda x: x.log() ** 2)


@pytest.mark.parametrize("trials", [4, 5, 7, 8, 16, 33, 64])
def test_every_tuning_takes_exactly_the_number_of_trials_it_is_given(trials: int) -> None:
    for best in (1e-9, 0.1, 1e9):
        found = tune(bowl(best), BOWL, 1, trials=trials)
        assert len(found.values) == len(found.scores) == trials == len(set(found.values))


def test_tuning_starts_with_a_geometric_grid_and_refines_between_the_neighbours_of_the_best() -> None:
    found = tune(bowl(0.1), BOWL, 1, trials=16)
    assert [v * 0.1 for v in found.values[:8]] == pytest.approx([10 ** (-2 + 2 * i / 7) for i in range(8)])
    for tried, new in ((8, slice(8, 12)), (12, slice(12, 16))):
        sofar = sorted(found.values[:tried])
        at = sofar.index(min(sofar, key=lambda v: abs(math.log(v))))
        below, best, above = sofar[at - 1 : at + 2]
        assert sum(below < v < best for v in found.values[new]) == sum(best < v < above for v in found.values[new]) == 2
    assert found.chosen == pytest.approx(1.0, abs=0.05)
    assert min(found.scores) == pytest.approx(math.log(found.chosen) ** 2)
    assert not found.edge
    assert found.seconds > 0


@pytest.mark.parametrize("best", [1e-7, 1e-5, 3e-3, 20.0, 1e4, 1e7])
def test_a_best_value_far_outside_the_first_grid_is_found(best: float) -> None:
    """The first grid is 0.01 to 1; beyond it, trials stand farther and farther apart."""
    found = tune(bowl(best), BOWL, 1, trials=16)
    assert not found.edge
    start = min(abs(math.log(x / best)) for x in (1e-2, 1.0))
    assert abs(math.log(found.chosen)) < 0.5 * start


def test_a_best_value_that_was_not_reached_is_reported_as_lying_on_the_edge() -> None:
    for best in (1e-30, 1e30):
        assert tune(bowl(best), BOWL, 1).edge


@pytest.mark.parametrize(("low", "high"), [(1e-3, 1e-2), (1e2, 1e4)])
def test_gradient_descent_is_tuned_from_a_grid_that_misses_or_diverges(low: float, high: float) -> None:
    """From 100 on every rate diverges beyond the largest number: infinitely bad, so the search goes down."""
    steps = 120 if low > 1 else 40
    found = tune(replace(SGD, grid=(low, high)), QUADRATICS, steps)
    assert not any(math.isnan(s) for s in found.scores)
    assert not found.edge
    assert 0.2 < found.chosen < 2 / QUADRATICS.facts["L"].max()


def test_of_equally_good_values_the_middle_one_is_chosen_but_if_all_are_equal_nothing_is_known() -> None:
    """The score is 3 for all x below the best, log² + 3 above"""
    plateau = tune(bowl(0.1), one_number(lambda x: x.log().clamp_min(0) ** 2 + 3), 1)
    assert min(plateau.scores) == 3
    assert min(plateau.values) < plateau.chosen < 1
    assert not plateau.edge
    assert tune(bowl(0.1), one_number(lambda x: 0 * x + 3), 1).edge
    assert tune(bowl(0.1), one_number(lambda x: x * math.nan), 1).edge


def test_accuracies_are_maximised() -> None:
    """−log² is highest at its best value."""
    problem = replace(BOWL, scores={"test accuracy": lambda p: 90 - p["theta"][:, 0].log() ** 2})
    found = tune(bowl(0.1), problem, 1, "test accuracy")
    assert found.chosen == pytest.approx(1.0, abs=0.05)
    assert max(found.scores) == pytest.approx(90, abs=0.01)


@pytest.mark.parametrize(("steps", "far", "near"), [(10, 0.2, 0.4), (60, 0.05, 0.12), (300, 0.0, 0.03)])
def test_the_best_constant_rate_tends_to_2_over_m_plus_l(steps: int, far: float, near: float) -> None:
    """c / L with c → 2 / (1 + 1 / κ), κ = 50, in the long run: closer and closer"""
    problem = Quadratics(dim=8, kappa=50.0).sample(20, generator=seeded(1))
    chosen = tune(TUNED["c/L"], problem, steps, "log final", trials=32).chosen
    assert far <= abs(chosen - 2 / 1.02) < near


def test_the_chosen_value_depends_on_the_metric() -> None:
    """The best rate for the last loss is not the best for the mean."""
    problem = Quadratics(dim=8, kappa=50.0).sample(20, generator=seeded(1))
    chosen = {metric: tune(TUNED["c/L"], problem, 60, metric).chosen for metric in ("mean", "log final")}
    assert chosen["log final"] > 1.05 * chosen["mean"]


# Comparisons.


def small(seed: int, tasks: int = 7) -> Problem:
    return Quadratics(dim=6, kappa=20.0).sample(tasks, generator=seeded(seed))


METHODS = [baselines(8)[0], *known_scale()]
LEARNED = {"learned step size": [step_size(generator=seeded(s)) for s in range(3)]}


@pytest.fixture(scope="module")
def found() -> Comparison:
    return compare(METHODS, LEARNED, small(1), small(2), 8, "log final", trials=8)


def test_each_method_is_tuned_on_the_training_tasks_and_judged_on_the_test_tasks(found: Comparison) -> None:
    for method in METHODS:
        row = found.rows[method.name]
        expected = tune(method, small(1), 8, "log final", trials=8) if method.grid else None
        assert [(t.values, t.scores, t.chosen) for t in row.tuned] == (
            [(expected.values, expected.scores, expected.chosen)] if expected else []
        )
        rule = method.make(expected.chosen) if expected else method.make()
        scores = judge("log final", small(2), *trajectory(rule, small(2), 8))
        assert row.scores.shape == (1, 7)
        assert torch.allclose(row.scores[0], scores, rtol=1e-8)
        assert row.trials == (8 if method.grid else 0)


def test_the_oracle_is_the_best_of_the_same_values_on_each_test_task(found: Comparison) -> None:
    for method in METHODS:
        row = found.rows[method.name]
        assert (row.oracle <= row.scores).all()
        if method.grid:
            tried = one_by_one(method, row.tuned[0].values, small(2), "log final", 8)
            assert torch.allclose(row.oracle[0], tried.amin(0), rtol=1e-8)
    assert (found.rows["SGD"].oracle < found.rows["SGD"].scores).any()


def test_learned_rules_stand_with_those_who_know_the_same(found: Comparison) -> None:
    """An untrained learned step size is gradient descent at 1 / L, whichever seed."""
    row = found.rows["learned step size"]
    assert (row.knows, row.learned, row.scores.shape) == ("L", True, (3, 7))
    assert torch.allclose(row.scores, found.rows["1/L"].scores.expand(3, 7), rtol=1e-9)
    bare = replace(small(2), facts={"optimum": small(2).facts["optimum"]})
    assert compare([], {"learned": LEARNED["learned step size"][0]}, bare, bare, 8).rows["learned"].knows == "nothing"
    assert compare([], {"SGD, learned rate": sgd(0.1)}, bare, small(2), 8).rows["SGD, learned rate"].knows == "nothing"


def test_rows_stand_in_the_order_of_what_they_know(found: Comparison) -> None:
    groups = [KNOWS.index(row.knows) for row in found.rows.values()]
    assert groups == sorted(groups)
    assert list(found.rows)[:3] == ["SGD", "1/L", "c/L"]
    assert {row.knows for row in found.rows.values()} == set(KNOWS)


@pytest.mark.parametrize("shared", ["neither", "train", "test"])
def test_several_seeds_are_tuned_and_judged_seed_by_seed(shared: str) -> None:
    trains = small(1) if shared == "train" else [small(1), small(3), small(5)]
    tests = small(2) if shared == "test" else [small(2), small(4), small(6)]
    row = compare([TUNED["c/L"]], {}, trains, tests, 8, "log final", trials=4).rows["c/L"]
    assert len(row.tuned) == (1 if shared == "train" else 3)
    for i in range(3):
        train, test = (p if isinstance(p, Problem) else p[i] for p in (trains, tests))
        alone = compare([TUNED["c/L"]], {}, train, test, 8, "log final", trials=4).rows["c/L"]
        assert torch.allclose(row.scores[i], alone.scores[0], rtol=1e-9)
        assert torch.allclose(row.oracle[i], alone.oracle[0], rtol=1e-9)
    assert interval(row.scores)[2] == "3 seeds"


def rows_of(**scores: list) -> Comparison:
    values = {name: torch.tensor(v, dtype=F64) for name, v in scores.items()}
    return Comparison({k: Row(k, "nothing", v, v, (), 0.0) for k, v in values.items()}, "final", 10)


def test_differences_are_paired() -> None:
    """a − b = 1, 1.2 on every pair of tasks, whose own spread is 100: the interval of the mean of 1, 1.2, 1, 1.2"""
    found = rows_of(a=[[1.0, 101.2, 201.0, 301.2]], b=[[0.0, 100.0, 200.0, 300.0]])
    half = 3.182 * (0.04 / 3) ** 0.5 / 2
    assert found.difference("a", "b") == (pytest.approx(1.1), pytest.approx(half), "4 tasks")
    assert found.difference("b", "a")[0] == pytest.approx(-1.1)


def test_differences_over_seeds_use_one_row_of_the_other_for_all() -> None:
    """Seed means of a − b are 1, 2, 6"""
    found = rows_of(a=[[1.0, 11.0], [2.0, 12.0], [6.0, 16.0]], b=[[0.0, 10.0]])
    assert found.difference("a", "b") == (3.0, pytest.approx(4.303 * 7**0.5 / 3**0.5), "3 seeds")


def test_differences_of_diverged_runs_are_infinite_or_none_and_never_nan() -> None:
    found = rows_of(a=[[1.0, math.inf]], b=[[0.0, math.inf]], c=[[0.0, 3.0]])
    assert found.difference("a", "b") == (0.5, pytest.approx(12.706 / 2**0.5 / 2**0.5), "2 tasks")
    assert found.difference("a", "c") == (math.inf, math.inf, "2 tasks")
    assert found.difference("c", "a") == (-math.inf, math.inf, "2 tasks")


REACHED = {"1/L": -2.17, "c/L": -2.82, "silver steps": -2.90, "Nesterov, convex": -3.98, "heavy ball, step 1/L": -4.59,
           "heavy ball, best (m, L)": -5.66, "Chebyshev": -8.07, "Barzilai-Borwein": -7.6, "exact line search": -2.91,
           }  # fmt: skip


def test_the_book_s_quadratics_give_the_known_numbers() -> None:
    """Mean log10 gap after 50 steps, dim 20, κ = 100; an earlier computation with other code, on 2,048 tasks"""
    train, test = (Quadratics(20, 100.0).sample(n, generator=seeded(n)) for n in (32, 300))
    found, chosen = {}, {}
    for method in known_scale():
        value = [tune(method, train, 50, "log final").chosen] if method.grid else []
        found[method.name] = judge("log final", test, *trajectory(method.make(*value), test, 50)).mean().item()
        chosen[method.name] = value
    assert {name: found[name] for name in REACHED} == pytest.approx(REACHED, abs=0.3)
    assert found["relaxed line search"] < -5.5
    assert 1.85 < chosen["c/L"][0] < 2.0
    assert 0.75 < chosen["heavy ball, step 1/L"][0] < 0.85


# Fairness.


def tuned(trials: int, at: int, edge: bool = False) -> tuple[Tuned, ...]:
    return (Tuned([0.1 * (i + 1) for i in range(trials)], [1.0] * trials, 0.1 * (at + 1), edge, 1.0),)


def with_row(found: Comparison, **changes) -> Comparison:
    return replace(found, rows=found.rows | {"c/L": replace(found.rows["c/L"], **changes)})


def test_a_comparison_with_equal_trials_and_no_choice_on_an_edge_is_fair(found: Comparison) -> None:
    check_fair(found)
    check_fair(rows_of(a=[[1.0, 2.0]]))


def test_unequal_trials_are_unfair(found: Comparison) -> None:
    with pytest.raises(ValueError, match=r"same number of trials, got .*\('SGD', 8\), \('c/L', 9\)"):
        check_fair(with_row(found, tuned=tuned(9, 3)))
    with pytest.raises(ValueError, match="same number of trials"):
        check_fair(with_row(found, tuned=tuned(9, 3) + tuned(8, 3)))


def test_a_choice_on_the_edge_is_unfair(found: Comparison) -> None:
    with pytest.raises(ValueError, match="'c/L', 0.8, lies on the edge of those tried, 0.1 to 0.8: give more trials"):
        check_fair(with_row(found, tuned=tuned(8, 3) + tuned(8, 7, True)))
    real = compare([replace(SGD, grid=(1e-30, 1e-29))], {}, small(1), small(2), 8)
    with pytest.raises(ValueError, match="the value chosen for 'SGD'"):
        check_fair(real)


def test_tuning_on_the_test_tasks_would_be_noticed(found: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bugs: the oracle's value as the chosen one, and tuning that sees the test tasks."""
    module = sys.modules["metalearn_utils.compare"]
    monkeypatch.setattr(module, "tune", lambda method, problem, *rest: tune(method, small(2), *rest))
    leaked = compare(METHODS, {}, small(1), small(2), 8, "log final", trials=8)
    with pytest.raises(AssertionError):
        test_each_method_is_tuned_on_the_training_tasks_and_judged_on_the_test_tasks(leaked)
    with pytest.raises(AssertionError):
        test_each_method_is_tuned_on_the_training_tasks_and_judged_on_the_test_tasks(
            with_row(found, scores=found.rows["c/L"].oracle - 1e-6)
        )


def forgetful(patch: pytest.MonkeyPatch) -> None:
    """Diverged runs count as NaN."""
    patch.setattr(tuning, "judge", lambda *args: judge(*args).nan_to_num(posinf=math.nan))


def short_grid(patch: pytest.MonkeyPatch) -> None:
    """The grid is refined at its edge, and never left."""
    right = tuning._best
    patch.setattr(tuning, "_best", lambda t, c: (right(t, c)[0], min(max(right(t, c)[1], 1), len(t) - 2)))


TUNING_BUGS = {
    "NaN": (forgetful, lambda: test_gradient_descent_is_tuned_from_a_grid_that_misses_or_diverges(1e2, 1e4)),
    "no extension": (short_grid, lambda: test_a_best_value_far_outside_the_first_grid_is_found(1e4)),
    "edges unseen": (short_grid, test_a_best_value_that_was_not_reached_is_reported_as_lying_on_the_edge),
    "one trial too many": (
        lambda patch: patch.setattr(tuning, "_rounds", lambda n: [n // 2, n - n // 2 + 1]),
        lambda: test_every_tuning_takes_exactly_the_number_of_trials_it_is_given(16),
    ),
    "wrong copies": (
        lambda patch: patch.setattr(tuning, "follow", lambda *args: [v.flip(1) if torch.is_tensor(v) else v
                                                                     for v in judging.follow(*args)]),
        lambda: test_trials_in_one_batch_equal_trials_one_by_one("SGD", pytest.MonkeyPatch()),
    ),
}  # fmt: skip


@pytest.mark.parametrize("bug", TUNING_BUGS)
def test_a_bug_in_tuning_is_noticed(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, check = TUNING_BUGS[bug]
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check()


# What is shown.


def test_the_table_has_few_digits_and_no_times_unless_asked(found: Comparison) -> None:
    text = str(found)
    assert text.startswith("log10 of the loss above its optimum, after 8 steps (lower is better)\n")
    lines = text.splitlines()[1:]
    assert "CPU s" not in text and "CPU s" in found.table(seconds=True).splitlines()[1]
    assert [line for line in lines if line.startswith("knows")] == [f"knows {k}" for k in KNOWS]
    for line in lines[1:]:
        for number in re.findall(r"\d*\.\d+|\d+", line.split("  ", 2)[-1]):
            assert len(number.replace(".", "").lstrip("0")) <= 4
    row = next(line for line in lines if line.startswith("  c/L "))
    mean, half, _ = interval(found.rows["c/L"].scores)
    chosen = found.rows["c/L"].tuned[0].chosen
    oracle = found.rows["c/L"].oracle.mean()
    assert row.split() == f"c/L {chosen:.3g} 8 {mean:.3g} ± {half:.2g} 7 tasks {oracle:.3g}".split()
    assert f"{mean:.2g} ± {half:.1g}" in found.table(digits=2)
    assert "3 seeds" in next(line for line in lines if "learned step size" in line)


def test_the_table_shows_the_range_of_the_chosen_values_and_who_diverged() -> None:
    found = rows_of(a=[[1.0, 2.0]] * 3, b=[[1.0, math.inf]])
    found.rows["a"] = replace(found.rows["a"], tuned=tuned(8, 5) + tuned(8, 1) + tuned(8, 3))
    lines = str(found).splitlines()
    assert lines[3].split() == "a 0.2 to 0.6 8 1.5 ± 0 3 seeds 1.5".split()
    assert lines[4].split() == "b - - diverges 2 tasks -".split()


def test_the_figure_has_one_row_per_method_under_what_it_knows(found: Comparison) -> None:
    fig = found.figure()
    ax = fig.axes[0]
    heights = dict(zip([t.get_text() for t in ax.get_yticklabels()], ax.get_yticks()))
    heads = {t.get_text(): t.xy[1] for t in ax.texts if t.get_text().startswith("knows")}
    assert heights.keys() == found.rows.keys()
    assert list(heads) == [f"knows {k}" for k in KNOWS]
    for name, row in found.rows.items():
        assert min((y - heights[name], k) for k, y in heads.items() if y > heights[name])[1] == f"knows {row.knows}"
    bold = [t.get_text() for t in ax.get_yticklabels() if t.get_fontweight() == "bold"]
    assert bold == ["learned step size"]
    read = dict(line.split(": ") for line in summary(fig))
    for name, row in found.rows.items():
        assert read[name].split(" (")[0] == f"{row.scores.mean():.3g}"
        assert (f"{name}, tick" in read) == (row.trials > 0)
    assert read["SGD, tick"] == f"{found.rows['SGD'].oracle.mean():.3g}"
    assert "tuned on each test task itself" in ax.get_xlabel()
    assert f"SGD, tick: {found.rows['SGD'].oracle.mean():.2g}" in summary(found.figure(digits=2))


def test_a_diverged_method_is_written_not_drawn() -> None:
    fig = dot_groups({"knows nothing": [Bar("a", 1.0, 0.1), Bar("b", math.inf, math.inf, math.inf)], "empty": []})
    assert [line.split(":")[0] for line in summary(fig)] == ["a"]
    assert [t.get_text() for t in fig.axes[0].texts] == ["knows nothing", "1 ± 0.1", "diverges"]


# Bad input.

PLAIN = LeastSquares(3).sample(4, generator=seeded())
BAD = {
    "name": (lambda: compare([SGD, SGD], {}, small(1), small(2), 8), r"names must differ, got \['SGD'\]"),
    "learned name": (lambda: compare([SGD], {"SGD": sgd()}, PLAIN, PLAIN, 8), r"names must differ, got \['SGD'\]"),
    "metric": (lambda: compare([SGD], {}, PLAIN, PLAIN, 8, "loss"), "must be one of .*'log mean'.*, got 'loss'"),
    "metric of no tuning": (lambda: compare([], {}, PLAIN, PLAIN, 8, "accuracy"), "metric must be one of"),
    "trials": (lambda: tune(SGD, PLAIN, 8, trials=3), r"'SGD' must .* at least 4 trials, got \(0.01, 10.0\) and 3"),
    "many": (lambda: tune(SGD, PLAIN, 8, trials=16.0), "trials must be an integer >= 1, got 16.0"),
    "steps": (lambda: tune(SGD, PLAIN, 0), "steps must be an integer >= 1, got 0"),
    "steps of a run": (lambda: trajectory(sgd(), PLAIN, 0), "steps must be an integer >= 1, got 0"),
    "nothing to tune": (lambda: tune(known_scale()[0], small(1), 8), "'1/L' must have a grid"),
    "L": (lambda: trajectory(informed.constant(), PLAIN, 8), r"facts must hold \['L'\], .* holds \['optimum'\]"),
    "m": (lambda: trajectory(informed.chebyshev(), replace(PLAIN, facts={"L": 1}), 8), r"facts must hold \['m'\]"),
    "knows": (lambda: Method("a", sgd, "much"), "knows must be one of .*, got 'much'"),
    "grid": (lambda: Method("a", sgd, grid=(1.0, 0.1)), r"grid must hold two bounds, 0 < low < high, got \(1.0, 0.1\)"),
    "grid at 0": (lambda: Method("a", sgd, grid=(0.0, 0.1)), "grid must hold two bounds"),
    "probes": (lambda: informed.line_search(1.0, 0), "probes must be an integer >= 1, got 0"),
    "horizon": (lambda: baselines(0)[1].make(0.1), "horizon must be an integer >= 1, got 0"),
    "seeds": (lambda: compare([SGD], {}, [PLAIN] * 2, [PLAIN] * 3, 8), "seeds must match: .*'train': 2, 'test': 3"),
    "seeds of learned": (lambda: compare([], {"a": [sgd()] * 2}, PLAIN, [PLAIN] * 3, 8), "seeds must match"),
    "no test": (lambda: compare([SGD], {}, small(1), [], 8), "train and test must hold problems"),
    "tasks": (lambda: compare([SGD], {}, small(1), [small(2), small(2, 3)], 8), r"numbers of tasks, got \[7, 3\]"),
    "difference": (lambda: rows_of(a=[[1.0, 2.0]]).difference("a", "c"), r"must be among \['a'\], got 'c'"),
    "no bars": (lambda: dot_groups({"a": []}), "groups must hold at least one bar"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
