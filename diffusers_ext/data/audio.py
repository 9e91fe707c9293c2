"""Reading, writing and resampling of sound."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from scipy.signal import resample_poly

__all__ = ["SUFFIXES", "audio_files", "read_audio", "resample", "write_audio"]

SUFFIXES = (".wav", ".flac", ".ogg", ".aiff", ".aif")


def _soundfile() -> Any:
    try:
        import soundfile
    except ImportError as error:
        raise ImportError("sound files need the package soundfile: pip install 'diffusers-ext[speech]'") from error
    return soundfile


def audio_files(folder: str | os.PathLike) -> list[Path]:
    """Returns the sound files under a folder, sorted by their names."""
    return sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def read_audio(
    path: str | os.PathLike, start: int = 0, length: int | None = None, name: str = "audio"
) -> tuple[np.ndarray, int]:
    """Reads a sound file, or a part of it.

    Args:
        path: of a WAV, FLAC, Ogg or AIFF file.
        start: first sample.
        length: number of samples, by default all that follow.
        name: what an error calls the argument.

    Returns:
        `(channels, samples)` float32, -1..1 unless the file holds louder floats; and the sample rate in Hz.

    Raises:
        ImportError: soundfile is not installed.
        ValueError: there is no such file, or it cannot be read.
    """
    soundfile = _soundfile()
    try:
        frames = -1 if length is None else length
        wave, rate = soundfile.read(path, frames=frames, start=start, dtype="float32", always_2d=True)
    except (OSError, soundfile.LibsndfileError) as error:
        raise ValueError(f"`{name}` must be a sound file that can be read, got {str(path)!r}: {error}") from error
    return np.ascontiguousarray(wave.T), rate


def audio_info(path: str | os.PathLike, name: str = "audio") -> Any:
    """Returns `frames`, `samplerate`, `channels`, `format` and `subtype` of a sound file.

    Raises:
        ValueError: there is no such file, or it cannot be read.
    """
    soundfile = _soundfile()
    try:
        return soundfile.info(path)
    except (OSError, soundfile.LibsndfileError) as error:
        raise ValueError(f"`{name}` must be a sound file that can be read, got {str(path)!r}: {error}") from error


def write_audio(path: str | os.PathLike, wave: np.ndarray, sample_rate: int, subtype: str | None = None) -> None:
    """Writes a sound file under a temporary name and renames it.

    Args:
        path: its suffix says the format.
        wave: `(samples,)` or `(channels, samples)`; what is louder than 1 is clipped in formats of integers.
        sample_rate: in Hz.
        subtype: such as `"PCM_16"`, by default the format's own.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    _soundfile().write(partial, np.atleast_2d(wave).T, sample_rate, subtype=subtype)
    partial.replace(path)


def resample(wave: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """Resamples the last axis by a polyphase filter; `samples` become `ceil(samples * new_rate / rate)`."""
    if rate == new_rate:
        return wave
    common = math.gcd(rate, new_rate)
    return resample_poly(wave, new_rate // common, rate // common, axis=-1).astype(wave.dtype)
