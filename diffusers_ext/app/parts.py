"""What the tabs share: loading at first use, uploads, progress, messages."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import Image, ImageOps

import diffusers_ext
from diffusers_ext.data.assets import ASSETS
from diffusers_ext.data.reading import eight_bits, pixels_of

__all__ = [
    "EXAMPLES",
    "as_digit",
    "check_upload",
    "each_step",
    "generator",
    "load",
    "picture",
    "seed",
    "shows_errors",
    "upload",
]

EXAMPLES = Path(__file__).parent / "examples"
SIDE = 28
"""Width and height of the digits that the models know."""
LONGEST = 4096
"""Pixels an uploaded image may have on a side."""


@functools.cache
def load(name: str, kind: str = "", **components: Any) -> Any:
    """Loads a pipeline once, at its first use.

    Args:
        name: a folder under `assets/`, or else a local folder or a Hub repo.
        kind: the public name of the pipeline's class, by default the one that the folder names.
        **components: parts to take instead of the folder's.
    """
    from diffusers import DiffusionPipeline  # takes seconds to import, which wait for the first button

    loader: Any = getattr(diffusers_ext, kind) if kind else DiffusionPipeline
    pipeline = loader.from_pretrained(ASSETS / name if (ASSETS / name).is_dir() else name, **components)
    pipeline.set_progress_bar_config(disable=True)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return pipeline if accelerator is None else pipeline.to(accelerator)


def generator(seed: float | None) -> torch.Generator:
    """Makes the generator of a seed field."""
    if seed is None or not 0 <= seed < 2**63:
        raise gr.Error("The seed must be an integer >= 0.", title="Seed")
    return torch.Generator().manual_seed(int(seed))


def each_step(progress: Any, desc: str) -> Callable[[Any, int, Any, dict], dict]:
    """Makes a `callback_on_step_end` that moves the page's progress bar."""

    def report(pipeline: Any, step: int, timestep: Any, values: dict) -> dict:
        progress((step + 1, pipeline.num_timesteps), desc=desc)
        return values

    return report


def shows_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Shows the `ValueError`s of a button's function in the page."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except gr.Error:  # itself a `ValueError`
            raise
        except ValueError as error:
            raise gr.Error(str(error)) from error

    return wrapped


def upload(label: str) -> gr.Image:
    """Makes a field for an image; a file that is none gets a message at once and is taken out again."""
    field = gr.Image(
        label=label, type="pil", image_mode=None, sources=["upload", "clipboard"], height=220, min_width=120,
        buttons=[], elem_classes="pixels",
    )  # fmt: skip
    # Before Gradio reads the file itself, whose error would be for programmers.
    checked = field.upload(check_upload, field, preprocess=False, show_progress="hidden", api_visibility="private")
    checked.failure(lambda: None, None, field, show_progress="hidden", api_visibility="private")
    return field


def check_upload(file: dict[str, Any]) -> None:
    """Refuses files that are no images."""
    try:
        with Image.open(file["path"]) as image:
            size = image.size
            if max(size) <= LONGEST:
                image.load()  # a damaged file shows itself only now
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise gr.Error("This file is not an image, or it is damaged.", title="Upload") from error
    if max(size) > LONGEST:
        raise gr.Error(f"At most {LONGEST} pixels a side, got {size[0]} x {size[1]}.", title="Upload")


def as_digit(image: Image.Image | None, label: str) -> np.ndarray:
    """Brings an upload to the form of the shipped digits, `(28, 28)` uint8: the middle square in grey."""
    if image is None:
        raise gr.Error("Upload an image first, or pick an example below.", title=label)
    if min(image.size) < SIDE // 2:
        raise gr.Error(f"At least {SIDE // 2} pixels a side, got {image.width} x {image.height}.", title=label)
    grey = Image.fromarray(eight_bits(pixels_of(image, channels=1))[:, :, 0])
    return np.asarray(ImageOps.fit(grey, (SIDE, SIDE), Image.Resampling.LANCZOS))


def picture(label: str, **options: Any) -> gr.Image:
    """Makes the place of a picture that a button draws."""
    return gr.Image(
        label=label, interactive=False, format="png", buttons=["download", "fullscreen"], elem_classes="pixels",
        **options,
    )  # fmt: skip


def seed() -> gr.Number:
    """Makes the field of the seed; the same seed gives the same picture."""
    return gr.Number(0, label="Seed", precision=0, minimum=0)
