"""OMSPipeline in front of tiny pipelines of every kind, against the same computed by hand."""

import inspect
import math

import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
)
from diffusers.utils import is_peft_available

from diffusers_ext import OMSPipeline
from diffusers_ext.generation.stock_call import guides

from .gaussian import STABLE_DIFFUSION
from .tiny import (
    CASES,
    PICTURE,
    WIDTH,
    case,
    module,
    pixel_module,
    pixels,
    quiet,
    stable_diffusion,
    stable_diffusion_xl,
    text_encoder,
    tokenizer,
    unet,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def record_calls(network):
    """Returns a list to which every call of the network adds its arguments."""
    calls = []
    network.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    return calls


def handed_over(monkeypatch, pipeline, **call):
    """Returns the arguments that the base is called with."""
    found = {}

    def stop(self, **arguments):
        found.update(arguments)

    stop.__signature__ = inspect.signature(type(pipeline.sd_pipeline).__call__)
    with monkeypatch.context() as patch:
        patch.setattr(type(pipeline.sd_pipeline), "__call__", stop)
        pipeline(**call)
    return found


def features(encoders, texts):
    """Text features by hand: the last layer of one encoder, the last but one of two, joined."""
    found = []
    for tokens, encoder in encoders:
        ids = tokens(texts, padding="max_length", max_length=12, truncation=True, return_tensors="pt").input_ids
        out = encoder(ids, output_hidden_states=True)
        found.append(out.last_hidden_state if len(encoders) == 1 else out.hidden_states[-2])
    return torch.cat(found, dim=-1).detach()


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("name", CASES)
def test_without_the_step_it_is_the_base(name):
    base, pipeline, call = case(name)
    expected = base(**call, generator=seeded()).images
    assert torch.equal(pipeline(**call, oms=False, generator=seeded()).images, expected)
    assert not torch.equal(pipeline(**call, generator=seeded()).images, expected)


@pytest.mark.parametrize("name", CASES)
def test_random_numbers_and_latents_by_hand(name):
    """Pure noise first, the noise of the step next, the base's own last; `a` is that of the first timestep."""
    base, pipeline, call = case(name)
    generator = seeded()
    shape = {"control_net": (1, 4, 8, 12), "pixels": (1, 1, 8, 8), "classes": (1, 1, 8, 8)}.get(name, (1, 4, 8, 8))
    pure, fresh = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    network = pipeline.oms_module
    if "prompt" in call:
        encoders = [(base.tokenizer, base.text_encoder)]
        if name == "stable_diffusion_xl":
            encoders.append((base.tokenizer_2, base.text_encoder_2))
        prediction = network(pure, features(encoders, ["a cat"])).sample
    else:
        prediction = network(pure, torch.tensor([1]) if name == "classes" else None).sample
    base.scheduler.set_timesteps(3)
    a = base.scheduler.alphas_cumprod[base.scheduler.timesteps[0]].item()
    latents = math.sqrt(a) * -prediction + math.sqrt(1 - a) * fresh
    expected = base(**call, latents=latents.detach(), generator=generator).images
    assert prediction.std() > 0.05
    found = pipeline(**call, generator=seeded()).images
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("legacy", [False, True])
def test_given_latents_are_the_pure_noise(monkeypatch, legacy):
    base, pipeline, call = case("stable_diffusion")
    base.scheduler = EulerDiscreteScheduler(**STABLE_DIFFUSION, timestep_spacing="trailing")
    pure, a = torch.randn(1, 4, 8, 8), DDIMScheduler(**STABLE_DIFFUSION).alphas_cumprod[-1].item()
    found = handed_over(monkeypatch, pipeline, latents=pure, oms_step="ddim", oms_legacy_variance=legacy, **call)
    x0 = -pipeline.oms_module(pure, features([(base.tokenizer, base.text_encoder)], ["a cat"])).sample
    noise = (1 - a) * pure if legacy else math.sqrt(1 - a) * pure
    base.scheduler.set_timesteps(3)
    sigma = base.scheduler.init_noise_sigma
    torch.testing.assert_close(found["latents"] * sigma, x0 + noise / math.sqrt(a), atol=1e-4, rtol=1e-5)


def test_the_level_is_that_of_the_call(monkeypatch):
    """The first timestep follows `num_inference_steps` and `timesteps`, and the base's scheduler is left alone."""
    base, pipeline, call = case("stable_diffusion")
    base.scheduler = DDPMScheduler(**STABLE_DIFFUSION, timestep_spacing="leading", clip_sample=False)
    pure = torch.randn(1, 4, 8, 8)
    x0 = -pipeline.oms_module(pure, features([(base.tokenizer, base.text_encoder)], ["a cat"])).sample
    before = base.scheduler.timesteps.clone()
    for arguments, first in (
        ({"num_inference_steps": 20}, 950),
        ({"num_inference_steps": 4}, 750),
        ({"timesteps": [600, 300]}, 600),
        ({"timesteps": [600, 300], "num_inference_steps": None}, 600),
    ):
        a = base.scheduler.alphas_cumprod[first].item()
        found = handed_over(monkeypatch, pipeline, **{**call, **arguments}, latents=pure, oms_step="ddim")["latents"]
        torch.testing.assert_close(found, math.sqrt(a) * x0 + math.sqrt(1 - a) * pure, atol=1e-5, rtol=1e-5)
        assert torch.equal(base.scheduler.timesteps, before)


@pytest.mark.parametrize("scale", [0.0, 2.5])
def test_guidance_by_hand(monkeypatch, scale):
    base, pipeline, call = case("stable_diffusion")
    network, pure = pipeline.oms_module, torch.randn(1, 4, 8, 8)
    own = features([(base.tokenizer, base.text_encoder)], ["", "dark", "a cat"])
    calls = record_calls(network)
    base.scheduler.set_timesteps(3)
    a = base.scheduler.alphas_cumprod[base.scheduler.timesteps[0]].item()
    for negative, null_text in ((None, own[:1]), ("dark", own[1:2])):
        calls.clear()
        call.update(oms_guidance_scale=scale, oms_negative_prompt=negative, oms_step="ddim", latents=pure)
        found = handed_over(monkeypatch, pipeline, **call)["latents"]
        assert [len(args[0]) for args, _ in calls] == [2]  # both branches in one batch
        null, conditional = network(pure, null_text).sample, network(pure, own[2:]).sample
        assert (null - conditional).std() > 0.01
        x0 = -(null + scale * (conditional - null))
        torch.testing.assert_close(found, math.sqrt(a) * x0 + math.sqrt(1 - a) * pure, atol=1e-5, rtol=1e-4)


def test_guidance_of_one_is_one_branch_and_one_call():
    _, pipeline, call = case("stable_diffusion")
    calls = record_calls(pipeline.oms_module)
    out = pipeline(**call, generator=seeded()).images
    assert [len(args[0]) for args, _ in calls] == [1]
    assert torch.equal(pipeline(**call, oms_negative_prompt="dark", generator=seeded()).images, out)


def test_guidance_by_classes_uses_the_null_label():
    base, pipeline, call = case("classes")
    pure = torch.randn(1, 1, 8, 8)
    found = pipeline(**call, oms_guidance_scale=3.0, oms_step="ddim", latents=pure).images
    null, one = (pipeline.oms_module(pure, torch.tensor([label])).sample for label in (3, 1))
    base.scheduler.set_timesteps(3)
    a = base.scheduler.alphas_cumprod[base.scheduler.timesteps[0]].item()
    latents = math.sqrt(a) * -(null + 3 * (one - null)) + math.sqrt(1 - a) * pure
    torch.testing.assert_close(found, base(**call, latents=latents.detach()).images, atol=1e-4, rtol=1e-5)


def test_oms_prompt_acts_through_the_step_only(monkeypatch):
    base, pipeline, call = case("stable_diffusion")
    plain = pipeline(**call, generator=seeded()).images
    dark = pipeline(**call, oms_prompt="dark", generator=seeded()).images
    assert (plain - dark).abs().max() > 0.01
    found = handed_over(monkeypatch, pipeline, **call, oms_prompt="dark", generator=seeded())
    assert found.pop("prompt") == "a cat"
    latents = found.pop("latents")
    assert found.pop("generator").initial_seed() == 0
    assert found == {k: v for k, v in call.items() if k != "prompt"}
    torch.testing.assert_close(base(**call, latents=latents).images, dark, atol=0, rtol=0)
    same = pipeline(**call, oms_prompt="a cat", generator=seeded()).images
    assert torch.equal(same, plain)


def test_classes_of_the_step_are_those_of_the_base_unless_given():
    _, pipeline, call = case("classes")
    draw = lambda **more: pipeline(**{**call, **more}, generator=seeded()).images  # noqa: E731
    assert torch.equal(draw(oms_class_labels=1), draw())
    assert torch.equal(draw(oms_class_labels=torch.tensor([1])), draw())
    assert not torch.equal(draw(oms_class_labels=[2]), draw())
    assert torch.equal(draw(class_labels=1), draw())


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_xl", "control_net", "lcm"])
def test_batches_are_singles(name):
    _, pipeline, call = case(name)
    extra = {"oms_guidance_scale": 2.0}
    prompts, styles, negatives = ["a cat", "a dog"], ["dark", "bright"], ["red", "blue"]
    both = {"prompt": prompts, "oms_prompt": styles, "oms_negative_prompt": negatives}
    found = pipeline(**{**call, **both}, **extra, generator=[seeded(5), seeded(6)]).images
    for i in range(2):
        one = {key: values[i] for key, values in both.items()}
        single = pipeline(**{**call, **one}, **extra, generator=seeded(5 + i)).images
        torch.testing.assert_close(found[i : i + 1], single, atol=5e-4, rtol=1e-4)


def test_batches_of_pixels_are_singles():
    _, pipeline, call = case("classes")
    found = pipeline(**{**call, "class_labels": [0, 2]}, generator=[seeded(5), seeded(6)]).images
    for i, label in enumerate((0, 2)):
        single = pipeline(**{**call, "class_labels": label}, generator=seeded(5 + i)).images
        torch.testing.assert_close(found[i : i + 1], single, atol=1e-4, rtol=1e-4)
    assert len(pipeline(**{**call, "class_labels": 2}, batch_size=3).images) == 3
    assert len(case("pixels")[1](batch_size=2, num_inference_steps=1).images) == 2
    assert len(case("pixels")[1](latents=torch.randn(3, 1, 8, 8), num_inference_steps=1).images) == 3


def test_images_per_prompt():
    _, pipeline, call = case("stable_diffusion")
    prompts, noise = ["a cat", "a dog"], torch.randn(6, 4, 8, 8)
    extra = {"oms_guidance_scale": 2.0, "oms_negative_prompt": ["red", "blue"], "oms_step": "ddim"}
    call = {**call, **extra}
    found = pipeline(**{**call, "prompt": prompts}, num_images_per_prompt=3, latents=noise).images
    assert found.shape == (6, 4, 8, 8)
    single = pipeline(
        **{**call, "prompt": "a dog", "oms_negative_prompt": "blue"}, num_images_per_prompt=1, latents=noise[4:5]
    ).images
    torch.testing.assert_close(found[4:5], single, atol=5e-4, rtol=1e-4)
    one = pipeline(**call | {"prompt": prompts}, num_images_per_prompt=3, generator=seeded()).images
    again = pipeline(**call | {"prompt": prompts}, num_images_per_prompt=3, generator=seeded()).images
    assert torch.equal(one, again)


def test_a_generator_per_image(monkeypatch):
    _, pipeline, call = case("stable_diffusion")
    generators = [seeded(1), seeded(2)]
    found = handed_over(monkeypatch, pipeline, **call, num_images_per_prompt=2, generator=generators)
    assert found["generator"] is generators
    for i, generator in enumerate((seeded(1), seeded(2))):
        single = handed_over(monkeypatch, pipeline, **call, generator=generator)["latents"]
        torch.testing.assert_close(found["latents"][i : i + 1], single, atol=1e-5, rtol=1e-5)
        # Two draws of each were taken, so the next one is the third.
        assert torch.equal(torch.randn(1, generator=generators[i]), torch.randn(1, generator=generator))


@pytest.mark.parametrize(
    ("name", "size", "shape"),
    [
        ("stable_diffusion", {"height": 32, "width": 24}, (16, 12)),
        ("stable_diffusion_xl", {"height": 32, "width": 24}, (16, 12)),
        ("stable_diffusion_xl", {"height": 32}, (16, 8)),
        ("control_net", {}, (8, 12)),
        ("control_net", {"height": 32, "width": 24}, (16, 12)),
        ("control_net", {"image": [PICTURE[0]]}, (8, 12)),
        ("control_net", {"image": PICTURE.expand(2, -1, -1, -1), "prompt": ["a cat", "a dog"]}, (8, 12)),
    ],
)
def test_sizes(monkeypatch, name, size, shape):
    base, pipeline, call = case(name)
    call = {**call, **size}
    assert base(**call).images.shape[2:] == shape
    assert handed_over(monkeypatch, pipeline, **call)["latents"].shape[2:] == shape
    assert pipeline(**call).images.shape[2:] == shape


# ---------------------------------------------------------------- what passes through


def test_every_argument_of_the_base_passes_through(monkeypatch):
    for name in CASES:
        base, pipeline, call = case(name)
        names = [p for p in inspect.signature(base.__call__).parameters if p not in ("kwargs", "image")]
        ours = {"prompt", "generator", "latents", "num_inference_steps", "height", "width", "num_images_per_prompt"}
        ours |= {"prompt_embeds", "class_labels", "batch_size", "timesteps", "sigmas", "output_type"}
        marks = {p: 1.5 if guides(p) else object() for p in names if p not in ours and p not in call}
        found = handed_over(monkeypatch, pipeline, **call, **marks)
        assert {p: found[p] for p in marks} == marks
        assert found.keys() == {*call, *marks, "latents", "generator"}


@pytest.mark.parametrize("oms", [True, False])
def test_unknown_arguments_get_the_nearest_name(oms):
    _, pipeline, call = case("pixels")
    with pytest.raises(
        ValueError,
        match=r"`gidance_scale` must be an argument of ImageGenerationPipeline or .* did you mean 'guidance_scale'\?",
    ):
        pipeline(**call, gidance_scale=2.0, oms=oms)
    with pytest.raises(ValueError, match=r"`zzz` must be an argument of ImageGenerationPipeline or of OMSPipeline\."):
        pipeline(**call, zzz=1, oms=oms)
    with pytest.raises(ValueError, match="`oms_promt` must be an argument .* did you mean 'oms_prompt'"):
        case("stable_diffusion")[1](**case("stable_diffusion")[2], oms_promt="dark", oms=oms)


def test_embeddings_instead_of_prompts():
    base, pipeline, call = case("stable_diffusion")
    call.pop("prompt")
    own = features([(base.tokenizer, base.text_encoder)], ["a cat", "", "dark"])
    expected = pipeline("a cat", **call, oms_prompt="dark", oms_guidance_scale=2.0, generator=seeded()).images
    embedded = {"prompt_embeds": own[:1], "negative_prompt_embeds": own[1:2]}
    for oms in (
        {"oms_prompt": "dark"},
        {"oms_prompt_embeds": own[2:], "oms_negative_prompt_embeds": own[1:2]},
        {"oms_prompt_embeds": own[2:]},
    ):
        found = pipeline(**call, **embedded, **oms, oms_guidance_scale=2.0, generator=seeded()).images
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="`oms_prompt` or `oms_prompt_embeds` must be given"):
        pipeline(**call, **embedded)


