"""Ten families and a class-conditional one through the seam, against their stock pipelines and against hand calls."""

import pytest
import torch
from diffusers import (
    AutoPipelineForText2Image,
    DDPMPipeline,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    UNet2DModel,
    UniPCMultistepScheduler,
)

from diffusers_ext import PipelineDenoiser
from diffusers_ext.generation.prompts import Conditions
from tests.tiny_pipelines import FAMILIES, build

PROMPTS = ["a cat", "a red dog on the beach, eating a burger"]
TIMESTEPS = torch.tensor([900, 100])


@pytest.fixture(scope="module")
def made():
    """Pipelines, denoisers and conditions by name; none of the tests that use them changes them."""
    found = {}

    def make(name):
        if name not in found:
            pipe = build(name)
            labels = name == "DiTPipeline"
            denoiser = PipelineDenoiser(pipe, **({} if labels else {"height": 32, "width": 64}))
            found[name] = pipe, denoiser, denoiser.encode_prompts([3, 7] if labels else PROMPTS)
        return found[name]

    return make


def noise(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def arguments_of(network, call):
    """What the network was called with, and how often."""
    found = []
    handle = network.register_forward_pre_hook(lambda _, args, kwargs: found.append((args, kwargs)), with_kwargs=True)
    try:
        call()
    finally:
        handle.remove()
    return found


@pytest.mark.parametrize("name", [*FAMILIES, "DiTPipeline"])
def test_equal_to_the_stock_call_bit_for_bit(made, name):
    _, denoiser, conditions = made(name)
    assert denoiser.check(conditions.prompts) == 0.0


@pytest.mark.parametrize("name", [*FAMILIES, "DiTPipeline"])
def test_each_sample_has_its_timestep_and_its_prompt(made, name):
    _, denoiser, conditions = made(name)
    x = noise(denoiser.latents_shape(2))
    with torch.no_grad():
        both = denoiser(x, TIMESTEPS, conditions)
        single = [denoiser(x[i : i + 1], TIMESTEPS[i], conditions[i]) for i in range(2)]
        swapped = denoiser(x, TIMESTEPS.flip(0), conditions)
        others = denoiser(x, TIMESTEPS, conditions[[1, 0]])
    torch.testing.assert_close(both, torch.cat(single), rtol=0, atol=1e-5)
    assert not denoiser.one_timestep
    assert (both.shape, both.dtype) == (x.shape, torch.float32)
    assert (both - swapped).abs().max() > 1e-3
    assert (both - others).abs().max() > 1e-5


@pytest.mark.parametrize("name", [*FAMILIES, "DiTPipeline"])
def test_guidance_is_off(made, name):
    pipe, denoiser, conditions = made(name)
    x = noise(denoiser.latents_shape(2))
    network = denoiser.denoiser
    with torch.no_grad():
        calls = arguments_of(network, lambda: denoiser(x, TIMESTEPS, conditions))
    assert len(calls) == 1
    args, kwargs = calls[0]
    assert len(args[0] if args else kwargs["hidden_states"]) == 2


@pytest.mark.parametrize("name", [*FAMILIES, "DiTPipeline"])
def test_images_and_latents(made, name):
    """The autoencoder's own round trip, although the latents between are packed, scaled, shifted or normalised."""
    pipe, denoiser, _ = made(name)
    size = (16, 16) if name == "DiTPipeline" else (32, 64)
    images = noise((2, 3, *size)).clamp(-1, 1)
    latents = denoiser.encode_images(images)
    assert latents.shape == denoiser.latents_shape(2)
    with torch.no_grad():
        video = {"QwenImagePipeline": lambda v: v.unsqueeze(2)}.get(name, lambda v: v)
        encoded = pipe.vae.encode(video(images))
        z = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
        wanted = pipe.vae.decode(z, return_dict=False)[0].reshape(images.shape)
        torch.testing.assert_close(denoiser.decode(latents), wanted, rtol=1e-4, atol=1e-5)


def test_latents_by_hand(made):
    images = noise((1, 3, 32, 64)).clamp(-1, 1)
    pipe, denoiser, _ = made("StableDiffusionPipeline")
    with torch.no_grad():
        torch.testing.assert_close(
            denoiser.encode_images(images), pipe.vae.encode(images).latent_dist.mode() * pipe.vae.config.scaling_factor
        )
        drawn = pipe.vae.encode(images).latent_dist.sample(torch.Generator().manual_seed(3))
        found = denoiser.encode_images(images, torch.Generator().manual_seed(3))
        torch.testing.assert_close(found, drawn * pipe.vae.config.scaling_factor)
        pipe, denoiser, _ = made("FluxPipeline")
        z = (pipe.vae.encode(images).latent_dist.mode() - 0.1159) * 0.3611
    patches = z.view(1, 4, 8, 2, 16, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, 128, 16)
    torch.testing.assert_close(denoiser.encode_images(images), patches)


@pytest.mark.parametrize("name", ["StableDiffusionXLPipeline", "Flux2KleinPipeline"])
def test_decoding_is_that_of_the_stock_pipeline_and_has_a_gradient(made, name):
    pipe, denoiser, _ = made(name)
    latents = noise(denoiser.latents_shape(1)).requires_grad_()
    images = denoiser.decode(latents)
    (gradient,) = torch.autograd.grad(images.square().sum(), latents)
    assert gradient.abs().mean() > 1e-3
    if name == "Flux2KleinPipeline":
        stock = pipe(
            prompt="a",
            height=32,
            width=64,
            guidance_scale=1.0,
            num_inference_steps=1,
            output_type="pt",
            callback_on_step_end=lambda pipe, i, t, found: {"latents": latents.detach()},
        ).images
        torch.testing.assert_close(stock, (images.detach() / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


def test_stable_diffusion_3_by_hand(made):
    pipe, denoiser, conditions = made("StableDiffusion3Pipeline")
    x = noise(denoiser.latents_shape(2))
    with torch.no_grad():
        ((_, seen),) = arguments_of(denoiser.denoiser, lambda: denoiser(x, TIMESTEPS, conditions))
        text, _, pooled, _ = pipe.encode_prompt(PROMPTS, PROMPTS, PROMPTS, do_classifier_free_guidance=False)
        wanted = pipe.transformer(
            hidden_states=x, timestep=TIMESTEPS, encoder_hidden_states=text, pooled_projections=pooled
        ).sample
        torch.testing.assert_close(denoiser(x, TIMESTEPS, conditions), wanted, rtol=0, atol=1e-5)
    assert torch.equal(seen["hidden_states"], x)
    assert torch.equal(seen["timestep"], TIMESTEPS)
    torch.testing.assert_close(seen["pooled_projections"], pooled, rtol=0, atol=1e-6)
    torch.testing.assert_close(seen["encoder_hidden_states"], text, rtol=0, atol=1e-6)


@pytest.mark.parametrize("embedded", [False, True])
def test_flux_by_hand(embedded):
    pipe = build("FluxPipeline", guidance_embeds=embedded)
    given = {"guidance_scale": 3.5} if embedded else {}
    denoiser = PipelineDenoiser(pipe, 32, 64, **given)
    conditions = denoiser.encode_prompts(PROMPTS)
    x = noise((2, 128, 16))
    assert not denoiser.one_timestep  # tried now, so that the call below is the only one
    with torch.no_grad():
        ((_, seen),) = arguments_of(denoiser.denoiser, lambda: denoiser(x, TIMESTEPS, conditions))
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(16), indexing="ij")
    ids = torch.stack([torch.zeros(8, 16), rows, columns], dim=-1).reshape(128, 3)
    assert torch.equal(seen["hidden_states"], x)
    assert torch.equal(seen["img_ids"], ids)
    torch.testing.assert_close(seen["timestep"], TIMESTEPS / 1000)
    assert torch.equal(seen["txt_ids"], torch.zeros(512, 3))
    if embedded:
        assert seen["guidance"].tolist() == [3.5, 3.5]
        with torch.no_grad():
            other = PipelineDenoiser(pipe, 32, 64)(x, TIMESTEPS, conditions)  # 1 by default
            assert (other - denoiser(x, TIMESTEPS, conditions)).abs().max() > 1e-3
    else:
        assert seen["guidance"] is None


def test_z_image_by_hand(made):
    pipe, denoiser, conditions = made("ZImagePipeline")
    x = noise(denoiser.latents_shape(2))
    with torch.no_grad():
        (((samples, times, texts), _),) = arguments_of(denoiser.denoiser, lambda: denoiser(x, TIMESTEPS, conditions))
        raw = pipe.transformer([s.unsqueeze(1) for s in x], (1000 - TIMESTEPS) / 1000, texts, return_dict=False)[0]
        output = denoiser(x, TIMESTEPS, conditions)
    assert [tuple(sample.shape) for sample in samples] == [(4, 1, 16, 32)] * 2
    torch.testing.assert_close(times, torch.tensor([0.1, 0.9]))
    assert len(texts[0]) < len(texts[1])
    assert torch.equal(output, -torch.stack(raw).squeeze(2))


def test_two_sizes_with_as_many_tokens(made):
    pipe, wide, conditions = made("FluxPipeline")
    high = PipelineDenoiser(pipe, height=64, width=32)
    assert high.latents_shape(2) == wide.latents_shape(2)
    x = noise(wide.latents_shape(2))
    with torch.no_grad():
        assert (high(x, TIMESTEPS, conditions) - wide(x, TIMESTEPS, conditions)).abs().max() > 1e-3
    assert high.check(PROMPTS) == 0.0  # recordings and checks of each size for itself
    _, wide, conditions = made("StableDiffusionXLPipeline")
    with pytest.raises(ValueError, match=r"`x` must have the shape \(2, 4, 16, 32\)"):
        wide(noise((2, 4, 32, 16)), TIMESTEPS, conditions)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "FluxPipeline"])
