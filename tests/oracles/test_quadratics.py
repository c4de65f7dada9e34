"""Closed forms on quadratic tasks: support ½ (θ − c)ᵀ A (θ − c), query ½ (θ − d)ᵀ B (θ − d), gradient descent."""

import pytest
import torch
from cases import F64, Quadratics, assert_same, point_learner, quadratics, scalar_quadratics
from torch import Tensor

from metalearn_utils.meta import fomaml, joint, maml, reptile
from metalearn_utils.rules import per_parameter, per_step, sgd

ALPHA = 0.2
DIMS = [1, 3]
THETA = torch.tensor([0.7, -0.4, 1.1], dtype=F64)
pytestmark = pytest.mark.usefixtures("every_path")


def start(dim: int) -> dict[str, Tensor]:
    return {"theta": THETA[:dim]}


def contraction(matrix: Tensor, alpha: float, steps: int) -> Tensor:
    """(I − α A)^K"""
    return torch.linalg.matrix_power(torch.eye(matrix.shape[-1], dtype=F64) - alpha * matrix, steps)


def apply(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def adapted(q: Quadratics, theta: Tensor, alpha: float, steps: int) -> Tensor:
    """θ_K = c + (I − α A)^K (θ − c)"""
    return q.c + apply(contraction(q.A, alpha, steps), theta - q.c)


@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("dim", DIMS)
def test_maml_gradient_is_contraction_times_query_gradient(dim: int, steps: int) -> None:
    """∇ = mean (I − α A)^K B (θ_K − d); in one dimension mean b r^K (θ_K − d) with r = 1 − α a."""
    q, theta = quadratics(4, dim), THETA[:dim]
    query_gradient = apply(q.B, adapted(q, theta, ALPHA, steps) - q.d)
    expected = apply(contraction(q.A, ALPHA, steps), query_gradient).mean(0)
    found = maml(point_learner(dim, sgd(ALPHA), steps), start(dim), q.tasks())
    assert_same(found.theta, {"theta": expected}, 1e-12)


@pytest.mark.parametrize("dim", DIMS)
def test_maml_loss_is_the_mean_query_loss_after_adaptation(dim: int) -> None:
    """loss = mean ½ (θ_K − d)ᵀ B (θ_K − d)"""
    q = quadratics(4, dim)
    gap = adapted(q, THETA[:dim], ALPHA, 3) - q.d
    found = maml(point_learner(dim, sgd(ALPHA), 3), start(dim), q.tasks())
    assert found.loss.item() == pytest.approx((0.5 * gap * apply(q.B, gap)).sum(1).mean().item(), rel=1e-12)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("dim", DIMS)
def test_fomaml_gradient_is_the_query_gradient_at_the_adapted_parameters(dim: int, steps: int) -> None:
    """∇ = mean B (θ_K − d)"""
    q = quadratics(4, dim)
    expected = apply(q.B, adapted(q, THETA[:dim], ALPHA, steps) - q.d).mean(0)
    found = fomaml(point_learner(dim, sgd(ALPHA), steps), start(dim), q.tasks())
    assert_same(found.theta, {"theta": expected}, 1e-12)


@pytest.mark.parametrize("steps", [1, 3])
def test_maml_and_fomaml_have_opposite_signs_when_the_step_overshoots(steps: int) -> None:
    """One task: MAML / FOMAML = r^K, negative for odd K when α a > 1."""
    q = scalar_quadratics([3.0], [1.0])
    learner = point_learner(1, sgd(0.5), steps)
    ratio = maml(learner, start(1), q.tasks()).theta["theta"] / fomaml(learner, start(1), q.tasks()).theta["theta"]
    assert ratio.item() == pytest.approx((1 - 0.5 * 3.0) ** steps, rel=1e-12)
    assert ratio.item() < 0


@pytest.mark.parametrize("dim", DIMS)
def test_gradient_of_a_learned_rate(dim: int) -> None:
    """∂/∂α = mean B (θ_K − d) · (−K A (I − α A)^(K−1) (θ − c))"""
    q, theta, steps = quadratics(4, dim), THETA[:dim], 3
    slope = -steps * apply(q.A @ contraction(q.A, ALPHA, steps - 1), theta - q.c)
    expected = (apply(q.B, adapted(q, theta, ALPHA, steps) - q.d) * slope).sum(1).mean()
    rule = sgd(ALPHA)
    found = maml(point_learner(dim, rule, steps), start(dim), q.tasks(), rule.phi)
    assert found.phi["lr"].item() == pytest.approx(expected.item(), rel=1e-11)


@pytest.mark.parametrize("dim", DIMS)
def test_gradient_of_one_learned_rate_per_step(dim: int) -> None:
    """∂/∂α_k = −mean B (θ_K − d) · A Π_{j≠k} (I − α_j A) (θ − c)"""
    q, theta, rates = quadratics(4, dim), THETA[:dim], torch.tensor([0.1, 0.25, 0.4], dtype=F64)
    shrink = [contraction(q.A, rate.item(), 1) for rate in rates]
    end = q.c + apply(shrink[2] @ shrink[1] @ shrink[0], theta - q.c)
    others = [shrink[2] @ shrink[1], shrink[2] @ shrink[0], shrink[1] @ shrink[0]]
    query_gradient = apply(q.B, end - q.d)
    expected = torch.stack([-(query_gradient * apply(q.A @ m, theta - q.c)).sum(1).mean() for m in others])
    rule = sgd(rates)
    found = maml(point_learner(dim, rule, 3), start(dim), q.tasks(), rule.phi)
    assert_same({"lr": found.phi["lr"]}, {"lr": expected}, 1e-11)


def test_equal_rates_per_step_are_one_rate() -> None:
    """α_k = α for all k: the same θ-gradient, and the α_k-gradients add up to that of α."""
    q, one, many = quadratics(4, 3), sgd(ALPHA), sgd(per_step(ALPHA, 3))
    a = maml(point_learner(3, one, 3), start(3), q.tasks(), one.phi)
    b = maml(point_learner(3, many, 3), start(3), q.tasks(), many.phi)
    assert_same(a.theta, b.theta, 1e-12)
    assert b.phi["lr"].sum().item() == pytest.approx(a.phi["lr"].item(), rel=1e-11)


@pytest.mark.parametrize("dim", DIMS)
def test_meta_sgd_gradients(dim: int) -> None:
    """One step: ∂/∂α = −mean g_S ⊙ g_Q, ∂/∂θ = mean (I − A diag α) g_Q, with g_Q at θ' = θ − α ⊙ g_S."""
    q, theta, alpha = quadratics(4, dim), THETA[:dim], torch.tensor([0.1, 0.3, 0.2], dtype=F64)[:dim]
    support = apply(q.A, theta - q.c)
    query = apply(q.B, theta - alpha * support - q.d)
    rule = sgd({"theta": alpha})
    found = maml(point_learner(dim, rule, 1), start(dim), q.tasks(), rule.phi)
    assert_same(found.phi["lr"], {"theta": -(support * query).mean(0)}, 1e-12)
    assert_same(found.theta, {"theta": (query - apply(q.A, alpha * query)).mean(0)}, 1e-12)


@pytest.mark.parametrize("dim", DIMS)
def test_joint_gradient_is_the_mean_gradient_over_all_examples(dim: int) -> None:
    """∇ = mean ½ (A (θ − c) + B (θ − d)): support and query count alike."""
    q, theta = quadratics(4, dim), THETA[:dim]
    expected = 0.5 * (apply(q.A, theta - q.c) + apply(q.B, theta - q.d)).mean(0)
    assert_same(joint(point_learner(dim, sgd(ALPHA), 3), start(dim), q.tasks()).theta, {"theta": expected}, 1e-12)


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("dim", DIMS)
def test_reptile_step_is_the_mean_displacement(dim: int, steps: int) -> None:
    """θ − θ_K = mean (I − (I − α Ā)^K) (θ − c̄), Ā = (A + B) / 2 and c̄ = Ā⁻¹ (A c + B d) / 2."""
    q = quadratics(4, dim)
    both = (q.A + q.B) / 2
    centre = torch.linalg.solve(both, (apply(q.A, q.c) + apply(q.B, q.d)) / 2)
    gap = THETA[:dim] - centre
    expected = (gap - apply(contraction(both, ALPHA, steps), gap)).mean(0)
    found = reptile(point_learner(dim, sgd(ALPHA), steps), start(dim), q.tasks())
    assert_same(found.theta, {"theta": expected}, 1e-12)


def test_reptile_reduced_by_a_sum_is_as_many_times_larger_as_there_are_tasks() -> None:
    """Σ_i = tasks × mean_i: the error that multiplies epsilon by the number of tasks."""
    q, learner = quadratics(4, 3), point_learner(3, sgd(ALPHA), 2)
    mean = reptile(learner, start(3), q.tasks()).theta["theta"]
    assert_same(reptile(learner, start(3), q.tasks(), reduction="sum").theta, {"theta": 4 * mean}, 1e-12)


def fixed_point(algorithm, steps: int) -> float:
    """Where the (affine) meta-gradient vanishes, for a = 9, c = 1 and a = 1, c = −1, α = 0.1, query = support."""
    tasks, learner = scalar_quadratics([9.0, 1.0], [1.0, -1.0]).tasks(), point_learner(1, sgd(0.1), steps)
    at = [algorithm(learner, {"theta": torch.tensor([v], dtype=F64)}, tasks).theta["theta"].item() for v in (0.0, 1.0)]
    return -at[0] / (at[1] - at[0])


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_fixed_points_of_the_four_algorithms(steps: int) -> None:
    """Σ w c / Σ w with w = a r^2K for MAML, a r^K for FOMAML, 1 − r^K for Reptile, a for joint training."""
    a, c = torch.tensor([9.0, 1.0], dtype=F64), torch.tensor([1.0, -1.0], dtype=F64)
    shrink = (1 - 0.1 * a) ** steps
    weights = {maml: a * shrink**2, fomaml: a * shrink, reptile: 1 - shrink, joint: a}
    for algorithm, weight in weights.items():
        expected = ((weight * c).sum() / weight.sum()).item()
        assert fixed_point(algorithm, steps) == pytest.approx(expected, abs=1e-9), algorithm.__name__


def test_fixed_points_as_printed_in_the_text() -> None:
    """K = 1, 2, 5, 20: Reptile .80, .68, .42, .06; MAML −.80, −.997, −1, −1; FOMAML 0, −.80, −1, −1; joint .80."""
    table = {
        reptile: (0.80, 0.68, 0.42, 0.06),
        maml: (-0.80, -0.997, -1.0, -1.0),
        fomaml: (0.0, -0.80, -1.0, -1.0),
        joint: (0.8, 0.8, 0.8, 0.8),
    }
    for algorithm, expected in table.items():
        found = [fixed_point(algorithm, steps) for steps in (1, 2, 5, 20)]
        assert found == pytest.approx(expected, abs=5e-3), algorithm.__name__


def test_meta_sgd_with_equal_rates_is_maml() -> None:
    """α = a · 1: the same θ-gradient, and the per-weight gradients add up to that of the one rate."""
    q, one = quadratics(4, 3), sgd(ALPHA)
    many = sgd(per_parameter(ALPHA, start(3)))
    a = maml(point_learner(3, one, 2), start(3), q.tasks(), one.phi)
    b = maml(point_learner(3, many, 2), start(3), q.tasks(), many.phi)
    assert_same(b.theta, a.theta, 1e-12)
    assert b.phi["lr"]["theta"].sum().item() == pytest.approx(a.phi["lr"].item(), rel=1e-11)
