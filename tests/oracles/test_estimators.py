"""Back-propagation through runs: truncation in closed form, stop-gradient written out, the aliasing trap, meta-loss."""

from collections.abc import Callable

import pytest
import torch
from cases import F64, assert_same, assert_slopes, largest_difference, seeded
from conftest import INNER_LOOP
from torch import Tensor
from torch.utils import _pytree as pytree
from training_cases import HORIZON, RULES, bowls, flat, mean_of, net_problem, unflat, windows

from metalearn_utils import estimators, unrolls
from metalearn_utils.adapt import adapt
from metalearn_utils.estimators import MetaLoss, begin, run, truncated, unrolled
from metalearn_utils.rules import Params, Phi, UpdateRule, sgd
from metalearn_utils.tasks.problems import Problem, Quadratics

ALPHA, START, STEPS = 0.3, 1.5, 6
CURVATURES = torch.tensor([0.4, 1.0, 4.0], dtype=F64)
T = torch.arange(1, STEPS + 1, dtype=F64)
POWERS = (1 - ALPHA * CURVATURES) ** T[:, None]  # r^t, [steps, tasks]


def rate_slope(window: int, stop_gradient: bool = False, curvatures: Tensor = CURVATURES) -> float:
    """The mean of the windows' estimates of ∂/∂α for f = ½ h x², one task per curvature."""
    rule, problem = sgd(ALPHA), bowls(curvatures[:, None].tolist(), START)
    estimator = truncated(window, STEPS, stop_gradient=stop_gradient)
    return mean_of(list(windows(estimator, rule, rule.phi, problem)))["lr"].item()


def check_truncation(window: int) -> None:
    """∂/∂α of mean over t <= T of ½ h x_t² = -h² x_0² mean of τ (1 - α h)^(2t - 1), τ = ((t - 1) mod W) + 1"""
    tau = (T - 1) % window + 1
    expected = -(CURVATURES**2) * START**2 * tau[:, None] * (1 - ALPHA * CURVATURES) ** (2 * T[:, None] - 1)
    assert rate_slope(window) == pytest.approx(expected.mean().item(), rel=1e-12)


def check_full_unroll() -> None:
    """The same with τ = t, by `unrolled`, which runs in one window"""
    rule, problem = sgd(ALPHA), bowls(CURVATURES[:, None].tolist(), START)
    found = unrolled(STEPS)(rule, rule.phi, problem, None, seeded())
    expected = -(CURVATURES**2) * START**2 * T[:, None] * (1 - ALPHA * CURVATURES) ** (2 * T[:, None] - 1)
    assert found.phi["lr"].item() == pytest.approx(expected.mean().item(), rel=1e-12)
    assert found.loss.item() == pytest.approx((0.5 * CURVATURES * START**2 * POWERS**2).mean().item(), rel=1e-12)
    assert found.carry is None


def check_stopped(window: int) -> None:
    """With constant gradients ∂x_t/∂α = -Σ_s h x_s over the steps s of the window before t"""
    x = START * torch.cat([torch.ones(1, 3, dtype=F64), POWERS])  # x_0, ..., x_T
    slopes = []
    for t in range(1, STEPS + 1):
        first = (t - 1) // window * window
        slopes.append(-CURVATURES * x[t] * CURVATURES * x[first:t].sum(0))
    assert rate_slope(window, stop_gradient=True) == pytest.approx(torch.stack(slopes).mean().item(), rel=1e-12)


def test_the_unrolled_gradient_of_a_rate_in_closed_form() -> None:
    check_full_unroll()


@pytest.mark.parametrize("window", [1, 2, 3, 6])
def test_truncation_replaces_t_by_the_steps_since_the_window_began(window: int) -> None:
    check_truncation(window)


@pytest.mark.parametrize("window", [1, 2, 3, 6])
def test_the_stop_gradient_slope_of_a_rate_in_closed_form(window: int) -> None:
    check_stopped(window)


def test_the_shorter_the_window_the_smaller_the_slope_of_a_rate_that_is_too_small() -> None:
    """α h < 1: all terms are negative, and each of them shrinks with the window."""
    slopes = [rate_slope(window, curvatures=torch.tensor([0.4, 0.7])) for window in (1, 2, 3, 6)]
    assert 0 > slopes[0] > slopes[1] > slopes[2] > slopes[3]
    assert slopes[3] < 2 * slopes[0]


