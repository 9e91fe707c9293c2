"""How DomainStudio handles models without text."""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from diffusers_ext.generation.pipeline import ImageGenerationPipeline
from diffusers_ext.training.pretrained import converted, load_denoiser
from diffusers_ext.training.recipe import Context, Modules

__all__ = ["UnconditionalModel"]


class UnconditionalModel:
    """An image denoiser, and a frozen copy of it as the source.

    Args:
        name: Hub repo or folder.

    Attributes:
        unet: the network to adapt.
        scheduler: the scheduler that is saved.
        training_scheduler: the one that noises, with `add_noise`.
        frozen: further modules by name.
        vae: the VAE, or `None`.
        image_scale: what images or latents are multiplied by.
        learned_variance: whether the network's output has the variance behind the prediction.

    Raises:
        ValueError: it cannot be loaded, is class-conditional, or was tuned for a few timesteps.
    """

    def __init__(self, name: str) -> None:
        self.denoiser = denoiser = load_denoiser(name, learned_variance=True)
        if denoiser.num_classes:
            raise ValueError(
                f"`pretrained_model_name_or_path` must be a model without classes, got {name!r} with "
                f"{denoiser.num_classes}."
            )
        if denoiser.tuned_timesteps:
            raise ValueError(
                f"`pretrained_model_name_or_path` must be a model that is good at every timestep, got {name!r}, tuned "
                f"for {denoiser.tuned_timesteps} only: adapt the model that it was tuned from, and tune after that."
            )
        self.unet, self.vae, self.image_scale = denoiser.unet, denoiser.vae, denoiser.image_scale
        scheduler, channels = denoiser.scheduler, self.unet.config.in_channels
        self.learned_variance = self.unet.config.out_channels != channels
        kept = self.learned_variance or isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
        self.scheduler: Any = scheduler if kept else converted(DDIMScheduler, scheduler)
        # Other schedulers noise at the grid of their last chain.
        flow = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
        self.training_scheduler: Any = scheduler if flow else converted(DDPMScheduler, scheduler)
        self.frozen: dict[str, Any] = {} if self.vae is None else {"vae": self.vae}

    def add_source(self) -> None:
        """Keeps a copy of the network as it is now."""
        self.frozen["source"] = copy.deepcopy(self.unet)

    def source(self, ctx: Context[Any], noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Returns the source's prediction, without gradient."""
        unet = ctx.modules.frozen["source"]
        with torch.no_grad():
            return unet(noisy.to(unet.dtype), t, return_dict=False)[0][:, : noisy.shape[1]].float()

    def pipeline(self, modules: Modules) -> ImageGenerationPipeline:
        """Returns the pipeline of the adapted network."""
        return ImageGenerationPipeline(
            modules.trainable, modules.scheduler, modules.frozen.get("vae"), image_scale=self.image_scale
        )
