"""ImageGenerationPipeline against closed forms and against Diffusers' own pipelines."""

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ConfigMixin,
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
    UNet2DModel,
)
from diffusers.callbacks import PipelineCallback
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput

from diffusers_ext import ImageGenerationPipeline

MEAN, STD = 0.2, 0.3


class GaussianNet(ModelMixin, ConfigMixin):
    """The exact predictor for data N(mean, std^2): E[noise | x_t], or E[noise - x0 | x_t] for flow matching."""

    @register_to_config
    def __init__(self, flow=False, mean=MEAN, std=STD, sample_size=4, in_channels=1):
        super().__init__()
        self.alphas = DDIMScheduler().alphas_cumprod.double()
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        config = self.config
        timestep = torch.as_tensor(timestep).double()
        if config.flow:
            data, noise = 1 - timestep / 1000, timestep / 1000
        else:
            alpha = self.alphas[timestep.long()]
            data, noise = alpha.sqrt(), (1 - alpha).sqrt()
        data, noise = data.to(sample), noise.to(sample)
        spread = (data * config.std) ** 2 + noise**2
        away = (sample - data * config.mean) / spread
        out = noise * away
        if config.flow:
            out = out - (config.mean + data * config.std**2 * away)
        return UNet2DOutput(out) if return_dict else (out,)


def make(net, scheduler, vae=None, **config):
    pipeline = ImageGenerationPipeline(net, scheduler, vae, **config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def unet(**changes):
    torch.manual_seed(0)
    config = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (4, 4),
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
        "norm_num_groups": 2,
        "attention_head_dim": 4,
        "layers_per_block": 1,
    }
    return UNet2DModel(**{**config, **changes}).eval()


@pytest.mark.parametrize(
    ("flow", "scheduler", "tolerance"),
    [
        # The probability flow of a Gaussian is linear: x(0) = mean + std * x(1) up to the first noise level's rest.
        (False, DDIMScheduler(clip_sample=False, timestep_spacing="trailing"), 0.02),
        (False, DPMSolverMultistepScheduler(timestep_spacing="trailing"), 0.02),
        (False, EulerDiscreteScheduler(timestep_spacing="trailing"), 0.02),
        (True, FlowMatchEulerDiscreteScheduler(), 0.02),
    ],
)
def test_samples_of_a_gaussian_have_their_closed_form(flow, scheduler, tolerance):
    start = torch.linspace(-2, 2, 16).view(1, 1, 4, 4)
    out = make(GaussianNet(flow), scheduler)(latents=start, num_inference_steps=500, output_type="latent").images
    # The schedule starts at abar = 4e-5, not 0: the state there is the start latents, its law N(0, 1).
    torch.testing.assert_close(out, MEAN + STD * start, atol=tolerance, rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_flow_matching_of_a_point_is_exact_in_any_number_of_steps(steps):
    # Also shows that no step is spent below the grid 1, ..., 1/N.
    pipeline = make(GaussianNet(True, std=0.0), FlowMatchEulerDiscreteScheduler())
    out = pipeline(3, num_inference_steps=steps, output_type="latent").images
    torch.testing.assert_close(out, torch.full_like(out, MEAN), atol=1e-5, rtol=0)
    assert pipeline.num_timesteps == steps
    assert pipeline.scheduler.timesteps.tolist() == pytest.approx([1000 * (1 - i / steps) for i in range(steps)])


def test_equals_the_ddim_pipeline_of_diffusers():
    net = unet()
    kwargs = {"num_inference_steps": 5, "output_type": "np"}
    stock = DDIMPipeline(net, DDIMScheduler())
    stock.set_progress_bar_config(disable=True)
    expected = stock(2, generator=torch.Generator().manual_seed(1), **kwargs).images
    found = make(net, DDIMScheduler())(2, generator=torch.Generator().manual_seed(1), **kwargs).images
    np.testing.assert_array_equal(found, expected)


def test_guidance_is_null_plus_w_times_the_difference():
    net, calls = unet(num_class_embeds=4), []
    pipeline = make(net, DDIMScheduler(clip_sample=False, timestep_spacing="trailing"), null_class_label=3)
    latents = torch.randn(2, 1, 8, 8)
    hook = net.register_forward_hook(lambda *_: calls.append(1))
    found = pipeline(class_labels=[0, 1], guidance_scale=2.5, latents=latents, num_inference_steps=1,
                     output_type="latent").images  # fmt: skip
    assert len(calls) == 1  # both branches in one call
    hook.remove()
    with torch.no_grad():
        null, given = (net(latents, 999, class_labels=torch.tensor(c)).sample for c in ([3, 3], [0, 1]))
    alpha = DDIMScheduler().alphas_cumprod[999]
    expected = (latents - (1 - alpha).sqrt() * (null + 2.5 * (given - null))) / alpha.sqrt()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-2)
    plain = pipeline(class_labels=1, batch_size=2, latents=latents, num_inference_steps=2, output_type="pt").images
    each = pipeline(class_labels=torch.tensor([1, 1]), latents=latents, num_inference_steps=2, output_type="pt").images
    assert torch.equal(plain, each)


