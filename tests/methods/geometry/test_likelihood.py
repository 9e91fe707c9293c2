"""Log-likelihood and the probability flow of Gaussian data."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from diffusers_ext import gauge_transform, log_likelihood, probability_flow
from diffusers_ext.methods.geometry.flow import flow_jacobian
from tests.methods.geometry.gaussian import PLANE, antisymmetric, gaussian_field, plane_data, seeded, sigma_of

FULL = torch.tensor([2.0, 1.0, 0.5, 0.3, 0.2, 0.1], dtype=torch.float64)
FLAT = torch.tensor([2.0, 1.0, 0.5, 0.0, 0.0, 0.0], dtype=torch.float64)
Q = antisymmetric(6)


def log_normal(x, variances):
    return (-0.5 * (x**2 / variances + (2 * math.pi * variances).log())).sum(1)


# Eigenvalues, gauge, then error in nats and calls: RK45 at tolerances 1e-3, -4, -5; Heun in 50, 100, 200 steps.
KNOWN = [
    (FULL, 0.0, [(0.0002, 26), (0.0001, 26), (0.0001, 38)], [(0.027, 99), (0.0070, 189), (0.0020, 355)]),
    (FULL, 0.5, [(0.0021, 98), (0.0001, 146), (0.0001, 146)], [(0.083, 99), (0.023, 189), (0.006, 355)]),
    (FLAT, 0.0, [(0.0027, 44), (0.0006, 56), (0.0001, 80)], [(0.013, 99), (0.0034, 189), (0.0009, 355)]),
]


@pytest.mark.parametrize("case", KNOWN, ids=["full", "full gauged", "plane"])
def test_errors_and_calls(case):
    eigenvalues, c, rk45, heun = case
    field = gauge_transform(gaussian_field(eigenvalues), Q, c)
    sigma = sigma_of(field, 0)
    x = (eigenvalues + sigma**2).sqrt()[None]
    wanted = log_normal(x, eigenvalues + sigma**2)
    for tol, (error, calls) in zip((1e-3, 1e-4, 1e-5), rk45, strict=True):
        found = log_likelihood(field, x, tol=tol, trace="exact")
        assert abs(found.nats - wanted).item() < error + 1e-4  # rounded figures
        assert abs(found.calls.item() - calls) <= 6
    for steps, (error, calls) in zip((50, 100, 200), heun, strict=True):
        found = log_likelihood(field, x, method="heun", num_steps=steps, trace="exact")
        assert abs(found.nats - wanted).item() < 1.08 * error
        assert abs(found.calls.item() - calls) <= 4
    assert found.standard_error.item() == 0
    assert found.bits_per_dim.item() == pytest.approx(-found.nats.item() / (6 * math.log(2)) + 7, abs=1e-9)


@pytest.mark.parametrize("kappa", [0.3, 1.0])
def test_local_gauge_does_not_move_densities(kappa):
    n = torch.eye(10, dtype=torch.float64)[9]
    field = gaussian_field(PLANE)
    local = gauge_transform(field, antisymmetric(10), lambda y, s: kappa * (y @ n) / s)
    sigma = sigma_of(field, 0)
    x = (PLANE + sigma**2).sqrt()[None]
    found = log_likelihood(local, x, tol=1e-5, trace="exact").nats
    assert abs(found - log_normal(x, PLANE + sigma**2)).item() < 1e-3


def test_probes_and_levels():
    """Hutchinson's traces on a full Jacobian; another sigma_min; bits of other pixels; one image after the other."""
    turn = torch.linalg.qr(torch.randn(6, 6, generator=seeded(1), dtype=torch.float64))[0]
    base = gaussian_field(FULL)

    class Turned(type(base)):
        def eps(self, x, sigma):
            return base.eps(x @ turn, sigma) @ turn.T

    field = Turned(base.model, DDPMScheduler())
    x = plane_data(12, 5, FULL) @ turn.T
    found = log_likelihood(field, x, sigma_min=0.1, tol=1e-3, num_probes=8, generator=seeded())
    wanted = log_normal(x @ turn, FULL + 0.01)
    error = found.standard_error
    assert bool((error > 0.05).all())
    z = (found.nats - wanted) / error  # of 7 degrees of freedom
    assert z.abs().max() < 5
    assert z.square().mean().sqrt() < 1.9
    assert found.sigma_min == 0.1
    generator = seeded()
    alone = [log_likelihood(field, x[i : i + 1], 0.1, tol=1e-3, generator=generator, batch_size=3) for i in range(2)]
    assert torch.allclose(torch.cat([a.nats for a in alone]), found.nats[:2], atol=1e-9)
    halved = log_likelihood(field, x[:1], 0.1, tol=1e-3, generator=seeded(), bin_width=1 / 256)
    assert halved.bits_per_dim.item() == pytest.approx(found.bits_per_dim[0].item() + 1)


