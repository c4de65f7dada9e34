"""Every fixed rule against `torch.optim`, step by step; and its derivatives at zero gradient."""

from collections.abc import Callable

import pytest
import torch
from cases import F64, Point, jittered, regression, tanh_net
from torch.func import functional_call

from metalearn_utils.adapt import adapt
from metalearn_utils.parallel import mse
from metalearn_utils.rules import Params, UpdateRule, adam, momentum, per_parameter, rmsprop, sgd

PAIRS: dict[str, tuple[Callable[[], UpdateRule], Callable]] = {
    "sgd": (lambda: sgd(0.05), lambda p: torch.optim.SGD(p, lr=0.05)),
    "momentum": (lambda: momentum(0.05, 0.8), lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.8)),
    "nesterov": (
        lambda: momentum(0.05, 0.8, nesterov=True),
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.8, nesterov=True),
    ),
    "rmsprop": (lambda: rmsprop(0.01, 0.9), lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.9)),
    "rmsprop with its defaults": (rmsprop, torch.optim.RMSprop),
    "adam": (lambda: adam(0.02, 0.8, 0.95), lambda p: torch.optim.Adam(p, lr=0.02, betas=(0.8, 0.95))),
    "adam with its defaults": (adam, torch.optim.Adam),
    "adam with a large eps": (lambda: adam(0.02, eps=0.1), lambda p: torch.optim.Adam(p, lr=0.02, eps=0.1)),
}


def torch_path(make: Callable, theta: Params, loss: Callable, steps: int) -> list[Params]:
    """theta_0, ..., theta_K of the optimizer of PyTorch."""
    leaves = {k: v.clone().requires_grad_() for k, v in theta.items()}
    optimizer, path = make(list(leaves.values())), [dict(theta)]
    for _ in range(steps):
        optimizer.zero_grad()
        loss(leaves, None).backward()
        optimizer.step()
        path.append({k: v.detach().clone() for k, v in leaves.items()})
    return path


@pytest.mark.parametrize("name", PAIRS)
def test_rule_equals_torch_optim_for_50_steps(name: str) -> None:
    """max |θ_t − θ_t'| < 1e-10 after each of 50 steps"""
    ours, theirs = PAIRS[name]
    (model, theta), (x, y) = tanh_net(), [t[0] for t in regression(1, 8, 1).support]

    def loss(params: Params, _) -> torch.Tensor:
        return mse(functional_call(model, params, (x,)), y)

    path = adapt(loss, theta, None, ours(), 50).path
    for step, (a, b) in enumerate(zip(path, torch_path(theirs, theta, loss, 50))):
        assert max((a[k] - b[k]).abs().max().item() for k in theta) < 1e-10, f"step {step}"
    assert max((path[50][k] - theta[k]).abs().max().item() for k in theta) > 0.01


def test_adams_epsilon_stands_outside_the_root() -> None:
    """First step: u = −lr · g / (|g| + eps), not −lr · g / sqrt(g² + eps)."""
    g, lr, eps = torch.tensor([0.3, -2.0], dtype=F64), 0.1, 0.5
    rule = adam(lr, eps=eps)
    updates, _ = rule.update(rule.phi, {"w": g}, rule.init({"w": g}))
    assert torch.allclose(updates["w"], -lr * g / (g.abs() + eps), rtol=1e-12)


def test_adam_corrects_its_bias() -> None:
    """With g constant, m / (1 − β₁ᵗ) = g and v / (1 − β₂ᵗ) = g² at every t: each step is −lr · sign(g)."""
    rule, g = adam(0.1, eps=0.0), {"w": torch.tensor([0.3, -2.0], dtype=F64)}
    state = rule.init(g)
    for _ in range(5):
        updates, state = rule.update(rule.phi, g, state)
        assert torch.allclose(updates["w"], -0.1 * g["w"].sign(), rtol=1e-9)


RULES = {"sgd": sgd, "momentum": momentum, "rmsprop": rmsprop, "adam": adam}


@pytest.mark.parametrize("name", RULES)
def test_rules_are_differentiable_and_finite_at_zero_gradient(name: str) -> None:
    """L = ½ |θ − c|² started at θ = c: g = 0, where the derivative of sqrt(v) would be infinite."""
    rule = RULES[name](0.1)
    theta = {"theta": torch.tensor([1.0, 2.0], dtype=F64, requires_grad=True)}
    phi = {k: v.clone().requires_grad_() for k, v in rule.phi.items()}
    centre = torch.tensor([1.0, -3.0], dtype=F64)
    end = adapt(lambda p, c: 0.5 * ((p["theta"] - c) ** 2).sum(), theta, centre, rule, 4, phi=phi).params["theta"]
    grads = torch.autograd.grad((end**2).sum(), [theta["theta"], *phi.values()], allow_unused=True)
    assert all(g.isfinite().all() for g in grads if g is not None)
    assert grads[0].abs().max() > 0
    assert grads[1].abs() > 0, "the step size has an effect"


@pytest.mark.parametrize("name", RULES)
def test_one_rate_per_weight_scales_each_weights_update(name: str) -> None:
    """u(lr ⊙ s) = s ⊙ u(lr): the rate enters every rule as a factor"""
    model, theta = tanh_net()
    g, scale = jittered(theta, 7), jittered(per_parameter(1.0, theta), 8)
    one, many = RULES[name](0.1), RULES[name]({k: 0.1 * v for k, v in scale.items()})
    u1, _ = one.update(one.phi, g, one.init(theta))
    u2, _ = many.update(many.phi, g, many.init(theta))
    assert all(torch.allclose(u2[k], scale[k] * u1[k], rtol=1e-12) for k in theta)


def test_the_state_is_a_value_and_never_changed_in_place() -> None:
    """The same state gives the same answer twice."""
    rule, theta = adam(0.1), {"theta": Point(2).theta.detach() + 1.0}
    state = rule.init(theta)
    first = rule.update(rule.phi, theta, state)[0]["theta"]
    assert torch.equal(rule.update(rule.phi, theta, state)[0]["theta"], first)
    assert state["step"] == 0