# Stop-gradient unrolls, written out.


def written_out(rule: UpdateRule, problem: Problem, steps: int, gradient: Callable) -> Phi:
    """∂/∂φ of the mean of f(θ_1), ..., f(θ_T) with the gradients as constants: a plain loop."""
    phi = pytree.tree_map(lambda v: v.clone().requires_grad_(), rule.phi)
    theta, state, losses = problem.theta, begin(rule, problem).state, []
    for t in range(steps):
        value, grads = gradient(theta, problem.data(t))
        state = state | ({"loss": value} if "loss" in state else {})
        updates, state = rule.update(phi, grads, state)
        theta = {k: theta[k] + updates[k] for k in theta}
        losses.append(problem.loss(theta, problem.data(t + 1)))
    slopes = torch.autograd.grad(torch.stack(losses).mean(), pytree.tree_leaves(phi))
    return pytree.tree_unflatten(list(slopes), pytree.tree_flatten(phi)[1])


def constant_gradient(problem: Problem) -> Callable:
    """The loss and its gradient from a graph of their own."""

    def gradient(params: Params, data) -> tuple[Tensor, Params]:
        leaves = {k: v.detach().clone().requires_grad_() for k, v in params.items()}
        value = problem.loss(leaves, data)
        return value.detach(), dict(zip(leaves, torch.autograd.grad(value.sum(), list(leaves.values()))))

    return gradient


def check_written_out(name: str) -> None:
    rule, problem = RULES[name](), net_problem()
    found = unrolled(HORIZON, stop_gradient=True)(rule, rule.phi, problem, None, seeded())
    assert_same(flat(found.phi), flat(written_out(rule, problem, HORIZON, constant_gradient(problem))), 1e-11)


@pytest.mark.parametrize("name", RULES)
def test_the_stop_gradient_unroll_equals_a_written_out_loop(name: str) -> None:
    check_written_out(name)


@pytest.mark.parametrize("name", ["step size", "MLP", "LSTM"])
def test_the_stop_gradient_unroll_is_not_the_exact_one(name: str) -> None:
    """The path through the optimizee's second derivatives counts."""
    rule, problem = RULES[name](), net_problem()
    both = [unrolled(HORIZON, stop_gradient=stopped) for stopped in (False, True)]
    exact, cut = (flat(e(rule, rule.phi, problem, None, seeded()).phi) for e in both)
    assert largest_difference(cut, exact) > 1e-6


def public_loop(keep: Callable[[Tensor], Tensor], steps: int = HORIZON) -> tuple[float, float]:
    """The widely copied loop: backward(retain_graph=True) at every step, then the rule reads `.grad`.

    Returns the slope of a learned rate that it finds, and the library's.
    """
    rule, problem = sgd(0.2), net_problem()
    lr = rule.phi["lr"].clone().requires_grad_()
    theta, losses = {k: v.clone().requires_grad_() for k, v in problem.theta.items()}, []
    for t in range(steps):
        problem.loss(theta, problem.data(t)).sum().backward(retain_graph=True)
        theta = {k: v - lr * keep(v.grad) for k, v in theta.items()}
        for v in theta.values():
            v.retain_grad()
        losses.append(problem.loss(theta, problem.data(t + 1)))
    (slope,) = torch.autograd.grad(torch.stack(losses).mean(), lr)
    ours = unrolled(steps, stop_gradient=True)(rule, rule.phi, problem, None, seeded())
    return slope.item(), ours.phi["lr"].item()


def test_a_gradient_that_shares_storage_with_grad_spoils_the_meta_gradient() -> None:
    """`.grad.data` goes on accumulating after the rule has read it; a copy of it is exact, and so is the library."""
    copied, ours = public_loop(lambda grad: grad.detach().clone())
    assert copied == pytest.approx(ours, rel=1e-12)
    aliased, _ = public_loop(lambda grad: grad.data)
    assert abs(aliased - ours) > 0.1 * abs(ours)


def test_torch_notices_the_aliasing_unless_data_hides_it() -> None:
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        public_loop(lambda grad: grad.detach())


# Meta-losses.

