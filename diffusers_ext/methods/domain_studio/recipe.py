"""Adapting a pretrained image model to a domain of about ten images without losing its diversity."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image

from diffusers_ext.generation.latents import decoded, latent_factor, latent_moments, scaled_latents
from diffusers_ext.hub.card import RepoCard
from diffusers_ext.training.config import require
from diffusers_ext.training.images import image_dataset
from diffusers_ext.training.objectives import EpsX0V, FlowMatching
from diffusers_ext.training.pretrained import check_image_size, check_inference_steps
from diffusers_ext.training.recipe import Context, Modules, Recipe, StepOutput
from diffusers_ext.training.timesteps import UniformTimesteps

from .arguments import DomainStudioConfig
from .unconditional import UnconditionalModel
from .variance import LearnedVariance

__all__ = ["DomainStudioRecipe"]


class DomainStudioRecipe(Recipe[DomainStudioConfig]):
    """DomainStudio (arXiv 2306.14153): ties the distances between adapted samples to those of the frozen source.

    The source sees the same noisy images at the same timesteps. Its dropout is off, that of the network in training
    on. `DomainStudioTextRecipe` does the same for text-to-image pipelines.

    Example:
        >>> from diffusers_ext import DomainStudioConfig, DomainStudioRecipe, Trainer
        >>> config = DomainStudioConfig(
        ...     pretrained_model_name_or_path="my/ddpm", train_data_dir="ten-sketches", max_train_steps=1000
        ... )
        >>> Trainer(config, DomainStudioRecipe(config)).train()  # doctest: +SKIP
    """

    Config = DomainStudioConfig

    # -- data and modules ------------------------------------------------------------------------------------------

    def dataset(self, ctx: Context[DomainStudioConfig]) -> Any:
        """Loads the model and the images."""
        config, name = self.config, str(self.config.pretrained_model_name_or_path)
        self.data = data = image_dataset(config, ctx.accelerator.is_main_process)
        require(
            len(data) >= 2, "train_data_dir", config.train_data_dir, f"a folder of at least 2 images, not {len(data)}"
        )
        self.model = UnconditionalModel(name)
        check_image_size(self.model.unet, self.model.vae, config.resolution, config.channels)
        return data

    def setup(self, ctx: Context[DomainStudioConfig]) -> Modules:
        """Hands over the network to adapt, with the source where a loss needs it."""
        self.losses, model = self.config.make_loss(), self.model
        self._check_model()
        scheduler = model.training_scheduler
        length, flow = scheduler.config.num_train_timesteps, isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
        self.objective = FlowMatching(length) if flow else EpsX0V(scheduler)
        self.variance = LearnedVariance(scheduler) if model.learned_variance else None
        self.timesteps = UniformTimesteps(None if flow else length)
        if self.losses.pairs:
            model.add_source()
        return Modules(model.unet, model.scheduler, model.frozen)

    def _check_model(self) -> None:
        """Checks the arguments that depend on the model."""
        config, model = self.config, self.model
        config.check_timesteps(model.training_scheduler.config.num_train_timesteps)
        space = config.similarity_space
        require(space == "pixel" or model.vae is not None, "similarity_space", space, "'pixel' for a model of pixels")
        factor = 1 if space == "pixel" else latent_factor(model.vae)
        high = self.losses.weights["hf_pair_weight"] or self.losses.weights["hf_mse_weight"]
        accepted = "of even images, whose blocks of 2x2 give the high frequencies, or these without weight"
        require(not high or config.resolution // factor % 2 == 0, "resolution", config.resolution, accepted)
        if config.num_validation_images:
            check_inference_steps(model.scheduler, "validation_inference_steps", config.validation_inference_steps)

    # -- training --------------------------------------------------------------------------------------------------

    def encode(self, pixels: torch.Tensor, ctx: Context[DomainStudioConfig]) -> torch.Tensor:
        """Brings images into the space that is diffused."""
        vae = self.model.vae
        if vae is None:
            return pixels * self.model.image_scale
        if vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False):
            vae.float()  # its activations overflow in half precision
        mean, std = latent_moments(vae, pixels, vae.dtype)
        return scaled_latents(vae, mean + std * ctx.rng.randn_like(mean, ctx.ids, stream="latents"))

    def compared(self, sample: torch.Tensor) -> torch.Tensor:
        """Brings clean samples into the space where they are compared: images in [-1, 1], or latents."""
        sample = sample / self.model.image_scale
        if self.model.vae is None or self.config.similarity_space == "latent":
            return sample
        return decoded(self.model.vae, sample).float()

    def training_step(self, batch: dict[str, Any], ctx: Context[DomainStudioConfig]) -> StepOutput:
        """Denoises images of the domain, and compares the adapted with the source."""
        pixels = batch["pixel_values"]
        with torch.no_grad():
            x0 = self.encode(pixels, ctx)
            noise = ctx.rng.randn_like(x0, ctx.ids)
            t = self.timesteps(len(x0), ctx.rng, ctx.ids, x0.device)
            noisy, target = self.objective.make(x0, noise, t)
        output = ctx.model(noisy, self.objective.model_timesteps(t), return_dict=False)[0]
        prediction = output[:, : noisy.shape[1]]
        loss = self.objective.loss(prediction, target, t)
        logs = {"denoising": loss}
        if self.variance is not None:
            estimate = self.objective.predicted_sample(prediction, noisy, t)
            logs["vlb"] = self.variance.bound(x0, noisy, t, estimate, output[:, noisy.shape[1] :]).mean()
            loss = loss + logs["vlb"]
        for name, term in self._terms(prediction, noisy, t, x0, pixels, ctx).items():
            loss, logs[name] = loss + term, term
        return StepOutput(loss, logs if len(logs) > 1 else {})

    def _terms(
        self,
        prediction: torch.Tensor,
        noisy: torch.Tensor,
        t: torch.Tensor,
        x0: torch.Tensor,
        pixels: torch.Tensor,
        ctx: Context[DomainStudioConfig],
    ) -> dict[str, torch.Tensor]:
        """Computes DomainStudio's own terms."""
        losses, times = self.losses, self.objective.model_timesteps(t)
        if not any(losses.weights.values()):
            return {}
        adapted = self.compared(self.objective.predicted_sample(prediction, noisy, t))
        source = None
        if losses.pairs:
            predicted = self.model.source(ctx, noisy, times)
            with torch.no_grad():
                source = self.compared(self.objective.predicted_sample(predicted, noisy, t))
        in_pixels = self.model.vae is None or self.config.similarity_space == "pixel"
        target = pixels if in_pixels else x0
        return dict(losses(adapted, source, target, snr=self.objective.snr(t), timesteps=times))

    # -- results ---------------------------------------------------------------------------------------------------

    def pipeline(self, modules: Modules) -> DiffusionPipeline:
        """Returns an `ImageGenerationPipeline` of the adapted network."""
        return self.model.pipeline(modules)

    def validate(self, pipeline: DiffusionPipeline, generator: torch.Generator) -> list[Image.Image]:
        """Draws pictures."""
        count, steps = self.config.num_validation_images, self.config.validation_inference_steps
        return pipeline(batch_size=count, num_inference_steps=steps, generator=generator).images  # type: ignore[operator]

    def card(self) -> RepoCard:
        """Returns the card of the adapted model."""
        base = str(self.config.pretrained_model_name_or_path)
        return RepoCard(
            method="DomainStudio",
            description=f"Adapted to {len(self.data)} images from {base}, whose diversity it keeps: the distances "
            "between its samples are tied to those between the source's.",
            data=self.data.description,
            tags=["diffusers-ext", "unconditional-image-generation", "domain-studio"],
            base_model=base,
            paper="https://arxiv.org/abs/2306.14153",
        )
