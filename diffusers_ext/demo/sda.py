"""The panel of SDA test-time adaptation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw

from diffusers_ext.data.assets import ASSETS
from diffusers_ext.data.corruptions import corrupt
from diffusers_ext.data.digits import DIGITS

from .drawing import saved, titled

__all__ = ["sda"]

CORRUPTIONS = [
    ("gaussian_noise", 3),
    ("shot_noise", 5),
    ("impulse_noise", 4),
    ("elastic_transform", 3),
    ("pixelate", 5),
]
SHOWN, COUNT = 8, 40  # digits in the picture, and in the accuracies


def sda(output_dir: Path) -> Path:
    """Corrupts digits, adapts them, and compares three predictions."""
    print("Loading a digit classifier, its fine-tuned copy and the diffusion model between them")
    pipeline: Any = DiffusionPipeline.from_pretrained(ASSETS / "digits-sda")
    pipeline.set_progress_bar_config(desc="adapting digits")
    file = np.load(DIGITS)
    # The last digits: those that no choice was made with.
    images, labels = file["images"][-COUNT:], file["labels"][-COUNT:]
    corrupted = [
        corrupt(image, name, severity, seed=i) for name, severity in CORRUPTIONS for i, image in enumerate(images)
    ]
    generators = [torch.Generator().manual_seed(i) for i in range(len(corrupted))]
    output = pipeline(corrupted, generator=generators, output_type="np")
    source = pipeline(corrupted, ensemble="source")
    truth = np.tile(labels, len(CORRUPTIONS))
    right = {"source": source.label_ids.numpy() == truth, "adapted": output.label_ids.numpy() == truth}
    print(
        f"Digits under {len(CORRUPTIONS)} corruptions, right: "
        f"source {right['source'].mean():.3f}, adapted {right['adapted'].mean():.3f}"
    )
    adapted = (output.images[..., 0] * 255).round().astype(np.uint8)
    rows = [COUNT * i + np.arange(SHOWN) for i in range(len(CORRUPTIONS))]
    before = _pictures(corrupted, rows, source.labels, right["source"])
    after = _pictures(adapted, rows, output.labels, right["adapted"])
    picture = titled({"corrupted, and read as": before, "adapted, and read as": after, "accuracy": _bars(right)}, 1)
    figures = {
        f"{view}_{name}": shares.reshape(len(CORRUPTIONS), COUNT)[i].mean()
        for view, shares in right.items()
        for i, (name, _) in enumerate(CORRUPTIONS)
    }
    return saved(picture, output_dir / "sda.png", figures)


def _pictures(
    images: list[np.ndarray] | np.ndarray, rows: list[np.ndarray], labels: list[str], right: np.ndarray
) -> Image.Image:
    """Draws each digit with its prediction beside it, red where wrong."""
    cell, height = 46, 34
    canvas = Image.new("RGB", (cell * SHOWN, height * len(rows)), "white")
    pen = ImageDraw.Draw(canvas)
    for y, row in enumerate(rows):
        for x, i in enumerate(row):
            canvas.paste(Image.fromarray(images[i]).convert("RGB"), (x * cell, y * height))
            pen.text((x * cell + 31, y * height + 7), labels[i], fill="black" if right[i] else "crimson", font_size=15)
    return canvas


def _bars(right: dict[str, np.ndarray]) -> Image.Image:
    """Draws the accuracies of each corruption, before in grey and after in red."""
    height, width = 34, 260
    canvas = Image.new("RGB", (width, height * len(CORRUPTIONS)), "white")
    pen = ImageDraw.Draw(canvas)
    for y, (name, _) in enumerate(CORRUPTIONS):
        pen.text((0, y * height + 6), name.replace("_", " "), fill="black", font_size=13)
        for k, colour in ((0, "silver"), (1, "crimson")):
            share = right[("source", "adapted")[k]][COUNT * y : COUNT * (y + 1)].mean()
            top = y * height + 4 + 12 * k
            pen.rectangle((125, top, 125 + 95 * share, top + 10), fill=colour)
            pen.text((225, top - 2), f"{100 * share:.0f} %", fill="black", font_size=11)
    return canvas
