"""The panel of ambient diffusion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from diffusers_ext.data.assets import ASSETS
from diffusers_ext.data.digits import DIGITS
from diffusers_ext.data.sources import load_images
from diffusers_ext.methods.ambient.noisy_data import FrozenNoise
from diffusers_ext.metrics.frechet import frechet_distance

from .drawing import grid, saved, titled

__all__ = ["ambient"]

SIZE, SIGMA, PART, COUNT = 8, 0.4, 0.9, 256


def ambient(output_dir: Path) -> Path:
    """Draws digits with a model that was told the noise of its training data, and with one that was not."""
    print("Loading two models of 8x8 digits that were trained on the same noisy ones")
    data: Any = load_images(train_data_dir=str(DIGITS), resolution=SIZE, channels=1)
    clean = torch.stack([data[i]["pixel_values"] for i in range(len(data))])
    noisy, levels = FrozenNoise(SIGMA, PART)(clean, torch.arange(len(clean)))
    panels, distance = {f"{(levels > 0).float().mean():.0%} of the data are noisy": grid(noisy[:64])}, {}
    for title, name in (("all taken for clean", "digits-ambient-naive"), ("noise known", "digits-ambient")):
        pipeline: Any = DiffusionPipeline.from_pretrained(ASSETS / name)
        pipeline.set_progress_bar_config(desc=title)
        generator = torch.Generator().manual_seed(0)
        images = pipeline(COUNT, generator=generator, output_type="pt").images * 2 - 1
        distance[title] = frechet_distance(images.flatten(1), clean.flatten(1))
        panels[f"{title} (FD {distance[title]:.2f})"] = grid(images[:64])
    naive, known = distance.values()
    print(f"Frechet distance of pixels to clean digits: taken for clean {naive:.2f}, noise known {known:.2f}")
    return saved(titled(panels, scale=4), output_dir / "ambient.png", {"fd_naive": naive, "fd_known": known})
