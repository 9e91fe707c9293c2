"""How a Diffusers scheduler is driven, the same for sampling and for training through the sampler."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

__all__ = [
    "callback_names",
    "check_generator",
    "current_config",
    "scaled_input",
    "set_timesteps",
    "step_arguments",
]


def current_config(part: Any) -> dict[str, Any]:
    """Returns the configuration that a scheduler or a network has now, for `from_config`.

    Diffusers notes which arguments were not given by name, and `from_config` leaves those out, so that the defaults of
    another class hold; also where one was given by position, or changed since (old pipelines correct `steps_offset`).
    """
    config, known = part.config, inspect.signature(type(part).__init__).parameters
    noted = config.get("_use_default_values", ())
    defaults = [name for name in noted if name in known and config[name] == known[name].default]
    return {**config, "_use_default_values": defaults}


def set_timesteps(
    scheduler: Any, num_inference_steps: int, device: torch.device | str, sigmas: list[float] | None = None
) -> torch.Tensor:
    """Puts a scheduler to the start of a chain and returns its timesteps.

    Args:
        scheduler: any Diffusers scheduler.
        num_inference_steps: steps of the chain.
        device: where the timesteps are.
        sigmas: noise levels instead of the scheduler's own; flow-matching Euler gets `1, ..., 1/steps` by default.

    Raises:
        ValueError: `sigmas` for a scheduler that takes none, or timesteps beyond its training.
    """
    if sigmas is None and isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        # Its own grid ends at 1/1000 before 0: with few steps the last one would be wasted.
        sigmas = list(np.linspace(1.0, 1 / num_inference_steps, num_inference_steps))
    if sigmas is None:
        scheduler.set_timesteps(num_inference_steps, device=device)
    elif "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
        scheduler.set_timesteps(sigmas=sigmas, device=device)
    else:
        raise ValueError(f"`sigmas` must be left out: {type(scheduler).__name__} does not take them.")
    timesteps: Any = scheduler.timesteps
    length = 0 if scheduler.config.get("use_flow_sigmas") else len(getattr(scheduler, "alphas_cumprod", ()))
    if length and timesteps.max() > length - 1:
        raise ValueError(
            f"`num_inference_steps` must be such that all timesteps are below {length}, got {num_inference_steps} "
            f"with one of {float(timesteps.max()):g}; `steps_offset` of the scheduler moves them up."
        )
    return timesteps


def step_arguments(scheduler: Any, eta: float, generator: Any) -> dict[str, Any]:
    """Returns those of `eta` and `generator` that the scheduler's `step` takes.

    Raises:
        ValueError: `eta` is not in [0, 1], or it is not 0 and the scheduler does not take it.
    """
    if isinstance(eta, bool) or not isinstance(eta, int | float) or not 0 <= eta <= 1:
        raise ValueError(f"`eta` must be a number in [0, 1], got {eta!r}.")
    accepted = inspect.signature(scheduler.step).parameters
    if eta and "eta" not in accepted:
        raise ValueError(f"`eta` must be 0: {type(scheduler).__name__} does not take it, got {eta}.")
    return {name: value for name, value in {"eta": eta, "generator": generator}.items() if name in accepted}


def scaled_input(scheduler: Any, sample: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Returns the sample as the network wants it at a timestep."""
    return scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else sample


def callback_names(callback: Any, names: list[str], offered: list[str]) -> list[str]:
    """Returns the names of the tensors that `callback_on_step_end` is given; Diffusers' callbacks bring their own.

    Raises:
        ValueError: the callback cannot be called, or a name is not among those that the pipeline offers.
    """
    if callback is not None and not callable(callback):
        raise ValueError(f"`callback_on_step_end` must be callable or left out, got {callback!r}.")
    if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
        names = callback.tensor_inputs
    if not isinstance(names, list | tuple) or any(name not in offered for name in names):
        raise ValueError(f"`callback_on_step_end_tensor_inputs` must be a subset of {offered}, got {names}.")
    return names


def check_generator(generator: Any, count: int) -> None:
    """Checks a generator, or a list of them, one for each of `count` samples.

    Raises:
        ValueError: it is another thing, or the list has another length.
    """
    many = isinstance(generator, list)
    given: list[Any] = generator if many else [] if generator is None else [generator]
    fits = not many or len(given) == count
    if not fits or not all(isinstance(g, torch.Generator) for g in given):
        found = repr(generator) if fits else f"a list of {len(given)}"
        raise ValueError(f"`generator` must be one generator or a list of {count}, got {found}.")
