"""Clean and noisy speech to train on: pairs of files, or clean speech that is disturbed on the fly.

What is drawn for an item depends on the generator that it is read with alone, so a resumed run sees the same data.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.signal import butter, fftconvolve, sosfilt

from diffusers_ext.data.audio import audio_files, audio_info, read_audio, resample
from diffusers_ext.training.config import require

__all__ = ["MixedSpeech", "PairedSpeech"]


def _files(name: str, folder: str | os.PathLike) -> list[Path]:
    require(Path(folder).is_dir(), name, str(folder), "an existing folder")
    found = audio_files(folder)
    require(len(found) > 0, name, str(folder), "a folder with sound files")
    return found


def _uniform(generator: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(1, generator=generator))


def _draw(generator: torch.Generator, count: int) -> int:
    return int(torch.randint(count, (1,), generator=generator))


class _Crop:
    """Reads the same part of several files of one length, at the wanted rate.

    Args:
        info: of one of the files.
        sample_rate: wanted, in Hz.
        length: samples to return; shorter files are put in the middle of silence.
        generator: draws the place and the channel.
        lead: seconds to read before, as far as there are any.
    """

    def __init__(self, info: Any, sample_rate: int, length: int, generator: torch.Generator, lead: float = 0) -> None:
        self.rate, self.sample_rate, self.length = info.samplerate, sample_rate, length
        wanted = math.ceil(length * info.samplerate / sample_rate)
        self.start = _draw(generator, max(0, info.frames - wanted) + 1)
        self.channel = _draw(generator, info.channels)
        self.before = min(self.start, round(lead * info.samplerate))
        self.wanted = min(wanted, info.frames)

    def read(self, path: Path) -> np.ndarray:
        """Returns the wave, what was read before the part included."""
        wave, _ = read_audio(path, self.start - self.before, self.before + self.wanted, "train_data_dir")
        return resample(wave[self.channel], self.rate, self.sample_rate)

    def cut(self, wave: np.ndarray) -> torch.Tensor:
        """Takes what was read before off again, and fills the rest up."""
        wave = wave[round(self.before * self.sample_rate / self.rate) :][: self.length]
        missing = self.length - len(wave)
        return torch.from_numpy(np.pad(wave, (missing // 2, missing - missing // 2)).astype(np.float32))


class PairedSpeech:
    """Pairs of clean and noisy recordings, one file in each of two folders under the same relative name.

    Items are dicts of `clean` and `noisy`, `(length,)` float32, cut out of the same place.

    Args:
        clean_dir: folder of clean speech.
        noisy_dir: folder of the same speech, noisy or reverberant.
        sample_rate: of the items, in Hz; other files are resampled.
        length: samples of an item.

    Raises:
        ValueError: a file has no partner, or one of another length, rate or number of channels; the message names it.
    """

    __module__ = "diffusers_ext"

    def __init__(
        self, clean_dir: str | os.PathLike, noisy_dir: str | os.PathLike, sample_rate: int, length: int
    ) -> None:
        clean, noisy = ({p.relative_to(d): p for p in _files("train_data_dir", d)} for d in (clean_dir, noisy_dir))
        alone = sorted(clean.keys() ^ noisy.keys())
        if alone:
            has, lacks = (clean_dir, noisy_dir) if alone[0] in clean else (noisy_dir, clean_dir)
            raise ValueError(
                f"`train_data_dir` must hold pairs of files: {str(alone[0])!r} of {str(has)!r} has no partner in "
                f"{str(lacks)!r}."
            )
        self.pairs = [(clean[name], noisy[name]) for name in sorted(clean)]
        self.infos = []
        for pair in self.pairs:
            infos = [audio_info(path, "train_data_dir") for path in pair]
            for what in ("samplerate", "channels", "frames"):
                found = [getattr(info, what) for info in infos]
                if found[0] != found[1]:
                    raise ValueError(
                        f"`train_data_dir` must hold pairs of equal {what}, got {found[0]} in {str(pair[0])!r} and "
                        f"{found[1]} in {str(pair[1])!r}."
                    )
            self.infos.append(infos[0])
        self.sample_rate, self.length = sample_rate, length

    def __len__(self) -> int:
        return len(self.pairs)

    def get(self, index: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Returns an item; the generator draws its place in the files."""
        crop = _Crop(self.infos[index], self.sample_rate, self.length, generator)
        clean, noisy = (crop.cut(crop.read(path)) for path in self.pairs[index])
        return {"clean": clean, "noisy": noisy}


