"""Tensors that are computed once, kept in safetensors files and read by memory mapping."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm

__all__ = ["TensorCache", "fingerprint"]

CHUNK = 64  # rows a file
PREFIX = "precomputed-"
IDENTITY = "identity.json"

Row = dict[str, torch.Tensor]


class TensorCache:
    """A list of rows, each a few named tensors of any shapes.

    Files are written whole or not at all, so that an interrupted computation goes on where it stopped; processes share
    the work.

    Args:
        folder: where the files are, in a folder of their own.
        kind: what the rows are, a word.
        identity: whatever they depend on, plain values; files of another identity are not used.
        count: how many there are.
    """

    def __init__(self, folder: str | os.PathLike, kind: str, identity: dict[str, Any], count: int) -> None:
        self.identity, self.count, self.kind = identity, count, kind
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
        self.folder = Path(folder) / f"{PREFIX}{kind}-{digest}"

    def __len__(self) -> int:
        """Returns the number of rows."""
        return self.count

    def differences(self) -> list[str]:
        """Compares with rows of this kind that are in the folder already; says how their identity differs."""
        if (self.folder / IDENTITY).is_file():
            return []
        found = []
        for path in sorted(self.folder.parent.glob(f"{PREFIX}{self.kind}-*/{IDENTITY}")):
            theirs = json.loads(path.read_text())
            found += [f"{k} {theirs.get(k)!r} (now {v!r})" for k, v in self.identity.items() if theirs.get(k) != v]
        return found

    @property
    def complete(self) -> bool:
        """Whether all rows have been computed."""
        return all(self._file(first).is_file() for first in range(0, self.count, CHUNK))

    def compute(self, function: Callable[[Sequence[int]], list[Row]], accelerator: Accelerator) -> None:
        """Computes the rows that are missing.

        Args:
            function: from indices to their rows.
            accelerator: divides the files among its processes.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if accelerator.is_main_process:
            partial = self.folder / f"{IDENTITY}.tmp"
            partial.write_text(json.dumps(self.identity, indent=1) + "\n")
            os.replace(partial, self.folder / IDENTITY)
        starts = range(0, self.count, CHUNK)[accelerator.process_index :: accelerator.num_processes]
        missing = [first for first in starts if not self._file(first).is_file()]
        bar = {"desc": f"precomputing {self.kind}", "unit": "file", "delay": 1}
        for first in tqdm(missing, disable=not accelerator.is_main_process, **bar):
            rows = range(first, min(first + CHUNK, self.count))
            columns = {
                f"{i}.{name}": value.detach().cpu().contiguous()
                for i, row in zip(rows, function(rows), strict=True)
                for name, value in row.items()
            }
            partial = self._file(first).with_suffix(".tmp")
            save_file(columns, partial)
            os.replace(partial, self._file(first))
        accelerator.wait_for_everyone()

    def __getitem__(self, index: int) -> Row:
        """Returns a row; its tensors are read now and belong to the caller."""
        first = index // CHUNK * CHUNK
        file, names = _opened(str(self._file(first)))
        return {name.split(".", 1)[1]: file.get_tensor(name) for name in names[index]}

    def _file(self, first: int) -> Path:
        return self.folder / f"{first:08d}.safetensors"


@functools.lru_cache(maxsize=64)
def _opened(path: str) -> tuple[Any, dict[int, list[str]]]:
    """Maps a file; returns it with the names of each row."""
    file: Any = safe_open(path, "pt")
    names: dict[int, list[str]] = {}
    for name in file.keys():  # noqa: SIM118 - not a mapping
        names.setdefault(int(name.split(".", 1)[0]), []).append(name)
    return file, names


def fingerprint(module: nn.Module) -> str:
    """Returns a digest of a module's configuration and of some numbers of each of its tensors."""
    # Without the place that it was loaded from: what lies elsewhere with the same weights is the same.
    config: Any = getattr(module, "config", {})
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    config.pop("_name_or_path", None)
    digest = hashlib.sha256(str(sorted(config.items())).encode())
    for name, value in module.state_dict().items():
        values = value.detach().flatten()
        some = values[:: max(1, len(values) // 64)].double().cpu().numpy()
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(some.tobytes())
    return digest.hexdigest()[:16]
