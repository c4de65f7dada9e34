"""Rates in closed form: per weight, per step, the best constant, the greedy one, Chebyshev's, and hypergradients."""

import math
from functools import partial

import pytest
import torch
from cases import F64, assert_same, seeded
from torch import Tensor
from training_cases import THETA, bowls, net_loss, net_problem, one_of, shaken, single

from metalearn_utils import rates, rules
from metalearn_utils.adapt import adapt
from metalearn_utils.estimators import MetaLoss, run, unrolled
from metalearn_utils.rates import decayed, hypergradient, per_layer, per_layer_and_step, rates_of, schedule
from metalearn_utils.rules import Params, UpdateRule, adam, momentum, per_parameter, sgd
from metalearn_utils.tasks.problems import Problem, Quadratics

FINAL = MetaLoss(final=True)


def gradient_at(params: Params, data) -> Params:
    """The gradient of `net_loss` of one task."""
    leaves = {k: v.detach().clone().requires_grad_() for k, v in params.items()}
    return dict(zip(leaves, torch.autograd.grad(net_loss(leaves, data), list(leaves.values()))))


def moved(theta: Params, direction: Params, by: float | Params) -> Params:
    """θ - α g, α a number or one per weight."""
    return {k: v - (by[k] if isinstance(by, dict) else by) * direction[k] for k, v in theta.items()}


def inner(a: Params, b: Params) -> float:
    return sum((a[k] * b[k]).sum().item() for k in a)


def meta_gradient(rule: UpdateRule, problem: Problem, steps: int, meta_loss: MetaLoss = FINAL):
    return unrolled(steps, meta_loss)(rule, rule.phi, problem, None, seeded()).phi


# Per weight and per step.


def check_meta_sgd() -> None:
    """One step, one task, any loss: ∂/∂α = -g_S(θ) ⊙ g_Q(θ') with θ' = θ - α ⊙ g_S"""
    problem = net_problem(1)
    rule = shaken(sgd(per_parameter(0.2, THETA)), 0.03)
    (theta, data), query = single(problem, 0), [v[0] for v in problem.data(39)]
    support = gradient_at(theta, data[0])
    after = gradient_at(moved(theta, support, rule.phi["lr"]), query)
    found = meta_gradient(rule, problem, 1, MetaLoss(score="validation loss"))
    assert_same(found["lr"], {k: -support[k] * after[k] for k in theta}, 1e-12)


def test_meta_sgd_is_minus_the_product_of_support_and_query_gradients() -> None:
    check_meta_sgd()


def test_rates_per_layer_add_up_those_of_its_weights() -> None:
    """∂/∂α_layer = Σ of ∂/∂α over the layer's weights, for three steps"""
    problem = net_problem(2)
    each = meta_gradient(sgd(per_parameter(0.2, one_of(problem.theta))), problem, 3)["lr"]
    found = meta_gradient(sgd(per_layer(0.2, one_of(problem.theta))), problem, 3)["lr"]
    assert_same(found, {k: v.sum() for k, v in each.items()}, 1e-12)


def test_rates_per_layer_and_step_add_up_to_those_per_step_and_per_layer() -> None:
    """Σ over layers gives one rate per step, Σ over steps one rate per layer."""
    problem = net_problem(2)
    start = one_of(problem.theta)
    both = meta_gradient(per_layer_and_step(0.2, start, 3), problem, 3)["lr"]
    per_step = meta_gradient(sgd(torch.full((3,), 0.2, dtype=F64)), problem, 3)["lr"]
    assert torch.allclose(sum(both.values()), per_step, rtol=1e-11)
    per_tensor = meta_gradient(sgd(per_layer(0.2, start)), problem, 3)["lr"]
    assert_same({k: v.sum() for k, v in both.items()}, per_tensor, 1e-11)


def test_one_rate_per_step_in_closed_form() -> None:
    """f = ½ h x²: ∂/∂α_k = -h² x_0² Π_{j≠k} (1 - α_j h) Π_j (1 - α_j h), mean over tasks"""
    h, steps = torch.tensor([0.8, 2.5], dtype=F64), torch.tensor([0.1, 0.5, 0.3], dtype=F64)
    factors = 1 - steps[:, None] * h
    others = torch.stack([factors[[j for j in range(3) if j != k]].prod(0) for k in range(3)])
    expected = (-(h**2) * 1.5**2 * others * factors.prod(0)).mean(1)
    found = meta_gradient(sgd(steps), bowls(h[:, None].tolist(), start=1.5), 3)["lr"]
    assert_same({"lr": found}, {"lr": expected}, 1e-12)


