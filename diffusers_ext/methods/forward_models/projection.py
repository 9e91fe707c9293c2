"""Parallel-beam projections, as of a CT scanner."""

from __future__ import annotations

import math

import torch
from diffusers.configuration_utils import register_to_config

from diffusers_ext.training.config import is_number, is_whole, require

from .protocol import ForwardModel, Parameters
from .rays import as_angles, centers, even_angles, frame_of, sampled

__all__ = ["ProjectionForwardModel"]


class ProjectionForwardModel(ForwardModel):
    """Integrals of an image along parallel rays (Radon transform).

    The image fills the square [-1, 1], so lengths are in half widths; it is 0 outside and linear between the middles
    of its pixels. Rays are sampled every pixel's width.

    Parameters of an observation: its angle in radians, `(batch,)` or `(batch, 1)`. At 0 rays run down the columns; at
    an angle bin s sees the points s (cos, sin) + t (-sin, cos), x to the right and y down. This is scikit-image's
    `radon` at minus the angle, in half widths instead of pixels.

    Args:
        num_bins: of the detector.
        extent: half of the detector's width; 1 sees the image's inscribed circle, sqrt(2) all of it.
        num_angles: how many angles, evenly spaced in half a turn, `sample_parameters` draws from; by default any.

    Raises:
        ValueError: a number is out of its range.

    Example:
        >>> import torch
        >>> from diffusers_ext import ProjectionForwardModel
        >>> ProjectionForwardModel(num_bins=4)(torch.ones(1, 1, 8, 8), torch.zeros(1))  # a length of 2 everywhere
        tensor([[[2., 2., 2., 2.]]])
    """

    __module__ = "diffusers_ext"

    @register_to_config
    def __init__(self, num_bins: int, extent: float = 1.0, num_angles: int | None = None) -> None:
        super().__init__()
        require(is_whole(num_bins), "num_bins", num_bins, "an integer >= 1")
        require(is_number(extent) and extent > 0, "extent", extent, "a number > 0")
        require(num_angles is None or is_whole(num_angles), "num_angles", num_angles, "an integer >= 1, or left out")

    def forward(self, signal: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        """Projects.

        Args:
            signal: `(batch, channels, height, width)`.
            parameters: angles in radians.

        Returns:
            `(batch, channels, num_bins)` integrals along the rays.
        """
        across, along = frame_of(as_angles(parameters).to(signal))
        pixels = max(signal.shape[-2:])
        # Samples lie on the middles of pixels at angle 0, and reach over the diagonal.
        count = pixels + 2 * math.ceil((math.sqrt(2) - 1) * pixels / 2)
        places = centers(count, signal) * (count / pixels)
        bins = centers(self.config.num_bins, signal) * self.config.extent
        points = bins[:, None, None] * across[:, None, None] + places[:, None] * along[:, None, None]
        return sampled(signal, points).sum(-1) * (2 / pixels)

    def sample_parameters(self, n: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """Draws `(n,)` angles of half a turn: the other half shows the same, mirrored."""
        return even_angles(n, math.pi, self.config.num_angles, generator)

    def check_parameters(self, parameters: Parameters, n: int | None = None) -> None:
        """Refuses what are no angles.

        Raises:
            ValueError: as said, or parameters are missing or not finite.
        """
        super().check_parameters(parameters, n)
        as_angles(parameters)
