"""Learning a camera's noise: frames with the cap on are taken apart, and the noise of pixels is learned."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw
from scipy.optimize import nnls
from tqdm.auto import tqdm

from diffusers_ext.hub.card import RepoCard
from diffusers_ext.training.config import LRSchedule, TrainConfig, described, require
from diffusers_ext.training.recipe import Context, Modules, Recipe, StepOutput

from .camera import CAMERAS, CameraProfile, NativeGain, check_levels, gain_at, native_branch
from .dark_data import ResidualSamples, noise_divergence
from .dark_model import DarkFrameModel
from .decouple import decouple_dark_frames
from .losses import DistributionLoss
from .noise_pipeline import SensorNoisePipeline
from .numbers import numbers
from .proxy import SensorNoiseProxy
from .raw_files import RawImage, frames_by_iso, read_frames, read_raw

__all__ = ["PNNPNoiseConfig", "PNNPNoiseRecipe", "gaussian_start"]

SNIPPET = """import diffusers_ext  # pip install diffusers-ext
from diffusers import DiffusionPipeline

noise = DiffusionPipeline.from_pretrained("{repo_id}")
frames = noise(iso=ISO, num_frames=4).frames  # (4, height, width), uint16
synthesizer = noise.synthesizer()  # clean packed raw images -> noisy ones"""


