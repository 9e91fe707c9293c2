"""Stable Diffusion and XL: prompts, guidance, what the network is asked, and the sampler they come from."""

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler
from diffusers.callbacks import MultiPipelineCallbacks, SDCFGCutoffCallback, SDXLCFGCutoffCallback
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from diffusers_ext import (
    OMSPipeline,
    StableDiffusionNoiseDiffusionPipeline,
    StableDiffusionXLNoiseDiffusionPipeline,
    noise_diffusion_mix,
    noise_levels,
)
from tests.methods.oms.tiny import quiet, stable_diffusion, stable_diffusion_xl


def sd(**parts):
    components = {**stable_diffusion().components, **parts}
    return quiet(StableDiffusionNoiseDiffusionPipeline(**components, requires_safety_checker=False))


def xl():
    pipeline = quiet(
        StableDiffusionXLNoiseDiffusionPipeline(**stable_diffusion_xl().components, add_watermarker=False)
    )
    return pipeline


KINDS = {"sd": sd, "xl": xl}
A, B, C = torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(0))
QUICK = {"num_inference_steps": 10, "output_type": "latent"}


def record(pipeline):
    """Records batch size and text of every call of the network."""
    calls, forward = [], pipeline.unet.forward

    def recorded(sample, timestep, encoder_hidden_states, **kwargs):
        calls.append((len(sample), int(timestep), encoder_hidden_states.clone()))
        return forward(sample, timestep, encoder_hidden_states=encoder_hidden_states, **kwargs)

    pipeline.unet.forward = recorded
    return calls


