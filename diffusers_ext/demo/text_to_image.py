"""The panel of text-to-image training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from diffusers_ext.data.assets import ASSETS
from diffusers_ext.data.digits import DIGITS
from diffusers_ext.training.engine import Trainer
from diffusers_ext.training.text_arguments import TextToImageConfig
from diffusers_ext.training.text_to_image import TextToImageRecipe

from .drawing import grid, saved, titled

__all__ = ["text_to_image"]

MODEL = ASSETS / "digits-text"
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
PROMPTS = [f"a handwritten {name}" for name in NAMES]
CALL = {"max_sequence_length": 6}  # of the text's tokens: more cost time and say nothing here
AMBER = np.array([1.0, 0.65, 0.1])
UPDATES = 80


def text_to_image(output_dir: Path) -> Path:
    """Teaches a stock Stable Diffusion 3 pipeline amber digits by LoRA layers, from ten images."""
    print(f"Loading {MODEL.name}, a stock pipeline, and drawing {len(PROMPTS)} prompts")
    pipeline: Any = DiffusionPipeline.from_pretrained(MODEL)
    before = draw(pipeline)
    folder = output_dir / "ten-amber"
    images = ten_amber(folder)

    print(f"Training LoRA layers on ten amber digits for {UPDATES} updates")
    config = TextToImageConfig(
        pretrained_model_name_or_path=str(MODEL),
        call_options=json.dumps(CALL),
        train_data_dir=str(folder),
        output_dir=str(output_dir / "digits-lora"),
        overwrite_output_dir=True,  # of an earlier demo
        resolution=32,
        cache_latents=True,
        cache_prompts=True,
        lora_rank=8,
        lora_targets="to_q,to_k,to_v,to_out.0,proj_out",
        train_batch_size=10,
        max_train_steps=UPDATES,
        learning_rate=2e-3,
        ema_decay=0.95,
        num_validation_images=0,
    )
    Trainer(config, TextToImageRecipe(config)).train()

    pipeline.load_lora_weights(output_dir / "digits-lora")
    after = draw(pipeline)
    blue = [float((drawn[:, 2] + 1).sum() / (drawn[:, 0] + 1).sum()) for drawn in (images, before, after)]
    print(f"Blue over red: ten images {blue[0]:.2f}, before {blue[1]:.2f}, after {blue[2]:.2f}")
    panels = {
        "ten images to learn from": grid(images),
        '"a handwritten zero" to "nine", before': grid(before),
        "after, by load_lora_weights": grid(after),
    }
    figures = {"blue_before": blue[1], "blue_after": blue[2]}
    return saved(titled(panels, scale=3), output_dir / "text_to_image.png", figures)


def draw(pipeline: Any) -> torch.Tensor:
    """Returns one image a prompt, `(10, 3, 32, 32)` in `[-1, 1]`, always from the same noise."""
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 10, "guidance_scale": 2.0, "output_type": "pt", **CALL}
    return pipeline(PROMPTS, generator=generator, **options).images * 2 - 1


def ten_amber(folder: Path) -> torch.Tensor:
    """Writes ten amber digits with their captions as a folder for training; returns them as images in `[-1, 1]`."""
    data = np.load(DIGITS)
    rows = [int(np.flatnonzero(data["labels"] == digit)[0]) for digit in range(10)]
    grey = np.pad(data["images"][rows], ((0, 0), (2, 2), (2, 2)))
    images = (grey[..., None] * AMBER).astype(np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, prompt, pixels in zip(NAMES, PROMPTS, images, strict=True):
        Image.fromarray(pixels).save(folder / f"{name}.png")
        lines.append(json.dumps({"file_name": f"{name}.png", "text": prompt}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return torch.tensor(images).movedim(-1, 1) / 127.5 - 1
