"""Takes dark frames apart into shading, bad pixels, rows, columns and pixels, in one pass over the frames.

Memory does not grow with the number of frames but for a row mean, a column mean and the values of some fixed pixels:
sums and sums of squares of every pixel say the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import chi2

from diffusers_ext.training.config import require

from .camera import native_branch
from .dark_model import DarkFrameModel
from .flats import fit_gain, photon_transfer_gain

__all__ = ["decouple_dark_frames"]

BAD = 6  # times the median deviation
CHANCE = 1e-7  # of a normal pixel to be called bad, where few frames make deviations uncertain
ROWS = 64  # at a time, so that copies stay in the cache


@dataclass
class _Parts:
    """What the frames of one ISO say."""

    mean: np.ndarray
    bad: np.ndarray
    offset: float
    variances: dict[str, float]
    noise: float
    count: int
    rounded: bool
    residuals: np.ndarray


class _Sums:
    """Sums over the frames of one ISO.

    Args:
        iso: for messages.
        first: the first frame.
        black_level: is taken off, so that squares stay small.
        places: of the fixed pixels, in the flattened frame.
    """

    def __init__(self, iso: float, first: np.ndarray, black_level: float, places: np.ndarray) -> None:
        self.iso, self.shape, self.places, self.count = iso, first.shape, places, 0
        self.rounded = np.issubdtype(first.dtype, np.integer) or bool((first == np.round(first)).all())
        self.shift = round(black_level) if self.rounded else black_level
        self.total = np.zeros(first.shape, np.int32 if self.rounded else np.float64)
        self.squares = np.zeros(first.shape, np.int64 if self.rounded else np.float64)
        self.rows: list[np.ndarray] = []
        self.columns: list[np.ndarray] = []
        self.values: list[np.ndarray] = []

    def add(self, frame: np.ndarray) -> None:
        require(frame.shape == self.shape, "frames", frame.shape, f"frames of one shape, {self.shape}")
        rows, columns = [], np.zeros(self.shape[1])
        for top in range(0, self.shape[0], ROWS):
            part = frame[top : top + ROWS]
            if np.issubdtype(part.dtype, np.floating) and not np.isfinite(part).all():
                raise ValueError(f"`frames` must be finite, got NaN or infinity at ISO {self.iso:g}.")
            if part.dtype in (np.uint8, np.uint16) and 0 <= self.shift < 2**16:
                part = part.astype(np.int32)  # four times as fast as 64 bits; the squares fit into 32 without a sign
                part -= self.shift
                square = np.abs(part).view(np.uint32)
            else:
                part = part.astype(self.squares.dtype) - self.shift
                square = part.copy()
            self.total[top : top + ROWS] += part.astype(self.total.dtype, copy=False)
            rows.append(part.sum(axis=1, dtype=self.squares.dtype) / self.shape[1])
            columns += part.sum(axis=0, dtype=part.dtype)
            square *= square
            self.squares[top : top + ROWS] += square
        self.rows.append(np.concatenate(rows))
        self.columns.append(columns / self.shape[0])
        self.values.append(frame.ravel()[self.places].astype(np.float32) - np.float32(self.shift))
        self.count += 1

    def parts(self, black_level: float, num_residuals: int, rng: np.random.Generator) -> _Parts:
        """Finishes."""
        m = self.count
        require(m >= 2, "frames", m, f"at least 2 frames at ISO {self.iso:g}")
        mean, variance = np.empty(self.shape, np.float32), np.empty(self.shape, np.float32)
        for top in range(0, self.shape[0], ROWS):
            rows = slice(top, top + ROWS)
            total = self.total[rows].astype(np.float64)
            mean[rows] = total / m
            variance[rows] = np.maximum(self.squares[rows] - total * total / m, 0) / (m - 1)
        few = chi2.isf(CHANCE, m - 1) / chi2.median(m - 1)
        bad = variance > max(BAD**2, few) * float(np.median(variance))
        good = ~bad
        noise = float(variance[good].mean(dtype=np.float64))
        found, everywhere = self._components(float(variance.mean(dtype=np.float64)))
        shared = found["row"] + found["column"] + found["frame"]
        found["pixel"] = max(noise - shared, 0.0)
        residuals = self._residuals(found["pixel"], everywhere, good, num_residuals, rng)
        if self.rounded:
            found["pixel"] = max(found["pixel"] - 1 / 12, 0.0)
        offset = float(mean[good].mean(dtype=np.float64)) + self.shift - black_level
        return _Parts(mean + np.float32(self.shift), bad, offset, found, noise, m, self.rounded, residuals)

    def _components(self, total: float) -> tuple[dict[str, float], float]:
        """Solves for the variances of rows, columns and frames, and the mean one of all pixels, bad ones too.

        The variances of row means, column means and frame means hold all of them in known shares; hot pixels are in
        the means, so that it is the mean variance of all pixels that has to be taken off.
        """
        (height, width), rows, columns = self.shape, np.stack(self.rows), np.stack(self.columns)
        seen = [total, rows.var(0, ddof=1).mean(), columns.var(0, ddof=1).mean(), rows.mean(1).var(ddof=1)]
        h, w = 1 / height, 1 / width
        shares = [[1, 1, 1, 1], [w, 1, w, 1], [h, h, 1, 1], [h * w, h, w, 1]]
        pixel, row, column, frame = (max(float(v), 0.0) for v in np.linalg.solve(np.array(shares), np.array(seen)))
        return {"row": row, "column": column, "frame": frame}, pixel

    def _residuals(
        self, variance: float, everywhere: float, good: np.ndarray, count: int, rng: np.random.Generator
    ) -> np.ndarray:
        """Returns noise of single good pixels: values minus mean frame, rows and columns, with the right variance."""
        (height, width), m = self.shape, self.count
        kept = np.flatnonzero(good.ravel()[self.places])
        require(len(kept) > 0, "frames", 0, f"frames with good pixels at ISO {self.iso:g}")
        frame, place = rng.integers(m, size=count), kept[rng.integers(len(kept), size=count)]
        i, j = np.divmod(self.places[place], width)
        values, rows, columns = np.stack(self.values), np.stack(self.rows), np.stack(self.columns)
        means = rows.mean(axis=1)
        found = values[frame, place] - values.mean(0, dtype=np.float64)[place]
        found -= rows[frame, i] - rows.mean(0)[i]
        found -= columns[frame, j] - columns.mean(0)[j]
        found += means[frame] - means.mean()
        h, w = 1 / height, 1 / width
        # What of a pixel's noise is left, and what of the others' the means have put in.
        left = variance * (1 - 2 * w - 2 * h + 2 * h * w) + everywhere * (w + h - h * w)
        return (found * math.sqrt(variance / max(left, 1e-12) * m / (m - 1))).astype(np.float32)


def decouple_dark_frames(
    frames: Mapping[float, Iterable[Any]],
    flats: Mapping[float, Iterable[tuple[Any, Any]]] | None = None,
    *,
    black_level: float = 0.0,
    native_limits: Sequence[float] = (),
    num_pixels: int = 200_000,
    num_residuals: int = 2**18,
    seed: int = 0,
) -> DarkFrameModel:
    """Learns from dark frames what of their noise is fixed, shared by rows or columns, and of single pixels.

    The maps of dark shading are fitted over the ISOs by least squares weighted with the error of a mean frame; noise
    is what differs from the mean frame of the same ISO, not from the fit, and its variances are corrected for what
    the means take away (eqs. in the documentation).

    Args:
        frames: for each ISO an iterable over frames `(height, width)` in DN, read once, one frame at a time. Shoot
            them with one exposure and temperature.
        flats: for each of some ISOs pairs of frames of an even surface, at two levels of light or more, which the
            gain is measured from; see `photon_transfer_gain`.
        black_level: of the frames, in DN.
        native_limits: highest ISO of every native gain but the last, such as `(1600,)`; each is fitted for itself and
            needs two ISOs.
        num_pixels: how many fixed pixels' values are kept while reading.
        num_residuals: how many values of pixels' noise the model keeps for each ISO.
        seed: of the choice of these.

    Returns:
        A `DarkFrameModel`.

    Raises:
        ValueError: frames are no two-dimensional arrays of one shape or not finite, fewer than 2 at an ISO, or fewer
            than 2 ISOs of a native gain that there are frames of.

    Example:
        >>> import numpy as np
        >>> from diffusers_ext import decouple_dark_frames
        >>> rng = np.random.default_rng(0)
        >>> frames = {iso: [rng.normal(512, iso / 400, (64, 96)) for _ in range(8)] for iso in (400, 800)}
        >>> model = decouple_dark_frames(frames, black_level=512)
        >>> [round(std) for std in model.pixel_std.tolist()]
        [1, 2]
    """
    isos = sorted(float(iso) for iso in frames)
    require(len(isos) > 0 and all(iso > 0 and math.isfinite(iso) for iso in isos), "iso", isos, "numbers > 0")
    native_limits = [limit for limit in native_limits if isos[0] <= limit < isos[-1]]  # between frames
    branches = [native_branch(iso, native_limits) for iso in isos]
    for branch in range(len(native_limits) + 1):
        own = [iso for iso, other in zip(isos, branches, strict=True) if other == branch]
        require(len(own) != 1, "frames", own, "of at least 2 ISOs for each native gain")
    by_iso = {float(iso): value for iso, value in frames.items()}
    rng, fits, parts, bad = np.random.default_rng(seed), {}, [], None
    shape, places = None, None
    for iso, branch in zip(isos, branches, strict=True):
        sums = None
        for value in by_iso[iso]:
            frame = np.asarray(value)
            require(frame.ndim == 2, "frames", frame.shape, "frames (height, width)")
            if shape is None or places is None:
                shape = frame.shape
                places = np.sort(rng.permutation(frame.size)[: min(num_pixels, frame.size)])
            require(frame.shape == shape, "frames", frame.shape, f"frames of one shape, {shape}")
            sums = sums or _Sums(iso, frame, black_level, places)
            sums.add(frame)
        if sums is None:
            raise ValueError(f"`frames` must be at least 2 frames at ISO {iso:g}, got 0.")
        found = sums.parts(black_level, num_residuals, rng)
        bad = found.bad if bad is None else bad | found.bad
        fit = fits.setdefault(branch, _MapFit(shape))  # type: ignore[arg-type]
        fit.add(iso, found.mean - np.float32(found.offset + black_level), found.count / max(found.noise, 1e-12))
        found.mean = found.bad = found.mean[:0]  # no longer needed, and large
        parts.append(found)
    assert shape is not None
    assert bad is not None
    gain = None
    if flats is not None:
        gain = fit_gain({float(iso): photon_transfer_gain(pairs, black_level) for iso, pairs in flats.items()})
    rounded = all(part.rounded for part in parts)
    model = DarkFrameModel(
        *shape, isos, tuple(native_limits), num_residuals, black_level, gain, rounded  # type: ignore[arg-type]
    )  # fmt: skip
    for branch, fit in fits.items():
        slope, intercept = fit.maps()
        model.slope[branch], model.intercept[branch] = torch.from_numpy(slope), torch.from_numpy(intercept)
    model.bad_pixels.copy_(torch.from_numpy(bad))
    for i, part in enumerate(parts):
        model.offset[i] = part.offset
        for name, variance in part.variances.items():
            getattr(model, f"{name}_std")[i] = math.sqrt(variance)
        model.residuals[i] = torch.from_numpy(part.residuals)
    return model.eval()


class _MapFit:
    """Weighted least squares of a straight line over the ISO for every pixel, from sums alone."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.w = self.wx = self.wxx = 0.0
        self.wy, self.wxy = np.zeros(shape, np.float32), np.zeros(shape, np.float32)

    def add(self, iso: float, y: np.ndarray, weight: float) -> None:
        x = iso / 1000  # sums of float32 stay of one size
        self.w, self.wx, self.wxx = self.w + weight, self.wx + weight * x, self.wxx + weight * x * x
        self.wy += np.float32(weight) * y
        self.wxy += np.float32(weight * x) * y

    def maps(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns slope in DN per ISO, and intercept."""
        determinant = self.w * self.wxx - self.wx**2
        slope = (self.w * self.wxy - self.wx * self.wy) / np.float32(determinant)
        return slope / np.float32(1000), (self.wy - self.wx * slope) / np.float32(self.w)
