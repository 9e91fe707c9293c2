"""The step's constants and its closed forms on Gaussian data, under every scheduler that starts from scaled noise."""

import math

import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepInverseScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    ScoreSdeVeScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)

from diffusers_ext import oms_step, start_latents, start_level

from .gaussian import ALPHAS, STABLE_DIFFUSION, make

# LMSDiscreteScheduler gives tensors to NumPy at every step of its integrals.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array_wrap__ must accept context and return_scalar arguments:DeprecationWarning"
)

PRESERVING = [
    DDIMScheduler,
    PNDMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    DEISMultistepScheduler,
    UniPCMultistepScheduler,
    LCMScheduler,
    TCDScheduler,
    DDPMScheduler,
]
EXPLODING = [
    EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    LMSDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
]
SPACINGS = ["linspace", "leading", "trailing"]


def build(cls, **options):
    known = {"clip_sample": False, "set_alpha_to_one": True, "skip_prk_steps": True}
    accepted = cls.__init__.__wrapped__.__code__.co_varnames
    return cls(**STABLE_DIFFUSION, **{k: v for k, v in {**known, **options}.items() if k in accepted})


def test_the_step_is_a_weighted_sum():
    x0, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    a = ALPHAS[-1].item()
    torch.testing.assert_close(
        oms_step(x0, a, noise), 0.068265 * x0 + 0.997667 * noise, atol=1e-5, rtol=0
    )  # the constants of the Stable Diffusion schedule
    legacy = math.sqrt(a) * x0 + (1 - a) * noise
    torch.testing.assert_close(oms_step(x0, a, noise, legacy_variance=True), legacy, atol=1e-7, rtol=0)
    assert torch.equal(oms_step(x0, 0.0, noise), noise)
    assert torch.equal(oms_step(x0, 1.0, noise), x0)


