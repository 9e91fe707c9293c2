"""Makes a picture of a raw image: colours of every pixel, white balance, sRGB."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .bayer import PATTERNS, check_pattern

__all__ = ["demosaic", "develop"]


def demosaic(raw: torch.Tensor, pattern: str = "RGGB") -> torch.Tensor:
    """Returns the three colours of every pixel, those that it did not record as the mean of the nearest that did.

    Args:
        raw: `(height, width)`.
        pattern: of the mosaic.

    Returns:
        `(3, height, width)`.
    """
    check_pattern(pattern)
    masks = torch.zeros(3, *raw.shape, dtype=raw.dtype, device=raw.device)
    for plane, (i, j) in enumerate(PATTERNS[pattern]):
        masks[(0, 1, 2, 1)[plane], i::2, j::2] = 1
    weights = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]], dtype=raw.dtype, device=raw.device)
    # A recorded colour stays; elsewhere neighbours count, which at the edge are fewer.
    near = F.conv2d(torch.stack([masks * raw, masks], 1), weights.expand(2, 1, 3, 3), padding=1, groups=2)
    return torch.where(masks > 0, raw, near[:, 0] / near[:, 1])


def develop(
    raw: torch.Tensor,
    pattern: str = "RGGB",
    white_balance: Sequence[float] | None = None,
    color_matrix: np.ndarray | None = None,
) -> Image.Image:
    """Makes an sRGB picture.

    Args:
        raw: `(height, width)`, 0 black, 1 white.
        pattern: of the mosaic.
        white_balance: factors of red, green and blue; by default 1.
        color_matrix: `(3, 3)` from the camera's colours to linear sRGB; by default none.
    """
    colours = demosaic(raw.float().cpu(), pattern)
    if white_balance is not None:
        colours = colours * torch.tensor(list(white_balance)).reshape(3, 1, 1)
    colours = colours.clamp(0, 1)  # before the matrix, or what is overexposed takes a colour
    if color_matrix is not None:
        colours = torch.einsum("ij,jhw->ihw", torch.as_tensor(color_matrix, dtype=torch.float32), colours).clamp(0, 1)
    linear = colours <= 0.0031308
    colours = torch.where(linear, 12.92 * colours, 1.055 * colours.clamp_min(0.0031308) ** (1 / 2.4) - 0.055)
    return Image.fromarray((colours.movedim(0, -1) * 255).round().byte().numpy())
