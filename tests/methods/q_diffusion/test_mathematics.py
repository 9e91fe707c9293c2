"""Grids, packing and learned rounding against closed forms and a computation one number at a time."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diffusers_ext import fake_quantize, pack_int4, quantization_grid, unpack_int4
from diffusers_ext.methods.q_diffusion.adaround import (
    hard_integers,
    initial_alpha,
    output_loss,
    rounding_beta,
    rounding_penalty,
    rounding_variable,
    soft_weight,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed))


# ---------------------------------------------------------------- grids


@pytest.mark.parametrize("method", ["max", "mse"])
def test_values_of_a_grid_return_exactly(method):
    integers = torch.arange(16.0)
    x = (integers - 5) * 0.25
    step, zero = quantization_grid(x, 4, method)
    assert (step.item(), zero.item()) == (0.25, 5.0)
    torch.testing.assert_close(fake_quantize(x, step, zero, 4), x, atol=0, rtol=0)


def test_the_error_is_at_most_half_a_step_and_vanishes_with_bits():
    x = normal(6, 50)
    for bits in (2, 4, 8):
        step, zero = quantization_grid(x, bits, per_channel=True)
        error = (fake_quantize(x, step[:, None], zero[:, None], bits) - x).abs()
        assert (error <= step[:, None] / 2 * (1 + 1e-5) + (zero[:, None] - zero[:, None].round()).abs()).all()
    step, zero = quantization_grid(x, 16)
    torch.testing.assert_close(fake_quantize(x, step, zero, 16), x, atol=1e-4, rtol=0)


def by_hand(values, bits, method):
    """The rule one number at a time, with Python's own numbers."""
    levels = 2**bits
    low, high = min(min(values), 0.0), max(max(values), 0.0)

    def rounded(v, d, z):
        return (min(max(round(v / d) + z, 0), levels - 1) - z) * d

    best = (math.inf, None, None)
    for i in range(80 if method == "mse" else 1):
        shrink = 1 - 0.01 * i
        d = (high - low) * shrink / (levels - 1)
        z = round(-low * shrink / d)
        error = sum(abs(v - rounded(v, d, z)) ** 2.4 for v in values) / len(values)
        if error < best[0]:
            best = (error, d, z)
    return best[1:]


@pytest.mark.parametrize("method", ["max", "mse"])
@pytest.mark.parametrize("shift", [-3.0, 0.3, 3.0])  # of one sign too: the range holds 0
def test_step_and_zero_point_are_the_rule_s(method, shift):
    x = normal(3, 40) + shift
    step, zero = quantization_grid(x, 4, method, per_channel=True)
    for row, d, z in zip(x.double().tolist(), step, zero, strict=True):
        wanted = by_hand(row, 4, method)
        assert d.item() == pytest.approx(wanted[0], rel=1e-5)
        assert z.item() == wanted[1]
        assert 0 <= z.item() <= 15


def test_symmetric_grids_and_those_from_0():
    x = torch.tensor([-3.0, 1.0, 2.0])
    step, zero = quantization_grid(x, 4, symmetric=True)
    assert step.item() == pytest.approx(3 / 7)
    assert zero.item() == 8
    torch.testing.assert_close(fake_quantize(x, step, zero, 4)[0], torch.tensor(-3.0))
    far = fake_quantize(torch.tensor([-100.0, 100.0]), step, zero, 4)
    torch.testing.assert_close(far, torch.tensor([-8.0, 7.0]) * 3 / 7)  # clamped to [-n - 1, n]
    step, zero = quantization_grid(torch.tensor([0.1, 0.5]), 8, zero_at_0=True)
    assert (step.item(), zero.item()) == (pytest.approx(0.5 / 255), 0)
    step, _ = quantization_grid(torch.zeros(4), 8)
    assert step.item() == pytest.approx(1e-8)


def test_mse_is_never_worse_than_max():
    x = normal(5, 300) ** 3
    errors = {}
    for method in ("max", "mse"):
        step, zero = quantization_grid(x, 4, method, per_channel=True)
        errors[method] = (fake_quantize(x, step[:, None], zero[:, None], 4) - x).abs().pow(2.4).mean(1)
    assert (errors["mse"] <= errors["max"] * (1 + 1e-5)).all()
    assert (errors["mse"] < errors["max"]).all()


def test_wrong_arguments_of_a_grid():
    for arguments, message in (
        ({"bits": 1}, "`bits` must be an integer in 2..16, got 1"),
        ({"bits": 4, "method": "best"}, "`method` must be one of .*, got 'best'"),
    ):
        with pytest.raises(ValueError, match=message):
            quantization_grid(torch.ones(3), **arguments)
    with pytest.raises(ValueError, match="`x` must hold at least one number"):
        quantization_grid(torch.ones(0), 4)


# ---------------------------------------------------------------- packing


