"""What schedules leave: known constants, and spectra with a closed form."""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    KarrasVeScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)

from diffusers_ext import signal_leak, terminal_snr

from .gaussian import STABLE_DIFFUSION


@pytest.mark.parametrize(
    ("scheduler", "alpha"),
    [
        (DDIMScheduler(**STABLE_DIFFUSION), 4.660095e-3),
        (EulerDiscreteScheduler(**STABLE_DIFFUSION), 4.660095e-3),
        (DDPMScheduler(), 4.035830e-5),
        (DDPMScheduler(beta_schedule="squaredcos_cap_v2"), 2.428735e-9),
        (DDIMScheduler(**STABLE_DIFFUSION, rescale_betas_zero_snr=True), 0.0),
        (DDPMScheduler(**STABLE_DIFFUSION, rescale_betas_zero_snr=True), 0.0),
        (LCMScheduler(**STABLE_DIFFUSION, rescale_betas_zero_snr=True), 0.0),
        (EulerDiscreteScheduler(**STABLE_DIFFUSION, rescale_betas_zero_snr=True), 2**-24),
        (DPMSolverMultistepScheduler(**STABLE_DIFFUSION, rescale_betas_zero_snr=True), 2**-24),
        (UniPCMultistepScheduler(**STABLE_DIFFUSION, rescale_betas_zero_snr=True), 2**-24),
    ],
)
def test_constants_of_known_schedules(scheduler, alpha):
    assert terminal_snr(scheduler) == pytest.approx(alpha / (1 - alpha), rel=2e-6, abs=1e-15)
    config = {**scheduler.config, "_class_name": type(scheduler).__name__}
    assert terminal_snr(config) == terminal_snr(scheduler)


def test_the_snr_of_stable_diffusion_and_of_flow_matching():
    assert terminal_snr(DDIMScheduler(**STABLE_DIFFUSION)) == pytest.approx(4.681913e-3, rel=1e-6)
    assert terminal_snr(FlowMatchEulerDiscreteScheduler()) == 0


def test_a_wave_leaks_at_its_frequency():
    x = torch.arange(16) / 16
    images = (math.sqrt(2) * torch.cos(2 * math.pi * 3 * x)).expand(4, 2, 16, 16)
    leak = signal_leak(DDIMScheduler(**STABLE_DIFFUSION), images)
    strongest = leak.snr_by_frequency.argmax()
    assert leak.frequencies[strongest].item() == pytest.approx(3 / 16)
    assert leak.brightness_snr == pytest.approx(0, abs=1e-9)
    # All of its power, 256 times its variance of 1, lies in two of the coefficients of that ring.
    ring = torch.hypot(torch.fft.fftfreq(16)[:, None], torch.fft.fftfreq(16)) * 16
    members = (ring.round() == 3).sum().item()
    assert leak.snr_by_frequency[strongest].item() == pytest.approx(leak.snr * 256 / members, rel=1e-5)


def test_white_noise_leaks_alike_everywhere():
    images = torch.randn(4000, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    leak = signal_leak(DDIMScheduler(**STABLE_DIFFUSION), images)
    torch.testing.assert_close(
        leak.snr_by_frequency / leak.snr, torch.ones(len(leak.frequencies)).double(), atol=0.08, rtol=0
    )
    assert leak.brightness_snr / leak.snr == pytest.approx(1, abs=0.08)


def test_the_plot_shows_the_curve():
    pytest.importorskip("matplotlib")
    leak = signal_leak(DDIMScheduler(), torch.randn(2, 1, 8, 8))
    line = leak.plot().axes[0].lines[0]
    assert line.get_ydata().tolist() == leak.snr_by_frequency.tolist()


def test_bad_input():
    with pytest.raises(ValueError, match="`images` must have the shape"):
        signal_leak(DDIMScheduler(), torch.zeros(8, 8))
    with pytest.raises(ValueError, match="`_class_name`, got 'Nothing'"):
        terminal_snr({"_class_name": "Nothing"})
    with pytest.raises(ValueError, match="`alphas_cumprod` or `sigmas`, got KarrasVeScheduler"):
        terminal_snr(KarrasVeScheduler())
