"""The pipeline of pixel and latent models: what its frames are, what it costs, what it refuses."""

import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler, UNet2DModel, VQModel
from PIL import Image

import diffusers_ext
from diffusers_ext import (
    ImageGenerationPipeline,
    NoiseDiffusionPipeline,
    ddim_decode,
    ddim_invert,
    lerp,
    noise_diffusion_mix,
    noise_levels,
    slerp,
)

ASSETS = Path(diffusers_ext.__file__).parent / "assets"
DIGITS = ASSETS / "digits" / "digits.npz"
METHODS = ["noise_diffusion", "slerp", "lerp", "noise"]


def unet(channels=1, out_channels=None, **config):
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=channels, out_channels=out_channels or channels, block_out_channels=(8, 16),
        norm_num_groups=4, layers_per_block=1, down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2, **config,
    ).eval()  # fmt: skip


def vq(channels=1):
    torch.manual_seed(1)
    return VQModel(
        in_channels=channels, out_channels=channels, latent_channels=2, num_vq_embeddings=16, norm_num_groups=4,
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=0.5,
    ).eval()  # fmt: skip


def kl(**config):
    torch.manual_seed(1)
    return AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=2, norm_num_groups=4, block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=0.5,
        **config,
    ).eval()  # fmt: skip


def make(network=None, scheduler=None, **parts):
    pipeline = NoiseDiffusionPipeline(network or unet(), scheduler or DDIMScheduler(clip_sample=False), **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def images(count, size=8, channels=1):
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(1))


QUICK = {"num_inference_steps": 10, "output_type": "latent"}
A, B = images(2)


def count_calls(pipeline):
    """Counts the network's calls and the samples in each."""
    batches, forward = [], pipeline.unet.forward

    def counted(sample, *args, **kwargs):
        batches.append(len(sample))
        return forward(sample, *args, **kwargs)

    pipeline.unet.forward = counted
    return batches


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_frames_are_inverted_mixed_and_decoded(method):
    """The same by hand, from the public functions."""
    pipeline = make(image_scale=0.5)
    generator = torch.Generator().manual_seed(7)
    found = pipeline(A, B, weights=[0.2, 0.7], method=method, gamma=0.3, generator=generator, **QUICK)
    levels = noise_levels(pipeline.scheduler, 10, 0.7)
    alpha = levels.alphas_cumprod[-1]

    def model(x, t):
        return pipeline.unet(x, t).sample

    x = (torch.stack([A, B]) * 2 - 1) * 0.5
    noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(7))
    z = ddim_invert(model, x, levels)
    if method == "noise":
        s = alpha**0.5 * x + (1 - alpha) ** 0.5 * noise
        mixed = slerp(s[:1], s[1:], [0.2, 0.7])
    elif method == "noise_diffusion":
        mixed = noise_diffusion_mix(
            z[:1], z[1:], x[:1], x[1:], [0.2, 0.7], alpha**0.5, (1 - alpha) ** 0.5, gamma=0.3, noise=noise
        )
    else:
        mixed = {"slerp": slerp, "lerp": lerp}[method](z[:1], z[1:], [0.2, 0.7])
    torch.testing.assert_close(found.images, ddim_decode(model, mixed[:, 0], levels), atol=1e-5, rtol=0)
    assert found.weights == [0.2, 0.7]
    assert set(found.diagnostics) == ({"frames"} if method == "noise" else {"frames", "inverted"})
    rms = mixed.square().mean((1, 2, 3, 4)).sqrt()
    torch.testing.assert_close(found.diagnostics["frames"].rms, rms.double(), atol=1e-5, rtol=0)


def test_the_end_without_correction_is_encoded_and_decoded():
    pipeline = make()
    options = {**QUICK, "weights": [0.0], "injection": 1.0, "boundary": None}
    levels = noise_levels(pipeline.scheduler, 10, 0.7)

    @torch.no_grad()
    def model(x, t):
        return pipeline.unet(x, t).sample

    state = ddim_invert(model, torch.stack([A, B]) * 2 - 1, levels)[:1]
    expected = ddim_decode(model, state, levels)
    torch.testing.assert_close(pipeline(A, B, **options).images, expected, atol=1e-6, rtol=0)
    exact = pipeline(A, B, **options, fixed_point_iterations=30).images
    torch.testing.assert_close(exact, A[None] * 2 - 1, atol=1e-4, rtol=0)
    assert (expected - (A[None] * 2 - 1)).abs().max() > 1e-3  # the correction had something to correct


