"""Inversion and sampling against Diffusers' schedulers and the closed forms for normal data."""

import math

import pytest
import torch
from diffusers import DDIMInverseScheduler, DPMSolverMultistepScheduler

from diffusers_ext import ddim_decode, ddim_invert, expected_inverted_std, noise_levels

from .gaussian import REFERENCE, exact, scheduler

KINDS = ["epsilon", "v_prediction", "sample"]


def curved(x, t):
    """A network that is neither linear nor the same at all timesteps."""
    return torch.tanh(x * (1 + t / 1000)) + 0.1 * x.roll(1, -1)


def test_equal_to_the_schedulers_of_diffusers():
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    up, down = DDIMInverseScheduler(**REFERENCE), scheduler(**REFERENCE)
    levels = noise_levels(down, 200, 0.7)
    up.set_timesteps(200)
    down.set_timesteps(200)
    assert torch.equal(up.alphas_cumprod, down.alphas_cumprod)
    state = x
    for t in up.timesteps[:140]:
        state = up.step(curved(state, t), t, state).prev_sample
    found = ddim_invert(curved, x, levels)
    torch.testing.assert_close(found, state, atol=1e-5, rtol=1e-5)
    image = found
    for t in down.timesteps[-140:]:
        image = down.step(curved(image, t), t, image).prev_sample
    torch.testing.assert_close(ddim_decode(curved, found, levels), image, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("steps", "strength", "timestep", "root", "next_root"),
    [(200, 0.7, 696, 0.291497, 0.286211), (250, 0.56, 557, 0.453792, 0.448812)],
)
def test_levels_of_the_reference(steps, strength, timestep, root, next_root):
    levels = noise_levels(scheduler(**REFERENCE), steps, strength)
    assert len(levels.timesteps) == 140
    assert levels.timesteps[0] == 1
    assert levels.timesteps[-1] == timestep
    assert math.sqrt(levels.alphas_cumprod[-1]) == pytest.approx(root, abs=1e-6)
    assert math.sqrt(levels.next_alpha_cumprod) == pytest.approx(next_root, abs=1e-6)
    whole = noise_levels(scheduler(**REFERENCE), steps)
    assert whole.next_alpha_cumprod == whole.alphas_cumprod[-1]
    assert levels.alphas_cumprod[0] == pytest.approx(float(scheduler(**REFERENCE).alphas_cumprod[0]))


def test_levels_come_from_the_schedulers_own_tables():
    positional = scheduler()
    by_position = type(positional)(1000, 0.00085, 0.012, "scaled_linear")
    levels = noise_levels(by_position, 10)
    assert levels.alphas_cumprod[-1] == float(by_position.alphas_cumprod[levels.timesteps[-1]])
    trailing = noise_levels(scheduler(timestep_spacing="trailing"), 7)
    assert trailing.timesteps == (142, 285, 428, 570, 713, 856, 999)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("steps", "factor"), [(10, 1.154255), (50, 1.035554), (250, 1.007319), (1000, 1.001875)])
