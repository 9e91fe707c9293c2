"""A labelled set of synthetic images, from a class-conditional or a text-to-image pipeline."""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline

from diffusers_ext.generation.processes import process_state
from diffusers_ext.hub.loading import checked_folder
from diffusers_ext.rng import mix
from diffusers_ext.training.config import check_types, described, require

from .shards import ImageShards

__all__ = ["GenerateConfig", "generate"]

logger = logging.getLogger(__name__)
SYNTHESIS = 31  # first word of the seeds


@dataclass
class GenerateConfig:
    """Arguments of `diffusers-ext generate`; the defaults are the paper's.

    Raises:
        ValueError: an argument is outside its range.
    """

    pretrained_model_name_or_path: str = described(
        "Pipeline, class-conditional or from text; repo or folder.", "", group="model"
    )
    output_dir: str = described(
        "Folder of the data set: parquet files under data/.", "runs/synthetic", group="saving and logging"
    )
    class_names: str | None = described("Names of the classes, separated by commas, in the classifier's order.")
    prompt_template: str = described("Prompt of text-to-image pipelines; {} is the class name.", "a photo of a {}")
    images_per_class: int = described("Images of each class.", 50)
    num_inference_steps: int = described("Sampling steps.", 250)
    guidance_scale: float = described("Guidance; 1 is none.", 1.0)
    batch_size: int = described("Images at a time, and in one file of the set.", 16)
    seed: int = described("Seed; every image has its own random numbers from it.", 0)
    mixed_precision: str = described("Precision of the networks: no, fp16 or bf16.", "no")
    hub_dataset_id: str | None = described("Push the finished set to this data set on the Hub.", group="sharing")

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("images_per_class", "num_inference_steps", "batch_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "an integer >= 1")
        require(self.seed >= 0, "seed", self.seed, "an integer >= 0")
        require(self.mixed_precision in DTYPES, "mixed_precision", self.mixed_precision, f"one of {list(DTYPES)}")
        require("{}" in self.prompt_template, "prompt_template", self.prompt_template, "a text with {}")
        if self.class_names is not None:
            names = self.names()
            whole = bool(names) and all(names) and len(set(names)) == len(names)
            require(whole, "class_names", self.class_names, "different names separated by commas")

    def names(self) -> list[str]:
        """Returns the class names that were given."""
        return [name.strip() for name in (self.class_names or "").split(",")]


DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def load_pipeline(name: str, precision: str, device: Any) -> Any:
    """Loads a pipeline in a precision, on a device.

    Raises:
        ValueError: it cannot be loaded.
    """
    import diffusers_ext  # noqa: F401 - makes our pipelines known

    try:
        folder = checked_folder(DiffusionPipeline, name)
        pipeline: Any = DiffusionPipeline.from_pretrained(folder, use_safetensors=True, dtype=DTYPES[precision])
    except Exception as error:  # the libraries raise many kinds
        raise ValueError(
            f"`pretrained_model_name_or_path` must be a pipeline's Hub repo or folder, got {name!r}: {error}"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def generate(config: GenerateConfig) -> Path:
    """Makes the synthetic set, or what is missing of it; see `GenerateConfig`.

    Image `i` is of class `i % classes` and depends on the seed and `i` alone: on any number of processes, and
    however often it was stopped, the set is the same. Start processes with `torchrun`.

    Returns:
        The folder, a data set that `datasets.load_dataset` reads.

    Raises:
        ValueError: the pipeline takes neither classes nor text, or does not have these classes.
    """
    state = process_state()
    pipeline = load_pipeline(config.pretrained_model_name_or_path, config.mixed_precision, state.device)
    parameters = inspect.signature(pipeline.__call__).parameters
    by_class = "class_labels" in parameters
    if not by_class and "prompt" not in parameters:
        raise ValueError(
            "`pretrained_model_name_or_path` must be a class-conditional or text-to-image pipeline, got "
            f"{type(pipeline).__name__}."
        )
    names = _class_names(config, pipeline, by_class)
    fixed = ("pretrained_model_name_or_path", "num_inference_steps", "guidance_scale", "seed", "prompt_template")
    settings = {name: getattr(config, name) for name in fixed}
    count = config.images_per_class * len(names)
    shards = ImageShards(config.output_dir, settings, count, config.batch_size, names)

    def make(indices: range) -> list[dict[str, Any]]:
        labels = [i % len(names) for i in indices]
        given: dict[str, Any] = (
            {"class_labels": labels}
            if by_class
            else {"prompt": [config.prompt_template.replace("{}", names[label]) for label in labels]}
        )
        images = pipeline(
            **given,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            generator=[torch.Generator().manual_seed(mix(config.seed, SYNTHESIS, i)) for i in indices],
        ).images
        return [
            {"image": image, "label": label, "index": i}
            for image, label, i in zip(images, labels, indices, strict=True)
        ]

    shards.fill(make, state.process_index, state.num_processes, "generating")
    return finish(shards, config.hub_dataset_id, state)


def finish(shards: ImageShards, hub_dataset_id: str | None, state: PartialState) -> Path:
    """Waits for all processes and pushes the set where asked."""
    state.wait_for_everyone()
    if hub_dataset_id is not None and state.is_main_process:
        from huggingface_hub import HfApi

        api: Any = HfApi()
        api.create_repo(hub_dataset_id, repo_type="dataset", exist_ok=True)
        api.upload_folder(
            repo_id=hub_dataset_id, repo_type="dataset", folder_path=shards.folder, ignore_patterns=["*.tmp"]
        )
    return shards.folder


def _class_names(config: GenerateConfig, pipeline: Any, by_class: bool) -> list[str]:
    if not by_class:
        if config.class_names is None:
            raise ValueError("`class_names` must be given for a text-to-image pipeline, got None.")
        return config.names()
    named: dict[str, int] | None = getattr(pipeline, "labels", None)  # what DiT's pipeline calls its classes
    network: Any = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    classes = getattr(network.config, "num_class_embeds", None) or getattr(network.config, "num_embeds_ada_norm", 0)
    null = getattr(pipeline.config, "null_class_label", None)
    if null is not None:
        classes = min(classes, null)
    own = [str(i) for i in range(classes)]
    for name, label in (named or {}).items():
        if label < classes and own[label] == str(label):
            own[label] = name
    if not own:
        raise ValueError(
            f"`pretrained_model_name_or_path` must have classes, got {config.pretrained_model_name_or_path!r} without."
        )
    if config.class_names is None:
        return own
    given = config.names()
    if len(given) != len(own):
        raise ValueError(f"`class_names` must be {len(own)} names as the model has classes, got {len(given)}.")
    return given
