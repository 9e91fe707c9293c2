"""The gain of a sensor from pairs of flats, by photon transfer: it is not in dark frames."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from diffusers_ext.training.config import require

__all__ = ["fit_gain", "photon_transfer_gain"]


def photon_transfer_gain(pairs: Iterable[tuple[Any, Any]], black_level: float = 0.0) -> float:
    """Returns K, the DN of an electron, at one ISO.

    Half the variance of the difference of two frames of the same light is K times their mean, and the dark noise: the
    slope over the mean, by least squares weighted with the error of a variance, is K. What is fixed cancels.

    Args:
        pairs: two frames each, `(height, width)`, in DN, of an even surface; at least two levels of light.
        black_level: of the frames.

    Raises:
        ValueError: fewer than two levels, unequal shapes, or a variance that does not rise with light.
    """
    points = []
    for one, other in pairs:
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        require(one.shape == other.shape, "flats", (one.shape, other.shape), "pairs of frames of one shape")
        points.append((float((one + other).mean() / 2) - black_level, float((one - other).var(ddof=1) / 2)))
    require(len(points) >= 2, "flats", len(points), "at least two pairs of different light")
    mean, variance = np.array(points).T
    require(mean.min() > 0 and np.ptp(mean) > 0.1 * mean.max(), "flats", mean.round(1).tolist(),
            "pairs whose mean above the black level differs, or one level is measured twice")  # fmt: skip
    slope = float(np.polyfit(mean, variance, 1, w=1 / variance)[0])
    require(slope > 0, "flats", slope, "frames whose variance rises with light")
    return slope


def fit_gain(gains: Mapping[float, float]) -> tuple[float, float]:
    """Returns (k1, k0) of K = k1 ISO + k0, by least squares of relative errors; of one ISO, k0 is 0."""
    isos, values = np.array(list(gains)), np.array(list(gains.values()))
    if len(isos) == 1:
        return float(values[0] / isos[0]), 0.0
    slope, offset = np.polyfit(isos, values, 1, w=1 / values)
    return float(slope), float(offset)
