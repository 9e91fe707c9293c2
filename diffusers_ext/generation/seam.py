"""Four places of a stock pipeline's call taken over: its latents, its scheduler, its prompts, its decoding."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from .prompts import fresh

__all__ = ["ENTRANCES", "Call", "Reached", "Undecoded", "copied", "pipeline_class", "scheduler_class"]

# The methods by which pipelines make their first latents.
ENTRANCES = ("prepare_latents", "prepare_intermediate_images")


class Reached(Exception):  # noqa: N818 - no error: it carries a value out of the call
    """Ends a pipeline's call at the place that was wanted."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


class Call:
    """One run of a pipeline's call: what goes in, and what came by. It belongs to that run, not to the denoiser.

    Args:
        device: where the call runs.
        timesteps: what the scheduler claims; none of them skips the loop.
        x: takes the place of the pipeline's latents.
        recordings: what `encode_prompt` answers, call by call; `None` lets it encode and keeps its answers.
        stop: where the call ends: "enter", when latents enter; "step"; or "decode", past steps that change nothing.
    """

    def __init__(
        self,
        device: torch.device,
        timesteps: torch.Tensor,
        x: torch.Tensor | None = None,
        recordings: list[Any] | None = None,
        stop: str = "step",
    ) -> None:
        self.device, self.timesteps, self.x = device, timesteps, x
        self.recordings, self.stop = recordings, stop
        self.played = 0
        self.recorded: list[Any] = []
        self.latents: torch.Tensor | None = None  # the pipeline's own
        self.entered = False
        self.schedule: dict[str, Any] = {}  # the arguments of `set_timesteps`

    def __deepcopy__(self, memo: dict) -> Call:
        return self  # pipelines that copy their scheduler stay in this run

    def enter(self, latents: torch.Tensor) -> torch.Tensor:
        """Puts x in the place of latents."""
        self.entered = True
        if self.latents is None:
            self.latents = latents
        if self.stop == "enter" and len(self.timesteps):
            raise Reached(None)
        if self.x is None:
            return latents
        if len(latents) == 2 * len(self.x):  # guidance without `prepare_latents`: both halves are the same
            return torch.cat([self.x, self.x])
        if latents.shape != self.x.shape:
            raise ValueError(
                f"the pipeline's own latents have the shape {tuple(latents.shape)}, x has {tuple(self.x.shape)}."
            )
        return self.x

    def leave(self, output: Any, sample: torch.Tensor, return_dict: bool) -> SchedulerOutput | tuple:
        """Ends the call with what the scheduler would have stepped with."""
        x = self.x
        if self.stop == "decode":
            return SchedulerOutput(prev_sample=sample) if return_dict else (sample, sample)
        if self.stop == "enter":
            self.latents = sample
            raise Reached(None)
        if x is None or not self.entered:
            raise ValueError(
                "`scheduler.step` was reached before any latents entered by `prepare_latents`, by `scale_model_input` "
                "or as an argument."
            )
        if sample is not x and not self._same(sample, x):
            raise ValueError(
                f"`scheduler.step` got another sample {tuple(sample.shape)} than the latents {tuple(x.shape)} that "
                "`prepare_latents` gave: the loop changes them."
            )
        raise Reached(output)

    @staticmethod
    def _same(sample: torch.Tensor, x: torch.Tensor) -> bool:
        if len(sample) == 2 * len(x):
            sample = sample[: len(x)]
        return sample.shape == x.shape and torch.equal(sample.to(x.dtype), x)


class Undecoded:
    """Stands in for an autoencoder and ends the call with the latents that it should decode.

    It claims fp32, so that nothing is rounded, and is not moved or cast: the real one is shared with the user.
    """

    dtype = torch.float32

    def __init__(self, vae: Any) -> None:
        self._vae = vae

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vae, name)

    def to(self, *args: Any, **kwargs: Any) -> Undecoded:
        """Stays as it is."""
        return self

    def decode(self, z: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """Ends the call."""
        raise Reached((z, args, kwargs))


def pipeline_class(base: type) -> type:
    """Returns a subclass of a pipeline's class whose instances hold a `Call` as `_seam`."""
    original: Any = base

    def encode_prompt(self: Any, *args: Any, **kwargs: Any) -> Any:
        call: Call = self._seam
        if call.recordings is None:
            value = original.encode_prompt(self, *args, **kwargs)
            call.recorded.append(value)
            return value
        if call.played == len(call.recordings):
            raise ValueError(f"`encode_prompt` was recorded {call.played} times and is called once more.")
        call.played += 1
        return fresh(call.recordings[call.played - 1])

    # The stock property walks every module of every component, which takes most of the time of a small model's call.
    device = property(lambda self: self._seam.device)
    members: dict[str, Any] = {
        "__module__": base.__module__,
        "_execution_device": device,
        "device": device,
        "maybe_free_model_hooks": lambda self: None,
    }
    if hasattr(base, "encode_prompt"):
        members["encode_prompt"] = encode_prompt
    members.update({name: _entering(getattr(base, name)) for name in ENTRANCES if hasattr(base, name)})
    return type(base.__name__, (base,), members)


def _entering(original: Any) -> Any:
    def prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = original(self, *args, **kwargs)
        if isinstance(made, torch.Tensor):
            return self._seam.enter(made)
        return type(made)([self._seam.enter(made[0]), *made[1:]])  # ids of positions stand behind

    return prepare


def scheduler_class(base: type, takes_latents: bool) -> type:
    """Returns a subclass of a scheduler's class that claims the timesteps of a `Call` and ends it at `step`.

    Loops ask `isinstance` and `inspect.signature(scheduler.set_timesteps)`, hence a subclass with every spelling.

    Args:
        base: the scheduler's class.
        takes_latents: latents enter at `scale_model_input`, for pipelines without `prepare_latents`.
    """

    def set_timesteps(
        self: Any,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        **kwargs: Any,
    ) -> None:
        arguments = {"num_inference_steps": num_inference_steps, "timesteps": timesteps, "sigmas": sigmas, "mu": mu}
        self._seam.schedule = {k: v for k, v in {**arguments, **kwargs}.items() if v is not None}
        self.num_inference_steps = num_inference_steps

    def scale_model_input(self: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._seam.enter(sample) if takes_latents else sample

    def step(self: Any, model_output: Any, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._seam.leave(model_output, sample, kwargs.get("return_dict", True))

    def ignored(self: Any, value: Any) -> None:
        pass

    set_timesteps.__signature__ = inspect.signature(set_timesteps)  # type: ignore[attr-defined]  # asked at every call

    # Properties with a setter go before what the scheduler keeps on itself.
    members: dict[str, Any] = {
        "__module__": base.__module__,
        "init_noise_sigma": property(lambda self: 1.0, ignored),
        "timesteps": property(lambda self: self._seam.timesteps, ignored),
        "set_timesteps": set_timesteps,
        "scale_model_input": scale_model_input,
        "step": step,
    }
    return type(base.__name__, (base,), members)


def copied(instance: Any, cls: type, **attributes: Any) -> Any:
    """Returns a shallow copy as an instance of a run-time subclass."""
    copy: Any = object.__new__(cls)
    copy.__dict__.update(instance.__dict__)
    copy.__dict__.update(attributes)
    return copy
