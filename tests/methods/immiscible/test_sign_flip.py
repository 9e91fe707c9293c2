"""Sign flip: the norm keeps its law, the mean inner product is sqrt(2 / pi)."""

import pytest
import torch
from scipy import stats

from diffusers_ext import SignFlipNoise, StepRNG


def begun():
    rng = StepRNG(0)
    rng.begin(0)
    return rng


def test_norm_and_mean():
    x = torch.randn(20000, 12)
    noise = SignFlipNoise()(x, rng=begun())
    assert stats.kstest(noise.square().sum(1).numpy(), stats.chi2(12).cdf).pvalue > 1e-3
    inner = (noise * x / x.norm(dim=1, keepdim=True)).sum(1)
    assert inner.mean().item() == pytest.approx((2 / torch.pi) ** 0.5, abs=4 * 0.61 / 20000**0.5)
    assert torch.equal(noise.abs(), begun().randn_like(x).abs())


def test_sign_of_zero_is_plus():
    x = torch.zeros(5, 3)
    assert torch.equal(SignFlipNoise()(x, rng=begun()), begun().randn_like(x))


def test_centre():
    x = torch.full((2000, 3), 2.0)
    noise = SignFlipNoise(center=torch.tensor([3.0, 2.0, 2.0]))(x, rng=begun())
    assert (noise[:, 0] <= 0).all()
    assert noise[:, 1].mean().abs() < 0.1


def test_keeps_dtype_and_has_no_history():
    x = torch.randn(4, 3, dtype=torch.bfloat16, requires_grad=True)
    noise = SignFlipNoise()(x, rng=begun())
    assert noise.dtype == torch.bfloat16
    assert not noise.requires_grad


def test_refuses_what_is_not_finite():
    with pytest.raises(ValueError, match="`x0` must be finite"):
        SignFlipNoise()(torch.full((2, 2), torch.inf), rng=begun())
    with pytest.raises(ValueError, match="`x0` must be a floating-point tensor"):
        SignFlipNoise()(torch.ones(2, 2, dtype=torch.int64), rng=begun())
    with pytest.raises(ValueError, match=r"`labels` must have the shape \(2,\)"):
        SignFlipNoise()(torch.ones(2, 2), rng=begun(), labels=torch.zeros(3))
