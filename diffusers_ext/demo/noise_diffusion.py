"""The panel of NoiseDiffusion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from diffusers_ext.data.digits import ASSETS, DIGITS
from diffusers_ext.noise_diffusion.base import METHODS
from diffusers_ext.noise_diffusion.pipeline import NoiseDiffusionPipeline

from .drawing import titled

__all__ = ["noise_diffusion"]

STEPS, FRAMES = 50, 5
PAIR = (0, 4)
"""Two of the shipped digits."""
NOISE = 0.15
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
    path = output_dir / "noise_diffusion.png"
    picture = titled({f"{NOISE:g} noise: the ends are real": _strip(rows)}, scale=3)
    _with_text(picture, _lines(found)).save(path)
    return path


def _strip(rows: dict[str, torch.Tensor]) -> Image.Image:
    """One row of images a method."""
    lines = [torch.cat(list(images[:, 0]), 1) for images in rows.values()]
    return Image.fromarray((torch.cat(lines) * 255).round().byte().numpy())


def _lines(found: dict[str, Any]) -> list[str]:
    inverted = found["slerp"]["inverted"]
    lines = ["rows: " + ", ".join(name.replace("_", " ") for name in found), ""]
    lines.append("state: norm over that of noise, values beyond 2")
    for i, (ratio, tail) in enumerate(zip(inverted.norm_ratio, inverted.tail_2, strict=True)):
        lines.append(f"image {i}, inverted: {ratio:.2f}, {tail:.1%}")
    lines += [f"what inversion alone brings: {inverted.inflation:.2f}", "noise: 1.00, 4.6%"]
    for name, diagnostics in found.items():
        pooled = diagnostics["frames"].pooled
        lines.append(f"frames, {name.replace('_', ' ')}: {pooled['norm_ratio']:.2f}, {pooled['tail_2']:.1%}")
    return lines


def _with_text(picture: Image.Image, lines: list[str]) -> Image.Image:
    """Puts lines of text below a picture."""
    height = 17
    canvas = Image.new("RGB", (picture.width, picture.height + height * len(lines) + 8), "white")
    canvas.paste(picture, (0, 0))
    draw = ImageDraw.Draw(canvas)
    for i, line in enumerate(lines):
        draw.text((16, picture.height + height * i), line, fill="black", font_size=13)
    return canvas