def test_half_precision_is_computed_in_full():
    x0, noise = torch.randn(4, 1, 8, 8).half(), torch.randn(4, 1, 8, 8).half()
    out = oms_step(x0, 4.66e-3, noise)
    assert out.dtype == torch.float16
    assert torch.equal(out, oms_step(x0.float(), 4.66e-3, noise.float()).half())


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 4, 20, 1000])
@pytest.mark.parametrize("cls", PRESERVING + EXPLODING)
def test_level_and_scale_of_every_scheduler(cls, steps, spacing):
    """What the base network would see of the start is `sqrt(a) x0 + sqrt(1 - a) n`, at the first timestep's `a`."""
    scheduler = build(cls, timestep_spacing=spacing)
    if cls is DPMSolverSinglestepScheduler and steps == 1:
        pytest.skip("a singlestep solver of second order has no single step")
    try:
        scheduler.set_timesteps(min(steps, 50) if cls in (LCMScheduler, TCDScheduler) else steps)
    except (ValueError, IndexError) as error:
        pytest.skip(f"Diffusers cannot: {error}")
    level = start_level(scheduler)
    first = float(scheduler.timesteps[0])
    low = min(int(first), 998)
    sigmas = ((1 - ALPHAS) / ALPHAS).sqrt()
    a = 1 / (1 + (sigmas[low] + (first - low) * (sigmas[low + 1] - sigmas[low])).item() ** 2)
    assert level.alpha_cumprod == pytest.approx(a, rel=2e-3)
    assert level.variance_exploding == (cls in EXPLODING)

    x0, noise = torch.full((1, 1, 8, 8), 5.0), torch.randn(1, 1, 8, 8)
    handed_over = start_latents(x0, noise, level)
    in_the_pipeline = handed_over * scheduler.init_noise_sigma
    seen = scheduler.scale_model_input(in_the_pipeline, scheduler.timesteps[0])
    torch.testing.assert_close(seen.float(), (a**0.5 * x0 + (1 - a) ** 0.5 * noise).float(), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("sigmas", ["karras", "exponential", "beta"])
@pytest.mark.parametrize("cls", [EulerDiscreteScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_levels_off_the_schedule_follow_the_sigmas(cls, sigmas):
    scheduler = build(cls, **{f"use_{sigmas}_sigmas": True})
    scheduler.set_timesteps(20)
    level = start_level(scheduler)
    sigma = float(scheduler.sigmas[0])
    assert level.sigma == pytest.approx(sigma)
    assert level.alpha_cumprod == pytest.approx(1 / (1 + sigma**2))


def test_zero_terminal_snr():
    zero = DDIMScheduler(**STABLE_DIFFUSION, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    zero.set_timesteps(20)
    level = start_level(zero)
    assert level.alpha_cumprod == 0
    assert level.sigma == math.inf
    noise = torch.randn(1, 1, 4, 4)
    assert torch.equal(start_latents(torch.ones_like(noise), noise, level), noise)
    euler = EulerDiscreteScheduler(**STABLE_DIFFUSION, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    euler.set_timesteps(20)
    assert start_level(euler).sigma == pytest.approx(4096, rel=1e-4)


def test_reading_the_level_changes_nothing():
    scheduler = build(EulerDiscreteScheduler)
    scheduler.set_timesteps(10)
    start_level(scheduler)
    assert scheduler.step_index is None
    assert not scheduler.is_scale_input_called


def test_schedules_that_start_from_pure_noise_are_refused():
    flow = FlowMatchEulerDiscreteScheduler()
    flow.set_timesteps(4)
    with pytest.raises(ValueError, match="flow matching starts from pure noise"):
        start_level(flow)
    exploding = ScoreSdeVeScheduler()
    exploding.set_timesteps(4)
    for inverse in (DDIMInverseScheduler, DPMSolverMultistepInverseScheduler):
        with pytest.raises(ValueError, match=f"must go from noise to the image, got {inverse.__name__}"):
            start_level(inverse(**STABLE_DIFFUSION))
    rising = DDPMScheduler()
    rising.timesteps = torch.tensor([1, 500, 999])
    with pytest.raises(ValueError, match="timesteps that rise from 1 to 999"):
        start_level(rising)
    with pytest.raises(ValueError, match="with `alphas_cumprod`"):
        start_level(exploding)


@pytest.mark.parametrize(
    ("mean", "std", "plain", "with_step"),
    [
        # Mean and standard deviation of the samples, measured once with 1,000 steps.
        (1, 1, (0.93186, 0.99814), (1.0, 0.99581)),
        (1, 0.5, (0.96596, 0.49866), (1.0, 0.49749)),
        (5, 10, (2.17888, 8.26521), (5.0, 8.24593)),
        (5, 3, (3.99568, 2.94241), (5.0, 2.93555)),
    ],
)
def test_mean_and_spread_on_gaussian_data(mean, std, plain, with_step):
    """Both are linear in the start, so two starts give the law: 0 ends at the mean, and 1 at the mean plus the sd."""
    base, pipeline = make(mean, std, build(DDIMScheduler, timestep_spacing="trailing"))
    starts = {"num_inference_steps": 1000, "output_type": "latent"}
    zero, one = torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)
    for call, expected in ((base, plain), (pipeline, with_step)):
        extra = {"oms_step": "ddim"} if call is pipeline else {}
        centre, unit = (call(latents=x, **starts, **extra).images.double().mean().item() for x in (zero, one))
        assert centre == pytest.approx(expected[0], rel=1e-4)
        assert unit - centre == pytest.approx(expected[1], rel=1e-3)
    a = ALPHAS[-1].item()
    k = std / math.sqrt(a * std**2 + 1 - a)
    assert plain[0] == pytest.approx(mean * (1 - math.sqrt(a) * k), rel=0.01)  # the closed form in continuous time
    assert with_step[1] == pytest.approx(k * math.sqrt(1 - a), rel=0.01)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("cls", [c for c in PRESERVING + EXPLODING if c not in (LCMScheduler, TCDScheduler)])
def test_the_mean_is_right_under_every_scheduler(cls, spacing):
    """Started from the mean alone, exact nets and any solver stay on the mean; a plain start does not."""
    mean, std = 5.0, 3.0
    base, pipeline = make(mean, std, build(cls, timestep_spacing=spacing))
    if cls in (EulerAncestralDiscreteScheduler, KDPM2AncestralDiscreteScheduler, DDPMScheduler):
        # 256 x 64 pixels; fresh noise on the way makes them forget part of their start.
        kwargs, tolerance, gap = {"batch_size": 256, "generator": torch.Generator().manual_seed(0)}, 0.08, 0.15
    else:
        # DDIM and PNDM step by a fixed length, which does not fit a grid that ends at both ends.
        fits = spacing != "linspace" or cls not in (DDIMScheduler, PNDMScheduler)
        kwargs, tolerance, gap = {"latents": torch.zeros(1, 1, 8, 8), "oms_step": "ddim"}, 5e-3 if fits else 0.03, 0.5
    # LMS integrates numerically, coefficient by coefficient, and is as exact in 60 steps.
    steps = {"num_inference_steps": 60 if cls is LMSDiscreteScheduler else 250, "output_type": "latent"}
    found = pipeline(**kwargs, **steps).images.double().mean().item()
    assert found == pytest.approx(mean, abs=tolerance)
    kwargs.pop("oms_step", None)
    plain = base(**kwargs, **steps).images.double().mean().item()
    assert plain < mean - gap