def test_callbacks_of_the_base_see_every_step_and_can_edit():
    base, pipeline, call = case("stable_diffusion")
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((pipe, step))
        return {"latents": torch.full_like(tensors["latents"], 7.0)} if step == 2 else {}

    out = pipeline(**call, callback_on_step_end=callback).images
    assert seen == [(base, 0), (base, 1), (base, 2)]
    assert (out == 7).all()


def test_what_the_base_returns_is_returned():
    base, pipeline, call = case("stable_diffusion")
    expected = pipeline(**call, generator=seeded())
    assert type(expected) is type(base(**call))
    tuple_ = pipeline(**call, generator=seeded(), return_dict=False)
    assert isinstance(tuple_, tuple)
    assert torch.equal(tuple_[0], expected.images)
    assert pipeline(**{**call, "output_type": "pil"}).images[0].size == (16, 16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["stable_diffusion", "classes"])
def test_a_half_precision_module_in_front_of_a_full_base(monkeypatch, name, dtype):
    _, pipeline, call = case(name)
    full = handed_over(monkeypatch, pipeline, **call, oms_guidance_scale=2.0, generator=seeded())["latents"]
    pipeline.oms_module.to(dtype)
    half = handed_over(monkeypatch, pipeline, **call, oms_guidance_scale=2.0, generator=seeded())["latents"]
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, atol=0.02, rtol=0)
    assert not torch.equal(half, full)
    assert pipeline(**call).images.isfinite().all()


