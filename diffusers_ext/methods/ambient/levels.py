r"""At which noise levels a noisy sample is trained: only above its own.

On every schedule of this package a noisy sample is a multiple of \(x_0 + \sigma n\), and \(\sigma\) grows with the
timestep: \(\sqrt{(1 - \bar\alpha_t) / \bar\alpha_t}\) on a schedule of betas, \(s / (1 - s)\) of flow matching, and
the timestep itself of EDM.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch

from diffusers_ext.rng import StepRNG
from diffusers_ext.training.objectives import EDM, EpsX0V, FlowMatching, Objective
from diffusers_ext.training.timesteps import LogNormalLevels, Timesteps

__all__ = ["AmbientLevels", "Levels", "Schedule", "sample_sigma"]

Levels = Literal["truncate", "clamp"]


class Schedule:
    r"""The levels \(\sigma\) of an objective's timesteps, in float64.

    Args:
        objective: what the network learns.

    Attributes:
        discrete: timesteps are integers.

    Raises:
        ValueError: the objective is another.
    """

    def __init__(self, objective: Objective) -> None:
        self.kind = next((kind for kind in (EpsX0V, FlowMatching, EDM) if isinstance(objective, kind)), None)
        if self.kind is None:
            raise ValueError(f"`objective` must be EpsX0V, FlowMatching or EDM, got {type(objective).__name__}.")
        self.discrete = self.kind is EpsX0V
        self._table = torch.empty(0, dtype=torch.float64)
        if isinstance(objective, EpsX0V):
            alphas = objective.scheduler.alphas_cumprod.double()
            self._table = ((1 - alphas) / alphas).sqrt()

    @property
    def length(self) -> int:
        """The number of timesteps of a schedule of betas."""
        return len(self._table)

    @property
    def largest(self) -> float:
        """The largest level, infinity where there is none."""
        return float(self._table[-1]) if self.discrete else math.inf

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """Returns the levels of timesteps; -1, which is clean, has level 0."""
        if self.discrete:
            self._table = self._table.to(t.device)
            return torch.where(t < 0, 0.0, self._table[t.long()])
        t = t.double()
        return t / (1 - t) if self.kind is FlowMatching else t

    def last_not_above(self, sigma: torch.Tensor) -> torch.Tensor:
        """Returns the last timestep whose level is not above one; -1 or 0 where none is."""
        if self.discrete:
            # A hair of slack: a level that was computed in single precision from a step is that step's.
            self._table = self._table.to(sigma.device)
            return torch.searchsorted(self._table, sigma.double() * (1 + 1e-6), right=True) - 1
        return sigma.double() / (1 + sigma.double()) if self.kind is FlowMatching else sigma.double()

    def first_not_below(self, sigma: torch.Tensor) -> torch.Tensor:
        """Returns the first timestep whose level is not below one."""
        if self.discrete:
            self._table = self._table.to(sigma.device)
            return torch.searchsorted(self._table, sigma.double() * (1 - 1e-6))
        return self.last_not_above(sigma)

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        """Returns the timesteps of levels; on a schedule of betas the nearest."""
        below = self.last_not_above(sigma)
        if not self.discrete:
            return below
        below = below.clamp(min=0)
        above = self.first_not_below(sigma).clamp(max=self.length - 1)
        return torch.where(sigma / self.sigma(below) <= self.sigma(above) / sigma, below, above)


class AmbientLevels:
    r"""Draws timesteps above each sample's own level.

    `"truncate"` draws from the law above it and weights by the probability of being there, which is in expectation
    what `"clamp"` does, whose draws below are moved to the level itself, where the loss (A) is 0.

    Args:
        law: how timesteps of clean samples are drawn.
        schedule: the levels of the timesteps.
        levels: `"truncate"` or `"clamp"`.
        max_amplification: keep away from a sample's own level, so that the variance of the target is amplified by
            less than this: \(1 / (1 - q) < s\).

    Raises:
        ValueError: `levels` is unknown, or `max_amplification` not above 1.
    """

    def __init__(
        self, law: Timesteps, schedule: Schedule, levels: Levels = "truncate", max_amplification: float | None = None
    ) -> None:
        if levels not in get_args(Levels):
            raise ValueError(f"`levels` must be one of {list(get_args(Levels))}, got {levels!r}.")
        if max_amplification is not None and not 1 < max_amplification < math.inf:
            raise ValueError(f"`max_amplification` must be a finite number > 1, got {max_amplification!r}.")
        self.law, self.schedule, self.levels, self.max_amplification = law, schedule, levels, max_amplification

    def bound(self, sigma_n: torch.Tensor) -> torch.Tensor:
        """Returns the levels above which samples of level `sigma_n` are trained, float64."""
        sigma_n = sigma_n.double()
        if self.max_amplification is None:
            return sigma_n
        return sigma_n * math.sqrt(1 + 1 / (self.max_amplification - 1))

    def above(self, sigma_n: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns timesteps above each sample's level for uniform `u` in (0, 1), and the probability to be there."""
        probability = self.law.exceeded(self.schedule.last_not_above(self.bound(sigma_n)))
        return self.law.at(u.double() * probability), probability

    def clamped(self, t: torch.Tensor, sigma_n: torch.Tensor) -> torch.Tensor:
        """Returns timesteps, those below a sample's level moved up to it."""
        lowest = self.schedule.first_not_below(self.bound(sigma_n))
        return torch.where(sigma_n > 0, torch.maximum(t.to(lowest.dtype), lowest), t.to(lowest.dtype))

    def __call__(
        self, sigma_n: torch.Tensor, rng: StepRNG, ids: Sequence[int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws timesteps.

        Args:
            sigma_n: `(batch,)` levels of the samples, 0 for clean ones, whose draws are those of the law.
            rng: the random numbers of this micro-step.
            ids: `(batch,)` global indices of the samples.

        Returns:
            `(batch,)` timesteps of the objective, and float32 weights of the loss.
        """
        n, device = len(sigma_n), sigma_n.device
        plain = self.law(n, rng, ids, device)
        if self.levels == "clamp":
            return self.clamped(plain, sigma_n).to(plain.dtype), torch.ones(n, device=device)
        above, probability = self.above(sigma_n, uniform(n, rng, ids, device))
        drawn, lowest = above.to(plain.dtype), self.schedule.last_not_above(self.bound(sigma_n))
        if not self.schedule.discrete:  # rounding must not bring a draw down to the level itself
            drawn = torch.where(drawn.double() > lowest, drawn, drawn.nextafter(torch.full_like(drawn, math.inf)))
        t = torch.where(sigma_n > 0, drawn, plain)
        return t, torch.where(sigma_n > 0, probability, 1.0).float()


def uniform(
    n: int, rng: StepRNG, ids: Sequence[int] | None, device: torch.device | str, stream: str = "timesteps"
) -> torch.Tensor:
    """Draws numbers in the open interval (0, 1), float64."""
    return rng.rand(n, ids, stream=stream, device=device).double() + 2.0**-25


def sample_sigma(
    sigma_n: torch.Tensor,
    levels: Levels = "truncate",
    p_mean: float = -1.2,
    p_std: float = 1.2,
    max_amplification: float | None = None,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Draws EDM's noise levels for samples of known level: \(\ln \sigma \sim N(\text{p\_mean}, \text{p\_std}^2)\).

    Args:
        sigma_n: `(batch,)` levels of the samples, 0 for clean ones.
        levels: `"truncate"` draws from the law above `sigma_n`, in float64 from its upper tail; `"clamp"` moves draws
            below up to `sigma_n`, as the authors do.
        p_mean: mean of the logarithm.
        p_std: its standard deviation.
        max_amplification: bound s of the target's variance, \((1 - q)^{-1} < s\): draws stay above
            \(\sigma_n \sqrt{1 + 1 / (s - 1)}\).
        generator: source of the draws.

    Returns:
        `(batch,)` levels in float64, and `(batch,)` weights of the loss: with `"truncate"` the probability of the law
        above, with `"clamp"` 1.

    Raises:
        ValueError: a level is negative or not finite, or an argument is outside of its range.

    Reference:
        arXiv 2411.02780 (clamping); arXiv 2506.10038 (the bound).

    Example:
        >>> import torch
        >>> from diffusers_ext import sample_sigma
        >>> sigma, weight = sample_sigma(torch.tensor([0.0, 0.5, 80.0]), generator=torch.Generator().manual_seed(0))
        >>> (sigma > torch.tensor([0.0, 0.5, 80.0])).all().item(), [round(w, 6) for w in weight.tolist()]
        (True, [1.0, 0.336375, 2e-06])
    """
    if sigma_n.ndim != 1 or not bool((sigma_n.isfinite() & (sigma_n >= 0)).all()):
        raise ValueError(
            f"`sigma_n` must be one finite level >= 0 for each sample, (batch,), got {tuple(sigma_n.shape)}: "
            f"{sigma_n.tolist()}."
        )
    drawer = AmbientLevels(LogNormalLevels(p_mean, p_std), Schedule(EDM()), levels, max_amplification)
    u = torch.rand(len(sigma_n), generator=generator, device=sigma_n.device, dtype=torch.float64)
    u = u.clamp(min=torch.finfo(torch.float64).tiny)
    if levels == "clamp":
        return drawer.clamped(drawer.law.at(u), sigma_n), torch.ones_like(u)
    return drawer.above(sigma_n, u)
