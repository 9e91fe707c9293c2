"""Training for bases with text: captions, latents, one text encoder or two, and what a caption teaches."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from diffusers_ext import OMSPipeline
from diffusers_ext.generation.text import encode, find_encoders

from .test_training import config, train
from .tiny import TEXT_BLOCKS, stable_diffusion, stable_diffusion_xl

BASES = {"one encoder": stable_diffusion, "two encoders": stable_diffusion_xl}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Dark and bright pictures with captions, and the bases."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "photos").mkdir()
    rows = []
    for i in range(64):
        dark = i % 2 == 0
        pixels = np.random.default_rng(i).normal(40 if dark else 215, 10, (16, 16, 3)).clip(0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "photos" / f"{i:02d}.png")
        rows.append(json.dumps({"file_name": f"{i:02d}.png", "text": "dark" if dark else "bright"}))
    (folder / "photos" / "metadata.jsonl").write_text("\n".join(rows))
    (folder / "module.json").write_text(json.dumps(TEXT_BLOCKS))
    for name, make in BASES.items():
        base = make()
        with torch.no_grad():  # as of a trained VAE: a narrow posterior, and means that tell images apart
            base.vae.quant_conv.weight[:4] *= 20
            base.vae.quant_conv.weight[4:] = 0
            base.vae.quant_conv.bias[4:] = -12
        base.save_pretrained(folder / name)
    return folder


def text_config(folder, name, output_dir, **changes):
    values = {
        "pretrained_model_name_or_path": str(folder / name),
        "train_data_dir": str(folder / "photos"),
        "resolution": 16,
        "channels": 3,
        "train_batch_size": 8,
    }
    return config(folder, output_dir, **{**values, **changes})


@pytest.mark.parametrize("name", BASES)
def test_precomputed_text_and_latents_train_alike(folder, tmp_path, name):
    _, expected = train(text_config(folder, name, tmp_path / "each-step", max_train_steps=6))
    _, found = train(text_config(folder, name, tmp_path / "once", max_train_steps=6, precompute=True))
    assert found == pytest.approx(expected, abs=1e-4)  # encoders round differently in other batches
    pipeline = OMSPipeline.from_pretrained(tmp_path / "once", base=BASES[name]())
    assert pipeline.config["vae_scaling_factor"] == pipeline.sd_pipeline.vae.config.scaling_factor
    out = pipeline("bright", num_inference_steps=2, oms_guidance_scale=2.0, output_type="np").images
    assert out.shape == (1, 16, 16, 3)
    assert np.isfinite(out).all()


def test_the_caption_is_learned(folder, tmp_path):
    """The mean latents of each caption are the least squares answer."""
    train(text_config(folder, "one encoder", tmp_path, max_train_steps=150, precompute=True, learning_rate=5e-3))
    base = DiffusionPipeline.from_pretrained(folder / "one encoder")
    pipeline = OMSPipeline.from_pretrained(tmp_path, base=base)
    columns = [load_file(path) for path in sorted(tmp_path.glob("precomputed-*/*"))]
    means = torch.cat([c["latent_mean"] for c in columns]) * base.vae.config.scaling_factor
    dark, bright = means[0::2].mean(0), means[1::2].mean(0)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = {
            word: -pipeline.oms_module(noise, encode([word], find_encoders([], base, 8), base.device)).sample[0]
            for word in ("dark", "bright")
        }
    apart = bright - dark
    moved = ((found["bright"] - found["dark"]) * apart).sum() / apart.square().sum()
    assert moved.item() == pytest.approx(1, abs=0.2)  # as far as the data, in its direction
    for word, mean in (("dark", dark), ("bright", bright)):
        assert (found[word] - mean).norm() < 0.7 * apart.norm()


def test_a_wrong_caption_column_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match="caption_column"):
        train(text_config(folder, "one encoder", tmp_path, caption_column="nothing"))
