"""The gradient that `mlp` writes out equals autograd's, and so does its derivative."""

import pytest
import torch
from cases import F64, assert_same, seeded
from torch import Tensor

from metalearn_utils import parallel
from metalearn_utils.models import DERIVATIVES, mlp, params_of
from metalearn_utils.parallel import batched, cross_entropy, mse
from metalearn_utils.rules import Params
from metalearn_utils.tasks.base import Batch

TASKS, EXAMPLES, OUTPUTS = 3, 6, 4


def case(activation: str, loss) -> tuple:
    """Forward, stacked parameters with biases that are not zero, and a batch."""
    model, g = mlp((2, 7, 5, OUTPUTS), activation, seeded(1)), seeded(2)
    params = {k: torch.randn(TASKS, *v.shape, generator=g, dtype=F64) for k, v in params_of(model).items()}
    x = torch.randn(TASKS, EXAMPLES, 2, generator=g, dtype=F64)
    y = torch.randn(TASKS, EXAMPLES, OUTPUTS, generator=g, dtype=F64)
    y = y.argmax(-1) if loss is cross_entropy else y
    return batched(model, loss), {k: v.requires_grad_() for k, v in params.items()}, Batch(x, y)


def by_autograd(forward, params: Params, batch: Batch) -> tuple[Tensor, Params]:
    value = forward.losses(forward.outputs(params, batch.x, None), batch.y)
    grads = torch.autograd.grad(value.sum(), list(params.values()), create_graph=True)
    return value, dict(zip(params, grads))


def along(grads: Params, params: Params) -> Params:
    """Derivative of <gradient, v> for a fixed v: the Hessian times v."""
    g = seeded(3)
    inner = sum((v * torch.randn(v.shape, generator=g, dtype=F64)).sum() for v in grads.values())
    return dict(zip(params, torch.autograd.grad(inner, list(params.values()))))


def check(activation: str, loss) -> None:
    forward, params, batch = case(activation, loss)
    (value, found), (same, expected) = forward.gradient(params, batch), by_autograd(forward, params, batch)
    assert torch.allclose(value, same, rtol=1e-13)
    assert_same(found, expected, 1e-12)
    assert_same(along(found, params), along(expected, params), 1e-11)


@pytest.mark.parametrize("loss", [mse, cross_entropy])
@pytest.mark.parametrize("activation", DERIVATIVES)
def test_backpropagation_written_out_equals_autograd_to_second_order(activation, loss):
    check(activation, loss)


def test_a_planted_factor_turns_the_check_red(monkeypatch):
    right = parallel.SLOPES[mse]
    monkeypatch.setitem(parallel.SLOPES, mse, lambda outputs, y: 0.5 * right(outputs, y))
    with pytest.raises(AssertionError):
        check("tanh", mse)


def test_a_planted_constant_derivative_turns_the_second_order_red():
    forward, params, batch = case("tanh", mse)
    found = {k: v.detach() + 0 * params[k] for k, v in forward.gradient(params, batch)[1].items()}
    with pytest.raises(AssertionError):
        assert_same(along(found, params), along(by_autograd(forward, params, batch)[1], params), 1e-11)


def test_other_losses_and_models_go_through_autograd():
    assert batched(mlp(), lambda outputs, y: ((outputs - y) ** 4).mean()).gradient is None
