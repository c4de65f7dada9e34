"""Evolution strategies, truncated and persistent: z-tests against exact gradients, and what they share draw by draw."""

from collections.abc import Callable

import pytest
import torch
from cases import F64, assert_same, seeded
from torch import Tensor
from torch.utils import _pytree as pytree
from training_cases import RULES, bowls, flat, mean_of, net_problem, one_of, shaken, windows

from metalearn_utils import estimators
from metalearn_utils.estimators import Estimate, MetaLoss, es, pes, run, truncated, truncated_es, unrolled
from metalearn_utils.population import antithetic
from metalearn_utils.rates import schedule
from metalearn_utils.rules import Phi, UpdateRule, momentum, per_parameter, sgd
from metalearn_utils.tasks.problems import Problem

Z = 4.5


def vector(phi: Phi) -> Tensor:
    return torch.cat([v.reshape(-1) for v in pytree.tree_leaves(phi)]).to(F64)


def z_scores(draws: Tensor, expected: Tensor) -> Tensor:
    """(mean - expected) / standard error, for draws [n, ...]"""
    return (draws.mean(0) - expected) / (draws.std(0) / len(draws) ** 0.5)


# Smoothing a quadratic: f after one step with one rate per weight is quadratic in the rates.

SIGMA = 0.3
RATES = torch.tensor([0.2, 0.5, 0.1], dtype=F64)
BOWL = bowls([[0.5, 1.0, 2.0]], start=1.5)
RULE = sgd({"theta": RATES})


def exact() -> tuple[float, Tensor, Tensor]:
    """F(α) = ½ Σ h (x - α h x)², its gradient g = -h² x² (1 - α h), and its Hessian A = diag(h³ x²)."""
    h, x = torch.tensor([0.5, 1.0, 2.0], dtype=F64), 1.5
    value = (0.5 * h * x**2 * (1 - RATES * h) ** 2).sum().item()
    return value, -(h**2) * x**2 * (1 - RATES * h), torch.diag(h**3 * x**2)


def single_pairs(n: int) -> list[Estimate]:
    g, estimator = seeded(3), es(1, 1, SIGMA)
    return [estimator(RULE, RULE.phi, BOWL, None, g) for _ in range(n)]


def check_quadratic(n: int = 700) -> None:
    """E = g; one pair's covariance |g|² I + g gᵀ; mean loss F + ½ σ² tr A: all with |z| < 4.5"""
    value, g, hessian = exact()
    found = single_pairs(n)
    draws = torch.stack([vector(e.phi) for e in found])
    assert z_scores(draws, g).abs().max() < Z
    products = ((draws - g).unsqueeze(2) * (draws - g).unsqueeze(1)).flatten(1)
    covariance = g.square().sum() * torch.eye(3, dtype=F64) + torch.outer(g, g)
    assert z_scores(products, covariance.flatten()).abs().max() < Z
    losses = torch.stack([e.loss for e in found])
    smoothed = value + 0.5 * SIGMA**2 * hessian.diagonal().sum()
    assert z_scores(losses, smoothed).abs() < Z
    assert z_scores(losses, torch.tensor(value)).abs() > 10, "the test could see the smoothing"


def test_es_is_unbiased_on_a_quadratic_with_its_known_covariance_and_smoothed_value() -> None:
    check_quadratic()


def test_many_pairs_average_the_estimates_of_single_ones() -> None:
    """The variance of the mean over 25 pairs is a 25th: z-test of the squared error."""
    _, g, _ = exact()
    estimator, generator = es(1, 25, SIGMA), seeded(4)
    draws = torch.stack([vector(estimator(RULE, RULE.phi, BOWL, None, generator).phi) for _ in range(400)])
    assert z_scores((draws - g) ** 2, (g.square().sum() + g**2) / 25).abs().max() < Z


# Runs in windows.

WINDOW, LENGTH, PAIRS, SMALL = 3, 12, 60, 1e-3
RUNS = bowls([[0.3, 2.0], [0.5, 1.0]])
START = one_of(RUNS.theta)
RUN_RULES: dict[str, Callable[[], UpdateRule]] = {
    "one rate": lambda: sgd(0.15),
    "rate and momentum": lambda: momentum(0.05, 0.7),
    "one rate per weight": lambda: sgd(per_parameter(0.15, START)),
    "schedule": lambda: schedule(0.15, 3, LENGTH),
}


