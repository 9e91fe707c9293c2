"""Images from a model that was trained on noisy ones: EDM's own sampler, and stopping at the level of the noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import EDMEulerScheduler, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

from diffusers_ext.generation.pipeline import ImageGenerationPipeline
from diffusers_ext.generation.stepping import callback_names, scaled_input, set_timesteps
from diffusers_ext.training.objectives import EDM, FlowMatching, Objective
from diffusers_ext.training.pipeline_schedule import pipeline_objective
from diffusers_ext.training.pretrained import EDM_KINDS, edm_objective

from .levels import Schedule
from .sampling import edm_levels, heun_step

__all__ = ["AmbientPipeline"]


class AmbientPipeline(ImageGenerationPipeline):
    """Generates images as `ImageGenerationPipeline` does, with two things more.

    Models with an `EDMEulerScheduler` are sampled by EDM's second-order method on that scheduler's levels, which
    Diffusers does not have (`ImageGenerationPipeline` takes Euler's steps with the same model). And sampling may stop
    early, at the level of the noise in the training data, below which a model of noisy data alone is unreliable; what
    is returned then is the mean of what the image may be.

    Args:
        unet: a `UNet2DModel`; class-conditional if it has class embeddings.
        scheduler: any Diffusers scheduler.
        vae: `AutoencoderKL` if `unet` works on latents.
        image_scale: what pixels (or scaled latents) were multiplied by in training; samples are divided by it.
        null_class_label: the label that stands for "no class", needed for guidance.
        tuned_timesteps: see `ImageGenerationPipeline`.

    Example:
        >>> import torch
        >>> from diffusers import EDMEulerScheduler, UNet2DModel
        >>> from diffusers_ext import AmbientPipeline
        >>> unet = UNet2DModel(
        ...     sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=2,
        ...     down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        ... )
        >>> pipeline = AmbientPipeline(unet, EDMEulerScheduler())
        >>> pipeline.set_progress_bar_config(disable=True)
        >>> generator = torch.Generator().manual_seed(0)
        >>> images = pipeline(2, num_inference_steps=4, stop_at_sigma=0.2, generator=generator).images
        >>> len(images), images[0].size
        (2, (8, 8))
    """

    __module__ = "diffusers_ext"

    @property
    def default_inference_steps(self) -> int:
        """18 for EDM's sampler, otherwise those of `ImageGenerationPipeline`."""
        return 18 if isinstance(self.scheduler, EDMEulerScheduler) else super().default_inference_steps

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        class_labels: int | list[int] | torch.Tensor | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        eta: float = 0.0,
        sigmas: list[float] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 - as in Diffusers, never changed
        stop_at_sigma: float | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draws images, deterministically given the initial latents unless the scheduler or `eta` adds noise.

        Args:
            batch_size: number of images, by default the number of `class_labels`, or 1.
            class_labels: one label for all images, or one per image, `(batch,)`.
            num_inference_steps: steps, by default 18 of EDM's sampler, each of two network calls but the last.
            guidance_scale: w of classifier-free guidance, `null + w * (class - null)`; 1 turns it off.
            guidance_rescale: see `ImageGenerationPipeline`.
            eta: for schedulers that take it; EDM's sampler does not.
            sigmas: for schedulers that take them; EDM's sampler does not.
            generator: one generator, or one per image.
            latents: `(batch, channels, height, width)` standard normal start, instead of drawing it.
            output_type: `"pil"`, `"np"`, `"pt"` or `"latent"`, see `ImageGenerationPipeline`.
            return_dict: return `ImagePipelineOutput` instead of a tuple.
            callback_on_step_end: called as `(pipeline, step, timestep, {"latents": ...})` after every step; with EDM's
                sampler the timestep is the noise level at which the step began.
            callback_on_step_end_tensor_inputs: names passed to it.
            stop_at_sigma: end at this noise level, that of x_0 + sigma n in the units of the model (images in [-1, 1]
                times `image_scale`, or scaled latents), and return the mean of the clean image. EDM's sampler ends
                just there, other schedulers at the last of their levels that is not below.

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple of them.

        Raises:
            ValueError: an argument is wrong or contradicts another.
        """
        steps = self.default_inference_steps if num_inference_steps is None else num_inference_steps
        given = {
            "guidance_scale": guidance_scale,
            "guidance_rescale": guidance_rescale,
            "generator": generator,
            "latents": latents,
            "output_type": output_type,
            "callback_on_step_end_tensor_inputs": callback_names(
                callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs
            ),
        }
        labels = None
        if class_labels is not None:
            labels = torch.as_tensor([class_labels] if isinstance(class_labels, int) else class_labels)
        batch_size = self.check_inputs(batch_size, labels, steps, **given)
        further = {"eta": eta, "sigmas": sigmas}
        if isinstance(self.scheduler, EDMEulerScheduler):
            if eta or sigmas is not None:
                raise ValueError(f"`eta` and `sigmas` must be left out with EDM's sampler, got {eta} and {sigmas}.")
            sample = self._heun(batch_size, labels, steps, stop_at_sigma, callback_on_step_end, **given)
        elif stop_at_sigma is None:
            common: dict[str, Any] = {**given, **further, "callback_on_step_end": callback_on_step_end}
            return super().__call__(batch_size, class_labels, num_inference_steps, return_dict=return_dict, **common)
        else:
            sample = self._truncated(batch_size, labels, steps, stop_at_sigma, callback_on_step_end, given, further)
        images: Any = sample if output_type == "latent" else self._decode(sample, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _heun(
        self,
        batch_size: int,
        labels: torch.Tensor | None,
        steps: int,
        stop: float | None,
        callback: Callable[[Any, int, Any, dict], dict] | None,
        *,
        generator: Any,
        latents: torch.Tensor | None,
        callback_on_step_end_tensor_inputs: list[str],
        guidance_scale: float,
        guidance_rescale: float,
        output_type: str,
    ) -> torch.Tensor:
        """Samples by EDM's method; the sample is kept in float32 whatever the network's precision."""
        config: Any = self.scheduler.config
        levels = edm_levels(steps, config.sigma_min, config.sigma_max, config.rho, stop).tolist()
        device, dtype = self._execution_device, self.unet.dtype
        self._guidance_scale, self._guidance_rescale, self._interrupt = guidance_scale, guidance_rescale, False
        self._num_timesteps = len(levels) - 1
        labels = None if labels is None else labels.to(device).expand(batch_size)
        if latents is None:
            shape = (batch_size, *self._latent_shape())
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        x = latents.to(device, torch.float32) * levels[0]
        objective = training_objective(self.scheduler)

        def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
            t = torch.full((batch_size,), sigma, device=device)
            noisy, _ = objective.make(x, torch.zeros_like(x), t)
            times = objective.model_timesteps(t)
            if labels is None or self._guidance_scale == 1.0:
                output = self.unet(noisy.to(dtype), times, class_labels=labels, return_dict=False)[0]
            else:
                # Called with both halves of its batch, so one timestep stands for all.
                output, _ = self._guided(noisy.to(dtype), times[0], labels, self._guidance_scale)
            return objective.predicted_sample(output, noisy, t)

        with self.progress_bar(total=len(levels) - 1) as progress_bar:  # pyright: ignore[reportCallIssue]
            for i, (sigma, following) in enumerate(zip(levels, levels[1:], strict=False)):
                if self._interrupt:
                    return x
                self._check_guidance(self._guidance_scale, labels)
                x = heun_step(denoise, x, sigma, following)
                if callback is not None:
                    offered = {name: x for name in callback_on_step_end_tensor_inputs}
                    x = callback(self, i, sigma, offered).get("latents", x)
                progress_bar.update()
        return (x if stop is None else denoise(x, stop)).to(dtype)

    def _truncated(
        self,
        batch_size: int,
        labels: torch.Tensor | None,
        steps: int,
        stop: float,
        callback: Callable[[Any, int, Any, dict], dict] | None,
        given: dict[str, Any],
        further: dict[str, Any],
    ) -> torch.Tensor:
        """Samples by the scheduler's steps down to the last level that is not below `stop`."""
        times = set_timesteps(self.scheduler, steps, self._execution_device, further["sigmas"])
        objective, network_times = training_objective(self.scheduler), times.cpu()
        t = objective_timesteps(objective, network_times)
        levels = Schedule(objective).sigma(t)
        reached = int((levels >= stop).sum()) - 1
        if not stop > 0 or reached < 1:
            second = float(levels[1]) if len(levels) > 1 else 0.0
            raise ValueError(
                f"`stop_at_sigma` must lie between 0 and the second level of these steps, {second:.4g}, got {stop!r}."
            )
        stopped = False

        def stopping(pipeline: Any, i: int, t: Any, tensors: dict) -> dict:
            nonlocal stopped
            found = tensors if callback is None else callback(pipeline, i, t, tensors)
            if i == reached - 1 and not self._interrupt:
                stopped = self._interrupt = True
            return found

        common: dict[str, Any] = {**given, **further, "output_type": "latent", "callback_on_step_end": stopping}
        sample = super().__call__(batch_size, labels, steps, return_dict=False, **common)[0]
        if not stopped:  # the caller's callback ended it before
            return sample
        labels = None if labels is None else labels.to(sample.device).expand(len(sample))
        at = times[reached]
        prediction = self._predict(sample, at, labels, self._guidance_scale)[:, : sample.shape[1]]
        noisy = scaled_input(self.scheduler, sample, at)
        each = t[reached].to(sample.device).expand(len(sample))
        return objective.predicted_sample(prediction, noisy, each).to(sample.dtype)


def training_objective(scheduler: Any) -> Objective:
    """Returns the objective of a scheduler's models."""
    if isinstance(scheduler, EDM_KINDS):
        return edm_objective(scheduler)
    return pipeline_objective(scheduler)


def objective_timesteps(objective: Objective, times: torch.Tensor) -> torch.Tensor:
    """Returns the timesteps of an objective for those that the network is given."""
    if isinstance(objective, EDM):
        return (4 * times).exp()
    if isinstance(objective, FlowMatching):
        return times / objective.num_train_timesteps
    return times.round().long()
