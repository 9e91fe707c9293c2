"""What lies in a local folder of images or parquet files: listed file by file, never guessed from names."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

__all__ = ["image_files", "open_folder"]

logger = logging.getLogger(__name__)

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
SHARD = re.compile(r"([a-z]+)(-\d{5}-of-\d{5})?\.parquet")


def open_folder(path: Path, split: str, streaming: bool, strict: bool = False) -> tuple[Any, str]:
    """Opens a folder of images, or of parquet files, with `datasets`.

    All its files are one split, "train", whatever they and their folders are called. Only where folders of the names
    train, validation and test (or val, valid, dev, eval ...) hold everything are they splits; likewise parquet files
    called `train.parquet` or `train-00000-of-00001.parquet`, as on the Hub.

    Args:
        path: the folder.
        split: which split, in `datasets`' notation.
        streaming: open it as a stream.
        strict: refuse images that the metadata leaves out.

    Returns:
        The rows, and what is to be said of them beside their number.

    Raises:
        ValueError: it holds no images, not this split, or, if `strict`, images without metadata.
    """
    import datasets
    from datasets.data_files import DataFilesDict, DataFilesList

    files = _files(path)
    tables = [file for file in files if file.endswith(".parquet") and os.path.basename(file) not in METADATA]
    images = tables or image_files(path)
    if not images:
        raise ValueError(
            f"`train_data_dir` must hold images, such as .png or .jpg, or .parquet files, got {str(path)!r}."
        )
    metadata = [] if tables else [file for file in files if os.path.basename(file) in METADATA]
    ignored = Counter(os.path.splitext(file)[1] or os.path.basename(file) for file in {*files} - {*images, *metadata})
    if ignored:
        logger.info("%s: not read as images: %s.", path, ", ".join(f"{n} {kind}" for kind, n in ignored.most_common()))
    splits = _splits(path, images, metadata)
    wanted = [name.strip() for name in re.sub(r"\[.*?\]", "", split).split("+")]
    if not set(wanted) <= set(splits):
        raise ValueError(f"`split` must be one of {sorted(splits)}, got {split!r} of the folder {str(path)!r}.")
    listed = DataFilesDict()
    for name, members in splits.items():
        # What `datasets` keeps of these files is good until one of them changes.
        origin: Any = [(str(s.st_size), str(s.st_mtime_ns)) for s in map(os.stat, members)]
        listed[name] = DataFilesList(members, origin)
    kind = "parquet" if tables else "imagefolder"
    rows: Any = datasets.load_dataset(kind, data_files=listed, split=split, streaming=streaming)
    if tables:
        return rows, ""
    mine = sorted({*images}.intersection(file for name in wanted for file in splits[name]))
    _say_labels(path, mine, rows, metadata)
    if not metadata:
        return rows, ""
    return rows, "" if "[" in split else _left_out(rows, mine, path, strict)


def image_files(path: str | os.PathLike) -> list[str]:
    """Returns the absolute paths of all images in a folder and below, sorted."""
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    return [file for file in _files(Path(path)) if os.path.splitext(file)[1].lower() in ImageFolder.EXTENSIONS]


def _files(path: Path) -> list[str]:
    """Returns all files, sorted, but those that are hidden; links to folders are followed, once each."""
    found, seen = [], set()
    for folder, folders, names in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        found += [os.path.join(folder, name) for name in names if not name.startswith(".")]
    return sorted(os.path.abspath(file) for file in found)


def _splits(path: Path, images: list[str], metadata: list[str]) -> dict[str, list[str]]:
    """Returns the files of each split; "train" alone where the folder does not say it without doubt."""
    root, splits = os.path.abspath(path), {}
    for file in sorted([*images, *metadata]):
        *folders, base = os.path.relpath(file, root).split(os.sep)
        shard = SHARD.fullmatch(base)
        name = SPLITS.get(folders[0] if folders else "") or SPLITS.get(shard[1] if shard else "")
        if name is None:
            return {"train": sorted([*images, *metadata])}
        splits.setdefault(name, []).append(file)
    if splits.keys() != {"train"}:
        counts = ", ".join(f"{name} ({len(members)} files)" for name, members in splits.items())
        logger.warning("%s: nothing stands beside the splits %s; they are read as such.", path, counts)
    return splits


def _say_labels(path: Path, images: list[str], rows: Any, metadata: list[str]) -> None:
    """Says when folders are no classes, as `datasets` decides it: at different depths, or beside metadata."""
    folders = {os.path.dirname(file) for file in images}
    even = len({folder.count(os.sep) for folder in folders}) == 1
    if not even and not metadata:
        logger.warning(
            "%s: its %d folders of images lie at different depths and are not read as classes.", path, len(folders)
        )
    columns = _features(rows) if metadata else {}
    if even and len(folders) > 1 and metadata and not {"label", "labels"} & columns.keys():
        logger.warning(
            "%s: its %d folders of images are not read as classes, because there is a %s: classes are a column there.",
            *(path, len(folders), os.path.basename(metadata[0])),
        )


def _features(rows: Any) -> Any:
    return rows.features or rows._resolve_features().features


def _left_out(rows: Any, images: list[str], path: Path, strict: bool) -> str:
    """Counts the images that no line of the metadata names."""
    import datasets

    columns = [name for name, feature in _features(rows).items() if isinstance(feature, datasets.Image)]
    if not columns:
        return ""
    for name in columns:
        rows = rows.cast_column(name, datasets.Image(decode=False))
    named = {row[name]["path"] for row in rows.select_columns(columns) for name in columns if row[name] is not None}
    named = {os.path.abspath(file) for file in named}
    missing = [os.path.relpath(file, path) for file in images if file not in named]
    if not missing:
        return ""
    shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
    if strict:
        raise ValueError(
            f"`require_captions` is set and {len(missing)} of {len(images)} images of {str(path)!r} have no line in "
            f"the metadata: {shown}."
        )
    logger.warning(
        "%s: %d of %d images have no line in the metadata and are left out: %s.",
        path,
        len(missing),
        len(images),
        shown,
    )
    return f" ({len(missing)} more without a line in the metadata)"
