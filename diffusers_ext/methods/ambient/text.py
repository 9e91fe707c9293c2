"""Ambient diffusion for any text-to-image pipeline, whole or by LoRA."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from diffusers_ext.generation.self_check import evaluating
from diffusers_ext.hub.card import RepoCard
from diffusers_ext.training.recipe import Context, Modules, StepOutput
from diffusers_ext.training.text_to_image import TextToImageRecipe

from .arguments import AmbientTextConfig
from .noisy_data import FrozenNoise
from .recipe import consistency_generator, described_noise
from .task import AmbientTask

__all__ = ["AmbientTextRecipe"]


class AmbientTextRecipe(TextToImageRecipe[AmbientTextConfig]):
    """Ambient diffusion for text-to-image pipelines (arXiv 2404.10177), against memorising the images.

    The latents of each image get noise once and for all, and are trained at higher levels only. All else is training
    the pipeline: with clean images alone a step is that of `TextToImageRecipe`.

    Attributes:
        tasks: the loss, for each size.
        frozen: the noise of the images.

    Example:
        >>> from diffusers_ext import AmbientTextConfig, AmbientTextRecipe, Trainer
        >>> config = AmbientTextConfig(
        ...     pretrained_model_name_or_path="my/sdxl", train_data_dir="photos", sigma=0.344, lora_rank=16,
        ...     max_train_steps=1000,
        ... )
        >>> Trainer(config, AmbientTextRecipe(config)).train()  # doctest: +SKIP
    """

    Config = AmbientTextConfig
    tasks: dict[tuple[int, int], AmbientTask]
    frozen: FrozenNoise

    def setup(self, ctx: Context[AmbientTextConfig]) -> Modules:
        """Readies the pipeline, and the noise of the images."""
        config, modules = self.config, super().setup(ctx)
        self.tasks = {size: config.make_task(self.objective, law) for size, law in self.timesteps.items()}
        self.frozen = config.make_noise_of(self.data.images)
        next(iter(self.tasks.values())).check(float(self.frozen.sigma.max()))
        if config.noise_file and len(self.data.sizes) == 1:
            with ctx.accelerator.main_process_first():
                shape = self.denoiser.at().latents_shape(1)[1:]
                self.frozen.draw_once(f"{config.output_dir}/cache", len(self.data), shape)
        return modules

    def training_step(self, batch: dict[str, Any], ctx: Context[AmbientTextConfig]) -> StepOutput:
        """Noises on, predicts and compares; asks for consistency where it has a weight."""
        with torch.no_grad():
            sample = self.encode(batch, ctx)
            size, conditions = sample.cond["size"], sample.cond["conditions"]
            task = self.tasks[size]
            y, sigma_n = self.frozen(sample.x0, batch["index"])
            noise = self.draw_noise(sample, list(ctx.ids), ctx)
            t, weight = task.draw(sigma_n, ctx.rng, ctx.ids, self.one_timestep)
            made = task.make(y, sigma_n, noise, t, weight)
        loss = task.loss(self.denoise(ctx.model, made.noisy, made.t, conditions, size), made)
        if not task.consistency_weight:
            return StepOutput(loss)
        rows, start, end = task.eligible(sigma_n, t, ctx.rng, ctx.ids)
        logs = {"ambient": loss.detach(), "consistency": torch.zeros_like(loss)}
        if len(rows):
            chosen = conditions[rows.tolist()]

            def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
                # Where a call takes one timestep the denoiser calls sample by sample.
                return ctx.model(x, self.objective.model_timesteps(t), conditions=chosen, size=size)

            source = consistency_generator(ctx, y.device)
            with evaluating(ctx.accelerator.unwrap_model(ctx.model)):  # dropout would look like inconsistency
                each = task.consistency(predict, y[rows], sigma_n[rows], start, end, source)
            logs["consistency"] = each.sum() / len(y)
            loss = loss + task.consistency_weight * logs["consistency"]
        return StepOutput(loss, logs)

    def card(self) -> RepoCard:
        """Returns the card of the trained pipeline or of its LoRA layers."""
        card = super().card()
        return dataclasses.replace(
            card,
            method="Ambient Diffusion",
            description=f"{card.description} {described_noise(self.config)} It was added to their latents, against "
            "memorising them.",
            tags=[*card.tags, "ambient-diffusion"],
            paper="https://arxiv.org/abs/2404.10177",
        )