def test_a_half_precision_base_gets_its_dtype(monkeypatch):
    _, pipeline, call = case("stable_diffusion")
    pipeline.to(torch.bfloat16)
    assert handed_over(monkeypatch, pipeline, **call)["latents"].dtype == torch.bfloat16
    assert pipeline(**call).images.dtype == torch.bfloat16


@pytest.mark.skipif(not is_peft_available(), reason="LoRA weights need peft")
def test_lora_of_the_base():
    from peft import LoraConfig

    base, pipeline, call = case("stable_diffusion")
    before = pipeline(**call, generator=seeded()).images
    torch.manual_seed(0)
    base.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    after = pipeline(**call, generator=seeded()).images
    assert not torch.equal(after, before)
    base.disable_lora()
    torch.testing.assert_close(pipeline(**call, generator=seeded()).images, before, atol=1e-5, rtol=0)


def test_own_encoder_comes_before_the_bases():
    base = stable_diffusion()
    other = text_encoder(seed=9)
    own = quiet(OMSPipeline(module(), base, oms_text_encoder=other, oms_tokenizer=tokenizer()))
    call = {"prompt": "a cat", "num_inference_steps": 2, "output_type": "latent"}
    found = own(**call, generator=seeded()).images
    embeds = features([(tokenizer(), other)], ["a cat"])
    embedded = OMSPipeline(module(), base)(**call, oms_prompt_embeds=embeds, generator=seeded()).images
    torch.testing.assert_close(found, embedded, atol=1e-5, rtol=1e-5)
    assert not torch.equal(found, quiet(OMSPipeline(module(), base))(**call, generator=seeded()).images)


