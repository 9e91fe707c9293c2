"""Images from a UNet and any Diffusers scheduler, in pixel or latent space, with or without classes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMParallelScheduler,
    DDPMScheduler,
    ImagePipelineOutput,
    UnCLIPScheduler,
    UNet2DModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from diffusers_ext.hub.loading import SafePipeline

from .latents import decoded
from .stepping import callback_names, check_generator, scaled_input, set_timesteps, step_arguments

__all__ = ["ImageGenerationPipeline"]

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
LEARNING = (DDPMScheduler, DDPMParallelScheduler, UnCLIPScheduler)  # take a learned variance


class ImageGenerationPipeline(SafePipeline):
    """Generates images without text: what the training scripts of this package save.

    Args:
        unet: a `UNet2DModel`; class-conditional if it has class embeddings.
        scheduler: any Diffusers scheduler. Flow-matching schedulers give the network 1000 times the noise level as
            its timestep, as they do everywhere in Diffusers.
        vae: `AutoencoderKL` if `unet` works on latents.
        image_scale: what pixels (or scaled latents) were multiplied by in training; samples are divided by it.
        null_class_label: the label that stands for "no class", needed for guidance.
        tuned_timesteps: the timesteps, without `eta`, that the UNet was tuned for and is good at. As many steps become
            the default, and a call at other timesteps gets a warning.

    Example:
        >>> import torch
        >>> from diffusers import DDIMScheduler, UNet2DModel
        >>> from diffusers_ext import ImageGenerationPipeline
        >>> unet = UNet2DModel(
        ...     sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=2,
        ...     down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        ... )
        >>> pipeline = ImageGenerationPipeline(unet, DDIMScheduler())
        >>> pipeline.set_progress_bar_config(disable=True)
        >>> images = pipeline(2, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images
        >>> len(images), images[0].size, images[0].mode
        (2, (8, 8), 'L')
    """

    __module__ = "diffusers_ext"

    # Diffusers annotates `config` as a dict and leaves out of `SchedulerMixin` what all schedulers share.
    unet: Any
    scheduler: Any
    vae: Any

    model_cpu_offload_seq = "unet->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None = None,
        image_scale: float = 1.0,
        null_class_label: int | None = None,
        tuned_timesteps: list[int] | list[float] | None = None,
    ) -> None:
        super().__init__()
        if not image_scale > 0:
            raise ValueError(f"`image_scale` must be a number > 0, got {image_scale!r}.")
        if tuned_timesteps is not None and not (isinstance(tuned_timesteps, list) and tuned_timesteps):
            raise ValueError(f"`tuned_timesteps` must be a list of timesteps or left out, got {tuned_timesteps!r}.")
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)
        self.register_to_config(
            image_scale=image_scale,
            null_class_label=null_class_label,
            tuned_timesteps=tuned_timesteps,
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)
        self._guidance_scale, self._guidance_rescale = 1.0, 0.0
        self._num_timesteps, self._interrupt = 0, False

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of the present call."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """The number of scheduler steps of the present call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has stopped the present call, by `pipeline._interrupt = True`."""
        return self._interrupt

    @property
    def default_inference_steps(self) -> int:
        """How many steps a call takes that says nothing of them: those that the model was tuned for, or else 50."""
        tuned: Any = self.config["tuned_timesteps"]
        return 50 if tuned is None else len(tuned)

    def _latent_shape(self) -> tuple[int, int, int]:
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.unet.config.in_channels, height, width

    def check_inputs(
        self,
        batch_size: int | None,
        class_labels: torch.Tensor | None,
        num_inference_steps: int,
        guidance_scale: float,
        guidance_rescale: float,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> int:
        """Checks the arguments of a call and returns the batch size.

        Raises:
            ValueError: an argument is wrong or contradicts another; the message names it.
        """
        classes = getattr(self.unet.config, "num_class_embeds", None)
        conditional = getattr(self.unet, "class_embedding", None) is not None
        if conditional and class_labels is None:
            raise ValueError("`class_labels` must be given: this model is class-conditional.")
        if not conditional and class_labels is not None:
            raise ValueError(
                f"`class_labels` must be left out: this model has no classes, got {class_labels.tolist()}."
            )
        if class_labels is not None:
            if class_labels.ndim != 1 or class_labels.is_floating_point() or len(class_labels) == 0:
                raise ValueError(
                    "`class_labels` must be an int, a list of ints or a 1-D integer tensor, got "
                    f"{class_labels.dtype} of shape {tuple(class_labels.shape)}."
                )
            if classes is not None and not (int(class_labels.min()) >= 0 and int(class_labels.max()) < classes):
                raise ValueError(f"`class_labels` must lie in 0..{classes - 1}, got {class_labels.tolist()}.")
            if batch_size not in (None, len(class_labels)) and len(class_labels) > 1:
                raise ValueError(
                    f"`batch_size` must be left out or equal the {len(class_labels)} `class_labels`, got {batch_size}."
                )
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
            raise ValueError(f"`batch_size` must be an integer >= 1, got {batch_size!r}.")
        if batch_size is None:
            given = class_labels if class_labels is not None else latents
            batch_size = 1 if given is None else len(given)
        if not isinstance(num_inference_steps, int) or num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` must be an integer >= 1, got {num_inference_steps!r}.")
        self._check_guidance(guidance_scale, class_labels)
        if not 0 <= guidance_rescale <= 1:
            raise ValueError(f"`guidance_rescale` must be a number in [0, 1], got {guidance_rescale!r}.")
        check_generator(generator, batch_size)
        shape = (batch_size, *self._latent_shape())
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"`latents` must have the shape {shape}, got {tuple(latents.shape)}.")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {list(OUTPUT_TYPES)}, got {output_type!r}.")
        callback_names(None, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        return batch_size

    def _check_guidance(self, scale: float, class_labels: torch.Tensor | None) -> None:
        if scale != 1.0 and (class_labels is None or self.config["null_class_label"] is None):
            raise ValueError(
                f"`guidance_scale` must be 1 for a model without classes or without a null label, got {scale!r}."
            )

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
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draws images; the result is deterministic given the initial latents unless scheduler or `eta` add noise.

        Args:
            batch_size: number of images, by default the number of `class_labels`, or 1.
            class_labels: one label for all images, or one per image, `(batch,)`.
            num_inference_steps: scheduler steps, by default those that the model was tuned for, or else 50.
            guidance_scale: w of classifier-free guidance, `null + w * (class - null)`; 1 turns it off.
            guidance_rescale: brings the guided prediction back towards the standard deviation of the unguided one,
                from 0 (off) to 1; guidance overexposes models of zero terminal SNR (arXiv 2305.08891, section 3.4).
            eta: DDIM's eta, for schedulers that take it; 0 is deterministic.
            sigmas: noise levels for schedulers that take them, instead of their own; flow-matching Euler gets the
                uniform grid `1, ..., 1/num_inference_steps` by default.
            generator: one generator, or one per image.
            latents: `(batch, channels, height, width)` standard normal start, instead of drawing it.
            output_type: `"pil"`; `"np"` `(batch, height, width, channels)` or `"pt"` `(batch, channels, height,
                width)` in `[0, 1]`; `"latent"`: the samples as the scheduler leaves them.
            return_dict: return `ImagePipelineOutput` instead of a tuple.
            callback_on_step_end: called as `(pipeline, step, timestep, {"latents": ...})` after every step; the
                latents it returns are used. It may set `pipeline._guidance_scale` for the steps that follow, or
                `pipeline._interrupt = True`: the samples are then returned as they are.
            callback_on_step_end_tensor_inputs: names passed to it.

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple of them.

        Raises:
            ValueError: an argument is wrong or contradicts another.
        """
        tuned: Any = self.config["tuned_timesteps"]
        if num_inference_steps is None:
            num_inference_steps = self.default_inference_steps
        callback_on_step_end_tensor_inputs = callback_names(
            callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs
        )
        labels = None
        if class_labels is not None:
            labels = torch.as_tensor([class_labels] if isinstance(class_labels, int) else class_labels)
        batch_size = self.check_inputs(
            batch_size,
            labels,
            num_inference_steps,
            guidance_scale,
            guidance_rescale,
            generator,
            latents,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        device, dtype = self._execution_device, self.unet.dtype
        self._guidance_scale, self._guidance_rescale, self._interrupt = guidance_scale, guidance_rescale, False
        labels = None if labels is None else labels.to(device).expand(batch_size)

        timesteps = set_timesteps(self.scheduler, num_inference_steps, device, sigmas)
        self._num_timesteps = len(timesteps)
        if tuned is not None and (eta or timesteps.tolist() != list(tuned)):
            warnings.warn(
                f"this model was tuned for num_inference_steps={len(tuned)} at the timesteps {list(tuned)} without "
                f"`eta` and is worse at others; got {timesteps.tolist()} and eta={eta}.",
                stacklevel=3,  # past `torch.no_grad`
            )
        if latents is None:
            latents = randn_tensor(
                (batch_size, *self._latent_shape()), generator=generator, device=device, dtype=dtype
            )
        sample: torch.Tensor = latents.to(device, dtype) * getattr(self.scheduler, "init_noise_sigma", 1.0)
        arguments = step_arguments(self.scheduler, eta, generator)

        with self.progress_bar(total=len(timesteps)) as progress_bar:  # pyright: ignore[reportCallIssue]
            for i, t in enumerate(timesteps):
                if self._interrupt:
                    break
                self._check_guidance(self._guidance_scale, labels)
                prediction = self._predict(sample, t, labels, self._guidance_scale)
                sample = self.scheduler.step(prediction, t, sample, **arguments, return_dict=False)[0]
                sample = sample.to(dtype)
                if callback_on_step_end is not None:
                    given = {name: sample for name in callback_on_step_end_tensor_inputs}
                    sample = callback_on_step_end(self, i, t, given).get("latents", sample)
                progress_bar.update()

        images: Any = sample if output_type == "latent" else self._decode(sample, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _predict(
        self, sample: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None, guidance_scale: float
    ) -> torch.Tensor:
        sample = scaled_input(self.scheduler, sample, t)
        channels = sample.shape[1]
        if labels is None or guidance_scale == 1.0:
            output = self.unet(sample, t, class_labels=labels, return_dict=False)[0]
            prediction = output[:, :channels]
        else:
            prediction, output = self._guided(sample, t, labels, guidance_scale)
        # A learned variance stands behind the prediction; few schedulers know what to do with it.
        learned = self.scheduler.config.get("variance_type") in ("learned", "learned_range")
        if learned and output.shape[1] > channels and isinstance(self.scheduler, LEARNING):
            return torch.cat([prediction, output[:, channels:]], dim=1)
        return prediction

    def _guided(
        self, sample: torch.Tensor, t: torch.Tensor, labels: torch.Tensor, guidance_scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the guided prediction, and all of the output for the class."""
        channels = sample.shape[1]
        both = torch.cat([torch.full_like(labels, self.config["null_class_label"]), labels])
        null, output = self.unet(torch.cat([sample, sample]), t, class_labels=both, return_dict=False)[0].chunk(2)
        null, conditional = null[:, :channels], output[:, :channels]
        guided = null + guidance_scale * (conditional - null)
        if self._guidance_rescale == 0:
            return guided, output
        from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

        return rescale_noise_cfg(guided, conditional, self._guidance_rescale), output

    def _decode(self, sample: torch.Tensor, output_type: str) -> Any:
        images = sample / self.config["image_scale"]
        if self.vae is not None:
            images = decoded(self.vae, images)
        return self.image_processor.postprocess(images.float(), output_type=output_type)
