"""Between a raw mosaic and its four colour planes."""

from __future__ import annotations

import torch

from diffusers_ext.training.config import require

__all__ = ["PATTERNS", "check_pattern", "pack_bayer", "unpack_bayer"]

# Places in a 2x2 block of red, green of red's row, blue, and green of blue's row. In this order channels (0, 1) and
# (2, 3) share the sensor's rows, and (0, 3) and (1, 2) its columns, whatever the pattern.
PATTERNS = {
    "RGGB": ((0, 0), (0, 1), (1, 1), (1, 0)),
    "BGGR": ((1, 1), (1, 0), (0, 0), (0, 1)),
    "GRBG": ((0, 1), (0, 0), (1, 0), (1, 1)),
    "GBRG": ((1, 0), (1, 1), (0, 1), (0, 0)),
}


def check_pattern(pattern: str) -> None:
    """Refuses what is no Bayer pattern.

    Raises:
        ValueError: it is none of `PATTERNS`.
    """
    require(pattern in PATTERNS, "pattern", pattern, f"one of {list(PATTERNS)}")


def pack_bayer(raw: torch.Tensor, pattern: str = "RGGB") -> torch.Tensor:
    """Takes a mosaic apart.

    Args:
        raw: `(..., height, width)`, both even.
        pattern: colours of the upper left 2x2 block, by rows.

    Returns:
        `(..., 4, height / 2, width / 2)`: red, green of red's rows, blue, green of blue's rows.

    Raises:
        ValueError: unknown pattern, odd height or width, or fewer than two dimensions.

    Example:
        >>> import torch
        >>> from diffusers_ext import pack_bayer
        >>> pack_bayer(torch.arange(4).reshape(2, 2)).flatten().tolist()
        [0, 1, 3, 2]
    """
    check_pattern(pattern)
    even = raw.ndim >= 2 and all(side > 0 and side % 2 == 0 for side in raw.shape[-2:])
    require(even, "raw", tuple(raw.shape), "(..., height, width) with even height and width")
    return torch.stack([raw[..., i::2, j::2] for i, j in PATTERNS[pattern]], dim=-3)


def unpack_bayer(packed: torch.Tensor, pattern: str = "RGGB") -> torch.Tensor:
    """Puts a mosaic together again, the inverse of `pack_bayer`.

    Args:
        packed: `(..., 4, height, width)`.
        pattern: see `pack_bayer`.

    Returns:
        `(..., 2 height, 2 width)`.

    Raises:
        ValueError: unknown pattern, or not four planes.
    """
    check_pattern(pattern)
    four = packed.ndim >= 3 and packed.shape[-3] == 4
    require(four, "packed", tuple(packed.shape), "(..., 4, height, width)")
    height, width = packed.shape[-2:]
    raw = packed.new_empty((*packed.shape[:-3], 2 * height, 2 * width))
    for plane, (i, j) in enumerate(PATTERNS[pattern]):
        raw[..., i::2, j::2] = packed[..., plane, :, :]
    return raw
