"""A pipeline quantized from end to end: sample, calibrate, quantize, measure, save, push."""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import get_token
from PIL import Image

from diffusers_ext.data.sources import load_images
from diffusers_ext.hub.card import RepoCard, default_snippet
from diffusers_ext.hub.loading import checked_folder
from diffusers_ext.hub.repo import push_repo, save_repo
from diffusers_ext.metrics.features import extract_features, feature_extractor
from diffusers_ext.metrics.frechet import frechet_distance
from diffusers_ext.metrics.kernel import kernel_distance
from diffusers_ext.training.callbacks import image_grid
from diffusers_ext.training.config import check_hub_id, check_types, described, require

from .calibration import Calibration, batch_arguments, collect_calibration, network_name
from .config import COMPUTE, QDiffConfig
from .convert import convert_qdiffusion_checkpoint
from .quantizer import convertible
from .reconstruct import quantize_model

__all__ = ["QDiffusionConfig", "prediction_error", "quantize_pipeline"]

logger = logging.getLogger(__name__)

ROWS = 16  # states in a call of the network that is measured
HELD_OUT = 1_000_000  # added to the seed: samples that nothing was calibrated on


@dataclass
class QDiffusionConfig:
    """Arguments of `quantize_pipeline`.

    Raises:
        ValueError: an argument is outside its range, or two contradict each other.
    """

    pretrained_model_name_or_path: str = described("Pipeline: Hub repo or folder.", "", "model")
    original_checkpoint: str | None = described(
        "Checkpoint of the Q-Diffusion repository, to be converted instead of calibrating.", None, "model"
    )
    weight_bits: int = described("Bits of weights, 2..8.", 4)
    act_bits: int | None = described("8 quantizes activations too.")
    scale_method: Literal["max", "mse"] = described("How ranges are found.", "mse")
    act_symmetric: bool = described("Symmetric grids for activations.", False)
    split_shortcuts: bool = described("Grids of their own for the two inputs of a UNet's shortcuts over skips.", True)
    quantize_attention: bool = described("Quantize query, key, value and probabilities too.", False)
    compute: str = described(f"One of {', '.join(COMPUTE)}.", "auto")
    modules_to_not_convert: str | None = described("Layers left as they are, separated by commas.")
    prompts: str | None = described("File of prompts or class labels, a line each.", group="data")
    train_data_dir: str | None = described(
        "Real images to measure the distance to; else to the model's own.", None, "data"
    )
    num_samples: int = described("Samples to calibrate on.", 256, "data")
    num_timesteps: int = described("Timesteps kept of each.", 20, "data")
    num_inference_steps: int = described("Steps of the sampler, as you will use it.", 50, "data")
    guidance_scale: float | None = described("As you will use it.", None, "data")
    sample_batch_size: int = described("Samples in a call of the pipeline.", 16, "data")
    granularity: Literal["block", "layer"] = described("What is rounded together.", "block")
    iters: int = described("Updates of the rounding for each unit; 0 rounds to nearest.", 2000, "optimisation")
    learning_rate: float = described("Of the rounding.", 1e-2, "optimisation")
    act_iters: int = described("Updates of the steps of activations.", 500, "optimisation")
    act_momentum: float | None = described(
        "Of running ranges of activations over all states, 0.95 in the original; else they are of 64 states.",
        None,
        "optimisation",
    )
    train_batch_size: int = described("States in an update.", 32, "optimisation")
    seed: int = described("Of the samples and of the updates.", 0, "optimisation")
    device: str = described("Where it runs.", "cpu", "optimisation")
    output_dir: str = described(
        "Folder of the finished repo; what is under way is in its cache/.", "runs/qdiff", "saving and logging"
    )
    num_evaluation_images: int = described("Images behind the distances; 0 measures none.", 256, "saving and logging")
    features: str = described(
        "What distances are measured in: pixels, inception, clip:REPO or classifier:REPO.",
        "pixels",
        "saving and logging",
    )
    push_to_hub: bool = described("Push the finished folder to the Hub.", False, "sharing")
    hub_model_id: str | None = described("Repo to push to, 'organisation/name'.", None, "sharing")
    hub_private_repo: bool = described("Make that repo private when it is created.", False, "sharing")

    def __post_init__(self) -> None:
        require(self.pretrained_model_name_or_path != "", "pretrained_model_name_or_path", "", "a Hub repo or folder")
        check_types(self)
        for name, least in (
            ("num_samples", 1),
            ("num_timesteps", 2),
            ("num_inference_steps", 2),
            ("sample_batch_size", 1),
            ("train_batch_size", 1),
            ("iters", 0),
            ("act_iters", 0),
            ("seed", 0),
            ("num_evaluation_images", 0),
        ):
            require(getattr(self, name) >= least, name, getattr(self, name), f"an integer >= {least}")
        require(self.num_evaluation_images != 1, "num_evaluation_images", 1, "0 or at least 2")
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "a number > 0")
        momentum = self.act_momentum
        require(momentum is None or 0 < momentum < 1, "act_momentum", momentum, "a number in (0, 1)")
        most = f"at most the {self.num_inference_steps} `num_inference_steps`"
        require(self.num_timesteps <= self.num_inference_steps, "num_timesteps", self.num_timesteps, most)
        for name in ("original_checkpoint", "prompts", "train_data_dir"):
            path = getattr(self, name)
            require(path is None or Path(path).exists(), name, path, "an existing file or folder")
        source, output = Path(self.pretrained_model_name_or_path), Path(self.output_dir)
        require(source.resolve() != output.resolve(), "output_dir", self.output_dir, "another folder than the model's")
        self.quantizer()
        if self.push_to_hub:
            check_hub_id(self.hub_model_id)
            if get_token() is None:
                raise ValueError("`push_to_hub` must be False without a login; log in with `hf auth login`.")

    def quantizer(self) -> QDiffConfig:
        """Returns the quantizer's own configuration."""
        names = self.modules_to_not_convert
        return QDiffConfig(
            weight_bits=self.weight_bits,
            act_bits=self.act_bits,
            scale_method=self.scale_method,
            act_symmetric=self.act_symmetric,
            split_shortcuts=self.split_shortcuts,
            quantize_attention=self.quantize_attention,
            modules_to_not_convert=None if names is None else [name.strip() for name in names.split(",")],
            compute=self.compute,
        )

    def call(self, pipeline: Any) -> dict[str, Any]:
        """Returns the arguments of the pipeline's call."""
        arguments: dict[str, Any] = {"num_inference_steps": self.num_inference_steps}
        if self.guidance_scale is not None:
            arguments["guidance_scale"] = self.guidance_scale
        if self.prompts is not None:
            lines = [line.strip() for line in Path(self.prompts).read_text().splitlines() if line.strip()]
            require(bool(lines), "prompts", self.prompts, "a file with at least one line")
            if hasattr(pipeline, "encode_prompt"):
                arguments["prompt"] = lines
            else:
                numbers = all(line.isdigit() for line in lines)
                require(numbers, "prompts", self.prompts, "a file of class labels for a pipeline without text")
                arguments["class_labels"] = [int(line) for line in lines]
        return arguments


