"""The loss of noisy samples for any objective of the engine, and what it needs of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from diffusers_ext.rng import StepRNG
from diffusers_ext.training.objectives import Objective
from diffusers_ext.training.timesteps import Timesteps

from .consistency import consistency_loss
from .levels import AmbientLevels, Levels, Schedule, uniform

__all__ = ["AmbientTask", "Every", "Made", "Weighting"]

Weighting = Literal["paper", "uniform"]
Every = Literal["below", "all"]
STRIDE = 0.1  # with `every="all"`: the largest way of a run, as a part of the law of timesteps


@dataclass
class Made:
    """A noised batch.

    Attributes:
        noisy: `(batch, ...)` what the network is given.
        target: what its output, times `keep`, should be.
        t: `(batch,)` timesteps of the objective.
        keep: `(batch, 1, ...)`, 1 - q; `None` where all samples are clean.
        weight: `(batch,)` weights of the samples' losses.
    """

    noisy: torch.Tensor
    target: torch.Tensor
    t: torch.Tensor
    keep: torch.Tensor | None
    weight: torch.Tensor


class AmbientTask:
    r"""Trains any prediction of the engine on samples of known noise levels.

    Targets are linear in the clean sample and the noise. With \(\hat x\) of `unbiased_clean_target` and the noise that
    belongs to it, \(n' / \sqrt{1 - q}\), the objective's own target is unbiased; the loss compares \((1 - q)\) times
    the prediction with \((1 - q)\) times the target, which is finite up to q = 1.

    Args:
        objective: what the network learns: noise, v, clean sample, flow or EDM.
        law: how timesteps of clean samples are drawn.
        weighting: `"paper"` leaves this as it is, the loss (A), \((1 - q)^2\) times that of the target; `"uniform"`
            weights as if the sample were clean, the loss (B).
        levels: `"truncate"` or `"clamp"`, see `AmbientLevels`.
        max_amplification: see `AmbientLevels`.
        consistency_weight: of the consistency loss; 0 leaves it out.
        every: `"below"` asks consistency of noisy samples whose timestep, drawn as a clean sample's, is below their
            own level, from there on; `"all"` of all noisy samples, from where they are a short way down.
        consistency_steps: steps of each run of the reverse process.

    Raises:
        ValueError: an argument is unknown or outside of its range, or `"clamp"` goes with a weighting or an objective
            for which draws at a sample's own level have no target.

    Example:
        >>> import torch
        >>> from diffusers_ext import AmbientTask, FlowMatching
        >>> from diffusers_ext.training.timesteps import UniformTimesteps
        >>> task = AmbientTask(FlowMatching(), UniformTimesteps(None))
        >>> y, sigma_n = torch.randn(4, 3), torch.tensor([0.0, 0.1, 0.2, 0.5])
        >>> made = task.make(y, sigma_n, torch.randn(4, 3), t=torch.full((4,), 0.7))
        >>> task.loss(torch.zeros(4, 3), made).shape
        torch.Size([])
    """

    def __init__(
        self,
        objective: Objective,
        law: Timesteps,
        weighting: Weighting = "paper",
        levels: Levels = "truncate",
        max_amplification: float | None = None,
        consistency_weight: float = 0.0,
        every: Every = "below",
        consistency_steps: int = 5,
    ) -> None:
        for name, value, accepted in (("weighting", weighting, Weighting), ("every", every, Every)):
            if value not in get_args(accepted):
                raise ValueError(f"`{name}` must be one of {list(get_args(accepted))}, got {value!r}.")
        if not 0 <= consistency_weight < float("inf"):
            raise ValueError(f"`consistency_weight` must be a finite number >= 0, got {consistency_weight!r}.")
        if not isinstance(consistency_steps, int) or consistency_steps < 1:
            raise ValueError(f"`consistency_steps` must be an integer >= 1, got {consistency_steps!r}.")
        self.objective, self.law = objective, law
        self.schedule = Schedule(objective)
        self.levels = AmbientLevels(law, self.schedule, levels, max_amplification)
        if levels == "clamp" and max_amplification is None:
            if weighting == "uniform":
                raise ValueError(
                    "`weighting` must be 'paper' with `levels='clamp'` and no `max_amplification`, got 'uniform': a "
                    "draw that is clamped to the sample's own level has no unbiased target."
                )
            if getattr(objective, "weighting", "none") != "none":
                raise ValueError(
                    "`snr_gamma` must be left out with `levels='clamp'` and no `max_amplification`: a draw that is "
                    "clamped to the sample's own level (q = 1) teaches nothing, whatever its signal-to-noise ratio."
                )
        self.weighting, self.every = weighting, every
        self.consistency_weight, self.consistency_steps = consistency_weight, consistency_steps

    def check(self, sigma_n: float) -> None:
        """Checks that some timesteps lie above the level of the noisiest samples.

        Raises:
            ValueError: none do.
        """
        bound = float(self.levels.bound(torch.tensor(sigma_n, dtype=torch.float64)))
        if not bound < self.schedule.largest * (1 - 1e-6):
            amplified = "" if bound == sigma_n else f" (times the gap of `max_amplification`: {bound:.4g})"
            raise ValueError(
                f"`sigma` must be below the largest noise level of the schedule, {self.schedule.largest:.4g}, got "
                f"{sigma_n:.4g}{amplified}."
            )

    def draw(
        self, sigma_n: torch.Tensor, rng: StepRNG, ids: Sequence[int] | None = None, one_timestep: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws a timestep and a weight for each sample; see `AmbientLevels`.

        With `one_timestep` all get the same, of a clean sample's law, and samples with a level that is not below it
        the weight 0.
        """
        if not one_timestep:
            return self.levels(sigma_n, rng, ids)
        t = self.law(len(sigma_n), rng, ids, sigma_n.device)[:1].expand(len(sigma_n))
        return t, ((sigma_n == 0) | (self.schedule.sigma(t) > self.levels.bound(sigma_n))).float()

    def make(
        self,
        y: torch.Tensor,
        sigma_n: torch.Tensor,
        noise: torch.Tensor,
        t: torch.Tensor,
        weight: torch.Tensor | None = None,
    ) -> Made:
        """Noises samples on.

        Args:
            y: `(batch, ...)` samples of levels `sigma_n`.
            sigma_n: `(batch,)`, 0 for clean ones.
            noise: standard normal, of `y`'s shape.
            t: `(batch,)` timesteps of the objective, of levels above `sigma_n`.
            weight: `(batch,)`, by default 1; samples of weight 0 may have any level.

        Raises:
            ValueError: a timestep is below its sample's level, or at it with the weighting `"uniform"` or min-SNR.
        """
        weight = torch.ones(len(y), device=y.device) if weight is None else weight
        own = torch.where(weight > 0, sigma_n, 0).double()
        if not bool((sigma_n > 0).any()):  # so that clean data are trained as ever, bit by bit
            noisy, target = self.objective.make(y, noise, t)
            return Made(noisy, target, t, None, weight)
        sigma = self.schedule.sigma(t)
        # Timesteps are in single precision, and so may levels have been.
        at_least = sigma * (1 + 1e-6) >= own
        needs_more = self.weighting == "uniform" or self.objective.weights(t) is not None
        if not bool((at_least & ((sigma > own) | (own == 0) | (not needs_more))).all()):
            sign = "above" if needs_more else "not below"
            raise ValueError(
                f"`t` must hold timesteps whose noise levels are {sign} `sigma_n`, got levels {sigma.tolist()} with "
                f"{own.tolist()}."
            )
        part = (own / sigma).clamp(max=1)
        keep = (1 - part) * (1 + part)
        root = keep.sqrt()
        shape = (-1, *[1] * (y.ndim - 1))
        keep, root, leak = (c.to(y.dtype).view(shape) for c in (keep, root, own * part * root))
        fresh = root * noise
        noisy, _ = self.objective.make(y, fresh, t)
        _, target = self.objective.make(keep * y - leak * noise, fresh, t)
        return Made(noisy, target, t, keep, weight)

    def loss(self, prediction: torch.Tensor, made: Made) -> torch.Tensor:
        """Returns the weighted mean squared error of predictions, a scalar in fp32."""
        if made.keep is None:
            return self.objective.loss(prediction, made.target, made.t)
        residual = made.keep.float() * prediction.float() - made.target.float()
        if self.weighting == "uniform":
            residual = residual / made.keep.float()
        each = residual.square().flatten(1).mean(1)
        weights = self.objective.weights(made.t)
        return (each * made.weight * (1.0 if weights is None else weights)).mean()

    def denoised(
        self, predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], x: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        """Returns the clean samples that a network sees in samples x_0 + sigma n.

        Args:
            predict: the network, a function of noisy samples and timesteps of the objective.
            x: `(batch, ...)`.
            t: `(batch,)` timesteps of the samples' levels.
        """
        noisy, _ = self.objective.make(x, torch.zeros_like(x), t)
        return self.objective.predicted_sample(predict(noisy, t), noisy, t)

    def eligible(
        self, sigma_n: torch.Tensor, t: torch.Tensor, rng: StepRNG, ids: Sequence[int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Chooses the samples of which consistency is asked.

        Args:
            sigma_n: `(batch,)` levels of the samples.
            t: `(batch,)` timesteps at which they are trained.
            rng: the random numbers of this micro-step.
            ids: `(batch,)` global indices of the samples.

        Returns:
            Their places `(k,)`, and the timesteps `(k,)` where their runs start and end.
        """
        u = uniform(len(sigma_n), rng, ids, sigma_n.device, "probes")
        if self.every == "all":
            start = t
            way = STRIDE * u + (1 / self.schedule.length if self.schedule.discrete else 0)
            end = self.law.at((self.law.exceeded(t) + way).clamp(max=1 - 2.0**-25)).to(t.dtype)
        else:
            start = self.schedule.first_not_below(sigma_n).to(t.dtype)
            end = self.law.at(u).to(t.dtype)
        rows = torch.nonzero((sigma_n > 0) & (end < start) & self.schedule.sigma(start).isfinite())[:, 0]
        return rows, start[rows], end[rows]

    def consistency(
        self,
        predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        y: torch.Tensor,
        sigma_n: torch.Tensor,
        start: torch.Tensor,
        end: torch.Tensor,
        generator: torch.Generator,
    ) -> torch.Tensor:
        """Computes the consistency loss of samples.

        Args:
            predict: the network, a function of noisy samples and timesteps of the objective.
            y: `(k, ...)` samples.
            sigma_n: `(k,)` their levels.
            start: `(k,)` timesteps to which they are noised before the runs, not below their levels.
            end: `(k,)` timesteps where the runs end.
            generator: source of noise.

        Returns:
            `(k,)`, unweighted.
        """
        noise = torch.randn(y.shape, generator=generator, device=y.device, dtype=y.dtype)
        at, own = self.schedule.sigma(start), sigma_n.double()
        more = ((at - own) * (at + own)).clamp(min=0).sqrt().to(y.dtype).view(-1, *[1] * (y.ndim - 1))

        def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            return self.denoised(predict, x, self.schedule.timestep(sigma).to(start.dtype))

        snap = (lambda sigma: self.schedule.sigma(self.schedule.timestep(sigma))) if self.schedule.discrete else None
        ends = self.schedule.sigma(end)
        return consistency_loss(denoise, y + more * noise, at, ends, self.consistency_steps, generator, snap)
