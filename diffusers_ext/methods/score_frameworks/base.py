"""What the pipelines of anomaly maps and of reconstruction share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import numpy_to_pil

from diffusers_ext.generation.stepping import callback_names, check_generator
from diffusers_ext.hub.loading import SafePipeline
from diffusers_ext.training.config import is_number, is_whole, require

from .sampling import Estimator

__all__ = ["DenoiserPipeline"]

OUTPUT_TYPES = ("pil", "np", "pt")


class DenoiserPipeline(SafePipeline):
    """A pipeline of an unconditional denoiser of pixels, trained in any framework."""

    unet: Any
    scheduler: Any

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents"]

    def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin, image_scale: float = 1.0) -> None:
        super().__init__()
        require(is_number(image_scale) and image_scale > 0, "image_scale", image_scale, "a number > 0")
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(image_scale=image_scale)
        self._num_timesteps, self._interrupt = 0, False

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """Makes a pipeline of another's parts, as Diffusers does.

        Raises:
            ValueError: the other's network is conditional, or one of latents.
        """
        unet, vae = kwargs.get("unet", getattr(pipeline, "unet", None)), getattr(pipeline, "vae", None)
        if not isinstance(unet, UNet2DModel) or vae is not None:
            found = f"{type(unet).__name__}{'' if vae is None else ' of latents'}"
            raise ValueError(
                f"`pipeline` must have an unconditional UNet2DModel of pixels for {cls.__name__}, got "
                f"{type(pipeline).__name__} with {found}."
            )
        return super().from_pipe(pipeline, **kwargs)

    @property
    def num_timesteps(self) -> int:
        """The number of steps of the present call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has stopped the present call, by `pipeline._interrupt = True`."""
        return self._interrupt

    def _check_counts(self, num_inference_steps: int, num_samples: int) -> None:
        """Checks numbers of steps and samples.

        Raises:
            ValueError: one is wrong; the message names it.
        """
        for name, value in (("num_inference_steps", num_inference_steps), ("num_samples", num_samples)):
            require(is_whole(value), name, value, "an integer >= 1")

    def _check_call(
        self, output_type: str, callback: Callable[..., Any] | None, callback_names_given: list[str]
    ) -> list[str]:
        """Checks what both pipelines are asked, and returns the names of the callback's tensors.

        Raises:
            ValueError: an argument is wrong; the message names it.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {list(OUTPUT_TYPES)}, got {output_type!r}.")
        return callback_names(callback, callback_names_given, self._callback_tensor_inputs)

    def _check_images(self, shape: tuple[int, ...], name: str, generator: Any) -> None:
        """Checks the images' shape, and a generator for each of them.

        Raises:
            ValueError: the network does not take them, or the generators are of another number.
        """
        check_generator(generator, shape[0])
        config = self.unet.config
        divisor = 2 ** (len(config.get("block_out_channels", (0,))) - 1)
        if shape[1] != config.in_channels or any(side % divisor for side in shape[2:]):
            raise ValueError(
                f"`{name}` must be of images of {config.in_channels} channels and of sides that {divisor} divides, "
                f"got the shape {tuple(shape)}."
            )

    def _estimator(self) -> Estimator:
        self._interrupt = False
        return Estimator(self.unet, self.scheduler)

    def _to_network(self, images: torch.Tensor) -> torch.Tensor:
        """Brings images from [0, 1] to the network's range."""
        return (2 * images - 1) * self.config["image_scale"]

    def _to_images(self, x: torch.Tensor) -> torch.Tensor:
        return (x / self.config["image_scale"] + 1) / 2


def as_output(images: torch.Tensor, output_type: str) -> Any:
    """Returns images as `"pil"`, which alone are cut to [0, 1], `"np"` with the channels last, or `"pt"`."""
    if output_type == "pt":
        return images
    arrays = images.float().cpu().movedim(-3, -1).numpy()
    return numpy_to_pil(arrays.clip(0, 1)) if output_type == "pil" else arrays