def quantize_pipeline(config: QDiffusionConfig) -> Path:
    """Quantizes a pipeline's network and writes the pipeline as a complete repo.

    Calibration and every finished unit are stored under `output_dir/cache`: a run that was stopped goes on there. What
    was measured stands in `results.json` and on the card: the error of the prediction on states of other samples, and
    distances of samples before and after.

    Args:
        config: the arguments.

    Returns:
        The folder.

    Raises:
        ValueError: an argument does not fit the pipeline.
    """
    pipeline = _load(config)
    call, cache = config.call(pipeline), Path(config.output_dir) / "cache"
    name = network_name(pipeline)
    network = getattr(pipeline, name)
    convertible(network, config.quantizer().modules_to_not_convert)  # before anything is sampled
    collecting = {"num_timesteps": config.num_timesteps, "batch_size": config.sample_batch_size, **call}
    if config.original_checkpoint is not None:
        quantized = convert_qdiffusion_checkpoint(config.original_checkpoint, network, config.quantizer())
    else:
        states = collect_calibration(
            pipeline, config.num_samples, output_dir=cache / "states", seed=config.seed, **collecting
        )
        quantized = quantize_model(
            network,
            states,
            config.quantizer(),
            iters=config.iters,
            lr=config.learning_rate,
            act_iters=config.act_iters,
            batch_size=config.train_batch_size,
            granularity=config.granularity,
            seed=config.seed,
            act_momentum=config.act_momentum,
            output_dir=cache / "units",
        )
    held_out = collect_calibration(
        pipeline, config.sample_batch_size, output_dir=cache / "held_out", seed=config.seed + HELD_OUT, **collecting
    )
    results: dict[str, Any] = {
        "relative error of the prediction on held-out states": prediction_error(quantized, network, held_out),
        "bytes of the network, of those before": quantized.get_memory_footprint() / network.get_memory_footprint(),
    }
    after = copy.copy(pipeline)
    setattr(after, name, quantized)
    sample = None
    if config.num_evaluation_images:
        found, sample = _distances(pipeline, after, config, call)
        results |= found
    pipeline.register_modules(**{name: quantized})
    folder = save_repo(pipeline, config.output_dir, card=_card(config, pipeline, results), sample=sample)
    logger.info("%s", json.dumps(results, indent=1))
    if config.push_to_hub:
        assert config.hub_model_id is not None
        push_repo(folder, config.hub_model_id, private=config.hub_private_repo or None)
    return folder