def test_gradients_are_those_of_the_network(made, name):
    pipe, denoiser, conditions = made(name)
    network = denoiser.denoiser
    x = noise(denoiser.latents_shape(2)).requires_grad_()
    network.requires_grad_(True)
    try:
        parameters = list(network.parameters())
        found = torch.autograd.grad(denoiser(x, TIMESTEPS, conditions).square().mean(), [x, *parameters])
        ((args, kwargs),) = arguments_of(network, lambda: denoiser(x, TIMESTEPS, conditions))
        output = network(*args, **{**kwargs, "return_dict": False})[0]
        wanted = torch.autograd.grad(output.square().mean(), [x, *parameters])
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        network.enable_gradient_checkpointing()
        network.train()
        again = torch.autograd.grad(denoiser(x, TIMESTEPS, conditions).square().mean(), [x, *parameters])
        assert all(torch.equal(a, b) for a, b in zip(again, wanted, strict=True))
    finally:
        network.disable_gradient_checkpointing()
        network.eval().requires_grad_(False)


def test_a_frozen_network_passes_the_gradient_to_its_input(made):
    _, denoiser, conditions = made("StableDiffusionPipeline")
    x = noise(denoiser.latents_shape(1)).requires_grad_()
    bound = denoiser.bind(conditions[0])
    (gradient,) = torch.autograd.grad(bound(x, 500).sum(), x)
    assert gradient.abs().mean() > 1e-3
    assert [name.split(".")[0] for name, _ in denoiser.named_parameters()][0] == "denoiser"


