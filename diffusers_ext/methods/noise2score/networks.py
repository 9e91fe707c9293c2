"""Networks that learn the score of noisy images; they take images of any size and have no normalisation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.utils import BaseOutput
from torch import nn

from diffusers_ext.generation.tiles import padded
from diffusers_ext.hub.loading import SafeLoadingMixin

__all__ = ["Noise2ScoreConvNet", "Noise2ScoreOutput", "Noise2ScoreUNet"]


@dataclass
class Noise2ScoreOutput(BaseOutput):
    """What the networks return.

    Attributes:
        sample: `(batch, channels, height, width)` the score.
    """

    sample: torch.Tensor


class _ScoreNetwork(SafeLoadingMixin, ModelMixin, ConfigMixin):
    """What the networks share: scaling of input and output, conditioning, padding.

    Attributes:
        tile_multiple: images may be cut at multiples of it only, and are padded to them.
        tile_margin: pixels around a tile that its values depend on.
    """

    config: Any
    tile_multiple: int = 1

    @property
    def tile_margin(self) -> int:
        """Pixels around a tile that its values depend on, a multiple of `tile_multiple`."""
        raise NotImplementedError

    def _network(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _inputs(self) -> int:
        return self.config.in_channels + bool(self.config.sigma_conditioning)

    def forward(
        self, sample: torch.Tensor, sigma: float | torch.Tensor | None = None, return_dict: bool = True
    ) -> Noise2ScoreOutput | tuple[torch.Tensor]:
        """Estimates the score.

        Args:
            sample: `(batch, channels, height, width)` noisy images in the units of `NoiseModel.score_input`, of any
                height and width.
            sigma: noise that was added on top, one number or `(batch,)`, for a network with `sigma_conditioning`; by
                default `smoothing` of the configuration.
            return_dict: return `Noise2ScoreOutput` instead of a tuple.

        Raises:
            ValueError: another number of channels.
        """
        config = self.config
        if sample.ndim != 4 or sample.shape[1] != config.in_channels:
            raise ValueError(
                f"`sample` must be (batch, {config.in_channels}, height, width), got the shape {tuple(sample.shape)}."
            )
        height, width = sample.shape[2:]
        x = padded(sample * config.input_scale, self.tile_multiple)
        if config.sigma_conditioning:
            level = torch.as_tensor(config.smoothing if sigma is None else sigma, dtype=x.dtype, device=x.device)
            level = (level * config.input_scale).reshape(-1, 1, 1, 1).expand(len(x), 1, *x.shape[2:])
            x = torch.cat([x, level], 1)
        score = self._network(x)[..., :height, :width] * config.score_scale
        return Noise2ScoreOutput(score) if return_dict else (score,)

    def _initialise(self, gain: float | None) -> None:
        """Draws weights from N(0, gain^2), or leaves torch's, and puts biases to 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                if gain is not None:
                    nn.init.normal_(module.weight, 0.0, gain)
                assert module.bias is not None
                nn.init.zeros_(module.bias)


