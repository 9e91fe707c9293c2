"""Large images in tiles: exact for networks whose reach is known, blended for those that see the whole image."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

__all__ = ["Tiling", "padded", "tiled"]

Network = Callable[[torch.Tensor], torch.Tensor]


def padded(x: torch.Tensor, multiple: int) -> torch.Tensor:
    """Mirrors the right and lower edge on until height and width are multiples of a number."""
    for edge, dim in (((0, 1, 0, 0), -1), ((0, 0, 0, 1), -2)):
        while missing := -x.shape[dim] % multiple:
            step = min(missing, x.shape[dim] - 1)
            # A single row has nothing to mirror.
            mode, amount = ("reflect", step) if step else ("replicate", missing)
            x = F.pad(x, [amount * e for e in edge], mode=mode)
    return x


@dataclass(frozen=True)
class Tiling:
    """How an image is cut.

    Attributes:
        tile: height and width of a tile, a multiple of `multiple`; its margin comes on top.
        margin: pixels around a tile that its values depend on, or `None` where they depend on the whole image: tiles
            then overlap by a quarter and are blended.
        multiple: where cuts may lie.
    """

    tile: int
    margin: int | None
    multiple: int

    def starts(self, length: int) -> list[int]:
        """Returns where the tiles of a padded side begin."""
        if self.margin is not None:
            return list(range(0, length, self.tile))
        overlap = -(-self.tile // 4 // self.multiple) * self.multiple
        step = max(self.multiple, self.tile - overlap)
        last = max(0, length - self.tile)
        return [*range(0, last, step), last]

    def count(self, height: int, width: int) -> int:
        """Returns how many tiles an image has."""
        return len(self.starts(height + -height % self.multiple)) * len(self.starts(width + -width % self.multiple))


@torch.no_grad()
def tiled(
    network: Network, x: torch.Tensor, tiling: Tiling, report: Callable[[], None] = lambda: None
) -> tuple[torch.Tensor, float]:
    """Calls a network on the tiles of images.

    Args:
        network: from `(batch, channels, height, width)` to the same shape.
        x: `(batch, channels, height, width)`.
        tiling: how to cut.
        report: called after every tile.

    Returns:
        The whole output, and how far tiles differ where they overlap: mean difference in standard deviations of the
        output, 0 where tiles are exact.
    """
    height, width = x.shape[2:]
    x = padded(x, tiling.multiple)
    cut = _exact if tiling.margin is not None else _blended
    output, difference = cut(network, x, tiling, report)
    return output[..., :height, :width], difference


def _exact(
    network: Network, x: torch.Tensor, tiling: Tiling, report: Callable[[], None]
) -> tuple[torch.Tensor, float]:
    output, margin, (height, width) = torch.empty_like(x), tiling.margin or 0, x.shape[2:]
    for top, left in itertools.product(tiling.starts(height), tiling.starts(width)):
        above, before = max(0, top - margin), max(0, left - margin)
        window = x[..., above : top + tiling.tile + margin, before : left + tiling.tile + margin]
        values = network(window)[..., top - above :, left - before :][..., : tiling.tile, : tiling.tile]
        output[..., top : top + tiling.tile, left : left + tiling.tile] = values
        report()
    return output, 0.0


def _blended(
    network: Network, x: torch.Tensor, tiling: Tiling, report: Callable[[], None]
) -> tuple[torch.Tensor, float]:
    total, weights = torch.zeros_like(x), torch.zeros_like(x[:1, :1])
    low, high = torch.full_like(x, torch.inf), torch.full_like(x, -torch.inf)
    for rows, columns in _windows(x, tiling):
        values = network(x[..., rows, columns])
        weight = _ramp(values.shape[-2], x)[:, None] * _ramp(values.shape[-1], x)
        total[..., rows, columns] += weight * values
        weights[..., rows, columns] += weight
        low[..., rows, columns] = torch.minimum(low[..., rows, columns], values)
        high[..., rows, columns] = torch.maximum(high[..., rows, columns], values)
        report()
    output, spread = total / weights, high - low
    overlapping = spread > 0
    between = float(spread[overlapping].mean() / output.std()) if bool(overlapping.any()) else 0.0
    return output, between


def _windows(x: torch.Tensor, tiling: Tiling) -> Iterator[tuple[slice, slice]]:
    for top, left in itertools.product(*(tiling.starts(side) for side in x.shape[2:])):
        yield slice(top, top + tiling.tile), slice(left, left + tiling.tile)


def _ramp(length: int, like: torch.Tensor) -> torch.Tensor:
    """Returns weights that fall off towards both ends, but not to 0."""
    return (
        torch.arange(1, length + 1, device=like.device, dtype=like.dtype)
        .clamp_max(length // 4 + 1)
        .minimum(torch.arange(length, 0, -1, device=like.device, dtype=like.dtype))
    )
