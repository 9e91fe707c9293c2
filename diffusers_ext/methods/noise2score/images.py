"""Between the images that a user has and the tensors that are denoised, without rounding or cutting noisy values."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.utils import numpy_to_pil
from PIL import Image

from diffusers_ext.data.exact import exact_pixels

__all__ = ["as_output", "read_noisy_images"]


def read_noisy_images(images: Any, channels: int) -> list[torch.Tensor]:
    """Reads noisy images of any kind.

    Args:
        images: PIL images, arrays `(height, width[, channels])` or `(batch, height, width, channels)`, tensors
            `(channels, height, width)` or `(batch, channels, height, width)`, or a list of these. Integers of 8 and 16
            bits are divided by their largest value, floats are taken as they are.
        channels: what every image must have.

    Returns:
        `(channels, height, width)` tensors, float64 where tensors are, otherwise float32.

    Raises:
        ValueError: no image, another number of channels, or values of another kind.
    """
    items = images if isinstance(images, list | tuple) else [images]
    if not items:
        raise ValueError("`image` must hold at least one image, got none.")
    return [image for item in items for image in _batch(item, channels)]


def _batch(item: Any, channels: int) -> torch.Tensor:
    if isinstance(item, torch.Tensor):
        batch = item if item.ndim == 4 else item[None]
        if batch.ndim != 4 or batch.shape[1] != channels or batch.numel() == 0:
            raise ValueError(f"`image` must hold images of {channels} channels, got the shape {tuple(item.shape)}.")
        if batch.is_floating_point():
            return batch if batch.dtype == torch.float64 else batch.float()
        whole = {torch.uint8: 255, torch.uint16: 65535, torch.bool: 1}
        if batch.dtype not in whole:
            raise ValueError(f"`image` must hold uint8, uint16 or floats, got {batch.dtype}.")
        return batch.float() / whole[batch.dtype]
    if not isinstance(item, Image.Image | np.ndarray):
        raise ValueError(f"`image` must hold PIL images, arrays or tensors, got {type(item).__name__}.")
    items: Any = item if isinstance(item, np.ndarray) and item.ndim == 4 else [item]
    try:
        pixels = [exact_pixels(one, channels, None) for one in items]
    except ValueError as error:
        raise ValueError(f"`image` must hold images of {channels} channels and a known range: {error}.") from error
    return (torch.from_numpy(np.stack(pixels)).movedim(-1, 1) + 1) / 2


def as_output(images: list[torch.Tensor], output_type: str) -> Any:
    """Returns denoised images as `"pil"`, `"np"` or `"pt"`; the last two as a list where sizes differ."""
    images = [image.cpu() for image in images] if output_type != "pt" else images
    if output_type == "pil":
        return [p for i in images for p in numpy_to_pil(i.float().clamp(0, 1).movedim(0, -1)[None].numpy())]
    if output_type == "np":
        arrays = [image.movedim(0, -1).numpy() for image in images]
        return np.stack(arrays) if len({a.shape for a in arrays}) == 1 else arrays
    return torch.stack(images) if len({image.shape for image in images}) == 1 else images
