"""Patches of clean raw images to train a denoiser on."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusers_ext.training.config import require

from .bayer import check_pattern, pack_bayer
from .raw_files import RawImage, raw_files, read_raw

__all__ = ["CleanRawPatches"]

KEPT = 8  # images that are held in memory, of those that are not mapped from .npy


@lru_cache(maxsize=KEPT)
def _kept(path: Path) -> RawImage:
    return read_raw(path)


class CleanRawPatches:
    """Packed patches of clean raw images, mirrored and transposed: what is drawn depends on the generator alone.

    Args:
        folder: of raw files.
        size: height and width of a patch of the packed planes, half of that in pixels.
        white_level: in DN, for files that do not say theirs.
        black_level: likewise.
        pattern: likewise.
        augment: mirror and transpose patches.
        name: the argument that named the folder, for messages.

    Raises:
        ValueError: there are no raw files, one is smaller than a patch, or a level is missing.
    """

    def __init__(
        self, folder: str | os.PathLike, size: int, white_level: float | None, black_level: float | None, pattern: str,
        augment: bool = True, name: str = "train_data_dir",
    ) -> None:  # fmt: skip
        check_pattern(pattern)
        self.files, self.size, self.augment, self.name = raw_files(folder, name), size, augment, name
        self.levels = {"white_level": white_level, "black_level": black_level, "pattern": pattern}
        self.places: list[Path] = []  # an epoch takes as many patches as there is room for in an image
        for path in self.files:
            height, width = self._image(path)[0].shape
            self.places += [path] * ((height // (2 * size)) * (width // (2 * size)))

    def __len__(self) -> int:
        return len(self.places)

    def _image(self, path: Path) -> tuple[np.ndarray, float, float, str]:
        image = read_raw(path) if path.suffix.lower() == ".npy" else _kept(path)
        known = []
        for level, value in self.levels.items():
            own = getattr(image, level)
            require(own is not None or value is not None, level, None, f"given: {path} does not say it")
            known.append(own if own is not None else value)
        height, width = image.pixels.shape
        fits = min(height, width) >= 2 * self.size
        require(fits, "resolution", self.size, f"at most half of the images' sides, {(height, width)} of {path}")
        return image.pixels, *known

    def get(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """Returns `clean` `(4, size, size)`, 0 black and 1 white, of a random place of an image."""
        pixels, white, black, pattern = self._image(self.places[index])
        top, left, turn = (
            int(torch.randint(n, (1,), generator=generator))
            for n in (pixels.shape[0] // 2 - self.size + 1, pixels.shape[1] // 2 - self.size + 1, 8)
        )
        side = 2 * self.size
        part = pixels[2 * top : 2 * top + side, 2 * left : 2 * left + side].astype(np.float32)
        require(bool(np.isfinite(part).all()), self.name, str(self.places[index]), "a folder of finite images")
        patch = (pack_bayer(torch.from_numpy(part), pattern) - black) / (white - black)
        if self.augment:  # the scene is turned, never the noise: its rows stay rows
            patch = patch.flip(-1) if turn & 1 else patch
            patch = patch.flip(-2) if turn & 2 else patch
            patch = patch.transpose(-1, -2) if turn & 4 else patch
        return {"clean": patch.clamp(0, 1).contiguous()}