def test_two_own_encoders_are_joined():
    first, second = text_encoder(seed=9), text_encoder(16, seed=10, projection=True)
    base = stable_diffusion()
    pipeline = OMSPipeline(module(WIDTH + 16), base, first, tokenizer(), second, tokenizer())
    embeds = features([(tokenizer(), first), (tokenizer(), second)], ["a cat"])
    call = {"prompt": "a cat", "num_inference_steps": 2, "output_type": "latent"}
    found = pipeline(**call, generator=seeded()).images
    expected = pipeline(**call, oms_prompt_embeds=embeds, generator=seeded()).images
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_one_encoder_of_sdxl_serves_a_narrow_module():
    base = stable_diffusion_xl()
    pipeline = quiet(OMSPipeline(module(), base))
    call = {"prompt": "a cat", "num_inference_steps": 2, "output_type": "latent"}
    embeds = features([(base.tokenizer, base.text_encoder)], ["a cat"])
    found = pipeline(**call, generator=seeded()).images
    expected = pipeline(**call, oms_prompt_embeds=embeds, generator=seeded()).images
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- as a Diffusers pipeline


def test_the_progress_bar_shows_the_step(capsys):
    _, pipeline, call = case("pixels")
    pipeline(**call)
    assert capsys.readouterr().err == ""
    pipeline.set_progress_bar_config()
    pipeline(**call)
    shown = capsys.readouterr().err
    assert "one more step: 100%" in shown
    assert "1/1" in shown
    assert "3/3" in shown
    OMSPipeline(pixel_module(), quiet(pixels()))(**call)
    assert "one more step: 100%" in capsys.readouterr().err


