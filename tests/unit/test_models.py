"""The networks: shapes, reproducible weights, refusals. Exactness of their derivatives: tests/oracles."""

import pytest
import torch
from cases import F64, seeded
from torch.func import functional_call

from metalearn_utils.convnets import Blur, centred, conv4
from metalearn_utils.models import mlp, params_of


def test_mlp_has_the_sinusoid_shape_by_default() -> None:
    """1-40-40-1: (1 + 1) 40 + (40 + 1) 40 + (40 + 1) 1 = 1761 parameters"""
    assert sum(p.numel() for p in mlp().parameters()) == 1761
    assert mlp()(torch.zeros(7, 1)).shape == (7, 1)


@pytest.mark.parametrize("activation", ["relu", "tanh", "softplus"])
def test_stacked_mlp_equals_one_call_per_task(activation: str) -> None:
    model = mlp((2, 5, 3), activation, seeded())
    x = torch.randn(4, 6, 2, dtype=F64)
    stacked = {k: torch.randn(4, *v.shape, dtype=F64) for k, v in model.named_parameters()}
    alone = [functional_call(model, {k: v[i] for k, v in stacked.items()}, (x[i],)) for i in range(4)]
    assert (model.stacked(stacked, x) - torch.stack(alone)).abs().max() < 1e-13


@pytest.mark.parametrize(("pool", "channels", "features"), [("max", 64, 64), ("stride", 32, 128)])
def test_conv4_turns_28_by_28_into_features_and_logits(pool: str, channels: int, features: int) -> None:
    """max: 28 → 14 → 7 → 3 → 1; stride: 28 → 14 → 7 → 4 → 2"""
    x = torch.rand(3, 1, 28, 28)
    assert conv4(5, channels, pool)(x).shape == (3, 5)
    embedding = conv4(None, channels, pool)
    assert embedding(x).shape == (3, features) == (3, embedding.features_out)


def test_shipped_size_is_116_kilobytes() -> None:
    """conv4(5, 32, "stride") in float32"""
    assert 4 * sum(p.numel() for p in conv4(5, 32, "stride").parameters()) == pytest.approx(116e3, rel=0.02)


@pytest.mark.parametrize("make", [mlp, conv4])
def test_a_generator_fixes_the_weights(make) -> None:
    torch.manual_seed(1)
    first = params_of(make(generator=seeded(3)))
    torch.manual_seed(2)
    again, other = (params_of(make(generator=seeded(s))) for s in (3, 4))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_params_of_copies() -> None:
    model = mlp()
    params = params_of(model, F64)
    assert all(v.dtype == F64 and not v.requires_grad for v in params.values())
    params_of(model)["layers.0.weight"].zero_()
    assert (model.layers[0].weight != 0).any()


@pytest.mark.parametrize(("build", "message"), [
    (lambda: mlp((3,)), r"sizes must hold at least two integers >= 1, got \(3,\)"),
    (lambda: mlp((3, 0, 1)), r"sizes must hold at least two integers >= 1, got \(3, 0, 1\)"),
    (lambda: mlp(activation="sine"), r"activation must be one of \['relu', 'softplus', 'tanh'\], got 'sine'"),
    (lambda: conv4(pool="mean"), "pool must be 'max' or 'stride', got 'mean'"),
    (lambda: conv4(smooth=True), "smooth needs pool='stride'"),
    (lambda: conv4(channels=0), "channels and outputs must be integers >= 1, got 0 and 5"),
    (lambda: conv4(outputs=-2), "channels and outputs must be integers >= 1, got 64 and -2"),
])
def test_bad_arguments_are_named(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_centred_puts_the_centre_of_mass_in_the_middle() -> None:
    """A smooth spot moves to the middle wherever it was; a blank image stays blank."""
    rows = torch.arange(28, dtype=F64)
    spots = [torch.outer(*(torch.exp(-((rows - c) ** 2) / 8) for c in at)) for at in ((8, 10), (16.3, 12.5))]
    moved = centred(torch.stack([*spots, torch.zeros(28, 28, dtype=F64)])[:, None])
    for spot in moved[:2, 0]:
        assert (rows @ spot.sum(1) / spot.sum()).item() == pytest.approx(13.5, abs=1e-3)
        assert (rows @ spot.sum(0) / spot.sum()).item() == pytest.approx(13.5, abs=1e-3)
    assert moved[2].abs().max() == 0


def test_blur_is_a_gaussian() -> None:
    """Variance sigma² in each direction, and no mass lost; the spot's own variance is 1/4."""
    x = torch.zeros(1, 1, 28, 28, dtype=F64)
    x[..., 13:15, 13:15] = 1  # the middle lies between pixels 13 and 14
    rows, blurred = torch.arange(28, dtype=F64) - 13.5, Blur(1.5)(x)[0, 0]
    assert blurred.sum().item() == pytest.approx(4, rel=1e-3)
    assert (rows**2 @ blurred.sum(1) / blurred.sum()).item() == pytest.approx(1.5**2 + 0.25, rel=2e-2)


def test_blur_refuses_a_width_of_zero() -> None:
    with pytest.raises(ValueError, match="sigma must be > 0, got 0"):
        Blur(0)
