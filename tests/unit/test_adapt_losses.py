"""The inner loop's losses can be differentiated, its state goes on, and rules that read the loss are given it."""

import pytest
import torch
from cases import F64, assert_same, largest_difference
from conftest import INNER_LOOP
from torch import Tensor
from training_cases import RULES, net_loss, net_problem, single

from metalearn_utils.adapt import adapt
from metalearn_utils.rules import Params, UpdateRule, adam, momentum, rmsprop, sgd

THETA, DATA = single(net_problem(), 0)
STEPS = 4
MAKERS = {
    "sgd": lambda: sgd(0.2),
    "momentum": lambda: momentum(0.1, 0.8),
    "nesterov": lambda: momentum(0.1, 0.8, nesterov=True),
    "rmsprop": lambda: rmsprop(0.05, 0.9, eps=0.1),
    "adam": lambda: adam(0.05, 0.8, 0.9, eps=0.1),
}
EVERY = MAKERS | RULES


def plain_losses(rule: UpdateRule, theta: Params, phi: dict, first_order: bool) -> Tensor:
    """The losses before each step by a plain loop; gradients are constants in first order."""
    state, losses = rule.init(theta), []
    for t in range(STEPS):
        losses.append(net_loss(theta, DATA[t]))
        at = list(theta.values())
        grads = torch.autograd.grad(losses[-1], at, create_graph=not first_order, retain_graph=True)
        cut = {k: g.detach() if first_order else g for k, g in zip(theta, grads)}
        updates, state = rule.update(phi, cut, state)
        theta = {k: v + updates[k] for k, v in theta.items()}
    return torch.stack(losses)


WEIGHTS = torch.tensor([0.5, -1.0, 2.0, 0.7], dtype=F64)


def leaves(values: Params) -> Params:
    return {k: v.clone().requires_grad_() for k, v in values.items()}


def check_losses(name: str, first_order: bool, recompute: bool = False) -> None:
    """∂ Σ_t w_t f_t(θ_t) / ∂(θ_0, φ), with weights that tell the steps apart"""
    rule, found = MAKERS[name](), []
    for library in (True, False):
        theta, phi = leaves(THETA), leaves(rule.phi)
        if library:
            options = {"first_order": first_order, "recompute": recompute}
            losses = adapt(net_loss, theta, DATA, rule, STEPS, phi=phi, **options).losses
        else:
            losses = plain_losses(rule, theta, phi, first_order)
        slopes = torch.autograd.grad(WEIGHTS @ losses, [*theta.values(), *phi.values()], allow_unused=True)
        found.append((losses.detach(), dict(zip([*theta, *phi], slopes))))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-13)
    assert found[0][1].keys() == found[1][1].keys()
    assert_same(found[0][1], found[1][1], 1e-11)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_losses_of_second_order_are_those_of_a_plain_loop(name: str, recompute: bool) -> None:
    check_losses(name, False, recompute)


@pytest.mark.parametrize("name", MAKERS)
def test_losses_of_first_order_have_constant_gradients(name: str) -> None:
    """The derivative of f_t in θ_t is g_t, and g_t does not change with θ."""
    check_losses(name, True)


def test_the_two_orders_differ() -> None:
    """Both derivatives are of the same losses, so that a mixed-up flag is seen."""
    rule, slopes = sgd(0.2), []
    for first_order in (False, True):
        phi = leaves(rule.phi)
        losses = adapt(net_loss, THETA, DATA, rule, STEPS, phi=phi, first_order=first_order).losses
        slopes.append(dict(zip(phi, torch.autograd.grad(losses.sum(), list(phi.values())))))
    assert largest_difference(slopes[0], slopes[1]) > 1e-3


def test_the_surrogate_keeps_the_value_and_is_only_built_where_phi_is_learned() -> None:
    """value + <g, θ - detach(θ)>: the same number; without a learned phi the losses of first order are constants."""
    rule = sgd(0.2)
    learned = adapt(net_loss, THETA, DATA, rule, STEPS, phi=leaves(rule.phi), first_order=True).losses
    fixed = adapt(net_loss, leaves(THETA), DATA, rule, STEPS, first_order=True).losses
    assert torch.equal(learned.detach(), fixed)
    assert learned.requires_grad
    assert not fixed.requires_grad


def test_stacked_tasks_have_a_surrogate_each() -> None:
    """∂ f_t of task i is made of task i's gradients only: each column's slope is that of the task alone."""
    problem, rule = net_problem(), sgd(0.2)
    data = [problem.data(t) for t in range(STEPS)]
    for task in range(len(problem)):
        slopes = []
        alone, batches = single(problem, task)
        for theta, batch, pick in ((problem.theta, data, lambda v: v[:, task]), (alone, batches, lambda v: v)):
            phi = leaves(rule.phi)
            losses = adapt(net_loss, theta, batch, rule, STEPS, phi=phi, first_order=True).losses
            slopes.append(torch.autograd.grad(WEIGHTS @ pick(losses), phi["lr"])[0].item())
        assert slopes[0] == pytest.approx(slopes[1], rel=1e-12)


