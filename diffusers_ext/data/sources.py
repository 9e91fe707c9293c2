"""Image data sets for training, read by Hugging Face `datasets` or from NumPy files."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from tqdm.auto import tqdm

from .arrays import ArrayRows, read_arrays
from .exact import check_noise_levels, check_value_range, exact_pixels, opened
from .reading import eight_bits, pixels_of
from .rows import check_columns, count_uncaptioned, read_rows

__all__ = ["ImageDataset", "ImageStream", "load_images"]

logger = logging.getLogger(__name__)

# Each process keeps decoded images until they take this many bytes.
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
        sigma_column: str | None,
        class_names: list[str] | None,
        resolution: int,
        center_crop: bool,
        random_flip: bool,
        channels: int,
        exact: bool,
        value_range: tuple[float, float] | None,
        description: str,
        fingerprint: str | None,
    ) -> None:
        for argument, column in (
            ("image_column", image_column),
            ("label_column", label_column),
            ("caption_column", caption_column),
            ("sigma_column", sigma_column),
        ):
            if column is not None and column not in column_names:
                raise ValueError(f"`{argument}` must be one of the columns {column_names}, got {column!r}.")
        self.column_names, self.image_column = column_names, image_column
        self.label_column, self.caption_column, self.sigma_column = label_column, caption_column, sigma_column
        self.class_names, self.description, self.fingerprint = class_names, description, fingerprint
        self.resolution, self.center_crop, self.random_flip = resolution, center_crop, random_flip
        self.channels, self.exact, self.value_range = channels, exact, value_range

    @property
    def num_classes(self) -> int:
        """Number of classes, 0 without labels."""
        return len(self.class_names) if self.class_names else 0

    def _resized(self, image: Image.Image, size: tuple[int, int]) -> Image.Image:
        """Converts to the wanted channels (transparency on white) and resizes to cover `(height, width)` just."""
        pixels = eight_bits(pixels_of(image, self.channels))
        image = Image.fromarray(pixels[:, :, 0] if self.channels == 1 else pixels)
        height, width = size
        scale = max(width / image.width, height / image.height)
        if scale == 1:
            return image
        covering = max(width, round(image.width * scale)), max(height, round(image.height * scale))
        return image.resize(covering, Image.Resampling.LANCZOS)

    def _pixels(self, row: dict[str, Any], name: str, size: tuple[int, int]) -> np.ndarray:
        """Decodes a row's image to `(height, width, channels)`: uint8 that covers a size just, or exact float32."""
        try:
            if self.exact:
                pixels = exact_pixels(opened(row[self.image_column]), self.channels, self.value_range)
            else:
                pixels = np.asarray(self._resized(_decoded(row[self.image_column]), size))
        except Exception as error:  # Pillow raises many kinds
            raise ValueError(f"image {name} cannot be read: {error}") from error
        if pixels.shape[0] < size[0] or pixels.shape[1] < size[1]:
            raise ValueError(
                f"`resolution` must be at most the size of every image, none of which is resized with `exact`, got "
                f"{size[1]}x{size[0]} with image {name} of {pixels.shape[1]}x{pixels.shape[0]}."
            )
        return pixels if pixels.ndim == 3 else pixels[:, :, None]

    def _augmented(self, pixels: np.ndarray, generator: torch.Generator | None, size: tuple[int, int]) -> torch.Tensor:
        """Crops and flips `(height, width, channels)` pixels and scales uint8 to [-1, 1]."""
        free = [side - wanted for side, wanted in zip(pixels.shape[:2], size, strict=True)]
        if self.center_crop:
            top, left = free[0] // 2, free[1] // 2
        else:
            top, left = (int(torch.randint(f + 1, (1,), generator=generator)) if f else 0 for f in free)
        pixels = pixels[top : top + size[0], left : left + size[1]]
        if self.random_flip and torch.rand(1, generator=generator) < 0.5:
            pixels = pixels[:, ::-1]
        tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
        return tensor if tensor.is_floating_point() else tensor.float().div_(127.5).sub_(1.0)

    def _item(
        self, pixels: np.ndarray, row: dict[str, Any], generator: torch.Generator | None, size: tuple[int, int]
    ) -> dict[str, Any]:
        item: dict[str, Any] = {"pixel_values": self._augmented(pixels, generator, size)}
        if self.label_column is not None:
            item["label"] = int(row[self.label_column])
        if self.caption_column is not None:
            item["caption"] = row[self.caption_column] or ""
        if self.sigma_column is not None:
            check_noise_levels([row[self.sigma_column]], self.sigma_column, 1)
            item["sigma"] = torch.tensor(float(row[self.sigma_column]))
        return item


