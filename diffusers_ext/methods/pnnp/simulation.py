"""Dark frames and photographs of a camera that does not exist, whose noise is known: no package ships real ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .camera import gain_at

__all__ = ["CameraTruth", "simulate_dark_frames", "simulate_flat_pairs", "simulate_raw"]


@dataclass(frozen=True)
class CameraTruth:
    """A camera whose noise is known, of a law that no family of the fits contains.

    Pixels have K (2.2 N(0, 1) + t) + 0.8 N(0, 1), where t is 0 but for 3 % of all values: there it is 7 U(0, 1),
    centred ("mild", excess kurtosis 0.4), or 40 U(-1, 1) ("heavy", excess kurtosis 33).

    Args:
        height: of the frames.
        width: of the frames.
        law: `"mild"` or `"heavy"`.
        iso_to_gain: (k1, k0) of K = k1 ISO + k0.
        row_std: standard deviation of rows, in DN, over K.
        column_std: the same of columns.
        shading: of the maps of dark shading: at ISO 1600 their deviation is this many DN each.
        bad_pixels: share of pixels that are 20 times as noisy.
        black_level: what is recorded without light.
        white_level: where it saturates.
        rounded: whether DN are whole numbers.
        seed: of the maps.
    """

    height: int = 128
    width: int = 192
    law: Literal["mild", "heavy"] = "mild"
    iso_to_gain: tuple[float, float] = (0.0009546, -0.00193)
    row_std: float = 0.5
    column_std: float = 0.15
    shading: float = 1.5
    bad_pixels: float = 0.0
    black_level: int = 512
    white_level: int = 16383
    rounded: bool = True
    seed: int = 0

    def gain(self, iso: float) -> float:
        """Returns K at an ISO."""
        return gain_at(self.iso_to_gain, iso)

    def pixel_std(self, iso: float) -> float:
        """Returns the standard deviation of a pixel's noise without rounding, in DN."""
        tail = 0.03 * 1600 / 3 if self.law == "heavy" else 0.03 * 49 / 3 - (0.03 * 3.5) ** 2
        return (self.gain(iso) ** 2 * (2.2**2 + tail) + 0.8**2) ** 0.5

    def offset(self, iso: float) -> float:
        """Returns the mean of dark frames above the black level, in DN: no straight line in the ISO."""
        return 0.6 * np.sin(iso / 300) + 0.0004 * iso

    def maps(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns slope and intercept of dark shading, `(height, width)`, of mean 0: smooth, and by pixels."""
        rng = np.random.default_rng([self.seed, 1])
        rows = np.linspace(-1, 1, self.height)[:, None]
        columns = np.linspace(-1, 1, self.width)[None]
        found = []
        for smooth in (rows**2 + columns, rows - columns**2):
            plane = smooth / smooth.std() + 0.7 * rng.standard_normal((self.height, self.width))
            found.append(self.shading * (plane - plane.mean()))
        return found[0] / 1600, found[1]

    def bad(self) -> np.ndarray:
        """Returns where the bad pixels are."""
        return np.random.default_rng([self.seed, 2]).random((self.height, self.width)) < self.bad_pixels

    def dark_shading(self, iso: float) -> np.ndarray:
        """Returns the mean of dark frames above the black level."""
        slope, intercept = self.maps()
        return slope * iso + intercept + self.offset(iso)

    def pixel_noise(self, shape: tuple[int, ...], iso: float, rng: np.random.Generator) -> np.ndarray:
        """Draws the noise of pixels, in DN, before rounding."""
        tail = np.zeros(shape)
        hit = rng.random(shape) < 0.03
        count = int(hit.sum())
        tail[hit] = rng.uniform(-40, 40, count) if self.law == "heavy" else rng.uniform(0, 7, count)
        if self.law == "mild":
            tail -= 0.03 * 3.5
        return self.gain(iso) * (2.2 * rng.standard_normal(shape) + tail) + 0.8 * rng.standard_normal(shape)

    def frame_noise(self, iso: float, rng: np.random.Generator) -> np.ndarray:
        """Draws what differs from frame to frame: pixels, rows and columns, bad pixels too."""
        gain, shape = self.gain(iso), (self.height, self.width)
        noise = self.pixel_noise(shape, iso, rng)
        if self.bad_pixels:
            noise = np.where(self.bad(), 20 * noise, noise)
        noise += self.row_std * gain * rng.standard_normal((self.height, 1))
        return noise + self.column_std * gain * rng.standard_normal((1, self.width))

    def recorded(self, dn: np.ndarray) -> np.ndarray:
        """Returns DN above the black level as the camera records them."""
        frame = dn + self.black_level
        if not self.rounded:
            return frame
        return np.clip(np.round(frame), 0, self.white_level).astype(np.uint16)


def simulate_dark_frames(
    truth: CameraTruth, isos: Sequence[float], num: int, seed: int = 0
) -> dict[float, Iterator[np.ndarray]]:
    """Returns iterators over the dark frames of each ISO, `(height, width)`, made when they are asked for."""

    def frames(iso: float) -> Iterator[np.ndarray]:
        shading, rng = truth.dark_shading(iso), np.random.default_rng([seed, 3, round(iso)])
        for _ in range(num):
            yield truth.recorded(shading + truth.frame_noise(iso, rng))

    return {iso: frames(iso) for iso in isos}


def simulate_flat_pairs(
    truth: CameraTruth, isos: Sequence[float], levels: Sequence[float] = (300, 800, 1500, 3000), seed: int = 0
) -> dict[float, list[tuple[np.ndarray, np.ndarray]]]:
    """Returns pairs of frames of an even surface, one for each level in DN."""
    found = {}
    for iso in isos:
        rng = np.random.default_rng([seed, 4, round(iso)])
        flat = np.full((truth.height, truth.width), 1.0)
        made = [simulate_raw(truth, flat * level, iso, rng) for level in levels for _ in range(2)]
        found[iso] = list(zip(made[::2], made[1::2], strict=True))
    return found


def simulate_raw(truth: CameraTruth, dn: np.ndarray, iso: float, rng: np.random.Generator) -> np.ndarray:
    """Records a scene.

    Args:
        truth: the camera.
        dn: `(height, width)` the scene's light, in DN above the black level.
        iso: the ISO.
        rng: draws shot and dark noise.
    """
    gain = truth.gain(iso)
    shot = gain * rng.poisson(dn / gain)
    return truth.recorded(shot + truth.dark_shading(iso) + truth.frame_noise(iso, rng))
