"""Loading the image denoiser that a method starts from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers import DiffusionPipeline, UNet2DModel

from .config import require

__all__ = ["Denoiser", "load_denoiser", "loaded"]


@dataclass
class Denoiser:
    """An image denoiser without text.

    Attributes:
        unet: its `UNet2DModel`.
        scheduler: its scheduler.
        vae: its VAE, or `None` in pixel space.
        image_scale: what images or latents are multiplied by before they are diffused.
        null_class_label: the label that stands for "no class", if there is one.
    """

    unet: Any
    scheduler: Any
    vae: Any = None
    image_scale: float = 1.0
    null_class_label: int | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes that it distinguishes, the null label included; 0 without classes."""
        return self.unet.config.num_class_embeds or 0

    def check_size(self, resolution: int, channels: int) -> None:
        """Checks that images of a size are what it generates.

        Raises:
            ValueError: it generates others; the message names `resolution` or `channels`.
        """
        config = self.unet.config if self.vae is None else self.vae.config
        factor = 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)
        size = self.unet.config.sample_size
        size = factor * (size if isinstance(size, int) else size[0])
        require(resolution == size, "resolution", resolution, f"{size}, the size of the model's images")
        require(channels == config.in_channels, "channels", channels, f"{config.in_channels}, as the model takes")


def loaded(argument: str, kind: Any, name: str) -> Any:
    """Loads from the Hub or a folder; a failure names the argument."""
    try:
        return kind.from_pretrained(name, use_safetensors=True)
    except Exception as error:  # the libraries raise many kinds
        raise ValueError(
            f"`{argument}` must be a Hub repo or a folder that `{kind.__name__}` loads, got {name!r}: {error}"
        ) from error


def load_denoiser(name: str) -> Denoiser:
    """Loads the parts of a pipeline with a `UNet2DModel`, of this package or of Diffusers.

    Raises:
        ValueError: it cannot be loaded, or has another network; the message names `pretrained_model_name_or_path`.
    """
    pipeline = loaded("pretrained_model_name_or_path", DiffusionPipeline, name)
    unet: Any = getattr(pipeline, "unet", None)
    if not isinstance(unet, UNet2DModel):
        raise ValueError(
            f"`pretrained_model_name_or_path` must be a pipeline with a `UNet2DModel`, got {name!r} with "
            f"{type(unet).__name__}."
        )
    config = pipeline.config
    scale, null = getattr(config, "image_scale", 1.0), getattr(config, "null_class_label", None)
    return Denoiser(unet, getattr(pipeline, "scheduler", None), getattr(pipeline, "vae", None), scale, null)
