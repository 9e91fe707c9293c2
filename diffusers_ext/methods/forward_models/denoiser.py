"""What the network of signals is shown: the context and the noisy observations, in the signal's own space.

Of context and of noisy views alike, two sums over views are taken: of the lifted observations and of their coverage,
which says where the views looked. Any number of views in any order therefore makes as many channels. Two flags
follow: the coverage of those context views that were sampled (others were measured, with more noise), and whether
there is no context at all, which a context of zeros would not tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from diffusers_ext.training.config import require

from .objective import batch_and_views
from .protocol import ForwardModel, Parameters, map_parameters

__all__ = ["LiftedViews", "lift_views", "lifted_input", "signal_shape"]


def signal_shape(network: Any) -> tuple[int, ...]:
    """Returns the shape of a network's signals, without the batch: its `signal_shape`, or that of a UNet's images."""
    config = network.config
    if "signal_shape" in config:
        return tuple(config["signal_shape"])
    size = config["sample_size"]
    require(size is not None, "unet", None, "a network that knows its `sample_size`")
    return (config["out_channels"], *((size, size) if isinstance(size, int) else size))


@dataclass
class LiftedViews:
    """Sums over views, which further views are added to by `+`.

    Attributes:
        values: `(batch, channels, ...)` sum of the lifted observations.
        coverage: `(batch, channels, ...)` sum of their coverage.
        sampled: the same of those views alone that were sampled.
        count: `(batch,)` sum of the views' weights.
    """

    values: torch.Tensor
    coverage: torch.Tensor
    sampled: torch.Tensor
    count: torch.Tensor

    def __add__(self, other: LiftedViews) -> LiftedViews:
        names = ("values", "coverage", "sampled", "count")
        return LiftedViews(*(getattr(self, name) + getattr(other, name) for name in names))

    def repeated(self, times: int) -> LiftedViews:
        """Returns each sample's sums several times in a row."""
        parts = (self.values, self.coverage, self.sampled, self.count)
        return LiftedViews(*(part.repeat_interleave(times, 0) for part in parts))

    def nothing(self) -> LiftedViews:
        """Returns the sums over no view."""
        return LiftedViews(
            *(torch.zeros_like(part) for part in (self.values, self.coverage, self.sampled, self.count))
        )


def lift_views(
    network: Any,
    forward_model: Any,
    observations: torch.Tensor,
    parameters: Parameters,
    weights: torch.Tensor | None = None,
    sampled: torch.Tensor | None = None,
) -> LiftedViews:
    """Lifts observations and sums over their views.

    Args:
        network: says the signal's shape; one with a `lift` of its own (`ObservationMLP`) is asked instead of the
            forward model.
        forward_model: the `ForwardModel`.
        observations: `(batch, views, ...)`.
        parameters: `(batch, views, ...)`.
        weights: `(batch, views)`, 0 for views that are left out; by default none is.
        sampled: `(batch, views)`, 1 for views that were sampled; by default none was.

    Raises:
        ValueError: they are not of one number of samples and views.
    """
    sizes = batch_and_views(parameters)
    for name, given in (("observations", observations), ("weights", weights), ("sampled", sampled)):
        fits = given is None or tuple(given.shape[:2]) == sizes
        require(fits, name, None if given is None else tuple(given.shape), f"of {sizes} samples and views")
    flat = map_parameters(lambda value: value.flatten(0, 1), parameters)
    lift = getattr(network, "lift", None)
    with torch.no_grad():
        if lift is None:
            values, coverage = forward_model.lift(observations.flatten(0, 1), flat, signal_shape(network))
        else:
            values, coverage = lift(observations.flatten(0, 1), flat)
        values, coverage = values.unflatten(0, sizes), coverage.unflatten(0, sizes)
        if weights is None:
            weights = torch.ones(sizes, device=values.device, dtype=values.dtype)
        else:
            values, coverage = (part * _beside(weights, part) for part in (values, coverage))
        chosen = torch.zeros_like(coverage) if sampled is None else coverage * _beside(sampled, coverage)
        return LiftedViews(values.sum(1), coverage.sum(1), chosen.sum(1), weights.sum(1))


def _beside(weights: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    return weights.view(*weights.shape, *[1] * (part.ndim - 2)).to(part.dtype)


def lifted_input(noisy: LiftedViews, context: LiftedViews | None = None) -> torch.Tensor:
    """Puts together what the network reads.

    Args:
        noisy: the noisy observations, lifted.
        context: the context, or `None` for none.

    Returns:
        `(batch, channels, ...)`: lifted context, its coverage, lifted noisy observations, their coverage, the coverage
        of the sampled context, and a channel that is 1 where there is no context.

    Example:
        >>> import torch
        >>> from diffusers import UNet2DModel
        >>> from diffusers_ext import MaskForwardModel, lift_views, lifted_input
        >>> unet = UNet2DModel(
        ...     sample_size=8, in_channels=6, out_channels=1, block_out_channels=(8, 8), norm_num_groups=2,
        ...     down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        ... )
        >>> masks = torch.ones(2, 1, 1, 8, 8)  # (batch, views, ...)
        >>> noisy = lift_views(unet, MaskForwardModel(8), torch.randn(2, 1, 1, 8, 8), masks)
        >>> unet(lifted_input(noisy), 10).sample.shape
        torch.Size([2, 1, 8, 8])
    """
    context = noisy.nothing() if context is None else context
    none = (context.count == 0).to(noisy.values.dtype)
    none = none.view(-1, *[1] * (noisy.values.ndim - 1)).expand(-1, 1, *noisy.values.shape[2:])
    return torch.cat([context.values, context.coverage, noisy.values, noisy.coverage, context.sampled, none], dim=1)


def input_channels(signal_shape: Sequence[int], forward_model: ForwardModel, parameters: Parameters) -> int:
    """Returns how many channels a UNet of signals of a shape reads; `parameters` are `(n, ...)` of some views.

    Raises:
        ValueError: lifted observations have another size than signals.
    """
    shape = forward_model.observation_shape(signal_shape, parameters)
    one = map_parameters(lambda value: value[:1].to(forward_model.device), parameters)
    values, coverage = forward_model.lift(torch.zeros(1, *shape, device=forward_model.device), one, signal_shape)
    size = tuple(values.shape[2:])
    accepted = f"'mlp' where observations are lifted to another size, {size}, than that of signals, {signal_shape}"
    require(size == tuple(signal_shape[1:]), "network", "unet", accepted)
    return 2 * values.shape[1] + 3 * coverage.shape[1] + 1