def test_parameters_that_nothing_depends_on(made):
    _, denoiser, conditions = made("QwenImagePipeline")
    assert denoiser.unused_parameters(conditions) == []  # none is trained
    denoiser.denoiser.requires_grad_(True)
    names = denoiser.unused_parameters(conditions)
    denoiser.denoiser.requires_grad_(False)
    # The last block's text stream ends nowhere.
    assert {name.split(".")[1] for name in names} == {"1"}


@pytest.mark.parametrize(
    "scheduler",
    [DDPMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, LMSDiscreteScheduler, UniPCMultistepScheduler],
)
def test_the_scheduler_changes_nothing(made, scheduler):
    pipe, denoiser, conditions = made("StableDiffusionPipeline")
    x = noise(denoiser.latents_shape(2))
    other = pipe.from_pipe(pipe, scheduler=scheduler.from_config(pipe.scheduler.config))
    other_denoiser = PipelineDenoiser(other, height=32, width=64)
    with torch.no_grad():
        assert torch.equal(other_denoiser(x, TIMESTEPS, conditions), denoiser(x, TIMESTEPS, conditions))
    assert other_denoiser.check(PROMPTS) == 0.0  # `init_noise_sigma`, scaled inputs, two evaluations a step


def test_a_scheduler_that_the_pipeline_refuses_is_refused(made):
    pipe, *_ = made("FluxPipeline")
    other = pipe.from_pipe(pipe, scheduler=FlowMatchHeunDiscreteScheduler())
    with pytest.raises(ValueError, match="FlowMatchHeunDiscreteScheduler"):
        PipelineDenoiser(other, height=32, width=64).check(PROMPTS)