def check_continued(name: str) -> None:
    """3 + 3 steps from where the first three ended are 6 steps, to the last bit."""
    rule = EVERY[name]()
    whole = adapt(net_loss, THETA, DATA, rule, 6)
    first = adapt(net_loss, THETA, DATA[:3], rule, 3)
    second = adapt(net_loss, first.params, DATA[3:], rule, 3, state=first.state)
    assert torch.equal(torch.cat([first.losses, second.losses]), whole.losses)
    assert all(torch.equal(second.params[k], v) for k, v in whole.params.items())
    assert second.state["step"] == 6


@pytest.mark.parametrize("name", [name for name in EVERY if name != "rates per layer and step"])
def test_a_state_goes_on_exactly(name: str) -> None:
    check_continued(name)


@pytest.mark.parametrize("name", ["momentum", "adam", "schedule", "step size", "MLP", "LSTM"])
def test_without_the_state_the_second_half_would_differ(name: str) -> None:
    """A planted bug: the state is forgotten."""
    rule = EVERY[name]()
    first = adapt(net_loss, THETA, DATA[:3], rule, 3)
    whole = adapt(net_loss, THETA, DATA, rule, 6).params
    assert largest_difference(adapt(net_loss, first.params, DATA[3:], rule, 3).params, whole) > 1e-6


def test_a_continued_run_is_differentiable_through_the_state() -> None:
    """Momentum handed on with its graph: the derivative in β is that of the whole run."""
    rule, slopes = momentum(0.1, 0.8), []
    for parts in ((6,), (2, 4)):
        phi, params, state, at = leaves(rule.phi), THETA, None, 0
        for steps in parts:
            found = adapt(net_loss, params, DATA[at:], rule, steps, phi=phi, state=state)
            params, state, at = found.params, found.state, at + steps
        slopes.append(torch.autograd.grad(found.losses[-1], phi["beta"])[0].item())
    assert slopes[1] == pytest.approx(slopes[0], rel=1e-12)


def reader(seen: list[Tensor]) -> UpdateRule:
    """Gradient descent at a rate of 0.1 times the loss that notes the losses it is given."""

    def update(phi, grads, state):
        seen.append(state["loss"])
        rate = 0.1 * state["loss"]
        return {k: -rate.reshape(-1, *[1] * (g.dim() - 1)) * g for k, g in grads.items()}, state

    return UpdateRule({"scale": torch.ones((), dtype=F64)}, lambda theta: {"loss": None}, update)


@pytest.mark.parametrize("first_order", [False, True])
def test_the_slot_loss_holds_the_loss_before_each_update(first_order: bool) -> None:
    """f(θ_t) of every task before u_t; with its derivative in second order, as a number in first."""
    problem, seen = net_problem(), []
    rule = reader(seen)
    data = [problem.data(t) for t in range(3)]
    found = adapt(net_loss, leaves(problem.theta), data, rule, 3, phi=leaves(rule.phi), first_order=first_order)
    assert len(seen) == 3
    for t, value in enumerate(seen):
        assert torch.equal(value, found.losses[t])
        assert torch.allclose(value, net_loss(found.path[t], data[t]), rtol=1e-14)
        assert value.requires_grad != first_order


def test_a_rule_without_the_slot_is_not_given_one() -> None:
    assert "loss" not in adapt(net_loss, THETA, DATA, momentum(0.1), 2).state


def test_a_written_out_gradient_is_used_as_it_is() -> None:
    """`gradient` in place of autograd: its loss is recorded, its gradient is followed."""

    def doubled(params: Params, data) -> tuple[Tensor, Params]:
        return torch.tensor(7.0, dtype=F64), {k: torch.ones_like(v) for k, v in params.items()}

    found = adapt(net_loss, THETA, DATA, sgd(0.5), 2, gradient=doubled)
    assert found.losses.tolist() == [7.0, 7.0]
    assert_same(found.params, {k: v - 1.0 for k, v in THETA.items()}, 1e-15)


# Planted bugs.


def cut_losses(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(INNER_LOOP, "with_gradient", lambda value, grads, params: value.detach())


def doubled_surrogate(patch: pytest.MonkeyPatch) -> None:
    """The value keeps its own graph besides the constant gradient's."""
    right = INNER_LOOP.with_gradient
    patch.setattr(INNER_LOOP, "with_gradient", lambda v, g, p: right(v, {k: 2 * x for k, x in g.items()}, p))


def leaking_second_order(patch: pytest.MonkeyPatch) -> None:
    """The gradients of the first order keep their graph."""
    patch.setattr(INNER_LOOP.torch, "set_grad_enabled", lambda mode: torch.enable_grad())


@pytest.mark.parametrize("plant", [cut_losses, doubled_surrogate, leaking_second_order])
def test_a_planted_bug_turns_the_losses_of_first_order_red(plant, monkeypatch: pytest.MonkeyPatch) -> None:
    check_losses("momentum", True)
    plant(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        check_losses("momentum", True)