class MixedSpeech:
    """Clean speech with noise, or in a room, mixed when it is read.

    Items are dicts of `clean` and `noisy`, `(length,)` float32. A room is an impulse response of a direct path of gain
    1 and a tail of decaying noise; what is clean is the direct path, in time with what is reverberant.

    Args:
        speech_dir: folder of clean speech.
        noise_dir: folder of noise, or `None` for none.
        sample_rate: of the items, in Hz; other files are resampled.
        length: samples of an item.
        snr: least and largest ratio of the energies of speech and noise, in dB, uniform.
        reverberation_time: shortest and longest time in which a room decays by 60 dB, in seconds, or `None` for none.
        direct_ratio: least and largest ratio of the energies of direct path and tail, in dB, uniform.
        high_pass: take away what is below, in Hz, from speech and noise before they are mixed (order 4); 0: nothing.

    Raises:
        ValueError: a folder is missing or without sound files, there is neither noise nor room, or a range is wrong.
    """

    __module__ = "diffusers_ext"

    def __init__(
        self,
        speech_dir: str | os.PathLike,
        noise_dir: str | os.PathLike | None,
        sample_rate: int,
        length: int,
        snr: tuple[float, float] = (-5.0, 15.0),
        reverberation_time: tuple[float, float] | None = None,
        direct_ratio: tuple[float, float] = (-5.0, 10.0),
        high_pass: float = 0.0,
    ) -> None:
        require(noise_dir is not None or reverberation_time is not None, "noise_dir", noise_dir,
                "a folder of noise where there is no reverberation")  # fmt: skip
        require(snr[0] <= snr[1], "snr", snr, "the least and the largest, in dB")
        require(0 <= high_pass < sample_rate / 2, "high_pass", high_pass, "a number in [0, sample_rate / 2)")
        if reverberation_time is not None:
            shortest, longest = reverberation_time
            require(0 < shortest <= longest, "reverberation_time", reverberation_time, "two times > 0, shortest first")
        self.speech = _files("train_data_dir", speech_dir)
        self.noise = [] if noise_dir is None else _files("noise_dir", noise_dir)
        self.infos = {p: audio_info(p, "train_data_dir") for p in self.speech}
        self.infos |= {p: audio_info(p, "noise_dir") for p in self.noise}
        self.sample_rate, self.length, self.snr = sample_rate, length, snr
        self.reverberation_time, self.direct_ratio = reverberation_time, direct_ratio
        self.filter = butter(4, high_pass, "highpass", fs=sample_rate, output="sos") if high_pass else None

    def __len__(self) -> int:
        return len(self.speech)

    def get(self, index: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Returns an item; the generator draws the place in the speech, the room, the noise, its place and its SNR."""
        lead = 0.0 if self.reverberation_time is None else self.reverberation_time[1]
        path = self.speech[index]
        crop = _Crop(self.infos[path], self.sample_rate, self.length, generator, lead)
        speech = self._filtered(crop.read(path))
        clean = crop.cut(speech)
        noisy = clean
        if self.reverberation_time is not None:
            noisy = crop.cut(fftconvolve(speech, self._room(generator))[: len(speech)])
        if self.noise:
            noisy = noisy + self._scaled(self._noise(generator), noisy, _uniform(generator, *self.snr))
        return {"clean": clean, "noisy": noisy}

    def _filtered(self, wave: np.ndarray) -> np.ndarray:
        return wave if self.filter is None else np.asarray(sosfilt(self.filter, wave))

    def _room(self, generator: torch.Generator) -> np.ndarray:
        """Draws an impulse response."""
        assert self.reverberation_time is not None
        decay = _uniform(generator, *self.reverberation_time)
        samples = round(decay * self.sample_rate)
        tail = torch.randn(samples, generator=generator, dtype=torch.float64).numpy()
        tail *= 10 ** (-3 * np.arange(samples) / samples)  # -60 dB at the end
        tail[: round(0.002 * self.sample_rate)] = 0  # no wall is nearer than the microphone
        ratio = _uniform(generator, *self.direct_ratio)
        tail *= 10 ** (-ratio / 20) / np.linalg.norm(tail)
        tail[0] = 1
        return tail

    def _noise(self, generator: torch.Generator) -> torch.Tensor:
        """Draws a part of a noise file; a shorter one is repeated."""
        path = self.noise[_draw(generator, len(self.noise))]
        crop = _Crop(self.infos[path], self.sample_rate, self.length, generator)
        wave = crop.read(path)
        return crop.cut(self._filtered(np.tile(wave, -(-self.length // len(wave)))))

    @staticmethod
    def _scaled(noise: torch.Tensor, speech: torch.Tensor, snr: float) -> torch.Tensor:
        energy = noise.square().sum().clamp(min=1e-12)
        return noise * (speech.square().sum() / energy).sqrt() * 10 ** (-snr / 20)
