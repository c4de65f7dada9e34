"""CKA against its definition, its invariances, and its extremes."""

from itertools import permutations

import pytest
import torch

from metalearn_utils import conv4, params_of
from metalearn_utils.representations import cka, hsic, layer_outputs

G = torch.Generator().manual_seed(0)


def test_hsic_equals_its_definition_as_a_mean_over_distinct_examples():
    """Song et al. (2012), section 2.3: the U-statistic over all (i, j, q, r) without repetition."""
    n = 6
    k, m = (x @ x.T for x in torch.randn(2, n, 3, generator=G, dtype=torch.float64))
    terms = [k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q]) for i, j, q, r in permutations(range(n), 4)]
    assert hsic(k, m).item() == pytest.approx((sum(terms) / len(terms)).item(), rel=1e-12)


def test_cka_tends_to_the_biased_form_when_examples_are_many():
    """||A'B||_F^2 / (||A'A||_F ||B'B||_F)"""
    a = torch.randn(4000, 3, generator=G, dtype=torch.float64)
    b = a @ torch.randn(3, 5, generator=G, dtype=torch.float64) + torch.randn(4000, 5, generator=G, dtype=torch.float64)
    a, b = a - a.mean(0), b - b.mean(0)
    expected = (a.T @ b).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
    assert cka(a + 7, b - 2) == pytest.approx(expected.item(), abs=2e-3)


def test_cka_ignores_rotation_and_scale():
    a = torch.randn(20, 4, generator=G, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=G, dtype=torch.float64)).Q
    assert cka(a, 3 * a @ turn) == pytest.approx(1, abs=1e-12)


def test_cka_of_unrelated_wide_representations_is_zero_on_average():
    """The biased form gives more than 0.9 for 25 examples of 1,000 features."""
    found = [cka(*torch.randn(2, 25, 1000, generator=G, dtype=torch.float64)) for _ in range(100)]
    assert abs(sum(found) / len(found)) < 0.02


def test_cka_refuses_different_examples_and_too_few():
    for m, n in ((3, 4), (3, 3)):
        with pytest.raises(ValueError, match=f"got {m} and {n}"):
            cka(torch.zeros(m, 2), torch.zeros(n, 2))


def test_layer_outputs_end_with_the_models_logits():
    model = conv4(5, 4, "stride", generator=G)
    x = torch.rand(6, 1, 28, 28, generator=G)
    params = {k: v + 0.1 for k, v in params_of(model).items()}
    found = layer_outputs(model, params, x)
    assert [f.shape[1] for f in found] == [784, 196, 64, 16, 5]
    assert torch.allclose(found[-1], torch.func.functional_call(model, params, (x,)))
