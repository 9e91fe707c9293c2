"""The denoiser of packed raw images: the U-Net of "Learning to See in the Dark", also as a correction of its input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.utils import BaseOutput
from torch import nn

from diffusers_ext.generation.tiles import padded
from diffusers_ext.hub.loading import SafeLoadingMixin
from diffusers_ext.training.config import require

__all__ = ["RawUNet", "RawUNetOutput"]


@dataclass
class RawUNetOutput(BaseOutput):
    """What `RawUNet` returns.

    Attributes:
        sample: `(batch, channels, height, width)` the clean image.
    """

    sample: torch.Tensor


class RawUNet(SafeLoadingMixin, ModelMixin, ConfigMixin):
    """Denoises packed raw images: four max-poolings, LeakyReLU of 0.2, no normalisation.

    With 32 base channels and `residual=False` it is the network of the paper, of 7,760,484 weights, with the names of
    its published weights.

    Args:
        in_channels: channels of the images, 4 of a packed mosaic.
        out_channels: channels of the result.
        base_channels: channels of the first level; each further one has twice as many.
        residual: add the input to the output of a last layer that starts at 0: an untrained network then returns its
            input, and learns much faster.

    Attributes:
        tile_multiple: images may be cut at multiples of it only, and are padded to them.
        tile_margin: pixels around a tile that its values depend on.

    Raises:
        ValueError: a number is out of its range.

    Example:
        >>> import torch
        >>> from diffusers_ext import RawUNet
        >>> x = torch.rand(1, 4, 20, 30)
        >>> torch.equal(RawUNet(base_channels=4)(x).sample, x)
        True
    """

    __module__ = "diffusers_ext"

    config: Any
    tile_multiple = 16
    tile_margin = 112

    @register_to_config
    def __init__(
        self, in_channels: int = 4, out_channels: int = 4, base_channels: int = 32, residual: bool = True
    ) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("base_channels", base_channels)):
            require(value >= 1, name, value, "an integer >= 1")
        accepted = f"{in_channels} as `in_channels` with `residual`"
        require(out_channels == in_channels or not residual, "out_channels", out_channels, accepted)
        n = [base_channels * 2**level for level in range(5)]
        inputs = in_channels
        for level in range(5):  # named as in the published weights
            self._convolutions(level + 1, inputs, n[level])
            inputs = n[level]
        for level in range(3, -1, -1):
            setattr(self, f"upv{9 - level}", nn.ConvTranspose2d(n[level + 1], n[level], 2, stride=2))
            self._convolutions(9 - level, 2 * n[level], n[level])
        self.conv10_1 = nn.Conv2d(n[0], out_channels, 1)
        if residual:
            nn.init.zeros_(self.conv10_1.weight)
            nn.init.zeros_(self.conv10_1.bias)  # type: ignore[arg-type]

    def _convolutions(self, number: int, inputs: int, outputs: int) -> None:
        setattr(self, f"conv{number}_1", nn.Conv2d(inputs, outputs, 3, padding=1))
        setattr(self, f"conv{number}_2", nn.Conv2d(outputs, outputs, 3, padding=1))

    def _block(self, number: int, x: torch.Tensor) -> torch.Tensor:
        for part in (1, 2):
            x = F.leaky_relu(getattr(self, f"conv{number}_{part}")(x), 0.2)
        return x

    def forward(self, sample: torch.Tensor, return_dict: bool = True) -> RawUNetOutput | tuple[torch.Tensor]:
        """Denoises.

        Args:
            sample: `(batch, channels, height, width)` of any height and width: 0 is black, 1 white, noise may leave
                both.
            return_dict: return `RawUNetOutput` instead of a tuple.

        Raises:
            ValueError: another number of channels.
        """
        channels = self.config.in_channels
        fits = sample.ndim == 4 and sample.shape[1] == channels
        require(fits, "sample", tuple(sample.shape), f"(batch, {channels}, height, width)")
        height, width = sample.shape[2:]
        x = padded(sample, self.tile_multiple)
        levels = [self._block(1, x)]
        for number in range(2, 6):
            levels.append(self._block(number, F.max_pool2d(levels[-1], 2)))
        y = levels.pop()
        for number in range(6, 10):
            y = self._block(number, torch.cat([getattr(self, f"upv{number}")(y), levels.pop()], 1))
        y = self.conv10_1(y)
        y = (y + x if self.config.residual else y)[..., :height, :width]
        return RawUNetOutput(y) if return_dict else (y,)

    @classmethod
    def from_original_state_dict(cls, state: Mapping[str, torch.Tensor], residual: bool = False) -> RawUNet:
        """Makes the network of the authors' weights, such as `torch.load("..._last.pth", weights_only=True)`.

        Args:
            state: the weights by the authors' names, `conv1_1.weight` and so on.
            residual: whether they were trained to correct their input; the published ones were not.

        Raises:
            ValueError: these are no such weights.
        """
        bare = {name.removeprefix("module."): value for name, value in state.items()}
        first, last = bare.get("conv1_1.weight"), bare.get("conv10_1.weight")
        if first is None or last is None:
            raise ValueError(f"`state` must hold `conv1_1.weight` to `conv10_1.weight`, got {sorted(state)[:4]}.")
        unet = cls(first.shape[1], last.shape[0], first.shape[0], residual)
        try:
            unet.load_state_dict(bare)
        except RuntimeError as error:
            raise ValueError(f"`state` must hold the weights of the raw U-Net: {error}") from error
        return unet.eval()
