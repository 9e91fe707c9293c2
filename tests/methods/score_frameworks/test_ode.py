"""Processes, and their probability flow with adaptive steps."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from scipy.integrate import solve_ivp

from diffusers_ext import (
    VESDE,
    VPSDE,
    ScoreSDEScheduler,
    SubVPSDE,
    geometric_sigmas,
    ncsn_as_denoiser,
    solve_probability_flow,
)
from diffusers_ext.methods.score_frameworks.ode import rk45
from tests.methods.score_frameworks.gaussian import GaussianNetwork

SDES = {"vp": VPSDE(), "ve": VESDE(), "subvp": SubVPSDE()}
EXACT = {"ve": 0.50007500, "vp": 0.50000885, "subvp": 0.50001864}
BETAS = ncsn_as_denoiser(len, geometric_sigmas(160.0, 0.001, 1000)).betas  # a schedule that knows small levels


@pytest.mark.parametrize("kind", SDES)
def test_marginals_solve_the_process(kind):
    """da/dt = f a; d(b^2)/dt = 2 f b^2 + g^2; and times of levels."""
    sde, t, h = SDES[kind], torch.linspace(0.05, 0.95, 7, dtype=torch.float64), 1e-5
    rate = (sde.a(t + h) - sde.a(t - h)) / (2 * h)
    torch.testing.assert_close(rate, sde.drift(sde.a(t), t), atol=1e-8, rtol=1e-6)
    rate = (sde.b(t + h).square() - sde.b(t - h).square()) / (2 * h)
    wanted = 2 * sde.drift_rate(t) * sde.b(t).square() + sde.diffusion(t).square()
    torch.testing.assert_close(rate, wanted, atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(sde.time(sde.sigma(t)), t, atol=1e-10, rtol=0)
    torch.testing.assert_close(sde.a_of_sigma(sde.sigma(t)), sde.a(t), atol=1e-10, rtol=1e-10)


def test_times_of_levels():
    sigma = torch.tensor([0.0100005, 0.3422597, 157.40728], dtype=torch.float64)
    assert SDES["vp"].time(sigma).tolist() == pytest.approx([0.0009165, 0.1006075, 1.0033800], abs=6e-8)
    assert SDES["subvp"].time(sigma).tolist() == pytest.approx([0.0270735, 0.1800627, 1.0033820], abs=6e-8)


def test_every_row_is_solved_as_scipy_solves_it_alone():
    def slope(t, x, rows):
        speed = torch.tensor([1.0, 8.0, 40.0], dtype=torch.float64)[rows]
        return torch.stack([x[:, 1], -(speed**2) * x[:, 0] + torch.sin(5 * t)], 1)

    x = torch.tensor([[1.0, 0.0], [0.5, -1.0], [1.0, 2.0]], dtype=torch.float64)
    for start, end in ((0.0, 0.5), (0.5, 0.1)):
        found, calls = rk45(slope, x, start, end, 1e-5, 1e-7)
        for i in range(3):

            def one(t, y, i=i):
                state = torch.from_numpy(y)[None]
                return slope(torch.tensor([t], dtype=torch.float64), state, torch.tensor([i]))[0].numpy()

            exact = solve_ivp(one, (start, end), x[i].numpy(), method="RK45", rtol=1e-5, atol=1e-7)
            assert calls[i] == exact.nfev
            np.testing.assert_allclose(found[i].numpy(), exact.y[:, -1], atol=1e-12)
    assert calls[0] < calls[1] < calls[2]


@pytest.mark.parametrize(("kind", "calls"), [("ve", 104), ("vp", 50), ("subvp", 68)])
def test_the_flow_of_gaussian_data(kind, calls):
    scheduler = ScoreSDEScheduler(trained_betas=BETAS, sde=kind, sigma_max=50.0)
    network, start = GaussianNetwork(scheduler.alphas_cumprod), scheduler.init_noise_sigma
    x = torch.full((1, 1), start, dtype=torch.float64)
    found, taken = solve_probability_flow(network, scheduler, x)
    assert found.item() == pytest.approx(EXACT[kind], abs=5e-5)
    assert network.calls == taken.item() == pytest.approx(calls, rel=0.15)
    # 784 pixels: the tolerance is for their mean square.
    x = start * torch.randn(1, 1, 28, 28, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found, _ = solve_probability_flow(network, scheduler, x)
    assert (found - EXACT[kind] * x / start).abs().max() < 1e-4
    back, _ = solve_probability_flow(network, scheduler, found, "encode")
    assert (back - x).abs().max() < 1e-3 * start


def test_a_sample_does_not_depend_on_its_batch():
    scheduler = DDPMScheduler()
    network = GaussianNetwork(scheduler.alphas_cumprod)
    x = torch.tensor([[1.0, -1.0], [3.0, 0.2], [0.0, 1e-3]], dtype=torch.float64)
    together, calls = solve_probability_flow(network, scheduler, x, sde="ve", rtol=1e-4, atol=1e-3)
    assert len(set(calls.tolist())) > 1
    for i in range(3):
        alone, taken = solve_probability_flow(network, scheduler, x[i : i + 1], sde="ve", rtol=1e-4, atol=1e-3)
        assert taken.item() == calls[i]
        torch.testing.assert_close(alone[0], together[i], atol=1e-13, rtol=1e-13)


def test_any_schedule_and_arguments_by_sample():
    """A flow-matching network that is told each sample's mean; VP goes through its conversion."""
    scheduler = FlowMatchEulerDiscreteScheduler()

    def network(x, timestep, mean):
        s = timestep.view(-1, 1) / 1000
        noise = s * (x - (1 - s) * mean) / ((1 - s) ** 2 * 0.25 + s**2)
        return noise - (x - s * noise) / (1 - s)

    mean = torch.tensor([[-1.0], [2.0]], dtype=torch.float64)
    x = torch.zeros(2, 1, dtype=torch.float64)
    found, _ = solve_probability_flow(network, scheduler, x, sde=VPSDE(), mean=mean)
    a = VPSDE().a(torch.tensor(1.0, dtype=torch.float64)).item()
    wanted = mean * (1 - a / math.sqrt(a**2 * 0.25 + 1 - a**2) * 0.5)
    torch.testing.assert_close(found, wanted, atol=2e-3, rtol=0)  # levels below 0.001 share a timestep


def test_half_precision_stays():
    scheduler = DDPMScheduler()
    x = torch.ones(1, 2, dtype=torch.float16)
    found, _ = solve_probability_flow(GaussianNetwork(scheduler.alphas_cumprod), scheduler, x, rtol=1e-3, atol=1e-3)
    assert found.dtype == torch.float16
    assert found[0].tolist() == pytest.approx([0.5, 0.5], abs=0.02)  # at these tolerances


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"direction": "both"}, "`direction` must be 'generate' or 'encode', got 'both'"),
        ({"rtol": 0.0}, "`rtol` must be a number above 0"),
        ({"sde": "edm"}, "`sde` must be 'vp', 've' or 'subvp'"),
        ({"sample": torch.tensor([[math.nan]])}, "`sample` must be finite floats"),
    ],
)
def test_errors(change, message):
    arguments = {"sample": torch.ones(1, 1), **change}
    with pytest.raises(ValueError, match=message):
        solve_probability_flow(lambda x, t: x, DDPMScheduler(), **arguments)


def test_a_network_that_is_not_finite():
    with pytest.raises(RuntimeError, match="the flow could not be followed"):
        solve_probability_flow(lambda x, t: x * math.nan, DDPMScheduler(), torch.ones(1, 1))
