"""What the pipeline refuses: schedulers, observations and parameters that do not fit."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from diffusers_ext.generation.score_levels import as_real
from diffusers_ext.generation.stepping import step_arguments
from diffusers_ext.training.config import require

from .objective import batch_and_views
from .protocol import ForwardModel, map_parameters

__all__ = ["check_scheduler", "checked_context", "checked_parameters", "seen_shape"]


def check_scheduler(scheduler: Any) -> None:
    """Refuses a scheduler that cannot be given the clean sample.

    Raises:
        ValueError: its `prediction_type` is not `"sample"`, it knows no such type, or its levels rise.
    """
    name = type(scheduler).__name__
    require(isinstance(scheduler, SchedulerMixin), "scheduler", name, "a Diffusers scheduler")
    found = scheduler.config.get("prediction_type")
    accepted = f"'sample' in {name}, for what the denoiser gives is a clean observation"
    require(found == "sample", "prediction_type", found, accepted)
    trial = copy.deepcopy(scheduler)
    zero = torch.zeros(1, 1, 1, 1)
    try:  # some have the argument and do not know this value
        trial.set_timesteps(4)
        if hasattr(trial, "scale_model_input"):
            trial.scale_model_input(zero, trial.timesteps[0])
        trial.step(zero, trial.timesteps[0], zero, **step_arguments(trial, 0.0, torch.Generator()))
    except Exception as error:  # they raise many kinds
        raise ValueError(
            f"`scheduler` must take `prediction_type='sample'`, as DDIMScheduler does, got {name}: {error}"
        ) from error
    falls = bool(trial.timesteps[0] > trial.timesteps[-1])
    require(falls, "scheduler", name, "one from noise to data, as DDIMScheduler")


def checked_parameters(
    forward_model: ForwardModel, parameters: Any, name: str, batch: int, device: torch.device | str
) -> Any:
    """Returns parameters as tensors on a device.

    Args:
        forward_model: the forward model.
        parameters: `(batch, views, ...)`, tensors or arrays.
        name: of the argument.
        batch: size of the batch.
        device: the device.

    Raises:
        ValueError: they are of another shape, or none of the forward model's.
    """
    parameters = map_parameters(partial(as_real, name), parameters)
    for part in parameters.values() if isinstance(parameters, dict) else [parameters]:
        shape = tuple(part.shape)
        fits = part.ndim >= 2 and shape[0] == batch and shape[1] >= 1
        fits = fits and shape[1] == batch_and_views(parameters)[1]
        require(fits, name, shape, f"of shape ({batch}, views, ...) with at least one view")
    flat = map_parameters(lambda value: value.flatten(0, 1), parameters)
    forward_model.check_parameters(flat, batch * batch_and_views(parameters)[1])
    return map_parameters(lambda value: value.to(device), parameters)


def checked_context(
    forward_model: ForwardModel, observations: torch.Tensor, parameters: Any, signal_shape: Sequence[int]
) -> Any:
    """Returns the parameters of observations as tensors on their device.

    Args:
        forward_model: the forward model.
        observations: `(batch, views, ...)`.
        parameters: `(batch, views, ...)`.
        signal_shape: of a signal, without the batch.

    Raises:
        ValueError: there are none, observations are not what the forward model sees, or they are not finite.
    """
    if parameters is None:
        raise ValueError("`parameters` must be given with `observations`, those of each of them, got None.")
    shape = tuple(observations.shape)
    accepted = "of shape (batch, views, ...)"
    require(observations.ndim >= 3 and len(observations) > 0, "observations", shape, accepted)
    parameters = checked_parameters(forward_model, parameters, "parameters", shape[0], observations.device)
    views = batch_and_views(parameters)[1]
    accepted = f"those of each of the {shape[1]} observations, (batch, views, ...)"
    require(views == shape[1], "parameters", views, accepted)
    seen = seen_shape(forward_model, parameters, signal_shape)
    accepted = f"of shape (batch, views, {', '.join(map(str, seen))}), as {type(forward_model).__name__} sees"
    require(shape[2:] == seen, "observations", shape, accepted)
    require(bool(observations.isfinite().all()), "observations", "NaN or infinite numbers", "finite")
    return parameters


def seen_shape(forward_model: ForwardModel, parameters: Any, signal_shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the shape of an observation; `parameters` are `(batch, views, ...)`."""
    flat = map_parameters(lambda value: value.flatten(0, 1), parameters)
    return forward_model.observation_shape(signal_shape, flat)
