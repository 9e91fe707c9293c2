"""What dark frames say of a sensor: a model that is saved, loaded and put into a pipeline like any other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config

from diffusers_ext.hub.loading import SafeLoadingMixin
from diffusers_ext.training.config import require

from .camera import native_branch

__all__ = ["DarkFrameModel"]

STATISTICS = ("offset", "pixel_std", "row_std", "column_std", "frame_std")


class DarkFrameModel(SafeLoadingMixin, ModelMixin, ConfigMixin):
    """A sensor's dark frames taken apart; `decouple_dark_frames` makes one.

    Args:
        height: of the frames.
        width: of the frames.
        isos: at which there were frames, rising.
        native_limits: highest ISO of every native gain but the last; each has maps of its own.
        num_residuals: how many values of pixels' noise are kept for each ISO.
        black_level: of the frames, in DN.
        iso_to_gain: (k1, k0) of K = k1 ISO + k0, where flats were measured.
        rounded: whether the frames were whole numbers: `pixel_std` is without the noise of rounding, the residuals are
            with it.

    Attributes:
        slope: `(native gains, height, width)` k of dark shading D = k ISO + b + offset(ISO), in DN.
        intercept: b.
        bad_pixels: `(height, width)` pixels of more than 6 times the median deviation.
        offset: `(isos,)` mean of the frames above the black level (the paper's BLE), in DN.
        pixel_std: `(isos,)` of a pixel, in DN.
        row_std: of the rows' common noise.
        column_std: of the columns'.
        frame_std: of the whole frame's offset, from frame to frame.
        residuals: `(isos, num_residuals)` noise of single pixels, in DN.

    Raises:
        ValueError: sizes or ISOs make no sense.
    """

    __module__ = "diffusers_ext"

    config: Any
    slope: torch.Tensor
    intercept: torch.Tensor
    bad_pixels: torch.Tensor
    offset: torch.Tensor
    pixel_std: torch.Tensor
    residuals: torch.Tensor

    @register_to_config
    def __init__(
        self,
        height: int,
        width: int,
        isos: Sequence[float],
        native_limits: Sequence[float] = (),
        num_residuals: int = 0,
        black_level: float = 0.0,
        iso_to_gain: Sequence[float] | None = None,
        rounded: bool = True,
    ) -> None:
        super().__init__()
        require(height > 0 and width > 0, "height", (height, width), "a height and a width above 0")
        rising = all(a < b for a, b in zip((0, *isos), isos, strict=False))
        require(len(isos) > 0 and rising, "isos", list(isos), "rising numbers > 0")
        maps = (len(native_limits) + 1, height, width)
        self.register_buffer("slope", torch.zeros(maps))
        self.register_buffer("intercept", torch.zeros(maps))
        self.register_buffer("bad_pixels", torch.zeros(height, width, dtype=torch.bool))
        for name in STATISTICS:
            self.register_buffer(name, torch.zeros(len(isos)))
        self.register_buffer("residuals", torch.zeros(len(isos), num_residuals))

    def check_iso(self, iso: float) -> None:
        """Refuses an ISO of which the frames say nothing.

        Raises:
            ValueError: it is outside of those of the frames.
        """
        low, high = self.config.isos[0], self.config.isos[-1]
        require(low <= iso <= high, "iso", iso, f"within the calibrated range, {low:g} to {high:g}")

    def forward(self, iso: float) -> torch.Tensor:
        """Returns `dark_shading(iso)`."""
        return self.dark_shading(iso)

    def dark_shading(self, iso: float) -> torch.Tensor:
        """Returns the mean dark frame above the black level, `(height, width)` in DN.

        Raises:
            ValueError: the ISO is outside of the calibrated range.
        """
        self.check_iso(iso)
        branch = native_branch(iso, self.config.native_limits)
        return self.slope[branch].float() * iso + self.intercept[branch].float() + self.statistic("offset", iso)

    def statistic(self, name: str, iso: float) -> float:
        """Returns a number of an ISO, in DN: between ISOs of the same native gain interpolated.

        Variances are straight lines of the squared ISO, as a part before and a part behind the gain have together;
        offsets are straight lines of the ISO.

        Args:
            name: `"offset"`, `"pixel_std"`, `"row_std"`, `"column_std"` or `"frame_std"`.
            iso: within the calibrated range.

        Raises:
            ValueError: unknown name, or the ISO is outside.
        """
        require(name in STATISTICS, "name", name, f"one of {list(STATISTICS)}")
        self.check_iso(iso)
        values = dict(zip(self.config.isos, getattr(self, name).tolist(), strict=True))
        limits = self.config.native_limits
        own = [other for other in values if native_branch(other, limits) == native_branch(iso, limits)]
        require(len(own) > 0, "iso", iso, f"of a native gain with frames, {list(values)}")
        below = max((other for other in own if other <= iso), default=min(own))
        above = min((other for other in own if other >= iso), default=max(own))
        low, high = values[below], values[above]
        if below == above:
            return low
        if name == "offset":
            return low + (iso - below) / (above - below) * (high - low)
        share = (iso**2 - below**2) / (above**2 - below**2)
        return math.sqrt(low**2 + share * (high**2 - low**2))

    def sample_residuals(
        self, shape: Sequence[int], iso: float, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Draws the noise of pixels from what was recorded at the nearest ISO, scaled to this one's deviation.

        Args:
            shape: of the result.
            iso: within the calibrated range.
            generator: draws which.

        Returns:
            `shape`, in DN, with the rounding of the frames in it.

        Raises:
            ValueError: no residuals were kept, or the ISO is outside.
        """
        require(self.config.num_residuals > 0, "num_residuals", 0, "above 0 to draw from them")
        target = self.statistic("pixel_std", iso)
        nearest = min(range(len(self.config.isos)), key=lambda i: abs(math.log(self.config.isos[i] / iso)))
        device = self.residuals.device if generator is None else generator.device
        places = torch.randint(self.config.num_residuals, tuple(shape), generator=generator, device=device)
        found = self.residuals[nearest].float()[places.to(self.residuals.device)]
        own = float(self.pixel_std[nearest])
        return found * (target / own) if own > 0 else found
