"""Training of speech enhancement."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from diffusers_ext.hub.card import RepoCard
from diffusers_ext.metrics.speech import dnsmos, estoi, pesq_score, si_sdr
from diffusers_ext.training.config import TrainConfig, described, require
from diffusers_ext.training.networks import make_network
from diffusers_ext.training.recipe import Context, Modules, Recipe, StepOutput

from .data import MixedSpeech, PairedSpeech
from .pipeline import SpeechEnhancementPipeline, as_channels, as_complex
from .scheduler import broadcast
from .scheduler_ouve import OUVEScheduler
from .scheduler_sbve import SBVEScheduler
from .spectrogram import Spectrogram
from .unet import SGMSEUNet2DModel

__all__ = ["SGMSEConfig", "SGMSERecipe", "enhancement_loss"]

SOUND = ("sample_rate", "n_fft", "hop_length", "exponent", "factor")


@dataclass
class SGMSEConfig(TrainConfig):
    """Arguments of speech enhancement beside the engine's; the defaults are the paper's at 16 kHz.

    Raises:
        ValueError: an argument is outside its range, or two contradict each other.
    """

    train_data_dir: str = described(
        "Folder with the folders clean and noisy, whose files have the same names; or of clean speech, to be mixed "
        "with --noise_dir or --reverberation.",
        "",
        group="data",
    )
    noise_dir: str | None = described("Folder of noise to mix with clean speech.", group="data")
    snr_min: float = described("Least SNR of what is mixed, in dB.", -5.0, group="data")
    snr_max: float = described("Largest SNR.", 15.0, group="data")
    reverberation: bool = described("Put clean speech into random rooms.", False, group="data")
    reverberation_min: float = described("Shortest time in which a room decays by 60 dB, in seconds.", 0.2, "data")
    reverberation_max: float = described("Longest such time.", 1.0, "data")
    high_pass: float = described("Take away what is below, in Hz, before speech and noise are mixed.", 0.0, "data")
    validation_data_dir: str | None = described(
        "Folder with clean and noisy to validate on; by default the first files of the training data.", group="data"
    )
    pretrained_model_name_or_path: str | None = described(
        "SpeechEnhancementPipeline to fine-tune, a Hub repo or a folder.", group="model"
    )
    unet_config: str | None = described(
        "JSON file of `SGMSEUNet2DModel` arguments; by default the paper's, of 66 million parameters.", group="model"
    )
    sample_rate: int = described("Sample rate of the model, in Hz.", 16000)
    n_fft: int = described("Window of the spectrogram, in samples.", 510)
    hop_length: int = described("Samples from frame to frame.", 128)
    exponent: float = described("alpha of the spectrogram.", 0.5)
    factor: float = described("beta of the spectrogram.", 0.15)
    num_frames: int = described("Frames of a training sample.", 256)
    process: Literal["ouve", "sbve"] = described("Ornstein-Uhlenbeck process, or Schroedinger bridge.", "ouve")
    theta: float = described("ouve: stiffness.", 1.5)
    sigma_min: float = described("ouve: noise at time 0.", 0.05)
    sigma_max: float = described("ouve: noise at time 1.", 0.5)
    time_min: float = described("Times are uniform between this and 1; where ouve's sampling ends.", 0.03)
    prediction_type: Literal["score", "epsilon", "sample", "mean"] = described(
        "What the network predicts; of sbve it is the sample.", "score"
    )
    algorithm: Literal["pc", "transitions", "heun", "euler"] | None = described(
        "Way back of the saved pipeline: ouve's; by default pc."
    )
    validation_inference_steps: int = described("Sampling steps in validation.", 30)
    num_validation_images: int = described("How many recordings to validate on.", 4, group="saving and logging")
    train_batch_size: int = described("Samples per process and micro-step.", 8, group="optimisation")
    ema_decay: float = described("Largest decay of the average.", 0.999, group="optimisation")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.snr_min <= self.snr_max, "snr_min", self.snr_min, f"at most snr_max, {self.snr_max}")
        require(0 < self.reverberation_min <= self.reverberation_max, "reverberation_min", self.reverberation_min,
                f"a number in (0, reverberation_max], {self.reverberation_max}")  # fmt: skip
        require(self.high_pass >= 0, "high_pass", self.high_pass, "a number >= 0")
        for name in ("num_frames", "validation_inference_steps"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "an integer >= 1")
        require(0 < self.time_min < 1, "time_min", self.time_min, "a number in (0, 1)")
        Spectrogram(*(getattr(self, name) for name in SOUND))
        if self.process == "sbve":
            accepted = "'sample' with process 'sbve'"
            require(self.prediction_type == "sample", "prediction_type", self.prediction_type, accepted)
            require(self.algorithm is None, "algorithm", self.algorithm, "left out with process 'sbve'")
        else:
            self.make_scheduler()
        if self.pretrained_model_name_or_path is not None and self.unet_config is not None:
            raise ValueError("`unet_config` must be left out with `pretrained_model_name_or_path`: it brings its own.")

    def make_scheduler(self) -> OUVEScheduler | SBVEScheduler:
        """Makes the scheduler."""
        if self.process == "sbve":
            return SBVEScheduler()
        return OUVEScheduler(
            theta=self.theta, sigma_min=self.sigma_min, sigma_max=self.sigma_max, sampling_eps=self.time_min,
            prediction_type=self.prediction_type, algorithm=self.algorithm or "pc",
        )  # fmt: skip


def enhancement_loss(
    scheduler: Any, output: torch.Tensor, t: torch.Tensor, x: torch.Tensor, y: torch.Tensor, x0: torch.Tensor,
    noise: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Returns the loss of a network's output, a mean over all coefficients.

    For the clean sample it is |output - x0|^2, else that of the score, |score * std + noise|^2 (2208.05830, eq. 14,
    which is half the sum): 1 of a score of zero.

    Args:
        scheduler: `OUVEScheduler` or `SBVEScheduler`.
        output: complex `(batch, 1, bins, frames)`.
        t: `(batch,)` times.
        x: samples at these times.
        y: recordings.
        x0: clean speech.
        noise: of the samples.
    """
    if scheduler.config["prediction_type"] == "sample":
        return (output - x0).abs().square().mean()
    scaled = scheduler.score(output, t, x, y) * broadcast(scheduler.std(t), x)
    return (scaled + noise).abs().square().mean()