def embed(pipeline, text):
    return pipeline.encode_prompt(text, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)[0]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_calls_of_the_network(kind):
    """2 K calls for any number of frames; guidance doubles the batch, not the calls; text goes from end to end."""
    pipeline = KINDS[kind]()
    calls = record(pipeline)
    pipeline(A, B, "a cat", "a dog", num_frames=3, **QUICK)
    assert [batch for batch, _, _ in calls] == [2] * 7 + [6] * 7
    cat, dog = embed(pipeline, "a cat"), embed(pipeline, "a dog")
    assert (cat - dog).abs().max() > 0.01
    torch.testing.assert_close(calls[0][2], torch.cat([cat, dog]), atol=1e-6, rtol=0)
    frames = torch.cat([0.75 * cat + 0.25 * dog, 0.5 * (cat + dog), 0.25 * cat + 0.75 * dog])
    torch.testing.assert_close(calls[7][2][3:], frames, atol=1e-6, rtol=1e-6)
    null = embed(pipeline, "") if kind == "sd" else torch.zeros_like(cat)  # XL's empty text is zeros
    torch.testing.assert_close(calls[7][2][:3], null.expand(3, -1, -1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_is_the_combination_of_both_branches(kind):
    """g frames are null + g (told - null) at every step: linear in g after a single step."""
    pipeline = KINDS[kind]()
    options = {"num_inference_steps": 2, "strength": 0.5, "output_type": "latent", "num_frames": 2}

    def frames(scale):
        return pipeline(A, B, "a cat", "a dog", negative_prompt="fog", guidance_scale=scale, **options).images

    null, told = frames(0.0), frames(1.0)
    assert (null - told).abs().max() > 1e-4
    torch.testing.assert_close(frames(5.0), null + 5 * (told - null), atol=1e-4, rtol=1e-4)


def test_the_end_is_reproduced_where_nothing_changes_it():
    """The same guidance both ways, no injection, no clipping, and an inversion that is exact."""
    pipeline = sd()
    found = pipeline(
        A, B, "a cat", "a dog", guidance_scale=3.0, inversion_guidance_scale=3.0, weights=[0.0], injection=1.0,
        boundary=None, fixed_point_iterations=10, num_inference_steps=40, output_type="latent",
    ).images  # fmt: skip
    with torch.no_grad():
        clean = pipeline.vae.encode(A[None] * 2 - 1).latent_dist.mean * pipeline.vae.config.scaling_factor
    torch.testing.assert_close(found, clean, atol=1e-3, rtol=0)
    assert clean.abs().max() > 0.1


@torch.no_grad()
def test_decoding_is_that_of_stable_diffusion():
    """From the states of a full-strength call on, the frames are what Diffusers' own pipeline draws."""
    base, states = stable_diffusion(), {}
    pipeline = quiet(StableDiffusionNoiseDiffusionPipeline(**base.components, requires_safety_checker=False))

    def keep(pipe, step, timestep, tensors):
        states[step] = tensors["latents"].clone()
        return {}

    options = {"num_inference_steps": 5, "guidance_scale": 4.0, "negative_prompt": "fog"}
    found = pipeline(
        A, B, "a cat", weights=[0.0], injection=1.0, boundary=None, strength=1.0, output_type="pt",
        callback_on_step_end=keep, **options,
    )  # fmt: skip
    expected = base("a cat", latents=states[4][:1], output_type="pt", **options).images
    torch.testing.assert_close(found.images, expected, atol=1e-4, rtol=0)


def test_prompts_embeddings_and_batches():
    pipeline = sd()
    quick = {**QUICK, "guidance_scale": 2.0}
    path = pipeline([A, B, C], prompt=["a", "b", "c"], num_frames=2, **quick)
    pairs = pipeline([A, B], [B, C], ["a", "b"], ["b", "c"], num_frames=2, **quick)
    torch.testing.assert_close(path.images, pairs.images, atol=5e-5, rtol=0)
    chunked = pipeline([A, B, C], prompt=["a", "b", "c"], num_frames=2, frame_batch_size=3, **quick)
    torch.testing.assert_close(path.images, chunked.images, atol=5e-5, rtol=0)
    embeds = torch.cat([embed(pipeline, text) for text in "abc"]).detach()
    given = pipeline(
        [A, B, C], prompt_embeds=embeds, negative_prompt_embeds=embed(pipeline, "").detach(), num_frames=2, **quick
    )
    torch.testing.assert_close(given.images, path.images, atol=5e-5, rtol=0)
    arc = pipeline([A, B, C], prompt=["a", "b", "c"], num_frames=2, prompt_interpolation="slerp", **quick)
    assert (arc.images - path.images).abs().max() > 1e-4


def test_xl_embeddings():
    """The network is told the same by embeddings as by prompts, pooled ones and sizes too."""
    pipeline, told = xl(), []
    forward = pipeline.unet.forward

    def recorded(sample, timestep, encoder_hidden_states, added_cond_kwargs, **kwargs):
        told.append([encoder_hidden_states, added_cond_kwargs["text_embeds"], added_cond_kwargs["time_ids"]])
        return forward(sample, timestep, encoder_hidden_states, added_cond_kwargs=added_cond_kwargs, **kwargs)

    pipeline.unet.forward = recorded
    pipeline(A, B, "a cat", negative_prompt="fog", num_frames=2, **QUICK)
    texts = (t.detach() for t in pipeline.encode_prompt("a cat", negative_prompt="fog"))
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    pipeline(A, B, num_frames=2, **dict(zip(names, texts, strict=True)), **QUICK)
    for by_prompt, by_embeds in zip(told[:14], told[14:], strict=True):
        for expected, found in zip(by_prompt, by_embeds, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert told[7][2].tolist() == [[16, 24, 0, 0, 16, 24]] * 4


def test_the_posterior_is_drawn_by_the_generator():
    pipeline = sd()

    def inverted(**options):
        return pipeline(A, B, num_frames=1, **options, **QUICK).diagnostics["inverted"].rms

    mean = inverted()
    first, again, other = (
        inverted(sample_posterior=True, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, mean)


def test_half_precision_with_a_vae_that_overflows():
    pipeline = sd()
    options = {"num_frames": 2, "num_inference_steps": 4, "output_type": "pt", "guidance_scale": 2.0}
    expected = pipeline(A, B, "a cat", **options).images
    half, seen = pipeline.to(torch.float16), []
    half.vae.register_to_config(force_upcast=True)
    decode = half.vae.decode
    half.vae.decode = lambda z, **kwargs: (seen.append(z.dtype), decode(z, **kwargs))[1]
    found = half(A, B, "a cat", **options).images
    assert seen == [torch.float32]
    assert half.vae.dtype == torch.float16
    torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0)


def test_flagged_frames_are_reported():
    class Checker(torch.nn.Module):
        device, dtype = torch.device("cpu"), torch.float32

        def forward(self, images, clip_input):
            return torch.zeros_like(images), [False, True]

    pipeline = sd()
    pipeline.safety_checker, pipeline.feature_extractor = Checker(), Features()
    found = pipeline(A, B, num_frames=2, num_inference_steps=4, output_type="pt")
    assert found.nsfw_content_detected == [False, True]
    assert not found.images[1].any()  # black
    assert (found.images[0] == 0.5).all()  # zero in [-1, 1]


class Features:
    """Stands for the checker's image processor."""

    def __call__(self, images, return_tensors):
        return self

    def to(self, device):
        self.pixel_values = torch.zeros(1)
        return self


CUTOFF = {"sd": SDCFGCutoffCallback, "xl": SDXLCFGCutoffCallback}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [None, 2])
def test_guidance_is_cut_off_by_the_callback_of_diffusers(kind, size):
    """From the cut on one branch is called, every frame with its own text, in every part of the frames."""
    pipeline = KINDS[kind]()
    calls = record(pipeline)
    options = {**QUICK, "num_frames": 3, "frame_batch_size": size, "guidance_scale": 4.0}
    cut = CUTOFF[kind](cutoff_step_ratio=None, cutoff_step_index=9)  # 7 of the inversion, then 3 guided
    found = pipeline(A, B, "a cat", "a dog", callback_on_step_end=cut, **options).images
    expected = [6] * 3 + [3] * 4 if size is None else [4] * 3 + [2] * 4 + [2] * 3 + [1] * 4
    assert [batch for batch, _, _ in calls] == [2] * 7 + expected
    for before, after in zip(calls[7:10], calls[10:13], strict=True):
        torch.testing.assert_close(after[2], before[2].chunk(2)[1], atol=0, rtol=0)
    assert (calls[10][2][0] - calls[10][2][-1]).abs().max() > 0.01  # the texts differ

    def off(pipe, step, timestep, tensors):
        pipe._guidance_scale = 1.0 if step >= 9 else pipe._guidance_scale
        return {}

    by_scale = pipeline(A, B, "a cat", "a dog", callback_on_step_end=off, **options).images
    torch.testing.assert_close(by_scale, found, atol=1e-5, rtol=0)
    early = CUTOFF[kind](cutoff_step_ratio=0.2)  # in the inversion: no frame is guided
    unguided = pipeline(A, B, "a cat", "a dog", **{**options, "guidance_scale": 1.0}).images
    early = pipeline(A, B, "a cat", "a dog", callback_on_step_end=MultiPipelineCallbacks([early]), **options).images
    torch.testing.assert_close(early, unguided, atol=1e-5, rtol=0)


@pytest.mark.parametrize("begin", [1.0, 7.0])
def test_guidance_set_by_a_callback_has_effect(begin):
    pipeline, seen = sd(), []

    def change(pipe, step, timestep, tensors):
        seen.append((pipe.guidance_scale, pipe.do_classifier_free_guidance))
        pipe._guidance_scale = 3.0 if step == 6 else pipe._guidance_scale
        return {}

    options = {**QUICK, "num_frames": 2, "negative_prompt": "fog"}
    found = pipeline(A, B, "a", "b", guidance_scale=begin, callback_on_step_end=change, **options).images
    expected = pipeline(A, B, "a", "b", guidance_scale=3.0, **options).images
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert seen == [(1.0, False)] * 7 + [(3.0, True)] * 7


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_callback_returns_is_used(kind):
    pipeline = KINDS[kind]()
    calls, shown = record(pipeline), {}
    names = type(pipeline)._callback_tensor_inputs
    assert names == type(pipeline).__bases__[1]._callback_tensor_inputs  # Diffusers' own

    def change(pipe, step, timestep, tensors):
        assert list(tensors) == names
        shown[step] = {name: None if value is None else value.clone() for name, value in tensors.items()}
        return {"prompt_embeds": torch.full_like(tensors["prompt_embeds"], 0.5)} if step == 8 else tensors

    pipeline(
        A, B, "a cat", "a dog", num_frames=2, callback_on_step_end=change, callback_on_step_end_tensor_inputs=names,
        **QUICK,
    )  # fmt: skip
    for step in range(7, 9):
        torch.testing.assert_close(shown[step]["prompt_embeds"], calls[step][2], atol=0, rtol=0)
        assert shown[step]["latents"].shape[0] == 2
    assert all((calls[step][2] == 0.5).all() for step in range(9, 14))
    assert not (calls[8][2] == 0.5).all()
    with pytest.raises(ValueError, match=r"`prompt_embeds` that a callback returns must have 2 or 4 rows"):
        pipeline(A, B, "a", callback_on_step_end=lambda *_: {"prompt_embeds": torch.zeros(3, 12, 8)}, **QUICK)


def test_properties_of_the_stock_pipeline():
    # Stable Diffusion's own `clip_skip` does not run with the present transformers, XL's does.
    pipeline, seen, scales = xl(), [], []
    assert (pipeline.guidance_scale, pipeline.clip_skip, pipeline.interrupt) == (1.0, None, False)
    encode = pipeline.encode_prompt
    pipeline.encode_prompt = lambda *args, **kwargs: (scales.append(kwargs["lora_scale"]), encode(*args, **kwargs))[1]

    def look(pipe, step, timestep, tensors):
        names = ("guidance_scale", "clip_skip", "cross_attention_kwargs", "guidance_rescale", "interrupt")
        seen.append([getattr(pipe, name) for name in names])
        return {}

    kwargs = {"scale": 0.5}
    pipeline(A, B, "a", clip_skip=1, cross_attention_kwargs=kwargs, callback_on_step_end=look, **QUICK)
    assert seen[-1] == [10.0, 1, kwargs, 0.0, False]
    assert scales == [0.5, 0.5]  # LoRA of the text encoder has its scale too


def test_a_callback_stops_the_call():
    pipeline, states = sd(), []
    calls = record(pipeline)

    def stop(pipe, step, timestep, tensors):
        states.append(tensors["latents"].clone())
        pipe._interrupt = step == 9
        return {}

    found = pipeline(A, B, "a", num_frames=3, frame_batch_size=2, callback_on_step_end=stop, **QUICK)
    assert len(calls) == 10
    assert pipeline.interrupt
    torch.testing.assert_close(found.images[:2], states[-1], atol=0, rtol=0)
    pipeline(A, B, "a", num_frames=1, **QUICK)  # the next call begins anew
    assert len(calls) == 24


def ip_adapter(pipeline):
    """Loads an IP-Adapter with random weights that takes image embeddings of 6 numbers."""
    torch.manual_seed(8)
    width, sizes = pipeline.unet.config.cross_attention_dim, []
    for name, processor in pipeline.unet.attn_processors.items():
        if "attn2" in name:
            attention = pipeline.unet.get_submodule(name.removesuffix(".processor"))
            sizes.append(attention.to_q.out_features)
            assert processor is not None
    keys = [f"{2 * i + 1}.to_{part}_ip.weight" for i in range(len(sizes)) for part in "kv"]
    weights = {key: torch.randn(sizes[i // 2], width) for i, key in enumerate(keys)}
    projection = {
        "proj.weight": torch.randn(4 * width, 6), "proj.bias": torch.randn(4 * width),
        "norm.weight": torch.ones(width), "norm.bias": torch.zeros(width),
    }  # fmt: skip
    pipeline.unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": weights}])
    return pipeline


@torch.no_grad()
def test_image_prompts_are_those_of_stable_diffusion():
    """From the states on, the frames are what Diffusers' own pipeline draws with the same image prompt."""
    base = ip_adapter(stable_diffusion())
    pipeline = quiet(StableDiffusionNoiseDiffusionPipeline(**base.components, requires_safety_checker=False))
    embeds, states = [torch.randn(2, 1, 6)], {}

    def keep(pipe, step, timestep, tensors):
        states[step] = tensors["latents"].clone()
        return {}

    image = {"ip_adapter_image_embeds": embeds}
    options = {"num_inference_steps": 5, "guidance_scale": 4.0, "output_type": "latent"}
    ends = {"weights": [0.3, 0.6], "injection": 1.0, "boundary": None, "strength": 1.0}
    found = pipeline(A, B, "a cat", **ends, callback_on_step_end=keep, **options, **image).images
    state = noise_diffusion_mix_of(pipeline, states[4], ends)
    for i in range(2):
        expected = base("a cat", latents=state[i : i + 1], **options, **image).images
        torch.testing.assert_close(found[i : i + 1], expected, atol=1e-4, rtol=1e-4)
    other = pipeline(A, B, "a cat", **ends, **options, ip_adapter_image_embeds=[-embeds[0]]).images
    assert (other - found).abs().max() > 1e-3


def noise_diffusion_mix_of(pipeline, states, ends):
    clean = pipeline.vae.encode(torch.stack([A, B]) * 2 - 1).latent_dist.mean * pipeline.vae.config.scaling_factor
    levels = noise_levels(pipeline.scheduler, 5)
    alpha = levels.alphas_cumprod[-1]
    return noise_diffusion_mix(
        states[:1], states[1:], clean[:1], clean[1:], ends["weights"], alpha**0.5, (1 - alpha) ** 0.5,
        injection=1.0, boundary=None,
    )[:, 0]  # fmt: skip


@torch.no_grad()
def test_image_prompts_are_encoded_and_checked():
    pipeline = ip_adapter(sd())
    torch.manual_seed(9)
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPVisionConfig(**size, image_size=8, patch_size=4, projection_dim=6)
    pipeline.image_encoder = CLIPVisionModelWithProjection(config).eval()
    picture = torch.rand(1, 3, 8, 8)
    found = pipeline(A, B, "a", num_frames=2, ip_adapter_image=picture, **QUICK).images
    one = pipeline.image_encoder(picture).image_embeds[None]
    embeds = [torch.cat([torch.zeros_like(one), one])]
    same = pipeline(A, B, "a", num_frames=2, ip_adapter_image_embeds=embeds, **QUICK).images
    torch.testing.assert_close(found, same, atol=1e-5, rtol=0)
    for change, message in (
        ({}, "`ip_adapter_image` must be given: an IP-Adapter is loaded"),
        (
            {"ip_adapter_image": picture, "ip_adapter_image_embeds": embeds},
            "`ip_adapter_image` must be left out where",
        ),
        ({"ip_adapter_image_embeds": [one]}, r"`ip_adapter_image_embeds` must hold tensors of shape \(2, images"),
        ({"ip_adapter_image": [picture, picture]}, "`ip_adapter_image` must be a list of 1, one for each IP-Adapter"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline(A, B, "a", **QUICK, **change)
    with pytest.raises(ValueError, match="`ip_adapter_image` must be left out: no IP-Adapter is loaded"):
        sd()(A, B, "a", ip_adapter_image=picture, **QUICK)


def test_the_schedule_is_the_one_that_the_scheduler_uses(tmp_path):
    """Diffusers corrects `steps_offset` when the pipeline is made; frames are the same after saving and loading."""
    with pytest.warns(FutureWarning, match="steps_offset"):
        pipeline = sd(scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False))
    assert noise_levels(pipeline.scheduler, 4, 0.75).timesteps == (1, 251, 501)
    expected = pipeline(A, B, "a", num_frames=1, **QUICK).images
    pipeline.save_pretrained(tmp_path)
    loaded = quiet(StableDiffusionNoiseDiffusionPipeline.from_pretrained(tmp_path))
    torch.testing.assert_close(loaded(A, B, "a", num_frames=1, **QUICK).images, expected, atol=1e-6, rtol=0)
    changed = DDIMScheduler()
    changed.register_to_config(steps_offset=1, timestep_spacing="leading")
    assert noise_levels(changed, 4, 0.75).timesteps == (1, 251, 501)


def test_levels_of_the_reference_settings():
    levels = noise_levels(sd().scheduler, 200, 0.7)
    assert (len(levels.timesteps), levels.timesteps[-1]) == (140, 696)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": ["a", "b"]}, r"`prompt` must be one text or 1, one per image, got \['a', 'b'\]"),
        ({"prompt_1": ["a", "b"]}, "`prompt_1` must be one text or 1"),
        ({"prompt": 3}, "`prompt` must be one text or 1"),
        ({"prompt_embeds": torch.zeros(3, 12, 8)}, "`prompt_embeds` must be a tensor whose first dimension is 1 or 2"),
        ({"prompt": "a", "prompt_embeds": torch.zeros(2, 12, 8)}, "`prompt` and `prompt_1` must be left out where"),
        ({"negative_prompt": ["a"]}, r"`negative_prompt` must be one text, got \['a'\]"),
        (
            {"prompt_embeds": torch.zeros(2, 12, 8), "negative_prompt_embeds": torch.zeros(1, 9, 8)},
            r"`negative_prompt_embeds` must have the shape \(1, \(12, 8\)\)",
        ),
        ({"pooled_prompt_embeds": torch.zeros(2, 8)}, "`pooled_prompt_embeds` must be left out: only Stable Diff"),
        ({"image_1": None, "image_0": [A, B], "prompt_1": "a"}, "`prompt_1` must be left out on a path"),
        ({"guidance_scale": -1.0}, "`guidance_scale` must be a number >= 0, got -1.0"),
        ({"guidance_scale": float("inf")}, "`guidance_scale` must be a number >= 0, got inf"),
        ({"clip_skip": 99}, "`clip_skip` must be an integer in 0"),
        ({"cross_attention_kwargs": 3}, "`cross_attention_kwargs` must be a dict or left out, got 3"),
        ({"gamma": "a"}, "`gamma` must be a number or a list of numbers, one per frame, got 'a'"),
        ({"generator": 3}, "`generator` must be one generator or a list of 1, got 3"),
        ({"callback_on_step_end": 3}, "`callback_on_step_end` must be callable or left out, got 3"),
        ({"callback_on_step_end_tensor_inputs": None}, "`callback_on_step_end_tensor_inputs` must be a subset"),
        ({"prompt_interpolation": "cubic"}, "`prompt_interpolation` must be 'lerp' or 'slerp', got 'cubic'"),
        ({"image_0": torch.rand(3, 15, 24)}, "`image_0` must have a height and width divisible by 2, got 15 x 24"),
        (
            {"sample_posterior": True, "generator": [torch.Generator()]},
            "`generator` must be one generator where `sample_posterior` is on",
        ),
        ({"strength": 0.01}, "`strength` must give at least one of 10 steps"),
    ],
)
def test_refusals_come_before_any_work(change, message):
    pipeline = sd()
    calls = record(pipeline)
    encode, encoded = pipeline.vae.encode, []
    pipeline.vae.encode = lambda *args: (encoded.append(1), encode(*args))[1]
    with pytest.raises(ValueError, match=message):
        pipeline(**{"image_0": A, "image_1": B, **QUICK, **change})
    assert calls == []
    assert encoded == []


@pytest.mark.parametrize("kind", KINDS)
def test_lora_of_text_encoders_is_refused_before_any_is_loaded(kind, monkeypatch, tmp_path):
    """Transformers would refuse them once the network's are in."""
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "99.0")
    pipeline = KINDS[kind]()
    name = next(n for n, m in pipeline.unet.named_modules() if n.endswith("to_q"))
    width = pipeline.unet.get_submodule(name).in_features
    unet = {f"unet.{name}.lora_{x}.weight": torch.ones(s) for x, s in (("A", (1, width)), ("B", (width, 1)))}
    text = {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(1, 16)}
    save_file({**unet, **text}, tmp_path / "pytorch_lora_weights.safetensors")
    message = r"LoRA weights of the network alone, or peft be at least 99.0, .* of \['text_encoder'\]"
    base = {"sd": stable_diffusion, "xl": stable_diffusion_xl}[kind]()
    for made in (pipeline, OMSPipeline(None, base)):
        for weights in ({**unet, **text}, tmp_path):
            with pytest.raises(ValueError, match=message):
                made.load_lora_weights(weights)
    assert not any("lora" in key for key in pipeline.unet.state_dict())
    pipeline.load_lora_weights(unet)
    assert any("lora" in key for key in pipeline.unet.state_dict())


def test_refused_components():
    with pytest.raises(ValueError, match="`scheduler` must be a DDIMScheduler, got PNDMScheduler. To exchange it"):
        sd(scheduler=PNDMScheduler(skip_prk_steps=True, steps_offset=1))(A, B)
    with pytest.raises(ValueError, match="must be given together or not at all"):
        xl()(A, B, prompt_embeds=torch.zeros(2, 12, 16), **QUICK)
