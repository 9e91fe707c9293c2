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

__all__ = ["TensorCache", "fingerprint", "write_chunks"]

CHUNK = 64  # rows a file
PREFIX = "precomputed-"
IDENTITY = "identity.json"

Row = dict[str, torch.Tensor]


def write_chunks(
    folder: Path,
    count: int,
    size: int,
    function: Callable[[range], Row],
    accelerator: Accelerator,
    desc: str = "precomputing",
) -> list[Path]:
    """Computes rows and keeps them in files of equal numbers of rows; what is there already is not computed again.

    Files are written whole or not at all, so that an interrupted computation goes on where it stopped; processes share
    the work.

    Args:
        folder: where the files are.
        count: number of rows.
        size: rows a file.
        function: from the rows of a file to its tensors.
        accelerator: divides the files among its processes.
        desc: what the bar says.

    Returns:
        All files, in order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        folder / f"{start:08d}.safetensors": range(start, min(start + size, count)) for start in range(0, count, size)
    }
    mine = list(files)[accelerator.process_index :: accelerator.num_processes]
    missing = [file for file in mine if not file.is_file()]
    for file in tqdm(missing, desc=desc, unit="file", delay=1, disable=not accelerator.is_main_process):
        tensors = {name: value.detach().cpu().contiguous() for name, value in function(files[file]).items()}
        save_file(tensors, file.with_suffix(".tmp"))
        os.replace(file.with_suffix(".tmp"), file)
    accelerator.wait_for_everyone()
    return list(files)


class TensorCache:
    """A list of rows, each a few named tensors of any shapes.

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

        def named(rows: range) -> Row:
            found = zip(rows, function(rows), strict=True)
            return {f"{i}.{name}": value for i, row in found for name, value in row.items()}

        write_chunks(self.folder, self.count, CHUNK, named, accelerator, f"precomputing {self.kind}")

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
