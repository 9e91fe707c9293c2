"""The panel of NoiseDiffusion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from diffusers_ext.data.assets import ASSETS
from diffusers_ext.data.digits import DIGITS
from diffusers_ext.methods.noise_diffusion.base import METHODS
from diffusers_ext.methods.noise_diffusion.pipeline import NoiseDiffusionPipeline

from .drawing import saved

__all__ = ["noise_diffusion"]

STEPS, FRAMES = 50, 5
PAIR = (0, 4)
"""Two of the shipped digits."""
NOISE = 0.3
"""As a camera leaves it, in units of half the range of values."""


def noise_diffusion(output_dir: Path) -> Path:
    """Makes frames between two real, noisy digits by every method, and says how noise-like the states are."""
    print("Loading a model of digits and making frames between two real ones by four methods")
    pipeline = NoiseDiffusionPipeline.from_pretrained(ASSETS / "digits-epsilon")
    pixels = torch.tensor(np.load(DIGITS)["images"][list(PAIR)])[:, None] / 255
    pixels = pixels + NOISE / 2 * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    first, second = pixels.clamp(0, 1)
    rows, found = {}, {}
    for method in METHODS:
        pipeline.set_progress_bar_config(desc=method)
        output: Any = pipeline(
            first, second, FRAMES, method=method, num_inference_steps=STEPS, output_type="pt",
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        rows[method], found[method] = torch.stack([first, *output.images, second]), output.diagnostics
    inverted = found["slerp"]["inverted"]
    print(inverted)
    for method, diagnostics in found.items():
        print(f"norm ratio of the frames' states, {method}: {diagnostics['frames'].pooled['norm_ratio']:.3f}")
    figures = {f"norm_{method}": float(of["frames"].pooled["norm_ratio"]) for method, of in found.items()}
    figures |= {f"norm_inverted_{i}": ratio for i, ratio in enumerate(inverted.norm_ratio.tolist())}
    return saved(_picture(rows, found), output_dir / "noise_diffusion.png", figures)


def _picture(rows: dict[str, torch.Tensor], found: dict[str, Any], scale: int = 3) -> Image.Image:
    """One row of images a method, the figures of its states beside it and those of the inversion below."""
    left, head, height, width = 130, 28, 28 * scale, 28 * scale * (FRAMES + 2)
    canvas = Image.new("RGB", (left + width + 190, head + height * len(rows) + 52), "white")
    pen = ImageDraw.Draw(canvas)
    titles = {left: "real", left + height: "frames", left + width - height: "real"}
    for x, text in {**titles, left + width + 12: "states: norm, beyond 2"}.items():
        pen.text((x, 6), text, fill="black", font_size=14)
    for i, (method, images) in enumerate(rows.items()):
        strip = Image.fromarray((torch.cat(list(images[:, 0]), 1) * 255).round().byte().numpy())
        y = head + height * i
        canvas.paste(strip.resize((width, height), Image.Resampling.NEAREST), (left, y))
        pooled = found[method]["frames"].pooled
        pen.text((8, y + height // 2 - 8), method.replace("_", " "), fill="black", font_size=14)
        figures = f"{pooled['norm_ratio']:.2f}, {pooled['tail_2']:.1%}"
        pen.text((left + width + 12, y + height // 2 - 8), figures, fill="black", font_size=14)
    inverted = found["slerp"]["inverted"]
    ratios = ", ".join(f"{value:.2f}" for value in inverted.norm_ratio.tolist())
    tails = ", ".join(f"{value:.1%}" for value in inverted.tail_2.tolist())
    below = [
        f"the real images, inverted: norm {ratios} of noise's, values beyond 2: {tails}, kurtosis "
        f"{inverted.pooled['excess_kurtosis']:.1f}",
        f"noise: 1.00, 4.6%, 0.0; inversion alone brings a norm of {inverted.inflation:.2f}",
    ]
    for i, line in enumerate(below):
        pen.text((8, canvas.height - 46 + 20 * i), line, fill="black", font_size=14)
    return canvas
