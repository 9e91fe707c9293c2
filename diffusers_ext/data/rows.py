"""Rows of a data set by Hugging Face `datasets`, and what their columns must hold."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from .folder import open_folder

__all__ = ["check_columns", "count_uncaptioned", "read_rows"]

logger = logging.getLogger(__name__)


def read_rows(
    dataset_name: str | None,
    path: Path | None,
    config_name: str | None,
    split: str,
    streaming: bool = False,
    strict: bool = False,
) -> tuple[Any, str]:
    """Opens a split with `datasets`; returns the rows and what is to be said of them beside their number.

    Args:
        dataset_name: the data set's name on the Hub.
        path: instead of it a folder that `save_to_disk` wrote, one of images or parquet files, or a parquet file.
        config_name: the Hub data set's configuration.
        split: its part.
        streaming: open it as a stream.
        strict: refuse images that the metadata leaves out.

    Raises:
        ValueError: there is no such split, or nothing that can be read.
    """
    import datasets

    options: dict[str, Any] = {"split": split, "streaming": streaming}
    if path is None:
        return datasets.load_dataset(str(dataset_name), config_name, **options), ""
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        saved: Any = datasets.load_from_disk(str(path))
        if isinstance(saved, datasets.DatasetDict):
            if split not in saved:
                raise ValueError(f"`split` must be one of {sorted(saved)}, got {split!r}.")
            saved = saved[split]
        return saved.to_iterable_dataset() if streaming else saved, ""
    if path.suffix == ".parquet":
        return datasets.load_dataset("parquet", data_files=str(path), **options), ""
    return open_folder(path, split, streaming, strict)


def check_columns(
    rows: Any, image_column: str, label_column: str | None, caption_column: str | None
) -> tuple[Any, list[str], str | None, list[str] | None]:
    """Checks the columns' types; returns the rows with undecoded images, columns, label column and class names."""
    import datasets

    features = rows.features or rows._resolve_features().features
    if image_column in features:
        feature = features[image_column]
        # Parquet that another program wrote has the bare struct, bytes or paths.
        encoded = isinstance(feature, dict) and {"bytes", "path"} <= feature.keys()
        plain = isinstance(feature, datasets.Value) and feature.dtype.removeprefix("large_") in ("binary", "string")
        if not (isinstance(feature, datasets.Image) or encoded or plain):
            raise ValueError(f"`image_column` must hold images, got {image_column!r} of type {_type(feature)}.")
        rows = rows.cast_column(image_column, datasets.Image(decode=False))
    if caption_column in features and _type(features[caption_column]).removeprefix("large_") != "string":
        raise ValueError(
            f"`caption_column` must hold strings, got {caption_column!r} of type {_type(features[caption_column])}."
        )
    integers = {n for n in features if _type(features[n]).startswith(("int", "uint"))}
    readable = isinstance(rows, datasets.Dataset)

    def unlabelled(column: str) -> list[Any]:
        return [x for x in rows[column][:] if x is None or x < 0] if readable and column in integers else []

    if label_column is None:
        # -1 stands for no label in many data sets.
        declared = [n for n in ("label", "labels") if isinstance(features.get(n), datasets.ClassLabel)]
        label_column = next((n for n in declared if not unlabelled(n)), None)
    elif bad := unlabelled(label_column):
        raise ValueError(f"`label_column` must hold labels >= 0, got {label_column!r} with {bad[0]!r}.")
    classes = None
    if label_column is not None and label_column in features:
        feature = features[label_column]
        if isinstance(feature, datasets.ClassLabel):
            classes = list(feature.names)
        elif readable and label_column in integers:
            classes = [str(i) for i in range(max(rows[label_column]) + 1)]
        else:
            raise ValueError(
                "`label_column` must hold class labels (declared as ClassLabel, or integers where the data is not "
                f"streamed), got {label_column!r} of type {_type(feature)}."
            )
    return rows, list(features), label_column, classes


def count_uncaptioned(rows: Any, column: str, strict: bool) -> str:
    """Counts the rows without a caption."""
    missing = sum(1 for text in rows[column] if not (text or "").strip())
    if not missing:
        return ""
    if strict:
        raise ValueError(
            f"`require_captions` is set and {missing} of {len(rows)} images have no caption in {column!r}."
        )
    logger.warning("%d of %d images have no caption in %r; the empty text stands for it.", missing, len(rows), column)
    return f" ({missing} without a caption)"


def _type(feature: Any) -> str:
    return str(getattr(feature, "dtype", feature))
