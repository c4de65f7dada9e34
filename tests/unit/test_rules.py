"""The update rules as functions: what they accept, refuse and promise. Their values: tests/peers, tests/oracles."""

import pytest
import torch
from cases import F64

from metalearn_utils.rules import adam, momentum, per_parameter, per_step, rmsprop, safe_sqrt, sgd

RULES = {"sgd": sgd, "momentum": momentum, "rmsprop": rmsprop, "adam": adam}
GRADS = {"a": torch.tensor([1.0, -2.0], dtype=F64), "b": torch.tensor(3.0, dtype=F64)}


@pytest.mark.parametrize("name", RULES)
def test_phi_names_every_hyperparameter(name: str) -> None:
    """All of them can be meta-learned."""
    expected = {
        "sgd": {"lr"},
        "momentum": {"lr", "beta"},
        "rmsprop": {"lr", "decay", "eps"},
        "adam": {"lr", "beta1", "beta2", "eps"},
    }
    assert set(RULES[name]().phi) == expected[name]


def test_sgd_takes_one_rate_per_step_in_order() -> None:
    """u_k = −α_k g"""
    rule = sgd(torch.tensor([0.1, 0.5], dtype=F64))
    state = rule.init(GRADS)
    for rate in (0.1, 0.5):
        updates, state = rule.update(rule.phi, GRADS, state)
        assert torch.allclose(updates["a"], -rate * GRADS["a"], rtol=1e-15)


def test_one_step_more_than_there_are_rates_is_refused() -> None:
    rule = sgd(per_step(0.1, 2))
    with pytest.raises(ValueError, match="lr holds one rate for each of 2 steps, but step 3 was asked for"):
        rule.update(rule.phi, GRADS, {"step": 2})


def test_a_parameter_without_a_rate_is_named() -> None:
    rule = sgd({"a": torch.tensor(0.1)})
    with pytest.raises(KeyError, match=r"lr has no step size for parameter 'b'; it has \['a'\]"):
        rule.update(rule.phi, GRADS, rule.init(GRADS))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("lr", [-0.1, float("nan"), float("inf"), "0.1", True])
def test_a_bad_step_size_is_refused(name: str, lr) -> None:
    with pytest.raises(ValueError, match="lr must be a finite number >= 0, got"):
        RULES[name](lr)


@pytest.mark.parametrize("build", [lambda: momentum(0.1, beta=-1.0), lambda: adam(0.1, beta1=float("nan"))])
def test_a_bad_decay_is_named(build) -> None:
    with pytest.raises(ValueError, match=r"beta1? must be a finite number >= 0, got"):
        build()


def test_a_matrix_of_rates_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a number, a tensor \[steps\] or a dict of tensors, got shape \(2, 3\)"):
        sgd(torch.ones(2, 3))


def test_per_parameter_follows_the_shapes_of_theta() -> None:
    rates = per_parameter(0.3, GRADS)
    assert {k: v.shape for k, v in rates.items()} == {k: v.shape for k, v in GRADS.items()}
    assert all((v == 0.3).all() for v in rates.values())


def test_safe_sqrt_is_the_root_with_a_finite_derivative() -> None:
    """d sqrt(v)/dv = 1 / (2 sqrt(v)) for v > 0, and 0 at v = 0"""
    v = torch.tensor([0.0, 4.0, 9.0], dtype=F64, requires_grad=True)
    root = safe_sqrt(v)
    (slope,) = torch.autograd.grad(root.sum(), v)
    assert root.tolist() == [0.0, 2.0, 3.0]
    assert slope.tolist() == pytest.approx([0.0, 0.25, 1 / 6], rel=1e-15)