@pytest.mark.parametrize("length", [1, 2, 7, 36])
def test_packing_is_undone(length):
    values = torch.randint(0, 16, (5, length), generator=seeded())
    packed = pack_int4(values)
    assert packed.dtype == torch.uint8
    assert packed.shape == (5, (length + 1) // 2)
    assert torch.equal(unpack_int4(packed, length), values.to(torch.uint8))
    first = packed[:, 0].numpy()
    np.testing.assert_array_equal(first & 15, values[:, 0].numpy())  # the low half first


def test_what_does_not_fit_into_4_bits_is_refused():
    with pytest.raises(ValueError, match=r"`values` must lie in 0\.\.15, got 0\.\.16"):
        pack_int4(torch.tensor([[0, 16]]))


# ---------------------------------------------------------------- learned rounding


def grid_of(weight, bits=4):
    step, zero = quantization_grid(weight, bits, "mse", per_channel=True)
    shape = (-1, *[1] * (weight.ndim - 1))
    return step.view(shape), zero.view(shape)


def test_untrained_rounding_changes_nothing():
    weight = normal(8, 5, 3, 3)
    step, zero = grid_of(weight)
    alpha = initial_alpha(weight, step)
    scaled = weight / step + zero
    inside = (scaled > 0) & (scaled < 15)
    assert 0.9 < inside.float().mean() < 1  # some are clipped
    soft = soft_weight(weight, step, zero, alpha, 4)
    torch.testing.assert_close(soft[inside], weight[inside], atol=1e-6, rtol=1e-6)
    hard = (hard_integers(weight, step, zero, alpha, 4) - zero) * step
    assert torch.equal(hard, fake_quantize(weight, step, zero, 4))


def test_the_variable_is_the_stretched_sigmoid_s():
    alpha = torch.tensor([-20.0, 0.0, 1.0, 20.0])
    wanted = [0.0, 0.5, 1.2 / (1 + math.exp(-1)) - 0.1, 1.0]
    torch.testing.assert_close(rounding_variable(alpha), torch.tensor(wanted))


def test_the_exponent_falls_from_20_to_2():
    assert [rounding_beta(int(share * 1000), 1000) for share in (0.1, 0.2, 0.6, 1.0)] == pytest.approx([20, 20, 11, 2])
    alpha = torch.zeros(7)  # h = 1/2
    assert rounding_penalty(alpha, 199, 1000) == 0
    assert rounding_penalty(alpha, 200, 1000) == 7
    half = torch.logit(torch.tensor((0.75 + 0.1) / 1.2))  # h = 3/4
    assert rounding_penalty(half, 1000, 1000).item() == pytest.approx(1 - 0.5**2)


def test_the_loss_sums_channels_and_averages_the_rest():
    output, target = normal(2, 3, 4, 5), normal(2, 3, 4, 5, seed=1)
    assert output_loss(output, target).item() == pytest.approx(F.mse_loss(output, target).item() * 3, rel=1e-5)
    tokens, wanted = normal(2, 6, 5), normal(2, 6, 5, seed=1)
    assert output_loss(tokens, wanted).item() == pytest.approx(F.mse_loss(tokens, wanted).item() * 5, rel=1e-5)
    power = (tokens - wanted).abs().double().pow(2.4).sum(-1).mean()
    assert output_loss(tokens, wanted, 2.4).item() == pytest.approx(power.item(), rel=1e-5)


def test_learned_rounding_beats_the_nearest_on_correlated_inputs():
    """Four directions mixed into sixteen channels: what one weight rounds wrong, another can make up for."""
    mixed = torch.einsum("bchw,cd->bdhw", normal(128, 4, 8, 8), normal(4, 16, seed=1))
    x = mixed + 0.1 * normal(128, 16, 8, 8, seed=2)
    weight = normal(16, 16, 3, 3, seed=3) / 12
    step, zero = grid_of(weight)
    alpha = initial_alpha(weight, step).requires_grad_()
    wanted = F.conv2d(x, weight, padding=1)
    optimizer = torch.optim.Adam([alpha], lr=1e-2)
    iterations, draw = 400, seeded()
    for count in range(1, iterations + 1):
        rows = torch.randperm(len(x), generator=draw)[:16]
        output = F.conv2d(x[rows], soft_weight(weight, step, zero, alpha, 4), padding=1)
        loss = output_loss(output, wanted[rows]) + 0.01 * rounding_penalty(alpha, count, iterations)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    learned = (hard_integers(weight, step, zero, alpha.detach(), 4) - zero) * step
    fresh = torch.einsum("bchw,cd->bdhw", normal(64, 4, 8, 8, seed=5), normal(4, 16, seed=1))
    fresh = fresh + 0.1 * normal(64, 16, 8, 8, seed=6)
    errors = [
        (F.conv2d(fresh, w - weight, padding=1)).square().mean().item()
        for w in (learned, fake_quantize(weight, step, zero, 4))
    ]
    assert errors[0] <= 0.4 * errors[1]
