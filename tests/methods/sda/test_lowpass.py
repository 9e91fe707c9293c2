"""The low-pass filter against known values, interpolation by torch, and autograd."""

import pytest
import torch
import torch.nn.functional as F

from diffusers_ext import LowPass


def test_border_and_centre_of_a_constant():
    filtered = LowPass(64, 4)(torch.ones(1, 1, 64, 64))[0, 0]
    for corner in (filtered[0, 0], filtered[0, -1], filtered[-1, 0], filtered[-1, -1]):
        assert corner.item() == pytest.approx(0.3567, abs=5e-5)
    assert filtered[0, 32].item() == pytest.approx(0.5972, abs=5e-5)
    assert filtered[32, 32].item() == pytest.approx(1.0, abs=1e-6)


def test_interior_equals_torch():
    images = torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    down = F.interpolate(images, scale_factor=0.25, mode="bicubic", antialias=True)
    low_pass = LowPass((64, 48), 4)
    assert torch.allclose(low_pass.reduce(images)[..., 2:-2, 2:-2], down[..., 2:-2, 2:-2], atol=1e-6)


def test_factor_one_changes_nothing():
    images = torch.randn(1, 2, 6, 10)
    assert torch.allclose(LowPass((6, 10), 1)(images), images, atol=1e-6)


def test_linear_and_alike_under_rotation():
    low_pass, x, y = LowPass(16, 4), torch.randn(1, 1, 16, 16), torch.randn(1, 1, 16, 16)
    assert torch.allclose(low_pass(2 * x - y), 2 * low_pass(x) - low_pass(y), atol=1e-5)
    assert torch.allclose(low_pass(x.rot90(1, (2, 3))), low_pass(x).rot90(1, (2, 3)), atol=1e-6)


@pytest.mark.parametrize("norm", ["per_sample", "batch"])
def test_distance_and_gradient_equal_autograd(norm):
    torch.manual_seed(0)
    low_pass = LowPass((8, 12), 4, dtype=torch.float64)
    x = torch.randn(3, 2, 8, 12, dtype=torch.float64)
    y = torch.randn_like(x).requires_grad_()
    difference = low_pass(x) - low_pass(y)
    lengths = difference.flatten(1).norm(dim=1) if norm == "per_sample" else difference.norm().reshape(1)
    expected = torch.autograd.grad(lengths.sum(), y)[0]
    length, gradient = low_pass.distance(low_pass.reduce(x), y.detach(), norm)
    assert torch.allclose(length.flatten(), lengths.detach(), rtol=1e-12)
    assert torch.allclose(gradient, expected, atol=1e-12)


def test_gradient_at_the_minimum_is_zero():
    low_pass, x = LowPass(8, 2), torch.randn(2, 1, 8, 8)
    length, gradient = low_pass.distance(low_pass.reduce(x), x)
    assert length.abs().max() == 0
    assert gradient.abs().max() == 0


@pytest.mark.parametrize("factor", [0, 3, 16, 1.5])
def test_factors_that_do_not_divide_are_refused(factor):
    with pytest.raises(ValueError, match="`factor` must be an integer >= 1 that divides"):
        LowPass(8, factor)
