"""What a pipeline's scheduler says about its training: what is learned, and at which noise levels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDPMScheduler

from .objectives import EpsX0V, FlowMatching, Objective
from .pretrained import converted
from .timesteps import Density, ShiftedNoiseLevels, Timesteps, UniformTimesteps

__all__ = ["is_flow", "pipeline_objective", "pipeline_timesteps", "sampling_shift"]


def is_flow(scheduler: Any) -> bool:
    """Returns whether a scheduler samples flow matching: one of that name, or another told so (Sana's)."""
    told = scheduler.config.get("prediction_type") == "flow_prediction"
    return type(scheduler).__name__.startswith("FlowMatch") or told


def pipeline_objective(scheduler: Any, snr_gamma: float | None = None) -> Objective:
    r"""Makes the objective that a scheduler's models are trained with.

    On a schedule of betas \(x_t = \sqrt{\bar\alpha_t} x_0 + \sqrt{1 - \bar\alpha_t} n\) whatever the scheduler steps
    in: those that step in noise levels (Euler, Heun) hand the network just this state.

    Args:
        scheduler: a pipeline's.
        snr_gamma: bound of min-SNR weighting; `None` for the plain mean.

    Raises:
        ValueError: it samples neither flow matching nor a variance-preserving schedule, or predicts something else.
    """
    name = type(scheduler).__name__
    if is_flow(scheduler):
        if snr_gamma is not None:
            raise ValueError(f"`snr_gamma` must be left out for a pipeline with {name}: flow matching has none.")
        return FlowMatching(scheduler.config.num_train_timesteps)
    kinds = ("epsilon", "sample", "v_prediction")
    kind = scheduler.config.get("prediction_type")
    if not hasattr(scheduler, "alphas_cumprod") or kind not in kinds:
        raise ValueError(
            "the pipeline's scheduler must be one of flow matching or have a variance-preserving schedule of betas "
            f"with `prediction_type` in {list(kinds)}, got {name} with {kind!r}."
        )
    ours: Any = converted(DDPMScheduler, scheduler, rescale_betas_zero_snr=False)
    ours.alphas_cumprod = scheduler.alphas_cumprod.clone()
    blind = kind == "epsilon" and scheduler.alphas_cumprod[-1] == 0
    if blind:
        raise ValueError(
            f"the pipeline's scheduler must predict v or the sample on a schedule that ends at zero SNR, got {name} "
            "with 'epsilon': the noise of pure noise says nothing of the image."
        )
    return EpsX0V(ours, "none" if snr_gamma is None else "min_snr", snr_gamma or 5.0)


def sampling_shift(scheduler: Any, mu: float | None = None) -> Callable[[torch.Tensor], torch.Tensor] | None:
    r"""Returns how the sampler moves the noise levels of flow matching, a function of them; `None` if it does not.

    A static shift \(k\) maps \(s\) to \(k s / (1 + (k - 1) s)\); a dynamic one depends on the size of the image
    through `mu`.

    Args:
        scheduler: a pipeline's, of flow matching.
        mu: what the pipeline gives to `set_timesteps` at this size, if it does.
    """
    config = scheduler.config
    if config.get("use_dynamic_shifting") and mu is not None:
        linear = config.get("time_shift_type") == "linear"
        factor = mu if linear else float(torch.tensor(mu, dtype=torch.float64).exp())
    else:
        factor = config.get("shift", None) or config.get("flow_shift", None) or 1.0
    if factor == 1.0:
        return None
    return lambda s: factor * s / (1 + (factor - 1) * s)


def pipeline_timesteps(scheduler: Any, density: Density = "uniform", mu: float | None = None) -> Timesteps:
    """Makes the law of the timesteps: integers on a schedule of betas, shifted noise levels for flow matching.

    Args:
        scheduler: a pipeline's.
        density: density of the noise levels of flow matching.
        mu: see `sampling_shift`.

    Raises:
        ValueError: a density for a schedule of betas.
    """
    if is_flow(scheduler):
        return ShiftedNoiseLevels(density, sampling_shift(scheduler, mu))
    if density != "uniform":
        raise ValueError(
            f"`timestep_sampling` must be 'uniform' for a pipeline with {type(scheduler).__name__}, got {density!r}: "
            "its timesteps are integers of a schedule of betas."
        )
    return UniformTimesteps(scheduler.config.num_train_timesteps)
