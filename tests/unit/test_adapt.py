"""The inner loop: what it returns, what it keeps, what it refuses."""

import pytest
import torch
from cases import F64
from conftest import INNER_LOOP
from torch import Tensor

from metalearn_utils.adapt import adapt
from metalearn_utils.rules import Params, UpdateRule, adam, momentum, rmsprop, sgd

THETA = {"a.w": torch.tensor([1.0, 2.0], dtype=F64), "b.w": torch.tensor([-1.0], dtype=F64)}


def bowl(params: Params, centre: Tensor) -> Tensor:
    """½ |a − c|² + ½ b²: each step of rate α shrinks the distance by 1 − α."""
    return 0.5 * ((params["a.w"] - centre) ** 2).sum() + 0.5 * (params["b.w"] ** 2).sum()


CENTRE = torch.tensor([0.0, 1.0], dtype=F64)


def test_path_losses_and_result_belong_together() -> None:
    """θ_k − c = (1 − α)^k (θ_0 − c); losses[k] is the loss at θ_k, before the step."""
    found = adapt(bowl, THETA, CENTRE, sgd(0.25), 3)
    assert len(found.path) == 4
    assert found.path[-1] is found.params
    for k, params in enumerate(found.path):
        assert torch.allclose(params["a.w"] - CENTRE, 0.75**k * (THETA["a.w"] - CENTRE), rtol=1e-14)
    assert found.losses.tolist() == pytest.approx([bowl(p, CENTRE).item() for p in found.path[:-1]], rel=1e-14)
    assert found.state["step"] == 3


def test_no_steps_give_theta_back() -> None:
    found = adapt(bowl, THETA, CENTRE, sgd(0.25), 0)
    assert found.params == THETA
    assert found.losses.shape == (0,)


def test_theta_is_not_changed() -> None:
    before = {k: v.clone() for k, v in THETA.items()}
    adapt(bowl, THETA, CENTRE, momentum(0.25), 3)
    assert all(torch.equal(before[k], THETA[k]) for k in THETA)


def test_a_list_gives_each_step_its_own_batch() -> None:
    """θ_1 = θ − α (θ − c_1), θ_2 = θ_1 − α (θ_1 − c_2)"""
    first, second = CENTRE, CENTRE + 2
    one = THETA["a.w"] - 0.5 * (THETA["a.w"] - first)
    found = adapt(bowl, THETA, [first, second], sgd(0.5), 2).params["a.w"]
    assert torch.allclose(found, one - 0.5 * (one - second), rtol=1e-15)


@pytest.mark.parametrize("only", [("a.w",), ("a.",)])
def test_only_the_named_parameters_move(only: tuple[str, ...]) -> None:
    found = adapt(bowl, THETA, CENTRE, sgd(0.5), 2, only=only).params
    assert found["b.w"] is THETA["b.w"]
    assert not torch.equal(found["a.w"], THETA["a.w"])


def test_no_graph_is_kept_without_gradients() -> None:
    leaves = {k: v.clone().requires_grad_() for k, v in THETA.items()}
    with torch.no_grad():
        found = adapt(bowl, leaves, CENTRE, sgd(0.5), 2)
    assert not found.params["a.w"].requires_grad
    assert torch.allclose(found.params["a.w"], adapt(bowl, THETA, CENTRE, sgd(0.5), 2).params["a.w"])


def test_first_order_cuts_the_hessian_and_nothing_else() -> None:
    """∂θ_K/∂θ: (1 − α)^K with second order, 1 without; ∂θ_1/∂α = −g either way."""
    for first_order, slope in ((False, 0.75**2), (True, 1.0)):
        leaves = {k: v.clone().requires_grad_() for k, v in THETA.items()}
        end = adapt(bowl, leaves, CENTRE, sgd(0.25), 2, first_order=first_order).params
        (found,) = torch.autograd.grad(end["a.w"].sum(), leaves["a.w"])
        assert found.tolist() == pytest.approx([slope, slope], rel=1e-14)
        lr = torch.tensor(0.25, dtype=F64, requires_grad=True)
        end = adapt(bowl, THETA, CENTRE, sgd(), 1, phi={"lr": lr}, first_order=first_order).params
        (found,) = torch.autograd.grad(end["a.w"].sum(), lr)
        assert found.item() == pytest.approx(-(THETA["a.w"] - CENTRE).sum().item(), rel=1e-14)