def draws_of(estimator: Callable, rule: UpdateRule, n: int, change: Callable = lambda carry: carry) -> Tensor:
    """n independent runs' estimates, each the mean over its windows: [n, numbers in phi]."""
    generator, found = seeded(7), []
    for _ in range(n):
        changed = lambda r, phi, problem, carry, g: estimator(r, phi, problem, change(carry), g)  # noqa: E731
        found.append(vector(mean_of(list(windows(changed, rule, rule.phi, RUNS, generator)))))
    return torch.stack(found)


def exact_slopes(rule: UpdateRule) -> tuple[Tensor, Tensor]:
    """The full unroll's gradient, and the mean over windows of the truncated ones."""
    full = unrolled(LENGTH)(rule, rule.phi, RUNS, None, seeded()).phi
    return vector(full), vector(mean_of(list(windows(truncated(WINDOW, LENGTH), rule, rule.phi, RUNS))))


def check_full_es(name: str, n: int = 40) -> None:
    rule = RUN_RULES[name]()
    full, cut = exact_slopes(rule)
    draws = draws_of(es(LENGTH, PAIRS, SMALL), rule, n)
    assert z_scores(draws, full).abs().max() < Z
    assert z_scores(draws, cut).abs().max() > 10


def check_pes(name: str, n: int = 90) -> None:
    rule = RUN_RULES[name]()
    full, cut = exact_slopes(rule)
    draws = draws_of(pes(WINDOW, LENGTH, PAIRS, SMALL), rule, n)
    assert z_scores(draws, full).abs().max() < Z
    assert z_scores(draws, cut).abs().max() > 10


def check_truncated_es(name: str, n: int = 60) -> None:
    rule = RUN_RULES[name]()
    full, cut = exact_slopes(rule)
    draws = draws_of(truncated_es(WINDOW, LENGTH, PAIRS, SMALL), rule, n)
    assert z_scores(draws, cut).abs().max() < Z
    assert z_scores(draws, full).abs().max() > 10


@pytest.mark.parametrize("name", RUN_RULES)
def test_es_on_whole_runs_agrees_with_the_full_unroll(name: str) -> None:
    """|z| < 4.5 against the full gradient, z > 10 from the truncated one"""
    check_full_es(name)


@pytest.mark.parametrize("name", RUN_RULES)
def test_pes_in_windows_agrees_with_the_full_unroll(name: str) -> None:
    """|z| < 4.5 against the full gradient, z > 10 from the truncated one"""
    check_pes(name)


@pytest.mark.parametrize("name", RUN_RULES)
def test_truncated_es_agrees_with_truncated_back_propagation(name: str) -> None:
    """|z| < 4.5 against the truncated gradient, z > 10 from the full one"""
    check_truncated_es(name)


# The same perturbations, draw by draw.


def one_by_one(rule: UpdateRule, copies: Phi, problem: Problem, carries: list, steps: int) -> tuple[Tensor, list]:
    """The mean losses of each perturbed rule, run by itself, and where each of them stands."""
    losses, after = [], []
    for i, carry in enumerate(carries):
        one = pytree.tree_map(lambda v: v[i], copies)
        found, stand = run(rule, one, problem, carry, steps)
        losses.append(found.mean())
        after.append(stand)
    return torch.stack(losses), after


