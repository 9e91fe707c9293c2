"""Reads the images of a call and checks them before anything is computed."""

from __future__ import annotations

from typing import Any

import torch

from diffusers_ext.data import reading

__all__ = ["read_images"]


def read_images(images: Any, name: str, channels: int, divisor: int) -> torch.Tensor:
    """Returns images as `(batch, channels, height, width)` in `[-1, 1]`, fp32.

    Args:
        images: whatever `diffusers_ext.data.reading.read_images` takes, of one size.
        name: the argument's name, for messages.
        channels: channels that the model takes; PIL images are converted.
        divisor: what height and width must be divisible by.

    Raises:
        ValueError: no image, a shape, size or value that does not fit, or NaN.
    """
    tensors = reading.read_images(images, name, channels)
    sizes = sorted({tuple(tensor.shape[1:]) for tensor in tensors})
    if len(sizes) > 1:
        raise ValueError(f"`{name}` must hold images of one size, got (height, width) {sizes}.")
    height, width = sizes[0]
    if height % divisor or width % divisor:
        raise ValueError(f"`{name}` must have a height and width divisible by {divisor}, got {height} x {width}.")
    return torch.stack(tensors) * 2 - 1
