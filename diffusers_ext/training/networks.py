"""Networks that a JSON file describes, and what is said of their size."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from .config import TrainConfig
from .optimizers import optimizer_floats
from .shipped import find_config

__all__ = ["make_network", "size_note", "sized_unet"]


def make_network(
    kind: Callable[..., Any], argument: str, path: str | None, fixed: Mapping[str, Any], default: Mapping[str, Any]
) -> Any:
    """Makes a network from a JSON file of its arguments.

    Args:
        kind: its class.
        argument: the command-line argument that named the file, for messages.
        path: the file, or the name of a shipped one; `None` takes `default` instead.
        fixed: arguments that data and base decide, which come before the file's.
        default: arguments without a file.

    Raises:
        ValueError: the file is missing, no JSON object, or does not describe such a network.
    """
    arguments = dict(default)
    if path is not None:
        file = find_config(argument, path)
        try:
            arguments = {k: v for k, v in json.loads(file.read_text()).items() if not k.startswith("_")}
        except (ValueError, AttributeError) as error:
            raise ValueError(f"`{argument}` must be a JSON object in a file, got {path!r}: {error}") from error
    try:
        return kind(**{**arguments, **fixed})
    except Exception as error:  # whatever a wrong argument runs into
        raise ValueError(f"`{argument}` must describe a `{kind.__name__}`, got {path!r}: {error}") from error


def sized_unet(size: int) -> dict[str, Any]:
    """Returns the arguments of a `UNet2DModel` that suits images, or latents, of `size` pixels a side.

    Up to 16 pixels it has about 3 million parameters, up to 63 about 11 million, and from 64 on it is that of
    Diffusers' example of unconditional training, of 114 million.
    """
    if size >= 64:
        plain, attention = ("DownBlock2D", "UpBlock2D"), ("AttnDownBlock2D", "AttnUpBlock2D")
        levels = [plain, plain, plain, plain, attention, plain]
        return {
            "block_out_channels": (128, 128, 256, 256, 512, 512),
            "down_block_types": tuple(down for down, _ in levels),
            "up_block_types": tuple(up for _, up in reversed(levels)),
        }
    small = size <= 16
    return {
        "block_out_channels": (32, 64, 128) if small else (64, 128, 192),
        "layers_per_block": 1 if small else 2,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    }


def size_note(network: nn.Module, config: TrainConfig, only_trained: bool, advice: str | None) -> str:
    """Says how large a network is and what a checkpoint of it takes.

    Args:
        network: before it is trained.
        config: the run's.
        only_trained: checkpoints hold the trained parameters alone.
        advice: how to choose another size.
    """
    count = sum(p.numel() for p in network.parameters())
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    held = trained if only_trained else count
    disk = 4 * (held + trained * (optimizer_floats(config.optimizer) + config.use_ema))
    kept = config.checkpoints_total_limit
    part = "" if trained == count else f", {_short(trained).rstrip()} of them trained"
    files = "all are kept (--checkpoints_total_limit)" if kept is None else f"{kept} are kept"
    return (
        f"{type(network).__name__}: {_short(count).rstrip()} parameters{part}; a checkpoint takes about "
        f"{_short(disk)}B of disk, {files}" + (f"; {advice}" if advice else "")
    )


def _short(number: float) -> str:
    """Returns a number as people say it, such as '2.1 M'."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.{0 if number >= 10 * size else 1}f} {unit}"
    return f"{number:.0f} "