def test_what_the_pipeline_passes_to_its_schedule(made):
    _, denoiser, _ = made("FluxPipeline")
    # Linear in the number of tokens, .5 at 256 and 1.15 at 4096.
    assert denoiser.schedule_arguments()["mu"] == pytest.approx(0.5 + (128 - 256) * 0.65 / 3840)
    small = PipelineDenoiser(denoiser.pipe, height=16, width=16)
    assert small.schedule_arguments()["mu"] < denoiser.schedule_arguments()["mu"]


@pytest.mark.parametrize("name", FAMILIES)
def test_recordings_as_tensors(made, name, tmp_path):
    from safetensors.torch import load_file, save_file

    _, denoiser, conditions = made(name)
    for i, tensors in enumerate(conditions.to_tensors()):
        save_file(tensors, tmp_path / f"{i}.safetensors")
    loaded = [load_file(tmp_path / f"{i}.safetensors") for i in range(2)]
    again = Conditions.from_tensors(conditions.prompts, loaded, conditions.masked)
    x = noise(denoiser.latents_shape(2))
    with torch.no_grad():
        assert torch.equal(denoiser(x, TIMESTEPS, again), denoiser(x, TIMESTEPS, conditions))


def test_guidance_of_the_pipeline_on_request(made):
    pipe, plain, conditions = made("StableDiffusionPipeline")
    guided = PipelineDenoiser(pipe, 32, 64, guidance_scale=3.0, negative_prompt="a burger")
    x = noise(plain.latents_shape(2))
    with torch.no_grad():
        positive = plain(x, TIMESTEPS, conditions)
        negative = plain(x, TIMESTEPS, plain.encode_prompts(["a burger"]))
        output = guided(x, 500, guided.encode_prompts(PROMPTS))
        wanted = [plain(x, 500, c) for c in (plain.encode_prompts(["a burger"]), conditions)]
    torch.testing.assert_close(output, wanted[0] + 3 * (wanted[1] - wanted[0]), rtol=0, atol=1e-5)
    assert (positive - negative).abs().max() > 1e-3
    assert guided.check(PROMPTS) == 0.0


def test_refusals():
    pipe = build("StableDiffusionPipeline")
    unet = UNet2DModel(8, 3, 3, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
                       block_out_channels=(8,), norm_num_groups=4)  # fmt: skip
    with pytest.raises(ValueError, match="DDPMPipeline takes neither `prompt` nor `class_labels`.*ImageGeneration"):
        PipelineDenoiser(DDPMPipeline(unet, DDPMScheduler()))
    with pytest.raises(ValueError, match="AutoPipelineForText2Image.from_pipe"):
        PipelineDenoiser(StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False))
    assert AutoPipelineForText2Image.from_pipe(pipe)  # what the message names
    with pytest.raises(ValueError, match="`strength` is no argument"):
        PipelineDenoiser(pipe, strength=0.5)
    with pytest.raises(ValueError, match="`latents` is no argument"):
        PipelineDenoiser(pipe, latents=torch.zeros(1))
    with pytest.raises(ValueError, match="`height` is no argument"):
        PipelineDenoiser(build("DiTPipeline"), height=16)
    with pytest.raises(ValueError, match="divisible by 8"):  # the pipeline's own words
        PipelineDenoiser(pipe, height=33, width=64).latents_shape(1)
    denoiser = PipelineDenoiser(pipe, 32, 64)
    for prompts in ("a cat", [], [3]):
        with pytest.raises(ValueError, match="`prompts` must be a list"):
            denoiser.encode_prompts(prompts)
    conditions = denoiser.encode_prompts(PROMPTS)
    x = noise((2, 4, 16, 32))
    with pytest.raises(ValueError, match="`conditions` must be of 1 or 3 prompts"):
        denoiser(torch.cat([x, x[:1]]), 5, conditions)
    with pytest.raises(ValueError, match="`t` must be one timestep or one for each of 2 samples, got 3"):
        denoiser(x, torch.tensor([1, 2, 3]), conditions)
    with pytest.raises(ValueError, match="the images have another size"):
        denoiser.encode_images(torch.zeros(1, 3, 64, 32))
    with pytest.raises(ValueError, match="`images` must be a tensor of floats"):
        denoiser.encode_images(torch.zeros(1, 3, 64, 32, dtype=torch.uint8))


