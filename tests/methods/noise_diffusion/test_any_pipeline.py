"""NoiseDiffusion through the call of any pipeline: exact models, stock samplers, and the pipelines for one family."""

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)

from diffusers_ext import (
    PipelineDenoiser,
    PipelineNoiseDiffusion,
    StableDiffusionNoiseDiffusionPipeline,
    StableDiffusionXLNoiseDiffusionPipeline,
    noise_diagnostics,
    noise_levels,
)
from diffusers_ext.methods.noise_diffusion.levels import any_levels, flow_levels
from tests.tiny_pipelines import build

A, B, C = torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(0))
STEPS, STRENGTH = 20, 0.7
FLOWS = ["StableDiffusion3Pipeline", "FluxPipeline", "ZImagePipeline"]
EXACT_END = {"injection": 1.0, "boundary": None, "fixed_point_iterations": 6, "output_type": "latent"}


@pytest.fixture(scope="module")
def made():
    """Pipelines by name; none of the tests that use them changes them."""
    found = {}
    return lambda name: found[name] if name in found else found.setdefault(name, build(name))


def as_tensor(images):
    return torch.stack(images) * 2 - 1


class Exact:
    """A stock pipeline whose network is exact for data N(mean, std^2), and what its grid makes of them in closed form.

    Attributes:
        image_scale, noise_scale: those of the state at which images are mixed.
        down: factor of the way back on a deviation from the mean, step by step of the stock scheduler's grid.
    """

    def __init__(self, kind, mean, std):
        self.kind, self.mean, self.std = kind, mean, std
        used = round(STEPS * STRENGTH)
        if kind == "velocity":
            self.pipe = build("StableDiffusion3Pipeline")
            self.pipe.transformer.forward = self.velocity
            scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
            scheduler.set_timesteps(STEPS)
            noise = scheduler.sigmas[-used - 1 :].double()
            image = 1 - noise
            slope = (noise - image * std**2) / (image**2 * std**2 + noise**2)
            factors = 1 + slope[:-1] * noise.diff()
        else:
            self.pipe = build("StableDiffusionPipeline")
            self.pipe.unet.forward = self.epsilon
            scheduler = self.pipe.scheduler
            timesteps = torch.arange(STEPS)[:used].flip(0) * (1000 // STEPS) + 1
            alphas = torch.cat([scheduler.alphas_cumprod[timesteps], scheduler.alphas_cumprod[:1]]).double()
            image, noise = alphas.sqrt(), (1 - alphas).sqrt()
            variance = (image**2 * std**2 + noise**2)[:-1]
            factors = (image[:-1] * image[1:] * std**2 + noise[:-1] * noise[1:]) / variance
        self.image_scale, self.noise_scale = image[0].item(), noise[0].item()
        self.down = factors.prod().item()
        self.state_std = math.hypot(self.image_scale * std, self.noise_scale)

    def velocity(self, hidden_states, timestep, **kwargs):
        noise = (timestep / 1000).view(-1, 1, 1, 1)
        image = 1 - noise
        deviation = (hidden_states - image * self.mean) / (image**2 * self.std**2 + noise**2)
        return (noise * deviation - self.mean - image * self.std**2 * deviation,)

    def epsilon(self, sample, timestep, **kwargs):
        alpha = self.pipe.scheduler.alphas_cumprod[timestep.long()].view(-1, 1, 1, 1)
        variance = alpha * self.std**2 + 1 - alpha
        return ((1 - alpha).sqrt() * (sample - alpha.sqrt() * self.mean) / variance,)

    def encodes(self, latents):
        """Makes the autoencoder encode whatever it is given to these latents of the loop."""
        config = self.pipe.vae.config
        z = latents / config.scaling_factor + (config.shift_factor or 0)
        self.pipe.vae.encode = lambda images: SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: z))


@pytest.fixture(scope="module", params=["velocity", "epsilon"])
def exact(request):
    return Exact(request.param, 0.4, 0.6)