def test_to_moves_both():
    base, pipeline, _ = case("stable_diffusion")
    assert pipeline.to(torch.bfloat16) is pipeline
    networks = (pipeline.oms_module, base.unet, base.vae, base.text_encoder)
    assert {network.dtype for network in networks} == {torch.bfloat16}
    pipeline.to("meta")
    assert {network.device.type for network in networks} == {"meta"}


@pytest.mark.gpu
@pytest.mark.parametrize("base_first", [False, True])
def test_offload_of_both(base_first):
    base, pipeline, call = case("stable_diffusion")
    expected = pipeline.to("cuda")(**call, generator=seeded()).images.cpu()
    pipeline.to("cpu")
    if base_first:
        base.enable_model_cpu_offload()
    pipeline.enable_model_cpu_offload()
    for _ in range(2):
        found = pipeline(**call, generator=seeded()).images.cpu()
        torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-3)
        assert {network.device.type for network in (pipeline.oms_module, base.unet, base.text_encoder)} == {"cpu"}


@pytest.mark.gpu
def test_module_and_base_on_two_devices():
    base, pipeline, call = case("stable_diffusion")
    expected = pipeline.to("cuda")(**call, generator=seeded()).images.cpu()
    pipeline.oms_module.to("cpu")
    torch.testing.assert_close(pipeline(**call, generator=seeded()).images.cpu(), expected, atol=1e-2, rtol=1e-3)


