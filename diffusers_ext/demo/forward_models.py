"""The panel of diffusion with forward models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps

from diffusers_ext.data.assets import ASSETS
from diffusers_ext.training.callbacks import image_grid

from .drawing import saved, titled

__all__ = ["forward_models"]

NOISE, SHOWN, SAMPLES = 0.3, 4, 5


def forward_models(output_dir: Path) -> Path:
    """Draws digits that agree with one noisy row of 12 pixels, as a camera beside the digit sees it."""
    print("Loading a model of digits that has only ever seen rows of pixels")
    folder = ASSETS / "digits-flatland"
    pipeline: Any = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    with np.load(folder / "views.npz") as file:
        views = {name: torch.from_numpy(file[name]) for name in file.files}
    seen, angles = views["observations"][:, :1], views["parameters"][:, :1]
    generator = torch.Generator().manual_seed(0)
    context = seen + NOISE * torch.randn(seen.shape, generator=generator)
    call = {"num_samples": SAMPLES, "num_inference_steps": 30, "eta": 1.0, "generator": generator}
    signals = {n: pipeline(context, angles, num_views=n, **call).signals.unflatten(0, (-1, SAMPLES)) for n in (1, 4)}
    again = pipeline.render(signals[4].flatten(0, 1), angles.repeat_interleave(SAMPLES, 0))
    agree = float((again - seen.repeat_interleave(SAMPLES, 0)).square().mean().sqrt())
    vary = {n: float(s.var(1).mean().sqrt()) for n, s in signals.items()}
    print(
        f"From one row with noise of {NOISE}: samples agree with the row to {agree:.3f}, and vary by {vary[4]:.3f} "
        f"with 4 views drawn one after the other, by {vary[1]:.3f} with one"
    )
    truth = views["digits"][:SHOWN, 0].float() / 16
    rows = context[:SHOWN, 0, 0, None].expand(-1, 4, -1) / 2 + 0.5
    picture = titled(
        {
            "never seen": _column(truth),
            "one row of it": _column(rows.repeat_interleave(2, 2), 24),
            "five samples of one drawn view": _rows(signals[1]),
            "of four drawn views": _rows(signals[4]),
        },
        scale=1,
    )
    figures = {"agreement": agree, "deviation, one view": vary[1], "deviation, four views": vary[4]}
    return saved(picture, output_dir / "forward_models.png", figures)


def _image(values: torch.Tensor, width: int) -> Image.Image:
    """Returns values in [0, 1] as a picture 64 high, and a white edge."""
    pixels = (values.clamp(0, 1) * 255).round().byte().numpy()
    return ImageOps.expand(Image.fromarray(pixels).resize((width, 64), Image.Resampling.NEAREST), 4, 255)


def _column(images: torch.Tensor, size: int = 8) -> Image.Image:
    return image_grid([_image(image, 8 * size) for image in images], columns=1)


def _rows(signals: torch.Tensor) -> Image.Image:
    return image_grid([_image(s[0], 64) for s in signals[:SHOWN].flatten(0, 1)], columns=SAMPLES)
