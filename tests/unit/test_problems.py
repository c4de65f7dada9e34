"""Training problems: their gradients, curvatures and minima are what they say."""

from collections.abc import Callable

import pytest
import torch
from cases import F64, assert_same, seeded
from torch import Tensor
from training_cases import net_problem

from metalearn_utils.adapt import adapt
from metalearn_utils.rules import sgd
from metalearn_utils.tasks import problems
from metalearn_utils.tasks.base import Batch
from metalearn_utils.tasks.networks import classification, network
from metalearn_utils.tasks.problems import LeastSquares, LogisticRegression, Problem, Quadratics, minimise_logistic

TASKS = 4


def small_images(activation: str) -> Problem:
    """A network of 5 inputs and 3 classes on random numbers."""
    g = seeded()
    x, y = torch.randn(2, 2, 12, 5, generator=g, dtype=F64), torch.randint(3, (2, 2, 12), generator=g)
    return classification(network((5, 4, 3), activation), Batch(x[0], y[0]), Batch(x[1], y[1]), 6, g)


FAMILIES: dict[str, Callable[[], Problem]] = {
    "quadratics": lambda: Quadratics(6).sample(TASKS, generator=seeded()),
    "least squares": lambda: LeastSquares(5).sample(TASKS, generator=seeded()),
    "logistic regression": lambda: LogisticRegression(30, 5).sample(TASKS, generator=seeded()),
    "sigmoid network": lambda: small_images("sigmoid"),
    "tanh network": lambda: small_images("tanh"),
    "relu network": lambda: small_images("relu"),
}


def points(problem: Problem, seed: int = 1) -> dict[str, Tensor]:
    """Random parameters."""
    g = seeded(seed)
    return {k: v + torch.randn(v.shape, generator=g, dtype=F64) for k, v in problem.theta.items()}


