r"""DDIM inversion, its correction by fixed-point iteration, and the DDIM sampler that it inverts.

A step between two levels moves along the noise that the network predicts,
\(x' = \sqrt{\bar\alpha'}\,(x - \sqrt{1-\bar\alpha}\,\epsilon)/\sqrt{\bar\alpha} + \sqrt{1-\bar\alpha'}\,\epsilon\).
Upwards (towards noise) the network gets the present state but the timestep of the level that is to be reached, since
the state there is not known yet; so decoding does not quite lead back. The fixed-point iteration feeds the state that
was found into the network and repeats the step. For flow matching the steps are Euler's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

from .levels import Levels

__all__ = ["Model", "ddim_decode", "ddim_invert", "expected_inverted_std"]

Model: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""A function of states `(batch, ...)` and one timestep, a 0-d tensor, that returns the network's output."""


def ddim_invert(
    model: Model,
    sample: torch.Tensor,
    levels: Levels,
    fixed_point_iterations: int = 0,
    callback: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    interrupted: Callable[[], bool] | None = None,
) -> torch.Tensor:
    """Follows the images to their noise.

    Args:
        model: the network; it gets the states in float32 (float64 where `sample` is).
        sample: `(batch, ...)` images in the space that is diffused.
        levels: from `noise_levels`.
        fixed_point_iterations: further calls of the network per step, each of which brings the step nearer to the
            inverse of the decoding one.
        callback: called after every step with its index, timestep and state; what it returns is the new state.
        interrupted: asked before every step; once it answers yes, the state is returned as it is.

    Returns:
        States at the last level, `(batch, ...)`, in float32 (float64).

    Raises:
        ValueError: `fixed_point_iterations` is negative.

    Reference:
        Song et al., arXiv 2010.02502, equation 13; fixed points: Pan et al., arXiv 2309.04907.

    Example:
        >>> import torch
        >>> from diffusers import DDIMScheduler
        >>> from diffusers_ext import ddim_decode, ddim_invert, noise_levels
        >>> scheduler = DDIMScheduler()
        >>> levels = noise_levels(scheduler, 50)
        >>> def model(x, t):  # predicts the noise of standard normal data
        ...     return (1 - scheduler.alphas_cumprod[t]).sqrt() * x
        >>> image = torch.randn(1, 3, 8, 8)
        >>> state = ddim_invert(model, image, levels, fixed_point_iterations=5)
        >>> torch.allclose(ddim_decode(model, state, levels), image, atol=1e-4)
        True
    """
    if fixed_point_iterations < 0 or not isinstance(fixed_point_iterations, int):
        raise ValueError(f"`fixed_point_iterations` must be an integer >= 0, got {fixed_point_iterations!r}.")
    state = sample.to(torch.promote_types(sample.dtype, torch.float32))
    timesteps = torch.tensor(levels.timesteps, device=state.device)
    for step, t in enumerate(timesteps):
        if interrupted is not None and interrupted():
            break
        found = state
        for _ in range(1 + fixed_point_iterations):
            found = levels.raised(step, state, found, model(found, t))
        state = found if callback is None else callback(step, t, found)
    return state


def ddim_decode(
    model: Model,
    state: torch.Tensor,
    levels: Levels,
    callback: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    interrupted: Callable[[], bool] | None = None,
) -> torch.Tensor:
    """Samples with deterministic DDIM from the last level down to the image.

    Args:
        model: as in `ddim_invert`.
        state: `(batch, ...)` at the last level.
        levels: from `noise_levels`.
        callback: as in `ddim_invert`; the index counts from the noise.
        interrupted: as in `ddim_invert`.

    Returns:
        Images `(batch, ...)` in the space that is diffused, in float32 (float64).

    Reference:
        Song et al., arXiv 2010.02502, equation 12 with sigma 0.

    Example:
        See `ddim_invert`.
    """
    state = state.to(torch.promote_types(state.dtype, torch.float32))
    last = len(levels.timesteps) - 1
    timesteps = torch.tensor(levels.timesteps[::-1], device=state.device)
    for step, t in enumerate(timesteps):
        if interrupted is not None and interrupted():
            break
        state = levels.lowered(last - step, state, model(state, t))
        if callback is not None:
            state = callback(step, t, state)
    return state


def expected_inverted_std(levels: Levels, data_std: float = 1.0) -> float:
    r"""Computes the standard deviation of inverted states for normal data, where the noise predictor is exact.

    Inversion inflates it beyond that of the forward process, \(\sqrt{\bar\alpha s^2 + 1 - \bar\alpha}\), the more so
    the fewer its steps: what a diagnostic finds beyond this figure is the image's own.

    Args:
        levels: from `noise_levels`.
        data_std: s, standard deviation of the data, > 0.

    Raises:
        ValueError: `data_std` is not a positive number.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> from diffusers_ext import expected_inverted_std, noise_levels
        >>> round(expected_inverted_std(noise_levels(DDIMScheduler(), 50)), 4)
        1.0356
    """
    if not data_std > 0:
        raise ValueError(f"`data_std` must be a number > 0, got {data_std!r}.")
    return levels.inverted_std(data_std)
