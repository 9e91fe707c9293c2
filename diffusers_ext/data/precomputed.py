"""What is computed of images once before training, kept in a folder: latents, text, features."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from .cache import write_chunks

__all__ = ["PrecomputedDataset"]

CHUNK = 256  # images a file


class PrecomputedDataset:
    """A map-style data set that gives what was computed of each image instead of the image.

    Args:
        source: a data set of `load_images`' kind, without random augmentation; its `fingerprint` belongs to the
            identity.
        folder: where the files are.
        identity: whatever the results depend on, plain values; files of another identity are not used.
    """

    def __init__(self, source: Any, folder: str | os.PathLike, identity: dict[str, Any]) -> None:
        digest = hashlib.sha256(json.dumps([identity, source.fingerprint], sort_keys=True).encode()).hexdigest()[:12]
        self.source, self.folder = source, Path(folder) / f"precomputed-{digest}"
        self._columns: dict[str, torch.Tensor] = {}

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.source)

    def compute(
        self, function: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]], accelerator: Accelerator, batch: int
    ) -> None:
        """Computes what is missing, then reads it all.

        Args:
            function: from items of the source to tensors whose rows belong to them.
            accelerator: divides the files among its processes.
            batch: items at a time.
        """

        def columns(rows: range) -> dict[str, torch.Tensor]:
            batches = (rows[first : first + batch] for first in range(0, len(rows), batch))
            parts = [function([self.source.get(i) for i in part]) for part in batches]
            return {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}

        read = [load_file(file) for file in write_chunks(self.folder, len(self), CHUNK, columns, accelerator)]
        self._columns = {name: torch.cat([part[name] for part in read]) for name in read[0]}

    def column(self, name: str) -> torch.Tensor:
        """Returns what was computed of all images under a name."""
        return self._columns[name]

    def get(self, index: int, generator: torch.Generator | None = None) -> dict[str, Any]:
        """Returns what was computed of an image, and its label; `generator` is not needed."""
        return {name: values[index] for name, values in self._columns.items()}
