"""Measured images as they are: floats and 16 bits without rounding, clipping, conversion or resizing, and their noise.

What is known of an image's noise (white, Gaussian, of a level) holds for its own values only: each of these would
change it.
"""

from __future__ import annotations

import io
import os
from typing import Any

import numpy as np
from PIL import Image, ImageOps

__all__ = ["check_noise_levels", "check_value_range", "check_values", "exact_pixels", "opened"]

MODES = ("1", "L", "RGB", "I", "I;16", "I;16B", "I;16L", "I;16N", "F")
RANGES = {"u1": (0, 255), "u2": (0, 65535), "b1": (0, 1), "f2": (0, 1), "f4": (0, 1), "f8": (0, 1)}


def check_value_range(value_range: Any) -> None:
    """Checks that a range is two finite numbers, the first below the second.

    Raises:
        ValueError: it is not.
    """
    try:
        low, high = (float(value) for value in value_range)
        good = bool(np.isfinite([low, high]).all()) and low < high
    except (TypeError, ValueError):
        good = False
    if not good:
        raise ValueError(f"`value_range` must be two finite numbers, low < high, got {value_range!r}.")


def check_noise_levels(levels: Any, column: str, count: int) -> None:
    """Checks the noise levels of all images.

    Args:
        levels: one number an image.
        column: where they are from, for the message.
        count: how many images there are.

    Raises:
        ValueError: they are not `count` finite numbers >= 0.
    """
    found = np.asarray(levels)
    if found.shape != (count,) or found.dtype.kind not in "fiu":
        raise ValueError(
            f"`sigma_column` must hold {count} numbers, one noise level an image, got {column!r} with {found.dtype} "
            f"of shape {found.shape}."
        )
    bad = np.flatnonzero(~(np.isfinite(found) & (found >= 0)))
    if len(bad):
        raise ValueError(
            f"`sigma_column` must hold finite noise levels >= 0, 0 for a clean image, got {column!r} with "
            f"{found[bad[0]]!s} for image {bad[0]}."
        )


def opened(value: Any) -> Image.Image | np.ndarray:
    """Opens an array, or what `datasets.Image(decode=False)` gives, and turns it upright by its EXIF tag.

    Raises:
        ValueError: it is 16-bit colour, of which Pillow keeps 8 bits.
    """
    if isinstance(value, np.ndarray):
        return value
    import datasets

    if value is None:
        raise ValueError("the row has none")
    here = value.get("bytes") is not None or os.path.isfile(value["path"])
    if not here:  # a stream's, which only `datasets` reads
        return datasets.Image().decode_example(value)
    with Image.open(value["path"] if value.get("bytes") is None else io.BytesIO(value["bytes"])) as image:
        kind, raw = image.format, str(image.tile[0][3]) if image.tile else ""
        if image.mode == "RGB" and ";16" in raw:
            raise ValueError("Pillow keeps 8 bits of 16-bit colour; give such images as a NumPy file")
        turned = ImageOps.exif_transpose(image)
        turned.load()
        turned.format = kind  # says what the integers of mode "I" are
        return turned


def exact_pixels(
    image: Image.Image | np.ndarray, channels: int, value_range: tuple[float, float] | None
) -> np.ndarray:
    """Returns the values of an image, shifted and scaled as a whole so that their range becomes [-1, 1].

    Values outside the range, as noise makes them, stay outside of [-1, 1].

    Args:
        image: a PIL image, or `(height, width)` or `(height, width, channels)`.
        channels: what it must have.
        value_range: what becomes -1 and 1, in the image's own values; by default 0 and 255, 65535 or, for floats, 1.

    Returns:
        `(height, width, channels)` float32.

    Raises:
        ValueError: it has other channels, its range is not known, or a value is not finite.
    """
    kind = ""
    if isinstance(image, Image.Image):
        if image.mode not in MODES or "transparency" in image.info:
            clear = " with transparency" if "transparency" in image.info else ""
            raise ValueError(
                f"an image of mode {image.mode!r}{clear} is not read as it is; accepted are {list(MODES)}"
            )
        kind, values = image.format or "", np.asarray(image)
        if image.mode == "I" and kind in ("PNG", "PPM"):
            values = values.astype(np.uint16)
    else:
        values = image
    values = values if values.ndim == 3 else values[:, :, None]
    if values.shape[2] != channels:
        raise ValueError(f"it must have {channels} channels, as `channels` says, got {values.shape[2]}")
    low, high = value_range or _range(values.dtype)
    check_values(values)
    half = (high - low) / 2
    return ((values.astype(np.float64) - (low + half)) / half).astype(np.float32)


def check_values(values: np.ndarray) -> None:
    """Checks that all values are finite.

    Raises:
        ValueError: one is not.
    """
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError("its values must be finite, got NaN or infinity")


def _range(dtype: np.dtype) -> tuple[float, float]:
    name = dtype.newbyteorder("=").str[1:]
    if name not in RANGES:
        raise ValueError(
            f"values of type {dtype} have no known range; say by `value_range` what is to become -1 and 1"
        )
    return RANGES[name]
