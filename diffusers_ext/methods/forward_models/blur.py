"""Blurred and smaller images."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config

from diffusers_ext.training.config import is_number, is_whole, require

from .protocol import ForwardModel, Parameters
from .views import check_corners, pixels_from

__all__ = ["BlurForwardModel", "DownsampleForwardModel"]


def _check_factor(factor: int) -> None:
    require(is_whole(factor), "factor", factor, "an integer >= 1")


def _check_sizes(signal: torch.Tensor, factor: int) -> None:
    sizes = tuple(signal.shape[-2:])
    require(all(s % factor == 0 for s in sizes), "signal", tuple(signal.shape), f"of sizes divisible by {factor}")


class BlurForwardModel(ForwardModel):
    """A Gaussian blur, then every `factor`-th pixel; a constant image stays as it is, up to its border.

    Parameters of an observation: `(batch, 2)` row and column, from 0 to `factor - 1`, of the first pixel that is kept.
    Beyond the border the image's last pixels are repeated.

    Args:
        sigma: standard deviation of the blur, in pixels; the kernel ends at 4 of them.
        factor: by which the observation is smaller.

    Raises:
        ValueError: a number is out of its range.

    Example:
        >>> import torch
        >>> from diffusers_ext import BlurForwardModel
        >>> BlurForwardModel(sigma=1.5, factor=2)(torch.ones(4, 3, 8, 8), torch.zeros(4, 2)).shape
        torch.Size([4, 3, 4, 4])
    """

    __module__ = "diffusers_ext"

    @register_to_config
    def __init__(self, sigma: float, factor: int = 1) -> None:
        super().__init__()
        require(is_number(sigma) and sigma > 0, "sigma", sigma, "a number > 0")
        _check_factor(factor)

    def forward(self, signal: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        """Blurs and subsamples.

        Args:
            signal: `(batch, channels, height, width)`, sizes divisible by `factor`.
            parameters: `(batch, 2)` first row and column.

        Returns:
            `(batch, channels, height / factor, width / factor)`.

        Raises:
            ValueError: the sizes are not divisible.
        """
        sigma, factor = self.config.sigma, self.config.factor
        _check_sizes(signal, factor)
        reach = math.ceil(4 * sigma)
        places = torch.arange(-reach, reach + 1, device=signal.device, dtype=torch.float64)
        kernel = torch.softmax(-(places**2) / (2 * sigma**2), 0).to(signal.dtype)
        channels, height, width = signal.shape[1:]
        padded = F.pad(signal, (reach,) * 4, mode="replicate")
        blurred = F.conv2d(padded, kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
        blurred = F.conv2d(blurred, kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
        if factor == 1:
            return blurred
        return pixels_from(blurred, parameters, range(0, height, factor), range(0, width, factor))

    def sample_parameters(self, n: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """Draws `(n, 2)` first rows and columns."""
        device = None if generator is None else generator.device
        return torch.randint(self.config.factor, (n, 2), generator=generator, device=device)

    def check_parameters(self, parameters: Parameters, n: int | None = None) -> None:
        """Refuses first pixels outside of 0 to `factor - 1`.

        Raises:
            ValueError: as said, or parameters are missing or not whole numbers.
        """
        super().check_parameters(parameters, n)
        check_corners(parameters, (self.config.factor - 1,) * 2)


class DownsampleForwardModel(ForwardModel):
    """Means of blocks of `factor` x `factor` pixels; A A' = I / factor^2.

    It has no parameters: those of a batch are a tensor `(batch, 0)`.

    Args:
        factor: by which the observation is smaller.

    Raises:
        ValueError: the factor is not a whole number above 0.
    """

    __module__ = "diffusers_ext"

    @register_to_config
    def __init__(self, factor: int) -> None:
        super().__init__()
        _check_factor(factor)

    def forward(self, signal: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        """Averages blocks.

        Args:
            signal: `(batch, channels, height, width)`, sizes divisible by `factor`.
            parameters: not used.

        Returns:
            `(batch, channels, height / factor, width / factor)`.

        Raises:
            ValueError: the sizes are not divisible.
        """
        _check_sizes(signal, self.config.factor)
        return F.avg_pool2d(signal, self.config.factor)

    def sample_parameters(self, n: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """Returns `(n, 0)`."""
        return torch.zeros(n, 0, device=None if generator is None else generator.device)
