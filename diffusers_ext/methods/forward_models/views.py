"""Parts of an image: crops and masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config

from diffusers_ext.training.config import is_number, is_whole, require

from .protocol import ForwardModel, Parameters

__all__ = ["CropForwardModel", "MaskForwardModel", "check_corners", "pixels_from"]


def pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """Returns a height and a width, of one number or two.

    Raises:
        ValueError: they are not one or two whole numbers above 0; the message has `name`.
    """
    both: Any = tuple(value) if isinstance(value, list | tuple) else (value, value)
    require(len(both) == 2 and all(map(is_whole, both)), name, value, "one or two integers > 0")
    return both[0], both[1]


def check_corners(parameters: Parameters, last: tuple[int, int]) -> None:
    """Refuses parameters that are no rows and columns from (0, 0) to `last`.

    Raises:
        ValueError: as said.
    """
    corners = isinstance(parameters, torch.Tensor) and parameters.shape[1:] == (2,)
    found = tuple(parameters.shape) if isinstance(parameters, torch.Tensor) else type(parameters).__name__
    require(corners, "parameters", found, "a tensor (batch, 2) of rows and columns")
    assert isinstance(parameters, torch.Tensor)
    limit = torch.tensor(last, device=parameters.device)
    fine = (parameters >= 0) & (parameters <= limit) & (parameters == parameters.long())
    bad = parameters[~fine.all(1)].tolist()
    require(not bad, "parameters", bad[:1], f"whole numbers from (0, 0) to {last}")


def pixels_from(signal: torch.Tensor, corners: Parameters, rows: range, columns: range) -> torch.Tensor:
    """Returns each image's pixels in rows and columns that are counted from its own corner, `(batch, 2)`."""
    assert isinstance(corners, torch.Tensor)
    start = corners.to(signal.device, torch.long)
    steps = [torch.arange(part.start, part.stop, part.step, device=signal.device) for part in (rows, columns)]
    y, x = (start[:, i, None] + step for i, step in enumerate(steps))
    which = torch.arange(len(signal), device=signal.device)[:, None, None]
    return signal[which, :, y[:, :, None], x[:, None, :]].movedim(-1, 1)


class CropForwardModel(ForwardModel):
    """A window of an image, P S; its lift puts the window back into a black image.

    Parameters of an observation: `(batch, 2)` row and column of the upper left pixel.

    Args:
        size: of the window, one number or height and width.
        sample_size: of the image, likewise.

    Raises:
        ValueError: a size is not above 0, or the window is larger than the image.

    Example:
        >>> import torch
        >>> from diffusers_ext import CropForwardModel
        >>> CropForwardModel(size=2, sample_size=4)(torch.arange(16.0).view(1, 1, 4, 4), torch.tensor([[1, 2]]))
        tensor([[[[ 6.,  7.],
                  [10., 11.]]]])
    """

    __module__ = "diffusers_ext"

    @register_to_config
    def __init__(self, size: int | Sequence[int], sample_size: int | Sequence[int]) -> None:
        super().__init__()
        self.size, self.sample_size = pair("size", size), pair("sample_size", sample_size)
        fits = all(window <= whole for window, whole in zip(self.size, self.sample_size, strict=True))
        require(fits, "size", size, f"at most `sample_size`, {sample_size}")

    def forward(self, signal: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        """Cuts the windows out.

        Args:
            signal: `(batch, channels, height, width)`.
            parameters: `(batch, 2)` row and column.

        Returns:
            `(batch, channels, *size)`.

        Raises:
            ValueError: the signal is of another size than `sample_size`.
        """
        accepted = f"(batch, channels, {', '.join(map(str, self.sample_size))}), as `sample_size` says"
        require(signal.ndim == 4 and signal.shape[2:] == self.sample_size, "signal", tuple(signal.shape), accepted)
        return pixels_from(signal, parameters, *map(range, self.size))

    def sample_parameters(self, n: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """Draws `(n, 2)` corners, every window equally often."""
        device = None if generator is None else generator.device
        free = [whole - window + 1 for window, whole in zip(self.size, self.sample_size, strict=True)]
        return torch.stack([torch.randint(f, (n,), generator=generator, device=device) for f in free], 1)

    def check_parameters(self, parameters: Parameters, n: int | None = None) -> None:
        """Refuses windows that reach out of the image.

        Raises:
            ValueError: as said, or parameters are missing or not whole numbers.
        """
        super().check_parameters(parameters, n)
        check_corners(parameters, (self.sample_size[0] - self.size[0], self.sample_size[1] - self.size[1]))


class MaskForwardModel(ForwardModel):
    """Single pixels of an image, mask * S.

    Parameters of an observation: `(batch, 1 or channels, height, width)`, 1 where a pixel is seen and 0 elsewhere.

    Args:
        sample_size: of the masks that `sample_parameters` draws, one number or height and width.
        keep_probability: that such a mask shows a pixel.

    Raises:
        ValueError: a size is not above 0, or the probability is not in (0, 1].
    """

    __module__ = "diffusers_ext"

    @register_to_config
    def __init__(self, sample_size: int | Sequence[int], keep_probability: float = 0.5) -> None:
        super().__init__()
        self.sample_size = pair("sample_size", sample_size)
        good = is_number(keep_probability) and 0 < keep_probability <= 1
        require(good, "keep_probability", keep_probability, "in (0, 1]")

    def forward(self, signal: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        """Blackens what is not seen.

        Args:
            signal: `(batch, channels, height, width)`.
            parameters: masks of 0 and 1.

        Returns:
            As `signal`.

        Raises:
            ValueError: the masks are of another size than the signal.
        """
        assert isinstance(parameters, torch.Tensor)
        fits = signal.ndim == 4 and parameters.shape in (signal.shape, signal[:, :1].shape)
        require(fits, "parameters", tuple(parameters.shape), f"masks of 1 or all channels of {tuple(signal.shape)}")
        return signal * parameters.to(signal)

    def sample_parameters(self, n: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """Draws `(n, 1, *sample_size)` masks, every pixel for itself."""
        device = None if generator is None else generator.device
        drawn = torch.rand(n, 1, *self.sample_size, generator=generator, device=device)
        return (drawn < self.config.keep_probability).float()

    def check_parameters(self, parameters: Parameters, n: int | None = None) -> None:
        """Refuses masks that are not of 0 and 1.

        Raises:
            ValueError: as said, or parameters are missing or of another shape.
        """
        super().check_parameters(parameters, n)
        masks = isinstance(parameters, torch.Tensor) and parameters.ndim == 4
        require(masks, "parameters", type(parameters).__name__, "a tensor (batch, 1 or channels, height, width)")
        assert isinstance(parameters, torch.Tensor)
        other = parameters[(parameters != 0) & (parameters != 1)].tolist()
        require(not other, "parameters", other[:1], "masks of 0 and 1")
