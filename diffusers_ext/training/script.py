"""What a training script does: read the arguments, train, and say in one line what is wrong with them."""

from __future__ import annotations

from typing import Any

from .arguments import parse_config
from .engine import Trainer
from .recipe import Recipe

__all__ = ["run_training"]


def run_training(recipe_class: type[Recipe[Any]]) -> None:
    """Trains a recipe with the arguments of the command line.

    Args:
        recipe_class: the method; its `Config` describes the arguments.

    Raises:
        SystemExit: an argument is wrong, or does not fit the data or the model; the message says how.
    """
    config = parse_config(recipe_class.Config)
    try:
        Trainer(config, recipe_class(config)).train()
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
