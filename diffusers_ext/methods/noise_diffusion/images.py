"""Reads the images of a call and checks them before anything is computed; gathers the frames that come of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from diffusers_ext.data import reading

__all__ = ["gathered", "read_images"]


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


def gathered(parts: Iterable[Any], count: int) -> Any:
    """Joins parts of `count` images, lists, arrays or tensors, without ever holding them twice."""
    joined, filled = None, 0
    for part in parts:
        if joined is None:
            if len(part) == count:
                joined = part
                continue  # to the end, where a generator may still have to do something
            if isinstance(part, list):
                joined = []
            elif isinstance(part, np.ndarray):
                joined = np.empty((count, *part.shape[1:]), part.dtype)
            else:
                joined = part.new_empty((count, *part.shape[1:]))
        if isinstance(part, list):
            joined += part
        else:
            joined[filled : filled + len(part)] = part
            filled += len(part)
    return joined
