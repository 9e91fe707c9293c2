"""The network of the authors' published weights: DDPM++ as EDM has it ("SongUNet"), of Diffusers' blocks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

from diffusers_ext.hub.loading import SafeLoadingMixin
from diffusers_ext.training.config import require

__all__ = ["SongUNet2DModel"]

EPS, SCALE = 1e-6, 2**0.5  # every sum of two branches is divided by SCALE
# The authors' names of a block's layers; `qkv` is three of ours.
LAYERS = {
    "norm0": "resnet.norm1",
    "conv0": "resnet.conv1",
    "affine": "resnet.time_emb_proj",
    "norm1": "resnet.norm2",
    "conv1": "resnet.conv2",
    "skip": "resnet.conv_shortcut",
    "norm2": "attention.group_norm",
    "proj": "attention.to_out.0",
}


def _groups(channels: int) -> int:
    return min(32, channels // 4)


class _Block(nn.Module):
    """A residual block, and attention after it."""

    def __init__(
        self, inputs: int, outputs: int, time: int, dropout: float, attention: bool, up: bool, down: bool
    ) -> None:
        super().__init__()
        self.resnet = ResnetBlock2D(
            in_channels=inputs,
            out_channels=outputs,
            temb_channels=time,
            groups=_groups(inputs),
            groups_out=_groups(outputs),
            eps=EPS,
            dropout=dropout,
            output_scale_factor=SCALE,
            use_in_shortcut=inputs != outputs or up or down,
            up=up,
            down=down,
        )
        self.attention = None
        if attention:
            self.attention = Attention(
                outputs,
                heads=1,
                dim_head=outputs,
                norm_num_groups=_groups(outputs),
                eps=EPS,
                bias=True,
                residual_connection=True,
                rescale_output_factor=SCALE,
            )

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        x = self.resnet(x, time)
        return x if self.attention is None else self.attention(x)


class SongUNet2DModel(SafeLoadingMixin, ModelMixin, ConfigMixin):
    """DDPM++ as EDM has it: the network of the weights that were published with arXiv 2411.02780.

    It differs from Diffusers' `UNet2DModel` in the 1x1 convolutions beside its resampling, in the first convolution's
    own width, and in one attention a level on the way up. It is called as `UNet2DModel` without classes is.

    Args:
        sample_size: height and width of the images.
        in_channels: of the images.
        out_channels: of the images.
        base_channels: of the first convolution, and half as many sines and cosines of time, a multiple of 4.
        block_out_channels: of each level, from the finest on, multiples of 4.
        layers_per_block: residual blocks of each level on the way down; one more on the way up.
        attention_levels: levels with attention, 0 the finest.
        dropout: of the residual blocks.

    Raises:
        ValueError: a number is outside its range.

    Example:
        >>> import torch
        >>> from diffusers_ext import SongUNet2DModel
        >>> unet = SongUNet2DModel(8, 1, 1, base_channels=8, block_out_channels=(8, 16), layers_per_block=1)
        >>> unet(torch.randn(2, 1, 8, 8), torch.zeros(2)).sample.shape
        torch.Size([2, 1, 8, 8])
    """

    __module__ = "diffusers_ext"

    config: Any

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 3,
        out_channels: int = 3,
        base_channels: int = 128,
        block_out_channels: Sequence[int] = (256, 256, 256),
        layers_per_block: int = 4,
        attention_levels: Sequence[int] = (1,),
        dropout: float = 0.13,
    ) -> None:
        super().__init__()
        widths, last = (base_channels, *block_out_channels), len(block_out_channels) - 1
        require(last >= 0 and all(w > 0 and w % 4 == 0 for w in widths), "channels", widths, "multiples of 4")
        require(layers_per_block >= 1, "layers_per_block", layers_per_block, "an integer >= 1")
        fits = f"a multiple of {2**last}, by which {last + 1} levels divide it"
        require(sample_size % 2**last == 0, "sample_size", sample_size, fits)

        def block(inputs: int, outputs: int, attention: bool = False, up: bool = False, down: bool = False) -> _Block:
            return _Block(inputs, outputs, 4 * base_channels, dropout, attention, up, down)

        self.time_proj = Timesteps(base_channels, flip_sin_to_cos=False, downscale_freq_shift=1)
        self.time_embedding = TimestepEmbedding(base_channels, 4 * base_channels)
        self.conv_in = nn.Conv2d(in_channels, base_channels, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        channels, skips = base_channels, [base_channels]
        for level, wide in enumerate(block_out_channels):
            if level:
                self.down.append(block(channels, channels, down=True))
                skips.append(channels)
            for _ in range(layers_per_block):
                self.down.append(block(channels, wide, level in attention_levels))
                channels = wide
                skips.append(channels)
        for level, wide in reversed(list(enumerate(block_out_channels))):
            if level == last:
                self.up.extend([block(channels, channels, True), block(channels, channels)])
            else:
                self.up.append(block(channels, channels, up=True))
            for layer in range(layers_per_block + 1):
                attention = level in attention_levels and layer == layers_per_block
                self.up.append(block(channels + skips.pop(), wide, attention))
                channels = wide
        self.conv_norm_out = nn.GroupNorm(_groups(channels), channels, eps=EPS)
        self.conv_out = nn.Conv2d(channels, out_channels, 3, padding=1)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """Predicts what EDM's preconditioning asks for.

        Args:
            sample: `(batch, in_channels, sample_size, sample_size)`.
            timestep: one number or `(batch,)`, the timesteps of EDM schedulers: ln(sigma) / 4.
            class_labels: none.
            return_dict: return `UNet2DOutput` instead of a tuple.

        Raises:
            ValueError: labels are given.
        """
        if class_labels is not None:
            raise ValueError("`class_labels` must be left out, as this network has no classes.")
        time = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(len(sample))
        time = self.time_embedding(self.time_proj(time).to(sample.dtype))
        x = self.conv_in(sample)
        skips = [x]
        for block in self.down:
            x = block(x, time)
            skips.append(x)
        for block in self.up:
            assert isinstance(block, _Block)
            if block.resnet.in_channels != x.shape[1]:
                x = torch.cat([x, skips.pop()], 1)
            x = block(x, time)
        x = self.conv_out(nn.functional.silu(self.conv_norm_out(x)))
        return UNet2DOutput(x) if return_dict else (x,)

    @classmethod
    def from_original_state_dict(cls, state: Mapping[str, torch.Tensor], dropout: float = 0.13) -> SongUNet2DModel:
        """Makes the network of the authors' weights, `safetensors.torch.load_file("model.safetensors")`.

        What they learned of their augmentation is left out, which they leave out of sampling too.

        Args:
            state: the weights by the authors' names, `model.enc.32x32_conv.weight` and so on.
            dropout: of the residual blocks, for training on.

        Raises:
            ValueError: these are no such weights, or those of another variant (with classes, or NCSN++).
        """
        given = {name.removeprefix("model."): value for name, value in state.items()}
        sizes = sorted({int(m[1]) for name in given if (m := re.match(r"enc\.(\d+)x\1_block0\.conv0\.w", name))})[::-1]
        fixed = [value for name, value in given.items() if name.endswith("resample_filter")]
        other = [
            name for name in given if re.match(r"map_label|map_noise|(enc|dec)\.\d+x\d+_aux_(residual|skip)", name)
        ]
        if not sizes or other or any(value.shape[-1] != 2 for value in fixed):
            raise ValueError(
                "`state` must hold the weights of EDM's DDPM++ without classes, `model.enc.32x32_conv.weight` and so "
                f"on, got {(other or sorted(state))[:4]}."
            )
        top, last = (f"{size}x{size}" for size in (sizes[0], sizes[-1]))
        names = {
            "map_layer0": "time_embedding.linear_1",
            "map_layer1": "time_embedding.linear_2",
            f"enc.{top}_conv": "conv_in",
            f"dec.{top}_aux_norm": "conv_norm_out",
            f"dec.{top}_aux_conv": "conv_out",
        }
        try:
            layers = sum(bool(re.fullmatch(rf"enc\.{last}_block\d+\.conv0\.weight", name)) for name in given)
            unet = cls(
                sample_size=sizes[0],
                in_channels=given[f"enc.{top}_conv.weight"].shape[1],
                out_channels=len(given[f"dec.{top}_aux_conv.weight"]),
                base_channels=len(given[f"enc.{top}_conv.weight"]),
                block_out_channels=[len(given[f"enc.{s}x{s}_block0.conv0.weight"]) for s in sizes],
                layers_per_block=layers,
                attention_levels=[i for i, s in enumerate(sizes) if f"enc.{s}x{s}_block0.qkv.weight" in given],
                dropout=dropout,
            )
            down, up = [], [f"dec.{last}_in0", f"dec.{last}_in1"]
            for level, s in enumerate(sizes):
                down += [f"enc.{s}x{s}_down"] * bool(level) + [f"enc.{s}x{s}_block{i}" for i in range(layers)]
            for level, s in reversed(list(enumerate(sizes))):
                up += [f"dec.{s}x{s}_up"] * (level < len(sizes) - 1)
                up += [f"dec.{s}x{s}_block{i}" for i in range(layers + 1)]
            names |= {name: f"down.{i}" for i, name in enumerate(down)} | {n: f"up.{i}" for i, n in enumerate(up)}
            unet.load_state_dict(_renamed(given, names))
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"`state` must hold all weights of EDM's DDPM++, got others: {error}") from error
        return unet


def _renamed(given: Mapping[str, torch.Tensor], names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Returns the weights by our names; those of augmentation and the fixed filters are left out."""
    found = {}
    for name, value in given.items():
        module, part = name.rsplit(".", 1)
        if part == "resample_filter" or module == "map_augment":
            continue
        if module in names:
            found[f"{names[module]}.{part}"] = value
            continue
        block, layer = module.rsplit(".", 1)
        if layer in ("qkv", "proj"):
            value = value.flatten(1) if part == "weight" else value
        if layer == "qkv":  # query, key and value of each channel follow each other
            found |= {f"{names[block]}.attention.to_{letter}.{part}": value[j::3] for j, letter in enumerate("qkv")}
        else:
            found[f"{names[block]}.{LAYERS[layer]}.{part}"] = value
    return found
