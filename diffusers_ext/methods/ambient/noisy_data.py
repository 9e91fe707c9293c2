"""Noise that belongs to a sample: drawn once, by its index, and the same in every epoch, order, process and resume.

Noise that is drawn anew in every epoch would leak the clean sample, to which its draws average.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from diffusers_ext.data.exact import check_noise_levels
from diffusers_ext.rng import StepRNG, mix

__all__ = ["AUGMENTATIONS", "FrozenNoise", "rigid_augmentation"]

NOISE, CHOICE = 21, 22
GOLDEN = 0x9E3779B97F4A7C15
CHUNK = 1 << 22  # numbers that are drawn at a time
AUGMENTATIONS = ("flip", "turn", "roll")


def _hashed(keys: np.ndarray) -> np.ndarray:
    """Mixes 64-bit integers (the finaliser of SplitMix64, Steele et al. 2014)."""
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))


def _keys(seed: int, purpose: int, index: np.ndarray) -> np.ndarray:
    return _hashed(np.uint64(mix(seed, purpose)) + index.astype(np.uint64) * np.uint64(GOLDEN))


class FrozenNoise:
    """Makes clean samples noisy, each by noise of its own.

    Args:
        sigma: level of the noise, one for all, or one for each sample of the data set; 0 leaves a sample clean.
        probability: that a sample is noisy; which ones are is decided by their index.
        seed: of all noise.

    Raises:
        ValueError: a level is negative, not finite or of the wrong shape, or an argument outside of its range.

    Example:
        >>> import torch
        >>> from diffusers_ext import FrozenNoise
        >>> noise = FrozenNoise(0.2, probability=0.5)
        >>> images, index = torch.zeros(3, 1, 8, 8), torch.tensor([7, 0, 7])
        >>> noisy, levels = noise(images, index)
        >>> torch.equal(noisy[0], noisy[2]), levels[0].item() == levels[2].item()
        (True, True)
    """

    def __init__(self, sigma: float | Sequence[float] | np.ndarray, probability: float = 1.0, seed: int = 0) -> None:
        levels = np.asarray(sigma, np.float64)
        if levels.ndim == 0:
            if not (np.isfinite(levels) and levels >= 0):
                raise ValueError(f"`sigma` must be a finite number >= 0, got {sigma!r}.")
        else:
            check_noise_levels(levels, "sigma", len(levels))
        if not 0 <= probability <= 1:
            raise ValueError(f"`probability` must be a number in [0, 1], got {probability!r}.")
        if not isinstance(seed, int) or seed < 0:
            raise ValueError(f"`seed` must be an integer >= 0, got {seed!r}.")
        self.sigma, self.probability, self.seed = levels, probability, seed
        self._drawn: np.ndarray | None = None

    def levels(self, index: torch.Tensor) -> torch.Tensor:
        """Returns the float32 levels of samples `(batch,)` of the data set, 0 for those that stay clean."""
        places = index.cpu().numpy()
        levels = self.sigma if self.sigma.ndim == 0 else self.sigma[places]
        if self.probability < 1:
            # The upper 53 bits as a number in [0, 1).
            chance = (_keys(self.seed, CHOICE, places) >> np.uint64(11)) * 2.0**-53
            levels = np.where(chance < self.probability, levels, 0.0)
        levels = np.broadcast_to(levels, places.shape).astype(np.float32)
        return torch.from_numpy(levels).to(index.device)

    def noise(self, index: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """Returns the standard normal noise of samples, `(batch, *shape)` float32 on `index`'s device.

        The numbers of a sample are a hash of seed, index and place, made normal by Box and Muller's way.
        """
        if self._drawn is not None and self._drawn.shape[1:] == tuple(shape):
            return torch.from_numpy(self._drawn[index.cpu().numpy()]).to(index.device)
        drawn = self._draw(index.cpu().numpy(), int(np.prod(shape)))
        return torch.from_numpy(drawn.reshape(-1, *shape)).to(index.device)

    def _draw(self, places: np.ndarray, size: int) -> np.ndarray:
        half = -(-size // 2)
        steps = np.arange(1, half + 1, dtype=np.uint64) * np.uint64(GOLDEN)
        bits = _hashed(_keys(self.seed, NOISE, places)[:, None] + steps)
        radius = ((bits >> np.uint64(32)).astype(np.float64) + 0.5) * 2.0**-32
        angle = (bits & np.uint64(0xFFFFFFFF)).astype(np.float64) * (2 * np.pi * 2.0**-32)
        radius = np.sqrt(-2 * np.log(radius))
        pairs = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], 1)
        return pairs[:, :size].astype(np.float32)

    def draw_once(self, folder: str | os.PathLike, count: int, shape: Sequence[int]) -> Path:
        """Draws the noise of all samples into a file that is read by memory mapping, which takes no time in a step.

        The file is written whole or not at all; one that is there already is taken.

        Args:
            folder: where the file is.
            count: samples of the data set.
            shape: of a sample.

        Returns:
            The file, of `4 * count * prod(shape)` bytes.

        Raises:
            ValueError: the disk has less room than that.
        """
        name = f"frozen-noise-{self.seed}-{count}x{'x'.join(map(str, shape))}.npy"
        path, size = Path(folder) / name, int(np.prod(shape))
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            needed, free = 4 * count * size, shutil.disk_usage(path.parent).free
            if needed > free:
                raise ValueError(
                    f"`folder` must have room for the noise of {count} samples, {needed / 1e9:.3g} GB, got {folder!s} "
                    f"with {free / 1e9:.3g} GB; without the file (`noise_file` False) it is drawn anew in every step."
                )
            partial = path.with_suffix(f".{os.getpid()}.tmp")
            target = np.lib.format.open_memmap(partial, "w+", np.float32, (count, *shape))
            rows = max(1, CHUNK // size)
            for first in range(0, count, rows):
                places = np.arange(first, min(first + rows, count))
                target[first : first + rows] = self._draw(places, size).reshape(-1, *shape)
            target.flush()
            del target
            os.replace(partial, path)
        self._drawn = np.load(path, mmap_mode="r", allow_pickle=False)
        return path

    def __call__(self, x0: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Makes samples noisy.

        Args:
            x0: `(batch, ...)` clean samples in the space that is diffused, without random augmentation.
            index: `(batch,)` their indices in the data set.

        Returns:
            The noisy samples, clean ones untouched, and their `(batch,)` float32 levels.
        """
        levels = self.levels(index)
        each = levels.view(-1, *[1] * (x0.ndim - 1)).to(x0.dtype)
        noisy = x0 + each * self.noise(index, x0.shape[1:]).to(x0.dtype)
        return torch.where(each > 0, noisy, x0), levels


