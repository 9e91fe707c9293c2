"""Everything about a model in one call: `diffusers-ext inspect REPO --data FOLDER`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from diffusers_ext.data.sources import load_images
from diffusers_ext.generation.latents import latent_factor
from diffusers_ext.generation.score_field import ScoreField
from diffusers_ext.hub.loading import checked_folder
from diffusers_ext.rng import mix
from diffusers_ext.training.config import check_types, described, require
from diffusers_ext.training.results import check_settings, read_json, write_json

from .dimension import LARGEST, local_dimension, slope_errors
from .draws import default_sigmas, denoising_moments, image_seeds, rows_of
from .gauge import TestFunctions, weak_terms
from .jacobian import probes_at, vector_jacobian
from .likelihood import log_likelihood
from .report import Inspection, summary
from .space import diffused

__all__ = ["InspectConfig", "inspect_model"]

logger = logging.getLogger(__name__)

DEFAULT = "dsm,gauge,asymmetry"
QUANTITIES = ("dsm", "gauge", "asymmetry", "trace", "flipd", "normal_bundle", "lidl", "flow_map", "likelihood")
ASYMMETRY_LEVELS = 3  # sigmas for what needs backward passes by default


@dataclass
class InspectConfig:
    """Arguments of `inspect_model`.

    Raises:
        ValueError: an argument is outside its range.
    """

    repo: str = field(metadata={"help": "Pipeline: Hub repo or folder."})
    data: str = field(metadata={"help": "Images that it was trained on: folder, saved data set, parquet or .npz."})
    output_dir: str = described("Folder of the results; a run that was stopped goes on.", "runs/inspect")
    quantities: str = described(f"Some of {', '.join(QUANTITIES)}, joined by commas.", DEFAULT)
    num_images: int = described("Images from the front of the data.", 32)
    num_sigmas: int = described("Log-spaced noise levels.", 25)
    num_draws: int = described("Noises or probes an image and level.", 32)
    batch_size: int = described("Samples in one call of the network.", 32)
    prompt: str | None = described("Prompt for all images, for a text-to-image pipeline.")
    resolution: int | None = described("Pixels a side; by default the model's own.")
    device: str = described("Where the network runs.", "cpu")
    seed: int = described("Of all draws.", 0)

    def __post_init__(self) -> None:
        check_types(self)
        for name, least in (("num_images", 2), ("num_sigmas", 2), ("num_draws", 2), ("batch_size", 1)):
            require(getattr(self, name) >= least, name, getattr(self, name), f"an integer >= {least}")
        require(self.seed >= 0, "seed", self.seed, "an integer >= 0")
        size = self.resolution
        require(size is None or size >= 1, "resolution", size, "an integer >= 1 or left out")
        unknown = [name for name in self.names if name not in QUANTITIES]
        require(not unknown, "quantities", self.quantities, f"some of {', '.join(QUANTITIES)} joined by commas")
        require(Path(self.data).exists(), "data", self.data, "an existing folder or file")

    @property
    def names(self) -> list[str]:
        """The quantities, each once."""
        return list(dict.fromkeys(name.strip() for name in self.quantities.split(",")))


def inspect_model(config: InspectConfig) -> Inspection:
    """Measures how far a model is from a score, and likelihood and dimension of images, as the quantities ask.

    Each image is measured once, written to `output_dir/images`, and not measured again. The result stands in
    `inspection.json`, `inspection.txt` and `inspection.png` there.

    Args:
        config: the arguments.

    Returns:
        The summary over all images, with a table.

    Raises:
        ValueError: an argument is wrong, or `output_dir` holds another inspection.
    """
    field_, x, pixel = _load(config)
    dim = x[0].numel()
    for name in config.names:
        limit = LARGEST.get(name, dim)
        require(dim <= limit, "quantities", config.quantities, f"without {name!r} above {limit} values, here {dim}")
    sigmas = default_sigmas(field_, config.num_sigmas)
    folder = Path(config.output_dir)
    free = ("output_dir", "device", "batch_size")
    check_settings(folder, {k: v for k, v in asdict(config).items() if k not in free})
    (folder / "images").mkdir(exist_ok=True)
    print_estimate(field_, x, config)
    records = []
    for index in tqdm(range(len(x)), desc="inspecting", unit="image"):
        path = folder / "images" / f"{index:06d}.json"
        record = read_json(path)
        if not {"index", *config.names} <= record.keys():  # missing, or cut by a full disk
            record = measure(field_.select(torch.tensor([index])), x[index : index + 1], index, sigmas, config, pixel)
            write_json(path, record)
        records.append(record)
    found = summary(records, sigmas, dim)
    found.save(folder)
    return found


def _load(config: InspectConfig) -> tuple[ScoreField, torch.Tensor, float]:
    """Returns the field, the images in its space, and the width of a pixel there."""
    try:
        pipe: Any = DiffusionPipeline.from_pretrained(checked_folder(DiffusionPipeline, config.repo))
    except Exception as error:  # the libraries raise many kinds
        accepted = "a Hub repo or a folder of a pipeline"
        raise ValueError(f"`repo` must be {accepted}, got {config.repo!r}: {error}") from error
    try:
        pipe.to(config.device)
    except (RuntimeError, AssertionError) as error:  # no such device, or torch was built without its kind
        raise ValueError(f"`device` must be one that torch finds here, got {config.device!r}: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    unet: Any = getattr(pipe, "unet", None)
    size = config.resolution
    arguments = {"height": size, "width": size} if size is not None else {}
    if config.prompt is not None:
        field_ = ScoreField.from_pipeline(pipe, [config.prompt], **arguments)
        denoiser: Any = field_.model
        probe = denoiser.decode(torch.zeros(denoiser.latents_shape(1), device=denoiser.device))
        data = _images(config, probe.shape[-1], probe.shape[1])
        pixels = torch.stack([item["pixel_values"] for item in data])
        x = torch.cat([denoiser.encode_images(part) for part in pixels.split(config.batch_size)])
        return field_, x, 2 / 256
    if unet is None or hasattr(pipe, "tokenizer"):
        raise ValueError(f"`prompt` must be given for {type(pipe).__name__}, got None.")
    vae = getattr(pipe, "vae", None)
    known = "in_channels" in unet.config and (vae is not None or unet.config.in_channels in (1, 3))
    accepted = "a pipeline whose network denoises grey or colour images, or latents"
    require(known, "repo", f"{config.repo} with {type(pipe).__name__}", accepted)
    channels = unet.config.in_channels if vae is None else vae.config.in_channels
    factor = latent_factor(vae) * 2 ** (len(unet.config.block_out_channels) - 1)
    require(not (size or 0) % factor, "resolution", size, f"a multiple of {factor}: the networks halve it that often")
    data = _images(config, size or unet.config.sample_size * latent_factor(vae), channels)
    kwargs: dict[str, Any] = {}
    if getattr(unet, "class_embedding", None) is not None:
        require("label" in data[0], "data", config.data, "images with class labels for a class-conditional model")
        kwargs = {"class_labels": torch.tensor([item["label"] for item in data], device=config.device)}
    pixels = torch.stack([item["pixel_values"] for item in data])
    x = torch.cat([diffused(pipe, part) for part in pixels.split(config.batch_size)])
    scale = float(pipe.config.get("image_scale") or 1.0)
    return ScoreField.from_pipeline(pipe, **kwargs), x, 2 / 256 * scale


def _images(config: InspectConfig, size: int, channels: int) -> list[dict[str, Any]]:
    data: Any = load_images(
        train_data_dir=config.data,
        resolution=size,
        center_crop=True,
        channels=1 if channels == 1 else 3,
        max_train_samples=config.num_images,
    )
    require(len(data) >= 2, "data", config.data, "at least two images")
    return [data[i] for i in range(len(data))]


def levels_of(sigmas: list[float], count: int) -> list[float]:
    """Returns `count` of the sigmas, from inside their range."""
    steps = [round((k + 1) * (len(sigmas) - 1) / (count + 1)) for k in range(count)]
    return [sigmas[k] for k in sorted(set(steps))]


def measure(
    field_: ScoreField, x: torch.Tensor, index: int, sigmas: list[float], config: InspectConfig, pixel: float
) -> dict[str, Any]:
    """Returns the record of one image, plain types only; it does not depend on the others."""
    few = levels_of(sigmas, ASYMMETRY_LEVELS)
    draws, size = config.num_draws, config.batch_size
    found: dict[str, Any] = {"index": index}

    def generator() -> torch.Generator:  # the same for every quantity: leaving one out does not change the others
        return torch.Generator().manual_seed(mix(config.seed, index))

    seeds = image_seeds(1, generator())
    for name in config.names:
        if name == "dsm":
            moments = [denoising_moments(field_, x, sigma, seeds, draws, size) for sigma in sigmas]
            found["dsm"] = [errors.mean().item() for errors, _ in moments]
            found["slope_error"] = slope_errors(sigmas, torch.stack([errors for errors, _ in moments], 2))[0].tolist()
            found["stein"] = [residuals.mean().item() for _, residuals in moments]
        elif name == "gauge":
            functions = TestFunctions(x[0].numel(), config.seed)
            terms = [weak_terms(field_, x, sigma, functions, seeds, draws, size) for sigma in few]
            found["gauge"] = {
                "sigmas": few,
                "values": [values[0].tolist() for values, _ in terms],
                "norms": [norms[0].tolist() for _, norms in terms],
            }
        elif name == "asymmetry":
            rows = []
            for sigma in few:
                noise = torch.cat([drawn for _, drawn in rows_of(x, seeds, 1, 1)])
                probes = probes_at(field_, field_.add_noise(x, noise, sigma), sigma, seeds, draws, size)
                rows.append([probes.denoiser_squared_asymmetry.item() / 4, probes.denoiser_squared_norm.item()])
            found["asymmetry"] = {"sigmas": few, "parts": rows}
        elif name == "likelihood":
            nats = log_likelihood(field_, x, num_probes=draws, batch_size=size, generator=generator(), bin_width=pixel)
            found["likelihood"] = {
                "nats": nats.nats.item(),
                "standard_error": nats.standard_error.item(),
                "bits_per_dim": nats.bits_per_dim.item(),
                "sigma_min": nats.sigma_min,
            }
        else:
            at = few if name in ("normal_bundle", "lidl") else sigmas
            count = None if name == "normal_bundle" else draws
            method: Any = name
            estimate = local_dimension(field_, x, method, at, count, size, generator())
            found[name] = {"sigmas": at, "curve": estimate.curve[0].tolist()}
    return found


def calls_of(config: InspectConfig, dim: int) -> dict[str, tuple[int, int]]:
    """Returns, by quantity, the rows an image that pass forwards, and those that pass backwards too."""
    levels, few, draws = config.num_sigmas, min(ASYMMETRY_LEVELS, config.num_sigmas), config.num_draws
    every = {
        "dsm": (levels * draws, 0),
        "gauge": (few * draws, 0),
        "asymmetry": (0, few * draws),
        "trace": (0, levels * draws),
        "flipd": (levels, levels * draws),
        "normal_bundle": (few * 8 * dim, 0),
        "lidl": (0, few * 100 * draws),
        "flow_map": (600, (100 + levels) * dim),
        "likelihood": (0, 100 * draws),
    }
    return {name: every[name] for name in config.names}


def print_estimate(field_: ScoreField, x: torch.Tensor, config: InspectConfig) -> float:
    """Times a batch forwards and one backwards and prints how long each quantity will take; returns the seconds."""
    sigma = field_.levels.sigma[len(field_.levels.sigma) // 2].item()
    one, rows = field_.select(torch.tensor([0])), config.batch_size
    batch = x[:1].expand(rows, *x.shape[1:])

    def forwards() -> torch.Tensor:
        with torch.no_grad():
            return one.eps(batch, sigma).cpu()

    def backwards() -> torch.Tensor:
        return vector_jacobian(one, batch, sigma, torch.ones_like(batch))[1].cpu()

    seconds = [_seconds(call) / rows for call in (forwards, backwards)]
    total, parts = 0.0, []
    for name, (forward, backward) in calls_of(config, x[0].numel()).items():
        each = forward * seconds[0] + backward * seconds[1]
        total += each
        parts.append(f"{name} {each:.3g} s")
    logger.warning(
        "about %.3g s for %d images (an image: %s); what is finished is not measured again.",
        total * len(x),
        len(x),
        ", ".join(parts),
    )
    return total * len(x)


def _seconds(call: Callable[[], Any]) -> float:
    call()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
