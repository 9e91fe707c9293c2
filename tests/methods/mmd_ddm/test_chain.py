"""The chain with gradients: closed forms, the pipeline's own loop, exact step counts, checkpointing, refusals."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    RePaintScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)

from diffusers_ext import ImageGenerationPipeline, differentiable_sample
from diffusers_ext.methods.mmd_ddm.chain import clamped
from diffusers_ext.methods.mmd_ddm.checks import check_chain


def ddim(**options):
    return DDIMScheduler(**{"clip_sample": False, **options})


def unet(dropout=0.0):
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(4, 8), norm_num_groups=2, layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, dropout=dropout,
    ).eval()  # fmt: skip


def noise(n=3):
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("steps", [5, 10])
def test_it_equals_the_loop_of_diffusers_pipeline(steps):
    network, start = unet(), noise()
    pipeline = DDIMPipeline(network, ddim())
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        ours = differentiable_sample(network, ddim(), start, steps)
    # DDIMPipeline draws its own start; a generator of the same seed gives the same one.
    images = pipeline(3, torch.Generator().manual_seed(1), num_inference_steps=steps, output_type="np").images
    expected = torch.tensor(images).permute(0, 3, 1, 2)
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "scheduler",
    [ddim(timestep_spacing="trailing"), DPMSolverMultistepScheduler(), EulerDiscreteScheduler(),
     UniPCMultistepScheduler(), FlowMatchEulerDiscreteScheduler()],
    ids=lambda s: type(s).__name__,
)  # fmt: skip
def test_it_equals_our_pipeline_with_any_scheduler(scheduler):
    network, start = unet(), noise()
    pipeline = ImageGenerationPipeline(network, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(latents=start, num_inference_steps=6, output_type="latent").images
    ours = differentiable_sample(network, scheduler, start, 6)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    check_chain(scheduler, 6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_gaussian_data_give_the_composed_affine_map(prediction_type):
    """With the exact prediction for data N(mu, s^2) every DDIM step is affine; here in float64 with NumPy."""
    mu, s, steps = 0.3, 0.7, 7
    scheduler = ddim(prediction_type=prediction_type)
    alphas = scheduler.alphas_cumprod.double().numpy()
    calls = []

    def oracle(x, t, return_dict):
        a = float(scheduler.alphas_cumprod.double()[int(t)])
        calls.append(int(t))
        eps = (1 - a) ** 0.5 * (x.double() - a**0.5 * mu) / (a * s**2 + 1 - a)
        x0 = (x.double() - (1 - a) ** 0.5 * eps) / a**0.5
        v = a**0.5 * eps - (1 - a) ** 0.5 * x0
        return ({"epsilon": eps, "sample": x0, "v_prediction": v}[prediction_type].float(),)

    start = noise()
    ours = differentiable_sample(oracle, scheduler, start, steps)
    skip = 1000 // steps
    grid = [skip * i for i in range(steps)][::-1]
    assert calls == grid
    x = start.double().numpy()
    for i, t in enumerate(grid):
        a, b = alphas[t], alphas[grid[i + 1]] if i + 1 < steps else 1.0
        eps = np.sqrt(1 - a) * (x - np.sqrt(a) * mu) / (a * s**2 + 1 - a)
        x = np.sqrt(b) * (x - np.sqrt(1 - a) * eps) / np.sqrt(a) + np.sqrt(1 - b) * eps
    np.testing.assert_allclose(ours.double().numpy(), x, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 5, 7, 15, 16, 20])
def test_exactly_so_many_calls(steps):
    calls = []

    def network(x, t, return_dict):
        calls.append(int(t))
        return (0.1 * x,)

    differentiable_sample(network, ddim(), noise(), steps, checkpointing="none")
    assert calls == [1000 // steps * i for i in range(steps)][::-1]


def test_eta_draws_from_the_generator():
    network, start = unet(), noise()

    def drawn(seed):
        generator = torch.Generator().manual_seed(seed)
        return differentiable_sample(network, ddim(), start, 5, eta=1.0, generator=generator)

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))


def test_checkpointing_changes_neither_sample_nor_gradient():
    found = {}
    for mode in ("none", "step"):
        network = unet()
        sample = differentiable_sample(network, ddim(), noise(), 5, checkpointing=mode)
        sample.square().mean().backward()
        found[mode] = [sample.detach(), *[p.grad for p in network.parameters()]]
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_the_gradient_is_that_of_finite_differences():
    """Of the mean of a five-step chain in float64 with respect to a scale in its network."""
    start = noise().double()

    def mean(scale):
        return differentiable_sample(lambda x, t, return_dict: (scale * torch.tanh(x),), ddim(), start, 5).mean()

    scale = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(mean(scale), scale)
    with torch.no_grad():
        expected = (mean(scale + 1e-4) - mean(scale - 1e-4)) / 2e-4
    assert gradient.item() == pytest.approx(expected.item(), rel=1e-5)


def test_clamping():
    x = torch.tensor([-2.0, 0.5, 3.0], requires_grad=True)
    for mode, gradient in (("hard", [0.0, 1.0, 0.0]), ("ste", [1.0, 1.0, 1.0])):
        y = clamped(x, mode)
        assert y.tolist() == [-1.0, 0.5, 1.0]
        assert torch.autograd.grad(y.sum(), x)[0].tolist() == gradient
    with pytest.raises(ValueError, match="`clamp` must be 'hard' or 'ste', got 'soft'"):
        clamped(x, "soft")


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (DDPMScheduler(clip_sample=False), "`scheduler` must be deterministic, got DDPMScheduler"),
        (EulerAncestralDiscreteScheduler(), "must be deterministic, got EulerAncestralDiscreteScheduler"),
        (LCMScheduler(), "must be deterministic, got LCMScheduler"),
        (HeunDiscreteScheduler(), "`scheduler` must make one network call a step, got HeunDiscreteScheduler with 9"),
        (DDIMScheduler(), "`scheduler.config.clip_sample` must be False"),
        (DDIMScheduler(clip_sample=False, thresholding=True), "`scheduler.config.thresholding` must be False"),
        (DDIMInverseScheduler(clip_sample=False), "must bring noise to the image .* got DDIMInverseScheduler"),
        (
            EDMEulerScheduler(),
            "`scheduler` must have a schedule of betas, or be a FlowMatchEulerDisc.*EDMEulerScheduler",
        ),
        (RePaintScheduler(clip_sample=False), "`scheduler` must step a sample from noise to an image, got RePaintSch"),
        (
            FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            "`num_inference_steps` must be a number of steps",
        ),
        (
            ddim(timestep_spacing="linspace"),
            "`timestep_spacing` must be 'leading' for 5 steps.*got 'linspace': it steps 200",
        ),
    ],
)
def test_unfit_schedulers_are_refused(scheduler, message):
    with pytest.raises(ValueError, match=message):
        check_chain(scheduler, 5)


def test_one_step_at_the_wrong_end_is_warned_about():
    with pytest.warns(UserWarning, match="the grid of one 'leading' step is timestep 0"):
        check_chain(ddim(), 1)
    check_chain(ddim(timestep_spacing="trailing"), 1)


def test_a_scheduler_that_stops_gradients_is_refused():
    class Detached(DDIMScheduler):
        def step(self, *args, **kwargs):
            return tuple(part.detach() for part in super().step(*args, **kwargs))

    with pytest.raises(ValueError, match="`scheduler` must be differentiable at every step, got Detached"):
        check_chain(Detached(clip_sample=False), 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_inference_steps": 0}, r"`num_inference_steps` must be an integer in 1\.\.1000.*got 0"),
        ({"num_inference_steps": 1001}, r"`num_inference_steps` must be an integer in 1\.\.1000.*got 1001"),
        ({"eta": 1.5}, r"`eta` must be a number in \[0, 1\], got 1.5"),
        ({"checkpointing": "all"}, "`checkpointing` must be 'step' or 'none', got 'all'"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        differentiable_sample(unet(), ddim(), noise(), **{"num_inference_steps": 5, **changes})


def test_an_unknown_prediction_type_is_refused():
    scheduler = ddim()
    scheduler.register_to_config(prediction_type="score")
    with pytest.raises(ValueError, match="`scheduler.config.prediction_type` must be one of"):
        differentiable_sample(unet(), scheduler, noise(), 5)
