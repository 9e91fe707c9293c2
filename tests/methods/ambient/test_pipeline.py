"""AmbientPipeline against closed forms: data N(mean, std^2), whose ideal denoiser is known."""

import pytest
import torch
from diffusers import (
    ConfigMixin,
    DDIMScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    ModelMixin,
)
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput

from diffusers_ext import AmbientPipeline, ImageGenerationPipeline, edm_levels
from tests.generation.test_pipeline import MEAN, STD, GaussianNet
from tests.generation.test_pipeline import unet as small_unet


class GaussianEDM(ModelMixin, ConfigMixin):
    """F of EDM's preconditioning, with standard deviation 0.6 for the data, whose D is ideal for N(mean, std^2)."""

    @register_to_config
    def __init__(self, sample_size=4, in_channels=1, sign=1):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.calls = []

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        sigma = (4 * torch.as_tensor(timestep).double().flatten()[0]).exp()
        self.calls.append(sigma.item())
        total = sigma**2 + 0.36
        x = sample.double() * total.sqrt()
        ideal = MEAN + STD**2 / (STD**2 + sigma**2) * (x - MEAN)
        out = (ideal - 0.36 / total * x) / (self.config.sign * sigma * 0.6 / total.sqrt())
        out = out.to(sample)
        return UNet2DOutput(out) if return_dict else (out,)


