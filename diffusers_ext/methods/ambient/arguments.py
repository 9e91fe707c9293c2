"""Arguments of ambient diffusion: for models of images alone, and for text-to-image pipelines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from diffusers_ext.training.config import described, require
from diffusers_ext.training.denoising import DenoisingConfig
from diffusers_ext.training.images import ExactImageArguments
from diffusers_ext.training.objectives import Objective
from diffusers_ext.training.text_arguments import TextToImageConfig
from diffusers_ext.training.timesteps import Timesteps

from .noisy_data import AUGMENTATIONS, FrozenNoise
from .task import AmbientTask

__all__ = ["AmbientConfig", "AmbientTextConfig"]


@dataclass
class AmbientArguments:
    """What is known of the noise, and how it enters the loss."""

    sigma: float | None = described(
        "Level of the noise, in units in which images lie in [-1, 1] (or of scaled latents); or give --sigma_column.",
        group="data",
    )
    noisy_fraction: float = described("With --add_noise: probability that a sample is noisy.", 1.0, group="data")
    noise_seed: int = described("Seed of the noise that --add_noise adds.", 0, group="data")
    noise_file: bool = described(
        "Draw that noise once into a memory-mapped file in --output_dir/cache; without it a generator draws it anew.",
        True,
        group="data",
    )
    weighting: Literal["paper", "uniform"] = described(
        "'paper' weights a noisy sample by how little of it is its own noise; 'uniform' as a clean one, which needs "
        "--max_amplification (by default 10).",
        "paper",
    )
    levels: Literal["truncate", "clamp"] = described(
        "Noise levels of noisy samples: drawn above their own, or clamped to it, as the authors do.", "truncate"
    )
    max_amplification: float | None = described(
        "Keep away from a sample's own level, so that the variance of its target grows by less than this."
    )
    consistency_weight: float = described("Weight of the consistency loss; for data that are nearly all noisy.", 0.0)
    consistency_every: Literal["below", "all"] = described(
        "'below' asks it of noisy samples whose level is drawn below their own, 'all' of every noisy sample.", "below"
    )
    consistency_steps: int = described("Steps of each of its two runs.", 5)

    def check_noise(self, added: bool) -> None:
        """Checks the arguments of the noise.

        Args:
            added: the noise is added here, to clean images.
        """
        config: Any = self  # with the fields of the engine's configuration beside which this class stands
        if (self.sigma is None) == (config.sigma_column is None):
            raise ValueError(
                f"exactly one of `sigma` and `sigma_column` must be given, got {self.sigma!r} and "
                f"{config.sigma_column!r}."
            )
        require(self.sigma is None or self.sigma > 0, "sigma", self.sigma, "a number > 0")
        require(0 < self.noisy_fraction <= 1, "noisy_fraction", self.noisy_fraction, "a number in (0, 1]")
        accepted = "1 where noise is not added here, or its levels are from a column"
        require(
            self.noisy_fraction == 1 or (added and self.sigma is not None),
            "noisy_fraction",
            self.noisy_fraction,
            accepted,
        )
        require(self.noise_seed >= 0, "noise_seed", self.noise_seed, "an integer >= 0")
        require(self.consistency_weight >= 0, "consistency_weight", self.consistency_weight, "a number >= 0")
        require(self.consistency_steps >= 1, "consistency_steps", self.consistency_steps, "an integer >= 1")
        bound = self.max_amplification
        require(bound is None or bound > 1, "max_amplification", bound, "a number > 1 or left out")
        if added:
            accepted = "False where noise is added here: it belongs to a place in the data, which a stream has not"
            require(not config.streaming, "streaming", config.streaming, accepted)
        if config.noise != "gaussian" or config.noise_offset:
            found = f"{config.noise!r} and `noise_offset` {config.noise_offset}"
            raise ValueError(
                "`noise` must be 'gaussian' without `noise_offset`, got "
                f"{found}: what is learned from noisy samples supposes noise that is white and knows nothing of them."
            )
        if self.weighting == "uniform" and bound is None:
            self.max_amplification = 10.0

    def make_task(self, objective: Objective, law: Timesteps) -> AmbientTask:
        """Makes the task that the arguments describe."""
        return AmbientTask(
            objective,
            law,
            self.weighting,
            self.levels,
            self.max_amplification,
            self.consistency_weight,
            self.consistency_every,
            self.consistency_steps,
        )

    def make_noise_of(self, data: Any) -> FrozenNoise:
        """Makes the noise of a data set's samples, with their levels."""
        levels = self.sigma if data.sigma_column is None else data.noise_levels()
        return FrozenNoise(levels, self.noisy_fraction, self.noise_seed)  # type: ignore[arg-type]


