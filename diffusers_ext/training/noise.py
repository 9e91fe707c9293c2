"""Noise strategies: what a training step adds to its clean samples, chosen by name from the configuration."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import Accelerator

from .rng import StepRNG

__all__ = ["NOISE_STRATEGIES", "GaussianNoise", "NoiseStrategy", "make_noise"]

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
        noise = rng.randn_like(x0, ids)
        if self.offset:
            channel = x0.flatten(2)[:, :, 0]
            noise += self.offset * rng.randn_like(channel, ids).view(*channel.shape, *[1] * (x0.ndim - 2))
        return noise.to(x0.dtype)


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
