"""Commands that several processes share the work of."""

from __future__ import annotations

import os

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

__all__ = ["process_state"]


def process_state() -> PartialState:
    """Returns what this process is among those that `torchrun` or `accelerate launch` started.

    Raises:
        ValueError: they do not know of each other, and each would do all of the work.
    """
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != state.num_processes:
        raise ValueError(
            f"`num_processes` must be 1 here, got {launched}: the launcher started processes that do not know of each "
            "other. On a CPU use `torchrun --nproc_per_node N`."
        )
    return state
