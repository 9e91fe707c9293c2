"""Image data sets for training, read by Hugging Face `datasets` or from NumPy files."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

__all__ = ["ImageDataset", "ImageStream", "load_images"]

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
SHUFFLE_BUFFER = 1000
# Decoded images are kept when all of them together take at most this many bytes.
CACHE_BYTES = 256 * 2**20


class _Images:
    """What map-style data and streams share: the row's columns and its way to a tensor."""

    def __init__(
        self,
        *,
        column_names: list[str],
        image_column: str,
        label_column: str | None,
        caption_column: str | None,
        class_names: list[str] | None,
        resolution: int,
        center_crop: bool,
        random_flip: bool,
        channels: int,
        description: str,
    ) -> None:
        for argument, column in (
            ("image_column", image_column),
            ("label_column", label_column),
            ("caption_column", caption_column),
        ):
            if column is not None and column not in column_names:
                raise ValueError(f"`{argument}` must be one of the columns {column_names}, got {column!r}.")
        self.column_names, self.image_column = column_names, image_column
        self.label_column, self.caption_column = label_column, caption_column
        self.class_names, self.description = class_names, description
        self.resolution, self.center_crop, self.random_flip = resolution, center_crop, random_flip
        self.channels = channels

    @property
    def num_classes(self) -> int:
        """Number of classes, 0 without labels."""
        return len(self.class_names) if self.class_names else 0

    def _resized(self, image: Image.Image) -> Image.Image:
        """Converts to the wanted channels (transparency on white) and brings the shorter side to the resolution."""
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("L" if self.channels == 1 else "RGB")
        if min(image.size) == self.resolution:
            return image
        scale = self.resolution / min(image.size)
        size = [max(self.resolution, round(side * scale)) for side in image.size]
        return image.resize((size[0], size[1]), Image.Resampling.LANCZOS)

    def _augmented(self, pixels: np.ndarray, generator: torch.Generator | None) -> torch.Tensor:
        """Crops and flips `(height, width, channels)` uint8 pixels and scales them to [-1, 1]."""
        free = [side - self.resolution for side in pixels.shape[:2]]
        if self.center_crop:
            top, left = free[0] // 2, free[1] // 2
        else:
            top, left = (int(torch.randint(f + 1, (1,), generator=generator)) if f else 0 for f in free)
        pixels = pixels[top : top + self.resolution, left : left + self.resolution]
        if self.random_flip and torch.rand(1, generator=generator) < 0.5:
            pixels = pixels[:, ::-1]
        tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
        return tensor.float().div_(127.5).sub_(1.0)

    def _item(self, pixels: np.ndarray, row: dict[str, Any], generator: torch.Generator | None) -> dict[str, Any]:
        item: dict[str, Any] = {"pixel_values": self._augmented(pixels, generator)}
        if self.label_column is not None:
            item["label"] = int(row[self.label_column])
        if self.caption_column is not None:
            item["caption"] = row[self.caption_column]
        return item


def _pixels(image: Image.Image) -> np.ndarray:
    array = np.asarray(image)
    return array if array.ndim == 3 else array[:, :, None]


def _opened(value: Any) -> Image.Image:
    """Opens what `datasets.Image(decode=False)` gives: bytes, or a path."""
    if value.get("bytes") is not None:
        return Image.open(io.BytesIO(value["bytes"]))
    return Image.open(value["path"])


class ImageDataset(_Images):
    """Images by index; made by `load_images`.

    Attributes:
        column_names: columns of the source.
        class_names: names of the classes in the order of their labels, or `None`.
        description: one line on where the images come from.
    """

    streaming = False

    def __init__(self, rows: Any, **options: Any) -> None:
        super().__init__(**options)
        self._rows = rows
        self._cache: dict[int, tuple[np.ndarray, dict[str, Any]]] = {}
        self._cached_bytes = 0

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns `get(index)`; raises `IndexError` past the end, so that iteration ends."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} images")
        return self.get(index)

    def get(self, index: int, generator: torch.Generator | None = None) -> dict[str, Any]:
        """Returns one sample.

        Args:
            index: in `0..len-1`.
            generator: source of the random crop and flip, by default torch's global one.

        Returns:
            `pixel_values` `(channels, resolution, resolution)` in `[-1, 1]`, `label` (int) and `caption` (str) where
            the data has them.

        Raises:
            ValueError: the image cannot be decoded.
        """
        if index not in self._cache:
            row = self._rows[index]
            try:
                image = row[self.image_column]
                image = _opened(image) if isinstance(image, dict) else Image.fromarray(image)
                pixels = _pixels(self._resized(image))
            except (OSError, ValueError, SyntaxError) as error:
                raise ValueError(f"image {self._name(index)} cannot be read: {error}") from error
            kept = {column: row[column] for column in (self.label_column, self.caption_column) if column is not None}
            if self._cached_bytes + pixels.nbytes > CACHE_BYTES:
                return self._item(pixels, kept, generator)
            self._cache[index] = pixels, kept
            self._cached_bytes += pixels.nbytes
        pixels, row = self._cache[index]
        return self._item(pixels, row, generator)

    def verify(self) -> None:
        """Checks that every image opens.

        Raises:
            ValueError: some do not; the first ten are named.
        """
        bad = []
        for index in tqdm(range(len(self)), desc="checking images", unit="image", delay=2):
            value = self._rows[index][self.image_column]
            if not isinstance(value, dict):
                return  # arrays were checked as a whole
            try:
                with _opened(value) as image:
                    image.verify()
            except Exception as error:  # Pillow raises many kinds
                bad.append(f"{self._name(index)} ({error})")
        if bad:
            raise ValueError(f"{len(bad)} of {len(self)} images cannot be read: {', '.join(bad[:10])}.")

    def _name(self, index: int) -> str:
        value = self._rows[index][self.image_column]
        return repr(value["path"]) if isinstance(value, dict) and value.get("path") else str(index)


