"""How a training step draws its timesteps."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diffusers_ext.rng import StepRNG

__all__ = ["LogitNormalTimesteps", "Timesteps", "UniformTimesteps"]


class Timesteps:
    """Draws one timestep per sample; called as `timesteps(n, rng, ids=None, device="cpu")`."""

    def __call__(
        self, n: int, rng: StepRNG, ids: Sequence[int] | None = None, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """Returns a tensor of shape `(n,)`."""
        raise NotImplementedError


class UniformTimesteps(Timesteps):
    """Uniform timesteps: integers `0..num_train_timesteps-1`, or noise levels in `(0, 1]` when that is `None`.

    Args:
        num_train_timesteps: length of the discrete schedule, `None` for continuous noise levels.
    """

    def __init__(self, num_train_timesteps: int | None) -> None:
        self.num_train_timesteps = num_train_timesteps

    def __call__(
        self, n: int, rng: StepRNG, ids: Sequence[int] | None = None, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """Returns `(n,)` int64 timesteps or float32 noise levels."""
        if self.num_train_timesteps is None:
            return 1 - rng.rand(n, ids, device=device)
        return rng.randint(self.num_train_timesteps, n, ids, device=device)


class LogitNormalTimesteps(Timesteps):
    """Noise levels `sigmoid(N(0, 1))`, as in Stable Diffusion 3 (arXiv 2403.03206, section 3.1)."""

    def __call__(
        self, n: int, rng: StepRNG, ids: Sequence[int] | None = None, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """Returns `(n,)` float32 noise levels in `(0, 1)`."""
        return torch.sigmoid(rng.randn_like(torch.empty(n, device=device), ids, stream="timesteps"))
