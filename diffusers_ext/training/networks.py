"""Networks that a JSON file describes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from .shipped import find_config

__all__ = ["make_network"]


def make_network(
    kind: Callable[..., Any], argument: str, path: str | None, fixed: Mapping[str, Any], default: Mapping[str, Any]
) -> Any:
    """Makes a network from a JSON file of its arguments.

    Args:
        kind: its class.
        argument: the command-line argument that named the file, for messages.
        path: the file, or the name of a shipped one; `None` takes `default` instead.
        fixed: arguments that data and base decide, which come before the file's.
        default: arguments without a file.

    Raises:
        ValueError: the file is missing, no JSON object, or does not describe such a network.
    """
    arguments = dict(default)
    if path is not None:
        file = find_config(argument, path)
        try:
            arguments = {k: v for k, v in json.loads(file.read_text()).items() if not k.startswith("_")}
        except (ValueError, AttributeError) as error:
            raise ValueError(f"`{argument}` must be a JSON object in a file, got {path!r}: {error}") from error
    try:
        return kind(**{**arguments, **fixed})
    except Exception as error:  # whatever a wrong argument runs into
        raise ValueError(f"`{argument}` must describe a `{kind.__name__}`, got {path!r}: {error}") from error
