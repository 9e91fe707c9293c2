"""A network of small signals and latents, which reads observations as they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.utils import BaseOutput
from torch import nn

from diffusers_ext.hub.loading import SafeLoadingMixin
from diffusers_ext.training.config import is_range, is_whole, require

from .protocol import Parameters

__all__ = ["ObservationMLP", "ObservationMLPOutput"]

TIME_FEATURES = 16


@dataclass
class ObservationMLPOutput(BaseOutput):
    """What `ObservationMLP` returns.

    Attributes:
        sample: `(batch, ...)` signals.
    """

    sample: torch.Tensor


class ObservationMLP(SafeLoadingMixin, ModelMixin, ConfigMixin):
    r"""Residual layers that know no neighbourhood: for latents, and for signals of some hundred numbers.

    Instead of the forward model's `lift`, which may lose what a small signal needs (a picture smeared along its rays
    does not tell from which end it was taken), a view gives the products of its pixels with 1, cos kθ and sin kθ for k
    up to `angle_harmonics`: sums over as many views as there are such functions still hold every pixel of each.

    Args:
        signal_shape: of a signal, without the batch.
        observation_shape: of an observation, without the batch.
        parameter_size: numbers in a view's parameters, which are read as they are; 0 leaves them out.
        angle_harmonics: how many multiples of a view's only parameter, an angle in radians, to read.
        hidden_size: width.
        num_blocks: residual blocks of two layers.
        signal_range: ends of a sigmoid, which gives signals between them; `None` leaves it out.

    Raises:
        ValueError: a size is out of its range.

    Example:
        >>> import torch
        >>> from diffusers_ext import ObservationMLP, lift_views, lifted_input
        >>> network = ObservationMLP((1, 8, 8), (12,), angle_harmonics=4, hidden_size=32, signal_range=(0.0, 1.0))
        >>> noisy = lift_views(network, None, torch.randn(2, 1, 12), torch.zeros(2, 1))
        >>> network(lifted_input(noisy), 10).sample.shape
        torch.Size([2, 1, 8, 8])
    """

    __module__ = "diffusers_ext"

    config: Any

    @register_to_config
    def __init__(
        self,
        signal_shape: Sequence[int],
        observation_shape: Sequence[int],
        parameter_size: int = 0,
        angle_harmonics: int = 0,
        hidden_size: int = 256,
        num_blocks: int = 4,
        signal_range: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("signal_shape", signal_shape), ("observation_shape", observation_shape)):
            good = isinstance(value, list | tuple) and len(value) > 0 and all(map(is_whole, value))
            require(good, name, value, "integers >= 1")
        for name, value, least in (("parameter_size", parameter_size, 0), ("angle_harmonics", angle_harmonics, 0),
                                   ("hidden_size", hidden_size, 1), ("num_blocks", num_blocks, 0)):  # fmt: skip
            require(is_whole(value, least), name, value, f"an integer >= {least}")
        rising = signal_range is None or is_range(signal_range)
        require(rising, "signal_range", signal_range, "two numbers, low < high, or left out")
        waves = 1 + 2 * angle_harmonics
        coverage = waves + parameter_size
        inputs = 2 * waves * math.prod(observation_shape) + 3 * coverage + 1
        self.first = nn.Linear(inputs + TIME_FEATURES, hidden_size)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(hidden_size), nn.Linear(hidden_size, hidden_size), nn.SiLU(),
                nn.Linear(hidden_size, hidden_size),
            )
            for _ in range(num_blocks)
        )  # fmt: skip
        self.last = nn.Linear(hidden_size, math.prod(signal_shape))

    def lift(self, observation: torch.Tensor, parameters: Parameters) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what is read of views, as `ForwardModel.lift` does, without axes of space.

        Args:
            observation: `(batch, ...)`.
            parameters: of each.

        Raises:
            ValueError: the parameters are not as many as the network reads.
        """
        config: Any = self.config
        leaves = [parameters[name] for name in sorted(parameters)] if isinstance(parameters, Mapping) else [parameters]
        flat = torch.cat([value.flatten(1) if value.ndim > 1 else value[:, None] for value in leaves], 1)
        flat = flat.to(observation.device, observation.dtype)
        waves = torch.ones_like(flat[:, :1])
        if config.angle_harmonics:
            require(flat.shape[1] == 1, "angle_harmonics", config.angle_harmonics, "0 unless a view has one parameter")
            phases = flat * torch.arange(1, config.angle_harmonics + 1, device=flat.device)
            waves = torch.cat([waves, phases.cos(), phases.sin()], 1)
        values = (waves[:, :, None] * observation.flatten(1)[:, None]).flatten(1)
        if config.parameter_size == 0:
            return values, waves
        accepted = f"{flat.shape[1]}, the numbers in a view's parameters, or 0"
        require(config.parameter_size == flat.shape[1], "parameter_size", config.parameter_size, accepted)
        return values, torch.cat([waves, flat], 1)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor | float | int, return_dict: bool = True
    ) -> ObservationMLPOutput | tuple[torch.Tensor]:
        """Estimates signals.

        Args:
            sample: `(batch, features)`, what `lifted_input` returns.
            timestep: one, or one for each sample.
            return_dict: return `ObservationMLPOutput` instead of a tuple.

        Returns:
            `(batch, *signal_shape)` signals.
        """
        times = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        x = self.first(torch.cat([sample, get_timestep_embedding(times, TIME_FEATURES).to(sample.dtype)], 1))
        for block in self.blocks:
            x = x + block(x)
        x = self.last(nn.functional.silu(x)).unflatten(1, tuple(self.config.signal_shape))
        if self.config.signal_range is not None:
            low, high = self.config.signal_range
            x = low + (high - low) * x.sigmoid()
        return ObservationMLPOutput(x) if return_dict else (x,)
