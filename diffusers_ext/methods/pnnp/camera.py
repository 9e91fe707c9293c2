"""What is known of a camera: levels, gain, and laws of its noise where they were published."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diffusers_ext.training.config import require

__all__ = ["CAMERAS", "CameraProfile", "NativeGain", "check_levels", "gain_at", "native_branch"]


def check_levels(white_level: float, black_level: float) -> None:
    """Checks the levels of a sensor.

    Raises:
        ValueError: white is not above black.
    """
    finite = math.isfinite(white_level) and math.isfinite(black_level)
    require(finite and white_level > black_level, "white_level", white_level, f"above black_level, {black_level!r}")


def gain_at(iso_to_gain: tuple[float, float], iso: float) -> float:
    """Returns K = k1 ISO + k0, the DN of an electron.

    Raises:
        ValueError: `iso` is not above 0, or there the gain is not.
    """
    require(math.isfinite(iso) and iso > 0, "iso", iso, "a number > 0")
    gain = iso_to_gain[0] * iso + iso_to_gain[1]
    require(gain > 0, "iso_to_gain", iso_to_gain, f"(k1, k0) with k1 ISO + k0 > 0 at ISO {iso:g}")
    return gain


def native_branch(iso: float, native_limits: Sequence[float]) -> int:
    """Returns which native gain an ISO has, from 0, by the highest ISO of each but the last."""
    return sum(iso > limit for limit in native_limits)


@dataclass(frozen=True)
class NativeGain:
    """A range of ISOs with one conversion gain of the pixels, and the laws of its noise.

    Args:
        iso_min: lowest ISO.
        iso_max: highest ISO; ISOs above it belong to the next range.
        log_row_std: (a, b) of ln s = a ln K + b, the standard deviation of rows in DN, or `None`.
        log_gaussian_std: the same of all pixels, for a Gaussian in place of the learned noise.
        offset_std: standard deviation of a frame's offset, in DN, over the root of the ISO.
    """

    iso_min: float
    iso_max: float
    log_row_std: tuple[float, float] | None = None
    log_gaussian_std: tuple[float, float] | None = None
    offset_std: float = 0.002


@dataclass(frozen=True)
class CameraProfile:
    """What is known of a camera beside its dark frames: levels, gain, and laws of its noise.

    Args:
        white_level: where it saturates, in DN.
        black_level: what it records without light.
        iso_to_gain: (k1, k0) of K = k1 ISO + k0, DN per electron; it is not in dark frames.
        native_gains: ranges of ISOs, rising.
        ratio: least and largest factor by which exposures are too short, drawn evenly in training.
        row_scale: factor of the rows' standard deviation, usually and in one of ten images.
        column_scale: the same of the columns', which the rows' law is taken for.
        offset_scale: factor of the offset in one of ten images.

    Raises:
        ValueError: levels, gain or ranges make no sense.

    Example:
        >>> from diffusers_ext import CameraProfile, NativeGain
        >>> camera = CameraProfile(4095, 256, (0.004, 0.0), (NativeGain(100, 6400),))
        >>> camera.gain(200)
        0.8
    """

    white_level: float
    black_level: float
    iso_to_gain: tuple[float, float]
    native_gains: tuple[NativeGain, ...]
    ratio: tuple[float, float] = (100.0, 300.0)
    row_scale: tuple[float, float] = (1.25, 3.5)
    column_scale: tuple[float, float] = (0.15, 1.5)
    offset_scale: float = 1.0

    def __post_init__(self) -> None:
        check_levels(self.white_level, self.black_level)
        require(len(self.native_gains) > 0, "native_gains", self.native_gains, "at least one range of ISOs")
        ends = [iso for branch in self.native_gains for iso in (branch.iso_min, branch.iso_max)]
        rising = all(a <= b for a, b in zip(ends, ends[1:], strict=False))
        require(rising, "native_gains", ends, "ranges of ISOs that rise and do not overlap")
        for iso in ends:
            gain_at(self.iso_to_gain, iso)
        require(1 <= self.ratio[0] <= self.ratio[1], "ratio", self.ratio, "two numbers >= 1, not falling")

    def gain(self, iso: float) -> float:
        """Returns K, the DN of an electron."""
        return gain_at(self.iso_to_gain, iso)

    def native_gain(self, iso: float) -> NativeGain:
        """Returns the range that an ISO belongs to; between two ranges it is the upper one."""
        require(math.isfinite(iso) and iso > 0, "iso", iso, "a number > 0")
        return next((branch for branch in self.native_gains if iso <= branch.iso_max), self.native_gains[-1])

    def row_std(self, iso: float) -> float:
        """Returns the standard deviation of rows by the profile's law, in DN; 0 where it has none."""
        return self._by_law(self.native_gain(iso).log_row_std, iso)

    def gaussian_std(self, iso: float) -> float:
        """Returns the standard deviation of pixels by the profile's law, in DN; 0 where it has none."""
        return self._by_law(self.native_gain(iso).log_gaussian_std, iso)

    def _by_law(self, law: tuple[float, float] | None, iso: float) -> float:
        return 0.0 if law is None else math.exp(law[0] * math.log(self.gain(iso)) + law[1])

    def to_dict(self) -> dict[str, Any]:
        """Returns plain types for a configuration."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CameraProfile:
        """Takes what `to_dict` returned, also after a trip through JSON."""

        def plain(value: Any) -> Any:
            return tuple(value) if isinstance(value, list) else value

        branches = [NativeGain(**{k: plain(v) for k, v in branch.items()}) for branch in values["native_gains"]]
        rest = {k: plain(v) for k, v in values.items() if k != "native_gains"}
        return cls(**rest, native_gains=tuple(branches))


# As published with the paper's code.
CAMERAS = {
    "sony_a7s2": CameraProfile(
        16383,
        512,
        (0.0009546, -0.00193),
        (
            NativeGain(50, 1600, (0.78782, -0.34227), (0.82966, 1.49343)),
            NativeGain(2000, 25600, (0.62945, -1.51040), (0.82878, 0.44162), offset_std=0.004),
        ),
        offset_scale=10.0,
    ),
    "imx686": CameraProfile(
        1023,
        64,
        (0.001366, 0.0),
        (NativeGain(6400, 6400, (0.87611, -2.11455), (0.85187, 0.67991)),),
        ratio=(1.0, 16.0),
    ),
}
