"""Noise strategies: what a training step adds to its clean samples, chosen by name from the configuration."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import Accelerator

from diffusers_ext.rng import StepRNG

from .config import described, require
from .images import ImageConfig

__all__ = ["NOISE_STRATEGIES", "GaussianNoise", "NoiseConfig", "NoiseStrategy", "make_noise", "offset_noise"]

# Name on the command line -> public class of `diffusers_ext`. Methods add a line here and keep their class in their
# own folder; it is resolved through the package root when it is used.
NOISE_STRATEGIES = {
    "gaussian": "GaussianNoise",
    "assignment": "AssignmentNoise",
    "knn": "NearestNoise",
    "signflip": "SignFlipNoise",
    "simplex": "SimplexNoise",
}


@runtime_checkable
class NoiseStrategy(Protocol):
    """Draws the noise of one micro-batch."""

    def __call__(
        self,
        x0: torch.Tensor,
        *,
        rng: StepRNG,
        ids: Sequence[int] | None = None,
        labels: torch.Tensor | None = None,
        accelerator: Accelerator | None = None,
    ) -> torch.Tensor:
        """Returns noise for `x0`.

        Args:
            x0: `(batch, ...)` clean samples in the space that is diffused, after every scaling.
            rng: the random numbers of this micro-step.
            ids: `(batch,)` global indices of the samples.
            labels: `(batch,)` class labels, where there are any.
            accelerator: given when several processes train together.

        Returns:
            A tensor of `x0`'s shape, dtype and device, without autograd history.
        """
        ...


class GaussianNoise:
    """Independent standard normal noise, as in plain diffusion training.

    Args:
        offset: standard deviation of a further normal number that is shared by all pixels of a channel
            ("offset noise"); 0 turns it off.

    Raises:
        ValueError: `offset` is negative.
    """

    def __init__(self, offset: float = 0.0) -> None:
        if not offset >= 0:
            raise ValueError(f"`offset` must be a number >= 0, got {offset!r}.")
        self.offset = offset

    @torch.no_grad()
    def __call__(
        self,
        x0: torch.Tensor,
        *,
        rng: StepRNG,
        ids: Sequence[int] | None = None,
        labels: torch.Tensor | None = None,
        accelerator: Accelerator | None = None,
    ) -> torch.Tensor:
        """Returns noise of `x0`'s shape and dtype; see `NoiseStrategy`."""
        noise = rng.randn_like(x0, ids).to(x0.dtype)
        return offset_noise(noise, self.offset, rng, ids) if self.offset else noise


def offset_noise(noise: torch.Tensor, offset: float, rng: StepRNG, ids: Sequence[int] | None = None) -> torch.Tensor:
    """Adds to each channel of each sample one normal number that all its pixels share.

    Args:
        noise: `(batch, channels, ...)`.
        offset: standard deviation of the added number.
        rng: the random numbers of this micro-step.
        ids: `(batch,)` global indices of the samples.

    Returns:
        A tensor of `noise`'s shape and dtype.
    """
    channels = noise.flatten(2)[:, :, 0]
    shared = rng.randn_like(channels, ids).view(*channels.shape, *[1] * (noise.ndim - 2))
    return noise + (offset * shared).to(noise.dtype)


def make_noise(name: str, **options: Any) -> NoiseStrategy:
    """Makes the noise strategy of a name.

    Args:
        name: a key of `NOISE_STRATEGIES`.
        **options: the arguments of its class.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in NOISE_STRATEGIES:
        raise ValueError(f"`noise` must be one of {sorted(NOISE_STRATEGIES)}, got {name!r}.")
    return getattr(importlib.import_module("diffusers_ext"), NOISE_STRATEGIES[name])(**options)


@dataclass
class NoiseConfig(ImageConfig):
    """Arguments of recipes that add noise to images, beside the data's and the engine's.

    Raises:
        ValueError: an argument is outside its range, or an option does not fit the strategy.
    """

    noise: str = described(f"Noise strategy: {', '.join(NOISE_STRATEGIES)}.", "gaussian")
    noise_options: str | None = described("Arguments of the noise strategy as a JSON object, such as '{\"k\": 8}'.")
    noise_offset: float = described("Standard deviation of noise that all pixels of a channel share.", 0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.noise_offset >= 0, "noise_offset", self.noise_offset, "a number >= 0")
        require(self.noise in NOISE_STRATEGIES, "noise", self.noise, f"one of {sorted(NOISE_STRATEGIES)}")
        self.make_noise()

    def make_noise(self) -> NoiseStrategy:
        """Makes the noise strategy that the arguments describe.

        Raises:
            ValueError: an option is unknown to the strategy or outside its range.
        """
        try:
            options = json.loads(self.noise_options or "{}")
            require(isinstance(options, dict), "noise_options", self.noise_options, "a JSON object")
            return make_noise(self.noise, **options)
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(
                f"`noise_options` must be a JSON object of arguments of {NOISE_STRATEGIES[self.noise]}, got "
                f"{self.noise_options!r}: {error}."
            ) from error
