r"""The probability flow of a field, \(dy/d\sigma = E\) with \(y = x_t/a\): the same on every schedule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch

from diffusers_ext.generation.score_field import ScoreField
from diffusers_ext.generation.score_levels import as_levels
from diffusers_ext.training.config import require

from .draws import check_images
from .jacobian import exact_jacobian

__all__ = ["at_y", "flow_jacobian", "probability_flow"]


def at_y(field: ScoreField, y: torch.Tensor, sigma: float) -> torch.Tensor:
    """Returns E at y, `(batch, ...)`."""
    return field.eps(y * field.coefficients(sigma, y)[0], sigma)


@torch.no_grad()
def probability_flow(field: ScoreField, y: torch.Tensor, sigmas: Sequence[float]) -> torch.Tensor:
    r"""Integrates the flow along sigmas, up or down, by Heun's method in \(\sigma\).

    Two calls a step. Log-spaced sigmas suit it. Samples are drawn from \(y \sim N(0, \sigma_T^2 + 1)\) downwards.

    Args:
        field: the denoiser.
        y: `(batch, ...)` at the first sigma.
        sigmas: two levels or more, in order.

    Returns:
        y at the last sigma.

    Raises:
        ValueError: there are fewer than two sigmas, one is outside the levels, or `y` are no finite floats.
    """
    y = check_images(field, y, 1, name="y")
    levels = as_levels(sigmas, "sigmas")
    require(levels.ndim == 1 and len(levels) >= 2, "sigmas", sigmas, "two levels or more")
    field.at(levels)
    sigmas = levels.tolist()
    for now, then in zip(sigmas, sigmas[1:], strict=False):
        first = at_y(field, y, now)
        second = at_y(field, y + (then - now) * first, then)
        y = y + (then - now) / 2 * (first + second)
    return y


def flow_jacobian(
    field: ScoreField,
    y: torch.Tensor,
    sigmas: Sequence[float],
    method: Literal["ddim", "heun"] = "ddim",
    batch_size: int = 64,
) -> Iterator[torch.Tensor]:
    """Yields the derivative of a sampler's state by its noise after every step: `(images, D, D)`.

    Args:
        field: the denoiser.
        y: `(images, ...)` at the first sigma, a multiple of standard normal noise.
        sigmas: falling levels; the last may be 0 with `"ddim"`, which is Euler's method in sigma.
        method: `"ddim"`, or `"heun"` as in `probability_flow`.
        batch_size: rows in one call.
    """
    dim = y[0].numel()
    total = (sigmas[0] ** 2 + 1) ** 0.5 * torch.eye(dim, dtype=y.dtype, device=y.device).expand(len(y), dim, dim)

    def slope(y: torch.Tensor, sigma: float) -> torch.Tensor:
        a = field.coefficients(sigma, y)[0]
        return a * exact_jacobian(field, y * a, sigma, batch_size)

    for now, then in zip(sigmas, sigmas[1:], strict=False):
        step = then - now
        with torch.no_grad():
            seen = at_y(field, y, now)
        ahead, first = y + step * seen, slope(y, now) @ total
        if method == "ddim":
            total, y = total + step * first, ahead
        else:
            second = slope(ahead, then) @ (total + step * first)
            total = total + step / 2 * (first + second)
            with torch.no_grad():
                y = y + step / 2 * (seen + at_y(field, ahead, then))
        yield total
