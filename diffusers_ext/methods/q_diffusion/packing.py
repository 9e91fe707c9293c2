"""Two 4-bit integers in a byte."""

from __future__ import annotations

import torch

__all__ = ["pack_int4", "unpack_int4"]


def pack_int4(values: torch.Tensor) -> torch.Tensor:
    """Packs integers 0..15 in pairs into bytes, the first of a pair into the low half.

    Args:
        values: `(rows, ...)` of any integer type; rows are flattened, and one of odd length is padded with a 0.

    Returns:
        `(rows, ceil(length / 2))` uint8.

    Raises:
        ValueError: a value is outside 0..15.

    Example:
        >>> import torch
        >>> from diffusers_ext import pack_int4
        >>> pack_int4(torch.tensor([[1, 2, 3]])).tolist()
        [[33, 3]]
    """
    if values.numel() and not (int(values.min()) >= 0 and int(values.max()) <= 15):
        raise ValueError(f"`values` must lie in 0..15, got {int(values.min())}..{int(values.max())}.")
    flat = values.reshape(len(values), -1).to(torch.uint8)
    if flat.shape[1] % 2:
        flat = torch.nn.functional.pad(flat, (0, 1))
    return flat[:, 0::2] | flat[:, 1::2] << 4


def unpack_int4(packed: torch.Tensor, length: int) -> torch.Tensor:
    """Undoes `pack_int4`.

    Args:
        packed: `(rows, bytes)` uint8.
        length: integers in a row.

    Returns:
        `(rows, length)` uint8.
    """
    return torch.stack((packed & 15, packed >> 4), dim=-1).reshape(len(packed), -1)[:, :length]
