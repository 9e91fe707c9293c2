"""How a training step draws its timesteps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch

from diffusers_ext.rng import StepRNG

__all__ = ["LogNormalLevels", "LogitNormalTimesteps", "ShiftedNoiseLevels", "Timesteps", "UniformTimesteps"]


class Timesteps:
    """Draws one timestep per sample; called as `timesteps(n, rng, ids=None, device="cpu")`."""

    def __call__(
        self, n: int, rng: StepRNG, ids: Sequence[int] | None = None, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """Returns a tensor of shape `(n,)`."""
        raise NotImplementedError

    def at(self, p: torch.Tensor) -> torch.Tensor:
        """Returns the timesteps that a draw exceeds with these probabilities in (0, 1), float64 of the same shape.

        Those of uniform `p` have this law; of `p` below `exceeded(t)`, the law above `t`.
        """
        raise NotImplementedError

    def exceeded(self, t: torch.Tensor) -> torch.Tensor:
        """Returns the probability that a draw exceeds timesteps, float64 of their shape: the inverse of `at`."""
        low, high = torch.zeros_like(t, dtype=torch.float64), torch.ones_like(t, dtype=torch.float64)
        for _ in range(52):
            middle = (low + high) / 2
            above = self.at(middle) > t
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        return high


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

    def at(self, p: torch.Tensor) -> torch.Tensor:
        """See `Timesteps.at`."""
        length = self.num_train_timesteps
        return 1 - p.double() if length is None else length - 1 - (p.double() * length).floor()

    def exceeded(self, t: torch.Tensor) -> torch.Tensor:
        """See `Timesteps.exceeded`; -1 lies below all integers."""
        length = self.num_train_timesteps
        return 1 - t.double() if length is None else (length - 1 - t.double()) / length


class LogitNormalTimesteps(Timesteps):
    """Noise levels `sigmoid(N(0, 1))`, as in Stable Diffusion 3 (arXiv 2403.03206, section 3.1)."""

    def __call__(
        self, n: int, rng: StepRNG, ids: Sequence[int] | None = None, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """Returns `(n,)` float32 noise levels in `(0, 1)`."""
        return torch.sigmoid(rng.randn_like(torch.empty(n, device=device), ids, stream="timesteps"))

    def at(self, p: torch.Tensor) -> torch.Tensor:
        """See `Timesteps.at`."""
        return torch.sigmoid(-torch.special.ndtri(p.double()))

    def exceeded(self, t: torch.Tensor) -> torch.Tensor:
        """See `Timesteps.exceeded`."""
        return torch.special.ndtr(-torch.logit(t.double()))


class LogNormalLevels(Timesteps):
    """Noise levels whose logarithm is normal, as EDM trains (arXiv 2206.00364, table 1).

    Args:
        mean: mean of the logarithm.
        std: its standard deviation.

    Raises:
        ValueError: `std` is not a number > 0.
    """

    def __init__(self, mean: float = -1.2, std: float = 1.2) -> None:
        if not std > 0:
            raise ValueError(f"`std` must be a number > 0, got {std!r}.")
        self.mean, self.std = mean, std

    def __call__(
        self, n: int, rng: StepRNG, ids: Sequence[int] | None = None, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """Returns `(n,)` float32 noise levels > 0."""
        return torch.exp(self.mean + self.std * rng.randn_like(torch.empty(n, device=device), ids, stream="timesteps"))

    def at(self, p: torch.Tensor) -> torch.Tensor:
        """See `Timesteps.at`."""
        return torch.exp(self.mean - self.std * torch.special.ndtri(p.double()))

    def exceeded(self, t: torch.Tensor) -> torch.Tensor:
        """See `Timesteps.exceeded`."""
        return torch.special.ndtr((self.mean - t.double().log()) / self.std)


Density = Literal["uniform", "logit_normal", "mode"]


class ShiftedNoiseLevels(Timesteps):
    r"""Noise levels of flow matching: a density, then the shift that the sampler's schedule has at this size.

    The densities are those of Stable Diffusion 3 (arXiv 2403.03206, section 3.1), as
    `diffusers.training_utils.compute_density_for_timestep_sampling` has them: `sigmoid(N(0, 1))` for `"logit_normal"`
    and \(1 - u - s (\cos^2(\pi u / 2) - 1 + u)\) with \(s = 1.29\) for `"mode"`.

    Args:
        density: `"uniform"`, `"logit_normal"` or `"mode"`.
        shift: function of noise levels, elementwise; by default none.
    """

    def __init__(
        self, density: Density = "uniform", shift: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> None:
        self.density, self.shift = density, shift

    def __call__(
        self, n: int, rng: StepRNG, ids: Sequence[int] | None = None, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """Returns `(n,)` float32 noise levels in `(0, 1]`."""
        if self.density == "logit_normal":
            levels = LogitNormalTimesteps()(n, rng, ids, device)
        else:
            levels = 1 - rng.rand(n, ids, device=device)
            levels = _mode(levels) if self.density == "mode" else levels
        return self._shifted(levels)

    def at(self, p: torch.Tensor) -> torch.Tensor:
        """See `Timesteps.at`."""
        p = p.double()
        if self.density == "logit_normal":
            return self._shifted(LogitNormalTimesteps().at(p))
        return self._shifted(_mode(p) if self.density == "mode" else 1 - p)

    def _shifted(self, levels: torch.Tensor) -> torch.Tensor:
        levels = levels.clamp(min=1e-4)
        return levels if self.shift is None else self.shift(levels)


def _mode(u: torch.Tensor) -> torch.Tensor:
    """Returns the levels of uniform numbers by the density `"mode"`, which fall with them."""
    return 1 - u - 1.29 * (torch.cos(torch.pi / 2 * u) ** 2 - 1 + u)
