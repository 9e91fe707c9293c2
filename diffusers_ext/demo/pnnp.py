"""The panel of PNNP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from diffusers_ext.data.assets import ASSETS
from diffusers_ext.methods.pnnp.bayer import PATTERNS, unpack_bayer
from diffusers_ext.methods.pnnp.dark_data import noise_divergence
from diffusers_ext.methods.pnnp.develop import develop
from diffusers_ext.methods.pnnp.simulation import CameraTruth, simulate_raw

from .drawing import histogram, psnr, saved, titled

__all__ = ["pnnp"]

ISO, RATIO, DRAWS = 1600, 100.0, 300_000


def pnnp(output_dir: Path) -> Path:
    """Photographs a scene with a simulated camera, denoises it, and compares learned noise with the true one."""
    print("Loading a raw denoiser, and a camera's noise that was learned from frames with the cap on")
    folder, truth = ASSETS / "photos-pnnp", CameraTruth()
    pipeline: Any = DiffusionPipeline.from_pretrained(folder)
    noise: Any = DiffusionPipeline.from_pretrained(folder / "noise")
    pipeline.set_progress_bar_config(disable=True)
    black, span = truth.black_level, truth.white_level - truth.black_level
    clean = _mosaic(np.asarray(Image.open(folder / "crop.png")))
    rng, generator = np.random.default_rng(5), torch.Generator().manual_seed(0)
    raw = simulate_raw(truth, clean.numpy() * span / RATIO, ISO, rng)
    noisy = (torch.from_numpy(raw.astype(np.float32)) - black) * (RATIO / span)
    denoised = (torch.from_numpy(pipeline(raw, ISO, RATIO).images[0]) - black) / span
    samples = {
        "true": torch.from_numpy(truth.pixel_noise((DRAWS,), ISO, rng)).float(),
        "learned": noise.proxy.sample((1, DRAWS), ISO, generator)[0],
        "Gaussian": torch.randn(DRAWS, generator=generator) * noise.dark.statistic("pixel_std", ISO),
    }
    figures = {
        "noisy": psnr(noisy, clean),
        "denoised": psnr(denoised, clean),
        "learned_over_gaussian": noise_divergence(samples["true"], samples["learned"])
        / noise_divergence(samples["true"], samples["Gaussian"]),
    }
    print(
        f"A raw image exposed {RATIO:.0f} times too short, PSNR: noisy {figures['noisy']:.2f} dB, denoised raw "
        f"{figures['denoised']:.2f} dB; learned noise is {figures['learned_over_gaussian']:.2f} times as far from the "
        "true noise as a Gaussian"
    )
    reach = 6 * truth.pixel_std(ISO)
    counts = {title: ((values + reach) / (2 * reach)).clamp(0, 1).numpy() for title, values in samples.items()}
    picture = titled(
        {
            "clean": develop(clean),
            f"noisy, {figures['noisy']:.1f} dB": develop(noisy),
            f"denoised, {figures['denoised']:.1f} dB": develop(denoised),
            "noise of pixels": histogram(counts, 128),
        }
    )
    return saved(picture, output_dir / "pnnp.png", figures)


def _mosaic(photo: np.ndarray) -> torch.Tensor:
    """Returns what a sensor would see of an sRGB picture, in [0, 1]."""
    linear = torch.from_numpy((photo / 255.0) ** 2.2).float()
    planes = [linear[i::2, j::2, c] for (i, j), c in zip(PATTERNS["RGGB"], (0, 1, 2, 1), strict=True)]
    return unpack_bayer(torch.stack(planes))
