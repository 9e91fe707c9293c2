"""Samples of recorded noise to train on, and how far a model's noise is from it."""

from __future__ import annotations

import math
from typing import Any

import torch

from .dark_model import DarkFrameModel

__all__ = ["ResidualSamples", "noise_divergence"]

EPOCH = 1000  # samples of each ISO; they are drawn anew each time


class ResidualSamples:
    """Draws samples of one ISO's residuals each, the ISOs in turn.

    Args:
        dark: of which model.
        values: how many values a sample has.
    """

    def __init__(self, dark: DarkFrameModel, values: int) -> None:
        self.residuals, self.isos, self.values = dark.residuals.cpu(), list(dark.config.isos), values

    def __len__(self) -> int:
        return EPOCH * len(self.isos)

    def get(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """Returns `noise` `(values,)` in DN and `iso`."""
        which = index % len(self.isos)
        places = torch.randint(self.residuals.shape[1], (self.values,), generator=generator)
        return {"noise": self.residuals[which][places], "iso": torch.tensor(self.isos[which], dtype=torch.float32)}


def noise_divergence(real: torch.Tensor, model: torch.Tensor) -> float:
    """Returns the Kullback-Leibler divergence KL(real | model) of two samples, in bins of one DN around whole numbers.

    Bins that the model never fell into count as half a hit.

    Args:
        real: `(values,)` in DN.
        model: `(values,)`.
    """
    real, model = real.flatten().round().long(), model.flatten().round().long()
    low = int(min(real.min(), model.min()))
    high = int(max(real.max(), model.max()))
    p = torch.bincount(real - low, minlength=high - low + 1).double()
    q = torch.bincount(model - low, minlength=high - low + 1).double().clamp_min(0.5)
    p, q = p / p.sum(), q / q.sum()
    found = p[p > 0] * (p[p > 0] / q[p > 0]).log()
    return math.fsum(found.tolist())
