"""The panel of One More Step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from scipy.stats import wasserstein_distance

from diffusers_ext.data.assets import ASSETS
from diffusers_ext.methods.oms.pipeline import OMSPipeline

from .drawing import grid, histogram, saved, titled

__all__ = ["one_more_step"]

STEPS = 16  # sampling steps


def one_more_step(output_dir: Path) -> Path:
    """Draws photographs without and with One More Step and compares their brightness with real ones."""
    print("Loading a model of photographs and its One More Step module")
    base = DiffusionPipeline.from_pretrained(ASSETS / "photos-base")
    pipeline = OMSPipeline.from_pretrained(ASSETS / "photos-oms", base=base)
    file = np.load(ASSETS / "photos" / "photos.npz")
    real, labels = file["images"] / 255, torch.tensor(file["labels"])

    def drawn(title: str, **options: Any) -> Any:
        pipeline.set_progress_bar_config(desc=title)
        generator = torch.Generator().manual_seed(0)
        return pipeline(
            class_labels=labels, num_inference_steps=STEPS, generator=generator, output_type="np", **options
        ).images

    images = {"photographs": real, "plain": drawn("plain", oms=False), "one more step": drawn("one more step")}
    brightness = {title: pixels.mean((1, 2, 3)) for title, pixels in images.items()}
    distance = {title: wasserstein_distance(b, brightness["photographs"]) for title, b in brightness.items()}
    print(
        "Wasserstein distance of mean brightness to that of photographs: "
        f"plain {distance['plain']:.3f}, one more step {distance['one more step']:.3f}"
    )
    order = np.argsort(labels.numpy(), kind="stable")[:: max(1, len(labels) // 64)][:64]
    grids = {
        title if title == "photographs" else f"{title} (W1 {distance[title]:.3f})": grid(
            torch.tensor(pixels[order]).permute(0, 3, 1, 2) * 2 - 1
        )
        for title, pixels in images.items()
    }
    figures = {"w1_plain": distance["plain"], "w1_one_more_step": distance["one more step"]}
    return saved(
        titled({**grids, "mean brightness": histogram(brightness)}), output_dir / "one_more_step.png", figures
    )