def _load(config: QDiffusionConfig) -> Any:
    import diffusers_ext  # noqa: F401 - makes our pipelines known

    source = config.pretrained_model_name_or_path
    try:
        pipeline: Any = DiffusionPipeline.from_pretrained(checked_folder(DiffusionPipeline, source))
    except Exception as error:  # the libraries raise many kinds
        raise ValueError(
            f"`pretrained_model_name_or_path` must be a pipeline's Hub repo or folder, got {source!r}: {error}"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(config.device)


@torch.no_grad()
def prediction_error(quantized: Any, network: Any, states: Calibration) -> float:
    """Returns the mean squared difference of two networks' outputs over the mean square of the second's.

    Args:
        quantized: the network that is measured.
        network: the original.
        states: recorded calls, best of samples that were not calibrated on.

    Example:
        >>> prediction_error(quantized, pipe.unet, held_out)  # doctest: +SKIP
    """
    device, difference, size = next(network.parameters()).device, 0.0, 0.0
    for call in states.calls:
        given = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in call.items()}
        found, wanted = (_tensors(m(**given, return_dict=False)[0]) for m in (quantized, network))
        for a, b in zip(found, wanted, strict=True):
            difference += (a.float() - b.float()).square().sum().item()
            size += b.float().square().sum().item()
    return difference / size


def _tensors(output: Any) -> list[torch.Tensor]:
    return list(output) if isinstance(output, list | tuple) else [output]


def _distances(
    before: Any, after: Any, config: QDiffusionConfig, call: dict[str, Any]
) -> tuple[dict[str, float], Image.Image]:
    """Returns Frechet and kernel distances, of samples from the same noise, and a picture of those after."""
    features = feature_extractor(config.features, config.device)
    count, drawn = config.num_evaluation_images, {}
    for title, pipeline in (("before", before), ("after", after)):
        parts = []
        for start in range(0, count, config.sample_batch_size):
            size = min(config.sample_batch_size, count - start)
            arguments = batch_arguments(pipeline, call, start, size)
            arguments["output_type"] = "pt"
            arguments["generator"] = torch.Generator().manual_seed(config.seed + HELD_OUT + start)
            parts.append(pipeline(**arguments).images.float().cpu() * 2 - 1)
        drawn[title] = torch.cat(parts)
    own = {title: extract_features(images, features) for title, images in drawn.items()}
    shown = drawn["after"][:16].permute(0, 2, 3, 1).add(1).mul(127.5).round().clamp(0, 255).byte().squeeze(-1).numpy()
    picture = image_grid([Image.fromarray(pixels) for pixels in shown])
    if config.train_data_dir is None:
        return {
            "Frechet distance to the samples before": frechet_distance(own["after"], own["before"]),
            "kernel distance to the samples before": kernel_distance(own["after"], own["before"]),
        }, picture
    size, channels = drawn["after"].shape[-1], drawn["after"].shape[1]
    data: Any = load_images(train_data_dir=config.train_data_dir, resolution=size, center_crop=True, channels=channels)
    real = torch.stack([data[i]["pixel_values"] for i in range(min(len(data), count))])
    reference = extract_features(real, features)
    found = {}
    for title in ("before", "after"):
        found[f"Frechet distance to real images, {title}"] = frechet_distance(own[title], reference)
        found[f"kernel distance to real images, {title}"] = kernel_distance(own[title], reference)
    return found, picture


def _card(config: QDiffusionConfig, pipeline: Any, results: dict[str, Any]) -> RepoCard:
    bits = f"{config.weight_bits}-bit weights" + (", 8-bit activations" if config.act_bits else "")
    call = config.call(pipeline)
    said = next((f"{k}={v[0]!r}" for k, v in call.items() if k in ("prompt", "class_labels")), "")
    return RepoCard(
        method=f"{Path(config.pretrained_model_name_or_path).name} in {bits}",
        description=f"Quantized by Q-Diffusion: {bits}, rounding learned on the model's own samples.",
        base_model=config.pretrained_model_name_or_path,
        tags=["q-diffusion", "quantized"],
        paper="[Q-Diffusion: Quantizing Diffusion Models](https://arxiv.org/abs/2302.04304)",
        arguments={k: v for k, v in asdict(config).items() if k not in ("device", "hub_model_id")},
        results=results,
        snippet=default_snippet(True, False, f"{said}, num_inference_steps={config.num_inference_steps}".lstrip(", ")),
        notes=[
            "Needs `import diffusers_ext` before it is loaded: without it Diffusers says 'Unknown quantization type'."
        ],
        pipeline_tag="text-to-image" if "prompt" in call else "unconditional-image-generation",
    )