@dataclass
class PNNPNoiseConfig(TrainConfig):
    """Arguments of learning a camera's noise beside the engine's.

    Raises:
        ValueError: an argument is outside its range, or two contradict each other.
    """

    dark_frames_dir: str = described(
        "Folder of frames with the cap on, at least two of each of two ISOs: a folder for each ISO, named by it, or "
        "files of a camera that say it; .npy, .tif, or with the extra `raw` DNG, NEF, ARW ...",
        "",
        group="data",
    )
    flat_frames_dir: str | None = described(
        "Folder of frames of an even surface, likewise: two of each of at least two levels of light, one after the "
        "other by their names. The gain is measured from them.",
        group="data",
    )
    camera: Literal["sony_a7s2", "imx686"] | None = described(
        "Take gain, levels and native gains of a known camera.", group="data"
    )
    iso_to_gain: str | None = described(
        "'k1,k0' of K = k1 ISO + k0, DN per electron, where it is known.", group="data"
    )
    black_level: float | None = described("In DN; by default as the files or the camera say.", group="data")
    white_level: float | None = described("In DN; likewise.", group="data")
    native_limits: str | None = described(
        "Highest ISO of every native gain but the last, such as '1600'; by default the camera's, or one.", group="data"
    )
    hidden_channels: int = described("Channels of the two networks.", 16, group="model")
    num_blocks: int = described("Residual blocks of each.", 2, group="model")
    num_values: int = described("Pixels of a sample.", 16384)
    num_points: int = described("Points of each of the two distances.", 1000)
    quantile_weight: float = described("Weight of the distance of quantiles.", 1.0)
    cdf_weight: float = described("Weight of the distance of distribution functions.", 1.0)
    train_batch_size: int = described("Samples per process and micro-step, each of one ISO.", 1)
    learning_rate: float = described("Peak learning rate.", 2e-3)
    lr_scheduler: LRSchedule = described("Course of the learning rate over the updates.", "cosine")
    lr_warmup_steps: int = described("Updates of linear warm-up; 'constant' has none.", 0)
    adam_weight_decay: float = described("Weight decay.", 0.0)
    ema_decay: float = described("Largest decay of the average.", 0.99)
    num_validation_images: int = described("Draw histograms if it is not 0.", 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_values", "num_points"):
            require(getattr(self, name) >= 2, name, getattr(self, name), "an integer >= 2")
        DistributionLoss(self.num_points, self.quantile_weight, self.cdf_weight)
        SensorNoiseProxy(self.hidden_channels, self.num_blocks)
        sources = {name: getattr(self, name) for name in ("flat_frames_dir", "camera", "iso_to_gain")}
        gains = [name for name, value in sources.items() if value is not None]
        if not gains or (len(gains) > 1 and gains != ["flat_frames_dir", "camera"]):
            raise ValueError(
                "one of `flat_frames_dir`, `camera` and `iso_to_gain` must be given, for the gain is not in dark "
                f"frames, got {sources}."
            )
        numbers("iso_to_gain", self.iso_to_gain, 2)
        self.limits()

    def limits(self) -> tuple[float, ...]:
        """Returns the highest ISO of every native gain but the last."""
        found = numbers("native_limits", self.native_limits)
        if found is None:
            branches = CAMERAS[self.camera].native_gains if self.camera is not None else ()
            return tuple(branch.iso_max for branch in branches[:-1])
        rising = all(a < b for a, b in zip((0.0, *found), found, strict=False))
        require(rising, "native_limits", self.native_limits, "rising numbers > 0")
        return found


class PNNPNoiseRecipe(Recipe[PNNPNoiseConfig]):
    """Learns a camera's noise from dark frames (PNNP, 2310.09126) and saves a `SensorNoisePipeline`.

    The frames are read once, and taken apart by `decouple_dark_frames`; what that gives is kept in the run's folder.
    The noise of pixels is then learned by the distance of distributions.

    Example:
        >>> from diffusers_ext import PNNPNoiseConfig, PNNPNoiseRecipe, Trainer
        >>> config = PNNPNoiseConfig(dark_frames_dir="darks", camera="sony_a7s2", max_train_steps=1000)
        >>> Trainer(config, PNNPNoiseRecipe(config)).train()  # doctest: +SKIP
    """

    Config = PNNPNoiseConfig
    sample_name = "samples"

    def dataset(self, ctx: Context[PNNPNoiseConfig]) -> ResidualSamples:
        """Reads the frames, or what an earlier start of the run found in them."""
        with ctx.accelerator.main_process_first():
            self._read(ctx.accelerator.is_main_process)
        return ResidualSamples(self.dark, self.config.num_values)

    def _read(self, bar: bool) -> None:
        config = self.config
        frames = frames_by_iso(config.dark_frames_dir, "dark_frames_dir")
        flats = {} if config.flat_frames_dir is None else frames_by_iso(config.flat_frames_dir, "flat_frames_dir")
        first = read_raw(next(iter(frames.values()))[0])
        known = CAMERAS.get(config.camera or "")
        levels = []
        for name in ("white_level", "black_level"):
            found = [getattr(source, name) for source in (config, first, known) if source is not None]
            level = next((value for value in found if value is not None), None)
            require(level is not None, name, None, "given: neither files nor camera say it")
            levels.append(float(level or 0))
        white, black = levels
        check_levels(white, black)
        state = {"frames": {iso: [str(p) for p in paths] for iso, paths in (*frames.items(), *flats.items())},
                 "black": black, "limits": config.limits(), "seed": config.seed}  # fmt: skip
        name = hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]
        folder = Path(config.output_dir) / "cache" / f"dark-{name}"
        if not (folder / "config.json").is_file():
            self._decouple(frames, flats, black, bar).save_pretrained(folder)
        self.dark = DarkFrameModel.from_pretrained(folder)
        gain = self.dark.config.iso_to_gain or numbers("iso_to_gain", config.iso_to_gain, 2)
        gain = gain or (known.iso_to_gain if known is not None else None)
        assert gain is not None
        isos, limits = list(self.dark.config.isos), self.dark.config.native_limits
        groups: dict[int, list[float]] = {}
        for iso in isos:
            gain_at((gain[0], gain[1]), iso)
            groups.setdefault(native_branch(iso, limits), []).append(iso)
        ranges = tuple(NativeGain(min(group), max(group)) for group in groups.values())
        self.camera = CameraProfile(white, black, (gain[0], gain[1]), ranges)

    def _decouple(
        self, frames: dict[float, list[Path]], flats: dict[float, list[Path]], black: float, bar: bool
    ) -> DarkFrameModel:
        seen: list[RawImage] = []
        count = sum(map(len, frames.values())) + sum(map(len, flats.values()))
        with tqdm(total=count, desc="reading frames", unit="frame", disable=not bar) as progress:

            def counted(paths: Sequence[Path], first: list[RawImage]) -> Any:
                for frame in read_frames(paths, first):
                    progress.update()
                    yield frame

            def pairs(paths: Sequence[Path]) -> Any:
                require(len(paths) % 2 == 0, "flat_frames_dir", len(paths), "an even number of frames at each ISO")
                for i in range(0, len(paths), 2):
                    yield tuple(read_raw(path).pixels for path in paths[i : i + 2])
                    progress.update(2)

            return decouple_dark_frames(
                {iso: counted(paths, seen) for iso, paths in frames.items()},
                {iso: pairs(paths) for iso, paths in flats.items()} or None,
                black_level=black,
                native_limits=self.config.limits(),
                seed=self.config.seed,
            )

    def setup(self, ctx: Context[PNNPNoiseConfig]) -> Modules:
        """Makes the two networks, which begin as the Gaussian that fits best."""
        config, dark = self.config, self.dark
        gain = self.camera.iso_to_gain
        proxy = SensorNoiseProxy(config.hidden_channels, config.num_blocks, gain, tuple(dark.config.isos))
        proxy.start_at(*gaussian_start(dark, gain))
        self.loss = DistributionLoss(config.num_points, config.quantile_weight, config.cdf_weight)
        return Modules(proxy, None)

    def training_step(self, batch: dict[str, Any], ctx: Context[PNNPNoiseConfig]) -> StepOutput:
        """Compares as much noise of the model with a sample of what was recorded.

        Recorded values were rounded, so that the model's are rounded too, which noise in [-0.5, 0.5] stands for; both
        sides get as much again, for whole numbers have no smooth distribution.
        """
        real = batch["noise"]
        with torch.no_grad():
            z1, z2 = ctx.rng.randn_like(torch.stack([real, real], 1), ctx.ids).unbind(1)
        model = ctx.model(z1, z2, batch["iso"])
        generator = ctx.rng.generator("augmentation", real.device)
        if self.dark.config.rounded:
            u = torch.rand((3, *real.shape), generator=generator, device=real.device) - 0.5
            model, real = model + u[0] + u[1], real + u[2]
        loss = self.loss(model, real, generator)
        return StepOutput(loss)

    # -- results ---------------------------------------------------------------------------------------------------

    def pipeline(self, modules: Modules) -> SensorNoisePipeline:
        """Returns the pipeline."""
        return SensorNoisePipeline(modules.trainable, self.dark, self.camera.to_dict())

    def _noise(self, pipeline: Any, iso: float, generator: torch.Generator) -> torch.Tensor:
        """Draws rounded noise of pixels."""
        noise = pipeline.proxy.sample((1, self.dark.residuals.shape[1]), iso, generator)[0].cpu()
        return noise.round() if self.dark.config.rounded else noise

    def figures(self, pipeline: DiffusionPipeline, generator: torch.Generator) -> dict[str, float]:
        """Compares deviation and histogram of the model's noise with what was recorded, at each ISO."""
        figures = {}
        for iso, real in zip(self.dark.config.isos, self.dark.residuals, strict=True):
            noise = self._noise(pipeline, iso, generator)
            figures[f"deviation over the recorded one, ISO {iso:g}"] = float(noise.std() / real.std())
            figures[f"divergence from the recorded noise, ISO {iso:g}"] = noise_divergence(real, noise)
        return figures

    def validate(self, pipeline: DiffusionPipeline, generator: torch.Generator) -> list[Image.Image]:
        """Draws histograms of recorded and learned noise, one picture for each ISO, counts in logarithms."""
        isos, residuals = self.dark.config.isos, self.dark.residuals
        return [
            _histograms(f"ISO {iso:g}", real, self._noise(pipeline, iso, generator))
            for iso, real in zip(isos, residuals, strict=True)
        ]

    def card(self) -> RepoCard:
        """Returns the card."""
        isos = self.dark.config.isos
        return RepoCard(
            method="PNNP sensor noise",
            description=f"Draws a camera's dark frames, and makes noisy raw images from clean ones, at ISO "
            f"{isos[0]:g} to {isos[-1]:g}: the noise was learned from frames with the cap on.",
            data=f"Frames of {self.config.dark_frames_dir}.",
            tags=["diffusers-ext", "raw-images", "noise-model"],
            paper="https://arxiv.org/abs/2310.09126",
            snippet=SNIPPET.replace("ISO", f"{isos[len(isos) // 2]:g}"),
        )


