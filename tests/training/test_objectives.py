"""Targets and weights by hand."""

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler

from diffusers_ext import EDM, EpsX0V, FlowMatching, StepRNG
from diffusers_ext.rng import mix
from diffusers_ext.training.noise import GaussianNoise
from diffusers_ext.training.objectives import snr_weights
from diffusers_ext.training.timesteps import LogitNormalTimesteps, LogNormalLevels, UniformTimesteps


@pytest.mark.parametrize(
    ("prediction_type", "expected"),
    # SNR 0, 0.5, 20 with gamma 5: min(SNR, 5) over SNR, SNR + 1 and 1.
    [
        ("epsilon", [1.0, 1.0, 0.25]),
        ("v_prediction", [0.0, 0.5 / 1.5, 5 / 21]),
        ("sample", [0.0, 0.5, 5.0]),
    ],
)
def test_min_snr_weights_by_hand(prediction_type, expected):
    weights = snr_weights(torch.tensor([0.0, 0.5, 20.0]), prediction_type, "min_snr")
    torch.testing.assert_close(weights, torch.tensor(expected))


def test_snr_weighting_is_the_plain_loss_on_the_noise():
    scheduler = DDIMScheduler()
    x0, noise, t = torch.randn(3, 2, 4), torch.randn(3, 2, 4), torch.tensor([10, 400, 900])
    noisy = scheduler.add_noise(x0, noise, t)
    guess = torch.randn(3, 2, 4)  # of the noise; the same guess as x0 and as v:
    alpha = scheduler.alphas_cumprod[t].view(3, 1, 1)
    guess_x0 = (noisy - (1 - alpha).sqrt() * guess) / alpha.sqrt()
    guess_v = alpha.sqrt() * guess - (1 - alpha).sqrt() * guess_x0
    expected = (guess - noise).pow(2).mean()
    for kind, value in {"epsilon": guess, "sample": guess_x0, "v_prediction": guess_v}.items():
        objective = EpsX0V(DDIMScheduler(prediction_type=kind), weighting="snr")
        _, target = objective.make(x0, noise, t)
        torch.testing.assert_close(objective.loss(value, target, t), expected, rtol=1e-3, atol=0)


def test_min_snr_is_finite_at_zero_terminal_snr():
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True)
    objective = EpsX0V(scheduler, "min_snr")
    t = torch.tensor([999, 0])
    assert objective.weights(t).isfinite().all()
    assert objective.weights(t)[0] == 1


def test_flow_matching_interpolates_and_points_to_noise():
    x0, noise, sigma = torch.randn(2, 3), torch.randn(2, 3), torch.tensor([0.25, 1.0])
    noisy, target = FlowMatching().make(x0, noise, sigma)
    torch.testing.assert_close(noisy[0], 0.75 * x0[0] + 0.25 * noise[0])
    torch.testing.assert_close(noisy - sigma[:, None] * target, x0)
    assert FlowMatching().model_timesteps(sigma).tolist() == [250, 1000]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_edm_is_what_the_scheduler_samples_and_weights_as_the_paper(kind):
    scheduler = EDMEulerScheduler(sigma_data=0.6, prediction_type=kind)
    objective = EDM(0.6, -1 if kind == "v_prediction" else 1)
    x0, noise, sigma = torch.randn(3, 2, 4), torch.randn(3, 2, 4), torch.tensor([0.02, 0.7, 40.0])
    noisy, target = objective.make(x0, noise, sigma)
    level = sigma.view(3, 1, 1)
    x = x0 + level * noise
    torch.testing.assert_close(noisy, scheduler.precondition_inputs(x, level))
    torch.testing.assert_close(objective.model_timesteps(sigma), scheduler.precondition_noise(sigma))
    guess = torch.randn(3, 2, 4)
    denoised = scheduler.precondition_outputs(x, guess, level)
    torch.testing.assert_close(objective.predicted_sample(guess, noisy, sigma), denoised, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(objective.predicted_sample(target, noisy, sigma), x0, atol=1e-4, rtol=1e-4)
    weight = (sigma**2 + 0.36) / (sigma * 0.6) ** 2  # arXiv 2206.00364, table 1
    expected = (weight * (denoised - x0).pow(2).mean((1, 2))).mean()
    torch.testing.assert_close(objective.loss(guess, target, sigma), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(objective.snr(sigma), sigma**-2)
    with pytest.raises(ValueError, match="`sigma_data` must be a number > 0, got 0"):
        EDM(0)


def test_masked_loss_ignores_masked_elements():
    objective = FlowMatching()
    prediction, target = torch.randn(2, 1, 4), torch.randn(2, 1, 4)
    mask = torch.tensor([1.0, 0, 0, 1]).view(1, 1, 4)
    expected = (prediction - target).pow(2)[..., [0, 3]].mean()
    torch.testing.assert_close(objective.loss(prediction, target, torch.zeros(2), mask), expected)


def test_timesteps_have_their_distributions():
    rng = StepRNG(0)
    rng.begin(0)
    t = UniformTimesteps(10)(20000, rng)
    counts = torch.bincount(t, minlength=10) / 20000
    assert (counts - 0.1).abs().max() < 4 * (0.09 / 20000) ** 0.5
    level = UniformTimesteps(None)(20000, rng)
    assert 0 < level.min() < level.max() <= 1
    logits = torch.logit(LogitNormalTimesteps()(20000, rng))
    assert abs(logits.mean()) < 0.03
    assert abs(logits.std() - 1) < 0.03
    logs = LogNormalLevels(-0.5, 2.0)(20000, rng).log()
    assert abs(logs.mean() + 0.5) < 0.06
    assert abs(logs.std() - 2) < 0.06
    with pytest.raises(ValueError, match="`std` must be a number > 0, got 0"):
        LogNormalLevels(std=0)


def test_offset_noise_is_shared_by_a_channels_pixels():
    rng = StepRNG(0)
    rng.begin(0)
    x0 = torch.zeros(2000, 2, 4, 4)
    noise = GaussianNoise(offset=0.5)(x0, rng=rng)
    means = noise.mean((2, 3))  # variance 0.5^2 of the offset + 1/16 of the pixels
    assert means.var().item() == pytest.approx(0.25 + 1 / 16, rel=0.08)
    rng.begin(0)
    assert torch.equal(GaussianNoise()(x0, rng=rng), torch.randn(x0.shape, generator=StepRNG(0).generator("noise")))


def test_sample_scope_does_not_depend_on_the_cut():
    whole, part = StepRNG(3, scope="sample"), StepRNG(3, rank=1, world=2, scope="sample")
    whole.begin(5)
    part.begin(9)
    x = torch.empty(8, 3)
    assert torch.equal(whole.randn_like(x, range(40, 48))[4:], part.randn_like(x[4:], range(44, 48)))
    assert mix(1, 2) != mix(2, 1)
    with pytest.raises(ValueError, match="`scope` must be 'step' or 'sample', got 'batch'"):
        StepRNG(scope="batch")
