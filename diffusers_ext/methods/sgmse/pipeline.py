"""Clean speech from a noisy or reverberant recording."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.utils import BaseOutput

from diffusers_ext.generation.stepping import callback_names, check_generator
from diffusers_ext.hub.loading import SafePipeline
from diffusers_ext.rng import mix
from diffusers_ext.training.config import require

from .published import load_published
from .recordings import Recording, Windows, groups, read_recordings
from .scheduler_ouve import OUVEScheduler
from .scheduler_sbve import SBVEScheduler
from .spectrogram import Spectrogram
from .unet import SGMSEUNet2DModel

__all__ = ["SpeechEnhancementPipeline", "SpeechEnhancementPipelineOutput", "as_channels", "as_complex"]

ENHANCEMENT = 61  # first word of the seeds


@dataclass
class SpeechEnhancementPipelineOutput(BaseOutput):
    """Output of `SpeechEnhancementPipeline`.

    Args:
        audios: one array (or tensor) for each recording, of its length and channels.
        sample_rate: in Hz; a list where the recordings' differ.
    """

    __module__ = "diffusers_ext"

    audios: list[np.ndarray] | list[torch.Tensor]
    sample_rate: int | list[int]


def as_channels(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Returns complex `(batch, 1, bins, frames)` samples and recordings as the network's four channels."""
    return torch.cat([x.real, x.imag, y.real, y.imag], dim=1)


def as_complex(output: torch.Tensor) -> torch.Tensor:
    """Returns the network's `(batch, 2, bins, frames)` as complex `(batch, 1, bins, frames)`."""
    output = output if output.dtype == torch.float64 else output.float()
    return torch.complex(output[:, :1], output[:, 1:])