class Noise2ScoreUNet(_ScoreNetwork):
    """The U-Net of Noise2Score: five levels, LeakyReLU, the input joined before the last block, a linear head.

    Args:
        in_channels: channels of the images.
        out_channels: the same number.
        base_channels: channels of the encoder; the decoder has twice as many.
        shared_blocks: let one block serve the encoder's levels 2 to 5 and one the decoder's levels 3 to 1, as in the
            authors' code; by default each level has its own.
        sigma_conditioning: take the noise that was added on top as a further input.
        input_scale: what the input is multiplied by; counts want about the noise's `scale`.
        score_scale: what the output is multiplied by: about 1 / standard deviation of the noise, so that the network
            itself gives numbers of about 1.
        smoothing: the noise that was added on top at the end of training, which the formulas correct for.

    Raises:
        ValueError: input and output differ in their channels, or a number is out of its range.

    Example:
        >>> import torch
        >>> from diffusers_ext import Noise2ScoreUNet
        >>> unet = Noise2ScoreUNet(base_channels=4)
        >>> unet(torch.rand(1, 1, 50, 70)).sample.shape
        torch.Size([1, 1, 50, 70])
    """

    __module__ = "diffusers_ext"

    tile_multiple = 32

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        base_channels: int = 48,
        shared_blocks: bool = False,
        sigma_conditioning: bool = False,
        input_scale: float = 1.0,
        score_scale: float = 1.0,
        smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        _check(in_channels, out_channels, base_channels, input_scale, score_scale, smoothing)
        n, inputs = base_channels, self._inputs()
        # Names and order of the authors' modules, whose weights so fit.
        self.block1 = nn.Sequential(_conv(inputs, n), _act(), _conv(n, n), _act(), nn.MaxPool2d(2))
        self.block2 = nn.ModuleList(
            nn.Sequential(_conv(n, n), _act(), nn.MaxPool2d(2)) for _ in range(1 if shared_blocks else 4)
        )
        self.block3 = nn.Sequential(_conv(n, n), _act(), _up(n))
        self.block4 = nn.Sequential(_conv(2 * n, 2 * n), _act(), _conv(2 * n, 2 * n), _act(), _up(2 * n))
        self.block5 = nn.ModuleList(
            nn.Sequential(_conv(3 * n, 2 * n), _act(), _conv(2 * n, 2 * n), _act(), _up(2 * n))
            for _ in range(1 if shared_blocks else 3)
        )
        wide, narrow = max(1, 4 * n // 3), max(1, 2 * n // 3)
        self.block6 = nn.Sequential(
            _conv(2 * n + inputs, wide), _act(), _conv(wide, narrow), _act(), _conv(narrow, out_channels)
        )
        self._initialise(0.02)

    @property
    def tile_margin(self) -> int:
        """Pixels around a tile that its values depend on (158), as a multiple of `tile_multiple`."""
        return 160

    def _network(self, x: torch.Tensor) -> torch.Tensor:
        levels = [self.block1(x)]
        for i in range(4):
            levels.append(self.block2[min(i, len(self.block2) - 1)](levels[-1]))
        y = self.block4(torch.cat([self.block3(levels.pop()), levels.pop()], 1))
        for i in range(3):
            y = self.block5[min(i, len(self.block5) - 1)](torch.cat([y, levels.pop()], 1))
        return self.block6(torch.cat([y, x], 1))

    @classmethod
    def from_original_state_dict(
        cls, state: Mapping[str, torch.Tensor], *, input_scale: float = 1.0, smoothing: float = 0.0
    ) -> Noise2ScoreUNet:
        """Makes the network of the authors' weights, such as `torch.load("100_net_f.pth", weights_only=True)`.

        Args:
            state: the weights by the authors' names, `_block1.0.weight` and so on.
            input_scale: see the class; the authors' networks take the input as it is.
            smoothing: the noise on top at the end of their training: 0.001 for Gaussian and Gamma noise, 0.5 counts
                for Poisson noise. Their Gamma networks are of the linear domain.

        Raises:
            ValueError: these are no such weights.
        """
        bare = {re.sub(r"^(module\.)?_?(block\d)", r"\2", name): value for name, value in state.items()}
        bare = {re.sub(r"^(block[25])\.", r"\1.0.", name): value for name, value in bare.items()}
        first, last = bare.get("block1.0.weight"), bare.get("block6.4.weight")
        if first is None or last is None:
            raise ValueError(f"`state` must hold `_block1.0.weight` to `_block6.4.weight`, got {sorted(state)[:4]}.")
        unet = cls(
            in_channels=first.shape[1],
            out_channels=last.shape[0],
            base_channels=first.shape[0],
            shared_blocks=True,
            input_scale=input_scale,
            smoothing=smoothing,
        )
        try:
            unet.load_state_dict(bare)
        except RuntimeError as error:
            raise ValueError(f"`state` must hold the weights of Noise2Score's U-Net: {error}") from error
        return unet


class Noise2ScoreConvNet(_ScoreNetwork):
    """A small network: 3x3 convolutions with ReLU between them, so that a pixel sees `layers` pixels to each side.

    Args:
        in_channels: channels of the images.
        out_channels: the same number.
        base_channels: channels between the layers.
        layers: number of convolutions, at least 2.
        sigma_conditioning: see `Noise2ScoreUNet`, as for the other arguments.
        input_scale: what the input is multiplied by.
        score_scale: what the output is multiplied by.
        smoothing: the noise that was added on top at the end of training.

    Raises:
        ValueError: input and output differ in their channels, or a number is out of its range.

    Example:
        >>> import torch
        >>> from diffusers_ext import Noise2ScoreConvNet
        >>> Noise2ScoreConvNet()(torch.rand(1, 1, 9, 7)).sample.shape
        torch.Size([1, 1, 9, 7])
    """

    __module__ = "diffusers_ext"

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        base_channels: int = 24,
        layers: int = 5,
        sigma_conditioning: bool = False,
        input_scale: float = 1.0,
        score_scale: float = 1.0,
        smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        _check(in_channels, out_channels, base_channels, input_scale, score_scale, smoothing)
        if not (isinstance(layers, int) and layers >= 2):
            raise ValueError(f"`layers` must be an integer >= 2, got {layers!r}.")
        n = base_channels
        parts: list[nn.Module] = [_conv(self._inputs(), n)]
        for _ in range(layers - 2):
            parts += [nn.ReLU(), _conv(n, n)]
        self.body = nn.Sequential(*parts, nn.ReLU(), _conv(n, out_channels))
        self._initialise(None)

    @property
    def tile_margin(self) -> int:
        """Pixels around a tile that its values depend on."""
        return self.config.layers

    def _network(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def _check(inputs: int, outputs: int, base: int, *scales: float) -> None:
    for name, value in (("in_channels", inputs), ("base_channels", base)):
        if not (isinstance(value, int) and value >= 1):
            raise ValueError(f"`{name}` must be an integer >= 1, got {value!r}.")
    if outputs != inputs:
        raise ValueError(f"`out_channels` must be {inputs} as `in_channels`: a score has the data's, got {outputs!r}.")
    for name, value in zip(("input_scale", "score_scale", "smoothing"), scales, strict=True):
        if not value >= 0 or (value == 0 and name != "smoothing"):
            raise ValueError(f"`{name}` must be a number {'>=' if name == 'smoothing' else '>'} 0, got {value!r}.")


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def _up(channels: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(channels, channels, 3, stride=2, padding=1, output_padding=1)


def _act() -> nn.LeakyReLU:
    return nn.LeakyReLU(0.1)
