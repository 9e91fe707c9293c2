"""A whole data set through the alignment, for training."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from diffusers_ext.data.sources import load_images
from diffusers_ext.generation.processes import process_state
from diffusers_ext.rng import mix
from diffusers_ext.training.config import check_types, described, require

from .align import AlignConfig, align
from .generate import DTYPES, finish, load_pipeline
from .lowpass import LowPass
from .shards import ImageShards, check_whole, to_pil

__all__ = ["AlignSetConfig", "AlignmentArguments", "align_set", "sample_generators"]

logger = logging.getLogger(__name__)
ADAPTATION = 32  # first word of the seeds


def sample_generators(seed: int, indices: Any) -> list[torch.Generator]:
    """Returns one generator an image, so that its noise depends on the seed and its index alone."""
    return [torch.Generator().manual_seed(mix(seed, ADAPTATION, int(i))) for i in indices]


@dataclass
class AlignmentArguments:
    """How images are adapted, as command-line arguments; see `AlignConfig`.

    Raises:
        ValueError: an argument is outside its range.
    """

    num_steps: int = described("R, to how many timesteps the schedule is respaced.", 100)
    strength: float = described("N / R: how far images are noised.", 0.5)
    guidance_weight: float = described("w of the guidance.", 6.0)
    factor: int = described("D of the low-pass filter.", 4)
    norm: Literal["per_sample", "batch"] = described("One norm an image, or one over the batch.", "per_sample")
    sampler: Literal["ddpm", "ddim"] = described("Ancestral, or deterministic for few steps.", "ddpm")
    detach_unet: bool = described("Leave the network out of the gradient: no backward pass.", False)

    def __post_init__(self) -> None:
        check_types(self)
        self.alignment()

    def alignment(self) -> AlignConfig:
        """Returns the settings."""
        return AlignConfig(**{name: getattr(self, name) for name in asdict(AlignConfig())})


@dataclass
class AlignSetConfig(AlignmentArguments):
    """Arguments of `diffusers-ext align`.

    Raises:
        ValueError: an argument is outside its range.
    """

    pretrained_model_name_or_path: str = described(
        "Unconditional pipeline, a Hub repo or a folder.", "", group="model"
    )
    train_data_dir: str = described(
        "Labelled images: what `generate` wrote, or any that `load_images` reads.", "", group="data"
    )
    output_dir: str = described("Folder of the aligned set.", "runs/aligned", group="saving and logging")
    batch_size: int = described("Images at a time, and in one file of the set.", 64)
    seed: int = described("Seed; every image has its own random numbers from it.", 0)
    mixed_precision: str = described("Precision of the network: no, fp16 or bf16.", "no")
    hub_dataset_id: str | None = described("Push the finished set to this data set on the Hub.", group="sharing")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.batch_size >= 1, "batch_size", self.batch_size, "an integer >= 1")
        require(self.seed >= 0, "seed", self.seed, "an integer >= 0")
        require(self.mixed_precision in DTYPES, "mixed_precision", self.mixed_precision, f"one of {list(DTYPES)}")


def diffusion_model(pipeline: Any) -> tuple[Any, Any, int, int]:
    """Returns network, scheduler, side and channels of a pipeline in pixel space.

    Raises:
        ValueError: it has no unconditional UNet on pixels.
    """
    unet, size = getattr(pipeline, "unet", None), None
    if unet is not None and getattr(pipeline, "vae", None) is None:
        size = unet.config.sample_size
    if not isinstance(size, int) or getattr(unet.config, "num_class_embeds", None):  # type: ignore[union-attr]
        raise ValueError(
            "`pretrained_model_name_or_path` must have an unconditional `unet` on square pixels, got "
            f"{type(pipeline).__name__}."
        )
    return unet, pipeline.scheduler, size, unet.config.in_channels  # type: ignore[union-attr]


def align_set(config: AlignSetConfig) -> Path:
    """Aligns a labelled set, or what is missing of it; see `AlignSetConfig`.

    Images are brought to the diffusion model's size by their shorter side and cropped to the centre. Those that
    cannot be read are left out, each named in the log, with a count at the end. Every image depends on the seed and
    its index alone, whatever the number of processes.

    Returns:
        The folder, a data set that `datasets.load_dataset` reads.

    Raises:
        ValueError: the set is unfinished or has no labels, or the model does not fit.
    """
    check_whole(config.train_data_dir)
    state = process_state()
    pipeline = load_pipeline(config.pretrained_model_name_or_path, config.mixed_precision, state.device)
    unet, scheduler, size, channels = diffusion_model(pipeline)
    data: Any = load_images(train_data_dir=config.train_data_dir, resolution=size, channels=channels, center_crop=True)
    if not data.num_classes:
        raise ValueError(f"`train_data_dir` must hold labelled images, got {config.train_data_dir!r} without labels.")
    settings = {k: v for k, v in asdict(config).items() if k not in ("output_dir", "batch_size", "hub_dataset_id")}
    shards = ImageShards(config.output_dir, settings, len(data), config.batch_size, data.class_names)
    low_pass = LowPass(size, config.factor, state.device)
    skipped: list[str] = []

    def make(indices: range) -> list[dict[str, Any]]:
        kept, items = [], []
        for i in indices:
            try:
                items.append(data.get(i))
                kept.append(i)
            except ValueError as error:
                skipped.append(str(error))
                logger.warning("skipped: %s", error)
        if not kept:
            return []
        images = torch.stack([item["pixel_values"] for item in items]).to(state.device)
        generators = sample_generators(config.seed, kept)
        aligned = align(unet, scheduler, images, config.alignment(), generator=generators, low_pass=low_pass)
        return [
            {"image": image, "label": item["label"], "index": i}
            for image, item, i in zip(to_pil(aligned), items, kept, strict=True)
        ]

    shards.fill(make, state.process_index, state.num_processes, "aligning")
    if skipped:
        logger.warning("%d of %d images could not be read and were skipped", len(skipped), len(data))
    return finish(shards, config.hub_dataset_id, state)