@pytest.fixture(scope="module", params=["velocity", "epsilon"])
def normal(request):
    """The exact model of N(0, 1), and two images whose latents are drawn from it."""
    model = Exact(request.param, 0.0, 1.0)
    latents = torch.randn(2, 4, 40, 40, generator=torch.Generator().manual_seed(1))
    model.encodes(latents)
    return model, latents, torch.zeros(2, 3, 80, 80)


def test_frames_of_an_exact_model_in_closed_form(exact):
    """Every deviation from the mean has its weight, and the mean its own; the way is exact up to the fixed point."""
    pipe, weights = exact.pipe, [0.0, 0.3, 0.8, 1.0]
    found = PipelineNoiseDiffusion(pipe)(
        A, B, "a", weights=weights, num_inference_steps=STEPS, strength=STRENGTH, injection=1.2, boundary=None,
        fixed_point_iterations=15, output_type="latent",
    ).images  # fmt: skip
    config = pipe.vae.config
    z = pipe.vae.encode(as_tensor([A, B])).latent_dist.mode()
    first, second = (z - (config.shift_factor or 0)) * config.scaling_factor - exact.mean
    kept = exact.down * exact.image_scale
    for frame, w in zip(found, weights, strict=True):
        alpha, beta = math.cos(w * math.pi / 2), math.sin(w * math.pi / 2)
        mu, nu = 1.2 * alpha / (alpha + beta), 1.2 * beta / (alpha + beta)
        wanted = exact.mean * (1 + 0.2 * kept)
        wanted = wanted + (alpha + kept * (mu - alpha)) * first + (beta + kept * (nu - beta)) * second
        torch.testing.assert_close(frame, wanted, atol=1e-4, rtol=0)
    # The grid follows the flow of the equation itself, along which deviations shrink as the deviation of the data.
    assert exact.down == pytest.approx(exact.std / exact.state_std, rel=0.15)


def test_norm_and_marginal_are_kept(normal):
    """Of N(0, 1): with the injection alpha + beta frames are alpha x_0 + beta x_1, as normal as the images."""
    model, latents, images = normal
    options = {"num_inference_steps": STEPS, "strength": STRENGTH, "output_type": "latent", "boundary": None}
    pipeline = PipelineNoiseDiffusion(model.pipe)
    alpha = math.cos(0.3 * math.pi / 2), math.sin(0.3 * math.pi / 2)
    output = pipeline(
        *images, "a", weights=[0.3], injection=sum(alpha), fixed_point_iterations=15, **options
    )  # fmt: skip
    torch.testing.assert_close(output.images[0], alpha[0] * latents[0] + alpha[1] * latents[1], atol=2e-4, rtol=0)
    figures = noise_diagnostics(output.images)
    assert figures.norm_ratio.item() == pytest.approx(1, abs=0.02)
    assert figures.ks.item() < 0.02
    states = output.diagnostics["frames"]  # inflated as the inverse of the way back is
    assert states.expected_std == pytest.approx(1.0 if model.kind == "epsilon" else model.state_std)
    inflation = 1 / (model.down * model.state_std)
    assert states.norm_ratio.item() == pytest.approx(inflation * figures.norm_ratio.item(), rel=1e-3)
    slerp = pipeline(*images, "a", weights=[0.5], method="slerp", fixed_point_iterations=15, **options).images
    lerp = pipeline(*images, "a", weights=[0.5], method="lerp", fixed_point_iterations=15, **options).images
    assert slerp.std().item() == pytest.approx(1, abs=0.02)
    assert lerp.std().item() == pytest.approx(math.sqrt(0.5), abs=0.03)


