"""The small models and data that ship with the package, found by name."""

from __future__ import annotations

from pathlib import Path

__all__ = ["ASSETS", "asset_path"]

ASSETS = Path(__file__).resolve().parent.parent / "assets"


def asset_path(name: str) -> Path:
    """Returns the folder of a shipped model or data set, for `from_pretrained` or `train_data_dir`.

    Args:
        name: such as "digits-flow" for a model, "digits" for the images it was trained on.

    Raises:
        ValueError: nothing of that name ships.

    Example:
        >>> from diffusers_ext import asset_path
        >>> (asset_path("digits-flow") / "model_index.json").is_file()
        True
    """
    shipped = sorted(path.name for path in ASSETS.iterdir() if path.is_dir())
    if name not in shipped:
        raise ValueError(f"`name` must be one of {shipped}, got {name!r}.")
    return ASSETS / name