@pytest.mark.parametrize("recompute", [False, True])
def test_recomputing_stores_no_graph_of_the_loss(recompute: bool) -> None:
    """Without it, the loss's intermediate results are kept for every step; with it, each step is one node."""
    calls = []

    def counted(params: Params, centre: Tensor) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return bowl(params, centre)

    leaves = {k: v.clone().requires_grad_() for k, v in THETA.items()}
    end = adapt(counted, leaves, CENTRE, sgd(0.25), 3, recompute=recompute).params
    assert len(calls) == 3
    torch.autograd.grad(end["a.w"].sum(), leaves["a.w"])
    assert len(calls) == (6 if recompute else 3)


def test_the_last_steps_keep_their_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 5 steps 3 are recomputed if 2 are kept, and the derivative is that of the unrolled loop, 0.75^5."""
    monkeypatch.setattr(INNER_LOOP, "KEPT", 2)
    calls = []

    def counted(params: Params, centre: Tensor) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return bowl(params, centre)

    leaves = {k: v.clone().requires_grad_() for k, v in THETA.items()}
    end = adapt(counted, leaves, CENTRE, sgd(0.25), 5, recompute=True).params
    (slope,) = torch.autograd.grad(end["a.w"].sum(), leaves["a.w"])
    assert len(calls) == 5 + 3
    assert slope.tolist() == pytest.approx([0.75**5] * 2, rel=1e-14)


def test_recomputing_carries_integers_and_frozen_parameters() -> None:
    """The same derivative with `only`, whose frozen parameters pass through each recomputed step."""
    found = []
    for recompute in (False, True):
        leaves = {k: v.clone().requires_grad_() for k, v in THETA.items()}
        loss = lambda p, c: bowl(p, c) * (1 + p["b.w"].sum() ** 2)  # noqa: E731
        end = adapt(loss, leaves, CENTRE, momentum(0.1), 3, recompute=recompute, only=("a.",)).params
        found.append(torch.autograd.grad((end["a.w"] ** 3).sum() + end["b.w"].sum(), list(leaves.values())))
    assert all(torch.allclose(a, b, rtol=1e-13) for a, b in zip(*found))


@pytest.mark.parametrize("rule", [sgd(0.1), momentum(0.1), rmsprop(0.1), adam(0.1)])
def test_parameters_keep_their_dtype_even_scalars(rule: UpdateRule) -> None:
    """float32 of shape () times a float64 rate would become float64."""
    theta = {"scale": torch.tensor(2.0), "w": torch.ones(3)}
    found = adapt(lambda p, _: (p["scale"] * p["w"]).pow(2).sum(), theta, None, rule, 2).params
    assert {k: (v.dtype, v.shape) for k, v in found.items()} == {k: (torch.float32, v.shape) for k, v in theta.items()}


@pytest.mark.parametrize("steps", [-1, 1.5, "3"])
def test_bad_steps_are_refused(steps) -> None:
    with pytest.raises(ValueError, match=f"steps must be an integer >= 0, got {steps!r}"):
        adapt(bowl, THETA, CENTRE, sgd(), steps)


def test_a_parameter_that_the_loss_does_not_use_is_named() -> None:
    with pytest.raises(ValueError, match="theta holds 'spare', but the loss does not use it: remove it"):
        adapt(bowl, THETA | {"spare": torch.ones(2)}, CENTRE, sgd(), 1)


@pytest.mark.parametrize("name", ["a.v", "a", "c."])
def test_a_misspelt_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"only names '{name}', but the parameters are \['a.w', 'b.w'\]"):
        adapt(bowl, THETA, CENTRE, sgd(), 1, only=(name,))


def test_a_loss_with_two_axes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"loss must return a scalar \(or \[tasks\]\), .* got \(2, 1\)"):
        adapt(lambda p, c: bowl(p, c) * torch.ones(2, 1), THETA, CENTRE, sgd(), 1)


def test_too_few_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="data must hold one batch per step, 3 in all, got 2"):
        adapt(bowl, THETA, [CENTRE, CENTRE], sgd(), 3)
