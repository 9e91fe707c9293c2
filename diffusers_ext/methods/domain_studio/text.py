"""DomainStudio for any text-to-image pipeline: further losses of the recipe that trains it."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch

from diffusers_ext.hub.card import RepoCard
from diffusers_ext.training.config import require
from diffusers_ext.training.lora import adapters_off
from diffusers_ext.training.recipe import Context, Modules, Sample
from diffusers_ext.training.text_model import SizedDenoiser
from diffusers_ext.training.text_to_image import Prediction, TextToImageRecipe

from .arguments import DomainStudioTextConfig

__all__ = ["DomainStudioTextRecipe"]


class DomainStudioTextRecipe(TextToImageRecipe[DomainStudioTextConfig]):
    """DomainStudio (arXiv 2306.14153) for any text-to-image pipeline, whole or by LoRA.

    The source sees the same noisy images at the same timesteps under the prompt of the class. By LoRA it is the
    network itself with the layers off; otherwise a frozen copy. All else is training the pipeline with prior
    preservation: at weight 0 of the further losses a step is that of `TextToImageRecipe`.

    Example:
        >>> from diffusers_ext import DomainStudioTextConfig, DomainStudioTextRecipe, Trainer
        >>> config = DomainStudioTextConfig(
        ...     pretrained_model_name_or_path="my/flux", train_data_dir="ten-houses", instance_prompt="a [V] house",
        ...     class_prompt="a house", class_data_dir="houses", lora_rank=8, max_train_steps=800,
        ... )
        >>> Trainer(config, DomainStudioTextRecipe(config)).train()  # doctest: +SKIP
    """

    Config = DomainStudioTextConfig

    def dataset(self, ctx: Context[DomainStudioTextConfig]) -> Any:
        """Loads the images and the pipeline, and checks the arguments that depend on it."""
        data, config = super().dataset(ctx), self.config
        self.losses = losses = config.make_loss()
        config.check_timesteps(self.model.pipe.scheduler.config.num_train_timesteps)
        high = losses.weights["hf_pair_weight"] or losses.weights["hf_mse_weight"]
        if high and config.similarity_space == "latent":
            shape = self.denoiser.at().latents_shape(1)
            fits = len(shape) == 4 and not (shape[2] % 2 or shape[3] % 2)
            accepted = (
                f"'pixel' for {type(self.model.pipe).__name__}, whose latents of the shape {shape} have no blocks of "
                "2x2 that give the high frequencies, or these be without weight"
            )
            require(fits, "similarity_space", config.similarity_space, accepted)
        return data

    def setup(self, ctx: Context[DomainStudioTextConfig]) -> Modules:
        """Readies the pipeline, and keeps a copy of its network where a loss needs the source."""
        modules, model = super().setup(ctx), self.model
        if self.losses.pairs and self.config.source == "frozen" and self.config.lora_rank is None:
            pipe = copy.copy(model.pipe)
            setattr(pipe, model.network_name, copy.deepcopy(model.network))
            modules.frozen["source"] = SizedDenoiser(pipe, self.data.sizes, **self._call())
        return modules

    def further_terms(
        self, batch: dict[str, Any], sample: Sample, made: Prediction, ctx: Context[DomainStudioTextConfig]
    ) -> dict[str, torch.Tensor]:
        """Compares the adapted with the source, in the images to adapt to."""
        config, losses, n = self.config, self.losses, len(batch["caption"])
        if not any(losses.weights.values()):
            return {}
        if config.source == "self":
            made = self.predict(sample, ctx, one_timestep=True)
        noisy, t, size = made.noisy[:n], made.t[:n], sample.cond["size"]
        source = None
        if losses.pairs and config.source == "self":
            source = self._compared(made.output[n:], made.noisy[n:], made.t[n:], size)
        elif losses.pairs:
            with torch.no_grad():
                source = self._compared(self._source(noisy, t, size, ctx), noisy, t, size)
        target = batch["pixel_values"] if config.similarity_space == "pixel" else sample.x0[:n]
        return dict(
            losses(
                self._compared(made.output[:n], noisy, t, size),
                source,
                target,
                snr=self.objective.snr(t),
                timesteps=self.objective.model_timesteps(t),
            )
        )

    def _compared(
        self, prediction: torch.Tensor, noisy: torch.Tensor, t: torch.Tensor, size: tuple[int, int]
    ) -> torch.Tensor:
        """Returns the clean samples that a prediction sees, as they are compared: images in [-1, 1], or latents."""
        x0 = self.objective.predicted_sample(prediction, noisy, t)
        return x0 if self.config.similarity_space == "latent" else self.denoiser.at(size).decode(x0)

    def _source(
        self, noisy: torch.Tensor, t: torch.Tensor, size: tuple[int, int], ctx: Context[DomainStudioTextConfig]
    ) -> torch.Tensor:
        """Returns the source's prediction under the prompt of the class."""
        conditions = self.prompts([str(self.config.class_prompt)])
        if "source" in ctx.modules.frozen:
            return self.denoise(ctx.modules.frozen["source"], noisy, t, conditions, size)
        network = ctx.accelerator.unwrap_model(ctx.model)
        with adapters_off(network):
            return self.denoise(network, noisy, t, conditions, size)

    def card(self) -> RepoCard:
        """Returns the card of the adapted pipeline or of its LoRA layers."""
        card, name = super().card(), self.model.name
        return dataclasses.replace(
            card,
            method="DomainStudio",
            description=f"{card.description} Adapted to {len(self.data)} images with the diversity of {name}: the "
            "distances between its samples are tied to those between the source's.",
            tags=[*card.tags, "domain-studio"],
            paper="https://arxiv.org/abs/2306.14153",
        )
