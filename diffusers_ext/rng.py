"""Stateless randomness: every random number is a function of the seed and of the position in the training run.

Nothing about random state has to be saved: a run that resumes at micro-step `m` calls `begin(m)` and draws exactly
what the uninterrupted run would have drawn there.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

__all__ = ["StepRNG", "mix"]

# Distinct first words of every seed, so that no two purposes share a stream.
PERMUTATION, SAMPLE, GLOBAL = 1, 2, 3
_STREAMS = {"noise": 11, "timesteps": 12, "latents": 13, "labels": 14, "probes": 15, "augmentation": 16}


def mix(*ints: int) -> int:
    """Hashes integers to one 63-bit seed.

    Args:
        *ints: non-negative integers; their order matters.

    Returns:
        An integer in `[0, 2**63)`.
    """
    return int(np.random.SeedSequence(ints).generate_state(1, np.uint64)[0] >> np.uint64(1))


class StepRNG:
    """Random numbers of one process, addressed by micro-step.

    Args:
        seed: the run's seed.
        rank: index of this process.
        world: number of processes.
        scope: `"step"` draws one tensor for the process's whole batch (fastest); `"sample"` ties each row to the
            sample's global index, so that 1 process with batch 8, 2 with batch 4 and 4 + 4 by accumulation agree.

    Example:
        >>> import torch
        >>> from diffusers_ext import StepRNG
        >>> rng = StepRNG(seed=0)
        >>> rng.begin(7)
        >>> first = rng.randn_like(torch.empty(2, 3))
        >>> rng.begin(7)
        >>> torch.equal(first, rng.randn_like(torch.empty(2, 3)))
        True
    """

    def __init__(
        self, seed: int = 0, rank: int = 0, world: int = 1, scope: Literal["step", "sample"] = "step"
    ) -> None:
        if scope not in ("step", "sample"):
            raise ValueError(f"`scope` must be 'step' or 'sample', got {scope!r}.")
        self.seed, self.rank, self.world, self.scope = seed, rank, world, scope
        self.micro_step = 0
        self._generators: dict[tuple, torch.Generator] = {}

    def begin(self, micro_step: int) -> None:
        """Moves to a micro-step: forgets all streams and seeds the global generators (dropout and the like)."""
        self.micro_step = micro_step
        self._generators.clear()
        seed = mix(self.seed, GLOBAL, micro_step, self.rank)
        # `torch.manual_seed` would seed every backend and costs about a hundred times as much.
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_available():
            torch.cuda.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 - third-party code draws from the global state

    def generator(
        self, stream: str = "noise", device: torch.device | str = "cpu", rank: int | None = None, id: int | None = None
    ) -> torch.Generator:
        """Returns the generator of a stream at this micro-step; further calls return it as the draws have left it.

        Args:
            stream: `"noise"`, `"timesteps"`, `"latents"`, `"labels"`, `"probes"` or `"augmentation"`.
            device: where it draws.
            rank: the process whose stream to take, by default this one's.
            id: the sample whose own stream to take instead of a process's.
        """
        device = torch.device(device)
        rank = self.rank if rank is None else rank
        key = (stream, device, rank if id is None else None, id)
        if key not in self._generators:
            word = _STREAMS[stream]
            # A sample's stream does not depend on the step: its index is already unique in the run.
            seed = mix(self.seed, word, 0, self.micro_step, rank) if id is None else mix(self.seed, word, 1, id)
            self._generators[key] = torch.Generator(device).manual_seed(seed)
        return self._generators[key]

    def randn_like(
        self, x: torch.Tensor, ids: Sequence[int] | None = None, stream: str = "noise", rank: int | None = None
    ) -> torch.Tensor:
        """Draws standard normals in fp32 of `x`'s shape on `x`'s device.

        Args:
            x: a tensor of shape `(batch, ...)`; only its shape and device are used.
            ids: `(batch,)` global sample indices; used with `scope="sample"`.
            stream: the stream to draw from.
            rank: the process whose numbers to draw, by default this one's.
        """
        shape = tuple(x.shape)
        if self.scope == "sample" and ids is not None:
            rows = [
                torch.randn(shape[1:], generator=self.generator(stream, x.device, id=i), device=x.device) for i in ids
            ]
            return torch.stack(rows)
        return torch.randn(shape, generator=self.generator(stream, x.device, rank), device=x.device)

    def rand(
        self, n: int, ids: Sequence[int] | None = None, stream: str = "timesteps", device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """Draws `n` uniform numbers in `[0, 1)`, row by row from `ids` with `scope="sample"`."""
        if self.scope == "sample" and ids is not None:
            return torch.cat(
                [torch.rand(1, generator=self.generator(stream, device, id=i), device=device) for i in ids]
            )
        return torch.rand(n, generator=self.generator(stream, device), device=device)

    def randint(
        self,
        high: int,
        n: int,
        ids: Sequence[int] | None = None,
        stream: str = "timesteps",
        device: torch.device | str = "cpu",
    ) -> torch.Tensor:
        """Draws `n` integers in `[0, high)`, row by row from `ids` with `scope="sample"`."""
        if self.scope == "sample" and ids is not None:
            return torch.cat(
                [torch.randint(high, (1,), generator=self.generator(stream, device, id=i), device=device) for i in ids]
            )
        return torch.randint(high, (n,), generator=self.generator(stream, device), device=device)
