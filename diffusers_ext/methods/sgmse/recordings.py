"""Recordings as callers give them, and the windows in which long ones are enhanced."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from diffusers_ext.data.audio import read_audio, resample
from diffusers_ext.training.config import require

__all__ = ["Recording", "Windows", "read_recordings"]


@dataclass
class Recording:
    """One recording.

    Args:
        wave: `(channels, samples)` at the model's rate, divided by `gain`.
        gain: the largest absolute value of all channels; 0 of silence.
        rate: sample rate that it was given with.
        length: samples that it was given with.
        flat: whether it was given as `(samples,)`.
    """

    wave: torch.Tensor
    gain: float
    rate: int
    length: int
    flat: bool

    def restored(self, wave: np.ndarray, model_rate: int) -> np.ndarray:
        """Brings an enhanced wave `(channels, samples)`, in place, to the recording's gain, rate, length and shape."""
        wave *= self.gain
        wave = resample(wave, model_rate, self.rate)[:, : self.length]
        return wave[0] if self.flat else wave


def _is_path(value: Any) -> bool:
    return isinstance(value, str | os.PathLike)


def read_recordings(audio: Any, sample_rate: int | None, model_rate: int) -> list[Recording]:
    """Reads what `SpeechEnhancementPipeline` is called with.

    Args:
        audio: a path, or an array or tensor `(samples,)` or `(channels, samples)`, or a list of these.
        sample_rate: of arrays, in Hz; of files it stands in them.
        model_rate: to resample to.

    Raises:
        ValueError: there is none, or one is empty, not finite, of a wrong shape or of unknown rate.
    """
    given = audio if isinstance(audio, list | tuple) else [audio]
    require(len(given) > 0, "audio", audio, "at least one recording")
    arrays = [not _is_path(one) for one in given]
    if any(arrays):
        rate = isinstance(sample_rate, int | np.integer) and sample_rate >= 1
        require(rate, "sample_rate", sample_rate, "the rate in Hz of recordings that are given as arrays")
    if not all(arrays):
        require(sample_rate is None, "sample_rate", sample_rate, "left out for files, whose rate stands in them")
    return [_read(one, sample_rate, model_rate) for one in given]


def _read(one: Any, sample_rate: int | None, model_rate: int) -> Recording:
    if _is_path(one):
        wave, rate = read_audio(one)
        flat, name = len(wave) == 1, f"`audio` {str(one)!r}"
    else:
        if isinstance(one, torch.Tensor):
            one = (one.float() if one.is_floating_point() else one).detach().cpu().numpy()
        array = np.asarray(one)
        shape = f"`(samples,)` or `(channels, samples)`, got one of shape {array.shape}."
        if array.ndim not in (1, 2):
            raise ValueError(f"`audio` must be a recording {shape}")
        if array.ndim == 2 and array.shape[0] > array.shape[1]:
            raise ValueError(f"`audio` must not have more channels than samples: {shape}")
        if np.issubdtype(array.dtype, np.integer):
            array = array / (np.iinfo(array.dtype).max + 1.0)
        require(np.issubdtype(array.dtype, np.floating), "audio", str(array.dtype), "of floats or integers")
        wave, rate = np.atleast_2d(array).astype(np.float32), int(sample_rate or 0)
        flat, name = array.ndim == 1, "`audio`"
    if wave.size == 0:
        raise ValueError(f"{name} must have at least one sample, got none.")
    if not np.isfinite(wave).all():
        raise ValueError(f"{name} must be finite, got NaN or infinity.")
    length, wave = wave.shape[1], resample(wave, rate, model_rate)
    gain = float(np.abs(wave).max())
    if gain > 0:
        wave /= gain  # a copy by now; long recordings are held no more often than need be
    return Recording(torch.from_numpy(wave), gain, rate, length, flat)


class Windows:
    """Cuts a wave into windows of whole blocks of frames, and fades their results into each other.

    Frames of neighbouring windows lie on one grid, so that a block of noise belongs to a place in the recording.

    Args:
        length: samples of the wave.
        chunk: samples of a window at most; a wave up to this length is one window.
        overlap: samples that neighbours share, rounded to whole blocks, at least one, at most half a window.
        block: samples of a block.
        hop: samples from frame to frame.
    """

    def __init__(self, length: int, chunk: int, overlap: int, block: int, hop: int) -> None:
        self.length, self.block = length, block
        self.starts, self.size = [0], length
        if length > chunk:
            whole = max(chunk // block, 2)
            shared = min(max(round(overlap / block), 1), whole // 2)  # so that at most two windows meet
            self.size, step = whole * block - hop, (whole - shared) * block
            last = max(0, -(-(length - self.size) // step))
            self.starts = [index * step for index in range(last + 1)]

    def __len__(self) -> int:
        return len(self.starts)

    def bounds(self, index: int) -> tuple[int, int]:
        """Returns the first sample of a window and the one behind its last."""
        return self.starts[index], min(self.starts[index] + self.size, self.length)

    def first_block(self, index: int) -> int:
        """Returns which block of the recording a window's first one is."""
        return self.starts[index] // self.block

    def weights(self, index: int) -> torch.Tensor:
        """Returns the weight of each sample of a window: those of neighbours add up to 1."""
        start, end = self.bounds(index)
        weights = torch.ones(end - start)
        if index > 0:
            shared = self.bounds(index - 1)[1] - start
            weights[:shared] = _ramp(shared)
        if index + 1 < len(self):
            shared = end - self.starts[index + 1]
            weights[-shared:] = 1 - _ramp(shared)
        return weights


def _ramp(samples: int) -> torch.Tensor:
    return (torch.arange(samples) + 0.5) / samples


def groups(sizes: Sequence[Any], batch_size: int) -> list[list[int]]:
    """Returns positions of equal sizes, `batch_size` at a time, in the order in which they begin."""
    by_size: dict[Any, list[int]] = {}
    found = []
    for position, size in enumerate(sizes):
        members = by_size.setdefault(size, [])
        if not members:
            found.append(members)
        members.append(position)
        if len(members) == batch_size:
            by_size.pop(size)
    return found