# The best rates on a quadratic.


def slope(rate: float, problem: Problem, steps: int) -> float:
    return meta_gradient(sgd(rate), problem, steps)["lr"].item()


def root(problem: Problem, steps: int, low: float, high: float) -> float:
    """Where the meta-gradient of one rate changes its sign, by bisection."""
    assert slope(low, problem, steps) < 0 < slope(high, problem, steps)
    for _ in range(30):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if slope(middle, problem, steps) < 0 else (low, middle)
    return low


def test_the_best_constant_rate_tends_to_two_over_m_plus_l() -> None:
    """m = 1, L = 4: the meta-gradient vanishes at 0.3992 for K = 200, against 2 / (m + L) = 0.4"""
    problem = bowls([[1.0, 4.0]])
    ratio = 16 ** (1 / 399)  # (1 - α) / (4 α - 1) where both terms of the derivative cancel
    found = root(problem, 200, 0.3, 0.42)
    assert found == pytest.approx((1 + ratio) / (1 + 4 * ratio), rel=1e-8)
    assert found == pytest.approx(0.3992, abs=5e-5)
    assert abs(root(problem, 20, 0.3, 0.42) - 0.4) > 5 * abs(found - 0.4)


def greedy(problem: Problem, params: Tensor) -> float:
    """gᵀg / gᵀA g of a problem with one task."""
    matrix, centre = problem.data(0)
    g = matrix[0] @ (params - centre[0])
    return (g @ g / (g @ matrix[0] @ g)).item()


def test_the_greedy_rate_is_stationary_for_one_step_and_not_for_two() -> None:
    """∂f(θ_1)/∂α = 0 at gᵀg / gᵀA g; ∂f(θ_2)/∂α_1 is not, though ∂f(θ_2)/∂α_2 is"""
    problem = Quadratics(5, kappa=10.0).sample(1, generator=seeded())
    first = greedy(problem, problem.theta["theta"][0])
    scale = abs(slope(0.5 * first, problem, 1))
    assert abs(slope(first, problem, 1)) < 1e-12 * scale
    _, after = run(sgd(first), sgd(first).phi, problem, None, 1)
    both = torch.tensor([first, greedy(problem, after.params["theta"][0])], dtype=F64)
    found = meta_gradient(sgd(both), problem, 2)["lr"].abs()
    assert found[1] < 1e-12 * scale
    assert found[0] > 1e-3 * scale


def test_one_rate_per_weight_solves_a_diagonal_quadratic_in_one_step() -> None:
    """α = 1 / h, the preconditioner A⁻¹"""
    rule = sgd({"theta": 1 / torch.tensor([0.1, 1.0, 7.0], dtype=F64)})
    losses, _ = run(rule, rule.phi, bowls([[0.1, 1.0, 7.0]]), None, 1)
    assert losses.item() < 1e-30


KAPPA, LARGEST, DEGREE = 20.0, 3.0, 8


def at_chebyshev(points: Tensor) -> Tensor:
    """[-1, 1] -> [m, L]"""
    m = LARGEST / KAPPA
    return 0.5 * (LARGEST + m) + 0.5 * (LARGEST - m) * points


def chebyshev_rates() -> Tensor:
    """1 / the zeros of the Chebyshev polynomial of degree T on [m, L]"""
    return 1 / at_chebyshev(torch.cos((2 * torch.arange(DEGREE, dtype=F64) + 1) * math.pi / (2 * DEGREE)))


BOUND = 1 / math.cosh(DEGREE * math.acosh((KAPPA + 1) / (KAPPA - 1)))


def shrinkage(rule: UpdateRule, problem: Problem) -> Tensor:
    """θ_T / θ_0 of problems with their minimum at zero"""
    _, after = run(rule, rule.phi, problem, None, DEGREE)
    return after.params["theta"] / problem.theta["theta"]


