"""What the panels draw with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from diffusers_ext.training.callbacks import image_grid

__all__ = ["grid", "histogram", "psnr", "saved", "titled"]


def saved(picture: Image.Image, path: Path, figures: dict[str, float]) -> Path:
    """Writes a picture, and the figures that it shows into a JSON file beside it; returns the picture's path."""
    picture.save(path)
    rounded = {name: round(float(value), 4) for name, value in figures.items()}
    path.with_suffix(".json").write_text(json.dumps(rounded, indent=1) + "\n")
    return path


def titled(panels: dict[str, Image.Image], scale: int = 2) -> Image.Image:
    """Puts pictures side by side, enlarged, each under its title."""
    enlarged = {
        title: image.convert("RGB").resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
        for title, image in panels.items()
    }
    gap = 16
    width = sum(image.width + gap for image in enlarged.values()) + gap
    letters = max(15, width // 70)  # so that titles can be read where the picture is shown small
    head = letters + 13
    canvas = Image.new("RGB", (width, max(image.height for image in enlarged.values()) + head + gap), "white")
    draw, x = ImageDraw.Draw(canvas), gap
    for title, image in enlarged.items():
        draw.text((x, 6), title, fill="black", font_size=letters)
        canvas.paste(image, (x, head))
        x += image.width + gap
    return canvas


def grid(images: torch.Tensor) -> Image.Image:
    """Arranges images in `[-1, 1]` in a square."""
    pixels = ((images + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).squeeze(-1).numpy()
    return image_grid([Image.fromarray(p) for p in pixels])


def histogram(values: dict[str, np.ndarray], size: int = 256) -> Image.Image:
    """Draws how often numbers in `[0, 1]` occur: the first set as an area, the others as lines."""
    canvas = Image.new("RGB", (size, size), "white")
    pen, colours = ImageDraw.Draw(canvas), ["lightgrey", "crimson", "royalblue"]
    counts = {title: np.histogram(v, 24, (0, 1), density=True)[0] for title, v in values.items()}
    top = max(c.max() for c in counts.values())
    for i, (title, count) in enumerate(counts.items()):
        corners = [(0.0, size - 1.0)]
        for j, c in enumerate(count):
            height = size - 1 - c / top * (size - 60)
            corners += [(j * size / 24, height), ((j + 1) * size / 24, height)]
        corners.append((size - 1.0, size - 1.0))
        if i == 0:
            pen.polygon(corners, fill=colours[0])
        else:
            pen.line(corners, fill=colours[i], width=2)
        pen.text((4, 2 + 14 * i), title, fill="dimgrey" if i == 0 else colours[i], font_size=12)
    return canvas


def psnr(image: torch.Tensor, clean: torch.Tensor) -> float:
    """Returns the peak signal-to-noise ratio of an image in [0, 1], in dB."""
    return float(-10 * (image.clamp(0, 1) - clean).square().mean().log10())