def weighed(noise: Phi, losses: Tensor, sigma: float) -> Phi:
    """mean over pairs of e (F(φ + e) - F(φ - e)) / (2 σ²)"""
    plus, minus = losses[: len(losses) // 2], losses[len(losses) // 2 :]
    weight = lambda e: (plus - minus).reshape(-1, *[1] * (e.dim() - 1))  # noqa: E731
    return pytree.tree_map(lambda e: (weight(e) * e).mean(0) / (2 * sigma**2), noise)


CHOSEN: dict[str, Callable[[], UpdateRule]] = {
    "Meta-SGD": lambda: shaken(sgd(per_parameter(0.2, one_of(net_problem().theta))), 0.03),
    "step size": lambda: RULES["step size and momentum"](),
    "LSTM": lambda: RULES["LSTM"](),
    "gated": lambda: RULES["gated"](),
}


def check_es_by_hand(name: str) -> None:
    """The copies of a stacked run, one after the other."""
    rule, problem = CHOSEN[name](), net_problem()
    found = es(4, 3, 0.01)(rule, rule.phi, problem, None, seeded(5))
    copies, noise = antithetic(rule.phi, 3, 0.01, seeded(5))
    losses, _ = one_by_one(rule, copies, problem, [None] * 6, 4)
    assert_same(flat(found.phi), flat(weighed(noise, losses, 0.01)), 1e-8)
    assert found.loss.item() == pytest.approx(losses.mean().item(), rel=1e-12)
    assert found.carry is None


def check_pes_by_hand(name: str) -> None:
    """Two windows of 2 steps: the second weighs each copy's loss by the sum of both perturbations."""
    rule, problem, g = CHOSEN[name](), net_problem(), seeded(5)
    first, second = windows(pes(2, 4, 3, 0.01), rule, rule.phi, problem, seeded(5))
    copies, noise = antithetic(rule.phi, 3, 0.01, g)
    losses, carries = one_by_one(rule, copies, problem, [None] * 6, 2)
    assert_same(flat(first.phi), flat(weighed(noise, losses, 0.01)), 1e-8)
    copies, more = antithetic(rule.phi, 3, 0.01, g)
    losses, _ = one_by_one(rule, copies, problem, carries, 2)
    met = pytree.tree_map(torch.add, noise, more)
    assert_same(flat(first.carry.noise), flat(noise), 1e-15)
    assert_same(flat(second.phi), flat(weighed(met, losses, 0.01)), 1e-8)


def check_truncated_es_by_hand(name: str) -> None:
    """Two windows of 2 steps: every copy of the second starts where the rule itself stands."""
    rule, problem, g = CHOSEN[name](), net_problem(), seeded(5)
    found = list(windows(truncated_es(2, 4, 3, 0.01), rule, rule.phi, problem, seeded(5)))
    carry = None
    for estimate in found:
        copies, noise = antithetic(rule.phi, 3, 0.01, g)
        losses, _ = one_by_one(rule, copies, problem, [carry] * 6, 2)
        assert_same(flat(estimate.phi), flat(weighed(noise, losses, 0.01)), 1e-8)
        _, carry = run(rule, rule.phi, problem, carry, 2)
    assert [e.carry and e.carry.step for e in found] == [2, None]


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.parametrize("check", [check_es_by_hand, check_pes_by_hand, check_truncated_es_by_hand])
def test_estimates_equal_a_loop_over_the_copies(check: Callable[[str], None], name: str) -> None:
    check(name)


def check_first_window(name: str) -> None:
    """Before any window has passed, the sum of perturbations is the perturbation."""
    rule, problem = CHOSEN[name](), net_problem()
    persistent = pes(3, 12, 4, 0.01)(rule, rule.phi, problem, None, seeded(9))
    whole = es(3, 4, 0.01)(rule, rule.phi, problem, None, seeded(9))
    assert all(torch.equal(a, b) for a, b in zip(pytree.tree_leaves(persistent.phi), pytree.tree_leaves(whole.phi)))
    assert torch.equal(persistent.loss, whole.loss)
    assert persistent.carry.step == 3
    assert whole.carry is None


@pytest.mark.parametrize("name", CHOSEN)
def test_pes_on_its_first_window_is_es_of_that_horizon(name: str) -> None:
    check_first_window(name)


@pytest.mark.parametrize("make", [pes, truncated_es])
def test_one_window_as_long_as_the_run_is_es(make: Callable) -> None:
    rule, problem = CHOSEN["LSTM"](), net_problem()
    found = make(4, 4, 3, 0.01)(rule, rule.phi, problem, None, seeded(9))
    whole = es(4, 3, 0.01)(rule, rule.phi, problem, None, seeded(9))
    assert found.carry is None
    assert_same(flat(found.phi), flat(whole.phi), 1e-12)


def test_perturbations_come_in_opposite_pairs_of_the_given_size() -> None:
    """φ + e and φ - e; the standard deviation of e within 4.5 standard errors of σ, and every tensor its own draw."""
    phi = {"a": torch.tensor([1.0, -2.0], dtype=F64), "b": torch.tensor(3.0, dtype=F64)}
    copies, noise = antithetic(phi, 2000, 0.3, seeded())
    for k, v in phi.items():
        assert torch.allclose(copies[k][:2000] + copies[k][2000:], 2 * v.expand(2000, *v.shape), rtol=1e-12)
        assert torch.allclose(copies[k][:2000] - v, noise[k], atol=1e-12)
    draws = torch.cat([noise["a"], noise["b"].unsqueeze(1)], 1) / 0.3
    products = (draws.unsqueeze(2) * draws.unsqueeze(1)).flatten(1)
    assert z_scores(products, torch.eye(3, dtype=F64).flatten()).abs().max() < Z


@pytest.mark.parametrize("meta_loss", [MetaLoss(score="validation loss"), MetaLoss(final=True)])
def test_runs_judged_at_their_end_give_pes_nothing_before_it(meta_loss: MetaLoss) -> None:
    rule = sgd(0.2)
    before, last = windows(pes(2, 4, 1, 0.01, meta_loss), rule, rule.phi, net_problem(1), seeded())
    assert before.loss.item() == 0
    assert before.phi["lr"].item() == 0
    assert last.phi["lr"].item() != 0


def test_nothing_is_stored_for_a_backward_pass() -> None:
    """Even where phi asks for gradients, estimates and carries have none."""
    rule = CHOSEN["LSTM"]()
    phi = pytree.tree_map(lambda v: v.clone().requires_grad_(), rule.phi)
    for make in (pes, truncated_es):
        found = make(2, 4, 2, 0.01)(rule, phi, net_problem(), None, seeded())
        tensors = [v for v in pytree.tree_leaves((found.carry, found.phi)) if isinstance(v, Tensor)]
        assert not any(v.requires_grad for v in tensors)


# Planted bugs.


def last_perturbation_only(carry):
    """PES without persistence."""
    return carry and carry._replace(noise=pytree.tree_map(torch.zeros_like, carry.noise))


def sigma_once(patch: pytest.MonkeyPatch) -> None:
    right = estimators._weigh
    patch.setattr(estimators, "_weigh", lambda noise, losses, sigma: right(noise, losses, sigma**0.5))


def one_sided(patch: pytest.MonkeyPatch) -> None:
    """F(φ + e) alone: the same mean, but another covariance."""
    right = estimators._weigh

    def weigh(noise, losses, sigma):
        plus, _ = losses.chunk(2)
        return right(noise, torch.cat([2 * plus, torch.zeros_like(plus)]), sigma)

    patch.setattr(estimators, "_weigh", weigh)


def interleaved(patch: pytest.MonkeyPatch) -> None:
    """The copies of a task side by side instead of the tasks of a copy."""
    right = estimators.repeat

    def repeat(problem: Problem, n: int) -> Problem:
        many = right(problem, n)
        mix = lambda tree: pytree.tree_map(lambda v: v.repeat_interleave(n, 0), tree)  # noqa: E731
        return Problem(mix(problem.theta), many.loss, lambda t: mix(problem.data(t)), mix(problem.facts))

    patch.setattr(estimators, "repeat", repeat)


def one_draw_for_all(patch: pytest.MonkeyPatch) -> None:
    """Every window meets the same perturbations again."""
    patch.setattr(estimators, "antithetic", lambda phi, pairs, sigma, g: antithetic(phi, pairs, sigma, seeded(5)))


def perturbed_carry(patch: pytest.MonkeyPatch) -> None:
    """Truncated ES whose windows start where the first perturbed copy stands."""
    right = estimators._copied

    def copied(carry, n):
        moved = pytree.tree_map(lambda v: v + 0.01 if isinstance(v, Tensor) else v, carry.params)
        return right(carry._replace(params=moved), n)

    patch.setattr(estimators, "_copied", copied)


BUGS: dict[str, tuple[Callable, Callable[[], None]]] = {
    "sigma instead of its square": (sigma_once, check_quadratic),
    "one-sided differences": (one_sided, check_quadratic),
    "copies and tasks exchanged": (interleaved, lambda: check_es_by_hand("step size")),
    "the same draw in every window": (one_draw_for_all, lambda: check_pes_by_hand("LSTM")),
    "truncated ES from another start": (perturbed_carry, lambda: check_truncated_es_by_hand("LSTM")),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_turns_its_check_red(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, check = BUGS[bug]
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check()


def test_pes_that_forgets_earlier_perturbations_is_truncated() -> None:
    """A planted bug: weighed by the last perturbation alone, the mean is the truncated gradient."""
    rule = RUN_RULES["one rate"]()
    full, cut = exact_slopes(rule)
    draws = draws_of(pes(WINDOW, LENGTH, PAIRS, SMALL), rule, 60, last_perturbation_only)
    assert z_scores(draws, full).abs().max() > 10
    assert z_scores(draws, cut).abs().max() < Z
