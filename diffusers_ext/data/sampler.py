"""Which sample stands where in a training run: a function of the seed and the position, on any number of processes.

An update takes `batch_size * world * accumulation` consecutive samples of the order; micro-step `m` of the update and
process `r` take `batch_size` of them from `(m * world + r) * batch_size` on. The same seed and the same product
therefore train on the same samples, however the product is split.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, Sampler, default_collate

from diffusers_ext.rng import PERMUTATION, SAMPLE, mix

__all__ = ["PositionalBatchSampler", "SeededDataset", "StreamingBatches"]


def _check(batch_size: int, rank: int, world: int, start: int, accumulation: int) -> int:
    """Checks the arguments that say which part of the order is whose; returns the samples of one update."""
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("world", world, 1),
        ("accumulation", accumulation, 1),
        ("start", start, 0),
    ):
        if value < least:
            raise ValueError(f"`{name}` must be an integer >= {least}, got {value!r}.")
    if not 0 <= rank < world:
        raise ValueError(f"`rank` must be in 0..{world - 1}, got {rank!r}.")
    return batch_size * world * accumulation


class PositionalBatchSampler(Sampler[list[tuple[int, int]]]):
    """Yields the batches of one process as lists of `(epoch, index)`, from any micro-step on.

    Every epoch is a new permutation; samples that do not fill an update are dropped at its end. Starting anywhere
    costs one permutation.

    Args:
        n: number of samples.
        batch_size: samples per process and micro-step.
        rank: index of this process.
        world: number of processes.
        seed: the run's seed.
        start: first micro-step.
        total: micro-step to stop before; `None` never stops.
        accumulation: micro-steps per update.

    Raises:
        ValueError: one update needs more samples than there are, or an argument is out of its range.

    Example:
        >>> from diffusers_ext import PositionalBatchSampler
        >>> batches = PositionalBatchSampler(10, batch_size=2, total=6)
        >>> [len(batch) for batch in batches]
        [2, 2, 2, 2, 2, 2]
        >>> list(PositionalBatchSampler(10, batch_size=2, start=4, total=6)) == list(batches)[4:]
        True
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        start: int = 0,
        total: int | None = None,
        accumulation: int = 1,
    ) -> None:
        effective = _check(batch_size, rank, world, start, accumulation)
        if n < effective:
            raise ValueError(
                f"`n` must be at least the samples of one update, batch size {batch_size} x {world} processes x "
                f"{accumulation} accumulated micro-steps = {effective}, got {n} samples."
            )
        self.n, self.batch_size, self.rank, self.world = n, batch_size, rank, world
        self.seed, self.start, self.total, self.accumulation = seed, start, total, accumulation
        self.micro_steps_per_epoch = n // effective * accumulation

    def __len__(self) -> int:
        """Returns the number of batches.

        Raises:
            TypeError: there is no end.
        """
        if self.total is None:
            raise TypeError("a sampler without `total` has no length")
        return max(0, self.total - self.start)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yields batches of `(epoch, index)`."""
        micro_step, epoch, order = self.start, -1, np.empty(0, np.int64)
        while self.total is None or micro_step < self.total:
            now, within = divmod(micro_step, self.micro_steps_per_epoch)
            if now != epoch:
                epoch = now
                order = np.random.default_rng(mix(self.seed, PERMUTATION, epoch)).permutation(self.n)
            first = (within * self.world + self.rank) * self.batch_size
            yield [(epoch, int(index)) for index in order[first : first + self.batch_size]]
            micro_step += 1


class SeededDataset(Dataset[Any]):
    """Reads item `(epoch, index)` with a generator of its own, so that augmentation does not depend on who reads it.

    An item that is a dict also gets its `index` in the data set, which stays the same in every epoch.

    Args:
        dataset: offers `get(index, generator)`, as `load_images` returns it.
        seed: the run's seed.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        """Returns the number of samples."""
        return len(self.dataset)

    def __getitem__(self, position: tuple[int, int]) -> Any:
        """Returns the item with the augmentation of its epoch."""
        epoch, index = position
        generator = torch.Generator().manual_seed(mix(self.seed, SAMPLE, epoch, index))
        item = self.dataset.get(index, generator)
        return {**item, "index": index} if isinstance(item, dict) else item


class StreamingBatches(IterableDataset[Any]):
    """The batches of one process from a stream.

    Each epoch is shuffled through a buffer with a seed of its own. Every process walks the whole stream and decodes
    only its own samples. A start later than 0 walks there from the beginning of the run, so that the time of a resume
    grows with the position, unlike that of a map-style data set.

    Args:
        stream: offers `epoch(seed, buffer_size)`, an iterable over undecoded rows, and `decode(row, generator)`.
        batch_size: samples per process and micro-step.
        rank: index of this process.
        world: number of processes.
        seed: the run's seed.
        start: first micro-step.
        total: micro-step to stop before.
        accumulation: micro-steps per update; samples that do not fill an update are dropped at an epoch's end.
        buffer_size: how many undecoded rows the shuffling draws from; a larger one mixes better and takes more memory.

    Raises:
        ValueError: the stream ends before the first update is full, more than one worker reads it, or an argument is
            out of its range.
    """

    def __init__(
        self,
        stream: Any,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        start: int = 0,
        total: int | None = None,
        accumulation: int = 1,
        buffer_size: int = 1000,
    ) -> None:
        self._effective = _check(batch_size, rank, world, start, accumulation)
        if buffer_size < 1:
            raise ValueError(f"`buffer_size` must be an integer >= 1, got {buffer_size!r}.")
        self.buffer_size = buffer_size
        self.stream, self.batch_size, self.rank, self.world = stream, batch_size, rank, world
        self.seed, self.start, self.total, self.accumulation = seed, start, total, accumulation

    def __iter__(self) -> Iterator[Any]:
        """Yields collated batches."""
        worker = torch.utils.data.get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ValueError(f"`dataloader_num_workers` must be 0 or 1 for a stream, got {worker.num_workers}.")
        micro_step, epoch = 0, 0
        while self.total is None or micro_step < self.total:
            update: list[Any] = []
            before = micro_step
            for row in self.stream.epoch(mix(self.seed, PERMUTATION, epoch), self.buffer_size):
                update.append(row)
                if len(update) < self._effective:
                    continue
                for within in range(self.accumulation):
                    if self.start <= micro_step and (self.total is None or micro_step < self.total):
                        yield self._batch(update, within, epoch, micro_step)
                    micro_step += 1
                update = []
                if self.total is not None and micro_step >= self.total:
                    return
            if micro_step == before:
                raise ValueError(
                    f"`train_batch_size` must leave an update of at most the stream's {len(update)} samples, got "
                    f"{self.batch_size} x {self.world} processes x {self.accumulation} = {self._effective}."
                )
            epoch += 1

    def _batch(self, update: list[Any], within: int, epoch: int, micro_step: int) -> Any:
        first = (within * self.world + self.rank) * self.batch_size
        start = micro_step // self.accumulation * len(update)
        return default_collate(
            [
                self.stream.decode(update[i], torch.Generator().manual_seed(mix(self.seed, SAMPLE, epoch, start + i)))
                for i in range(first, first + self.batch_size)
            ]
        )