def _decoded(value: Any) -> Image.Image:
    """Decodes an array, or what `datasets.Image(decode=False)` gives, and turns it upright by its EXIF tag."""
    if isinstance(value, np.ndarray):
        return Image.fromarray(value)
    import datasets

    if value is None:
        raise ValueError("the row has none")
    return datasets.Image().decode_example(value)


def _name(value: Any, otherwise: str) -> str:
    return repr(value["path"]) if isinstance(value, dict) and value.get("path") else otherwise


class ImageDataset(_Images):
    """Images by index; made by `load_images`.

    Attributes:
        column_names: columns of the source.
        class_names: names of the classes in the order of their labels, or `None`.
        description: one line on where the images come from.
        fingerprint: another one once the source or the columns read of it have changed.
        sizes: `(height, width)` of each image where they differ; by default all are squares of the resolution.
    """

    streaming = False
    sizes: Sequence[tuple[int, int]] | None = None

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
            `pixel_values` `(channels, resolution, resolution)` in `[-1, 1]` (exact ones may lie outside), and `label`
            (int), `caption` (str) and `sigma` (float32 scalar) where the data has them.

        Raises:
            ValueError: the image cannot be decoded.
        """
        size = self.sizes[index] if self.sizes is not None else (self.resolution, self.resolution)
        if index not in self._cache:
            row = self._rows[index]
            pixels = self._pixels(row, _name(row[self.image_column], str(index)), size)
            read = (self.label_column, self.caption_column, self.sigma_column)
            kept = {column: row[column] for column in read if column is not None}
            if self._cached_bytes + pixels.nbytes > CACHE_BYTES:
                return self._item(pixels, kept, generator, size)
            self._cache[index] = pixels, kept
            self._cached_bytes += pixels.nbytes
        pixels, row = self._cache[index]
        return self._item(pixels, row, generator, size)

    def original_size(self, index: int) -> tuple[int, int]:
        """Returns `(height, width)` of an image's file, upright; only its header is read."""
        value = self._rows[index][self.image_column]
        if isinstance(value, np.ndarray):
            return value.shape[0], value.shape[1]
        try:
            with Image.open(value["path"] if value.get("bytes") is None else io.BytesIO(value["bytes"])) as image:
                turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
                return (image.width, image.height) if turned else (image.height, image.width)
        except Exception as error:  # Pillow raises many kinds
            raise ValueError(f"image {self.name(index)} cannot be read: {error}") from error

    def name(self, index: int) -> str:
        """Returns what to call an image in a message: its file, where it has one."""
        return _name(self._rows[index][self.image_column], str(index))

    def captions(self) -> list[str]:
        """Returns all captions, an empty one where an image has none."""
        if self.caption_column is None:
            return [""] * len(self)
        return [caption or "" for caption in self._rows[self.caption_column]]

    def noise_levels(self) -> np.ndarray | None:
        """Returns the noise levels of all images, `(n,)` float64, or `None` where no column tells them."""
        if self.sigma_column is None:
            return None
        rows = self._rows
        column = rows.columns[self.sigma_column] if isinstance(rows, ArrayRows) else rows[self.sigma_column][:]
        return np.asarray(column, np.float64)

    def verify(self) -> None:
        """Checks every image's file as far as Pillow can without decoding it.

        That finds what is missing, no image, too small for `exact`, or a damaged PNG; a JPEG that ends early shows
        when it is decoded.

        Raises:
            ValueError: some are bad; all of them are named.
        """
        bad = []
        for index in tqdm(range(len(self)), desc="checking images", unit="image", delay=2):
            value = self._rows[index][self.image_column]
            if isinstance(value, np.ndarray):
                self.get(0)  # arrays were checked as a whole, and are of one kind
                return
            try:
                if value is None:
                    raise ValueError("the row has none")
                source = value["path"] if value.get("bytes") is None else io.BytesIO(value["bytes"])
                with Image.open(source) as image:
                    if self.exact and min(image.size) < self.resolution:
                        raise ValueError(
                            f"{image.width}x{image.height} is below the resolution, and it is not resized"
                        )
                    image.verify()
            except Exception as error:  # Pillow raises many kinds
                bad.append(f"{_name(value, str(index))} ({error})")
        if bad:
            raise ValueError(f"{len(bad)} of {len(self)} images cannot be read: {', '.join(bad)}.")


