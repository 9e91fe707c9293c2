"""How well scores tell two classes apart: what a detector is judged by, with ties counted half."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

__all__ = ["auroc", "average_precision", "best_dice", "fpr_at_tpr"]


def _counts(labels: Any, scores: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns how many positives and negatives score at least as high as each distinct score, from the highest."""
    truth, values = (x.cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x) for x in (labels, scores))
    truth, values = truth.ravel(), values.ravel().astype(np.float64)
    if truth.shape != values.shape:
        raise ValueError(f"`labels` must be as many as `scores`, {values.size}, got {truth.size}.")
    if not np.isin(truth, (0, 1)).all():
        raise ValueError(f"`labels` must be 0 and 1, got {np.unique(truth).tolist()[:5]}.")
    if np.isnan(values).any():
        raise ValueError("`scores` must be numbers, got NaN.")
    positive = truth.astype(bool)
    if not positive.any() or positive.all():
        raise ValueError(f"`labels` must hold both 0 and 1, got {positive.sum()} of {positive.size} that are 1.")
    order = np.argsort(-values, kind="stable")
    last = np.append(values[order][1:] != values[order][:-1], True)  # of a run of equal scores
    return np.cumsum(positive[order])[last], np.cumsum(~positive[order])[last]


def auroc(labels: Any, scores: Any) -> float:
    """Returns the area under the receiver operating characteristic: how often a positive outscores a negative.

    Args:
        labels: 0 and 1, of any shape: an array, a tensor or a list.
        scores: as many numbers, higher where 1 is likelier.

    Raises:
        ValueError: of another number, labels other than 0 and 1 or all the same, or NaN.

    Example:
        >>> from diffusers_ext import auroc
        >>> auroc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
        0.75
    """
    true, false = _counts(labels, scores)
    x, y = np.append(0, false / false[-1]), np.append(0, true / true[-1])
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2))


def average_precision(labels: Any, scores: Any) -> float:
    """Returns the precision at each threshold, weighted by the recall that it adds; see `auroc` for the arguments.

    Unlike AUROC it tells a detector from chance where positives are rare, as an image's background makes them: chance
    is their share.

    Example:
        >>> from diffusers_ext import average_precision
        >>> round(average_precision([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]), 7)
        0.8333333
    """
    true, false = _counts(labels, scores)
    return float(np.sum(np.diff(true, prepend=0) / true[-1] * true / (true + false)))


def best_dice(labels: Any, scores: Any) -> float:
    """Returns the largest Dice overlap over all thresholds, 2 TP / (2 TP + FP + FN); see `auroc` for the arguments.

    The threshold is chosen with the labels: it bounds what a threshold chosen without them can reach.

    Example:
        >>> from diffusers_ext import best_dice
        >>> best_dice([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
        0.8
    """
    true, false = _counts(labels, scores)
    return float(np.max(2 * true / (true + false + true[-1])))


def fpr_at_tpr(labels: Any, scores: Any, tpr: float = 0.95) -> float:
    """Returns the least false-positive rate at a true-positive rate of at least `tpr`; see `auroc` for the rest.

    Raises:
        ValueError: also where `tpr` is outside (0, 1].

    Example:
        >>> from diffusers_ext import fpr_at_tpr
        >>> fpr_at_tpr([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
        0.5
    """
    if not 0 < tpr <= 1:
        raise ValueError(f"`tpr` must be a number in (0, 1], got {tpr!r}.")
    true, false = _counts(labels, scores)
    return float(false[np.argmax(true >= tpr * true[-1])] / false[-1])
