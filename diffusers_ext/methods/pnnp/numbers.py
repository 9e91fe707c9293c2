"""Numbers of the command line with commas between them."""

from __future__ import annotations

import math

from diffusers_ext.training.config import require

__all__ = ["numbers"]


def numbers(name: str, text: str | None, count: int | None = None) -> tuple[float, ...] | None:
    """Reads numbers with commas between them.

    Args:
        name: of the argument, for messages.
        text: what was given.
        count: how many there must be.

    Raises:
        ValueError: it is something else.
    """
    if text is None:
        return None
    try:
        found = tuple(float(word) for word in text.split(","))
    except ValueError:
        found = ()
    fits = len(found) > 0 and count in (None, len(found)) and all(map(math.isfinite, found))
    require(fits, name, text, f"{count or 'some'} numbers with commas between them")
    return found