@pytest.fixture(scope="module")
def small():
    """A denoiser, conditions of two prompts, and latents."""
    denoiser = PipelineDenoiser(build("StableDiffusionPipeline"), 16, 16)
    return denoiser, denoiser.encode_prompts(["a cat", "a red dog"]), noise((2, 4, 8, 8))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"height": -16}, "`height` must be an integer >= 1, or left out, got -16"),
        ({"width": "16"}, "`width` must be an integer >= 1, or left out, got '16'"),
        ({"guidance_scale": float("nan")}, "`guidance_scale` must be a finite number, or left out, got nan"),
        ({"num_inference_steps": 0}, "`num_inference_steps` must be an integer >= 1, or left out, got 0"),
        ({"generator": 3}, "`generator` must be a torch.Generator, or left out, got 3"),
        ({"height": 10**9, "width": 16}, "with height=1000000000, width=16 fails before its network is called"),
    ],
)
def test_wrong_arguments_of_the_call(small, call, message):
    with pytest.raises(ValueError, match=message):
        PipelineDenoiser(small[0].pipe, **call).latents_shape(1)


IMAGE = torch.zeros(1, 3, 16, 16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d, c, x: PipelineDenoiser(None), "`pipe` must be a DiffusionPipeline, got NoneType"),
        (lambda d, c, x: d.latents_shape(-1), "`batch` must be an integer >= 0, got -1"),
        (lambda d, c, x: d.encode_prompts(None), "`prompts` must be a list of at least one prompt, got None"),
        (lambda d, c, x: d.join([]), "`conditions` must be a list of at least one `Conditions`"),
        (lambda d, c, x: d.join([c, "a"]), "`conditions` must be what `encode_prompts` returned, got 'a'"),
        (lambda d, c, x: d(None, 5, c), "`x` must be a tensor of floats, got None"),
        (lambda d, c, x: d(x.numpy(), 5, c), "`x` must be a tensor of floats, got ndarray"),
        (
            lambda d, c, x: d(x.long(), 5, c),
            r"`x` must be .* floats, got torch.int64 of shape \(2, 4, 8, 8\)",
        ),
        (lambda d, c, x: d(x, 5, ["a", "b"]), "`conditions` must be what `encode_prompts` returned, got list"),
        (lambda d, c, x: d(x, 5, Conditions([1, 2], [[], []])), "`conditions` must be of this pipeline, got some"),
        (lambda d, c, x: d(x, None, c), r"`t` must hold numbers in 0..1000, the scheduler's timesteps, got None"),
        (lambda d, c, x: d(x, float("nan"), c), r"`t` must hold numbers in 0..1000, .*, got \[nan\]"),
        (lambda d, c, x: d(x, -1, c), r"`t` must hold numbers in 0..1000, .*, got \[-1\]"),
        (lambda d, c, x: d(x, torch.tensor([1, 2000]), c), r"`t` must hold .*, got \[1, 2000\]"),
        (lambda d, c, x: d.encode_images(None), "`images` must be a tensor of floats .*, got NoneType"),
        (lambda d, c, x: d.encode_images(IMAGE[:, :1]), r"`images` must have the shape \(batch >= 1, 3, height"),
        (lambda d, c, x: d.encode_images(IMAGE[:0]), r"`images` must have the shape \(batch >= 1, 3, height"),
        (lambda d, c, x: d.encode_images(IMAGE + 255), r"`images` must lie in \[-1, 1\], got values from 255 to 255"),
        (lambda d, c, x: d.encode_images(IMAGE / 0), r"`images` must lie in \[-1, 1\], got values from nan to nan"),
        (lambda d, c, x: d.encode_images(IMAGE, 3), "`generator` must be one generator or a list of 1, got 3"),
        (lambda d, c, x: d.decode(x[:, :2]), r"`latents` must have the shape \(batch, 4, 8, 8\), got \(2, 2, 8, 8\)"),
        (lambda d, c, x: c.interpolated(c, [0.5]), r"`weights` must be 2 finite numbers, one a prompt, got \[0.5\]"),
        (lambda d, c, x: c.interpolated(c[:1], [0.5, 1]), "`other` must be conditions of 2 prompts, got 1"),
    ],
)
def test_wrong_input_is_one_sentence(small, call, message):
    with pytest.raises(ValueError, match=message):
        call(*small)


def test_labels_beyond_the_network():
    denoiser = PipelineDenoiser(build("DiTPipeline"))
    assert denoiser.encode_prompts([1000]).prompts == [1000]  # the null label
    for label in (-1, 1001, True):
        with pytest.raises(ValueError, match="`prompts` must be "):
            denoiser.encode_prompts([label])