class SGMSERecipe(Recipe[SGMSEConfig]):
    """Trains speech enhancement (2208.05830) and saves a `SpeechEnhancementPipeline`.

    Example:
        >>> from diffusers_ext import SGMSEConfig, SGMSERecipe, Trainer
        >>> config = SGMSEConfig(train_data_dir="voicebank", num_train_epochs=160)
        >>> Trainer(config, SGMSERecipe(config)).train()  # doctest: +SKIP
    """

    Config = SGMSEConfig
    sample_name = "samples"

    def dataset(self, ctx: Context[SGMSEConfig]) -> PairedSpeech | MixedSpeech:
        """Looks at the files: pairs, or clean speech to mix."""
        config, folder = self.config, Path(self.config.train_data_dir)
        require(folder.is_dir(), "train_data_dir", str(folder), "an existing folder")
        self.sound = self._sound()
        mixed = config.noise_dir is not None or config.reverberation
        self.data = self._mixed(folder) if mixed else self._pairs("train_data_dir", folder)
        return self.data

    def _length(self) -> int:
        return (self.config.num_frames - 1) * self.sound.hop_length

    def _mixed(self, folder: Path) -> MixedSpeech:
        config = self.config
        times = (config.reverberation_min, config.reverberation_max) if config.reverberation else None
        return MixedSpeech(
            folder, config.noise_dir, self.sound.sample_rate, self._length(), (config.snr_min, config.snr_max), times,
            high_pass=config.high_pass,
        )  # fmt: skip

    def _pairs(self, name: str, folder: Path) -> PairedSpeech:
        both = (folder / "clean").is_dir() and (folder / "noisy").is_dir()
        accepted = "a folder with the folders clean and noisy, or of clean speech with `noise_dir` or `reverberation`"
        require(both, name, str(folder), accepted)
        return PairedSpeech(folder / "clean", folder / "noisy", self.sound.sample_rate, self._length())

    def _sound(self) -> Spectrogram:
        self.pretrained: Any = None
        name = self.config.pretrained_model_name_or_path
        if name is None:
            return Spectrogram(*(getattr(self.config, field) for field in SOUND))
        try:
            self.pretrained = SpeechEnhancementPipeline.from_pretrained(name)
        except Exception as error:  # the libraries raise many kinds
            raise ValueError(
                f"`pretrained_model_name_or_path` must be a SpeechEnhancementPipeline's repo or folder, got {name!r}: "
                f"{error}"
            ) from error
        return self.pretrained.spectrogram

    def setup(self, ctx: Context[SGMSEConfig]) -> Modules:
        """Makes network and scheduler, or takes those of the pretrained pipeline."""
        config = self.config
        if self.pretrained is not None:
            unet, scheduler = self.pretrained.unet, self.pretrained.scheduler
        else:
            scheduler = config.make_scheduler()
            default = {"divide_by_time": "before"} if config.prediction_type == "score" else {}
            unet = make_network(SGMSEUNet2DModel, "unet_config", config.unet_config, {}, default)
            self.size_advice = "--unet_config chooses another network"
        multiple = unet.frame_multiple
        require(config.num_frames % multiple == 0, "num_frames", config.num_frames, f"a multiple of {multiple}")
        SpeechEnhancementPipeline(unet, scheduler, **self._sound_options())  # type: ignore[arg-type] - checks the bins
        self._set_validation()
        return Modules(unet, scheduler)

    def _sound_options(self) -> dict[str, Any]:
        padding = "zero" if self.pretrained is None else self.pretrained.config["frame_padding"]
        return {**{name: getattr(self.sound, name) for name in SOUND}, "frame_padding": padding}

    def _set_validation(self) -> None:
        """Reads the recordings that every validation enhances, as long as training samples."""
        config, data = self.config, self.data
        if config.validation_data_dir is not None:
            data = self._pairs("validation_data_dir", Path(config.validation_data_dir))
        count = min(config.num_validation_images, len(data))
        self.validation = [data.get(index, torch.Generator().manual_seed(config.seed)) for index in range(count)]

    def training_step(self, batch: dict[str, Any], ctx: Context[SGMSEConfig]) -> StepOutput:
        """Takes recordings a part of the way, and compares what the network says of it."""
        scheduler = ctx.modules.scheduler
        with torch.no_grad():
            gain = batch["noisy"].abs().amax(dim=1, keepdim=True).clamp(min=1e-8)
            x0, y = (self.sound.encode(batch[name] / gain)[:, None] for name in ("clean", "noisy"))
            t = ctx.rng.rand(len(y), ctx.ids, device=y.device)
            t = self.config.time_min + (1 - self.config.time_min) * t
            parts = ctx.rng.randn_like(torch.cat([y.real, y.imag], dim=1), ctx.ids)
            noise = torch.complex(parts[:, :1], parts[:, 1:]) / 2**0.5
            x = scheduler.add_noise(x0, noise, t, y)
        output = as_complex(ctx.model(as_channels(x, y), t, return_dict=False)[0])
        return StepOutput(enhancement_loss(scheduler, output, t, x, y, x0, noise))

    def pipeline(self, modules: Modules) -> SpeechEnhancementPipeline:
        """Returns the pipeline."""
        return SpeechEnhancementPipeline(modules.trainable, modules.scheduler, **self._sound_options())

    def _enhanced(self, pipeline: Any, generator: torch.Generator) -> list[np.ndarray]:
        return pipeline(
            [item["noisy"] for item in self.validation],
            sample_rate=self.sound.sample_rate,
            num_inference_steps=self.config.validation_inference_steps,
            generator=generator,
        ).audios

    def validate(self, pipeline: DiffusionPipeline, generator: torch.Generator) -> list[Image.Image]:
        """Draws the spectrograms of validation recordings: noisy, enhanced and clean, from the left."""
        images = []
        for item, found in zip(self.validation, self._enhanced(pipeline, generator), strict=True):
            waves = (item["noisy"], torch.from_numpy(found), item["clean"])
            gain = item["noisy"].abs().max().clamp(min=1e-8)
            parts = [np.asarray(self.sound.image(wave / gain)) for wave in waves]
            images.append(Image.fromarray(np.concatenate(parts, axis=1)))
        size = images[0].size
        return [image.resize(size) for image in images]

    def figures(self, pipeline: DiffusionPipeline, generator: torch.Generator) -> dict[str, float]:
        """Measures the validation recordings, before and after: SI-SDR, and ESTOI, PESQ and DNSMOS where installed."""
        if not self.validation:
            return {}
        enhanced, rate = self._enhanced(pipeline, generator), self.sound.sample_rate
        measures = {
            "SI-SDR": si_sdr,
            "ESTOI": lambda found, clean: estoi(found, clean, rate),
            "PESQ": lambda found, clean: pesq_score(found, clean, rate),
            "DNSMOS": lambda found, clean: dnsmos(found, rate).overall,
        }
        figures: dict[str, float] = {}
        for name, measure in measures.items():
            try:
                for what, waves in (("noisy", [item["noisy"] for item in self.validation]), ("enhanced", enhanced)):
                    pairs = zip(waves, self.validation, strict=True)
                    found = [measure(np.asarray(wave), np.asarray(item["clean"])) for wave, item in pairs]
                    figures[f"{name}, {what}"] = float(np.mean(found))
            except (ImportError, ValueError):  # not installed, or a recording without speech
                figures.pop(f"{name}, noisy", None)
        return figures

    def card(self) -> RepoCard:
        """Returns the card."""
        config = self.config
        kind = "a Schroedinger bridge" if config.process == "sbve" else "SGMSE+"
        return RepoCard(
            method="Speech enhancement",
            description=f"Takes noise or reverberation from speech at {self.sound.sample_rate} Hz, by {kind}.",
            data=f"Recordings of {config.train_data_dir}.",
            tags=["diffusers-ext", "speech-enhancement", "audio-to-audio"],
            base_model=config.pretrained_model_name_or_path,
            paper="https://arxiv.org/abs/2409.10753"
            if config.process == "sbve"
            else "https://arxiv.org/abs/2208.05830",
            snippet=SNIPPET,
            pipeline_tag="audio-to-audio",
        )


SNIPPET = """import diffusers_ext  # pip install 'diffusers-ext[speech]'
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{repo_id}")
result = pipeline("noisy.wav")
print(result.audios[0].shape, result.sample_rate)"""
