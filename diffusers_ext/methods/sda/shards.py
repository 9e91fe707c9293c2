"""A labelled image data set that grows file by file, from any number of processes, and is the same however it grew.

The set has fixed shards, each one parquet file that a process writes under a temporary name and renames. What is made
is fixed by `settings.json`; a restart with other settings is refused, and one with the same does what is missing.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

__all__ = ["ImageShards", "check_whole", "to_pil"]


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """Turns `(batch, 1 or 3, height, width)` images in [-1, 1] into 8-bit pictures."""
    pixels = ((images.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p) for p in pixels]


class ImageShards:
    """The shards of one data set in a folder.

    Args:
        folder: where it is or will be.
        settings: what decides its content, plain types only.
        count: images in all.
        shard_size: images a shard; a shard is made and written as a whole.
        class_names: names of the labels.

    Raises:
        ValueError: the folder holds a set with other settings.
    """

    def __init__(
        self, folder: str | os.PathLike, settings: dict[str, Any], count: int, shard_size: int, class_names: list[str]
    ) -> None:
        self.folder, self.count, self.shard_size = Path(folder), count, shard_size
        self.class_names = class_names
        self.shards = -(-count // shard_size)
        whole = {**settings, "count": count, "shard_size": shard_size, "class_names": class_names}
        whole = json.loads(json.dumps(whole))
        path = self.folder / "settings.json"
        if path.is_file():
            there = json.loads(path.read_text())
            for name in sorted({*there, *whole}):
                if there.get(name) != whole.get(name):
                    raise ValueError(
                        f"`{name}` must be {there.get(name)!r} as in the half-made or finished set in {self.folder}, "
                        f"or `output_dir` another folder; got {whole.get(name)!r}."
                    )
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".settings-{os.getpid()}.tmp")
            partial.write_text(json.dumps(whole, indent=1) + "\n")
            partial.replace(path)

    def path(self, shard: int) -> Path:
        """Returns a shard's file."""
        return self.folder / "data" / f"train-{shard:05d}-of-{self.shards:05d}.parquet"

    def missing(self) -> list[int]:
        """Returns the shards that are still to be made."""
        return [shard for shard in range(self.shards) if not self.path(shard).is_file()]

    def indices(self, shard: int) -> range:
        """Returns the indices of a shard's images."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.count))

    def fill(self, make: Callable[[range], list[dict[str, Any]]], rank: int, world: int, title: str) -> int:
        """Makes this process's share of the missing shards.

        Args:
            make: maps indices to rows with `image`, `label` and `index`.
            rank: index of this process.
            world: number of processes.
            title: what the progress bar says.

        Returns:
            How many rows were made; fewer than the indices where some could not be.
        """
        mine = [shard for shard in self.missing() if shard % world == rank]
        made = 0
        total = sum(len(self.indices(shard)) for shard in mine)
        with tqdm(total=total, desc=title, unit="image", disable=rank != 0) as bar:
            for shard in mine:
                rows = make(self.indices(shard))
                self._write(shard, rows)
                made += len(rows)
                bar.update(len(self.indices(shard)))
        return made

    def _write(self, shard: int, rows: list[dict[str, Any]]) -> None:
        import datasets
        import pyarrow.parquet as pq

        features = datasets.Features(
            {
                "image": datasets.Image(),
                "label": datasets.ClassLabel(names=self.class_names),
                "index": datasets.Value("int64"),
            }
        )
        columns: dict[str, Any] = {name: [row[name] for row in rows] for name in ("label", "index")}
        columns["image"] = [{"bytes": _png(row["image"]), "path": None} for row in rows]
        path = self.path(shard)
        path.parent.mkdir(exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        # Not `to_parquet`, which draws a progress bar of its own.
        pq.write_table(datasets.Dataset.from_dict(columns, features=features).data.table, partial)
        partial.replace(path)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def check_whole(folder: str | os.PathLike) -> None:
    """Checks that a set which is written by shards is finished; other folders pass.

    Raises:
        ValueError: shards are missing.
    """
    path = Path(folder) / "settings.json"
    if not path.is_file():
        return
    settings = json.loads(path.read_text())
    there = len(list((Path(folder) / "data").glob("train-*.parquet")))
    expected = -(-settings["count"] // settings["shard_size"])
    if there != expected:
        raise ValueError(
            f"`train_data_dir` must be a finished data set, got {str(folder)!r} with {there} of {expected} shards: "
            "give the command that makes it once more, it goes on where it stopped."
        )
