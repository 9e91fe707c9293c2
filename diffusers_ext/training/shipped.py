"""Configurations that ship with the package, found by name: of accelerate, of training runs, and of networks."""

from __future__ import annotations

from pathlib import Path

__all__ = ["find_config", "shipped_configs"]

FOLDER = Path(__file__).resolve().parent / "configs"


def shipped_configs() -> dict[str, Path]:
    """Returns the shipped files by name, without their endings."""
    return {path.stem: path for path in sorted(FOLDER.iterdir())}


def find_config(argument: str, name: str) -> Path:
    """Resolves a path, or the name of a shipped configuration.

    Args:
        argument: the argument that gave it, for the message.
        name: a path such as `"my/digits.yaml"`, or a name such as `"digits"`.

    Raises:
        ValueError: it is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_configs()
    if name in shipped:
        return shipped[name]
    raise ValueError(f"`{argument}` must be an existing file or one of {list(shipped)}, which ship, got {name!r}.")