def test_samples_have_the_covariance_of_the_data():
    """Heun on 200 log-spaced sigmas; the gauge costs accuracy, as stated, and nothing else."""
    base = gaussian_field(FULL)
    low, high = base.levels.sigma[0].item(), base.levels.sigma[-1].item()
    sigmas = torch.logspace(math.log10(high), math.log10(low), 201, dtype=torch.float64).tolist()
    sigmas[0], sigmas[-1] = high, low
    noise = torch.eye(6, dtype=torch.float64) * (high**2 + 1) ** 0.5
    for c, wanted in ((0.0, 0.0006), (0.5, 0.0020), (1.0, 0.0100), (2.0, 0.041)):
        rows = probability_flow(gauge_transform(base, Q, c), noise, sigmas)  # of unit noises: a linear map
        error = ((rows.T @ rows - torch.diag(FULL)).norm() / FULL.norm()).item()
        assert error == pytest.approx(wanted, rel=0.1)
    # And back: the flow is the same up and down.
    there = probability_flow(base, noise, sigmas)
    assert torch.allclose(probability_flow(base, there, sigmas[::-1]), noise, rtol=1e-2, atol=1e-2 * high)


# Singular values of DDIM's Jacobian by its steps, and the limit.
DDIM = {10: (1.2017, 0.8294, 0.5617), 100: (1.3914, 0.9816, 0.6912), 1000: (1.4119, 0.9981, 0.7055)}


@pytest.mark.parametrize("steps", DDIM)
def test_jacobian_of_ddim(steps):
    field = gaussian_field(PLANE)
    scheduler = DDIMScheduler(timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False)
    scheduler.set_timesteps(steps)
    sigmas = [sigma_of(field, int(t)) for t in scheduler.timesteps] + [0.0]
    noise = torch.randn(1, 10, generator=seeded(), dtype=torch.float64)
    *_, jacobian = flow_jacobian(field, noise * (1 + sigmas[0] ** 2) ** 0.5, sigmas)
    values = torch.linalg.svdvals(jacobian[0])
    assert torch.allclose(values[:3], torch.tensor(DDIM[steps], dtype=torch.float64), atol=6e-5)
    assert values[3:].abs().max() < 1e-12
    if steps == 10:  # the same map as the scheduler's own steps
        x = noise
        for t in scheduler.timesteps:
            eps = field.eps(x, sigma_of(field, int(t)))
            x = scheduler.step(eps, t, x).prev_sample
        assert torch.allclose(x[0], jacobian[0] @ noise[0], atol=1e-6)
    if steps == 1000:
        abar = field.levels.a[-1] ** 2
        limit = (PLANE / (abar * PLANE + 1 - abar)).sqrt()
        assert torch.allclose(values[:3], limit[:3], rtol=3e-3)


def test_jacobian_of_heun_with_a_gauge():
    field = gauge_transform(gaussian_field(PLANE), antisymmetric(10), 1.0)
    low, high = field.levels.sigma[0].item(), field.levels.sigma[-1].item()
    sigmas = torch.logspace(math.log10(high), math.log10(low), 201, dtype=torch.float64).tolist()
    sigmas[0], sigmas[-1] = high, low
    *_, jacobian = flow_jacobian(field, torch.zeros(1, 10, dtype=torch.float64), sigmas, "heun")
    values = torch.linalg.svdvals(jacobian[0])
    assert torch.allclose(values[:3], torch.tensor([1.407, 0.995, 0.703], dtype=torch.float64), atol=1e-3)
    assert values[3:].max() < 0.0101  # the noise that is left


def test_what_overflows_is_minus_infinity():
    field = gaussian_field(FULL)
    x = torch.cat([torch.ones(1, 6), torch.full((1, 6), 1e30)]).double() ** 10
    with pytest.warns(UserWarning, match=r"overflows for images \[1\]: their log-likelihood is -inf"):
        found = log_likelihood(field, x, tol=1e-3, num_probes=2, generator=seeded())
    assert found.nats[1].item() == -math.inf
    assert found.bits_per_dim[1].item() == math.inf
    assert math.isfinite(found.nats[0].item())


def test_bad_input():
    field, x = gaussian_field(FULL), torch.zeros(1, 6, dtype=torch.float64)
    for kwargs, message in [
        ({"method": "euler"}, "`method` must be 'rk45' or 'heun', got 'euler'"),
        ({"trace": "none"}, "`trace` must be 'hutchinson' or 'exact', got 'none'"),
        ({"num_probes": 1}, "`num_probes` must be an integer >= 2, got 1"),
        ({"num_steps": 1}, "`num_steps` must be an integer >= 2, got 1"),
        ({"tol": 0.0}, "`tol` must be a number between 0 and 1, got 0.0"),
        (
            {"sigma_min": 1e-5},
            "`sigma_min` must be one number within the scheduler's levels, 0.01 to 157.4, got 1e-05",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            log_likelihood(field, x, **kwargs)