def rigid_augmentation(
    x: torch.Tensor, kinds: Sequence[str], rng: StepRNG, ids: Sequence[int] | None = None
) -> torch.Tensor:
    """Moves samples about in ways that leave white noise white.

    Args:
        x: `(batch, channels, height, width)`; for `"turn"` square.
        kinds: of `"flip"` (mirror half of them), `"turn"` (by a random number of quarters) and `"roll"` (around the
            edges, by whole pixels).
        rng: the random numbers of this micro-step.
        ids: `(batch,)` global indices of the samples.
    """

    def draw(below: int) -> torch.Tensor:
        return rng.randint(below, len(x), ids, stream="augmentation", device=x.device).view(-1, 1, 1, 1)

    height, width = x.shape[2:]
    if "flip" in kinds:
        x = torch.where(draw(2) > 0, x.flip(3), x)
    if "turn" in kinds:
        quarters = draw(4)
        x = torch.where(quarters % 2 > 0, x.rot90(1, (2, 3)), x)
        x = torch.where(quarters > 1, x.flip((2, 3)), x)
    if "roll" in kinds:
        rows = (torch.arange(height, device=x.device).view(1, 1, -1, 1) + draw(height)) % height
        columns = (torch.arange(width, device=x.device).view(1, 1, 1, -1) + draw(width)) % width
        batch = torch.arange(len(x), device=x.device).view(-1, 1, 1, 1)
        x = x[batch, torch.arange(x.shape[1], device=x.device).view(1, -1, 1, 1), rows, columns]
    return x
