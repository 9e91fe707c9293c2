"""The panel of MMD-DDM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline

from diffusers_ext.data.assets import ASSETS
from diffusers_ext.data.digits import CLASSIFIER, DIGITS
from diffusers_ext.data.sources import load_images
from diffusers_ext.metrics.features import ImageClassifierFeatures, extract_features
from diffusers_ext.metrics.frechet import frechet_distance

from .drawing import grid, saved, titled

__all__ = ["mmd_ddm"]

COUNT = 256  # images behind each Frechet distance


def mmd_ddm(output_dir: Path) -> Path:
    """Draws digits in five steps from the same noise, before and after tuning."""
    print("Loading a model of 16x16 digits, and the same tuned for five steps")
    tuned: Any = DiffusionPipeline.from_pretrained(ASSETS / "digits16-5-steps")
    base: Any = DiffusionPipeline.from_pretrained(ASSETS / "digits16-base", scheduler=tuned.scheduler)
    data: Any = load_images(train_data_dir=str(DIGITS), resolution=16, channels=1)
    images = {"real digits": torch.stack([data[i]["pixel_values"] for i in range(len(data))])}
    steps = len(tuned.config["tuned_timesteps"])
    noise = torch.randn(COUNT, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    for title, pipeline in (("before", base), ("after", tuned)):
        pipeline.set_progress_bar_config(desc=title)
        drawn = pipeline(latents=noise, num_inference_steps=steps, output_type="pt").images
        images[f"{steps} steps, {title} tuning"] = drawn * 2 - 1

    # A classifier of larger digits, which nothing was tuned on.
    classifier = ImageClassifierFeatures.from_pretrained(CLASSIFIER).eval()
    features = {
        title: extract_features(
            F.interpolate(pixels, (28, 28), mode="bilinear", align_corners=False), classifier.features
        )
        for title, pixels in images.items()
    }
    distance = {title: frechet_distance(f, features["real digits"]) for title, f in features.items()}
    before, after = list(distance.values())[1:]
    print(f"Frechet distance to real digits in {steps} steps: before {before:.1f}, after {after:.1f}")
    panels = {
        title if title == "real digits" else f"{title} (FD {distance[title]:.0f})": grid(pixels[:64])
        for title, pixels in images.items()
    }
    return saved(titled(panels, scale=3), output_dir / "mmd_ddm.png", {"fd_before": before, "fd_after": after})
