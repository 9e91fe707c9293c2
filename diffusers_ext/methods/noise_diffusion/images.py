"""Reads the images of a call and checks them before anything is computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

__all__ = ["read_images"]


def read_images(images: Any, name: str, channels: int, divisor: int) -> torch.Tensor:
    """Returns images as `(batch, channels, height, width)` in `[-1, 1]`, fp32.

    Args:
        images: a PIL image; an array `(height, width)`, `(height, width, channels)` or with a batch in front; a
            tensor `(channels, height, width)` or `(batch, channels, height, width)`; or a list of such single images.
            Arrays and tensors hold 0..255 in uint8, or floats in `[0, 1]`.
        name: the argument's name, for messages.
        channels: channels that the model takes; PIL images are converted.
        divisor: what height and width must be divisible by.

    Raises:
        ValueError: no image, a shape, size or value that does not fit, or NaN.
    """
    items = images if isinstance(images, list | tuple) else [images]
    if not items:
        raise ValueError(f"`{name}` must hold at least one image, got none.")
    tensors = [_tensor(item, name, channels) for item in items]
    sizes = sorted({tuple(tensor.shape[2:]) for tensor in tensors})
    if len(sizes) > 1:
        raise ValueError(f"`{name}` must hold images of one size, got (height, width) {sizes}.")
    height, width = sizes[0]
    if height % divisor or width % divisor or not height or not width:
        raise ValueError(f"`{name}` must have a height and width divisible by {divisor}, got {height} x {width}.")
    return torch.cat(tensors) * 2 - 1


def _tensor(image: Any, name: str, channels: int) -> torch.Tensor:
    """Returns one item as `(batch, channels, height, width)` in `[0, 1]`."""
    if isinstance(image, Image.Image):
        image = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    if isinstance(image, np.ndarray):
        array = image[..., None] if image.ndim == 2 else image
        if array.ndim not in (3, 4):
            raise ValueError(
                f"`{name}` must hold arrays of shape (height, width), (height, width, channels) or with a batch in "
                f"front, got {image.shape}."
            )
        # Copied: an array may be read-only, which tensors cannot be.
        tensor = torch.from_numpy(np.array(array if array.ndim == 4 else array[None])).movedim(-1, 1)
    elif isinstance(image, torch.Tensor):
        tensor = image if image.ndim == 4 else image[None]
    else:
        raise ValueError(f"`{name}` must hold PIL images, arrays or tensors, got {type(image).__name__}.")
    if tensor.ndim != 4 or tensor.shape[1] != channels or len(tensor) == 0:
        raise ValueError(f"`{name}` must hold images of {channels} channels, got the shape {tuple(image.shape)}.")
    if tensor.dtype == torch.uint8:
        return tensor.float() / 255
    if not tensor.is_floating_point():
        raise ValueError(f"`{name}` must hold uint8 or floats, got {tensor.dtype}.")
    tensor = tensor.float()
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"`{name}` must be finite, got NaN or infinity.")
    low, high = float(tensor.min()), float(tensor.max())
    if low < -1e-3 or high > 1 + 1e-3:
        raise ValueError(f"`{name}` must lie in [0, 1], got values from {low:.3g} to {high:.3g}.")
    return tensor