def test_guidance_leaves_a_learned_variance_alone():
    """What the scheduler is given: the guided prediction, rescaled on its own, and the variance for the class."""
    net, given = unet(num_class_embeds=4, out_channels=2), []
    scheduler = DDPMScheduler(variance_type="learned_range")
    step = scheduler.step
    scheduler.step = lambda output, *args, **kwargs: (given.append(output), step(output, *args, **kwargs))[1]
    pipeline, latents = make(net, scheduler, null_class_label=3), torch.randn(2, 1, 8, 8)
    for rescale in (0.0, 1.0):
        pipeline(
            class_labels=[0, 1], guidance_scale=5.0, guidance_rescale=rescale, latents=latents, num_inference_steps=1
        )
    with torch.no_grad():
        null, conditional = (net(latents, 0, class_labels=torch.tensor(c)).sample for c in ([3, 3], [0, 1]))
    guided = null[:, :1] + 5 * (conditional - null)[:, :1]
    deviations = [part.std((1, 2, 3), keepdim=True) for part in (conditional[:, :1], guided)]
    for found, expected in zip(given, (guided, guided * deviations[0] / deviations[1]), strict=True):
        torch.testing.assert_close(found, torch.cat([expected, conditional[:, 1:]], 1), rtol=1e-4, atol=1e-5)


def test_timesteps_beyond_the_training_are_refused():
    pipeline = make(unet(), DDIMScheduler(steps_offset=1))
    with pytest.raises(
        ValueError, match="`num_inference_steps` must be such that all timesteps are below 1000, got 1000"
    ):
        pipeline(num_inference_steps=1000)


def test_image_scale_divides_the_samples():
    # Data N(mean, std^2) times 2 is what the network knows; the pipeline gives back the data.
    start = torch.randn(4, 1, 4, 4)
    net = GaussianNet(True, mean=2 * MEAN, std=2 * STD)
    found = make(net, FlowMatchEulerDiscreteScheduler(), image_scale=2.0)(
        latents=start, num_inference_steps=300, output_type="pt"
    ).images
    torch.testing.assert_close(found, ((MEAN + STD * start) / 2 + 0.5).clamp(0, 1), atol=0.01, rtol=0)


def test_latents_are_decoded_by_the_vae():
    torch.manual_seed(0)
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=1, block_out_channels=(4, 4), norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=0.5, shift_factor=0.1,
    ).eval()  # fmt: skip
    pipeline = make(GaussianNet(True), FlowMatchEulerDiscreteScheduler(), vae, image_scale=2.0)
    start = torch.randn(2, 1, 4, 4)
    latents = pipeline(latents=start, num_inference_steps=3, output_type="latent").images
    with torch.no_grad():
        expected = vae.decode(latents / 2.0 / 0.5 + 0.1).sample
    found = pipeline(latents=start, num_inference_steps=3, output_type="pt").images
    torch.testing.assert_close(found, (expected / 2 + 0.5).clamp(0, 1))
    assert found.shape == (2, 3, 8, 8)


def test_generators_batches_and_output_types_agree():
    pipeline = make(unet(), DDIMScheduler())
    seeds = [torch.Generator().manual_seed(s) for s in (5, 6)]
    both = pipeline(2, generator=seeds, num_inference_steps=3, output_type="pt").images
    single = pipeline(generator=torch.Generator().manual_seed(6), num_inference_steps=3, output_type="pt").images
    torch.testing.assert_close(both[1:], single, atol=1e-5, rtol=0)
    kwargs = {"num_inference_steps": 3, "latents": torch.randn(2, 1, 8, 8)}
    tensor = pipeline(output_type="pt", **kwargs).images
    array = pipeline(output_type="np", **kwargs).images
    np.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    pictures = pipeline(**kwargs, return_dict=False)[0]
    np.testing.assert_array_equal(np.stack([np.asarray(p) for p in pictures]), (array[..., 0] * 255).round())


