r"""The levels and the step of annealed Langevin dynamics, chosen as NCSNv2 does (2006.09011)."""

from __future__ import annotations

import math
from typing import Any

import torch
from scipy.optimize import brentq, minimize_scalar
from scipy.special import ndtr

from diffusers_ext.generation.score_levels import as_levels
from diffusers_ext.training.config import is_number, is_whole, require

__all__ = ["check_sigmas", "falling_sigmas", "geometric_sigmas", "langevin_step_size", "largest_distance"]


def check_sigmas(sigma_max: float, sigma_min: float) -> None:
    """Checks the ends of a range of noise levels.

    Raises:
        ValueError: they are not 0 < sigma_min < sigma_max.
    """
    require(is_number(sigma_min) and sigma_min > 0, "sigma_min", sigma_min, "a number above 0")
    above = is_number(sigma_max) and sigma_max > sigma_min
    require(above, "sigma_max", sigma_max, f"a number above `sigma_min`, {sigma_min}")


def falling_sigmas(sigmas: Any) -> torch.Tensor:
    """Returns falling noise levels in float64.

    Raises:
        ValueError: they are not two or more falling numbers above 0.
    """
    levels = as_levels(sigmas, "sigmas")
    good = levels.ndim == 1 and len(levels) >= 2 and bool((levels > 0).all() and (levels.diff() < 0).all())
    require(good and levels[0].item() < math.inf, "sigmas", sigmas, "two falling numbers above 0 or more")
    return levels


def _ratio(dimension: int, overlap: float) -> float:
    r"""Solves \(\Phi(\sqrt{2D}(g - 1) + 3g) - \Phi(\sqrt{2D}(g - 1) - 3g)\) = overlap for g > 1 (technique 2)."""
    root = math.sqrt(2 * dimension)

    def missing(gamma: float) -> float:
        return ndtr(root * (gamma - 1) + 3 * gamma) - ndtr(root * (gamma - 1) - 3 * gamma) - overlap

    high = 2.0
    while missing(high) > 0 and high < 1e6:  # in few dimensions any two levels overlap
        high *= 2
    if not missing(1.0) > 0 > missing(high):
        return math.nan
    found: Any = brentq(missing, 1.0, high, xtol=1e-14)
    return found


def geometric_sigmas(
    sigma_max: float,
    sigma_min: float,
    num_levels: int | None = None,
    dimension: int | None = None,
    overlap: float = 0.5,
) -> torch.Tensor:
    r"""Returns falling noise levels of equal ratios.

    Args:
        sigma_max: largest level; NCSNv2 takes the largest distance between training images (`largest_distance`).
        sigma_min: smallest level.
        num_levels: how many, at least 2.
        dimension: or the number of values of an image: as many levels as make samples of neighbouring ones overlap.
        overlap: that share, in (0, 1): the probability of the smaller level's shell, three standard deviations wide,
            under the larger level.

    Returns:
        `(num_levels,)` float64.

    Raises:
        ValueError: an argument is outside its range, or not exactly one of `num_levels` and `dimension` is given.

    Example:
        >>> from diffusers_ext import geometric_sigmas
        >>> geometric_sigmas(1.0, 0.01, num_levels=3)
        tensor([1.0000, 0.1000, 0.0100], dtype=torch.float64)
        >>> len(geometric_sigmas(50.0, 0.01, dimension=3 * 32 * 32))
        220
    """
    check_sigmas(sigma_max, sigma_min)
    if (num_levels is None) == (dimension is None):
        raise ValueError(f"`num_levels` or `dimension` must be given, one of them, got {num_levels} and {dimension}.")
    if dimension is not None:
        require(is_whole(dimension), "dimension", dimension, "an integer >= 1")
        ratio = _ratio(dimension, overlap) if is_number(overlap) and 0 < overlap < 1 else math.nan
        if math.isnan(ratio):
            raise ValueError(f"`overlap` must be in (0, 1) and one that {dimension} values reach, got {overlap!r}.")
        num_levels = 1 + math.ceil(math.log(sigma_max / sigma_min) / math.log(ratio))
    require(is_whole(num_levels, 2), "num_levels", num_levels, "an integer >= 2")
    assert num_levels is not None
    logs = torch.linspace(math.log(sigma_max), math.log(sigma_min), num_levels, dtype=torch.float64)
    return logs.exp()


def langevin_step_size(sigmas: list[float] | torch.Tensor, steps_per_level: int) -> float:
    r"""Returns the step e of NCSNv2 (proposition 3, technique 4).

    T steps at a level \(\sigma_i\) start from the variance of the level before, of ratio g. They leave it at h times
    \(\sigma_i^2\), \(h = r^{2T}(g^2 - k) + k\) with \(r = 1 - e/\sigma_L^2\) and
    \(k = 2 e / (\sigma_L^2 (1 - r^2))\). The step is the one that brings h closest to 1.

    Args:
        sigmas: `(levels,)` falling noise levels of equal ratios.
        steps_per_level: T.

    Raises:
        ValueError: the levels do not fall, or there is no step.
    """
    levels = falling_sigmas(sigmas)
    require(is_whole(steps_per_level), "steps_per_level", steps_per_level, "an integer >= 1")
    squared = (levels[0] / levels[-1]).item() ** (2 / (len(levels) - 1))

    def h(log_share: float) -> float:  # of share = e / sigma_L^2, in (0, 1)
        share = math.exp(log_share)
        kept, k = (1 - share) ** (2 * steps_per_level), 2 / (2 - share)
        return kept * (squared - k) + k

    found: Any = minimize_scalar(h, bounds=(-25.0, 0.0), method="bounded", options={"xatol": 1e-12})
    return math.exp(found.x) * levels[-1].item() ** 2


def largest_distance(images: torch.Tensor, batch_size: int = 1024) -> float:
    """Returns the largest Euclidean distance between two images: NCSNv2's largest noise level (technique 1).

    Args:
        images: `(images, ...)`, in the space that is diffused, two or more.
        batch_size: images that are compared with all others at once.

    Raises:
        ValueError: there are fewer than two images, or they are no finite floats, or the batch size is below 1.
    """
    floats = isinstance(images, torch.Tensor) and images.is_floating_point() and images.ndim >= 2
    if not floats or len(images) < 2 or not bool(torch.isfinite(images).all()):
        found = f"{images.dtype} of shape {tuple(images.shape)}" if isinstance(images, torch.Tensor) else repr(images)
        raise ValueError(f"`images` must be two or more, (images, ...) of finite floats, got {found}.")
    require(is_whole(batch_size), "batch_size", batch_size, "an integer >= 1")
    rows = images.flatten(1).float()
    return max(torch.cdist(part, rows).max().item() for part in rows.split(batch_size))
