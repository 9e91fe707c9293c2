"""Arguments of DomainStudio: for models of images alone, and for text-to-image pipelines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diffusers_ext.training.config import described, require
from diffusers_ext.training.images import ImageConfig
from diffusers_ext.training.text_arguments import TextToImageConfig

from .losses import DomainStudioLoss

__all__ = ["DomainStudioConfig", "DomainStudioTextConfig"]


@dataclass
class LossArguments:
    """Weights of the losses, and what else suits about ten images whatever the model."""

    default_weights = (4.0, 4.0, 1.0)

    pair_weight: float | None = described("Weight of the pair loss; by default 4, with text 100.")
    hf_pair_weight: float | None = described("Weight of the pair loss on high frequencies; 4, with text 100.")
    hf_mse_weight: float | None = described("Weight of the squared error of high frequencies; 1, with text 0.1.")
    hf_mse_weighting: Literal["snr", "x0"] = described(
        "'snr' weights that error with min(SNR, 1); 'x0' lets the noisiest timesteps rule, as the authors did.", "snr"
    )
    max_pair_timestep: int | None = described("Leave noisier images out of the pair losses.")
    similarity_space: Literal["pixel", "latent"] = described("Where images of a latent model are compared.", "pixel")
    train_batch_size: int = described("Images compared with each other, at least 3.", 8)
    adam_weight_decay: float = described("Weight decay; 1e-2 is usual with text.", 0.0)
    ema_decay: float = described("Largest decay of the average.", 0.999)

    def make_loss(self) -> DomainStudioLoss:
        """Makes the loss that the weights describe.

        Raises:
            ValueError: a weight is negative.
        """
        given = (self.pair_weight, self.hf_pair_weight, self.hf_mse_weight)
        chosen = (d if value is None else value for value, d in zip(given, self.default_weights, strict=True))
        pair, hf_pair, hf_mse = chosen
        return DomainStudioLoss(pair, hf_pair, hf_mse, self.hf_mse_weighting, self.max_pair_timestep)

    def check_pairs(self) -> None:
        """Checks that a batch holds enough images to be compared."""
        if self.make_loss().pairs:
            accepted = "an integer >= 3 with a pair loss, which is 0 for two images"
            require(self.train_batch_size >= 3, "train_batch_size", self.train_batch_size, accepted)

    def check_timesteps(self, length: int) -> None:
        """Checks the limit on pairs against the length of the model's schedule."""
        kept, accepted = self.max_pair_timestep, f"in 0..{length - 1}, the model's timesteps, or left out"
        require(kept is None or kept < length, "max_pair_timestep", kept, accepted)


@dataclass
class DomainStudioConfig(LossArguments, ImageConfig):
    """Arguments of DomainStudio for models of images alone, beside those of the data and the engine.

    Raises:
        ValueError: an argument is outside its range, or two contradict each other.
    """

    pretrained_model_name_or_path: str | None = described("Source model, a Hub repo or a folder.", group="model")
    validation_inference_steps: int = described("Sampling steps of validation pictures.", 50)
    learning_rate: float = described("Peak learning rate.", 1e-4)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pretrained_model_name_or_path is None:
            raise ValueError("`pretrained_model_name_or_path` must be given: the source model.")
        steps = self.validation_inference_steps
        require(steps >= 1, "validation_inference_steps", steps, "an integer >= 1")
        self.check_pairs()
        require(not self.streaming, "streaming", self.streaming, "False: the images are few")


@dataclass
class DomainStudioTextConfig(LossArguments, TextToImageConfig):
    """Arguments of DomainStudio for text-to-image pipelines, beside those of training such a pipeline.

    Raises:
        ValueError: an argument is outside its range, or two contradict each other.
    """

    default_weights = (100.0, 100.0, 0.1)

    source: Literal["frozen", "self"] = described(
        "'self' compares with the adapted model's own images of the class, as the authors did, gradient and all: the "
        "anchor drifts.",
        "frozen",
    )
    class_prompt: str | None = described("Prompt of their class, which the source is asked with.", group="data")
    num_class_images: int = described("How many of them there must be.", 200, group="data")
    prior_loss_weight: float = described("Weight of the loss on images of the class; 0 needs none.", 1.0)
    caption_dropout: float = described("Probability of training an image without its prompt.", 0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pipeline_config is not None:
            raise ValueError("`pretrained_model_name_or_path` must be given: the source model.")
        self.check_pairs()
        if self.cache_latents and self.similarity_space == "pixel":
            weighted = any(self.make_loss().weights.values())
            accepted = "False with `similarity_space='pixel'`, whose losses decode images in every step"
            require(not weighted, "cache_latents", self.cache_latents, accepted)

    def _check_prior(self) -> None:
        for name in ("instance_prompt", "class_prompt"):
            if getattr(self, name) is None:
                raise ValueError(f"`{name}` must be given: the source is asked with one, the adapted with the other.")
        require(self.prior_loss_weight >= 0, "prior_loss_weight", self.prior_loss_weight, "a number >= 0")
        if self.prior and self.class_data_dir is None:
            raise ValueError("`class_data_dir` must be given with `prior_loss_weight` or `source='self'`.")

    @property
    def prior(self) -> bool:
        """Whether images of the class are trained on."""
        return self.prior_loss_weight > 0 or self.source == "self"
