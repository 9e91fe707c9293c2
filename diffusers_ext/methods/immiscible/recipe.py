"""Training with noise that is paired to the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from diffusers_ext.hub.card import RepoCard
from diffusers_ext.training.config import described, require
from diffusers_ext.training.denoising import DenoisingConfig, DenoisingRecipe
from diffusers_ext.training.noise import NoiseStrategy, make_noise
from diffusers_ext.training.recipe import Sample

from .distance import distance_cut

__all__ = ["ImmiscibleConfig", "ImmiscibleRecipe"]


@dataclass
class ImmiscibleConfig(DenoisingConfig):
    """Arguments of Immiscible Diffusion beside those of any denoiser.

    Raises:
        ValueError: an argument is outside its range, or has no meaning for the chosen noise.
    """

    noise: str = described("Noise strategy: gaussian, assignment, knn or signflip.", "assignment")
    k: int = described("knn: candidates per sample.", 4)
    score: Literal["l2", "inner"] = described("knn: nearest by distance, or by inner product.", "l2")
    cost: Literal["inner", "l2"] = described("assignment: squared distances (inner) or plain (l2).", "inner")
    group_size: int | None = described("assignment: solve groups of so many samples; by default the whole batch.")
    within_labels: bool = described("assignment: pair only samples of one class with each other.", False)
    image_scale: float = described("Images are multiplied by this before diffusion; the papers use 2 and 4.", 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.image_scale > 0, "image_scale", self.image_scale, "a number > 0")

    def make_noise(self) -> NoiseStrategy:
        """Makes the strategy from the arguments above, or from `noise_options` where they are given."""
        if self.noise_options is not None:
            return super().make_noise()
        options: dict[str, dict[str, Any]] = {
            "knn": {"k": self.k, "score": self.score},
            "assignment": {
                "cost": self.cost,
                "group_size": self.group_size,
                "within_labels": self.within_labels,
            },
        }
        return make_noise(self.noise, **options.get(self.noise, {}))


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

    def noise_logs(self, sample: Sample, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logs `distance_cut`, by which pairing shortens the way from noise to data."""
        return {"distance_cut": distance_cut(sample.x0, noise)}

    def card(self) -> RepoCard:
        """Returns the card with the strategy and what it asks of the sampler."""
        config, card = self.config, super().card()
        if config.noise == "gaussian":
            return card
        settings = {"knn": f"k = {config.k}, score {config.score}", "assignment": f"cost {config.cost}"}
        card.method = "Immiscible Diffusion"
        card.paper = (
            "https://arxiv.org/abs/2505.18521" if config.noise == "knn" else "https://arxiv.org/abs/2406.12303"
        )
        card.tags = [*card.tags, "immiscible-diffusion"]
        card.description += f" Noise strategy: {config.noise} ({settings.get(config.noise, 'no settings')})."
        card.notes = [
            *card.notes,
            "Noise was paired with the data in training, so sample with a deterministic sampler only (DDIM with "
            "eta = 0, flow-matching Euler or Heun): ancestral and SDE samplers are biased for this model.",
        ]
        return card
