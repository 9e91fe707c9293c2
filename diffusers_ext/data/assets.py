"""The small models and data that ship with the package, found by name."""

from __future__ import annotations

from pathlib import Path

__all__ = ["ASSETS", "asset_path", "shipped_assets"]

ASSETS = Path(__file__).resolve().parent.parent / "assets"


def shipped_assets() -> dict[str, Path]:
    """Returns the folders of shipped models and data sets by name."""
    return {path.name: path for path in sorted(ASSETS.iterdir()) if path.is_dir()}


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
    shipped = shipped_assets()
    if name not in shipped:
        raise ValueError(f"`name` must be one of {list(shipped)}, got {name!r}.")
    return shipped[name]
