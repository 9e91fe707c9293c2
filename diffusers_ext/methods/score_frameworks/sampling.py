r"""What anomaly maps and reconstruction share: a pipeline's levels, its clean estimate, and DDIM's step with noise.

Levels are \(x_t = a x_0 + b\,n\), \(\sigma = b/a\), as in `ScoreField`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor

from diffusers_ext.generation.score_field import ScoreField
from diffusers_ext.generation.score_levels import sigma_of_timestep
from diffusers_ext.generation.stepping import set_timesteps

__all__ = ["Estimator", "ddim_step", "draw_rows", "partial_levels", "scheduler_levels"]


class Estimator:
    """The clean estimate of an unconditional network.

    Args:
        unet: the network.
        scheduler: its scheduler, of DDPM's kind, of flow matching or EDM; where it clips clean estimates
            (`clip_sample`), so does this.

    Raises:
        ValueError: the network is conditional, or the scheduler's levels are not known.
    """

    def __init__(self, unet: Any, scheduler: Any) -> None:
        if getattr(unet, "class_embedding", None) is not None or "cross_attention_dim" in unet.config:
            raise ValueError("`unet` must be unconditional, got one with classes or text.")
        self.field = ScoreField(unet, scheduler)
        clips = scheduler.config.get("clip_sample", False) and self.field.schedule.kind == "vp"
        self.bound = float(scheduler.config.get("clip_sample_range", 1.0)) if clips else None

    def __call__(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        """Returns the estimate of the clean samples behind x, `(batch, ...)`, with gradient where x asks for it."""
        a, b = (float(c) for c in self.coefficients(sigma))
        clean = (x - b * self.field.eps(x, sigma)) / a
        return clean if self.bound is None else clean.clamp(-self.bound, self.bound)

    def coefficients(self, sigma: float) -> tuple[float, float]:
        """Returns a and b of a level, 1 and 0 of sigma 0."""
        if sigma == 0:
            return 1.0, 0.0
        level = self.field.at(sigma)
        return float(level.a), float(level.b)


def partial_levels(field: ScoreField, strength: float, steps: int) -> list[float]:
    """Returns the sigmas of steps from a share of the schedule downwards, and 0 behind them.

    Args:
        field: with the schedule.
        strength: the share in (0, 1]; of 1,000 timesteps .25 begins at 249.
        steps: how many, evenly spaced in timesteps.

    Raises:
        ValueError: there are fewer timesteps.
    """
    sigmas = field.levels.sigma
    first = min(max(round(strength * field.schedule.length) - 1, 0), len(sigmas) - 1)
    if steps > first + 1:
        raise ValueError(
            f"`num_inference_steps` must be at most {first + 1}, the timesteps of `strength` {strength:g}, "
            f"got {steps}."
        )
    # All of the timesteps end at the first; fewer keep the distance of a step to it.
    grid = np.linspace(first, 0, steps + 1)[:-1] if steps <= first else np.arange(first, -1, -1)
    return [*sigmas[np.round(grid).astype(int)].tolist(), 0.0]


def scheduler_levels(field: ScoreField, scheduler: Any, steps: int, device: Any) -> tuple[torch.Tensor, list[float]]:
    """Returns the timesteps of a scheduler's own grid, their sigmas, and 0 behind them.

    Raises:
        ValueError: the scheduler makes another number of steps.
    """
    timesteps = set_timesteps(scheduler, steps, device)
    if field.schedule.kind == "vp":
        sigmas = sigma_of_timestep(scheduler.alphas_cumprod, timesteps)
    else:
        given = scheduler.sigmas.double().cpu()[: len(timesteps)]
        sigmas = given / (1 - given) if field.schedule.kind == "flow" else given
    known = field.levels.sigma
    sigmas = sigmas.clamp(float(known[0]), float(known[-1]))
    if len(timesteps) != steps or not bool((sigmas.diff() < 0).all()):
        raise ValueError(
            f"`scheduler` must make {steps} steps at falling levels, got {type(scheduler).__name__} with "
            f"{len(timesteps)}; `DDIMScheduler.from_config(scheduler.config)` does."
        )
    return timesteps, [*sigmas.tolist(), 0.0]


def ddim_step(
    x: torch.Tensor,
    clean: torch.Tensor,
    level: tuple[float, float],
    lower: tuple[float, float],
    eta: float,
    draw: Callable[[], torch.Tensor],
) -> torch.Tensor:
    r"""Steps to a lower level (2010.02502, equation 12), with the noise that belongs to a given clean estimate.

    Args:
        x: `(batch, ...)` at `level`.
        clean: the estimate, corrected or not.
        level: a and b.
        lower: those of the level to go to, (1, 0) for the end.
        eta: share of the noise of an ancestral step.
        draw: makes noise like x.
    """
    (a, b), (lower_a, lower_b) = level, lower
    if lower_b == 0:
        return lower_a * clean
    variance = (eta * lower_b) ** 2 * (1 - (lower_b * a / (lower_a * b)) ** 2)
    noise = (x - a * clean) / b
    moved = lower_a * clean + math.sqrt(max(lower_b**2 - variance, 0.0)) * noise
    return moved + math.sqrt(variance) * draw() if variance > 0 else moved


def draw_rows(
    shape: tuple[int, ...],
    rows: int,
    generator: torch.Generator | list[torch.Generator] | None,
    like: torch.Tensor,
    make: Callable[..., torch.Tensor] | None = None,
) -> torch.Tensor:
    """Draws noise for several samples of each image.

    Args:
        shape: `(images * rows, ...)`, an image's samples together.
        rows: samples of an image.
        generator: one for all, or one for each image, so that an image's noise does not depend on the others.
        like: gives device and dtype.
        make: as `SimplexNoise.sample`; by default normal noise.
    """
    draw = make or randn_tensor
    if not isinstance(generator, list):
        return draw(shape, generator=generator, device=like.device, dtype=like.dtype)
    parts = [draw((rows, *shape[1:]), generator=g, device=like.device, dtype=like.dtype) for g in generator]
    return torch.cat(parts)