KNOWN = Quadratics(4, kappa=5.0).sample(3, generator=seeded())
META_LOSSES: dict[str, tuple[MetaLoss, Callable[[Tensor], Tensor]]] = {
    "mean": (MetaLoss(), lambda f: f.mean()),
    "final": (MetaLoss(final=True), lambda f: f[-1].mean()),
    "log": (MetaLoss(log=True), lambda f: f.log10().mean()),
    "final log": (MetaLoss(final=True, log=True), lambda f: f[-1].log10().mean()),
}


@pytest.mark.parametrize("stop_gradient", [False, True])
@pytest.mark.parametrize("name", META_LOSSES)
def test_meta_losses_are_what_they_say(name: str, stop_gradient: bool) -> None:
    """mean of f(θ_1), ..., f(θ_T), f(θ_T), or the mean over tasks (and steps) of their logarithms to base 10"""
    meta_loss, expected = META_LOSSES[name]
    rule = RULES["step size"]()
    found = unrolled(5, meta_loss, stop_gradient)(rule, rule.phi, KNOWN, None, seeded())
    path = adapt(KNOWN.loss, KNOWN.theta, KNOWN.data(0), rule, 5, state=begin(rule, KNOWN).state).path
    assert found.loss.item() == pytest.approx(
        expected(torch.stack([KNOWN.loss(p, KNOWN.data(0)) for p in path[1:]])).item(), rel=1e-12
    )


@pytest.mark.parametrize("name", META_LOSSES)
def test_slopes_of_every_meta_loss_equal_finite_differences(name: str) -> None:
    meta_loss, expected = META_LOSSES[name]
    rule = RULES["step size"]()
    found = unrolled(5, meta_loss)(rule, rule.phi, KNOWN, None, seeded())
    with torch.no_grad():
        value = lambda at: expected(run(rule, unflat(at, rule.phi), KNOWN, None, 5)[0]).item()  # noqa: E731
        assert_slopes(value, flat(rule.phi), flat(found.phi))


def test_the_log_meta_loss_is_taken_above_the_optimum_and_held_within_its_bounds() -> None:
    """log10 of f - f*, from -16 at the optimum itself to 16"""
    problem = Problem({}, None, None, {"optimum": torch.tensor([2.0], dtype=F64)})
    above = lambda f: MetaLoss(log=True)(problem, f, {}, True)  # noqa: E731
    for value, expected in ((2.001, -3.0), (2.0, -16.0), (1.0, -16.0), (1e30, 16.0)):
        assert above(torch.tensor([[value]], dtype=F64)).item() == pytest.approx(expected, abs=1e-9)


def test_a_score_is_judged_at_the_last_parameters_only() -> None:
    """Windows before the last give no loss and no gradient; the last gives that of the score."""
    rule, problem = sgd(0.2), net_problem()
    before, last = windows(truncated(2, HORIZON, MetaLoss(score="validation loss")), rule, rule.phi, problem)
    assert before.loss.item() == 0
    assert before.phi["lr"].item() == 0
    end = adapt(problem.loss, problem.theta, [problem.data(t) for t in range(HORIZON)], rule, HORIZON).params
    assert last.loss.item() == pytest.approx(problem.scores["validation loss"](end).mean().item(), rel=1e-12)
    assert last.phi["lr"].item() != 0


# What an estimate hands on.


@pytest.mark.parametrize("name", ["momentum", "step size and momentum", "LSTM", "gated"])
def test_windows_hand_on_values_without_a_graph(name: str) -> None:
    """Parameters and state of a carry are constants, phi is left as it was, and the last carry is None."""
    rule, problem = RULES[name](), net_problem()
    found = list(windows(truncated(2, 6), rule, rule.phi, problem))
    assert [e.carry and e.carry.step for e in found] == [2, 4, None]
    tensors = [v for v in pytree.tree_leaves(found[0].carry) if isinstance(v, Tensor)]
    assert not any(v.requires_grad for v in tensors)
    assert not any(v.requires_grad for v in flat(rule.phi).values())
    assert not found[0].loss.requires_grad


def test_windows_together_see_the_losses_of_the_whole_run() -> None:
    """The mean of the windows' losses is the loss of the full unroll."""
    rule, problem = RULES["LSTM"](), net_problem()
    parts = [e.loss.item() for e in windows(truncated(2, 6), rule, rule.phi, problem)]
    whole = unrolled(6)(rule, rule.phi, problem, None, seeded()).loss.item()
    assert sum(parts) / 3 == pytest.approx(whole, rel=1e-12)


