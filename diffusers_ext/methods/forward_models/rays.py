"""Straight rays through a signal, which fills the square or cube [-1, 1]."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from diffusers_ext.training.config import require

from .protocol import Parameters

__all__ = ["as_angles", "centers", "even_angles", "frame_of", "sampled"]


def sampled(signal: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Interpolates a signal linearly between the middles of its cells; outside of [-1, 1] it is 0.

    Args:
        signal: `(batch, channels, height, width)` or `(batch, channels, depth, height, width)`.
        points: `(batch, ..., dimensions)`, with as many axes between as the signal has dimensions; x, y and z run
            along width, height and depth.

    Returns:
        `(batch, channels, ...)`.
    """
    values = F.grid_sample(signal, points, mode="bilinear", padding_mode="border", align_corners=False)
    inside = (points.abs() <= 1).all(-1)
    return values * inside[:, None].to(values.dtype)


def centers(n: int, like: torch.Tensor) -> torch.Tensor:
    """Returns the middles of `n` equal cells of [-1, 1]."""
    return (torch.arange(n, device=like.device, dtype=like.dtype) + 0.5) * (2 / n) - 1


def as_angles(parameters: Parameters) -> torch.Tensor:
    """Returns `(batch,)` angles of parameters `(batch,)` or `(batch, 1)`.

    Raises:
        ValueError: they have another shape.
    """
    one = isinstance(parameters, torch.Tensor) and (parameters.ndim == 1 or parameters.shape[1:] == (1,))
    found = tuple(parameters.shape) if isinstance(parameters, torch.Tensor) else type(parameters).__name__
    require(one, "parameters", found, "angles in radians, (batch,) or (batch, 1)")
    assert isinstance(parameters, torch.Tensor)
    return parameters.reshape(len(parameters))


def frame_of(angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the directions to the right and forward of who looks along an angle, each `(batch, 2)`."""
    cosine, sine = angles.cos(), angles.sin()
    return torch.stack([cosine, sine], -1), torch.stack([-sine, cosine], -1)


def even_angles(n: int, turn: float, count: int | None, generator: torch.Generator | None) -> torch.Tensor:
    """Draws `(n,)` angles of [0, turn): any, or of `count` that are equally far from each other."""
    device = None if generator is None else generator.device
    if count is None:
        return turn * torch.rand(n, generator=generator, device=device)
    return torch.randint(count, (n,), generator=generator, device=device) * (turn / count)


FULL_TURN = 2 * math.pi
