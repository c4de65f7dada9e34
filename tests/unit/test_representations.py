"""CKA against its definition, its invariances, and its extremes."""

import pytest
import torch

from metalearn_utils import conv4, params_of
from metalearn_utils.representations import cka, layer_outputs

G = torch.Generator().manual_seed(0)


def test_cka_equals_its_definition_on_features():
    """||A'B||_F^2 / (||A'A||_F ||B'B||_F), computed on features instead of examples."""
    a, b = (torch.randn(20, p, generator=G, dtype=torch.float64) for p in (3, 5))
    a, b = a - a.mean(0), b - b.mean(0)
    expected = (a.T @ b).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
    assert cka(a + 7, b - 2) == pytest.approx(expected.item(), rel=1e-12)


def test_cka_ignores_rotation_and_scale_and_notices_the_rest():
    a = torch.randn(20, 4, generator=G, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=G, dtype=torch.float64)).Q
    assert cka(a, 3 * a @ turn) == pytest.approx(1, abs=1e-12)
    assert cka(a, torch.randn(20, 4, generator=G, dtype=torch.float64)) < 0.5


def test_cka_refuses_different_examples():
    with pytest.raises(ValueError, match="got 3 and 4"):
        cka(torch.zeros(3, 2), torch.zeros(4, 2))


def test_layer_outputs_end_with_the_models_logits():
    model = conv4(5, 4, "stride", generator=G)
    x = torch.rand(6, 1, 28, 28, generator=G)
    params = {k: v + 0.1 for k, v in params_of(model).items()}
    found = layer_outputs(model, params, x)
    assert [f.shape[1] for f in found] == [784, 196, 64, 16, 5]
    assert torch.allclose(found[-1], torch.func.functional_call(model, params, (x,)))
