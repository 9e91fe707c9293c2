r"""DDIM inversion, its correction by fixed-point iteration, and the DDIM sampler that it inverts.

A step between two levels moves along the noise that the network predicts,
\(x' = \sqrt{\bar\alpha'}\,(x - \sqrt{1-\bar\alpha}\,\epsilon)/\sqrt{\bar\alpha} + \sqrt{1-\bar\alpha'}\,\epsilon\).
Upwards (towards noise) the network gets the present state but the timestep of the level that is to be reached, since
the state there is not known yet; so decoding does not quite lead back. The fixed-point iteration feeds the state that
was found into the network and repeats the step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from diffusers import DDIMScheduler

__all__ = ["NoiseLevels", "ddim_decode", "ddim_invert", "expected_inverted_std", "noise_levels"]

Model: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""A function of states `(batch, ...)` and one timestep, a 0-d integer tensor, that returns the network's output."""


@dataclass(frozen=True)
class NoiseLevels:
    r"""The levels between an image and the state at which images are mixed, in the order of rising noise.

    Attributes:
        timesteps: K timesteps; step k of the inversion leads to `timesteps[k]`.
        alphas_cumprod: K + 1 values of \(\bar\alpha\), that of the image first, that of `timesteps[k]` at k + 1.
        next_alpha_cumprod: the value one step beyond the last; the last itself where the grid ends there.
        prediction_type: `"epsilon"`, `"v_prediction"` or `"sample"`.
    """

    timesteps: tuple[int, ...]
    alphas_cumprod: tuple[float, ...]
    next_alpha_cumprod: float
    prediction_type: str


def noise_levels(scheduler: Any, num_inference_steps: int, strength: float = 1.0) -> NoiseLevels:
    """Reads the levels of a DDIM scheduler; the scheduler is not changed.

    Neighbouring timesteps bound a step, also where Diffusers' `DDIMScheduler.step` rounds the lower one by itself
    (`"trailing"` grids whose steps do not divide the training timesteps). `clip_sample` and `thresholding` have no
    inverse and are not applied.

    Args:
        scheduler: a `DDIMScheduler`.
        num_inference_steps: S, steps from pure noise to the image.
        strength: share of them that is used, in `(0, 1]`; K = round(strength * S).

    Raises:
        ValueError: another scheduler, grid or prediction type, or numbers outside their range.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> from diffusers_ext import noise_levels
        >>> noise_levels(DDIMScheduler(), 10, strength=0.3).timesteps
        (0, 100, 200)
    """
    if not isinstance(scheduler, DDIMScheduler):
        raise ValueError(
            f"`scheduler` must be a DDIMScheduler, got {type(scheduler).__name__}. To exchange it: "
            "pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)."
        )
    config: Any = scheduler.config
    if config.timestep_spacing not in ("leading", "trailing"):
        raise ValueError(
            f"`scheduler` must have the timestep_spacing 'leading' or 'trailing', got {config.timestep_spacing!r}."
        )
    if config.prediction_type not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(
            "`scheduler` must have the prediction_type 'epsilon', 'v_prediction' or 'sample', got "
            f"{config.prediction_type!r}."
        )
    total = config.num_train_timesteps
    if isinstance(num_inference_steps, bool) or not isinstance(num_inference_steps, int):
        raise ValueError(f"`num_inference_steps` must be an integer in 1..{total}, got {num_inference_steps!r}.")
    if not 1 <= num_inference_steps <= total:
        raise ValueError(f"`num_inference_steps` must be an integer in 1..{total}, got {num_inference_steps}.")
    if not (isinstance(strength, int | float) and 0 < strength <= 1):
        raise ValueError(f"`strength` must be a number in (0, 1], got {strength!r}.")
    count = round(strength * num_inference_steps)
    if count < 1:
        raise ValueError(
            f"`strength` must give at least one of {num_inference_steps} steps, got {strength}, which gives none."
        )
    # A copy, not one made from its arguments: those leave out what was given by position or changed since.
    own = copy.copy(scheduler)
    own.set_timesteps(num_inference_steps)
    ascending = sorted(int(t) for t in own.timesteps)
    if ascending[-1] >= total:
        raise ValueError(
            f"`num_inference_steps` must leave room for the scheduler's steps_offset, got {num_inference_steps}, "
            f"whose last timestep {ascending[-1]} is not below {total}."
        )
    alphas = [float(scheduler.alphas_cumprod[t]) for t in ascending]
    below = ascending[0] - total // num_inference_steps
    image = float(scheduler.alphas_cumprod[below] if below >= 0 else scheduler.final_alpha_cumprod)
    if config.prediction_type == "epsilon" and alphas[count - 1] == 0:
        raise ValueError(
            "`strength` must be below 1 for a scheduler of zero terminal SNR that predicts epsilon, got "
            f"{strength!r}: its last state holds nothing of the image."
        )
    return NoiseLevels(
        tuple(ascending[:count]),
        (image, *alphas[:count]),
        alphas[min(count, len(alphas) - 1)],
        config.prediction_type,
    )


def ddim_invert(
    model: Model,
    sample: torch.Tensor,
    levels: NoiseLevels,
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
        here, there = levels.alphas_cumprod[step : step + 2]
        image_scale = (there / here) ** 0.5
        noise_scale = (1 - there) ** 0.5 - image_scale * (1 - here) ** 0.5
        found = state
        for _ in range(1 + fixed_point_iterations):
            # The network answers for the level it was asked about, so its output is read at that level.
            _, noise = _split(model(found, t), found, there, levels.prediction_type)
            found = image_scale * state + noise_scale * noise
        state = found if callback is None else callback(step, t, found)
    return state


def ddim_decode(
    model: Model,
    state: torch.Tensor,
    levels: NoiseLevels,
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
        there, here = levels.alphas_cumprod[last - step], levels.alphas_cumprod[last - step + 1]
        image, noise = _split(model(state, t), state, here, levels.prediction_type)
        state = there**0.5 * image + (1 - there) ** 0.5 * noise
        if callback is not None:
            state = callback(step, t, state)
    return state


def _split(
    output: torch.Tensor, state: torch.Tensor, alpha_cumprod: float, prediction_type: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the image and the noise that a network's output stands for at a level."""
    output = output.to(state.dtype)
    image_scale, noise_scale = alpha_cumprod**0.5, (1 - alpha_cumprod) ** 0.5
    if prediction_type == "v_prediction":
        return image_scale * state - noise_scale * output, image_scale * output + noise_scale * state
    if prediction_type == "sample":
        return output, (state - image_scale * output) / noise_scale
    return (state - noise_scale * output) / image_scale, output


def expected_inverted_std(levels: NoiseLevels, data_std: float = 1.0) -> float:
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
    std = data_std
    for here, there in zip(levels.alphas_cumprod, levels.alphas_cumprod[1:], strict=False):
        image_scale = (there / here) ** 0.5
        noise_scale = (1 - there) ** 0.5 - image_scale * (1 - here) ** 0.5
        # The exact prediction at the level to be reached is a multiple of the state's deviation from the mean.
        std *= image_scale + noise_scale * (1 - there) ** 0.5 / (there * data_std**2 + 1 - there)
    return std
