"""Accuracies on clean and corrupted images: source, DDA, SDA, and two adaptations of the classifier's weights."""

from __future__ import annotations

import json
import logging
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from diffusers_ext.data.corruptions import CORRUPTIONS, EXTRA_CORRUPTIONS, corrupt
from diffusers_ext.data.sources import load_images
from diffusers_ext.generation.processes import process_state
from diffusers_ext.rng import mix
from diffusers_ext.training.config import check_types, described, require
from diffusers_ext.training.results import check_settings

from .align import align
from .align_set import sample_generators
from .baselines import STREAMS, stream_logits, stream_order
from .generate import load_pipeline
from .lowpass import LowPass
from .pipeline import SDATTAPipeline, align_settings
from .shards import to_pil
from .views import classify

__all__ = ["EvaluateConfig", "evaluate"]

logger = logging.getLogger(__name__)
CORRUPTION = 33  # first word of the seeds
# What each method's logits are made of; "s" and "f" are source and fine-tuned classifier, x the image and a adapted.
METHODS = {"source": ("sx",), "source_adapted": ("sa",), "dda": ("sx", "sa"), "tuned": ("fx",),
           "tuned_adapted": ("fa",), "sda": ("sx", "fa")}  # fmt: skip


@dataclass
class EvaluateConfig:
    """Arguments of `diffusers-ext evaluate`.

    Raises:
        ValueError: an argument is outside its range.
    """

    pretrained_model_name_or_path: str = described("An `SDATTAPipeline`, a Hub repo or a folder.", "", group="model")
    data_dir: str = described("Labelled clean images that `load_images` reads.", "", group="data")
    output_dir: str = described(
        "Folder of the cells, the table and the plot.", "runs/evaluation", group="saving and logging"
    )
    corruptions: str = described("Names separated by commas, by default ImageNet-C's fifteen.", ",".join(CORRUPTIONS))
    severities: str = described("From 1 to 5, separated by commas.", "1,2,3,4,5")
    first_sample: int = described("Index of the first image that is used.", 0, group="data")
    max_samples: int | None = described("How many images are used, by default all.", group="data")
    batch_size: int = described("Images at a time.", 50)
    stream_batch_size: int = described("Images that arrive together for the weight-adapting baselines.", 50)
    tent_learning_rate: float = described("Tent's learning rate.", 1e-3)
    seed: int = described("Seed of corruptions and adaptation.", 0)
    mixed_precision: str = described("Precision of the networks: no, fp16 or bf16.", "no")

    def __post_init__(self) -> None:
        check_types(self)
        known = (*CORRUPTIONS, *EXTRA_CORRUPTIONS)
        for name in self.corruptions.split(","):
            require(name in known, "corruptions", name, f"names from {list(known)}")
        for severity in self.severities.split(","):
            require(severity in tuple("12345"), "severities", severity, "numbers from 1 to 5")
        for name in ("batch_size", "stream_batch_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "an integer >= 1")
        require(self.first_sample >= 0, "first_sample", self.first_sample, "an integer >= 0")
        require(self.max_samples is None or self.max_samples >= 1, "max_samples", self.max_samples, "an integer >= 1")
        require(self.tent_learning_rate > 0, "tent_learning_rate", self.tent_learning_rate, "a number > 0")
        require(self.seed >= 0, "seed", self.seed, "an integer >= 0")

    def cells(self) -> list[tuple[str, int]]:
        """Returns the conditions, clean first."""
        severities = [int(s) for s in self.severities.split(",")]
        return [("clean", 0)] + [(name, s) for name in self.corruptions.split(",") for s in severities]


def _clean(config: EvaluateConfig, size: int, channels: int) -> tuple[np.ndarray, torch.Tensor, list[int]]:
    """Returns readable images `(n, size, size[, 3])` uint8, their labels and their indices."""
    data: Any = load_images(train_data_dir=config.data_dir, resolution=size, channels=channels, center_crop=True)
    if not data.num_classes:
        raise ValueError(f"`data_dir` must hold labelled images, got {config.data_dir!r} without labels.")
    last = len(data) if config.max_samples is None else min(len(data), config.first_sample + config.max_samples)
    require(config.first_sample < len(data), "first_sample", config.first_sample, f"less than {len(data)}")
    images, labels, kept, asked = [], [], [], range(config.first_sample, last)
    for i in asked:
        try:
            item = data.get(i)
        except ValueError as error:
            logger.warning("skipped: %s", error)
            continue
        images.append(np.asarray(to_pil(item["pixel_values"][None])[0]))
        labels.append(item["label"])
        kept.append(i)
    if len(kept) < len(asked):
        logger.warning("%d of %d images could not be read and were skipped", len(asked) - len(kept), len(asked))
    if not kept:
        raise ValueError(f"`data_dir` must hold images that can be read, got {config.data_dir!r} with none.")
    return np.stack(images), torch.tensor(labels), kept


def _pixels(images: np.ndarray) -> torch.Tensor:
    tensor = torch.from_numpy(images).float() / 127.5 - 1
    return tensor[:, None] if tensor.ndim == 3 else tensor.permute(0, 3, 1, 2)


@torch.no_grad()
def _cell(
    pipeline: SDATTAPipeline,
    images: torch.Tensor,
    labels: torch.Tensor,
    indices: list[int],
    config: EvaluateConfig,
    stream_key: int,
) -> dict[str, np.ndarray]:
    """Adapts the images of one condition once and returns the logits of every view, and of the baselines."""
    settings, device = align_settings(pipeline.config["alignment"]), pipeline._execution_device
    low_pass = LowPass(pipeline.unet.config.sample_size, settings.factor, device)
    source, processor = pipeline._classifier("classifier"), pipeline.image_processor
    tuned = pipeline._classifier("adapted_classifier") or source
    found: dict[str, list[torch.Tensor]] = {"sx": [], "sa": [], "fx": [], "fa": [], "adapted": []}
    for first in range(0, len(images), config.batch_size):
        part = slice(first, first + config.batch_size)
        x = images[part].to(device)
        generators = sample_generators(config.seed, indices[part])
        adapted = align(pipeline.unet, pipeline.scheduler, x, settings, generator=generators, low_pass=low_pass)
        for key, classifier, view in (
            ("sx", source, x),
            ("sa", source, adapted),
            ("fx", tuned, x),
            ("fa", tuned, adapted),
        ):
            found[key].append(classify(classifier, view, processor).cpu())
        found["adapted"].append(((adapted + 1) * 127.5).round().byte().cpu())
    cell = {key: torch.cat(values) for key, values in found.items()}
    has_norms = isinstance(source, nn.Module) and any(
        isinstance(m, nn.modules.batchnorm._BatchNorm) for m in source.modules()
    )
    for stream in STREAMS if has_norms else ():
        order = stream_order(stream, labels, stream_key)
        size = 1 if stream == "single" else config.stream_batch_size
        for method in ("bn", "tent"):
            logits = stream_logits(
                source, images[order].to(device), method, size, config.tent_learning_rate, processor
            )
            cell[f"{method}_{stream}"] = torch.empty_like(logits).index_copy_(0, order.to(device), logits).cpu()
    return {key: value.numpy() for key, value in cell.items()}


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluates a pipeline, or does the conditions that are missing; see `EvaluateConfig`.

    Each condition is one file in `cells/`, with all logits and the adapted images in 8 bits, so that nothing is done
    twice; `results.json`, `table.md` and `accuracies.png` are made from them. Start processes with `torchrun`; they
    share the conditions. DDA and SDA share one adaptation. Images that cannot be read are named in the log and
    skipped, with a count.

    Returns:
        `accuracy`: for each method and condition the percentage of right labels, `mean` over all corruptions and
        severities; `standard_error` of each condition; the number of `images`.

    Raises:
        ValueError: the data has no labels or other classes than the classifier, or the folder holds an evaluation
            with other settings.
    """
    state = process_state()
    pipeline = load_pipeline(config.pretrained_model_name_or_path, config.mixed_precision, state.device)
    if not isinstance(pipeline, SDATTAPipeline):
        raise ValueError(
            "`pretrained_model_name_or_path` must be an SDATTAPipeline, got "
            f"{type(pipeline).__name__}: `diffusers-ext train sda_classifier` writes one."
        )
    folder = Path(config.output_dir)
    # Corruptions and severities may be added to.
    free = ("output_dir", "batch_size", "corruptions", "severities")
    check_settings(folder, {k: v for k, v in asdict(config).items() if k not in free})
    (folder / "cells").mkdir(exist_ok=True)
    clean, labels, indices = _clean(config, pipeline.unet.config.sample_size, pipeline.unet.config.in_channels)
    with torch.no_grad():
        probe = _pixels(clean[:1]).to(pipeline._execution_device)
        classes = classify(pipeline._classifier("classifier"), probe, pipeline.image_processor).shape[1]
    highest = int(labels.max())
    if highest >= classes:
        raise ValueError(f"`data_dir` must have the classifier's {classes} classes, got label {highest}.")
    mine = [
        (number, cell)
        for number, cell in enumerate(config.cells())
        if number % state.num_processes == state.process_index and not _path(folder, *cell).is_file()
    ]
    for number, (name, severity) in tqdm(mine, desc="evaluating", unit="cell", disable=not state.is_main_process):
        images = (
            clean
            if name == "clean"
            else np.stack(
                [
                    corrupt(image, name, severity, mix(config.seed, CORRUPTION, i))
                    for image, i in zip(clean, indices, strict=True)
                ]
            )
        )
        cell = _cell(pipeline, _pixels(images), labels, indices, config, number)
        path = _path(folder, name, severity)
        partial = path.with_name(f".{os.getpid()}.tmp.npz")
        np.savez_compressed(partial, **{"labels": labels.numpy(), **cell})  # type: ignore[arg-type]
        partial.replace(path)
    state.wait_for_everyone()
    results = summarise(folder, config)
    if state.is_main_process:
        _report(folder, config, results)
    return results


def _path(folder: Path, name: str, severity: int) -> Path:
    return folder / "cells" / (f"{name}.npz" if name == "clean" else f"{name}-{severity}.npz")


def summarise(folder: Path, config: EvaluateConfig) -> dict[str, Any]:
    """Returns the accuracies of finished cells; see `evaluate`."""
    accuracy: dict[str, dict[str, float]] = {}
    count = 0
    for name, severity in config.cells():
        cell = np.load(_path(folder, name, severity))
        labels, count = cell["labels"], len(cell["labels"])
        single = [k for k in cell.files if k.startswith(("bn_", "tent_"))]
        for method, parts in {**METHODS, **{k: (k,) for k in single}}.items():
            right = np.sum([cell[p] for p in parts], 0).argmax(1) == labels
            key = name if name == "clean" else f"{name}-{severity}"
            accuracy.setdefault(method, {})[key] = 100 * float(right.mean())
    error = {
        method: {k: math.sqrt(v * (100 - v) / count) for k, v in values.items()} for method, values in accuracy.items()
    }
    for values in accuracy.values():
        values["mean"] = float(np.mean([v for k, v in values.items() if k != "clean"]))
    return {"images": count, "accuracy": accuracy, "standard_error": error}


def by_corruption(values: dict[str, float], config: EvaluateConfig) -> dict[str, float]:
    """Averages a method's accuracies over severities: clean, each corruption, and the mean."""
    severities, names = config.severities.split(","), config.corruptions.split(",")
    rows = {name: float(np.mean([values[f"{name}-{s}"] for s in severities])) for name in names}
    return {"clean": values["clean"], **rows, "mean": values["mean"]}


def _report(folder: Path, config: EvaluateConfig, results: dict[str, Any]) -> None:
    """Writes the JSON, the table and, where matplotlib is installed, the plot."""
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    methods = list(results["accuracy"])
    rows = {method: by_corruption(results["accuracy"][method], config) for method in methods}
    conditions = list(rows[methods[0]])
    lines = ["| accuracy, % | " + " | ".join(methods) + " |", "|---|" + "---|" * len(methods)]
    lines += [f"| {c} | " + " | ".join(f"{rows[m][c]:.1f}" for m in methods) + " |" for c in conditions]
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    try:
        import matplotlib
    except ImportError:
        logger.warning("no accuracies.png: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(11, 3.6), constrained_layout=True)
    for i, method in enumerate(("source", "dda", "sda")):
        axes.bar(
            np.arange(len(conditions)) + 0.27 * (i - 1), [rows[method][c] for c in conditions], 0.27, label=method
        )
    axes.set_xticks(range(len(conditions)), [c.replace("_", "\n") for c in conditions], fontsize=7)
    axes.set(ylabel="accuracy, %", ylim=(0, 100))
    axes.legend(fontsize=8, ncols=3)
    figure.savefig(folder / "accuracies.png", dpi=90)
    plt.close(figure)
