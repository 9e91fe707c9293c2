"""Predictions from two views of an image: as it came, and adapted."""

from __future__ import annotations

from typing import Literal, get_args

import torch

__all__ = ["ENSEMBLES", "Ensemble", "ensemble_logits"]

Ensemble = Literal["sum", "source", "adapted", "entropy", "confidence", "variance", "entropy_sum", "confidence_sum"]
ENSEMBLES: tuple[str, ...] = get_args(Ensemble)


def ensemble_logits(source: torch.Tensor, adapted: torch.Tensor, mode: Ensemble = "sum") -> torch.Tensor:
    """Combines the logits of both views.

    Args:
        source: `(batch, classes)` logits x1 of the source classifier on the image as it came.
        adapted: `(batch, classes)` logits x2 of the other classifier (or the same) on the adapted image.
        mode: `"sum"`, the paper's: x1 + x2; `"source"` or `"adapted"` alone; `"entropy"`, `"confidence"` and
            `"variance"` choose for each image the view of lower entropy, of higher largest probability or of higher
            variance of the logits, x2 on a tie; `"entropy_sum"`: x1 H2 + x2 H1; `"confidence_sum"`: x1 c1 + x2 c2 with
            largest probabilities c.

    Returns:
        `(batch, classes)` logits.

    Raises:
        ValueError: the shapes differ, or there is no such mode.

    Reference:
        Guo et al. 2024 (arXiv 2406.04295). The authors' code mixes the two views up in the entropy of
        the second one; here each entropy is that of its own view.

    Example:
        >>> import torch
        >>> from diffusers_ext import ensemble_logits
        >>> ensemble_logits(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
        tensor([[2., 1.]])
    """
    if source.shape != adapted.shape or source.ndim != 2:
        raise ValueError(
            f"`adapted` must have the shape (batch, classes) of `source`, {tuple(source.shape)}, got "
            f"{tuple(adapted.shape)}: are the label sets the same?"
        )
    if mode not in ENSEMBLES:
        raise ValueError(f"`mode` must be one of {list(ENSEMBLES)}, got {mode!r}.")
    if mode == "sum":
        return source + adapted
    if mode in ("source", "adapted"):
        return source if mode == "source" else adapted
    first, second = (_certainty(logits, mode) for logits in (source, adapted))
    if mode == "entropy_sum":  # certainty is minus the entropy
        return -source * second - adapted * first
    if mode == "confidence_sum":
        return source * first + adapted * second
    return torch.where(first <= second, adapted, source)


def _certainty(logits: torch.Tensor, mode: str) -> torch.Tensor:
    """Returns `(batch, 1)`: minus the entropy, the largest probability, or the variance of the logits."""
    if mode == "variance":
        return logits.var(1, keepdim=True)
    logs = logits.log_softmax(1)
    if mode.startswith("entropy"):
        return (logs.exp() * logs).sum(1, keepdim=True)
    return logs.exp().amax(1, keepdim=True)
