"""Images in NumPy files."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .exact import check_noise_levels, check_values
from .reading import eight_bits, unit_range

__all__ = ["ArrayRows", "read_arrays"]


class ArrayRows:
    """Rows of arrays in memory, looked up like those of `datasets`."""

    def __init__(self, columns: dict[str, np.ndarray]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(self.columns["image"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns a row."""
        return {name: values[index] for name, values in self.columns.items()}


def read_arrays(path: Path, exact: bool = False, sigma_column: str | None = None) -> dict[str, np.ndarray]:
    """Reads the columns of a NumPy file; see `load_images`.

    Args:
        path: the file.
        exact: keep the images' values instead of rounding them to 8 bits.
        sigma_column: array of noise levels.

    Returns:
        `image`, and `label` and the noise levels where there are any.

    Raises:
        ValueError: an array is missing, or of the wrong kind.
    """
    try:
        loaded = np.load(path, allow_pickle=False)
        arrays = {"images": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"`train_data_dir` must be a NumPy file of plain arrays (no pickled objects), got {str(path)!r}."
        ) from error
    if "images" not in arrays:
        raise ValueError(f"`train_data_dir` must hold an array 'images', got {str(path)!r} with {sorted(arrays)}.")
    images = arrays["images"]
    if images.ndim not in (3, 4) or len(images) == 0 or (images.ndim == 4 and images.shape[3] not in (1, 3, 4)):
        raise ValueError(
            "`images` must have the shape (n, height, width) or (n, height, width, 1, 3 or 4) with n >= 1, got "
            f"{images.shape}."
        )
    if images.dtype.kind not in "fiub":
        raise ValueError(f"`images` must hold uint8 or floats (or uint16, or bool), got {images.dtype}.")
    if exact:
        try:
            check_values(images)
        except ValueError as error:
            raise ValueError(f"`images` cannot be read: {error}.") from error
    elif images.dtype != np.uint8:
        images = unit_range(torch.from_numpy(images.astype(images.dtype.newbyteorder("="))), "images").numpy()
        images = eight_bits(images)
    columns = {"image": images.squeeze(-1) if images.shape[-1] == 1 and images.ndim == 4 else images}
    if "labels" in arrays:
        labels = arrays["labels"]
        if labels.shape != (len(images),) or labels.dtype.kind not in "iu" or labels.min() < 0:
            raise ValueError(
                f"`labels` must be {len(images)} integers >= 0, got {labels.dtype} of shape {labels.shape}."
            )
        columns["label"] = labels
    if sigma_column is not None and sigma_column in arrays:
        check_noise_levels(arrays[sigma_column], sigma_column, len(images))
        columns[sigma_column] = arrays[sigma_column]
    return columns