def gaussian_start(dark: DarkFrameModel, iso_to_gain: tuple[float, float]) -> tuple[float, float]:
    """Returns a, in electrons, and b, in DN, both above 0, for which (K a)^2 + b^2 fits the variances best."""
    gains = np.array([gain_at(iso_to_gain, iso) for iso in dark.config.isos])
    variance = np.maximum(dark.pixel_std.numpy().astype(np.float64) ** 2, 1e-6)
    found, _ = nnls(np.stack([gains**2, np.ones_like(gains)], 1) / variance[:, None], np.ones(len(variance)))
    least = 0.05 * float(np.sqrt(variance.min()))
    return max(float(found[0]) ** 0.5, least / float(gains.max())), max(float(found[1]) ** 0.5, least)


def _histograms(title: str, real: torch.Tensor, model: torch.Tensor, size: int = 256) -> Image.Image:
    """Draws how often noise occurs, in logarithms: recorded as an area, learned as a line."""
    reach = 8 * float(real.std())
    counts = [torch.histc(values.float(), 64, -reach, reach) / values.numel() for values in (real, model)]
    top, low = float(max(c.max() for c in counts)), 1 / real.numel()
    canvas = Image.new("RGB", (size, size), "white")
    pen = ImageDraw.Draw(canvas)
    for index, count in enumerate(counts):
        height = ((count.clamp_min(low) / low).log() / np.log(top / low) * (size - 40)).tolist()
        corners = [(x, size - 1 - h) for j, h in enumerate(height) for x in (j * size / 64, (j + 1) * size / 64)]
        if index == 0:
            pen.polygon([(0, size - 1), *corners, (size - 1, size - 1)], fill="lightgrey")
        else:
            pen.line(corners, fill="crimson", width=2)
    pen.text((4, 2), f"{title}: recorded", fill="dimgrey", font_size=12)
    pen.text((4, 16), "learned", fill="crimson", font_size=12)
    return canvas