class ImageStream(_Images):
    """Images in the order of a stream; made by `load_images(streaming=True)`."""

    streaming = True

    def __init__(self, rows: Any, require_captions: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self._rows, self._require_captions = rows, require_captions
        self._uncaptioned = 0

    def epoch(self, seed: int, buffer_size: int) -> Iterator[dict[str, Any]]:
        """Yields undecoded rows, shuffled through a buffer of `buffer_size`."""
        yield from self._rows.shuffle(seed=seed, buffer_size=buffer_size)

    def decode(self, row: dict[str, Any], generator: torch.Generator | None = None) -> dict[str, Any]:
        """Returns a row's sample; see `ImageDataset.get`."""
        name = _name(row[self.image_column], "without a file name")
        if self.caption_column is not None and not (row[self.caption_column] or "").strip():
            if self._require_captions:
                raise ValueError(f"`require_captions` is set and image {name} has no caption.")
            self._uncaptioned += 1
            if str(self._uncaptioned).strip("0") == "1":  # 1, 10, 100, ...
                logger.warning("images without a caption so far: %d, the last is %s.", self._uncaptioned, name)
        size = (self.resolution, self.resolution)
        return self._item(self._pixels(row, name, size), row, generator, size)


def load_images(
    dataset_name: str | None = None,
    *,
    train_data_dir: str | None = None,
    dataset_config_name: str | None = None,
    split: str = "train",
    image_column: str = "image",
    label_column: str | None = None,
    caption_column: str | None = None,
    sigma_column: str | None = None,
    resolution: int = 64,
    center_crop: bool = False,
    random_flip: bool = False,
    channels: int = 3,
    exact: bool = False,
    value_range: tuple[float, float] | None = None,
    streaming: bool = False,
    max_train_samples: int | None = None,
    require_captions: bool = False,
) -> ImageDataset | ImageStream:
    """Loads images for training.

    Args:
        dataset_name: data set on the Hub.
        train_data_dir: instead of it, a folder of images (with class subfolders, `metadata.jsonl` or `metadata.csv`),
            a data set saved by `save_to_disk`, parquet (a file or a folder), or `.npz`/`.npy`: arrays `images`
            `(n, height, width[, channels])`, uint8, uint16 or floats in `[0, 1]`, and `labels` `(n,)`; their columns
            are called `image` and `label`.
        dataset_config_name: the Hub data set's configuration.
        split: which split to read. A local folder is one split, "train", whatever its files and folders are called,
            unless folders train, validation and test hold everything in it. NumPy files have none.
        image_column: column of images.
        label_column: column of class labels; by default `label` or `labels` where the data declares it as classes.
        caption_column: column of captions, one string an image. Where there is none it is the empty text; how many
            these are is logged.
        sigma_column: column of noise levels, one number >= 0 an image, 0 for a clean one; in a NumPy file an array of
            this name. It comes with each sample as it is: a level in the units of `pixel_values`.
        resolution: the shorter side is resized to it, then a square is cropped.
        center_crop: crop the centre; by default a random place.
        random_flip: mirror half of the images.
        channels: 1 for grey, 3 for colour; images are converted, transparency is put on white.
        exact: for measured, noisy images: their values are shifted and scaled as a whole, and neither rounded,
            clipped, converted nor resized. Larger images are cropped, smaller ones refused. Floating-point TIFF and
            floats in a NumPy file may lie outside of the range.
        value_range: with `exact`, the two values in the files that become -1 and 1; by default 0 and the largest of
            uint8 or uint16, and 0 and 1 for floats.
        streaming: read in order instead of by index.
        max_train_samples: use only the first so many.
        require_captions: refuse images without a caption, and images of a folder that its metadata leaves out, instead
            of logging how many there are.

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
    if max_train_samples is not None and (not isinstance(max_train_samples, int) or max_train_samples < 1):
        raise ValueError(f"`max_train_samples` must be an integer >= 1 or left out, got {max_train_samples!r}.")
    if value_range is not None:
        check_value_range(value_range)
        if not exact:
            raise ValueError(f"`value_range` must be left out without `exact`, got {value_range!r}.")
    if require_captions and caption_column is None:
        raise ValueError("`require_captions` must be False where no captions are read: `caption_column` is left out.")
    path, said = Path(train_data_dir) if train_data_dir is not None else None, ""
    if path is not None and not path.exists():
        raise ValueError(f"`train_data_dir` must be an existing folder or file, got {train_data_dir!r}.")
    options: dict[str, Any] = {
        "image_column": image_column,
        "caption_column": caption_column,
        "sigma_column": sigma_column,
        "resolution": resolution,
        "center_crop": center_crop,
        "random_flip": random_flip,
        "channels": channels,
        "exact": exact,
        "value_range": value_range,
    }
    if path is not None and path.suffix in (".npz", ".npy"):
        if streaming:
            raise ValueError(f"`streaming` must be False for a NumPy file, got True with {train_data_dir!r}.")
        columns = read_arrays(path, exact, sigma_column)
        rows: Any = ArrayRows({k: v[:max_train_samples] for k, v in columns.items()})
        names, classes = list(columns), None
        if "label" in columns:
            label_column = label_column or "label"
            classes = [str(i) for i in range(int(columns["label"].max()) + 1)]
        file = path.stat()
        fingerprint = f"{path.resolve()} {file.st_size} {file.st_mtime_ns} {len(rows)}"
    else:
        rows, said = read_rows(dataset_name, path, dataset_config_name, split, streaming, require_captions)
        rows, names, label_column, classes = check_columns(rows, image_column, label_column, caption_column)
        if sigma_column in names and not streaming:
            check_noise_levels(rows[sigma_column][:], str(sigma_column), len(rows))
        if max_train_samples is not None:
            rows = rows.take(max_train_samples) if streaming else rows.select(range(min(max_train_samples, len(rows))))
        if caption_column in names and not streaming:
            said += count_uncaptioned(rows, caption_column, require_captions)
        fingerprint = None if streaming else f"{rows._fingerprint} {image_column} {label_column} {caption_column}"
    if fingerprint is not None and (exact or sigma_column is not None):
        fingerprint += f" {sigma_column} {exact} {value_range}"
    if not streaming and len(rows) == 0:
        raise ValueError(f"`split` must hold images, got {split!r} of {dataset_name or train_data_dir!r} with none.")
    count = "a stream of" if streaming else f"{len(rows):,}"
    options |= {
        "column_names": names,
        "label_column": label_column,
        "class_names": classes,
        "fingerprint": fingerprint,
        "description": f"{count} images from {dataset_name or (path.name if path else '')}{said}",
    }
    return ImageStream(rows, require_captions, **options) if streaming else ImageDataset(rows, **options)
