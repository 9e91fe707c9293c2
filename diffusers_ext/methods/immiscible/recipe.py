"""Training with noise that is paired to the data."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch

from diffusers_ext.hub.card import RepoCard
from diffusers_ext.training.config import described, require
from diffusers_ext.training.denoising import DenoisingConfig, DenoisingRecipe
from diffusers_ext.training.noise import NoiseStrategy, make_noise
from diffusers_ext.training.recipe import Context, Modules, Sample

from .assignment import AssignmentNoise
from .distance import distance_cut
from .nearest import NearestNoise

__all__ = ["ImmiscibleConfig", "ImmiscibleRecipe"]

# What each noise takes of the arguments of `ImmiscibleConfig`.
OPTIONS = {"knn": ("k", "score"), "assignment": ("cost", "group_size", "within_labels")}


@dataclass
class ImmiscibleConfig(DenoisingConfig):
    """Arguments of Immiscible Diffusion beside those of any denoiser.

    Raises:
        ValueError: an argument is outside its range, or has no meaning for the chosen noise.
    """

    noise: str = described("Noise strategy: gaussian, assignment, knn or signflip.", "assignment")
    k: int | None = described("knn: candidates per sample; by default 4.")
    score: Literal["l2", "inner"] | None = described("knn: nearest by distance (default), or by inner product.")
    cost: Literal["inner", "l2"] | None = described("assignment: squared distances (inner, default) or plain (l2).")
    group_size: int | None = described("assignment: solve groups of so many samples; by default the whole batch.")
    within_labels: bool = described("assignment: pair only samples of one class with each other.", False)
    image_scale: float = described("Images are multiplied by this before diffusion; the papers use 2 and 4.", 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.image_scale > 0, "image_scale", self.image_scale, "a number > 0")
        taken = OPTIONS.get(self.noise, ()) if self.noise_options is None else ()
        idle = [f"`{name}`" for name in self.strategy_options() if name not in taken]
        if idle:
            what = (
                f"the {self.noise} noise" if self.noise_options is None else "`noise_options`, which is used instead"
            )
            warnings.warn(f"{', '.join(idle)} does nothing with {what}", stacklevel=3)

    def strategy_options(self) -> dict[str, Any]:
        """Returns those of the arguments above that were given, by name."""
        given = {name: getattr(self, name) for name in ("k", "score", "cost", "group_size", "within_labels")}
        return {name: value for name, value in given.items() if value is not None and value is not False}

    def make_noise(self) -> NoiseStrategy:
        """Makes the strategy from the arguments above, or from `noise_options` where they are given."""
        if self.noise_options is not None:
            return super().make_noise()
        options = {
            name: value for name, value in self.strategy_options().items() if name in OPTIONS.get(self.noise, ())
        }
        return make_noise(self.noise, **options)


class ImmiscibleRecipe(DenoisingRecipe[ImmiscibleConfig]):
    """Immiscible Diffusion (arXiv 2406.12303) and its improved form (arXiv 2505.18521).

    Only the noise differs from plain training, and the scale of the images if asked: model, loss and sampler stay.

    Example:
        >>> from diffusers_ext import ImmiscibleConfig, ImmiscibleRecipe, Trainer
        >>> config = ImmiscibleConfig(train_data_dir="photos", max_train_steps=1000, noise="knn", k=8)
        >>> Trainer(config, ImmiscibleRecipe(config)).train()  # doctest: +SKIP
    """

    Config = ImmiscibleConfig

    def __init__(self, config: ImmiscibleConfig) -> None:
        super().__init__(config)
        self.image_scale = config.image_scale

    def setup(self, ctx: Context[ImmiscibleConfig]) -> Modules:
        """Makes the modules; says where pairing has nothing to choose from."""
        modules = super().setup(ctx)
        noise, choices, name = self.noise, 2, ""
        if isinstance(noise, AssignmentNoise):
            samples = self.config.train_batch_size * (ctx.accelerator.num_processes if noise.gather else 1)
            choices, name = min(samples, noise.group_size or samples), "train_batch_size` or `group_size"
        elif isinstance(noise, NearestNoise):
            choices, name = noise.k, "k"
        if choices == 1 and ctx.accelerator.is_main_process:
            warnings.warn(f"{self.config.noise} noise does nothing with `{name}` of 1: it is gaussian", stacklevel=2)
        return modules

    def noise_logs(self, sample: Sample, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logs `distance_cut`, by which pairing shortens the way from noise to data."""
        return {"distance_cut": distance_cut(sample.x0, noise)}

    def card(self) -> RepoCard:
        """Returns the card with the strategy and what it asks of the sampler."""
        config, card = self.config, super().card()
        if config.noise == "gaussian":
            return card
        noise, settings = self.noise, "no settings"
        if isinstance(noise, NearestNoise):
            settings = f"k = {noise.k}, score {noise.score}"
        elif isinstance(noise, AssignmentNoise):
            settings = f"cost {noise.cost}"
        card.method = "Immiscible Diffusion"
        card.paper = (
            "https://arxiv.org/abs/2505.18521" if config.noise == "knn" else "https://arxiv.org/abs/2406.12303"
        )
        card.tags = [*card.tags, "immiscible-diffusion"]
        card.description += f" Noise strategy: {config.noise} ({settings})."
        card.notes = [
            *card.notes,
            "Noise was paired with the data in training, so sample with a deterministic sampler only (DDIM with "
            "eta = 0, flow-matching Euler or Heun): ancestral and SDE samplers are biased for this model.",
        ]
        return card