def test_chebyshev_rates_attain_the_bound_at_its_extrema() -> None:
    """|Π (1 - α_t λ)| = 1 / T_T((κ + 1) / (κ - 1)) at λ_k = the T + 1 extrema, with alternating signs"""
    extrema = at_chebyshev(torch.cos(torch.arange(DEGREE + 1, dtype=F64) * math.pi / DEGREE))
    found = shrinkage(sgd(chebyshev_rates()), bowls([extrema.tolist()]))[0]
    signs = (-1.0) ** torch.arange(DEGREE + 1, dtype=F64)
    assert torch.allclose(found * found[0].sign(), BOUND * signs, rtol=1e-9)
    assert (chebyshev_rates() > 2 / LARGEST).any(), "some steps are longer than 2 / L"


def check_chebyshev() -> None:
    """|θ_T - c| <= |θ_0 - c| / T_T((κ + 1) / (κ - 1)) on quadratics of condition number κ and largest curvature L"""
    problem = Quadratics(12, KAPPA, (LARGEST, LARGEST)).sample(5, generator=seeded())
    rule, centre = sgd(chebyshev_rates()), problem.data(0)[1]
    _, after = run(rule, rule.phi, problem, None, DEGREE)
    assert ((after.params["theta"] - centre).norm(dim=1) <= BOUND * centre.norm(dim=1)).all()


def test_chebyshev_rates_hold_the_bound_on_any_quadratic() -> None:
    check_chebyshev()


@pytest.mark.parametrize("seed", range(5))
def test_no_other_rates_beat_the_bound(seed: int) -> None:
    """max over a fine spectrum of |Π (1 - α_t λ)| > 1 / T_T((κ + 1) / (κ - 1))"""
    rule = sgd(chebyshev_rates() * (1 + 0.05 * torch.randn(DEGREE, generator=seeded(seed), dtype=F64)))
    spectrum = at_chebyshev(torch.linspace(-1, 1, 400, dtype=F64))
    assert shrinkage(rule, bowls([spectrum.tolist()])).abs().max() > BOUND * (1 + 1e-6)
    constant = sgd(2 / (LARGEST + LARGEST / KAPPA))
    assert shrinkage(constant, bowls([spectrum.tolist()])).abs().max() > 2 * BOUND


def test_the_order_of_chebyshev_rates_does_not_change_where_they_end() -> None:
    problem, steps = Quadratics(6).sample(2, generator=seeded()), chebyshev_rates()
    ends = [run(sgd(s), sgd(s).phi, problem, None, DEGREE)[1].params for s in (steps, steps.flip(0))]
    assert_same(ends[0], ends[1], 1e-8)


# Hypergradient descent.


def check_hypergradient() -> None:
    """d f(θ_{t-1} - α g_{t-1}) / dα = -<g_t, g_{t-1}> by central differences, and α_t = α_{t-1} - β times that"""
    theta, data = single(net_problem(1), 0)
    lr, beta, h = 0.3, 0.05, 1e-5
    before = gradient_at(theta, data[0])
    f = lambda alpha: net_loss(moved(theta, before, alpha), data[0]).item()  # noqa: E731
    derivative = (f(lr + h) - f(lr - h)) / (2 * h)
    after = gradient_at(moved(theta, before, lr), data[0])
    assert derivative == pytest.approx(-inner(after, before), rel=1e-8)
    found = adapt(net_loss, theta, data[0], hypergradient(lr, beta, multiplicative=False), 2)
    assert found.state["rate"].item() == pytest.approx(lr - beta * derivative, rel=1e-8)
    second = moved(moved(theta, before, lr), after, lr - beta * derivative)
    assert_same(found.params, second, 1e-8)


def test_additive_hypergradient_descends_on_the_rate() -> None:
    check_hypergradient()


def test_multiplicative_hypergradient_follows_the_cosine() -> None:
    """α_1 = α_0 exp(β cos(g_1, g_0))"""
    theta, data = single(net_problem(1), 0)
    before = gradient_at(theta, data[0])
    after = gradient_at(moved(theta, before, 0.3), data[0])
    cosine = inner(after, before) / math.sqrt(inner(after, after) * inner(before, before))
    found = adapt(net_loss, theta, data[0], hypergradient(0.3, 0.7), 2).state["rate"]
    assert found.item() == pytest.approx(0.3 * math.exp(0.7 * cosine), rel=1e-10)
    assert abs(cosine) > 0.1


