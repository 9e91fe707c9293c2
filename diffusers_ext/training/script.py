"""What a training script does: read the arguments, train, and say in one line what is wrong with them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import Any

from .arguments import parse_config
from .engine import Trainer
from .recipe import Recipe

__all__ = ["run_training"]


def run_training(recipe_class: type[Recipe[Any]], argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Trains a recipe with the arguments of the command line.

    Args:
        recipe_class: the method; its `Config` describes the arguments.
        argv: the words, by default `sys.argv[1:]`.
        prog: what the help calls the program, by default the script.

    Raises:
        SystemExit: an argument is wrong, or does not fit the data or the model; the message says how.
    """
    description = (inspect.getdoc(recipe_class) or "").split("\n\n")[0]
    try:
        config = parse_config(recipe_class.Config, argv, prog=prog, description=description)
        trainer = Trainer(config, recipe_class(config))
        result = trainer.train()
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    if result.stopped_by is not None:
        said = f"stopped by {result.stopped_by} after {result.steps} of {trainer.total_steps} updates"
        trainer.accelerator.print(f"{said}; go on with --resume_from_checkpoint latest", file=sys.stderr)
