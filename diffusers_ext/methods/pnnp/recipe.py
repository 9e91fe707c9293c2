"""Training of a raw denoiser on clean raw images and the noise of a camera."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from diffusers_ext.hub.card import RepoCard
from diffusers_ext.training.config import LRSchedule, TrainConfig, described, require
from diffusers_ext.training.networks import make_network
from diffusers_ext.training.recipe import Context, Modules, Recipe, StepOutput

from .bayer import check_pattern, unpack_bayer
from .camera import CAMERAS
from .clean_data import CleanRawPatches
from .develop import develop
from .noise_pipeline import SensorNoisePipeline
from .numbers import numbers
from .pipeline import RawDenoisePipeline
from .synthesis import RawNoiseSynthesizer
from .unet import RawUNet

__all__ = ["PNNPConfig", "PNNPRecipe", "denoising_loss"]

SNIPPET = """import diffusers_ext  # pip install 'diffusers-ext[raw]'
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{repo_id}")
pipeline("photo.dng", ratio=RATIO, output_type="pil").images[0].save("clean.png")"""


@dataclass
class PNNPConfig(TrainConfig):
    """Arguments of a raw denoiser's training beside the engine's.

    Raises:
        ValueError: an argument is outside its range, or two contradict each other.
    """

    train_data_dir: str = described(
        "Folder of clean raw images, well exposed, of a low ISO: .npy, .tif, with the extra `raw` DNG, NEF, ARW ...",
        "",
        group="data",
    )
    validation_data_dir: str | None = described(
        "Held-out clean raw images; by default the middle of the first ones of these.", group="data"
    )
    resolution: int = described("Side of a patch of the packed planes, half of that in pixels.", 256, group="data")
    random_flip: bool = described("Mirror and transpose patches.", True, group="data")
    black_level: float | None = described(
        "Of clean images whose files do not say it, in DN; by default the noise's camera's.", group="data"
    )
    white_level: float | None = described("Likewise.", group="data")
    pattern: str = described("Mosaic of images whose files do not say it.", "RGGB", group="data")
    noise_model: str | None = described(
        "SensorNoisePipeline of the camera, a Hub repo or a folder, as `pnnp_noise` makes it.", group="model"
    )
    camera: Literal["sony_a7s2", "imx686"] | None = described(
        "A known camera with Gaussian noise of pixels instead, as published.", group="model"
    )
    pixel_noise: Literal["proxy", "gaussian", "recorded"] | None = described(
        "Noise of pixels: the learned one, a Gaussian of its deviation, or values of the dark frames; by default the "
        "learned one where there is a noise model."
    )
    augment_noise: bool = described("Vary the noise from image to image, see `RawNoiseSynthesizer`.", True)
    iso: str | None = described("'least,largest' ISO; by default all of which there were dark frames.")
    ratio: str | None = described("'least,largest' factor by which exposures are too short; by default the camera's.")
    loss: Literal["l1", "l2"] = described("Mean distance or mean square of it.", "l1")
    unet_config: str | None = described(
        "JSON file of `RawUNet` arguments; by default 7.8 million weights.", group="model"
    )
    train_batch_size: int = described("Samples per process and micro-step.", 4)
    learning_rate: float = described("Peak learning rate.", 2e-4)
    lr_scheduler: LRSchedule = described("Course of the learning rate over the updates.", "cosine")
    lr_warmup_steps: int = described("Updates of linear warm-up; 'constant' has none.", 0)
    adam_weight_decay: float = described("Weight decay.", 0.0)
    ema_decay: float = described("Largest decay of the average.", 0.999)
    num_validation_images: int = described("How many images to denoise for pictures and PSNR.", 4)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.resolution >= 16, "resolution", self.resolution, "an integer >= 16")
        check_pattern(self.pattern)
        both = (self.noise_model, self.camera)
        if (self.noise_model is None) == (self.camera is None):
            raise ValueError(f"exactly one of `noise_model` and `camera` must be given, got {both}.")
        if self.camera is not None and self.pixel_noise not in (None, "gaussian"):
            raise ValueError(f"`pixel_noise` must be 'gaussian' with `camera`, got {self.pixel_noise!r}.")
        for name in ("iso", "ratio"):
            ends = numbers(name, getattr(self, name), 2)
            accepted = f"two numbers {'>= 1' if name == 'ratio' else '> 0'}, not falling"
            least = 1 if name == "ratio" else 1e-6
            require(ends is None or least <= ends[0] <= ends[1], name, getattr(self, name), accepted)


def denoising_loss(output: torch.Tensor, clean: torch.Tensor, loss: str) -> torch.Tensor:
    """Returns the mean distance ("l1") or mean square ("l2"); the output is not cut, which would end its gradients."""
    error = output.float() - clean.float()
    return error.abs().mean() if loss == "l1" else error.square().mean()


class PNNPRecipe(Recipe[PNNPConfig]):
    """Trains a raw denoiser on clean raw images and a camera's noise (PNNP, 2310.09126); saves a `RawDenoisePipeline`.

    Example:
        >>> from diffusers_ext import PNNPConfig, PNNPRecipe, Trainer
        >>> config = PNNPConfig(train_data_dir="clean", noise_model="runs/noise", num_train_epochs=600)
        >>> Trainer(config, PNNPRecipe(config)).train()  # doctest: +SKIP
    """

    Config = PNNPConfig
    sample_name = "patches"

    def dataset(self, ctx: Context[PNNPConfig]) -> CleanRawPatches:
        """Makes the noise, and looks at the images."""
        config = self.config
        self.synthesizer, self.dark = self.noise()
        camera = self.synthesizer.camera
        white = config.white_level if config.white_level is not None else camera.white_level
        black = config.black_level if config.black_level is not None else camera.black_level
        options = (config.resolution, white, black, config.pattern)
        data = CleanRawPatches(config.train_data_dir, *options, config.random_flip)
        held_out = data
        if config.validation_data_dir is not None:
            held_out = CleanRawPatches(config.validation_data_dir, *options, False, "validation_data_dir")
        count = max(1, config.num_validation_images)
        patches = [held_out.get(i % len(held_out), torch.Generator().manual_seed(i)) for i in range(count)]
        self.held_out = torch.stack([patch["clean"] for patch in patches])
        return data

    def noise(self) -> tuple[RawNoiseSynthesizer, Any]:
        """Returns what makes images noisy, and the camera's dark frames if there are any."""
        config = self.config
        options: dict[str, Any] = {
            "augment": config.augment_noise,
            "iso": numbers("iso", config.iso, 2),
            "ratio": numbers("ratio", config.ratio, 2),
            "pixel": config.pixel_noise,
        }
        if config.camera is not None:
            return RawNoiseSynthesizer(camera=CAMERAS[config.camera], **options), None
        try:
            pipeline = SensorNoisePipeline.from_pretrained(config.noise_model)
        except Exception as error:  # the libraries raise many kinds
            raise ValueError(
                f"`noise_model` must be a SensorNoisePipeline's repo or folder, got {config.noise_model!r}: {error}"
            ) from error
        return pipeline.synthesizer(**options), pipeline.dark

    def setup(self, ctx: Context[PNNPConfig]) -> Modules:
        """Makes the network."""
        self.size_advice = "--unet_config chooses another network"
        network = make_network(RawUNet, "unet_config", self.config.unet_config, {}, {})
        return Modules(network.to(memory_format=torch.channels_last), None)  # in which convolutions are faster

    def training_step(self, batch: dict[str, Any], ctx: Context[PNNPConfig]) -> StepOutput:
        """Makes clean patches noisy, and compares what the network makes of them."""
        clean = batch["clean"]
        with torch.no_grad():
            noisy = self.synthesizer(clean, generator=ctx.rng.generator("noise")).noisy
        output = ctx.model(noisy, return_dict=False)[0]
        return StepOutput(denoising_loss(output, clean, self.config.loss))

    # -- results ---------------------------------------------------------------------------------------------------

    def pipeline(self, modules: Modules) -> RawDenoisePipeline:
        """Returns the pipeline."""
        camera = self.synthesizer.camera
        levels = (camera.white_level, camera.black_level)
        return RawDenoisePipeline(modules.trainable, self.dark, *levels, self.config.pattern)

    @torch.no_grad()
    def _denoised(self, pipeline: Any, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        noisy = self.synthesizer(self.held_out, generator=generator).noisy
        unet = pipeline.unet
        parts = [unet(part.to(unet.device, unet.dtype), return_dict=False)[0].float().cpu() for part in noisy.split(1)]
        return noisy, torch.cat(parts)

    def figures(self, pipeline: DiffusionPipeline, generator: torch.Generator) -> dict[str, float]:
        """Measures PSNR of held-out patches with the camera's noise, before and after."""
        noisy, denoised = self._denoised(pipeline, generator)
        return {"PSNR, noisy": _psnr(noisy, self.held_out), "PSNR, denoised": _psnr(denoised, self.held_out)}

    def validate(self, pipeline: DiffusionPipeline, generator: torch.Generator) -> list[Image.Image]:
        """Draws held-out patches: noisy, denoised and clean, from the left."""
        noisy, denoised = self._denoised(pipeline, generator)
        rows = torch.cat([noisy, denoised, self.held_out], dim=3)
        return [develop(unpack_bayer(row, "RGGB")) for row in rows]

    def card(self) -> RepoCard:
        """Returns the card."""
        config = self.config
        noise = config.noise_model or f"{config.camera} as published, with Gaussian noise of pixels"
        ratio = sum(self.synthesizer.ratio) / 2
        return RepoCard(
            method="PNNP raw denoising",
            description="Denoises a camera's raw images before they are developed. It was trained on clean images and "
            f"the noise of {noise}.",
            data=f"Raw images of {config.train_data_dir}.",
            tags=["diffusers-ext", "raw-images", "image-denoising"],
            paper="https://arxiv.org/abs/2310.09126",
            snippet=SNIPPET.replace("RATIO", f"{ratio:g}"),
            pipeline_tag="image-to-image",
        )


def _psnr(image: torch.Tensor, clean: torch.Tensor) -> float:
    error = (image.clamp(0, 1) - clean).square().mean((1, 2, 3)).clamp_min(1e-12)
    return float((-10 * error.log10()).mean())
