"""Pictures of signals, or of what is seen of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

__all__ = ["as_images", "pictures"]


def as_images(values: torch.Tensor, ends: Sequence[float]) -> list[Image.Image]:
    """Returns `(batch, 1 or 3, height, width)` values as images, black and white at the two ends."""
    unit = ((values.float() - ends[0]) / (ends[1] - ends[0])).clamp(0, 1)
    return VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(unit))


def pictures(
    signals: torch.Tensor, observations: torch.Tensor, signal_range: Sequence[float] | None
) -> list[Image.Image]:
    """Shows signals that are images as they are, and of others one observation.

    Args:
        signals: `(batch, ...)`.
        observations: `(batch, ...)` of them; `(batch, channels, width)` become strips.
        signal_range: black and white of signals; observations, and signals without, fill the range they have.
    """
    image = signals.ndim == 4 and signals.shape[1] in (1, 3)
    shown = signals if image else observations
    if shown.ndim == 3 and shown.shape[1] in (1, 3):
        shown = shown[:, :, None].expand(-1, -1, max(shown.shape[2] // 2, 1), -1)
    if shown.ndim != 4 or shown.shape[1] not in (1, 3):
        shown = shown.flatten(1)[:, None, None].expand(-1, -1, 8, -1)
    low, high = float(shown.min()), float(shown.max())
    ends = signal_range if image and signal_range is not None else (low, high if high > low else low + 1)
    return as_images(shown, ends)
