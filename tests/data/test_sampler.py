"""The order of samples: the same for every split of an update, and from any start."""

import time

import pytest
import torch
from torch.utils.data import DataLoader

from diffusers_ext import PositionalBatchSampler, SeededDataset


def updates(batch_size, world, accumulation, n=30, count=7):
    """The set of (epoch, index) of each update, over all processes and micro-steps."""
    batches = [
        list(PositionalBatchSampler(n, batch_size, rank, world, 5, 0, count * accumulation, accumulation))
        for rank in range(world)
    ]
    return [
        [pair for m in range(accumulation) for rank in range(world) for pair in batches[rank][u * accumulation + m]]
        for u in range(count)
    ]


def test_splits_of_an_update_see_the_same_samples_in_the_same_order():
    assert updates(8, 1, 1) == updates(4, 2, 1) == updates(4, 1, 2) == updates(2, 2, 2)


def test_an_epoch_is_a_permutation_without_its_incomplete_end():
    sampler = PositionalBatchSampler(30, 8, total=6)
    assert sampler.micro_steps_per_epoch == 3
    pairs = [pair for batch in sampler for pair in batch]
    first, second = ([index for epoch, index in pairs if epoch == e] for e in (0, 1))
    assert len(first) == len(second) == len(set(first)) == len(set(second)) == 24
    assert first != second
    assert max(first) < 30


@pytest.mark.parametrize("start", [0, 1, 3, 5])
def test_a_start_gives_the_tail(start):
    whole = list(PositionalBatchSampler(30, 4, rank=1, world=2, seed=1, total=8))
    tail = PositionalBatchSampler(30, 4, rank=1, world=2, seed=1, start=start, total=8)
    assert list(tail) == whole[start:]
    assert len(tail) == 8 - start


def test_a_late_start_is_immediate():
    begin = time.process_time()
    next(iter(PositionalBatchSampler(60_000, 16, start=10**6 // 16, total=None)))
    assert time.process_time() - begin < 0.1


def test_refuses_more_than_there_is():
    with pytest.raises(ValueError, match="batch size 4 x 2 processes x 4 accumulated micro-steps = 32, got 30"):
        PositionalBatchSampler(30, 4, world=2, accumulation=4)


class Noisy:
    """Items that depend on the generator they are read with."""

    def __len__(self):
        return 12

    def get(self, index, generator):
        return index + torch.rand(1, generator=generator)


def test_items_do_not_depend_on_workers_nor_disturb_the_global_generator():
    state = torch.get_rng_state()
    read = [
        torch.cat(
            list(
                DataLoader(
                    SeededDataset(Noisy(), 3),
                    batch_sampler=PositionalBatchSampler(12, 4, total=6),
                    num_workers=workers,
                    generator=torch.Generator(),
                )
            )
        )
        for workers in (0, 1, 2)
    ]
    assert torch.equal(read[0], read[1])
    assert torch.equal(read[0], read[2])
    assert torch.equal(state, torch.get_rng_state())
    # Another epoch, another augmentation of the same image.
    first = {int(v): float(v) for v in read[0][:12]}
    second = {int(v): float(v) for v in read[0][12:]}
    assert first.keys() == second.keys()
    assert all(first[i] != second[i] for i in first)


class Pictures:
    """Items as a data set of images has them."""

    def __len__(self):
        return 12

    def get(self, index, generator):
        return {"pixel_values": torch.full((1,), float(index))}


def test_a_batch_names_its_samples_in_every_epoch_worker_and_start():
    def read(start=0, workers=0):
        sampler = PositionalBatchSampler(12, 4, seed=1, start=start, total=6)
        generator = torch.Generator()
        return list(
            DataLoader(SeededDataset(Pictures(), 3), batch_sampler=sampler, num_workers=workers, generator=generator)
        )

    whole = read()
    for batch in whole:
        assert batch["index"].dtype == torch.int64
        assert batch["index"].tolist() == batch["pixel_values"][:, 0].tolist()
    first, second = (torch.cat([b["index"] for b in whole[3 * e : 3 * e + 3]]).tolist() for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second
    for others in (read(workers=2), [*whole[:4], *read(start=4)]):
        assert all(torch.equal(a["index"], b["index"]) for a, b in zip(whole, others, strict=True))
