"""Raw images and frames as files: DNG, NEF, ARW and others by rawpy, arrays as .npy, grey .tif."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffusers_ext.training.config import require

__all__ = ["RAW_SUFFIXES", "RawImage", "frames_by_iso", "raw_files", "read_frames", "read_raw"]

ARRAYS = (".npy", ".tif", ".tiff")
CAMERA_FILES = (".arw", ".cr2", ".cr3", ".dng", ".nef", ".nrw", ".orf", ".pef", ".raf", ".rw2", ".srw")
RAW_SUFFIXES = (*ARRAYS, *CAMERA_FILES)
ISO_TAG, TEMPERATURE_TAG = 34855, 37888


@dataclass
class RawImage:
    """A raw image; what its file does not say is `None`.

    Attributes:
        pixels: `(height, width)` DN.
        pattern: colours of the upper left 2x2 block, such as `"RGGB"`.
        black_level: in DN.
        white_level: in DN.
        iso: of the exposure.
        exposure: in seconds.
        temperature: in degrees Celsius.
        white_balance: factors of red, green and blue.
        color_matrix: `(3, 3)` from the camera's colours to linear sRGB.
    """

    pixels: np.ndarray
    pattern: str | None = None
    black_level: float | None = None
    white_level: float | None = None
    iso: float | None = None
    exposure: float | None = None
    temperature: float | None = None
    white_balance: tuple[float, float, float] | None = None
    color_matrix: np.ndarray | None = None


def read_raw(path: str | os.PathLike) -> RawImage:
    """Reads a raw image.

    Args:
        path: of one of the kinds `RAW_SUFFIXES`; cameras' files need the extra `raw`.

    Raises:
        ValueError: the file is missing, of an unknown kind, cannot be read, is no two-dimensional array of numbers, or
            its sensor has no 2x2 Bayer pattern (X-Trans, monochrome, linear).
        ImportError: rawpy is not installed.
    """
    path = Path(path)
    require(path.is_file(), "raw", str(path), "a file that exists")
    suffix = path.suffix.lower()
    require(suffix in RAW_SUFFIXES, "raw", str(path), f"a file of one of the kinds {list(RAW_SUFFIXES)}")
    if suffix not in ARRAYS:
        return _camera_file(path)
    try:
        if suffix == ".npy":
            pixels = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            with Image.open(path) as image:
                pixels = np.asarray(image)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"`raw` must be a file that can be read, got {str(path)!r}: {error}") from error
    numbers = pixels.ndim == 2 and pixels.dtype.kind in "uif"
    require(numbers, "raw", f"{path}, {pixels.dtype} {pixels.shape}", "numbers (height, width)")
    return RawImage(pixels)


def _camera_file(path: Path) -> RawImage:
    try:
        import rawpy
    except ImportError as error:
        raise ImportError("cameras' raw files need rawpy: pip install 'diffusers-ext[raw]'") from error
    try:
        with rawpy.imread(str(path)) as raw:
            colours = raw.raw_pattern
            if colours is None or colours.shape != (2, 2) or raw.num_colors != 3:
                kind = "none" if colours is None else f"{colours.shape[0]}x{colours.shape[1]}"
                raise ValueError(
                    f"`raw` must be of a sensor with a 2x2 Bayer pattern, got {str(path)!r} with {kind}: X-Trans, "
                    "monochrome and linear files are not read."
                )
            names = raw.color_desc.decode()
            pattern = "".join(names[c] for c in raw.raw_colors_visible[:2, :2].ravel())
            balance = [float(v) for v in raw.camera_whitebalance[:3]]
            matrix = np.array(raw.color_matrix)[:3, :3]
            iso, exposure, temperature = _exposure(raw, path)
            return RawImage(
                raw.raw_image_visible.copy(),
                pattern,
                float(np.mean(raw.black_level_per_channel)),
                float(raw.white_level),
                iso,
                exposure,
                temperature,
                (balance[0] / balance[1], 1.0, balance[2] / balance[1]) if min(balance) > 0 else None,
                matrix if matrix.any() else None,
            )
    except rawpy.LibRawError as error:
        raise ValueError(f"`raw` must be a file that rawpy can read, got {str(path)!r}: {error}") from error


def _exposure(raw: Any, path: Path) -> tuple[float | None, float | None, float | None]:
    """Returns ISO, seconds and temperature: by rawpy, or by tags that it does not look for."""
    iso, exposure, temperature = float(raw.other.iso_speed), float(raw.other.shutter_speed), None
    if path.suffix.lower() == ".dng":
        try:
            import tifffile
        except ImportError:
            pass
        else:
            with tifffile.TiffFile(path) as file:
                tags = file.pages[0].tags  # type: ignore[union-attr]
                found = {code: tags[code].value for code in (ISO_TAG, TEMPERATURE_TAG) if code in tags}
            value = found.get(ISO_TAG, iso)
            iso = iso or float(value[0] if isinstance(value, tuple) else value)
            if TEMPERATURE_TAG in found:
                over, under = found[TEMPERATURE_TAG]
                temperature = over / under
    return iso or None, exposure or None, temperature


def raw_files(folder: str | os.PathLike, name: str) -> list[Path]:
    """Returns the raw files of a folder and of those in it, in the order of their names.

    Args:
        folder: to look through.
        name: the argument that named it, for messages.

    Raises:
        ValueError: it does not exist, or holds none.
    """
    require(Path(folder).is_dir(), name, str(folder), "an existing folder")
    found = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in RAW_SUFFIXES)
    require(len(found) > 0, name, str(folder), f"a folder with raw files, {list(RAW_SUFFIXES)}")
    return found


def frames_by_iso(folder: str | os.PathLike, name: str) -> dict[float, list[Path]]:
    """Sorts the frames of a folder by ISO: by the name of their folder, such as 800 or ISO800, else as the file says.

    Raises:
        ValueError: there are none, or neither name nor file says the ISO.
    """
    found: dict[float, list[Path]] = {}
    for path in raw_files(folder, name):
        match = re.fullmatch(r"(?:iso)?[ _-]?(\d+(?:\.\d+)?)", path.parent.name, re.IGNORECASE)
        iso = float(match[1]) if match else read_raw(path).iso if path.suffix.lower() in CAMERA_FILES else None
        accepted = "in folders that are named by their ISO, such as 800, or files of a camera that say it"
        require(iso is not None, name, str(path), accepted)
        found.setdefault(iso or 0.0, []).append(path)
    return dict(sorted(found.items()))


def read_frames(paths: Iterable[Path], seen: list[RawImage]) -> Iterator[np.ndarray]:
    """Reads frames one after the other.

    Warns once where a frame's exposure or temperature differs from that of the first one: dark shading depends on
    both.

    Args:
        paths: of the frames.
        seen: gets the first frame that was read, without pixels, if it is empty; shared by all ISOs.
    """
    warned = False
    for path in paths:
        image = read_raw(path)
        yield image.pixels
        image.pixels = image.pixels[:0]
        if not seen:
            seen.append(image)
        first = seen[0]
        for what, one, other, far in (
            ("exposure", first.exposure, image.exposure, 0.01),
            ("temperature", first.temperature, image.temperature, 5.0),
        ):
            if one is None or other is None or warned:
                continue
            if abs(one - other) > (far * one if what == "exposure" else far):
                warned = True
                warnings.warn(
                    f"frames differ in {what}, {one:g} and {other:g} ({path}): dark shading depends on it",
                    stacklevel=2,
                )
