"""Gaussian process regression against its definition as a conditional distribution, and its limits."""

import pytest
import torch
from cases import F64, seeded

from metalearn_utils.processes import gaussian_process
from metalearn_utils.tasks.base import Batch

G = seeded()


def some(n: int) -> Batch:
    x = torch.randn(3, n, 2, generator=G, dtype=F64)
    return Batch(x, torch.randn(3, n, 1, generator=G, dtype=F64))


def test_one_point_by_hand() -> None:
    """exp(-d² / (2 l²)) y / (1 + noise) with d = 3, l = 2, y = 5, noise = 1/4"""
    batch = Batch(torch.zeros(1, 1, 1, dtype=F64), torch.full((1, 1, 1), 5.0, dtype=F64))
    found = gaussian_process(batch, torch.full((1, 1, 1), 3.0, dtype=F64), 2.0, 0.25)
    assert found.item() == pytest.approx(torch.exp(torch.tensor(-9 / 8, dtype=F64)).item() * 4, rel=1e-14)


def test_it_is_the_minimum_of_penalised_least_squares() -> None:
    """f = sum_i a_i k(., x_i) minimises |Y - K a|² + noise a'Ka: the gradient vanishes where it predicts from."""
    support, noise, length = some(6), 0.3, 1.5
    gram = torch.exp(-(torch.cdist(support.x, support.x) ** 2) / (2 * length**2))
    fitted = gaussian_process(support, support.x, length, noise)
    a = torch.linalg.solve(gram, fitted).requires_grad_()
    loss = ((support.y - gram @ a) ** 2).sum() + noise * (a.transpose(1, 2) @ gram @ a).sum()
    (grad,) = torch.autograd.grad(loss, a)
    assert grad.abs().max() < 1e-9


def test_tasks_do_not_mix_and_queries_do_not_see_each_other() -> None:
    support, x = some(5), torch.randn(3, 4, 2, generator=G, dtype=F64)
    together = gaussian_process(support, x, 1.0)
    alone = gaussian_process(Batch(support.x[1:2], support.y[1:2]), x[1:2, 2:3], 1.0)
    assert torch.allclose(together[1, 2], alone[0, 0], rtol=1e-9)


@pytest.mark.parametrize("name", ["length", "noise"])
def test_settings_must_be_positive(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be > 0, got 0"):
        gaussian_process(some(3), torch.zeros(3, 1, 2, dtype=F64), **({"length": 1.0} | {name: 0}))
