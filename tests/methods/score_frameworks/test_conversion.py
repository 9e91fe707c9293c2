"""Noise levels, timesteps and outputs, from one framework to another."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler

from diffusers_ext import geometric_sigmas, ncsn_as_denoiser, score_from_output, sigma_of_timestep, timestep_of_sigma

DATA = 0.25  # variance of the data, N(0, 0.25)
BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
ALPHAS = (1 - BETAS).cumprod(0)  # linear betas in double precision; the stock schedulers' are in single


def eps_model(x, t):
    """The exact noise of Gaussian data by a network that knows its timestep alone."""
    sigma = sigma_of_timestep(ALPHAS, t).view(-1, *[1] * (x.ndim - 1))
    return sigma * x * (1 + sigma**2).sqrt() / (DATA + sigma**2)


def test_levels_of_timesteps():
    found = sigma_of_timestep(ALPHAS, torch.tensor([0, 100, 999]))
    assert found.tolist() == pytest.approx([0.0100005, 0.3422597, 157.40728], rel=3e-6)
    between = sigma_of_timestep(ALPHAS, 100.25)
    neighbours = sigma_of_timestep(ALPHAS, [100, 101])
    assert between.item() == pytest.approx((neighbours[0] ** 0.75 * neighbours[1] ** 0.25).item(), rel=1e-12)


def test_timesteps_of_levels():
    found = timestep_of_sigma(ALPHAS, torch.tensor([[0.05, 1.0, 50.0]]))
    assert found.shape == (1, 3)
    assert found[0].tolist() == pytest.approx([10.94670, 258.09302, 878.21447], abs=6e-6)
    assert timestep_of_sigma(DDPMScheduler().alphas_cumprod, 0.05).item() == pytest.approx(10.94648, abs=6e-6)
    assert timestep_of_sigma(ALPHAS, [1e-5, 500.0]).tolist() == [0, 999]  # clamped
    t = torch.linspace(0, 999, 77, dtype=torch.float64)
    torch.testing.assert_close(timestep_of_sigma(ALPHAS, sigma_of_timestep(ALPHAS, t)), t, atol=1e-9, rtol=0)


def test_timesteps_are_euler_s():
    euler = EulerAncestralDiscreteScheduler()
    euler.set_timesteps(7)
    found = timestep_of_sigma(euler.alphas_cumprod, euler.sigmas[:-1])
    torch.testing.assert_close(found, euler.timesteps.double(), atol=2e-3, rtol=0)


def test_scores_of_every_output():
    y, sigma = torch.randn(3, 2, 4, dtype=torch.float64), torch.tensor([0.02, 1.0, 40.0], dtype=torch.float64)
    level = sigma.view(-1, 1, 1)
    score = -y / (DATA + level**2)
    noise, x0 = -level * score, y + level**2 * score
    a = (1 + level**2).rsqrt()
    outputs = {
        "epsilon": noise,
        "sample": x0,
        "v_prediction": a * noise - a * level * x0,
        "flow_prediction": noise - x0,
    }
    for kind, output in outputs.items():
        torch.testing.assert_close(score_from_output(output, y, sigma, kind), score, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(score_from_output(noise[:1], y[:1], 0.02, "epsilon"), score[:1])


@pytest.mark.parametrize("scaled", [True, False])
def test_an_ncsn_as_a_denoiser(scaled):
    """At its own levels it sees the same noise as a DDPM-trained network does at equal sigma."""
    sigmas = geometric_sigmas(50.0, 0.02, 30)
    seen = []

    def network(y, label):
        sigma = sigmas[label].view(-1, 1, 1)
        seen.append(label)
        score = -y / (DATA + sigma**2)
        return score if scaled else sigma * score

    denoiser = ncsn_as_denoiser(network, sigmas, scaled)
    x = torch.randn(3, 1, 5, dtype=torch.float64)
    t = torch.tensor([0, 12, 29])
    sigma = sigma_of_timestep(denoiser.alphas_cumprod, t)
    torch.testing.assert_close(sigma, sigmas.flip(0)[t], atol=0, rtol=1e-11)
    expected = eps_model(x, timestep_of_sigma(ALPHAS, sigma))
    assert (denoiser(x, t) - expected).abs().max() < 1e-10
    # Between levels: the nearest, whose sigma multiplies the score.
    y = x * (1 + sigma_of_timestep(denoiser.alphas_cumprod, 12.4) ** 2).sqrt()
    level = sigmas[17]
    assert (denoiser(x, 12.4) - level * y / (DATA + level**2)).abs().max() < 1e-10
    assert seen[-1].tolist() == [17, 17, 17]


def test_an_ncsn_samples_by_ddim():
    sigmas = geometric_sigmas(50.0, 0.01, 200)
    denoiser = ncsn_as_denoiser(lambda y, label: -y / (DATA + sigmas[label].view(-1, 1) ** 2), sigmas)
    scheduler = DDIMScheduler(200, trained_betas=denoiser.betas, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(200)
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    start = x
    for t in scheduler.timesteps:
        x = scheduler.step(denoiser(x, t), t, x).prev_sample
    torch.testing.assert_close(x, start * DATA**0.5, atol=0.005, rtol=0.01)  # a linear map onto N(0, 0.25)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sigma_of_timestep(ALPHAS, 999.5), r"`t` must lie in 0\.\.999, got 999.5"),
        (lambda: sigma_of_timestep(ALPHAS, float("nan")), "`t` must lie in"),
        (lambda: timestep_of_sigma(ALPHAS, [1.0, 0.0]), "`sigma` must be above 0, got 0"),
        (
            lambda: sigma_of_timestep(torch.tensor([0.5, 0.0]), 1),
            "`alphas_cumprod` .* not one of zero terminal",
        ),
        (lambda: score_from_output(torch.ones(1), torch.ones(1), 1.0, "x"), "`prediction_type` must be one of"),
        (lambda: score_from_output(torch.ones(1), torch.ones(1), 0.0, "sample"), "`sigma` must be above 0"),
        (lambda: ncsn_as_denoiser(len, [0.1, 1.0]), "`sigmas` must be two falling numbers above 0"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
