"""The panel of MMD-DDM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from diffusers_ext.data.assets import ASSETS
from diffusers_ext.metrics.digits import distance_to_digits, small_digits

from .drawing import grid, saved, titled

__all__ = ["mmd_ddm"]

COUNT = 256  # images behind each Frechet distance


def mmd_ddm(output_dir: Path) -> Path:
    """Draws digits in five steps from the same noise, before and after tuning."""
    print("Loading a model of 16x16 digits, and the same tuned for five steps")
    tuned: Any = DiffusionPipeline.from_pretrained(ASSETS / "digits16-5-steps")
    base: Any = DiffusionPipeline.from_pretrained(ASSETS / "digits16-base", scheduler=tuned.scheduler)
    panels = {"real digits": grid(small_digits()[:64])}
    steps, distances = len(tuned.config["tuned_timesteps"]), []
    noise = torch.randn(COUNT, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    for title, pipeline in (("before", base), ("after", tuned)):
        pipeline.set_progress_bar_config(desc=title)
        images = pipeline(latents=noise, num_inference_steps=steps, output_type="pt").images * 2 - 1
        distances.append(distance_to_digits(images))
        panels[f"{steps} steps, {title} tuning (FD {distances[-1]:.0f})"] = grid(images[:64])
    before, after = distances
    print(f"Frechet distance to real digits in {steps} steps: before {before:.1f}, after {after:.1f}")
    return saved(titled(panels, scale=3), output_dir / "mmd_ddm.png", {"fd_before": before, "fd_after": after})