def test_inversion_of_standard_normal_data(kind, steps, factor):
    """cos phi = sqrt(abar): each step multiplies by cos phi'/cos phi (1 - sin phi sin phi') + sin^2 phi'."""
    sampler = scheduler(prediction_type=kind)
    levels = noise_levels(sampler, steps)
    found = ddim_invert(exact(sampler), torch.ones(1, 1, dtype=torch.float64), levels)
    assert found.item() == pytest.approx(factor, abs=2e-6)
    phi = [math.acos(math.sqrt(a)) for a in levels.alphas_cumprod]
    closed = math.prod(
        math.cos(b) / math.cos(a) * (1 - math.sin(a) * math.sin(b)) + math.sin(b) ** 2
        for a, b in zip(phi, phi[1:], strict=False)
    )
    assert found.item() == pytest.approx(closed, abs=1e-9)
    assert expected_inverted_std(levels) == pytest.approx(closed, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_of_standard_normal_data(kind):
    sampler = scheduler(prediction_type=kind)
    levels = noise_levels(sampler, 50)
    found = ddim_decode(exact(sampler), torch.ones(1, 1, dtype=torch.float64), levels)
    assert found.item() == pytest.approx(0.964079, abs=1e-6)
    phi = [math.acos(math.sqrt(a)) for a in levels.alphas_cumprod]
    assert found.item() == pytest.approx(
        math.prod(math.cos(b - a) for a, b in zip(phi, phi[1:], strict=False)), abs=1e-9
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_other_normal_data(kind, strength):
    """An image k deviations from the mean becomes a state k deviations from its mean."""
    mean, std, k = 0.3, 0.4, 1.7
    sampler = scheduler(prediction_type=kind)
    levels = noise_levels(sampler, 1000, strength)
    image = torch.full((1, 1), mean + k * std, dtype=torch.float64)
    state = ddim_invert(exact(sampler, mean, std), image, levels)
    alpha = levels.alphas_cumprod[-1]
    expected = math.sqrt(alpha) * mean + k * math.sqrt(alpha * std**2 + 1 - alpha)
    assert state.item() == pytest.approx(expected, rel=2e-3)
    deviation = ddim_invert(exact(sampler, 0.0, std), torch.full((1, 1), std, dtype=torch.float64), levels)
    assert expected_inverted_std(levels, std) == pytest.approx(deviation.item(), abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_fixed_points_make_decoding_the_inverse(kind):
    sampler = scheduler(prediction_type=kind)
    levels = noise_levels(sampler, 20)
    x = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = exact(sampler, 0.2, 0.5)
    errors = []
    for iterations in (0, 2, 60):
        state = ddim_invert(model, x, levels, fixed_point_iterations=iterations)
        errors.append((ddim_decode(model, state, levels) - x).abs().max().item())
    assert errors[1] < errors[0] / 3
    assert errors[2] < 1e-8


def test_zero_terminal_snr():
    """The last state of a v-predicting model is noise alone; decoding starts there and inversion arrives there."""
    sampler = scheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    levels = noise_levels(sampler, 500)
    assert levels.alphas_cumprod[-1] == 0
    x = torch.randn(1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = exact(sampler, 0.0, 0.5)
    state = ddim_invert(model, x, levels)
    assert bool(torch.isfinite(state).all())
    torch.testing.assert_close(ddim_decode(model, state, levels), x, rtol=0.05, atol=0)
    with pytest.raises(ValueError, match="`strength` must be below 1 for a scheduler of zero terminal SNR"):
        noise_levels(scheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing"), 10)


def test_callbacks_see_and_change_every_step():
    sampler = scheduler()
    levels, seen = noise_levels(sampler, 10, 0.3), []

    def callback(step, t, state):
        seen.append((step, int(t)))
        return state + 1 if step == 2 else state

    x = torch.zeros(1, 3)
    zero = ddim_invert(lambda x, t: torch.zeros_like(x), x, levels, callback=callback)
    assert seen == [(0, 0), (1, 100), (2, 200)]
    assert torch.equal(zero, torch.ones(1, 3))
    seen.clear()
    ddim_decode(lambda x, t: torch.zeros_like(x), x, levels, callback=callback)
    assert seen == [(0, 200), (1, 100), (2, 0)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scheduler": DPMSolverMultistepScheduler()}, "`scheduler` must be a DDIMScheduler, got DPMSolverMultistep"),
        ({"scheduler": scheduler(timestep_spacing="linspace")}, "timestep_spacing 'leading' or 'trailing', got 'lins"),
        ({"num_inference_steps": 0}, r"`num_inference_steps` must be an integer in 1..1000, got 0"),
        ({"num_inference_steps": 2.5}, r"`num_inference_steps` must be an integer in 1..1000, got 2.5"),
        ({"num_inference_steps": 1001}, r"`num_inference_steps` must be an integer in 1..1000, got 1001"),
        (
            {"scheduler": scheduler(steps_offset=1), "num_inference_steps": 1000},
            "room for the scheduler's steps_of",
        ),
        ({"strength": 0.0}, r"`strength` must be a number in \(0, 1\], got 0.0"),
        ({"strength": 1.2}, r"`strength` must be a number in \(0, 1\], got 1.2"),
        ({"strength": 0.01}, "`strength` must give at least one of 10 steps, got 0.01"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        noise_levels(**{"scheduler": scheduler(), "num_inference_steps": 10, "strength": 0.7, **change})


def test_refused_iterations():
    with pytest.raises(ValueError, match="`fixed_point_iterations` must be an integer >= 0, got -1"):
        ddim_invert(curved, torch.zeros(1, 2), noise_levels(scheduler(), 10), fixed_point_iterations=-1)