def test_the_inversion_alone_inflates_as_is_said(normal):
    model, latents, images = normal
    options = {"num_inference_steps": STEPS, "strength": STRENGTH, "output_type": "latent", "num_frames": 1}
    figures = PipelineNoiseDiffusion(model.pipe)(*images, "a", **options).diagnostics["inverted"]
    wanted = latents.double().square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(figures.own_norm_ratio, wanted, atol=1e-4, rtol=0)
    assert abs(figures.inflation - 1) > 1e-3


def test_boundary_is_in_deviations_of_the_state(normal):
    """A share of 4.55 % of normal states lies beyond 2 deviations and is clipped to them."""
    model, _, images = normal
    states = []

    def keep(pipeline, step, timestep, tensors):
        states.append(tensors["latents"])
        return {}

    def mixed(boundary):
        """The mixed state, read off the frame at the network's exact way back."""
        return PipelineNoiseDiffusion(model.pipe)(
            *images, "a", weights=[0.3], injection=math.cos(0.15 * math.pi) + math.sin(0.15 * math.pi),
            boundary=boundary, num_inference_steps=STEPS, strength=STRENGTH, fixed_point_iterations=15,
            output_type="latent", callback_on_step_end=keep,
        ).images / model.down  # fmt: skip

    limit = 2 * (1 if model.kind == "epsilon" else model.state_std)
    clipped = mixed(2.0)
    assert clipped.abs().max().item() == pytest.approx(limit, rel=1e-4)
    state = states[round(STEPS * STRENGTH) - 1]
    assert state.abs().max() > 1.5 * limit
    inside = state.clamp(-limit, limit)
    wanted = (math.cos(0.15 * math.pi) * inside[0] + math.sin(0.15 * math.pi) * inside[1]).clamp(-limit, limit)
    torch.testing.assert_close(clipped[0], wanted, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", FLOWS)
def test_flow_models_return_to_their_ends_and_sample_as_their_stock_pipelines(made, name):
    """At full strength the way back is the stock sampler's, its shifted grid too; one end is the other's swap."""
    pipe, states = made(name), {}
    off = {"guidance_scale": 0.0} if name == "ZImagePipeline" else {"guidance_scale": 1.0}

    def keep(pipeline, step, timestep, tensors):
        states[step] = tensors["latents"].clone()
        return {}

    before = repr(pipe.scheduler.config), torch.random.get_rng_state()
    steps = 12 if name == "ZImagePipeline" else 6  # it bends more
    options = {**EXACT_END, "fixed_point_iterations": steps, "num_inference_steps": steps, "strength": 1.0}
    found = PipelineNoiseDiffusion(pipe)(
        A, B, "a cat", "a red dog on the beach", weights=[0.0, 1.0], callback_on_step_end=keep, **options
    ).images
    clean = PipelineDenoiser(pipe, height=16, width=24).encode_images(as_tensor([A, B]))
    assert clean.abs().max() > 0.1
    torch.testing.assert_close(found, clean, atol=2e-3, rtol=0)
    stock = pipe(
        "a cat",
        height=16,
        width=24,
        latents=states[steps - 1][:1],
        num_inference_steps=steps,
        output_type="latent",
        **off,
    ).images
    torch.testing.assert_close(found[:1], stock.reshape(found[:1].shape).float(), atol=1e-4, rtol=0)
    assert repr(pipe.scheduler.config) == before[0]
    assert torch.equal(torch.random.get_rng_state(), before[1])


@torch.no_grad()
def test_prompts_of_unequal_length_are_mixed_in_the_output(made):
    """One step of Z-Image: the state minus its sigma times the weighted outputs of both prompts, guided."""
    pipe, states, texts = made("ZImagePipeline"), [], ("a cat", "a red dog on the beach, eating a burger")

    def keep(pipeline, step, timestep, tensors):
        states.append((tensors["latents"].clone(), timestep))
        return {}

    guided = {"guidance_scale": 3.0, "negative_prompt": "fog"}
    frames = PipelineNoiseDiffusion(pipe)(
        A, B, *texts, weights=[0.25], num_inference_steps=4, strength=0.25, output_type="latent",
        method="lerp", callback_on_step_end=keep, **guided,
    ).images  # fmt: skip
    state, t = states[0]
    state = 0.75 * state[:1] + 0.25 * state[1:]
    denoiser = PipelineDenoiser(pipe, height=16, width=24, **guided)
    one, other = (denoiser(state, t, denoiser.encode_prompts([text])) for text in texts)
    assert (one - other).abs().max() > 1e-3
    torch.testing.assert_close(frames, state - t / 1000 * (0.75 * one + 0.25 * other), atol=1e-5, rtol=0)
    plain = PipelineDenoiser(pipe, height=16, width=24)
    clean = plain.encode_images(as_tensor([A, B]))
    torch.testing.assert_close(
        states[0][0], clean + t / 1000 * plain(clean, t, plain.encode_prompts(list(texts))), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_equal_to_the_pipelines_of_stable_diffusion(made, name):
    """To 1e-4: prompts are encoded one by one here, and as a batch there; XL's own scheduler is Euler."""
    pipe = made(name)
    if "XL" in name:
        base = StableDiffusionXLNoiseDiffusionPipeline(**pipe.components, add_watermarker=False)
        base.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="leading")
    else:
        base = StableDiffusionNoiseDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    base.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "negative_prompt": "fog", "guidance_scale": 4.0, "num_frames": 2}
    for more in ({"gamma": 0.3, "output_type": "latent"}, {"method": "slerp", "output_type": "pt"}):
        found, wanted = (
            pipeline(A, B, "a cat", "a dog", generator=torch.Generator().manual_seed(0), **options, **more)
            for pipeline in (PipelineNoiseDiffusion(pipe), base)
        )
        torch.testing.assert_close(found.images, wanted.images, atol=1e-4, rtol=0)
        assert found.weights == wanted.weights
    guided = PipelineNoiseDiffusion(pipe)(A, B, "a cat", "a dog", guide_inversion=True, **options, output_type="pt")
    wanted = base(A, B, "a cat", "a dog", inversion_guidance_scale=4.0, **options, output_type="pt")
    torch.testing.assert_close(guided.images, wanted.images, atol=1e-4, rtol=0)