def test_eta_adds_noise_and_zero_does_not():
    pipeline = make(unet(), DDIMScheduler())
    draw = lambda seed, eta: pipeline(  # noqa: E731
        latents=torch.ones(1, 1, 8, 8), eta=eta, num_inference_steps=3, output_type="pt",
        generator=torch.Generator().manual_seed(seed),
    ).images  # fmt: skip
    assert torch.equal(draw(0, 0.0), draw(1, 0.0))
    assert not torch.equal(draw(0, 1.0), draw(1, 1.0))
    assert torch.equal(draw(1, 1.0), draw(1, 1.0))


def test_a_callback_sees_every_step_and_can_change_the_latents():
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, int(timestep)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else {}

    pipeline = make(unet(), DDIMScheduler())
    out = pipeline(num_inference_steps=3, output_type="latent", callback_on_step_end=callback).images
    assert seen == [(0, 666), (1, 333), (2, 0)]
    assert (out == 0).all()


def test_a_callback_stops_and_sets_guidance():
    net, calls = unet(num_class_embeds=4), []
    pipeline = make(net, DDIMScheduler(clip_sample=False), null_class_label=3)
    net.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    options = {
        "class_labels": 1,
        "num_inference_steps": 5,
        "output_type": "latent",
        "latents": torch.randn(1, 1, 8, 8),
    }
    states = []

    def callback(pipe, step, timestep, tensors):
        states.append(tensors["latents"])
        pipe._guidance_scale = 2.5 if step == 1 else pipe.guidance_scale
        pipe._interrupt = step == 3
        return {}

    found = pipeline(**options, callback_on_step_end=callback).images
    assert calls == [1, 1, 2, 2]
    assert torch.equal(found, states[-1])
    assert pipeline.interrupt
    assert pipeline(**options).images.abs().max() > 0  # the next call begins anew
    assert len(calls) == 9
    pipeline(**options, callback_on_step_end=WithoutTensors(cutoff_step_index=0, cutoff_step_ratio=None))
    with pytest.raises(ValueError, match="`guidance_scale` must be 1 for a model without classes"):
        make(unet(), DDIMScheduler())(
            num_inference_steps=3, callback_on_step_end=lambda pipe, *_: setattr(pipe, "_guidance_scale", 2.0) or {}
        )


class WithoutTensors(PipelineCallback):
    """A callback of Diffusers' kind, which says by itself that it wants no tensors."""

    tensor_inputs = []

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        assert callback_kwargs == {}
        return callback_kwargs


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_and_keeps_its_dtype(dtype):
    pipeline = make(unet().to(dtype), DDIMScheduler())
    assert pipeline(num_inference_steps=2, output_type="latent").images.dtype == dtype
    assert pipeline(num_inference_steps=2, output_type="pt").images.isfinite().all()


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("plain", {"class_labels": 1}, "`class_labels` must be left out: this model has no classes"),
        ("plain", {"batch_size": 0}, "`batch_size` must be an integer >= 1, got 0"),
        ("plain", {"num_inference_steps": 0}, "`num_inference_steps` must be an integer >= 1, got 0"),
        ("plain", {"guidance_scale": 2.0}, "`guidance_scale` must be 1 for a model without classes"),
        ("plain", {"output_type": "jpg"}, "`output_type` must be one of .*got 'jpg'"),
        ("plain", {"latents": torch.zeros(1, 1, 4, 4)}, r"`latents` must have the shape \(1, 1, 8, 8\)"),
        ("plain", {"batch_size": 2, "generator": [torch.Generator()]}, "a list of 2, got a list of 1"),
        ("plain", {"sigmas": [1.0]}, "`sigmas` must be left out: DDIMScheduler does not take them"),
        ("plain", {"callback_on_step_end_tensor_inputs": ["noise"]}, "`callback_on_step_end_tensor_inputs` must be"),
        ("classes", {}, "`class_labels` must be given"),
        ("classes", {"class_labels": 4}, r"`class_labels` must lie in 0..3, got \[4\]"),
        ("classes", {"class_labels": [0.5]}, "`class_labels` must be an int"),
        ("classes", {"class_labels": [0, 1], "batch_size": 3}, "`batch_size` must be left out or equal the 2"),
    ],
)
def test_refuses_bad_input(model, arguments, message):
    pipeline = make(unet(num_class_embeds=4 if model == "classes" else None), DDIMScheduler())
    with pytest.raises(ValueError, match=message):
        pipeline(**arguments)


def test_refuses_eta_and_scale_that_have_no_meaning():
    with pytest.raises(ValueError, match="`eta` must be 0: FlowMatchEulerDiscreteScheduler does not take it"):
        make(unet(), FlowMatchEulerDiscreteScheduler())(eta=0.5)
    with pytest.raises(ValueError, match="`image_scale` must be a number > 0, got 0"):
        make(unet(), DDIMScheduler(), image_scale=0)
