"""The network of SGMSE+: NCSN++ on complex spectrograms, of Diffusers' blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

from diffusers_ext.hub.loading import SafeLoadingMixin
from diffusers_ext.training.config import require

__all__ = ["SGMSEUNet2DModel", "published_blocks"]

CHANNELS = 4  # Re x, Im x, Re y, Im y


class _Zeros(nn.Module):
    """Stands in the place of a convolution that adds nothing."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(len(x), self.channels, *x.shape[2:])


def published_blocks(levels: int, attention: Sequence[int]) -> dict[str, Any]:
    """Returns `down_block_types` and `up_block_types` of NCSN++ with attention on some levels, 0 the finest."""
    kinds = ["AttnSkip" if level in attention else "Skip" for level in range(levels)]
    return {
        "down_block_types": tuple(f"{kind}DownBlock2D" for kind in kinds),
        "up_block_types": tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
    }


class SGMSEUNet2DModel(SafeLoadingMixin, UNet2DModel):
    """NCSN++ as SGMSE+ uses it: real and imaginary parts of a sample and of the recording are its four channels.

    It is Diffusers' `UNet2DModel` of FIR-resampling blocks with Fourier features of the logarithm of time, and a 1x1
    convolution to the real and imaginary part of the output. Its three settings as published are: as by default with
    `divide_by_time="before"` (`ncsnpp`, 2208.05830); `skip_pyramid=False, divide_by_time="after"` with no attention
    but the middle's (`ncsnpp_48k`, 2406.06185); and as by default (`ncsnpp_v2`, 2409.10753).

    Args:
        in_channels: 4.
        out_channels: 2.
        down_block_types: from the finest level on, `SkipDownBlock2D` or `AttnSkipDownBlock2D`.
        up_block_types: from the coarsest level on, `SkipUpBlock2D` or `AttnSkipUpBlock2D`.
        block_out_channels: channels of each level, multiples of 4; of 32 where there is attention.
        layers_per_block: residual blocks a level.
        add_attention: attention in the middle.
        dropout: of the residual blocks.
        skip_pyramid: add the resampled input to each level, and sum outputs of all levels.
        divide_by_time: divide the output by time, `"before"` or `"after"` the 1x1 convolution.
        frequency_patch: neighbouring frequencies that are stacked as channels: makes a network of few bins, so fast.
        residual: make the output `recording + residual * network`, for networks that predict clean speech.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> import torch
        >>> from diffusers_ext import SGMSEUNet2DModel
        >>> unet = SGMSEUNet2DModel(
        ...     block_out_channels=(8, 8), layers_per_block=1, add_attention=False,
        ...     down_block_types=("SkipDownBlock2D",) * 2, up_block_types=("SkipUpBlock2D",) * 2,
        ... )
        >>> unet(torch.zeros(1, 4, 16, 8), torch.tensor(0.5)).sample.shape
        torch.Size([1, 2, 16, 8])
    """

    __module__ = "diffusers_ext"

    @register_to_config
    def __init__(
        self,
        in_channels: int = CHANNELS,
        out_channels: int = 2,
        down_block_types: Sequence[str] = published_blocks(7, (4,))["down_block_types"],
        up_block_types: Sequence[str] = published_blocks(7, (4,))["up_block_types"],
        block_out_channels: Sequence[int] = (128, 128, 256, 256, 256, 256, 256),
        layers_per_block: int = 2,
        add_attention: bool = True,
        dropout: float = 0.0,
        skip_pyramid: bool = True,
        divide_by_time: Literal["before", "after"] | None = None,
        frequency_patch: int = 1,
        residual: float | None = None,
    ) -> None:
        require(in_channels == CHANNELS, "in_channels", in_channels, "4, real and imaginary parts of x and y")
        require(out_channels == 2, "out_channels", out_channels, "2, real and imaginary part")
        for name, given, end in (("down", down_block_types, "DownBlock2D"), ("up", up_block_types, "UpBlock2D")):
            known = [f"Skip{end}", f"AttnSkip{end}"]
            require(set(given) <= set(known), f"{name}_block_types", tuple(given), f"each one of {known}")
        widths = all(width >= 4 and width % 4 == 0 for width in block_out_channels)
        require(widths, "block_out_channels", tuple(block_out_channels), "multiples of 4")
        places = (None, "before", "after")
        require(divide_by_time in places, "divide_by_time", divide_by_time, f"one of {list(places)}")
        require(frequency_patch >= 1, "frequency_patch", frequency_patch, "an integer >= 1")
        # Undecorated, so that the configuration holds the arguments of this class only.
        UNet2DModel.__init__.__wrapped__(  # type: ignore[attr-defined]
            self,
            in_channels=CHANNELS * frequency_patch,
            out_channels=CHANNELS * frequency_patch,
            time_embedding_type="fourier",
            down_block_types=tuple(down_block_types),
            up_block_types=tuple(up_block_types),
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            mid_block_scale_factor=2**0.5,
            dropout=dropout,
            attention_head_dim=None,
            norm_num_groups=None,
            norm_eps=1e-6,
            add_attention=add_attention,
        )
        self.output_layer = nn.Conv2d(CHANNELS * frequency_patch, 2 * frequency_patch, 1)
        self._set_skips(skip_pyramid, CHANNELS * frequency_patch)
        for module in self.modules():  # the authors' rule; some of Diffusers' blocks have another
            if isinstance(module, nn.GroupNorm):
                module.num_groups = min(module.num_channels // 4, 32)

    def _set_skips(self, skip_pyramid: bool, channels: int) -> None:
        """Gives the skip convolutions as many channels as the input has (Diffusers': 3), or takes them out."""
        blocks: Any = (self.down_blocks, self.up_blocks)
        for block in blocks[0]:
            if block.resnet_down is not None:
                width = block.skip_conv.out_channels
                block.skip_conv = nn.Conv2d(channels, width, 1) if skip_pyramid else _Zeros(width)
        for block in blocks[1]:
            if block.resnet_up is None:
                continue
            if skip_pyramid:
                block.skip_conv = nn.Conv2d(block.skip_conv.in_channels, channels, 3, padding=1)
            else:
                block.skip_norm, block.act, block.skip_conv = nn.Identity(), nn.Identity(), _Zeros(channels)

    @property
    def frequency_multiple(self) -> int:
        """Numbers of bins are multiples of this."""
        return self.frame_multiple * self.config["frequency_patch"]

    @property
    def frame_multiple(self) -> int:
        """Numbers of frames are multiples of this, 2 to the number of halvings."""
        return 2 ** (len(self.config["block_out_channels"]) - 1)

    def forward(  # type: ignore[override]
        self, sample: torch.Tensor, timestep: torch.Tensor | float, return_dict: bool = True
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """Computes what the scheduler's `prediction_type` says.

        Args:
            sample: `(batch, 4, bins, frames)`: real and imaginary part of the sample, then of the recording.
            timestep: time in (0, 1], one or `(batch,)`.
            return_dict: return `UNet2DOutput` instead of a tuple.

        Returns:
            `(batch, 2, bins, frames)`: real and imaginary part.

        Raises:
            ValueError: the bins or frames cannot be halved so often.
        """
        multiples = (self.frequency_multiple, self.frame_multiple)
        fits = sample.ndim == 4 and all(n % m == 0 for n, m in zip(sample.shape[2:], multiples, strict=True))
        accepted = f"(batch, 4, bins, frames) with multiples of {multiples[0]} bins and {multiples[1]} frames"
        require(fits, "sample", tuple(sample.shape), accepted)
        t = torch.as_tensor(timestep, device=sample.device)
        t = t.to(sample.dtype if sample.dtype == torch.float64 else torch.float32).expand(len(sample))
        folded = self._fold(sample)
        output = self._ncsnpp(folded, t)
        divisor = t.to(output.dtype)[:, None, None, None]
        if self.config["divide_by_time"] == "before":
            output = output / divisor
        output = self._unfold(self.output_layer(output))
        if self.config["divide_by_time"] == "after":
            output = output / divisor
        if self.config["residual"] is not None:
            output = sample[:, 2:] + self.config["residual"] * output
        return UNet2DOutput(sample=output) if return_dict else (output,)

    def _ncsnpp(self, sample: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The layers of `UNet2DModel.forward`, which always divides by time at its end."""
        network: Any = self
        embedding = network.time_embedding(network.time_proj(t).to(self.dtype))
        hidden, skip = network.conv_in(sample), sample
        states = [hidden]
        for block in network.down_blocks:
            hidden, found, skip = block(hidden_states=hidden, temb=embedding, skip_sample=skip)
            states.extend(found)
        hidden, skip = network.mid_block(hidden, embedding), None
        for block in network.up_blocks:
            count = len(block.resnets)
            states, found = states[:-count], states[-count:]
            hidden, skip = block(hidden, tuple(found), embedding, skip)
        return network.conv_out(network.conv_act(network.conv_norm_out(hidden))) + skip

    def _fold(self, x: torch.Tensor) -> torch.Tensor:
        """`(batch, channels, bins, frames)` -> `(batch, channels * patch, bins / patch, frames)`."""
        patch = self.config["frequency_patch"]
        batch, channels, bins, frames = x.shape
        x = x.reshape(batch, channels, bins // patch, patch, frames)
        return x.transpose(2, 3).reshape(batch, channels * patch, bins // patch, frames)

    def _unfold(self, x: torch.Tensor) -> torch.Tensor:
        """Inverts `_fold`."""
        patch = self.config["frequency_patch"]
        batch, channels, bins, frames = x.shape
        x = x.reshape(batch, channels // patch, patch, bins, frames)
        return x.transpose(2, 3).reshape(batch, channels // patch, bins * patch, frames)
