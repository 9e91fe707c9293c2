"""One reader of images for pipelines and data sets: every bit depth and mode on its own scale, or refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

__all__ = ["eight_bits", "pixels_of", "read_images", "unit_range"]

GREY = ("1", "L", "LA", "La", "I", "F")
TRANSPARENT = ("RGBA", "LA", "PA", "RGBa", "La")
CONVERTED = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", *TRANSPARENT)
SLACK = 1e-3  # floats may leave [0, 1] by this much: resampling and half precision do


def pixels_of(image: Image.Image, channels: int | None = None) -> np.ndarray:
    """Returns the pixels of a PIL image as they are: uint8, or float32 in `[0, 1]` where 8 bits cannot hold them.

    Transparency is put on white, and an image that its EXIF tag turns is turned. 16-bit greyscale is divided by 65535;
    so is mode `"I"` of a PNG or PGM file, which Pillow uses for 16 bits. Mode `"F"` must lie in `[0, 1]`.

    Args:
        image: of any mode.
        channels: 1 or 3; by default what the image has.

    Returns:
        `(height, width, channels)`.

    Raises:
        ValueError: the range of the image's mode cannot be known, or Pillow cannot convert it, or cuts its 16-bit
            colours to 8 bits (which shows before the image's file has been read).
    """
    if not image.mode.startswith("I") and any(";16" in str(tile[3]) for tile in getattr(image, "tile", ())):
        raise ValueError("of 16-bit colours Pillow keeps 8 bits; give an array of uint16")
    # A turned image no longer knows the file's format.
    kind, image = image.format, ImageOps.exif_transpose(image)
    if channels is None:
        channels = 1 if image.mode.startswith(GREY) and image.mode != "LAB" else 3
    if image.mode == "F" or image.mode.startswith("I"):
        deep = _deep(image, kind)[:, :, None]
        return deep if channels == 1 else deep.repeat(3, 2)
    if image.mode in TRANSPARENT or "transparency" in image.info:
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode not in CONVERTED:
        raise ValueError(f"an image of mode {image.mode!r} cannot be converted; accepted are {list(CONVERTED)}")
    pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def eight_bits(pixels: np.ndarray) -> np.ndarray:
    """Returns pixels, uint8 or floats in `[0, 1]`, as uint8."""
    return pixels if pixels.dtype == np.uint8 else (pixels * 255).round().clip(0, 255).astype(np.uint8)


def _deep(image: Image.Image, kind: str | None) -> np.ndarray:
    """Returns greyscale of more than 8 bits in `[0, 1]`."""
    values = np.asarray(image)
    if image.mode == "F":
        if not (np.isfinite(values).all() and values.min() >= -SLACK and values.max() <= 1 + SLACK):
            raise ValueError(
                "pixels of mode 'F' have no known range and must lie in [0, 1], got values from "
                f"{values.min():.4g} to {values.max():.4g}"
            )
        return values.astype(np.float32)
    if image.mode == "I" and kind not in ("PNG", "PPM"):
        raise ValueError("pixels of mode 'I', 32-bit integers, have no known range; give uint16, or floats in [0, 1]")
    clear = image.info.get("transparency")  # one value that stands for nothing
    return np.where(values == clear, np.float32(1), values.astype(np.float32) / np.float32(65535))


def unit_range(values: torch.Tensor, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Brings uint8, uint16, bool, or floats in `[0, 1]` to floats in `[0, 1]`.

    Args:
        values: of any shape.
        name: the argument's name, for messages.
        dtype: of the result.

    Raises:
        ValueError: another dtype, values out of range, or NaN.
    """
    whole = {torch.uint8: 255, torch.uint16: 65535, torch.bool: 1}
    if values.dtype in whole:
        return values.to(dtype) / whole[values.dtype]
    if not values.is_floating_point():
        raise ValueError(
            f"`{name}` must hold uint8 or floats (or uint16, or bool), got {str(values.dtype).removeprefix('torch.')}."
        )
    values = values.to(dtype)
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"`{name}` must be finite, got NaN or infinity.")
    low, high = (float(v) for v in values.aminmax()) if values.numel() else (0.0, 0.0)
    if low < -SLACK or high > 1 + SLACK:
        raise ValueError(f"`{name}` must lie in [0, 1], got values from {low:.3g} to {high:.3g}.")
    return values


def read_images(
    images: Any, name: str, channels: int | None = None, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """Reads images of any kind in full precision.

    Args:
        images: a PIL image; an array `(height, width)`, `(height, width, channels)` or with a batch in front; a
            tensor `(channels, height, width)` or `(batch, channels, height, width)`; or a list of these. Arrays and
            tensors hold uint8, uint16, bool, or floats in `[0, 1]`; for PIL images see `pixels_of`.
        name: the argument's name, for messages.
        channels: channels that are wanted: PIL images are converted, others must have them. By default 1 or 3, as
            the images have.
        dtype: of the result.

    Returns:
        `(channels, height, width)` tensors in `[0, 1]`.

    Raises:
        ValueError: no image, a shape or value that does not fit, or NaN.
    """
    items = images if isinstance(images, list | tuple) else [images]
    if not items:
        raise ValueError(f"`{name}` must hold at least one image, got none.")
    return [image for item in items for image in _batch(item, name, channels, dtype)]


def _batch(image: Any, name: str, channels: int | None, dtype: torch.dtype) -> torch.Tensor:
    """Returns one item as `(batch, channels, height, width)` in `[0, 1]`."""
    shape = getattr(image, "shape", None)
    if isinstance(image, Image.Image):
        try:
            image = pixels_of(image, channels)
        except ValueError as error:
            raise ValueError(f"`{name}` must hold images of a known range: {error}.") from error
    if isinstance(image, np.ndarray):
        array = image[..., None] if image.ndim == 2 else image
        if array.ndim not in (3, 4):
            raise ValueError(
                f"`{name}` must hold arrays of shape (height, width), (height, width, channels) or with a batch in "
                f"front, got {image.shape}."
            )
        if array.dtype.kind not in "fiub":
            raise ValueError(f"`{name}` must hold uint8 or floats (or uint16, or bool), got {array.dtype}.")
        # Copied: an array may be read-only, which tensors cannot be, or of the other byte order.
        array = np.array(array if array.ndim == 4 else array[None], dtype=array.dtype.newbyteorder("="))
        tensor = torch.from_numpy(array).movedim(-1, 1)
    elif isinstance(image, torch.Tensor):
        tensor = image if image.ndim == 4 else image[None]
    else:
        raise ValueError(f"`{name}` must hold PIL images, arrays or tensors, got {type(image).__name__}.")
    wanted = (1, 3) if channels is None else (channels,)
    if tensor.ndim != 4 or tensor.shape[1] not in wanted or tensor.numel() == 0:
        accepted = " or ".join(str(n) for n in wanted)
        place = ", the last axis of three or four" if isinstance(image, np.ndarray) else ""
        raise ValueError(
            f"`{name}` must hold images of {accepted} channels{place}, got the shape {tuple(shape or ())}."
        )
    return unit_range(tensor, name, dtype)
