"""Bases whose network is a transformer: PixArt, Hunyuan-DiT, DiT by labels; and flow models, which are refused."""

import json
import math

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
)
from diffusers.configuration_utils import register_to_config
from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import ASPECT_RATIO_256_BIN
from PIL import Image
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from diffusers_ext import OMSPipeline, OMSUNet2DModel, load_images
from diffusers_ext.generation.text import encode
from diffusers_ext.methods.oms.base import bind, latent_shape
from tests.tiny_pipelines import VOCAB, autoencoder, build, pixart_sigma, seeded, t5
from tests.tiny_tokenizers import plain_tokenizer, t5_tokenizer

from .gaussian import ALPHAS, STABLE_DIFFUSION, ExactNoise, ExactStep
from .test_training import config, train
from .tiny import PIXELS, TEXT_BLOCKS, module, quiet

LABELS = 1001  # those of ImageNet, and none of them


def hunyuan_dit():
    bert = BertConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    return HunyuanDiTPipeline(
        transformer=HunyuanDiT2DModel(
            sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
            hidden_size=16, cross_attention_dim=16, cross_attention_dim_t5=32, pooled_projection_dim=16, text_len=77,
            text_len_t5=256,
        ),
        vae=autoencoder(), text_encoder=BertModel(bert), tokenizer=plain_tokenizer(), text_encoder_2=t5(32),
        tokenizer_2=t5_tokenizer(), scheduler=DDPMScheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def class_module():
    torch.manual_seed(3)
    return OMSUNet2DModel(**{**PIXELS, "in_channels": 4, "out_channels": 4}, num_class_embeds=LABELS).eval()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def level(base, steps):
    scheduler = type(base.scheduler).from_config(base.scheduler.config)
    scheduler.set_timesteps(steps)
    return scheduler.alphas_cumprod[scheduler.timesteps[0]].item()


# ---------------------------------------------------------------- sampling

TEXT = {
    "PixArt": (lambda: build("PixArtSigmaPipeline"), 32, (8, 8)),
    "Hunyuan-DiT": (lambda: seeded(hunyuan_dit), 16, (8, 8)),
}
PLAIN = {"use_resolution_binning": False, "height": 16, "width": 16, "output_type": "latent"}


@pytest.mark.parametrize("name", TEXT)
def test_text_bases_by_hand(name):
    """The step in front of the pipeline's own call, with the text of its first encoder."""
    make, width, size = TEXT[name]
    base = make()
    network, call = module(width), {**PLAIN, "prompt": "a red dog", "num_inference_steps": 2}
    random = generator()
    pure, fresh = (torch.randn(1, 4, *size, generator=random) for _ in range(2))
    with torch.no_grad():
        prediction = network(pure, encode(["a red dog"], [(base.tokenizer, base.text_encoder)], pure.device)).sample
    a = level(base, 2)
    latents = math.sqrt(a) * -prediction + math.sqrt(1 - a) * fresh
    expected = base(**call, latents=latents, generator=random).images
    found = quiet(OMSPipeline(network, base))(**call, generator=generator()).images
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert prediction.std() > 0.01
    more = quiet(OMSPipeline(network, base))(**{**call, "num_images_per_prompt": 2}, generator=generator())
    assert more.images.shape == (2, 4, *size)


def test_padding_does_not_reach_the_text():
    """Encoders that are not CLIP's are told which tokens count: the same word with more padding behind it."""
    base = build("PixArtSigmaPipeline")
    tokens = base.tokenizer("a red dog", return_tensors="pt").input_ids
    with torch.no_grad():
        alone = base.text_encoder(tokens).last_hidden_state
    found = encode(["a red dog"], [(base.tokenizer, base.text_encoder)], tokens.device)
    assert found.shape[1] > tokens.shape[1]
    torch.testing.assert_close(found[:, : tokens.shape[1]], alone, atol=1e-5, rtol=1e-5)


def test_sizes_are_those_of_the_pipeline():
    """PixArt draws at the nearest of its own shapes; the step asks it for them."""
    base = seeded(pixart_sigma)
    base.transformer.register_to_config(sample_size=32)  # which has a table of shapes
    arguments = bind(base, {"prompt": "a", "height": 200, "width": 304}, ())
    state = torch.random.get_rng_state()
    shape = latent_shape(base, arguments, 3)
    assert torch.equal(torch.random.get_rng_state(), state)
    height, width = base.image_processor.classify_height_width_bin(200, 304, ratios=ASPECT_RATIO_256_BIN)
    assert shape == (3, 4, height // 2, width // 2)
    with pytest.raises(ValueError, match=r"`latents` must have the shape \(1, 4, 8, 8\), got \(1, 4, 9, 8\)"):
        latent_shape(base, {**arguments, **PLAIN, "latents": torch.zeros(1, 4, 9, 8)}, 1)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_dit_starts_behind_the_step(guidance_scale):
    """DiT's call takes no latents; by hand its loop does."""
    base, network = build("DiTPipeline"), class_module()
    base.scheduler = DDIMScheduler(clip_sample=False)
    random, labels = generator(), torch.tensor([3, 7])
    pure, fresh = (torch.randn(2, 4, 8, 8, generator=random) for _ in range(2))
    a = level(base, 3)
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(3)
    with torch.no_grad():
        null, one = (network(pure, x).sample for x in (torch.full((2,), 1000), labels))
        x = math.sqrt(a) * -(null + 2 * (one - null)) + math.sqrt(1 - a) * fresh
        for t in scheduler.timesteps:
            of_class, of_none = (
                base.transformer(x, timestep=t.expand(2), class_labels=y).sample[:, :4]
                for y in (labels, torch.full((2,), 1000))
            )
            scale = max(guidance_scale, 1.0)
            x = scheduler.step(of_none + scale * (of_class - of_none), t, x).prev_sample
        expected = (base.vae.decode(x / base.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    pipeline, before = quiet(OMSPipeline(network, base)), base.scheduler
    call = {"class_labels": [3, 7], "num_inference_steps": 3, "guidance_scale": guidance_scale, "output_type": "pt"}
    found = pipeline(**call, oms_guidance_scale=2.0, generator=generator()).images
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert base.scheduler is before
    plain = base(**call, generator=generator()).images
    assert torch.equal(pipeline(**call, oms=False, generator=generator()).images, plain)
    assert not torch.equal(found, plain)


class ExactTransformer(ExactNoise):
    """The exact network as PixArt calls its own."""

    @register_to_config
    def __init__(self, mean=1.0, std=1.0, sample_size=8, in_channels=4, out_channels=4):
        super().__init__(mean, std, sample_size, in_channels)

    def forward(self, sample, timestep, return_dict=True, **_):
        return super().forward(sample, timestep.flatten()[0], return_dict=return_dict)


def test_mean_and_spread_on_gaussian_data():
    """The law of the samples is that of a pixel model with the same schedule (see test_step.py)."""
    base = build("PixArtSigmaPipeline")
    base.transformer = ExactTransformer(5.0, 3.0)
    base.scheduler = DDIMScheduler(**STABLE_DIFFUSION, clip_sample=False, timestep_spacing="trailing")
    pipeline = quiet(OMSPipeline(ExactStep(5.0, in_channels=4), base))
    call = {**PLAIN, "prompt": ["a", "a"], "negative_prompt": "", "guidance_scale": 1.0, "num_inference_steps": 500}
    start = torch.stack([torch.zeros(4, 8, 8), torch.ones(4, 8, 8)])
    plain = base(**call, latents=start).images.double().mean((1, 2, 3))
    found = pipeline(**call, latents=start, oms_step="ddim").images.double().mean((1, 2, 3))
    a = ALPHAS[-1].item()
    k = 3 / math.sqrt(a * 9 + 1 - a)
    assert found[0].item() == pytest.approx(5, rel=1e-4)
    assert (found[1] - found[0]).item() == pytest.approx(k * math.sqrt(1 - a), rel=0.01)
    assert plain[0].item() == pytest.approx(5 * (1 - math.sqrt(a) * k), rel=0.01)


def test_refusals():
    base = build("DiTPipeline")
    base.scheduler = EulerDiscreteScheduler()
    with pytest.raises(ValueError, match="begins with noise of variance 1 .* in DiTPipeline, which does not scale it"):
        OMSPipeline(class_module(), base)
    for name in ("StableDiffusion3Pipeline", "SanaPipeline"):
        with pytest.raises(ValueError, match="flow matching starts from pure noise in training too"):
            OMSPipeline(module(32), build(name))


# ---------------------------------------------------------------- training


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two flat pictures with captions and labels, and bases; their networks are not read."""
    folder = tmp_path_factory.mktemp("transformers")
    rows = []
    for label, (name, shade) in enumerate((("dark", 40), ("bright", 215))):
        (folder / "classes" / name).mkdir(parents=True)
        (folder / "photos").mkdir(exist_ok=True)
        for i in range(8):
            picture = Image.fromarray(np.full((16, 16, 3), shade, np.uint8))
            picture.save(folder / "classes" / name / f"{i}.png")
            picture.save(folder / "photos" / f"{label}{i}.png")
            rows.append(json.dumps({"file_name": f"{label}{i}.png", "text": name}))
    (folder / "photos" / "metadata.jsonl").write_text("\n".join(rows))
    (folder / "text.json").write_text(json.dumps(TEXT_BLOCKS))
    pixels = {k: v for k, v in PIXELS.items() if k not in ("sample_size", "in_channels", "out_channels")}
    (folder / "pixels.json").write_text(json.dumps(pixels))
    for name, make in (
        ("PixArtSigmaPipeline", lambda: build("PixArtSigmaPipeline")),
        ("DiTPipeline", lambda: build("DiTPipeline")),
        ("HunyuanDiTPipeline", lambda: seeded(hunyuan_dit)),
        ("SanaPipeline", lambda: build("SanaPipeline")),
    ):
        base = make()
        if hasattr(base.vae, "quant_conv"):
            with torch.no_grad():  # as of a trained VAE: a narrow posterior
                base.vae.quant_conv.weight[:4] *= 5
                base.vae.quant_conv.weight[4:] = 0
                base.vae.quant_conv.bias[4:] = -12
        base.save_pretrained(folder / name)
        for weights in (folder / name / "transformer").glob("*.safetensors"):
            weights.unlink()
    return folder


def settings(folder, name, output_dir, **changes):
    values = {
        "pretrained_model_name_or_path": str(folder / name),
        "train_data_dir": str(folder / "photos"),
        "module_config": str(folder / "text.json"),
        "resolution": 16,
        "channels": 3,
        "train_batch_size": 8,
        "learning_rate": 5e-3,
        "precompute": True,
        "condition_dropout": 0.0,
        "num_validation_images": 2,
    }
    return config(folder, output_dir, **{**values, **changes})


@pytest.mark.parametrize("name", ["PixArtSigmaPipeline", "HunyuanDiTPipeline", "DiTPipeline"])
def test_flat_pictures_are_learned(folder, tmp_path, name):
    """The latents of the picture of each caption or label are the least squares answer."""
    labelled = name == "DiTPipeline"
    changes = {"train_data_dir": str(folder / "classes"), "module_config": str(folder / "pixels.json")}
    steps, rate = {
        "PixArtSigmaPipeline": (230, 1e-2),
        "HunyuanDiTPipeline": (2, 5e-3),
        "DiTPipeline": (120, 5e-3),
    }[name]
    changes = {**(changes if labelled else {}), "max_train_steps": steps, "learning_rate": rate}
    train(settings(folder, name, tmp_path, **changes))
    left_out = {"transformer": None}
    base = DiffusionPipeline.from_pretrained(folder / name, **left_out)
    network = OMSPipeline.from_pretrained(tmp_path).oms_module.eval()
    assert network.config.get("num_class_embeds") == (LABELS if labelled else None)
    if steps == 2:
        assert network.config.cross_attention_dim == 16
        return
    means, found = [], []
    with torch.no_grad():
        for label, (word, shade) in enumerate((("bright", 215), ("dark", 40))):
            picture = torch.full((1, 3, 16, 16), shade / 127.5 - 1)
            means.append(base.vae.encode(picture).latent_dist.mean[0] * base.vae.config.scaling_factor)
            noise = torch.randn(1, 4, 8, 8, generator=generator())
            if labelled:  # folders in the order of their names
                condition = torch.tensor([label])
            else:
                condition = encode([word], [(base.tokenizer, base.text_encoder)], noise.device)
            found.append(-network(noise, condition).sample[0])
    apart = means[0] - means[1]
    moved = ((found[0] - found[1]) * apart).sum() / apart.square().sum()
    assert moved.item() == pytest.approx(1, abs=0.15)  # as far as the pictures, in their direction
    for mean, image in zip(means, found, strict=True):
        assert (image - mean).norm() < 0.4 * apart.norm()


def test_flow_models_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="flow matching starts from pure noise in training too"):
        train(settings(folder, "SanaPipeline", tmp_path))


def test_autoencoders_without_a_posterior(folder, tmp_path):
    base = build("DiTPipeline")
    widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    base.vae = AutoencoderTiny(**widths, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    base.save_pretrained(tmp_path / "base")
    changes = {"train_data_dir": str(folder / "classes"), "module_config": str(folder / "pixels.json")}
    result, losses = train(
        settings(
            folder, "DiTPipeline", tmp_path / "out", **changes, max_train_steps=1,
            pretrained_model_name_or_path=str(tmp_path / "base"),
        )
    )  # fmt: skip
    assert result.steps == 1
    data = load_images(train_data_dir=str(folder / "classes"), resolution=16)
    latents = base.vae.encode(torch.stack([item["pixel_values"] for item in data])).latents
    assert losses[0] > 0
    columns = load_file(next((tmp_path / "out").glob("precomputed-*/*.safetensors")))
    torch.testing.assert_close(columns["latent_mean"], latents)
    assert (columns["latent_std"] == 0).all()


def test_more_classes_than_the_base_knows(folder, tmp_path):
    """The null label is none of them."""
    labels = np.arange(1001)
    np.savez(tmp_path / "data.npz", images=np.zeros((1001, 16, 16, 3), np.uint8), labels=labels)
    changes = {"train_data_dir": str(tmp_path / "data.npz"), "module_config": str(folder / "pixels.json")}
    with pytest.raises(ValueError, match="`label_column` must name a column of at most 1000 classes, .* with 1001"):
        train(settings(folder, "DiTPipeline", tmp_path / "out", **changes, max_train_steps=1))