def make(net, scheduler, cls=AmbientPipeline, **config):
    pipeline = cls(net, scheduler, **config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def start(n=3):
    return torch.randn(n, 1, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_heun_follows_the_probability_flow_to_its_end(kind):
    scheduler = EDMEulerScheduler(sigma_data=0.6, prediction_type=kind)
    net = GaussianEDM(sign=-1 if kind == "v_prediction" else 1)
    latents = start()
    found = make(net, scheduler)(latents=latents, num_inference_steps=60, output_type="latent").images
    expected = MEAN + (80 * latents - MEAN) * STD / (STD**2 + 80**2) ** 0.5
    torch.testing.assert_close(found, expected, atol=5e-3, rtol=0)
    assert len(net.calls) == 2 * 60 - 1
    default = make(net, scheduler)
    net.calls.clear()
    default(output_type="latent")
    assert len(net.calls) == 2 * 18 - 1
    euler = make(net, scheduler, ImageGenerationPipeline)
    rough = euler(latents=latents * 80 / scheduler.init_noise_sigma, num_inference_steps=60, output_type="latent")
    assert (rough.images - expected).abs().max() > 5 * (found - expected).abs().max()  # second order is nearer


def test_heun_is_algorithm_1_step_by_step():
    """An independent walk of Karras et al. 2022, algorithm 1, in 5 steps."""
    x, n = 80.0 * start().double(), 5
    sigma = [(80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(n)] + [0.0]
    torch.testing.assert_close(edm_levels(n), torch.tensor(sigma, dtype=torch.float64))

    def ideal(x, s):
        return MEAN + STD**2 / (STD**2 + s**2) * (x - MEAN)

    for s, following in zip(sigma, sigma[1:], strict=False):
        d = (x - ideal(x, s)) / s
        euler = x + (following - s) * d
        second = (euler - ideal(euler, following)) / following if following else d
        x = x + (following - s) * (d + second) / 2
    found = make(GaussianEDM(), EDMEulerScheduler(sigma_data=0.6))(
        latents=start(), num_inference_steps=n, output_type="latent"
    )
    torch.testing.assert_close(found.images, x.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stop", [0.1, 0.5])
def test_stopping_returns_the_mean_at_that_level(stop):
    net = GaussianEDM()
    latents = start()
    pipeline = make(net, EDMEulerScheduler(sigma_data=0.6), image_scale=2.0)
    found = pipeline(latents=latents, num_inference_steps=80, stop_at_sigma=stop, output_type="latent").images
    at = MEAN + (80 * latents - MEAN) * ((STD**2 + stop**2) / (STD**2 + 80**2)) ** 0.5
    torch.testing.assert_close(found, MEAN + STD**2 / (STD**2 + stop**2) * (at - MEAN), atol=2e-3, rtol=0)
    assert min(net.calls) == pytest.approx(stop, rel=1e-5)
    images = pipeline(latents=latents, num_inference_steps=80, stop_at_sigma=stop, output_type="pt").images
    torch.testing.assert_close(images, (found / 2 / 2 + 0.5).clamp(0, 1), atol=1e-6, rtol=0)


SCHEDULERS = {
    "ddim": (lambda: DDIMScheduler(clip_sample=False), lambda: GaussianNet()),
    "euler": (lambda: EulerDiscreteScheduler(beta_schedule="linear"), lambda: GaussianNet()),
    "heun": (lambda: HeunDiscreteScheduler(beta_schedule="linear"), lambda: GaussianNet()),
    "flow": (lambda: FlowMatchEulerDiscreteScheduler(), lambda: GaussianNet(flow=True)),
    "edm_dpm": (lambda: EDMDPMSolverMultistepScheduler(sigma_data=0.6), lambda: GaussianEDM()),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_other_schedulers_stop_at_the_last_level_that_is_not_below(name):
    scheduler, net = (f() for f in SCHEDULERS[name])
    pipeline, stop = make(net, scheduler), 0.5
    seen = []

    def callback(pipeline, i, t, tensors):
        seen.append(float(t))
        return tensors

    call = {"latents": start(1000), "num_inference_steps": 200, "output_type": "latent"}
    found = pipeline(**call, stop_at_sigma=stop, callback_on_step_end=callback).images
    # Samples of N(mean, std^2) whose noise is gone by the posterior mean: std^2 / sqrt(std^2 + sigma^2) is left.
    spread = STD**2 / (STD**2 + stop**2) ** 0.5
    assert found.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert found.std().item() == pytest.approx(spread, rel=0.05)
    whole = pipeline(**call).images
    assert 0 < len(seen) < len(scheduler.timesteps)
    plain = make(net, scheduler, ImageGenerationPipeline)(**call).images
    assert torch.equal(whole, plain)


def test_a_batch_is_its_samples_alone_and_a_callback_may_change_or_end_it():
    pipeline = make(small_unet(), EDMEulerScheduler())
    generators = [torch.Generator().manual_seed(i) for i in (1, 2)]
    call = {"num_inference_steps": 3, "output_type": "pt"}
    both = pipeline(2, generator=generators, **call).images
    second = pipeline(1, generator=torch.Generator().manual_seed(2), return_dict=False, **call)[0]
    torch.testing.assert_close(both[1:], second, atol=1e-5, rtol=0)
    seen = []

    def ending(pipeline, i, sigma, tensors):
        seen.append((i, sigma))
        pipeline._interrupt = i == 1
        return {"latents": tensors["latents"] * 0}

    ended = pipeline(1, callback_on_step_end=ending, **{**call, "output_type": "latent"}).images
    assert [i for i, _ in seen] == [0, 1]
    assert seen[0][1] == pytest.approx(80.0)
    assert (ended == 0).all()


def test_guidance_and_half_precision():
    pipeline = make(small_unet(num_class_embeds=4), EDMEulerScheduler(), null_class_label=3)

    def draw(**changes):
        generator = torch.Generator().manual_seed(0)
        call = {"class_labels": [0, 1], "num_inference_steps": 2, "output_type": "latent", "generator": generator}
        return pipeline(**{**call, **changes}).images

    plain, guided = draw(), draw(guidance_scale=3.0)
    assert (plain - guided).abs().max() > 1e-4
    # Where both halves are one class, guidance changes nothing.
    torch.testing.assert_close(
        draw(class_labels=[3, 3]), draw(class_labels=[3, 3], guidance_scale=3.0), atol=1e-4, rtol=0
    )
    pipeline.to(torch.bfloat16)
    assert draw().dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("scheduler", "arguments", "message"),
    [
        ("edm", {"stop_at_sigma": 0.0}, "`stop_at_sigma` must lie between 0 and the first level, 80.0, got 0.0"),
        ("edm", {"stop_at_sigma": 90.0}, "`stop_at_sigma` must lie between 0 and the first level, 80.0, got 90.0"),
        ("edm", {"eta": 0.5}, "`eta` and `sigmas` must be left out with EDM's sampler, got 0.5 and None"),
        ("edm", {"num_inference_steps": 0}, "`num_inference_steps` must be an integer >= 1, got 0"),
        ("edm", {"output_type": "jpg"}, "`output_type` must be one of"),
        ("ddim", {"stop_at_sigma": -1.0}, "`stop_at_sigma` must lie between 0 and the second level of these steps"),
        ("ddim", {"stop_at_sigma": 1e5}, "`stop_at_sigma` must lie between 0 and the second level of these steps"),
    ],
)
def test_refuses_bad_arguments(scheduler, arguments, message):
    chosen = EDMEulerScheduler(sigma_data=0.6) if scheduler == "edm" else DDIMScheduler()
    pipeline = make(GaussianEDM() if scheduler == "edm" else GaussianNet(), chosen)
    with pytest.raises(ValueError, match=message):
        pipeline(**arguments)


def test_levels_refuse_bad_arguments():
    for arguments in ({"num_inference_steps": 0}, {"sigma_min": 0.0}, {"sigma_max": 0.001}):
        with pytest.raises(ValueError, match=f"`{next(iter(arguments))}`"):
            edm_levels(**{"num_inference_steps": 3, **arguments})
