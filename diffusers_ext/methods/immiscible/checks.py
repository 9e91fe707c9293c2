"""Argument checks that all pairing strategies share."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["check_batch", "check_choice", "check_count"]


def check_count(name: str, value: Any) -> None:
    """Raises `ValueError` unless `value` is an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{name}` must be an integer >= 1, got {value!r}.")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises `ValueError` unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {list(choices)}, got {value!r}.")


def check_batch(x0: torch.Tensor, labels: torch.Tensor | None = None, name: str = "x0") -> None:
    """Raises `ValueError` unless `x0`, called `name`, is a floating-point batch that fits `labels`, and finite.

    Finiteness is looked at on the CPU only: on an accelerator the look would stall every step.
    """
    if not x0.is_floating_point() or x0.ndim < 2 or len(x0) == 0:
        raise ValueError(
            f"`{name}` must be a floating-point tensor (batch, ...) with batch >= 1, got {x0.dtype} of "
            f"{tuple(x0.shape)}."
        )
    # The sum is finite only if every element is, bar an overflow that would be as wrong; it makes no mask tensor.
    if x0.device.type == "cpu" and not torch.isfinite(x0.float().sum()):
        raise ValueError(f"`{name}` must be finite, got NaN or infinity.")
    if labels is not None and labels.shape != x0.shape[:1]:
        raise ValueError(f"`labels` must have the shape {tuple(x0.shape[:1])} as `{name}`, got {tuple(labels.shape)}.")