def test_every_stacked_task_has_a_rate_of_its_own() -> None:
    """On h = 1 the rate 0.1 is too small, on h = 30 it overshoots: one grows, the other falls."""
    rule = hypergradient(0.1, 0.1)
    _, after = run(rule, rule.phi, bowls([[1.0], [30.0]]), None, 2)
    assert after.state["rate"].tolist() == pytest.approx([0.1 * math.exp(0.1), 0.1 * math.exp(-0.1)], rel=1e-10)


# Schedules.

PRODUCT = torch.tensor([2.0], dtype=F64)


def used_rates(rule: UpdateRule, steps: int) -> Tensor:
    """The rates of a multiple of the gradient, step by step, from its answers to the gradient 2."""
    state, found = rule.init({"w": PRODUCT}), []
    for _ in range(steps):
        updates, state = rule.update(rule.phi, {"w": PRODUCT}, state)
        found.append(-updates["w"] / PRODUCT)
    return torch.cat(found)


def test_the_cosine_decay_is_one_at_first_half_midway_and_zero_from_the_horizon_on() -> None:
    """(1 + cos(π t / T)) / 2"""
    found = used_rates(decayed(sgd(0.3), 4), 7)
    expected = [0.3 * (1 + math.cos(math.pi * t / 4)) / 2 for t in range(4)] + [0.0] * 3
    assert found.tolist() == pytest.approx(expected, abs=1e-16)
    assert found[2].item() == pytest.approx(0.15, rel=1e-15)


@pytest.mark.parametrize("make", [partial(momentum, 0.1, 0.8), partial(adam, 0.1)])
def test_decay_scales_the_update_and_not_the_state(make) -> None:
    """The state of the decayed rule is that of the rule itself, for the same gradients."""
    (one, many), g = (make(), decayed(make(), 5)), seeded()
    a, b = one.init({"w": PRODUCT}), many.init({"w": PRODUCT})
    for t in range(4):
        grads = {"w": torch.randn(1, generator=g, dtype=F64)}
        u, a = one.update(one.phi, grads, a)
        v, b = many.update(many.phi, grads, b)
        assert torch.allclose(v["w"], 0.5 * (1 + math.cos(math.pi * t / 5)) * u["w"], rtol=1e-14)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k]["w"], b[k]["w"]) for k in a if k != "step")


def test_a_schedule_interpolates_the_logarithms_between_its_knots() -> None:
    """Knots at steps 0, 4 and 8 of a horizon of 9; from step 8 on the last rate stays."""
    rule = schedule(0.1, 3, 9)
    rule = rule._replace(phi={"log_lr": torch.tensor([0.1, 0.4, 0.01], dtype=F64).log()})
    found = used_rates(rule, 11)
    assert found[[0, 4, 8, 10]].tolist() == pytest.approx([0.1, 0.4, 0.01, 0.01], rel=1e-12)
    assert found[2].item() == pytest.approx(math.sqrt(0.1 * 0.4), rel=1e-12)
    assert found[5].item() == pytest.approx(0.4**0.75 * 0.01**0.25, rel=1e-12)


def test_rates_of_shows_the_learned_rates() -> None:
    assert rates_of(schedule(0.1, 3, 9).phi).tolist() == pytest.approx([0.1] * 3, rel=1e-12)
    assert rates_of(sgd(0.1).phi).item() == 0.1


# Planted bugs.


def opposite(patch: pytest.MonkeyPatch) -> None:
    """The rate climbs."""
    right = rates.inner
    patch.setattr(rates, "inner", lambda *args: -right(*args))


def stale(patch: pytest.MonkeyPatch) -> None:
    """The first rate is used for ever."""
    patch.setattr(rules, "_rate_at", lambda lr, step: lr if lr.dim() == 0 else lr[0])


def judged_by_the_training_loss(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(MetaLoss, "__call__", lambda self, problem, losses, params, done: losses[-1])


@pytest.mark.parametrize(
    ("plant", "check"),
    [(opposite, check_hypergradient), (stale, check_chebyshev), (judged_by_the_training_loss, check_meta_sgd)],
)
def test_a_planted_bug_turns_its_check_red(plant, check, monkeypatch: pytest.MonkeyPatch) -> None:
    check()
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check()