def check_gradient(problem: Problem) -> None:
    """The gradient that is written out is that of autograd; the losses are the same."""
    at = {k: v.requires_grad_() for k, v in points(problem).items()}
    losses = problem.loss(at, problem.data(3))
    expected = dict(zip(at, torch.autograd.grad(losses.sum(), list(at.values()))))
    value, found = problem.gradient({k: v.detach() for k, v in at.items()}, problem.data(3))
    assert torch.allclose(value, losses, rtol=1e-13)
    assert_same(found, expected, 1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_written_out_equal_autograd(family: str) -> None:
    check_gradient(FAMILIES[family]())


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_one_number_per_task_and_of_that_task_alone(family: str) -> None:
    """Moving the parameters of task 0 changes the loss of task 0 only."""
    problem = FAMILIES[family]()
    at = points(problem)
    moved = {k: torch.cat([v[:1] + 1, v[1:]]) for k, v in at.items()}
    before, after = problem.losses(at, problem.data(0)), problem.losses(moved, problem.data(0))
    assert before.shape == (len(problem),)
    assert before[0] != after[0]
    assert torch.equal(before[1:], after[1:])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_generator_alone_decides(family: str) -> None:
    a, b = FAMILIES[family](), FAMILIES[family]()
    assert all(torch.equal(a.theta[k], b.theta[k]) for k in a.theta)
    for x, y in zip(a.data(5), b.data(5)):
        assert torch.equal(x, y)


@pytest.mark.parametrize("family", [Quadratics, LeastSquares, LogisticRegression])
def test_float32_problems_are_the_float64_ones_rounded(family) -> None:
    double, single = (family().sample(2, generator=seeded(), dtype=d) for d in (F64, torch.float32))
    tensors = [[*p.theta.values(), *p.facts.values(), *p.data(0)] for p in (double, single)]
    for a, b in zip(*tensors):
        assert b.dtype == torch.float32
        assert torch.equal(a.float(), b)


# Quadratics.


def test_quadratics_are_what_they_say() -> None:
    """½ (θ - c)ᵀ A (θ - c): zero at c, which is the optimum; from θ_0 = 0 the loss is ½ cᵀ A c"""
    problem = FAMILIES["quadratics"]()
    matrix, centre = problem.data(0)
    assert problem.loss({"theta": centre}, problem.data(0)).abs().max() == 0
    assert problem.facts["optimum"].abs().max() == 0
    expected = torch.stack([0.5 * c @ a @ c for a, c in zip(matrix, centre)])
    assert torch.allclose(problem.loss(problem.theta, problem.data(0)), expected, rtol=1e-13)


@pytest.mark.parametrize("kappa", [1.0, 10.0, 100.0])
def test_the_curvatures_of_quadratics_are_their_extreme_eigenvalues(kappa: float) -> None:
    """L and m = L / κ, both attained; L within the bounds asked for, and different in every task"""
    problem = Quadratics(8, kappa, (0.5, 4.0)).sample(50, generator=seeded())
    values = torch.linalg.eigvalsh(problem.data(0)[0])
    assert torch.allclose(values[:, -1], problem.facts["L"], rtol=1e-10)
    assert torch.allclose(values[:, 0], problem.facts["m"], rtol=1e-10)
    assert torch.allclose(problem.facts["L"] / problem.facts["m"], torch.full((50,), kappa, dtype=F64), rtol=1e-12)
    assert 0.5 <= problem.facts["L"].min() < 0.7
    assert 3.0 < problem.facts["L"].max() <= 4.0


# Least squares.


def test_least_squares_are_the_papers() -> None:
    """Σ_i (W θ - y)_i², row by row; W, y and θ_0 have mean 0 and variance 1 (|z| < 4.5)"""
    problem = FAMILIES["least squares"]()
    (w, y), theta = problem.data(0), points(problem)["theta"]
    rows = [sum((w[k, i] @ theta[k] - y[k, i]) ** 2 for i in range(5)) for k in range(TASKS)]
    assert torch.allclose(problem.loss({"theta": theta}, (w, y)), torch.stack(rows), rtol=1e-12)
    many = LeastSquares(10).sample(100, generator=seeded())
    for draws in (*many.data(0), many.theta["theta"]):
        assert abs(draws.mean().item()) < 4.5 / draws.numel() ** 0.5
        assert abs(draws.var().item() - 1) < 4.5 * (2 / draws.numel()) ** 0.5


# Logistic regression.


def test_the_logistic_loss_example_by_example() -> None:
    """mean of log(1 + exp(-y xᵀ θ)), plus 1e-3 |θ|² / 2"""
    problem = FAMILIES["logistic regression"]()
    (x, y), theta = problem.data(0), points(problem)["theta"]
    values = []
    for k in range(TASKS):
        terms = [(1 + (-y[k, i] * (x[k, i] @ theta[k])).exp()).log() for i in range(30)]
        values.append(sum(terms) / 30 + 0.5e-3 * theta[k] @ theta[k])
    assert torch.allclose(problem.loss({"theta": theta}, (x, y)), torch.stack(values), rtol=1e-12)
    assert set(y.unique().tolist()) == {-1.0, 1.0}


def check_minimum(family: LogisticRegression) -> None:
    """|∇f| < 1e-10 at the minimum that is found, f there is `optimum`, and gradient descent never falls below it."""
    problem = family.sample(10, generator=seeded())
    best = {"theta": minimise_logistic(*problem.data(0))}
    value, grads = problem.gradient(best, problem.data(0))
    assert grads["theta"].norm(dim=1).max() < 1e-10
    assert torch.allclose(value, problem.facts["optimum"], rtol=1e-14)
    rule = sgd({"theta": (1 / problem.facts["L"]).unsqueeze(1)})
    losses = adapt(problem.loss, problem.theta, problem.data(0), rule, 30, gradient=problem.gradient).losses
    assert (problem.excess(losses) > -1e-14).all()
    assert (losses[1:] < losses[:-1] + 1e-14).all(), "a step of 1 / L descends"
    assert (problem.excess(losses)[0] > 1e-3).all()


HARD = {
    "default": LogisticRegression(),
    "few examples, separable": LogisticRegression(12, 10),
    "large inputs": LogisticRegression(100, 10, 30.0, (50.0, 200.0)),
    "equal scales": LogisticRegression(60, 3, 1.0),
}


@pytest.mark.parametrize("name", HARD)
def test_the_optimum_of_logistic_regression_is_the_minimum(name: str) -> None:
    check_minimum(HARD[name])


def check_curvature(problem: Problem) -> None:
    """m <= every eigenvalue of the Hessian <= L at random points; L is attained at θ = 0"""
    for scale in (0.0, 0.1, 1.0, 10.0):
        theta = (scale * points(problem)["theta"]).requires_grad_()
        gradient = problem.gradient({"theta": theta}, problem.data(0))[1]["theta"]
        rows = [torch.autograd.grad(g.sum(), theta, retain_graph=True)[0] for g in gradient.unbind(1)]
        values = torch.linalg.eigvalsh(torch.stack(rows, 1))
        assert (values[:, -1] <= problem.facts["L"] * (1 + 1e-12)).all()
        assert (values[:, 0] >= problem.facts["m"] * (1 - 1e-9)).all()
        if scale == 0:
            assert torch.allclose(values[:, -1], problem.facts["L"], rtol=1e-10)


def test_the_curvatures_of_logistic_regression_bound_its_hessian() -> None:
    check_curvature(FAMILIES["logistic regression"]())


# What a problem refuses, and planted bugs.


def test_excess_is_the_loss_itself_where_the_optimum_is_unknown() -> None:
    losses = torch.ones(2, 3, dtype=F64)
    assert net_problem().excess(losses) is losses


@pytest.mark.parametrize("largest", [(3.0, 0.3), (0.0, 1.0), (-1.0, 1.0)])
@pytest.mark.parametrize("family", [Quadratics, LogisticRegression])
def test_bad_bounds_are_named(family, largest: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"largest must hold two bounds, 0 < low <= high, got \("):
        family(largest=largest)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Quadratics(1).sample(2, generator=seeded()), "dim must be >= 2, got 1"),
    (lambda: Quadratics(kappa=0.5).sample(2, generator=seeded()), "kappa must be >= 1, got 0.5"),
    (lambda: Quadratics().sample(0, generator=seeded()), "tasks must be >= 1, got 0"),
    (lambda: LogisticRegression(spread=0.5), "spread must be >= 1, got 0.5"),
])
def test_bad_sizes_are_named(make: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def without_ridge(patch: pytest.MonkeyPatch) -> None:
    """The gradient without its ridge."""
    right = problems.logistic_gradient

    def without(params, data):
        loss, grads = right(params, data)
        return loss, {"theta": grads["theta"] - 1e-3 * params["theta"]}

    patch.setattr(problems, "logistic_gradient", without)


def few_newton_steps(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(problems, "range", lambda n: [0] * min(n, 5), raising=False)


def another_ridge(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LogisticRegression, "ridge", 2e-3)


BUGS: dict[str, tuple[Callable, Callable[[], None]]] = {
    "a gradient without the ridge": (without_ridge, lambda: check_gradient(FAMILIES["logistic regression"]())),
    "too few Newton steps": (few_newton_steps, lambda: check_minimum(HARD["large inputs"])),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_turns_its_check_red(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, check = BUGS[bug]
    check()
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check()


def test_a_curvature_of_another_ridge_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted bug: L and m are those of another problem."""
    problem = FAMILIES["logistic regression"]()
    check_curvature(problem)
    another_ridge(monkeypatch)
    with pytest.raises(AssertionError):
        check_curvature(problem)