def test_paths_parts_and_forms(made):
    """A path is its pairs; parts are the whole; a tuple is a tuple; a callback stops."""
    pipeline = PipelineNoiseDiffusion(made("StableDiffusion3Pipeline"))
    options = {"num_frames": 2, "num_inference_steps": 4, "guidance_scale": 2.0}
    path = pipeline([A, B, C], prompt=["a", "b", "c"], output_type="pt", **options)
    pairs = pipeline([A, B], [B, C], ["a", "b"], ["b", "c"], output_type="pt", frame_batch_size=3, **options)
    torch.testing.assert_close(path.images, pairs.images, atol=1e-4, rtol=0)
    assert path.weights == pytest.approx([1 / 3, 2 / 3, 4 / 3, 5 / 3])
    assert (path.images[1] - path.images[2]).abs().max() > 1e-3
    images, weights, diagnostics = pipeline(A, B, return_dict=False, diagnostics=False, **options)
    assert images[0].size == (24, 16)
    assert (len(images), len(weights), diagnostics) == (2, 2, {})
    steps = []

    def stop(caller, step, timestep, tensors):
        steps.append(step)
        caller._interrupt = step == 1
        return tensors

    pipeline(A, B, callback_on_step_end=stop, output_type="latent", **options)
    assert steps == [0, 1]


def test_class_labels(made):
    """Nothing lies between two labels but the outputs of both; one label is a condition as any."""
    pipe, squares = made("DiTPipeline"), (A[:, :, :16], B[:, :, :16])
    options = {"weights": [0.0], "num_inference_steps": 8, **EXACT_END}
    found = PipelineNoiseDiffusion(pipe)(*squares, 3, 7, **options).images
    clean = PipelineDenoiser(pipe).encode_images(as_tensor(squares))
    torch.testing.assert_close(found, clean[:1], atol=2e-3, rtol=0)