# ---------------------------------------------------------------- what does not fit


def img2img():
    return StableDiffusionImg2ImgPipeline(
        **stable_diffusion().components, requires_safety_checker=False
    )  # which begins from a noisy image


def flow_base():
    base = stable_diffusion()
    base.scheduler = FlowMatchEulerDiscreteScheduler()
    return base


@pytest.mark.parametrize(
    ("network", "base", "settings", "message"),
    [
        (module, lambda: object(), {}, "`sd_pipeline` must be a DiffusionPipeline, got object"),
        (pixel_module, stable_diffusion, {}, "must have latents of 1 channels as the module, got 4"),
        (
            module,
            stable_diffusion_xl,
            {"vae_scaling_factor": 0.18215, "vae_id": "org/vae"},
            r"scaling factor 0.18215 that the module was trained on \(org/vae\), got 0.13025",
        ),
        (pixel_module, pixels, {"vae_scaling_factor": 0.5}, "scaling factor 0.5 .*, got None"),
        (pixel_module, lambda: pixels(image_scale=2.0), {"image_scale": 1.0}, "`image_scale` 1.0 .*, got 2.0"),
        (
            pixel_module,
            lambda: DDPMPipeline(pixels().unet, DDPMScheduler()),
            {},
            r"must take `latents`, got DDPMPipeline.*ImageGenerationPipeline.from_pipe\(pipeline\)",
        ),
        (module, img2img, {}, "must start from noise, got StableDiffusionImg2ImgPipeline"),
        (module, flow_base, {}, "got FlowMatchEulerDiscreteScheduler: flow matching starts from pure noise"),
    ],
)
def test_refuses_bases_that_do_not_fit(network, base, settings, message):
    with pytest.raises(ValueError, match=message):
        OMSPipeline(network(), base(), **settings)


def test_bases_that_fit_are_taken():
    OMSPipeline(module(), stable_diffusion(), vae_scaling_factor=0.18215)
    OMSPipeline(pixel_module(), pixels(image_scale=2.0), image_scale=2.0)
    tiny = AutoencoderTiny()  # decodes the latents of another VAE as they are
    OMSPipeline(module(), stable_diffusion(vae=tiny), vae_scaling_factor=0.18215)


def test_a_scheduler_exchanged_later_is_checked_again():
    base, pipeline, call = case("pixels")
    base.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="flow matching starts from pure noise"):
        pipeline(**call)
    assert pipeline(**call, oms=False).images.isfinite().all()


