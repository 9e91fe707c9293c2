"""Images of several shapes in one run: each is cropped to the nearest of a few sizes, and a batch has one size."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from diffusers_ext.rng import PERMUTATION, mix

__all__ = ["BucketBatchSampler", "bucket_sizes", "nearest_bucket"]

Size = tuple[int, int]


def bucket_sizes(resolution: int, multiple: int, max_aspect_ratio: float = 2.0) -> list[Size]:
    """Lists sizes with about as many pixels as a square of the resolution, and never more.

    Args:
        resolution: side of the square, which is one of them.
        multiple: what all sides are multiples of.
        max_aspect_ratio: the longer side is at most so many times the shorter.

    Returns:
        `(height, width)`, from the widest to the tallest.

    Example:
        >>> bucket_sizes(64, 16)
        [(48, 80), (64, 64), (80, 48)]
    """
    sizes = {(resolution, resolution)}
    for long in range(resolution + multiple, 2 * math.ceil(resolution * max_aspect_ratio), multiple):
        short = resolution**2 // long // multiple * multiple
        if short and long <= max_aspect_ratio * short:
            sizes |= {(short, long), (long, short)}
    return sorted(sizes, key=lambda size: (size[0] / size[1], size))


def nearest_bucket(size: Size, sizes: Sequence[Size]) -> Size:
    """Returns the size whose ratio of sides is nearest to that of an image `(height, width)`."""
    ratio = math.log(size[0] / size[1])
    return min(sizes, key=lambda s: (abs(math.log(s[0] / s[1]) - ratio), -s[0] * s[1], s))


class BucketBatchSampler(Sampler[list[tuple[int, int]]]):
    """Yields the batches of one process as lists of `(epoch, index)`, all of one bucket, from any micro-step on.

    Each bucket is read round and round, in a new order each time, so that all images come equally often; what does
    not fill an update at an epoch's end is the first of the next. The updates of an epoch come in an order of its
    own. An update is of one bucket on all processes, as `PositionalBatchSampler` divides it.

    Args:
        buckets: indices of the images of each bucket.
        batch_size: samples per process and micro-step.
        rank: index of this process.
        world: number of processes.
        seed: the run's seed.
        start: first micro-step.
        total: micro-step to stop before.
        accumulation: micro-steps per update.
    """

    def __init__(
        self,
        buckets: Sequence[Sequence[int]],
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        start: int = 0,
        total: int = 0,
        accumulation: int = 1,
    ) -> None:
        self.buckets = [np.asarray(bucket) for bucket in buckets]
        self.batch_size, self.rank, self.world, self.seed = batch_size, rank, world, seed
        self.start, self.total, self.accumulation = start, total, accumulation
        self.update = batch_size * world * accumulation
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def __len__(self) -> int:
        """Returns the number of batches."""
        return max(0, self.total - self.start)

    def updates_before(self, epoch: int) -> int:
        """Returns how many updates come before an epoch."""
        return sum(epoch * len(bucket) // self.update for bucket in self.buckets)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yields batches of `(epoch, index)`, where the epoch is the bucket's own."""
        everything = sum(map(len, self.buckets))
        # Rounding loses less than one update a bucket, so that the epoch is this one or a little later.
        epoch = self.start // self.accumulation * self.update // everything
        order, first = self._epoch(epoch)
        for micro_step in range(self.start, self.total):
            update, within = divmod(micro_step, self.accumulation)
            while update >= first + len(order):
                epoch += 1
                order, first = self._epoch(epoch)
            bucket, number = order[update - first]
            begin = number * self.update + (within * self.world + self.rank) * self.batch_size
            yield [self._position(bucket, place) for place in range(begin, begin + self.batch_size)]

    def _epoch(self, epoch: int) -> tuple[list[tuple[int, int]], int]:
        """Returns an epoch's updates in their order as `(bucket, number)`, and how many came before."""
        updates = [
            (b, number)
            for b, bucket in enumerate(self.buckets)
            for number in range(epoch * len(bucket) // self.update, (epoch + 1) * len(bucket) // self.update)
        ]
        shuffled = np.random.default_rng(mix(self.seed, PERMUTATION, epoch, 0)).permutation(len(updates))
        return [updates[i] for i in shuffled], self.updates_before(epoch)

    def _position(self, bucket: int, place: int) -> tuple[int, int]:
        round_, at = divmod(place, len(self.buckets[bucket]))
        if (bucket, round_) not in self._orders:
            draw = np.random.default_rng(mix(self.seed, PERMUTATION, round_, bucket + 1))
            # The last two rounds are all that a batch can reach into.
            self._orders = {k: v for k, v in self._orders.items() if k[0] != bucket or k[1] >= round_ - 1}
            self._orders[bucket, round_] = draw.permutation(self.buckets[bucket])
        return round_, int(self._orders[bucket, round_][at])
