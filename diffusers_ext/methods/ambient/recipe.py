"""Training a model of the clean images from noisy ones."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from diffusers_ext.generation.latents import latent_factor
from diffusers_ext.generation.self_check import evaluating
from diffusers_ext.hub.card import RepoCard
from diffusers_ext.training.denoising import DenoisingRecipe
from diffusers_ext.training.objectives import EDM
from diffusers_ext.training.recipe import Context, Modules, Sample, StepOutput

from .arguments import AmbientConfig
from .noisy_data import FrozenNoise, rigid_augmentation
from .pipeline import AmbientPipeline
from .task import AmbientTask

__all__ = ["AmbientRecipe", "consistency_generator", "described_noise"]


class AmbientRecipe(DenoisingRecipe[AmbientConfig]):
    """Ambient diffusion (arXiv 2411.02780): a model of clean images from noisy ones of known level, and clean ones.

    Data, network, sampler and what is saved are those of any denoiser. Images bring their noise, or get it here once
    and for all. Where all images are clean, a step is that of `DenoisingRecipe`, bit by bit.

    Attributes:
        task: the loss.
        frozen: the noise that is added here, or `None`.

    Example:
        >>> from diffusers_ext import AmbientConfig, AmbientRecipe, Trainer
        >>> config = AmbientConfig(train_data_dir="micrographs.npz", sigma_column="sigma", max_train_steps=1000)
        >>> Trainer(config, AmbientRecipe(config)).train()  # doctest: +SKIP
    """

    Config = AmbientConfig
    task: AmbientTask
    frozen: FrozenNoise | None = None

    def setup(self, ctx: Context[AmbientConfig]) -> Modules:
        """Makes the modules, and the noise of the images where it is added here."""
        config, modules = self.config, super().setup(ctx)
        vae = modules.frozen.get("vae")
        if vae is not None:
            config.check_latents()
        self.task = config.make_task(self.objective, self.timesteps)
        # A stream's levels are read with its images, and checked there.
        levels = None if config.streaming else self.data.noise_levels()
        largest = config.sigma if levels is None else float(levels.max())
        self.task.check(self.image_scale * (largest or 0.0))
        if config.add_noise:
            self.frozen = config.make_noise_of(self.data)
            self.frozen.sigma = self.frozen.sigma * self.image_scale
            side = config.resolution // latent_factor(vae)
            if config.noise_file:
                with ctx.accelerator.main_process_first():
                    shape = (modules.trainable.config.in_channels, side, side)
                    self.frozen.draw_once(f"{config.output_dir}/cache", len(self.data), shape)
        return modules

    def noisy(
        self, sample: Sample, batch: dict[str, Any], ctx: Context[AmbientConfig]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the noisy samples of a batch, moved about, and their `(batch,)` levels."""
        y = sample.x0
        if self.frozen is not None:
            y, levels = self.frozen(y, batch["index"])
        elif "sigma" in batch:
            levels = batch["sigma"] * self.image_scale
            if self.config.streaming:
                self.task.check(float(levels.max()))
        else:
            assert self.config.sigma is not None
            levels = torch.full((len(y),), self.config.sigma * self.image_scale, device=y.device)
        return rigid_augmentation(y, self.config.augmentations, ctx.rng, ctx.ids), levels

    def training_step(self, batch: dict[str, Any], ctx: Context[AmbientConfig]) -> StepOutput:
        """Noises on, predicts and compares; asks for consistency where it has a weight."""
        task = self.task
        with torch.no_grad():
            sample = self.encode(batch, ctx)
            y, sigma_n = self.noisy(sample, batch, ctx)
            noise = self.draw_noise(sample, ctx)
            t, weight = task.draw(sigma_n, ctx.rng, ctx.ids)
            made = task.make(y, sigma_n, noise, t, weight)

        def predict(x: torch.Tensor, t: torch.Tensor, **cond: Any) -> torch.Tensor:
            return ctx.model(x, self.objective.model_timesteps(t), **cond, return_dict=False)[0]

        loss = task.loss(predict(made.noisy, made.t, **sample.cond), made)
        if not task.consistency_weight:
            return StepOutput(loss)
        rows, start, end = task.eligible(sigma_n, t, ctx.rng, ctx.ids)
        logs = {"ambient": loss.detach(), "consistency": torch.zeros_like(loss)}
        if len(rows):
            cond = {name: value[rows] for name, value in sample.cond.items()}
            with evaluating(ctx.accelerator.unwrap_model(ctx.model)):  # dropout would look like inconsistency
                each = task.consistency(
                    lambda x, t: predict(x, t, **cond),
                    y[rows],
                    sigma_n[rows],
                    start,
                    end,
                    consistency_generator(ctx, y.device),
                )
            logs["consistency"] = each.sum() / len(y)
            loss = loss + task.consistency_weight * logs["consistency"]
        return StepOutput(loss, logs)

    # -- results ---------------------------------------------------------------------------------------------------

    def pipeline(self, modules: Modules) -> AmbientPipeline:
        """Returns an `AmbientPipeline` of the modules."""
        return AmbientPipeline(
            modules.trainable,
            modules.scheduler,
            modules.frozen.get("vae"),
            image_scale=self.image_scale,
            null_class_label=self.null_class_label,
        )

    def card(self) -> RepoCard:
        """Returns the card of a denoiser, with what is known of the noise."""
        card, config = super().card(), self.config
        sampler = " by Heun's method" if isinstance(self.objective, EDM) else ""
        return dataclasses.replace(
            card,
            method="Ambient Diffusion",
            description=f"{card.description} {described_noise(config)} It draws clean images{sampler}.",
            tags=[*card.tags, "ambient-diffusion"],
            paper="https://arxiv.org/abs/2411.02780",
            notes=[
                *card.notes,
                "`stop_at_sigma` ends sampling at the level of the noise, with the mean of what the image may be.",
            ],
        )


def described_noise(config: Any) -> str:
    """Returns a sentence on the noise of the data."""
    part = "Images" if config.noisy_fraction == 1 else f"{config.noisy_fraction:.0%} of the images"
    level = f"of level {config.sigma:g}" if config.sigma_column is None else "of each image's own level"
    return f"{part} had noise {level}."


def consistency_generator(ctx: Context[Any], device: torch.device) -> torch.Generator:
    """Returns the source of the noise of consistency's runs in this micro-step."""
    return ctx.rng.generator("probes", device)