@dataclass
class AmbientConfig(AmbientArguments, ExactImageArguments, DenoisingConfig):
    """Arguments of ambient diffusion for models of images alone, beside those of any denoiser.

    Raises:
        ValueError: an argument is outside its range, or two contradict each other.
    """

    add_noise: bool = described(
        "Add the noise here, to clean images, as against memorising; by default the images have it already.",
        False,
        group="data",
    )
    augmentation: str | None = described(
        f"Augmentations that leave white noise white, separated by commas: {', '.join(AUGMENTATIONS)}.", group="data"
    )

    def __post_init__(self) -> None:
        if self.prediction_type is None and self.pretrained_model_name_or_path is None:
            self.prediction_type = "edm"
        super().__post_init__()
        self.check_noise(self.add_noise)
        self.image_options()
        if self.add_noise and self.value_range is not None:
            raise ValueError("`value_range` must be left out with `add_noise`, which starts from clean images.")
        unknown = [kind for kind in self.augmentations if kind not in AUGMENTATIONS]
        if unknown:
            raise ValueError(
                f"`augmentation` must be of {list(AUGMENTATIONS)}, got {unknown}: others, such as other angles or "
                "scales, would make the noise of neighbouring pixels alike."
            )
        if self.vae is not None:
            self.check_latents()
        weight = self.conservativity_weight
        require(weight == 0, "conservativity_weight", weight, "0, which is all that ambient diffusion takes")
        require(self.framework == "ddpm", "framework", self.framework, "'ddpm', which is all that it takes")

    def image_options(self) -> dict[str, Any]:
        """See `ImageConfig.image_options`; what moves images about comes after their noise."""
        exact = self.exact_options()
        added = {"sigma_column": self.sigma_column, "center_crop": True}
        return {**(added if self.add_noise else exact), "random_flip": False}

    @property
    def augmentations(self) -> list[str]:
        """The augmentations of noisy samples."""
        given = [kind.strip() for kind in (self.augmentation or "").split(",") if kind.strip()]
        return [*given, "flip"] if self.random_flip and "flip" not in given else given

    def check_latents(self) -> None:
        """Checks the arguments that a model of latents does not take."""
        if not self.add_noise:
            raise ValueError(
                "`add_noise` must be set for a model of latents: an autoencoder does not turn the noise of pixels "
                "into Gaussian noise of latents. Train pixels on images that are noisy already."
            )
        if self.augmentations:
            raise ValueError(
                f"`augmentation` and `random_flip` must be left out for a model of latents, got {self.augmentations}: "
                "the noise of a moved image's latents would be that of the latents of the image."
            )


@dataclass
class AmbientTextConfig(AmbientArguments, TextToImageConfig):
    """Arguments of ambient diffusion for text-to-image pipelines, beside those of training such a pipeline.

    The noise is added here, to the latents of clean images; images are cropped at their centre, and not mirrored.

    Raises:
        ValueError: an argument is outside its range, or two contradict each other.
    """

    sigma_column: str | None = described("Column of each image's own level, 0 for a clean one.", group="data")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_noise(True)
        require(not self.random_flip, "random_flip", self.random_flip, "False: noise belongs to an image as it is")
        accepted = "left out: images of a class have no noise of their own"
        require(self.class_data_dir is None, "class_data_dir", self.class_data_dir, accepted)

    def image_options(self) -> dict[str, Any]:
        """See `ImageConfig.image_options`."""
        return {"sigma_column": self.sigma_column, "center_crop": True}
