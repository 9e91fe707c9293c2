"""Noise strategies: what a training step adds to its clean samples, chosen by name from the configuration."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import Accelerator

from diffusers_ext.rng import StepRNG

__all__ = ["NOISE_STRATEGIES", "GaussianNoise", "NoiseStrategy", "make_noise", "offset_noise"]

# Name on the command line -> public class of `diffusers_ext`. Methods add a line here and keep their class in their
# own folder; it is resolved through the package root when it is used.
NOISE_STRATEGIES = {
    "gaussian": "GaussianNoise",
    "assignment": "AssignmentNoise",
    "knn": "NearestNoise",
    "signflip": "SignFlipNoise",
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