def test_swapped_images_give_the_frames_backwards():
    pipeline = make()
    forth = pipeline(A, B, weights=[0.2, 0.9], **QUICK).images
    back = pipeline(B, A, weights=[0.1, 0.8], **QUICK).images
    torch.testing.assert_close(back.flip(0), forth, atol=2e-5, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_frames_do_not_depend_on_their_batch(method):
    pipeline, weights = make(), [0.25, 0.5, 0.75]
    options = {**QUICK, "method": method, "gamma": 0.4}

    def frames(weights, **more):
        return pipeline(A, B, weights=weights, generator=torch.Generator().manual_seed(5), **options, **more).images

    together = frames(weights)
    torch.testing.assert_close(frames(weights, frame_batch_size=2), together, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.cat([frames([w]) for w in weights]), together, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("method", "frame_batch_size", "expected"),
    [
        ("noise_diffusion", None, [2] * 7 + [9] * 7),
        ("slerp", 4, [2] * 7 + [4] * 14 + [1] * 7),
        ("noise", None, [9] * 7),
    ],
)
def test_calls_of_the_network(method, frame_batch_size, expected):
    pipeline = make()
    batches = count_calls(pipeline)
    pipeline(A, B, num_frames=9, method=method, frame_batch_size=frame_batch_size, **QUICK)
    assert batches == expected


def test_fixed_points_cost_calls_of_the_inversion_only():
    pipeline = make()
    batches = count_calls(pipeline)
    pipeline(A, B, num_frames=3, fixed_point_iterations=2, **QUICK)
    assert batches == [2] * 21 + [3] * 7


def test_path_and_pairs():
    pipeline, keys = make(), images(3)
    batches = count_calls(pipeline)
    path = pipeline(keys, num_frames=2, **QUICK)
    assert batches == [3] * 7 + [4] * 7  # every key image is inverted once
    assert path.weights == pytest.approx([1 / 3, 2 / 3, 4 / 3, 5 / 3])
    pairs = pipeline(keys[:2], keys[1:], num_frames=2, **QUICK)
    assert pairs.weights == pytest.approx([1 / 3, 2 / 3, 1 / 3, 2 / 3])
    torch.testing.assert_close(path.images, pairs.images, atol=1e-5, rtol=0)
    single = pipeline(keys[1], keys[2], num_frames=2, **QUICK)
    torch.testing.assert_close(path.images[2:], single.images, atol=1e-5, rtol=0)
    # A path shares its noise, pairs have their own.
    options = {**QUICK, "method": "noise", "weights": [0.0]}
    same = pipeline([A, A, B], generator=torch.Generator().manual_seed(0), **options).images
    torch.testing.assert_close(same[0], same[1], atol=1e-6, rtol=0)
    generators = [torch.Generator().manual_seed(s) for s in (0, 0, 1)]
    own = pipeline([A] * 3, [B] * 3, generator=generators, **options).images
    torch.testing.assert_close(own[0], own[1], atol=1e-6, rtol=0)
    assert (own[1] - own[2]).abs().max() > 1e-3


def test_legacy_timestep_moves_the_injection_only():
    pipeline = make()
    found = pipeline(A, B, weights=[0.5], legacy_timestep=True, boundary=None, **QUICK).images
    levels = noise_levels(pipeline.scheduler, 10, 0.7)

    @torch.no_grad()
    def model(x, t):
        return pipeline.unet(x, t).sample

    x = torch.stack([A, B]) * 2 - 1
    z = ddim_invert(model, x, levels)
    root = float(pipeline.scheduler.alphas_cumprod[700]) ** 0.5
    assert levels.timesteps[-1] == 600
    mixed = noise_diffusion_mix(z[:1], z[1:], x[:1], x[1:], 0.5, root, 0.0, boundary=None)[:, 0]
    torch.testing.assert_close(found, ddim_decode(model, mixed, levels), atol=1e-5, rtol=0)


def test_learned_variance_is_left_out():
    mean_only, both = unet(1), unet(1, out_channels=2)
    state = both.state_dict()
    for name, value in mean_only.state_dict().items():
        state[name][: len(value)] = value
    both.load_state_dict(state)
    found, expected = (make(network)(A, B, num_frames=1, **QUICK).images for network in (both, mean_only))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vqvae", "vae"])
def test_latent_models(name):
    autoencoder = vq() if name == "vqvae" else kl(shift_factor=0.1)
    pipeline = make(unet(2), **{name: autoencoder})
    first, second = images(2, 16)
    latents = pipeline(first, second, num_frames=2, **QUICK)
    assert latents.images.shape == (2, 2, 8, 8)
    x = torch.stack([first, second]) * 2 - 1
    clean = autoencoder.encode(x).latents * 0.5 if name == "vqvae" else None
    if clean is None:
        clean = (autoencoder.encode(x).latent_dist.mean - 0.1) * 0.5
    levels = noise_levels(pipeline.scheduler, 10, 0.7)

    def model(x, t):
        return pipeline.unet(x, t).sample

    z = ddim_invert(model, clean, levels)
    torch.testing.assert_close(
        latents.diagnostics["inverted"].rms, z.double().square().mean((1, 2, 3)).sqrt(), atol=1e-5, rtol=0
    )
    decoded = pipeline(first, second, num_frames=2, num_inference_steps=10, output_type="pt").images
    shift = 0.0 if name == "vqvae" else 0.1
    expected = (autoencoder.decode(latents.images / 0.5 + shift).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(decoded, expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="height and width divisible by 4, got 10 x 10"):
        pipeline(*images(2, 10), **QUICK)


def test_kinds_of_input_agree():
    pipeline = make(unet(3))
    pixels = (images(2, channels=3) * 255).round().byte()
    arrays = [image.permute(1, 2, 0).numpy() for image in pixels]
    expected = pipeline(*(pixels.float() / 255), num_frames=1, **QUICK).images
    for first, second in (
        pixels,
        arrays,
        [Image.fromarray(array) for array in arrays],
        [array.astype(np.float32) / 255 for array in arrays],
        [pixels[:1], pixels[1:]],
    ):
        torch.testing.assert_close(pipeline(first, second, num_frames=1, **QUICK).images, expected, atol=5e-5, rtol=0)
    grey = make()(Image.fromarray(arrays[0]), arrays[1][..., 0], num_frames=1, **QUICK).images
    assert grey.shape == (1, 1, 8, 8)


def test_output_types():
    pipeline, options = make(), {"num_frames": 2, "num_inference_steps": 4}
    outputs = {kind: pipeline(A, B, output_type=kind, **options) for kind in ("pil", "np", "pt", "latent")}
    expected = (outputs["latent"].images / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(outputs["pt"].images, expected, atol=1e-6, rtol=0)
    np.testing.assert_allclose(outputs["np"].images, expected.permute(0, 2, 3, 1).numpy(), atol=1e-6)
    pil = np.stack([np.asarray(image) for image in outputs["pil"].images])
    np.testing.assert_allclose(pil, (expected[:, 0] * 255).round().numpy(), atol=1)
    found = pipeline(A, B, output_type="pt", return_dict=False, **options)
    assert isinstance(found, tuple)
    torch.testing.assert_close(found[0], outputs["pt"].images, atol=0, rtol=0)
    assert found[1] == outputs["pt"].weights


def test_callbacks():
    pipeline, seen = make(), []

    def callback(pipe, step, timestep, tensors):
        assert pipe is pipeline
        seen.append((step, int(timestep), len(tensors["latents"])))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 5 else {}

    options = {"num_inference_steps": 4, "strength": 0.75, "num_frames": 3, "output_type": "latent"}
    found = pipeline(A, B, callback_on_step_end=callback, **options)
    assert seen == [(0, 0, 2), (1, 250, 2), (2, 500, 2), (3, 500, 3), (4, 250, 3), (5, 0, 3)]
    assert pipeline.num_timesteps == 6
    assert not found.images.any()


def test_a_callback_stops_the_call():
    pipeline, states = make(), []
    batches = count_calls(pipeline)

    def stop(pipe, step, timestep, tensors):
        states.append(tensors["latents"])
        pipe._interrupt = step == 8
        return {}

    found = pipeline(A, B, num_frames=3, callback_on_step_end=stop, **QUICK).images
    assert batches == [2] * 7 + [3] * 2
    assert torch.equal(found, states[-1])
    states.clear()
    pipeline(A, B, num_frames=3, callback_on_step_end=lambda p, *_: setattr(p, "_interrupt", True) or {}, **QUICK)
    assert batches == [2] * 7 + [3] * 2 + [2]


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_parts_are_the_whole(output_type):
    """Parts that begin and end inside of pairs, with numbers of each frame's own; every part counts its steps anew."""
    pipeline, seen = make(), []
    images_0, images_1 = images(4).split(2)
    options = {
        "num_inference_steps": 4, "num_frames": 3, "gamma": [0.0, 0.3, 0.6], "boundary": torch.tensor([1.5, 2.0, 9.0]),
    }  # fmt: skip

    def frames(**more):
        generator = torch.Generator().manual_seed(2)
        return pipeline(images_0, images_1, generator=generator, output_type=output_type, **options, **more)

    def count(pipe, step, timestep, tensors):
        seen.append((step, len(tensors["latents"])))
        return {}

    whole, parts = frames(), frames(frame_batch_size=4, callback_on_step_end=count)
    assert type(whole.images) is type(parts.images)
    for one, other in zip(whole.images, parts.images, strict=True):
        np.testing.assert_allclose(
            np.asarray(one, float), np.asarray(other, float), atol=1 if output_type == "pil" else 2e-5
        )
    assert whole.diagnostics["frames"].pooled["rms"] == pytest.approx(parts.diagnostics["frames"].pooled["rms"])
    assert seen == [(i, 4) for i in range(3)] + [(i, 4) for i in range(3, 6)] + [(i, 2) for i in range(3, 6)]


def test_parts_are_let_go(monkeypatch):
    """However many frames there are, two parts at most are held beside the result."""
    alive, most = set(), []

    def decode(network, mixed, *args):
        assert len(mixed) == 2
        part = mixed.clone()
        alive.add(id(part))
        weakref.finalize(part, alive.discard, id(part))
        most.append(len(alive))
        return part

    monkeypatch.setattr("diffusers_ext.methods.noise_diffusion.base.ddim_decode", decode)
    for output_type in ("pt", "latent", "pil"):
        make()(A, B, num_frames=20, frame_batch_size=2, num_inference_steps=2, output_type=output_type)
    assert len(most) == 30
    assert max(most) <= 2


def test_of_many_states_some_are_looked_at(monkeypatch):
    pipeline = make()
    options = {**QUICK, "method": "lerp"}
    found = pipeline(A, B, num_frames=40, frame_batch_size=7, **options).diagnostics["frames"]
    assert found.samples == (0, 3, 5, 8, 10, 13, 16, 18, 21, 23, 26, 29, 31, 34, 36, 39)
    weights = [(i + 1) / 41 for i in found.samples]
    expected = pipeline(A, B, weights=weights, **options).diagnostics["frames"]
    torch.testing.assert_close(found.rms, expected.rms, atol=1e-6, rtol=0)
    assert found.pooled["ks"] == pytest.approx(expected.pooled["ks"], abs=1e-5)
    assert expected.samples == tuple(range(16))
    assert str(found).splitlines()[2].split()[0] == "3"
    monkeypatch.setattr("diffusers_ext.methods.noise_diffusion.base.noise_diagnostics", None)
    assert pipeline(A, B, num_frames=2, diagnostics=False, **options).diagnostics == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    exact = make()(A, B, num_frames=2, **QUICK).images
    found = make(unet().to(dtype))(A, B, num_frames=2, **QUICK).images
    assert found.dtype == torch.float32  # states stay in full precision
    torch.testing.assert_close(found, exact, atol=0.05 if dtype == torch.float16 else 0.25, rtol=0)


def test_a_compiled_network():
    pipeline = make()
    expected = pipeline(A, B, num_frames=2, **QUICK).images
    pipeline.unet = torch.compile(pipeline.unet, backend="eager", fullgraph=True)
    torch.testing.assert_close(pipeline(A, B, num_frames=2, **QUICK).images, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_fixed_points_on_a_trained_model():
    """Encoding and decoding real digits by the shipped model: ten times nearer with a few calls more per step."""
    pipeline = NoiseDiffusionPipeline.from_pretrained(ASSETS / "digits-epsilon")
    levels = noise_levels(pipeline.scheduler, 200, 0.2)
    images = torch.tensor(np.load(DIGITS)["images"][:2, None]) / 127.5 - 1

    def model(x, t):
        return pipeline.unet(x, t).sample

    plain, corrected = (
        (ddim_decode(model, ddim_invert(model, images, levels, n), levels) - images).square().mean().sqrt()
        for n in (0, 4)
    )
    assert corrected < plain / 10


def test_repos_of_other_pipelines_load(tmp_path):
    ImageGenerationPipeline(unet(), DDIMScheduler(), image_scale=0.5).save_pretrained(tmp_path)
    pipeline = NoiseDiffusionPipeline.from_pretrained(tmp_path)
    assert pipeline.config["image_scale"] == 0.5
    taken = NoiseDiffusionPipeline.from_pipe(make(image_scale=2.0))
    assert taken.config["image_scale"] == 2.0


GOOD = {"image_0": A, "image_1": B, "num_inference_steps": 10}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": [0.5, 1.5]}, r"`weights` must lie in \[0, 1\], got \[0.5, 1.5\]"),
        ({"weights": []}, "`weights` must hold at least one number"),
        ({"weights": "half"}, r"`weights` must be numbers in \[0, 1\], got 'half'"),
        ({"weights": [0.1, float("nan")]}, "`weights` must be a number or a list of numbers"),
        ({"strength": 0.0}, r"`strength` must be a number in \(0, 1\]"),
        ({"strength": 0.01}, "`strength` must give at least one of 10 steps"),
        ({"num_inference_steps": -3}, "`num_inference_steps` must be an integer in 1..1000, got -3"),
        ({"gamma": 1.5}, r"`gamma` must lie in \[0, 1\], got 1.5"),
        ({"gamma": [0.1, 0.2], "num_frames": 3}, "`gamma` must be one number or 3, one per frame, got 2"),
        ({"gamma": torch.tensor([0.1, 0.2]), "num_frames": 1}, "`weights` must be as many as .* got 1 and 2"),
        ({"boundary": -1.0}, "`boundary` must be > 0 or None, got -1.0"),
        ({"method": "cubic"}, "`method` must be one of .*'noise_diffusion'.*, got 'cubic'"),
        ({"mu": 0.3}, "`mu` and `nu` must be given together"),
        ({"num_frames": 0}, "`num_frames` must be an integer >= 1, got 0"),
        ({"frame_batch_size": 0}, "`frame_batch_size` must be an integer >= 1, got 0"),
        ({"fixed_point_iterations": -1}, "`fixed_point_iterations` must be an integer >= 0"),
        ({"image_1": None}, "`image_1` must be given where `image_0` is a single image"),
        ({"image_1": [A, B]}, "`image_1` must hold 1 images as `image_0`, got 2"),
        ({"image_1": images(1, 16)}, r"`image_1` must have the size of `image_0`, got .*\(16, 16\) and \(8, 8\)"),
        ({"image_0": [A, images(1, 16)]}, "`image_0` must hold images of one size"),
        ({"image_0": images(1, 7), "image_1": images(1, 7)}, "`image_0` must have a height and width divisible by 2"),
        ({"image_0": []}, "`image_0` must hold at least one image"),
        ({"image_0": "cat.png"}, "`image_0` must hold PIL images, arrays or tensors, got str"),
        ({"image_0": images(1, 8, 3)}, "`image_0` must hold images of 1 channels, got the shape"),
        ({"image_0": A * float("nan")}, "`image_0` must be finite, got NaN"),
        ({"image_1": B * 255}, r"`image_1` must lie in \[0, 1\], got values from"),
        ({"image_1": (B * 255).long()}, "`image_1` must hold uint8 or floats .*, got int64"),
        ({"image_0": np.zeros(8)}, "`image_0` must hold arrays of shape"),
        ({"generator": [torch.Generator()] * 2}, "`generator` must be one generator or a list of 1"),
        ({"output_type": "jpg"}, "`output_type` must be one of .*'pil'.*, got 'jpg'"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "`callback_on_step_end_tensor_inputs` must be a subset"),
    ],
)
def test_refusals_come_before_any_work(change, message):
    pipeline = make()
    batches = count_calls(pipeline)
    with pytest.raises(ValueError, match=message):
        pipeline(**{**GOOD, **change})
    assert batches == []


def test_refused_components():
    with pytest.raises(ValueError, match="`scheduler` must be a DDIMScheduler, got EulerDiscreteScheduler"):
        make(scheduler=EulerDiscreteScheduler())(A, B)
    with pytest.raises(ValueError, match="`unet` must be unconditional, got one with classes"):
        make(unet(num_class_embeds=3))(A, B)
    with pytest.raises(ValueError, match="`vae` must be left out where `vqvae` is given"):
        make(unet(2), vqvae=vq(), vae=kl())
    with pytest.raises(ValueError, match="`image_scale` must be a number > 0, got 0"):
        make(image_scale=0)