class SpeechEnhancementPipeline(SafePipeline):
    """Takes noise or reverberation from recordings of any length, sample rate and number of channels.

    SGMSE+ (2208.05830), its 48 kHz model (2406.06185) and the Schroedinger bridge (2409.10753): the reverse process
    starts from the recording's spectrogram. Long recordings are cut into overlapping windows, whose noise agrees where
    they overlap; memory does not grow with the length.

    Args:
        unet: network of `(batch, 4, bins, frames)`.
        scheduler: `OUVEScheduler` or `SBVEScheduler`.
        sample_rate: of the model, in Hz. Others are resampled, there and back.
        n_fft: window of the spectrogram in samples, see `Spectrogram`.
        hop_length: samples from frame to frame.
        exponent: alpha of the spectrogram.
        factor: beta of the spectrogram.
        frame_padding: how a spectrogram is filled up to frames that can be halved, `"zero"` or `"reflection"`.

    Raises:
        ValueError: an argument is outside its range, or the network cannot halve so many bins.

    Example:
        >>> import torch
        >>> from diffusers_ext import OUVEScheduler, SGMSEUNet2DModel, SpeechEnhancementPipeline
        >>> unet = SGMSEUNet2DModel(
        ...     block_out_channels=(8, 8), layers_per_block=1, add_attention=False,
        ...     down_block_types=("SkipDownBlock2D",) * 2, up_block_types=("SkipUpBlock2D",) * 2,
        ... )
        >>> scheduler = OUVEScheduler(prediction_type="sample", algorithm="transitions")
        >>> pipeline = SpeechEnhancementPipeline(unet, scheduler, sample_rate=8000, n_fft=62, hop_length=16)
        >>> pipeline.set_progress_bar_config(disable=True)
        >>> result = pipeline(torch.randn(2, 5000), sample_rate=44100, num_inference_steps=2)
        >>> result.audios[0].shape, result.sample_rate
        ((2, 5000), 44100)
    """

    __module__ = "diffusers_ext"

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents"]

    unet: Any
    scheduler: Any

    def __init__(
        self,
        unet: SGMSEUNet2DModel,
        scheduler: OUVEScheduler | SBVEScheduler,
        sample_rate: int = 16000,
        n_fft: int = 510,
        hop_length: int = 128,
        exponent: float = 0.5,
        factor: float = 0.15,
        frame_padding: str = "zero",
    ) -> None:
        super().__init__()
        kinds = ("zero", "reflection")
        require(frame_padding in kinds, "frame_padding", frame_padding, f"one of {list(kinds)}")
        self.spectrogram = Spectrogram(sample_rate, n_fft, hop_length, exponent, factor)
        if unet is not None:
            multiple, bins = unet.frequency_multiple, self.spectrogram.bins
            accepted = f"such that n_fft / 2 + 1 bins are a multiple of {multiple}, which the network halves"
            require(bins % multiple == 0, "n_fft", n_fft, accepted)
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(
            sample_rate=sample_rate, n_fft=n_fft, hop_length=hop_length, exponent=exponent, factor=factor,
            frame_padding=frame_padding,
        )  # fmt: skip
        self._interrupt = False

    @classmethod
    def from_published(cls, path: str | os.PathLike, ema: bool = True) -> SpeechEnhancementPipeline:
        """Loads a checkpoint of the authors, `.ckpt`, without running any code that it holds.

        Save it by `save_repo(pipeline, folder)` or `diffusers-ext convert`, and it loads like any other.

        Args:
            path: of the file.
            ema: take the averaged weights, with which the authors enhance.

        Raises:
            ValueError: it is no such checkpoint, or of a kind that has no counterpart here.
        """
        return cls(**load_published(path, ema))

    @property
    def interrupt(self) -> bool:
        """Whether the call is to stop; what is not enhanced by then is returned as it is."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        audio: Any,
        sample_rate: int | None = None,
        num_inference_steps: int = 30,
        chunk_seconds: float = 10.0,
        overlap_seconds: float = 1.0,
        batch_size: int = 8,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: Literal["np", "pt"] = "np",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 - as in Diffusers, never changed
    ) -> SpeechEnhancementPipelineOutput | tuple:
        """Enhances recordings.

        Args:
            audio: path of a sound file (WAV, FLAC, Ogg), or array or tensor `(samples,)` or `(channels, samples)` of
                floats or integers; or a list of these, of any lengths.
            sample_rate: of arrays, in Hz; of files it stands in them.
            num_inference_steps: N; see the scheduler's `set_timesteps` for the calls of the network.
            chunk_seconds: longest window; a longer recording is cut.
            overlap_seconds: time over which neighbouring windows fade into each other, in whole blocks of frames, at
                most half a window.
            batch_size: windows at a time, of all recordings and channels; memory grows with it.
            generator: one, or one for each recording, whose result then does not depend on the others.
            output_type: `"np"` or `"pt"`.
            return_dict: return `SpeechEnhancementPipelineOutput` instead of a tuple of its entries.
            callback_on_step_end: called as `(pipeline, step, timestep, {"latents": ...})` after every step of every
                batch; the latents, complex `(batch, 1, bins, frames)`, that it returns are used.
                `pipeline._interrupt = True` stops.
            callback_on_step_end_tensor_inputs: names passed to it, `"latents"`.

        Returns:
            `SpeechEnhancementPipelineOutput`: each recording's length, rate, channels and loudness are as given.

        Raises:
            ValueError: an argument is wrong; raised before the network is called.
        """
        require(num_inference_steps >= 1, "num_inference_steps", num_inference_steps, "an integer >= 1")
        require(overlap_seconds >= 0, "overlap_seconds", overlap_seconds, "a number >= 0")
        longer = f"a number > overlap_seconds, {overlap_seconds}"
        require(chunk_seconds > overlap_seconds, "chunk_seconds", chunk_seconds, longer)
        require(batch_size >= 1, "batch_size", batch_size, "an integer >= 1")
        require(output_type in ("np", "pt"), "output_type", output_type, "'np' or 'pt'")
        offered = self._callback_tensor_inputs
        names = callback_names(callback_on_step_end, callback_on_step_end_tensor_inputs, offered)
        recordings = read_recordings(audio, sample_rate, self.spectrogram.sample_rate)
        check_generator(generator, len(recordings))
        seeds = _seeds(generator, len(recordings))
        self._interrupt = False
        results = [torch.zeros_like(recording.wave) for recording in recordings]
        cuts = [self._windows(recording, chunk_seconds, overlap_seconds) for recording in recordings]
        items = [
            (number, channel, window)
            for number, (recording, cut) in enumerate(zip(recordings, cuts, strict=True))
            for window in range(len(cut))
            for channel in range(len(recording.wave))
            if recording.gain > 0
        ]
        sizes = [np.diff(cuts[number].bounds(window)).item() for number, _, window in items]
        batches = groups(sizes, batch_size)
        with self.progress_bar(total=len(batches) * num_inference_steps) as bar:  # type: ignore[call-arg]
            for batch in batches:
                chosen = [items[position] for position in batch]
                waves = torch.stack([recordings[n].wave[c, slice(*cuts[n].bounds(w))] for n, c, w in chosen])
                places = [(seeds[n], c, cuts[n].first_block(w)) for n, c, w in chosen]
                enhanced = self._enhance(waves, places, num_inference_steps, callback_on_step_end, names, bar)
                for (number, channel, window), wave in zip(chosen, enhanced, strict=True):
                    weighted = cuts[number].weights(window) * wave
                    results[number][channel, slice(*cuts[number].bounds(window))] += weighted
        self.maybe_free_model_hooks()
        audios: list[Any] = [
            recording.restored(result.numpy(), self.spectrogram.sample_rate)
            for recording, result in zip(recordings, results, strict=True)
        ]
        if output_type == "pt":
            audios = [torch.from_numpy(np.ascontiguousarray(wave)) for wave in audios]
        rates = [recording.rate for recording in recordings]
        rate = rates[0] if len(set(rates)) == 1 else rates
        return SpeechEnhancementPipelineOutput(audios, rate) if return_dict else (audios, rate)

    def _windows(self, recording: Recording, chunk_seconds: float, overlap_seconds: float) -> Windows:
        rate, hop = self.spectrogram.sample_rate, self.spectrogram.hop_length
        chunk, overlap = round(chunk_seconds * rate), round(overlap_seconds * rate)
        return Windows(recording.wave.shape[1], chunk, overlap, self.unet.frame_multiple * hop, hop)

    def _enhance(
        self, waves: torch.Tensor, places: list[tuple[int, int, int]], steps: int, callback: Any, names: list[str],
        bar: Any,
    ) -> torch.Tensor:  # fmt: skip
        """Enhances windows `(batch, samples)` of equal length; `places` are their seeds, channels and first blocks."""
        if self._interrupt:
            return waves
        device = self._execution_device
        precise = torch.float64 if self.unet.dtype == torch.float64 else torch.float32
        y = self.spectrogram.encode(waves.to(device, precise))[:, None]
        frames = y.shape[-1]
        y = self._filled(y)
        draws = iter(range(2**31))

        def noise() -> torch.Tensor:
            return _block_noise(y, places, next(draws), self.unet.frame_multiple)

        self.scheduler.set_timesteps(steps, device=device)
        times = self.scheduler.timesteps
        x = self.scheduler.initial_sample(y, noise=noise())
        per_step = len(times) // steps  # Heun's method takes two calls a step
        for index, t in enumerate(times):
            if self._interrupt:
                break
            for _ in range(self.scheduler.correct_steps):
                x = self.scheduler.step_correct(self._predict(x, y, t), t, x, y, variance_noise=noise()).prev_sample
            step = self.scheduler.step(self._predict(x, y, t), t, x, y, variance_noise=noise())
            x = step.prev_sample_mean if index + 1 == len(times) else step.prev_sample
            if (index + 1) % per_step:
                continue
            if callback is not None:
                x = callback(self, index // per_step, t, {name: x for name in names}).get("latents", x)
            bar.update()
        return self.spectrogram.decode(x[:, 0, :, :frames], waves.shape[-1]).float().cpu()

    def _predict(self, x: torch.Tensor, y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        output = self.unet(as_channels(x, y).to(self.unet.dtype), t, return_dict=False)[0]
        return as_complex(output)

    def _filled(self, y: torch.Tensor) -> torch.Tensor:
        """Adds frames at the end until they can be halved."""
        frames = y.shape[-1]
        missing = -frames % self.unet.frame_multiple
        if self.config["frame_padding"] == "zero" or missing >= frames:  # too short to reflect
            return F.pad(y, (0, missing))
        return torch.cat([y, y[..., frames - 1 - missing : frames - 1].flip(-1)], dim=-1)


def _seeds(generator: Any, count: int) -> list[int]:
    """Draws one seed for each recording."""
    generators = generator if isinstance(generator, list) else [generator] * count
    return [int(torch.randint(2**62, (1,), generator=g, device=g.device if g else "cpu")) for g in generators]


def _block_noise(like: torch.Tensor, places: list[tuple[int, int, int]], draw: int, block: int) -> torch.Tensor:
    """Draws noise in which each block of frames has numbers of its own, by recording, draw, channel and place."""
    rows = []
    for seed, channel, first in places:
        blocks = []
        for number in range(like.shape[-1] // block):
            words = (ENHANCEMENT, seed, draw, channel, first + number)
            generator = torch.Generator().manual_seed(mix(*words))
            # In one precision, so that another one of the network sees the same noise.
            blocks.append(torch.randn(1, like.shape[2], block, dtype=torch.complex64, generator=generator))
        rows.append(torch.cat(blocks, dim=-1))
    return torch.stack(rows).to(like)
