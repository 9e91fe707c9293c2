"""Folders of results that are made one after the other: what is whole stays, and a restart does the rest."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .config import require

__all__ = ["check_settings", "read_json", "write_json"]


def read_json(path: Path) -> dict[str, Any]:
    """Returns what a JSON file holds: nothing where it is missing, was cut, or holds something else."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(path)


def check_settings(folder: Path, settings: dict[str, Any], write: bool = True) -> None:
    """Refuses a folder whose results were made with other settings.

    Args:
        folder: of the results; what they were made with stands in its `settings.json`.
        settings: all that decides a result, of plain types.
        write: write the settings where there are none.

    Raises:
        ValueError: a setting is another one, the settings cannot be read, or the folder cannot be written.
    """
    path = folder / "settings.json"
    settings = json.loads(json.dumps(settings))
    if path.is_file():
        there = read_json(path)
        require(there != {}, "output_dir", str(folder), "another folder: the settings.json of this one cannot be read")
        for name, value in settings.items():
            accepted = f"{there.get(name)!r} as in the results in {folder}, or `output_dir` another folder"
            require(there.get(name) == value, name, value, accepted)
    elif write:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(path, settings)
        except OSError as error:
            raise ValueError(
                f"`output_dir` must be a folder that can be written, got {str(folder)!r}: {error}"
            ) from error