def test_refuses_a_call_without_a_base():
    with pytest.raises(ValueError, match=r"`sd_pipeline` must be given: .*from_pretrained\(repo, base=pipeline\)"):
        OMSPipeline(module())("a cat")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("stable_diffusion", {"oms_guidance_scale": -1.0}, "`oms_guidance_scale` must be a number >= 0, got -1.0"),
        ("stable_diffusion", {"oms_guidance_scale": float("nan")}, "must be a number >= 0, got nan"),
        ("stable_diffusion", {"oms_guidance_scale": float("inf")}, "must be a number >= 0, got inf"),
        ("stable_diffusion", {"oms_guidance_scale": "2"}, "must be a number >= 0, got '2'"),
        ("stable_diffusion", {"oms_step": "euler"}, "`oms_step` must be 'ddpm' or 'ddim', got 'euler'"),
        ("stable_diffusion", {"oms_prompt": ["a", "b"]}, "`oms_prompt` must be one text or 1, as many as prompts"),
        (
            "stable_diffusion",
            {"oms_guidance_scale": 2.0, "oms_negative_prompt": ["a", "b", "c"]},
            "`oms_negative_prompt` must be one text or 1, .*, got 3",
        ),
        (
            "stable_diffusion",
            {"oms_prompt_embeds": torch.zeros(1, 3, 5)},
            r"`oms_prompt_embeds` must have the shape \(1, tokens, 8\), got \(1, 3, 5\)",
        ),
        (
            "stable_diffusion",
            {"oms_guidance_scale": 2.0, "oms_negative_prompt_embeds": torch.zeros(1, 3, 8)},
            "`oms_negative_prompt_embeds` must have 12 tokens, got 3",
        ),
        (
            "stable_diffusion",
            {"oms_prompt": "a", "oms_prompt_embeds": torch.zeros(1, 3, 8)},
            "`oms_prompt` must be left out where `oms_prompt_embeds` is given",
        ),
        ("stable_diffusion", {"oms_class_labels": 1}, "`oms_class_labels` must be left out: the module takes text"),
        ("stable_diffusion", {"generator": [seeded(), seeded()]}, "or a list of 1, got a list of 2"),
        ("stable_diffusion", {"generator": 3}, "`generator` must be one generator or a list of 1, got 3"),
        ("stable_diffusion", {"prompt": 3}, "`prompt` must be a text or a list of texts, got 3"),
        ("stable_diffusion", {"oms_prompt": 3}, "`oms_prompt` must be a text or a list of texts, got 3"),
        ("stable_diffusion", {"oms_prompt_embeds": 3}, "`oms_prompt_embeds` must be a tensor"),
        ("stable_diffusion", {"num_images_per_prompt": 0}, "`num_images_per_prompt` must be an integer >= 1, got 0"),
        ("stable_diffusion", {"guidance_scale": "a"}, "`guidance_scale` must be a finite number, got 'a'"),
        ("stable_diffusion", {"latents": [1]}, "`latents` must be a tensor or left out, got list"),
        ("stable_diffusion", {"latents": torch.zeros(2, 4, 8, 8)}, r"`latents` must have the shape \(1, 4, 8, 8\)"),
        ("stable_diffusion", {"latents": torch.zeros(1, 1, 8, 8)}, r"`latents` must have the shape \(1, 4, 8, 8\)"),
        ("stable_diffusion", {"num_inference_steps": 0}, "`num_inference_steps` must be an integer >= 1, got 0"),
        ("stable_diffusion", {"height": 15, "width": 16}, "`height` must be a multiple of 2, got 15"),
        ("pixels", {"oms_prompt": "dark"}, "`oms_prompt` must be left out: the module takes no text"),
        ("pixels", {"oms_guidance_scale": 2.0}, "`oms_guidance_scale` must be 1 for a module without classes"),
        ("classes", {"oms_class_labels": 4}, r"`oms_class_labels` must be 1 or 1 labels in 0..3, got \[4\]"),
        ("classes", {"oms_class_labels": [0, 1]}, r"must be 1 or 1 labels in 0..3, got \[0, 1\]"),
    ],
)
def test_refuses_bad_arguments(name, arguments, message):
    _, pipeline, call = case(name)
    with pytest.raises(ValueError, match=message):
        pipeline(**{**call, **arguments})


def test_refuses_classes_that_are_not_given():
    pipeline = OMSPipeline(pixel_module(4), pixels())
    with pytest.raises(ValueError, match="`oms_class_labels` must be given: the module has classes"):
        pipeline(num_inference_steps=1)
    with pytest.raises(ValueError, match="`oms_guidance_scale` must be 1 for a base without a null label"):
        pipeline(num_inference_steps=1, oms_class_labels=1, oms_guidance_scale=2.0)


def test_refuses_encoders_of_another_width():
    call = {"prompt": "a cat", "num_inference_steps": 1}
    with pytest.raises(ValueError, match=r"must give 24 features a token.*got widths \[8\] from the base pipeline"):
        OMSPipeline(module(24), stable_diffusion())(**call)
    with pytest.raises(ValueError, match=r"must give 8 features a token.*got widths \[16\] from the module"):
        OMSPipeline(module(), stable_diffusion(), text_encoder(16), tokenizer())(**call)
    unknown = unet()  # no text encoder at all
    with pytest.raises(ValueError, match=r"got widths \[0\] from the module"):
        OMSPipeline(module(), stable_diffusion(), unknown, tokenizer())(**call)
