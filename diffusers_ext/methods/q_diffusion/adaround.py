"""Learned rounding (AdaRound, arXiv 2004.10568, as Q-Diffusion sets it): each weight goes up or down.

A weight w becomes `d (clamp(floor(w / d) + h(a) + z, 0, 2^b - 1) - z)`, `h(a) = clamp(1.2 sigmoid(a) - 0.1, 0, 1)`.
`a` is learned so that a block's output stays; a regulariser drives h to 0 or 1, and in the end `h = [a >= 0]`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .layers import QuantLayer
from .units import tensors_in

__all__ = [
    "LayerRounding",
    "hard_integers",
    "initial_alpha",
    "output_loss",
    "rounding_beta",
    "rounding_penalty",
    "rounding_variable",
    "soft_weight",
    "total_loss",
]

ZETA, GAMMA = 1.1, -0.1
WARMUP, FIRST_BETA, LAST_BETA = 0.2, 20.0, 2.0


def initial_alpha(weight: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Returns the `a` for which h(a) is the fractional part of w / d: rounding that changes nothing.

    Args:
        weight: w.
        step: d, of a shape that broadcasts to it.
    """
    scaled = weight / step
    rest = scaled - scaled.floor()
    return -torch.log((ZETA - GAMMA) / (rest - GAMMA) - 1)


def rounding_variable(alpha: torch.Tensor) -> torch.Tensor:
    """Returns h(a) in [0, 1]."""
    return (torch.sigmoid(alpha) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def soft_weight(
    weight: torch.Tensor, step: torch.Tensor, zero: torch.Tensor, alpha: torch.Tensor, bits: int
) -> torch.Tensor:
    """Returns the weight at the present `a`, differentiable in it; an untrained one is w where nothing is clipped."""
    integers = ((weight / step).floor() + rounding_variable(alpha) + zero).clamp(0, 2**bits - 1)
    return (integers - zero) * step


def hard_integers(
    weight: torch.Tensor, step: torch.Tensor, zero: torch.Tensor, alpha: torch.Tensor, bits: int
) -> torch.Tensor:
    """Returns the integers q in 0..2^b - 1 that `a` decides for, as floating-point numbers."""
    return ((weight / step).floor() + (alpha >= 0).to(weight.dtype) + zero).clamp(0, 2**bits - 1)


def rounding_beta(count: int, iterations: int) -> float:
    """Returns the regulariser's exponent at an iteration: 20 for the first fifth, then linear to 2.

    Args:
        count: of the iteration, from 1.
        iterations: N.
    """
    start = WARMUP * iterations
    if count < start:
        return FIRST_BETA
    share = (count - start) / (iterations - start)
    return LAST_BETA + (FIRST_BETA - LAST_BETA) * max(0.0, 1 - share)


def rounding_penalty(alpha: torch.Tensor, count: int, iterations: int) -> torch.Tensor:
    """Returns `sum(1 - |2 h(a) - 1|^beta)`; 0 for the first fifth of the iterations, which only fit the output."""
    if count < WARMUP * iterations:
        return alpha.new_zeros(())
    distance = ((rounding_variable(alpha) - 0.5).abs() * 2).pow(rounding_beta(count, iterations))
    return (1 - distance).sum()


def output_loss(output: torch.Tensor, target: torch.Tensor, power: float = 2.0) -> torch.Tensor:
    """Returns the mean over batch and space of the sum over channels of `|output - target|^power`.

    Args:
        output: `(batch, channels, height, width)`, or with the channels last `(batch, ..., channels)`.
        target: likewise.
        power: 2 for rounding, 2.4 for steps of activations.
    """
    channels = 1 if output.ndim in (4, 5) else -1
    return (output - target).abs().pow(power).sum(channels).mean()


def total_loss(output: Any, target: Any, power: float) -> torch.Tensor:
    """Returns the sum of the losses of a unit's outputs."""
    outputs, targets = tensors_in(output), tensors_in(target)
    losses = [output_loss(outputs[place], targets[place], power) for place in targets]
    return torch.stack(losses).sum()


class LayerRounding:
    """The variables of one layer's rounding.

    Args:
        weight: the layer's own.
        quantized: the layer with its grids, which gets the integers.
    """

    def __init__(self, weight: torch.Tensor, quantized: QuantLayer) -> None:
        self.quantized, self.weight = quantized, weight.detach()
        self.grids, self.alphas = [], []
        for part, grid in quantized.parts():
            step, zero = (quantized.column(value[grid]).to(self.weight) for value in quantized.grids())
            self.grids.append((part, step, zero))
            self.alphas.append(nn.Parameter(initial_alpha(self.weight[:, part], step)))

    def soft(self) -> torch.Tensor:
        """Returns the weight at the present rounding."""
        parts = [
            soft_weight(self.weight[:, part], step, zero, alpha, self.quantized.bits)
            for (part, step, zero), alpha in zip(self.grids, self.alphas, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    @torch.no_grad()
    def store(self) -> None:
        """Decides each weight."""
        parts = [
            hard_integers(self.weight[:, part], step, zero, alpha, self.quantized.bits)
            for (part, step, zero), alpha in zip(self.grids, self.alphas, strict=True)
        ]
        self.quantized.set_integers((parts[0] if len(parts) == 1 else torch.cat(parts, 1)).cpu())