def test_a_run_starts_at_one_over_l_where_it_is_known() -> None:
    problem = net_problem()
    assert torch.equal(begin(RULES["LSTM"](), problem).state["lr"], 1 / problem.facts["L"])
    unknown = Problem(problem.theta, problem.loss, problem.data)
    assert begin(RULES["LSTM"](), unknown).state["lr"] == 1.0
    assert "lr" not in begin(sgd(0.1), problem).state


# Planted bugs.


def forced(**flags) -> Callable[[pytest.MonkeyPatch], None]:
    """The inner loop with other flags than it is asked for."""
    return lambda patch: patch.setattr(unrolls, "adapt", lambda *args, **kept: adapt(*args, **(kept | flags)))


def restarted(patch: pytest.MonkeyPatch) -> None:
    """Each window starts where the run began."""
    right = estimators.run

    def fresh(rule, phi, problem, carry, *args):
        return right(rule, phi, problem, begin(rule, problem)._replace(step=carry.step if carry else 0), *args)

    patch.setattr(estimators, "run", fresh)


def losses_before_the_steps(patch: pytest.MonkeyPatch) -> None:
    """f(θ_0), ..., f(θ_{T-1}) instead of f(θ_1), ..., f(θ_T)."""
    right = estimators.run

    def early(rule, phi, problem, carry, steps, *flags):
        start = problem.loss((carry or begin(rule, problem)).params, problem.data(0))
        losses, after = right(rule, phi, problem, carry, steps, *flags)
        return torch.stack([start, *losses[:-1]]), after

    patch.setattr(estimators, "run", early)


def losses_cut_off(patch: pytest.MonkeyPatch) -> None:
    """In first order only the last loss keeps its derivative."""
    patch.setattr(INNER_LOOP, "with_gradient", lambda value, grads, params: value.detach())


def shared_storage(patch: pytest.MonkeyPatch) -> None:
    """The aliasing trap: every gradient is written to the same storage, behind the back of autograd."""
    right, storage = INNER_LOOP._by_autograd, {}

    def aliased(*args):
        value, grads = right(*args)
        for k, g in grads.items():
            storage.setdefault(k, torch.zeros_like(g)).data.add_(g.detach())
        return value, dict(storage)

    patch.setattr(INNER_LOOP, "_by_autograd", aliased)


def overwritten(patch: pytest.MonkeyPatch) -> None:
    """The aliasing trap without accumulation: right when it is read, overwritten when the backward pass comes."""
    right, storage = INNER_LOOP._by_autograd, {}

    def aliased(*args):
        value, grads = right(*args)
        for k, g in grads.items():
            storage.setdefault(k, torch.zeros_like(g)).data.copy_(g.detach())
        return value, dict(storage)

    patch.setattr(INNER_LOOP, "_by_autograd", aliased)


def detached_phi(patch: pytest.MonkeyPatch) -> None:
    """The first step's phi is a constant."""
    right = unrolls.begin

    def begun(rule: UpdateRule, problem: Problem):
        start = right(rule, problem)
        with torch.no_grad():
            after = adapt(problem.loss, start.params, problem.data(0), rule, 1, state=start.state)
        return start._replace(params=after.params, state=after.state)

    patch.setattr(unrolls, "begin", begun)


BUGS: dict[str, tuple[Callable, Callable]] = {
    "stop-gradient instead of exact": (forced(first_order=True), check_full_unroll),
    "exact instead of stop-gradient": (forced(first_order=False), lambda: check_stopped(6)),
    "exact instead of stop-gradient, in networks": (forced(first_order=False), lambda: check_written_out("LSTM")),
    "losses without the constant gradient": (losses_cut_off, lambda: check_stopped(6)),
    "losses without the constant gradient, in networks": (losses_cut_off, lambda: check_written_out("MLP")),
    "windows that start afresh": (restarted, lambda: check_truncation(3)),
    "losses before the steps": (losses_before_the_steps, check_full_unroll),
    "a first step without phi": (detached_phi, check_full_unroll),
    "gradients that share storage": (shared_storage, lambda: check_written_out("step size")),
    "gradients that are overwritten": (overwritten, lambda: check_written_out("step size")),
    "gradients that are overwritten, sgd": (overwritten, lambda: check_written_out("sgd")),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_turns_its_check_red(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, check = BUGS[bug]
    check()
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check()