class ImageStream(_Images):
    """Images in the order of a stream; made by `load_images(streaming=True)`."""

    streaming = True

    def __init__(self, rows: Any, **options: Any) -> None:
        super().__init__(**options)
        self._rows = rows

    def epoch(self, seed: int) -> Iterator[dict[str, Any]]:
        """Yields undecoded rows, shuffled through a buffer of 1,000."""
        yield from self._rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)

    def decode(self, row: dict[str, Any], generator: torch.Generator | None = None) -> dict[str, Any]:
        """Returns a row's sample; see `ImageDataset.get`."""
        return self._item(_pixels(self._resized(_opened(row[self.image_column]))), row, generator)


class _Arrays:
    """Rows of arrays in memory, looked up like those of `datasets`."""

    def __init__(self, columns: dict[str, np.ndarray]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["image"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: values[index] for name, values in self.columns.items()}


def load_images(
    dataset_name: str | None = None,
    *,
    train_data_dir: str | None = None,
    dataset_config_name: str | None = None,
    split: str = "train",
    image_column: str = "image",
    label_column: str | None = None,
    caption_column: str | None = None,
    resolution: int = 64,
    center_crop: bool = False,
    random_flip: bool = False,
    channels: int = 3,
    streaming: bool = False,
    max_train_samples: int | None = None,
) -> ImageDataset | ImageStream:
    """Loads images for training.

    Args:
        dataset_name: data set on the Hub.
        train_data_dir: instead of it, a folder of images (with class subfolders or `metadata.jsonl`), a data set saved
            by `save_to_disk`, parquet (a file or a folder), or `.npz`/`.npy`: arrays `images`
            `(n, height, width[, channels])`, uint8 or floats in `[0, 1]`, and `labels` `(n,)`.
        dataset_config_name: the Hub data set's configuration.
        split: which split to read.
        image_column: column of images.
        label_column: column of class labels; by default `label` or `labels` where the data declares it as classes.
        caption_column: column of captions.
        resolution: the shorter side is resized to it, then a square is cropped.
        center_crop: crop the centre; by default a random place.
        random_flip: mirror half of the images.
        channels: 1 for grey, 3 for colour; images are converted, transparency is put on white.
        streaming: read in order instead of by index.
        max_train_samples: use only the first so many.

    Returns:
        A map-style data set, or a stream.

    Raises:
        ValueError: an argument is wrong, or there are no images.

    Example:
        >>> from diffusers_ext import load_images
        >>> from diffusers_ext.data.digits import DIGITS
        >>> digits = load_images(train_data_dir=str(DIGITS), resolution=28, channels=1)
        >>> len(digits), digits.num_classes, tuple(digits[0]["pixel_values"].shape)
        (1000, 10, (1, 28, 28))
    """
    if (dataset_name is None) == (train_data_dir is None):
        raise ValueError(
            f"exactly one of `dataset_name` and `train_data_dir` must be given, got {dataset_name!r} and "
            f"{train_data_dir!r}."
        )
    if not isinstance(resolution, int) or resolution < 1:
        raise ValueError(f"`resolution` must be an integer >= 1, got {resolution!r}.")
    if channels not in (1, 3):
        raise ValueError(f"`channels` must be 1 or 3, got {channels!r}.")
    if max_train_samples is not None and max_train_samples < 1:
        raise ValueError(f"`max_train_samples` must be an integer >= 1 or left out, got {max_train_samples!r}.")
    path = Path(train_data_dir) if train_data_dir is not None else None
    if path is not None and not path.exists():
        raise ValueError(f"`train_data_dir` must be an existing folder or file, got {train_data_dir!r}.")
    options: dict[str, Any] = {
        "image_column": image_column,
        "caption_column": caption_column,
        "resolution": resolution,
        "center_crop": center_crop,
        "random_flip": random_flip,
        "channels": channels,
    }
    if path is not None and path.suffix in (".npz", ".npy"):
        if streaming:
            raise ValueError(f"`streaming` must be False for a NumPy file, got True with {train_data_dir!r}.")
        columns = _arrays(path)
        rows: Any = _Arrays({k: v[:max_train_samples] for k, v in columns.items()})
        names, classes = list(columns), None
        if "label" in columns:
            label_column = label_column or "label"
            classes = [str(i) for i in range(int(columns["label"].max()) + 1)]
    else:
        rows, names, label_column, classes = _rows(
            dataset_name, path, dataset_config_name, split, image_column, label_column, streaming
        )
        if max_train_samples is not None:
            rows = rows.take(max_train_samples) if streaming else rows.select(range(min(max_train_samples, len(rows))))
    count = "a stream of" if streaming else f"{len(rows):,}"
    options |= {
        "column_names": names,
        "label_column": label_column,
        "class_names": classes,
        "description": f"{count} images from {dataset_name or (path.name if path else '')}",
    }
    return ImageStream(rows, **options) if streaming else ImageDataset(rows, **options)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    loaded = np.load(path, allow_pickle=False)
    arrays = {"images": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    if "images" not in arrays:
        raise ValueError(f"`train_data_dir` must hold an array 'images', got {str(path)!r} with {sorted(arrays)}.")
    images = arrays["images"]
    if images.ndim not in (3, 4) or len(images) == 0 or (images.ndim == 4 and images.shape[3] not in (1, 3, 4)):
        raise ValueError(
            "`images` must have the shape (n, height, width) or (n, height, width, 1, 3 or 4) with n >= 1, got "
            f"{images.shape}."
        )
    if images.dtype.kind == "f":
        if not (np.isfinite(images).all() and images.min() >= 0 and images.max() <= 1):
            raise ValueError(
                f"`images` as floats must be finite and lie in [0, 1], got a range from {images.min()} to {images.max()}."
            )
        images = np.round(images * 255).astype(np.uint8)
    elif images.dtype != np.uint8:
        raise ValueError(f"`images` must be uint8 or float, got {images.dtype}.")
    columns = {"image": images.squeeze(-1) if images.shape[-1] == 1 and images.ndim == 4 else images}
    if "labels" in arrays:
        labels = arrays["labels"]
        if labels.shape != (len(images),) or labels.dtype.kind not in "iu" or labels.min() < 0:
            raise ValueError(
                f"`labels` must be {len(images)} integers >= 0, got {labels.dtype} of shape {labels.shape}."
            )
        columns["label"] = labels
    return columns


def _rows(
    dataset_name: str | None,
    path: Path | None,
    config_name: str | None,
    split: str,
    image_column: str,
    label_column: str | None,
    streaming: bool,
) -> tuple[Any, list[str], str | None, list[str] | None]:
    """Reads with `datasets`; returns the rows with undecoded images, columns, label column and class names."""
    import datasets

    if path is None:
        rows: Any = datasets.load_dataset(str(dataset_name), config_name, split=split, streaming=streaming)
    elif (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        rows = datasets.load_from_disk(str(path))
        rows = rows[split] if isinstance(rows, datasets.DatasetDict) else rows
        rows = rows.to_iterable_dataset() if streaming else rows
    else:
        parquet = [path] if path.suffix == ".parquet" else sorted(path.rglob("*.parquet"))
        if parquet:
            files = [str(p) for p in parquet]
            rows = datasets.load_dataset("parquet", data_files=files, split="train", streaming=streaming)
        else:
            if not path.is_dir() or not any(p.suffix.lower() in SUFFIXES for p in path.rglob("*")):
                raise ValueError(f"`train_data_dir` must hold images ({', '.join(sorted(SUFFIXES))}), got {str(path)!r}.")
            rows = datasets.load_dataset("imagefolder", data_dir=str(path), split=split, streaming=streaming)
    features = rows.features or rows._resolve_features().features
    names = list(features)
    if image_column in features:
        rows = rows.cast_column(image_column, datasets.Image(decode=False))
    if label_column is None:
        label_column = next((n for n in ("label", "labels") if isinstance(features.get(n), datasets.ClassLabel)), None)
    classes = None
    if label_column in features:
        feature = features[label_column]
        if isinstance(feature, datasets.ClassLabel):
            classes = list(feature.names)
        elif not streaming and str(feature.dtype).startswith(("int", "uint")):
            classes = [str(i) for i in range(max(rows[label_column]) + 1)]
        else:
            raise ValueError(
                f"`label_column` must hold class labels (integers, or declared as ClassLabel), got {label_column!r} of "
                f"type {getattr(feature, 'dtype', feature)}."
            )
    return rows, names, label_column, classes
