"""Activations while their grids are learned: each place where a unit rounds them has a step that can be trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .attention import PARTS, QDiffAttnProcessor
from .config import QDiffConfig
from .grids import SMALLEST, ScaleMethod, quantization_grid

__all__ = ["ActPoint", "LearningAttnProcessor", "watch_inputs"]


class ActPoint(nn.Module):
    """One static grid. It is found from the first tensors that pass, and then learned.

    Args:
        config: how the range is found.
        bits: of the grid.
        zero_at_0: for what is never negative.

    Attributes:
        stop: while ranges are found, called with the point and what passes it, returns that rounded; see `observe`.
    """

    def __init__(self, config: QDiffConfig, bits: int = 8, zero_at_0: bool = False) -> None:
        super().__init__()
        self.config, self.bits, self.zero_at_0 = config, bits, zero_at_0
        self.step, self.zero = nn.Parameter(torch.ones(())), torch.zeros(())
        self.range: torch.Tensor | None = None
        self.found = False
        self.stop: Callable[[ActPoint, torch.Tensor], torch.Tensor] | None = None

    def observe(self, tensors: list[torch.Tensor], momentum: float | None = None) -> list[torch.Tensor]:
        """Finds the grid of the first tensors, and moves its range towards that of later ones; returns them rounded.

        Args:
            tensors: one batch, in parts.
            momentum: share of the old range, once there is one, in the running average of least and largest values.
        """
        x = torch.cat([tensor.flatten() for tensor in tensors])
        own = torch.stack([x.amin(), x.amax()])
        if self.range is None:
            self.range = own
            self._take(x, self.config.scale_method)
        elif momentum is not None:
            self.range = momentum * self.range + (1 - momentum) * own
            self._take(self.range, "max")
        return [self._rounded(tensor) for tensor in tensors]

    def _take(self, x: torch.Tensor, method: ScaleMethod) -> None:
        symmetric = self.config.act_symmetric and not self.zero_at_0
        step, self.zero = quantization_grid(x, self.bits, method, symmetric, zero_at_0=self.zero_at_0)
        self.step.data, self.found = step, True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns x rounded, differentiable in x and, where it is not clipped, by straight-through, in the step."""
        return self._rounded(x) if self.stop is None else self.stop(self, x)

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        scaled = x / self.step.clamp(min=SMALLEST)
        rounded = scaled + (scaled.round() - scaled).detach()
        q = (rounded + self.zero).clamp(0, 2**self.bits - 1)
        return (q - self.zero) * self.step.clamp(min=SMALLEST)


class LearningAttnProcessor(QDiffAttnProcessor):
    """The processor of quantized attention while its grids are learned."""

    def __init__(self, config: QDiffConfig) -> None:
        super().__init__(config.softmax_bits)
        bits = {part: 8 for part in PARTS[:3]} | {PARTS[3]: config.softmax_bits}
        self.points = nn.ModuleDict({part: ActPoint(config, bits[part], part == PARTS[3]) for part in PARTS})

    def rounded(self, x: torch.Tensor, part: str) -> torch.Tensor:
        """Rounds one of the factors by its point."""
        return self.points[part](x)

    def grids(self) -> dict[str, torch.Tensor]:
        """Returns what a `QDiffAttnProcessor` stores."""
        points: list[Any] = [self.points[part] for part in PARTS]
        steps = torch.stack([point.step.detach().cpu().clamp(min=SMALLEST) for point in points])
        return {"act_scale": steps, "act_zero_point": torch.stack([point.zero.cpu() for point in points[:3]])}


def watch_inputs(layer: nn.Module, config: QDiffConfig, split: int) -> list[ActPoint]:
    """Lets a layer round its input, in two parts where it is split, and returns the points."""
    points = [ActPoint(config) for _ in range(2 if split else 1)]
    axis = 1 if isinstance(layer, nn.Conv2d) else -1

    def rounded(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        parts = args[0].tensor_split([split], axis) if split else (args[0],)
        made = [point(part) for point, part in zip(points, parts, strict=True)]
        return (torch.cat(made, axis) if split else made[0], *args[1:])

    layer.register_forward_pre_hook(rounded)
    return points