def test_levels_of_schedulers():
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    wanted = noise_levels(DDIMScheduler(**config), 20, 0.5)
    assert any_levels(EulerDiscreteScheduler(**config), 20, 0.5, {}) == wanted
    assert any_levels(DPMSolverMultistepScheduler(**config), 20, 0.5, {}) == wanted
    levels = flow_levels(FlowMatchEulerDiscreteScheduler(shift=3.0), 4, 0.5)
    linear = [1 - 0.999 * k / 3 for k in range(4)]  # from sigma 1 to 1 / 1000, before the shift
    shifted = [3 * s / (1 + 2 * s) for s in linear]
    # Its own ends are shifted already, and are shifted again: so Diffusers has it.
    ends = [1.0, 3 * 0.001 / 1.002]
    own = [ends[0] + (ends[1] - ends[0]) * k / 3 for k in range(4)]
    assert levels.sigmas == pytest.approx([0, *[3 * s / (1 + 2 * s) for s in own[:1:-1]]], abs=1e-5)
    assert levels.sigmas[2] != pytest.approx(shifted[2], abs=1e-5)
    assert levels.timesteps == pytest.approx([1000 * s for s in levels.sigmas[1:]], rel=1e-5)
    assert any_levels(FlowMatchHeunDiscreteScheduler(shift=3.0), 4, 0.5, {}) == levels
    solver = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    assert any_levels(solver, 4, 0.5, {}) == levels
    with pytest.raises(ValueError, match=r"`pipe.scheduler` must have `alphas_cumprod` or be one of flow .*EDMEuler"):
        any_levels(EDMEulerScheduler(), 4, 0.5, {})
    with pytest.raises(ValueError, match=r"`scheduler` must have 4 sigmas that fall from at most 1 to 0"):
        any_levels(FlowMatchEulerDiscreteScheduler(invert_sigmas=True), 4, 0.5, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_1": None}, "`image_1` must be given where `image_0` is a single image"),
        ({"image_1": A[:, :8]}, "`image_1` must have the size of `image_0`"),
        ({"image_0": A[:, :13], "image_1": B[:, :13]}, "divisible"),
        ({"prompt": ["a", "b"]}, "`prompt` must be one text or 1, one per image"),
        ({"prompt": 3}, "`prompts` must be a list of str for StableDiffusion3Pipeline, got 3"),
        ({"image_0": [A, B], "image_1": None, "prompt_1": "a"}, "`prompt_1` must be left out on a path"),
        ({"num_frames": 0}, "`num_frames` must be an integer >= 1, got 0"),
        ({"num_inference_steps": 0}, "`num_inference_steps` must be an integer in 1..1000, got 0"),
        ({"strength": 1.5}, r"`strength` must be a number in \(0, 1\], got 1.5"),
        ({"weights": [1.5]}, r"`weights` must lie in \[0, 1\]"),
        ({"boundary": 0.0}, "`boundary` must be > 0 or None"),
        ({"method": "cubic"}, "`method` must be one of"),
        ({"output_type": "jpg"}, "`output_type` must be one of"),
        ({"height": 32}, "`height` must be left out: it is that of the images, got 32"),
        ({"true_cfg_scale": 2.0}, "`true_cfg_scale` is no argument that a denoiser can hand to the call of"),
    ],
)
def test_errors(made, change, message):
    pipe = made("StableDiffusion3Pipeline")
    called = pipe.transformer.register_forward_pre_hook(lambda *_: pytest.fail("the network was called"))
    arguments = {"image_0": A, "image_1": B, "num_inference_steps": 4, "strength": 0.5, **change}
    with pytest.raises(ValueError, match=message):
        PipelineNoiseDiffusion(pipe)(**arguments)
    called.remove()
