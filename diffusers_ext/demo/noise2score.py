"""The panel of Noise2Score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from diffusers_ext.data.assets import ASSETS
from diffusers_ext.methods.noise2score.noises import AdditiveGaussianNoise

from .drawing import psnr, saved, titled

__all__ = ["noise2score"]

SIGMA = 25 / 255


def noise2score(output_dir: Path) -> Path:
    """Adds noise to a crop of a photograph, and denoises it with a network that never saw a clean image."""
    print("Loading a denoiser that learned from noisy photographs alone")
    folder = ASSETS / "photos-noise2score"
    pipeline: Any = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    clean = torch.from_numpy(np.asarray(Image.open(folder / "crop.png"), np.float32) / 255)[None, None]
    noisy = AdditiveGaussianNoise(SIGMA).corrupt(clean, torch.Generator().manual_seed(0))
    known = pipeline(noisy, noise_parameter=SIGMA, output_type="pt").images
    blind = pipeline(noisy, blind_range=(6 / 255, 55 / 255), output_type="pt")
    figures = {"noisy": psnr(noisy, clean), "denoised": psnr(known, clean), "blind": psnr(blind.images, clean)}
    found = 255 * blind.noise_parameter[0]
    print(
        f"A photograph with Gaussian noise of 25/255, PSNR: noisy {figures['noisy']:.2f} dB, denoised "
        f"{figures['denoised']:.2f} dB; noise found to be {found:.1f}/255, and with that {figures['blind']:.2f} dB"
    )
    picture = titled(
        {
            "clean": _picture(clean),
            f"noisy, {figures['noisy']:.1f} dB": _picture(noisy),
            f"denoised, {figures['denoised']:.1f} dB": _picture(known),
            f"level unknown, {figures['blind']:.1f} dB": _picture(blind.images),
        }
    )
    return saved(picture, output_dir / "noise2score.png", {**figures, "found": found})


def _picture(image: torch.Tensor) -> Image.Image:
    return Image.fromarray((image[0, 0].clamp(0, 1) * 255).round().byte().numpy())
