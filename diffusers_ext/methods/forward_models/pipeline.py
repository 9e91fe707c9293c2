"""Signals that agree with observations, by denoising what would be observed of them (2306.11719, section 3)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

from diffusers_ext.generation.score_levels import as_real
from diffusers_ext.generation.stepping import (
    callback_names,
    check_generator,
    scaled_input,
    set_timesteps,
    step_arguments,
)
from diffusers_ext.hub.loading import SafePipeline
from diffusers_ext.training.config import is_number, is_range, is_whole, require

from .checks import check_scheduler, checked_context, checked_parameters, seen_shape
from .denoiser import LiftedViews, lift_views, lifted_input, signal_shape
from .objective import batch_and_views, observe
from .pictures import as_images
from .protocol import ForwardModel, Parameters, map_parameters

__all__ = ["ForwardModelPipeline", "ForwardModelPipelineOutput"]

SAMPLING = ("autoregressive", "joint", "single")
OUTPUT_TYPES = ("pt", "np", "pil")


@dataclass
class ForwardModelPipelineOutput(BaseOutput):
    """Output of `ForwardModelPipeline`.

    Args:
        signals: `(batch, *signal_shape)`, or images.
        observations: `(batch, views, ...)` what the forward model sees of them.
        parameters: `(batch, views, ...)` of these views.
    """

    __module__ = "diffusers_ext"

    signals: Any
    observations: Any
    parameters: Any


def _check_noise(context_noise: Any) -> None:
    good = is_number(context_noise) and context_noise >= 0
    require(good, "context_noise", context_noise, "a number >= 0")


class ForwardModelPipeline(SafePipeline):
    r"""Draws signals S that agree with observations of them, where only observations were ever seen in training.

    The network estimates a signal from the context (the given observations) and from a noisy observation of a further
    view; what the forward model sees of that signal is the denoised observation (2306.11719, eq. 5).

    One denoised view makes a signal that is a sample only as far as that view determines it, and a mean in the rest.
    More views remedy this: `"autoregressive"` sampling denoises one after the other, each with those before it in its
    context; `"joint"` sampling denoises all of them together through one signal, and needs a network that was trained
    with as many noisy views.

    Args:
        unet: `UNet2DModel` whose output is the signal and which reads what `lifted_input` gives, or `ObservationMLP`.
        scheduler: any Diffusers scheduler with `prediction_type="sample"`; without clipping unless the scaled
            observations lie in [-1, 1].
        forward_model: the forward model.
        signal_range: values of signals that pictures show as black and white; `None` for signals without pictures.
        observation_scale: what observations were multiplied by before noise was added to them. A network hardly heeds
            a view whose news are small beside the noise.
        context_noise: standard deviation of the noise that sampled views get when they join the context, as in
            training.
        null_context: whether the network was also trained without context, which guidance needs.
        regression: whether the network was trained without noisy observations: one call then gives the mean signal.
        max_context_views: largest context of training, sampled views included; a larger one gets a warning.
        num_targets: how many noisy views at most training denoised together; more get a warning.

    Raises:
        ValueError: the scheduler takes no clean samples, or a number is out of its range.

    Example:
        >>> import torch
        >>> from diffusers import DDIMScheduler, UNet2DModel
        >>> from diffusers_ext import CropForwardModel, ForwardModelPipeline
        >>> unet = UNet2DModel(
        ...     sample_size=8, in_channels=6, out_channels=1, block_out_channels=(8, 8), norm_num_groups=2,
        ...     down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        ... )
        >>> scheduler = DDIMScheduler(prediction_type="sample", clip_sample=False, timestep_spacing="trailing")
        >>> pipeline = ForwardModelPipeline(unet, scheduler, CropForwardModel(size=4, sample_size=8))
        >>> pipeline.set_progress_bar_config(disable=True)
        >>> corner = torch.zeros(1, 1, 2, dtype=torch.long)  # (batch, views, 2)
        >>> result = pipeline(torch.zeros(1, 1, 1, 4, 4), corner, num_views=2, num_samples=3, num_inference_steps=2)
        >>> result.signals.shape, result.observations.shape
        (torch.Size([3, 1, 8, 8]), torch.Size([3, 2, 1, 4, 4]))
    """

    __module__ = "diffusers_ext"

    unet: Any
    scheduler: Any
    forward_model: Any

    model_cpu_offload_seq = "unet"
    _exclude_from_cpu_offload = ["forward_model"]  # called between any two calls of the network
    _callback_tensor_inputs = ["latents", "signals"]

    def __init__(
        self,
        unet: Any,
        scheduler: SchedulerMixin,
        forward_model: ForwardModel,
        signal_range: Sequence | None = None,
        observation_scale: float = 1.0,
        context_noise: float = 0.0,
        null_context: bool = False,
        regression: bool = False,
        max_context_views: int | None = None,
        num_targets: int | None = None,
    ) -> None:
        super().__init__()
        rising = signal_range is None or is_range(signal_range)
        require(rising, "signal_range", signal_range, "two numbers, low < high, or left out")
        scaled = is_number(observation_scale) and observation_scale > 0
        require(scaled, "observation_scale", observation_scale, "a number > 0")
        _check_noise(context_noise)
        for name, value, least in (("max_context_views", max_context_views, 0), ("num_targets", num_targets, 1)):
            require(value is None or is_whole(value, least), name, value, f"an integer >= {least}, or left out")
        if scheduler is not None:
            check_scheduler(scheduler)
        for name, part, kind in (("unet", unet, nn.Module), ("forward_model", forward_model, ForwardModel)):
            require(isinstance(part, kind | None), name, type(part).__name__, f"a {kind.__name__}")
        accepted = (
            "handed over, `from_pretrained(REPO, forward_model=CLASS.from_pretrained(REPO, "
            "subfolder='forward_model'))`: it is of a class outside of this package"
        )
        require(type(forward_model) is not ForwardModel, "forward_model", "ForwardModel", accepted)
        self.register_modules(unet=unet, scheduler=scheduler, forward_model=forward_model)
        if forward_model is not None and type(forward_model).__module__ != "diffusers_ext":
            # Diffusers loads no class of a library that it does not know, even where an object is handed over.
            self.register_to_config(forward_model=("diffusers_ext", "ForwardModel"))
        self.register_to_config(
            signal_range=signal_range if signal_range is None else list(signal_range),
            observation_scale=observation_scale,
            context_noise=context_noise,
            null_context=null_context,
            regression=regression,
            max_context_views=max_context_views,
            num_targets=num_targets,
        )
        self._guidance_scale, self._num_timesteps, self._interrupt = 1.0, 0, False

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """Makes a pipeline of another's parts, as Diffusers does; network and forward model may be of any class."""
        parts = {name: part for name, part in pipeline.components.items() if name in ("unet", "forward_model")}
        return super().from_pipe(pipeline, **{**parts, **kwargs})

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of the present call."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """The number of scheduler steps of the present call, of all views."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has stopped the present call, by `pipeline._interrupt = True`."""
        return self._interrupt

    @property
    def signal_shape(self) -> tuple[int, ...]:
        """The shape of a signal, without the batch."""
        return signal_shape(self.unet)

    def _precision(self) -> torch.dtype:
        """Signals and observations are kept in fp32 (or fp64), whatever the network's precision."""
        return torch.float64 if self.unet.dtype == torch.float64 else torch.float32

    def _check_guidance(self) -> None:
        finite = is_number(self._guidance_scale)
        require(finite, "guidance_scale", self._guidance_scale, "a number")
        accepted = "1 for a network that was not trained without context (`null_context`)"
        unguided = self._guidance_scale == 1.0
        require(unguided or self.config["null_context"], "guidance_scale", self._guidance_scale, accepted)
        accepted = "1 for a regression, which estimates signals at once"
        require(unguided or not self.config["regression"], "guidance_scale", self._guidance_scale, accepted)

    @torch.no_grad()
    def render(self, signals: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        """Observes signals from any views; the network is not called.

        Args:
            signals: `(batch, *signal_shape)`.
            parameters: `(batch, views, ...)`.

        Returns:
            `(batch, views, ...)` observations.

        Raises:
            ValueError: the parameters do not fit the signals or the forward model, or there are no such signals.
        """
        device, shape = self._execution_device, self.signal_shape
        signals = as_real("signals", signals)
        accepted = f"(batch, {', '.join(map(str, shape))})"
        require(tuple(signals.shape[1:]) == shape, "signals", tuple(signals.shape), accepted)
        require(bool(signals.isfinite().all()), "signals", "NaN or infinite numbers", "finite")
        signals = signals.to(device, torch.promote_types(signals.dtype, self._precision()))
        views = checked_parameters(self.forward_model, parameters, "parameters", len(signals), device)
        return observe(signals, self.forward_model, views)

    def _warn_of_views(self, given: int, chunks: list[list[int]], guided: bool) -> None:
        """Warns of more views at once than the network was trained with."""
        joined = sum(map(len, chunks)) if guided else len(chunks) - 1
        for name, asked in (("max_context_views", given + joined), ("num_targets", max(map(len, chunks)))):
            trained: Any = self.config[name]
            if trained is not None and asked > trained:
                what = "a context of" if name == "max_context_views" else "denoising together"
                warnings.warn(
                    f"this network was trained for {what} at most {trained} views (`{name}`) and is asked for {asked}",
                    stacklevel=4,  # past `torch.no_grad`
                )

    def _check_numbers(self, sampling: str, output_type: str, whole: dict[str, int]) -> None:
        for name, value in whole.items():
            require(is_whole(value), name, value, "an integer >= 1")
        require(sampling in SAMPLING, "sampling", sampling, f"one of {list(SAMPLING)}")
        require(output_type in OUTPUT_TYPES, "output_type", output_type, f"one of {list(OUTPUT_TYPES)}")
        if output_type == "pil":
            shape = self.signal_shape
            good = len(shape) == 3 and shape[0] in (1, 3)
            require(good, "output_type", output_type, f"'pt' or 'np' for signals that are no images, of shape {shape}")
            accepted = "'pt' or 'np' until black and white are known, `from_pretrained(REPO, signal_range=[0.0, 1.0])`"
            require(self.config["signal_range"] is not None, "output_type", output_type, accepted)

    def _target_parameters(self, given: Any, batch: int, num_samples: int, num_views: int, generator: Any) -> Any:
        """Returns `(batch * num_samples, views, ...)` parameters, drawn by the forward model unless given."""
        if given is not None:
            given = checked_parameters(self.forward_model, given, "target_parameters", batch, self._execution_device)
            return map_parameters(lambda value: value.repeat_interleave(num_samples, 0), given)
        n = batch * num_samples
        if isinstance(generator, list):
            each = [self.forward_model.sample_parameters(num_views, g) for g in generator]
            drawn = map_parameters(lambda *values: torch.stack(values), *each)
        else:
            drawn = self.forward_model.sample_parameters(n * num_views, generator)
            drawn = map_parameters(lambda value: value.unflatten(0, (n, num_views)), drawn)
        return checked_parameters(self.forward_model, drawn, "target_parameters", n, self._execution_device)

    @torch.no_grad()
    def __call__(
        self,
        observations: torch.Tensor | np.ndarray | None = None,
        parameters: Parameters | None = None,
        target_parameters: Parameters | None = None,
        num_views: int = 3,
        sampling: Literal["autoregressive", "joint", "single"] = "autoregressive",
        num_inference_steps: int = 50,
        eta: float = 0.0,
        guidance_scale: float = 1.0,
        context_noise: float | None = None,
        num_samples: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: Literal["pt", "np", "pil"] = "pt",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 - as in Diffusers, never changed
    ) -> ForwardModelPipelineOutput | tuple:
        r"""Draws signals.

        Args:
            observations: `(batch, views, ...)` the context, any number of views; `None` for none.
            parameters: `(batch, views, ...)` of these views: a tensor, or a dict of them.
            target_parameters: `(batch, views, ...)` of the views to denoise, by default drawn by the forward model.
            num_views: how many to draw. Few leave the signal too certain.
            sampling: `"autoregressive"`, `"joint"`, or `"single"`: the first view alone is denoised, the others only
                rendered.
            num_inference_steps: scheduler steps, of each view when autoregressive; few make too little variance.
            eta: DDIM's eta, for schedulers that take it; 0 is deterministic given the latents.
            guidance_scale: w of u + w (c - u), where c and u are the denoised observations with and without context;
                1 turns it off, as it must where no view has a context. The returned signal is then that of a further
                call, whose context has the guided views.
            context_noise: standard deviation of the noise that sampled views get when they join the context, by
                default the pipeline's.
            num_samples: signals for each context; those of one context stand together in the result.
            generator: one, or one for each of the `batch * num_samples` signals.
            latents: `(batch * num_samples, views, ...)` standard normal starts of the observations, instead of drawing
                them.
            output_type: `"pt"`, `"np"`, or `"pil"`: signals as images.
            return_dict: return `ForwardModelPipelineOutput` instead of a tuple of its entries.
            callback_on_step_end: called as `(pipeline, step, timestep, {"latents": ...})` after every step, steps
                counted over all views; the latents `(batch, views, ...)` that it returns are used.
                `pipeline._interrupt = True` stops, and the signals of that moment are returned.
            callback_on_step_end_tensor_inputs: names passed to it, of `"latents"` and `"signals"`.

        Returns:
            `ForwardModelPipelineOutput`: the observations are the forward model's of the signals, exactly.

        Raises:
            ValueError: an argument is wrong, or contradicts another; raised before the network is called.
        """
        whole = {"num_views": num_views, "num_samples": num_samples, "num_inference_steps": num_inference_steps}
        self._check_numbers(sampling, output_type, whole)
        check_scheduler(self.scheduler)
        self._guidance_scale, self._interrupt = guidance_scale, False
        self._network_dtype = self.unet.dtype  # asked once: it takes a walk over all modules
        self._check_guidance()
        if context_noise is None:
            context_noise = float(self.config["context_noise"])
        _check_noise(context_noise)
        offered = self._callback_tensor_inputs
        names = callback_names(callback_on_step_end, callback_on_step_end_tensor_inputs, offered)
        context: Any = None
        batch, views = 1, 0
        if observations is not None:
            observations = as_real("observations", observations).to(self._execution_device, self._precision())
            known = checked_context(self.forward_model, observations, parameters, self.signal_shape)
            batch, views = batch_and_views(known)
            context = lift_views(self.unet, self.forward_model, observations, known).repeated(num_samples)
        else:
            require(parameters is None, "parameters", type(parameters).__name__, "left out without `observations`")
            if target_parameters is not None:
                given = map_parameters(partial(as_real, "target_parameters"), target_parameters)
                batch, _ = batch_and_views(given)
        n = batch * num_samples
        check_generator(generator, n)
        targets = self._target_parameters(target_parameters, batch, num_samples, num_views, generator)
        shape = (*batch_and_views(targets), *seen_shape(self.forward_model, targets, self.signal_shape))
        if latents is None:
            latents = randn_tensor(shape, generator, self._execution_device, self._precision())
        latents = as_real("latents", latents)
        require(tuple(latents.shape) == shape, "latents", tuple(latents.shape), f"of shape {shape}")
        require(bool(latents.isfinite().all()), "latents", "NaN or infinite numbers", "finite")
        latents = latents.to(self._execution_device, self._precision())

        arguments = step_arguments(self.scheduler, eta, generator)
        every = list(range(shape[1]))
        chunks = {"autoregressive": [[v] for v in every], "joint": [every], "single": [[0]]}[sampling]
        if self.config["regression"]:
            chunks, num_inference_steps = [[0]], 1
        some = guidance_scale == 1.0 or observations is not None or len(chunks) > 1
        require(some, "guidance_scale", guidance_scale, "1 without `observations` or further views for a context")
        self._warn_of_views(views, chunks, guidance_scale != 1.0)
        self._num_timesteps, step = 0, 0
        signals: Any = None
        with self.progress_bar(total=num_inference_steps * len(chunks)) as bar:  # pyright: ignore[reportCallIssue]

            def on_step(t: Any, sample: torch.Tensor, signals: torch.Tensor) -> torch.Tensor:
                nonlocal step
                if callback_on_step_end is not None:
                    now = {"latents": sample, "signals": signals}
                    given = callback_on_step_end(self, step, t, {name: now[name] for name in names})
                    sample = given.get("latents", sample)
                step += 1
                bar.update()
                return sample

            for chunk in chunks:
                where = map_parameters(lambda value, chunk=chunk: value[:, chunk], targets)
                start = latents[:, chunk]
                if self.config["regression"]:
                    signals = self._regressed(start, where, context)
                    on_step(None, start, signals)
                    break
                timesteps = set_timesteps(self.scheduler, num_inference_steps, self._execution_device)
                self._num_timesteps = len(timesteps) * len(chunks)
                bar.total = self._num_timesteps
                sample, signals, last = self._denoised(start, where, context, timesteps, arguments, on_step)
                if self._interrupt:
                    break
                guided = self._guidance_scale != 1.0
                if guided or chunk is not chunks[-1]:
                    context = self._joined(context, sample, where, context_noise, generator)
                if guided and chunk is chunks[-1]:
                    signals = self._signals(*last, context)
        seen = observe(signals, self.forward_model, targets)
        self.maybe_free_model_hooks()
        result = (self._output(signals, output_type, True), self._output(seen, output_type), targets)
        return ForwardModelPipelineOutput(*result) if return_dict else result

    def _denoised(
        self,
        start: torch.Tensor,
        parameters: Any,
        context: LiftedViews | None,
        timesteps: torch.Tensor,
        arguments: dict[str, Any],
        on_step: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[LiftedViews, Any]]:
        """Denoises views through one signal; returns them, the signal, and what the network read and when at last."""
        scale = float(self.config["observation_scale"])
        sample = start * getattr(self.scheduler, "init_noise_sigma", 1.0)
        signals: Any = None
        last: Any = None
        for t in timesteps:
            self._check_guidance()
            noisy = lift_views(self.unet, self.forward_model, scaled_input(self.scheduler, sample, t), parameters)
            last = noisy, t
            weight = self._guidance_scale
            if weight == 1.0:
                signals = self._signals(noisy, t, context)
                clean = scale * observe(signals, self.forward_model, parameters)
            else:
                signals, null = self._signals(noisy, t, context, with_null=True).chunk(2)
                clean, without = (scale * observe(s, self.forward_model, parameters) for s in (signals, null))
                clean = without + weight * (clean - without)
            sample = self.scheduler.step(clean, t, sample, **arguments, return_dict=False)[0].to(start.dtype)
            sample = on_step(t, sample, signals)
            if self._interrupt:
                break
        return sample, signals, last

    def _signals(
        self, noisy: LiftedViews, t: Any, context: LiftedViews | None, with_null: bool = False
    ) -> torch.Tensor:
        """Calls the network, also without context, behind, with `with_null`."""
        inputs = lifted_input(noisy, context)
        if with_null:
            inputs = torch.cat([inputs, lifted_input(noisy)])
        channels = self.unet.config.get("in_channels", inputs.shape[1])
        accepted = f"a network of {inputs.shape[1]} input channels, as `lifted_input` makes them"
        require(channels == inputs.shape[1], "unet", channels, accepted)
        return self.unet(inputs.to(self._network_dtype), t, return_dict=False)[0].to(inputs.dtype)

    def _regressed(self, like: torch.Tensor, parameters: Any, context: LiftedViews | None) -> torch.Tensor:
        """Returns the signals that a network gives which was trained without noisy observations."""
        nothing = lift_views(self.unet, self.forward_model, torch.zeros_like(like), parameters).nothing()
        return self._signals(nothing, self.scheduler.config.num_train_timesteps - 1, context)

    def _joined(
        self, context: LiftedViews | None, sample: torch.Tensor, parameters: Any, noise: float, generator: Any
    ) -> LiftedViews:
        """Returns the context with sampled views in it."""
        seen = sample / float(self.config["observation_scale"])
        if noise:
            seen = seen + noise * randn_tensor(tuple(seen.shape), generator, seen.device, seen.dtype)
        flags = torch.ones(seen.shape[:2], device=seen.device, dtype=seen.dtype)
        lifted = lift_views(self.unet, self.forward_model, seen, parameters, sampled=flags)
        return lifted if context is None else context + lifted

    def _output(self, values: torch.Tensor, output_type: str, signal: bool = False) -> Any:
        if output_type == "pil" and signal:
            return as_images(values, self.config["signal_range"])
        return values.cpu().float().numpy() if output_type == "np" else values
