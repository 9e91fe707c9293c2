"""Full tensors out of and into modules whose parameters may be sharded (FSDP2 keeps them as `DTensor`)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from diffusers.training_utils import EMAModel
from torch.distributed.tensor import DTensor, distribute_tensor

__all__ = ["Ema", "all_finite", "copy_full_", "full_tensor"]


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the whole tensor, gathered from all processes if it is sharded (then all of them must call this)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def all_finite(parameters: Iterable[torch.Tensor]) -> torch.Tensor:
    """Returns whether all numbers are finite, as a bool tensor; of sharded tensors this process's own shard counts."""
    local = (p.to_local() if isinstance(p, DTensor) else p for p in parameters)
    return torch.stack([torch.isfinite(p).all() for p in local]).all()


@torch.no_grad()
def copy_full_(target: torch.Tensor, full: torch.Tensor) -> None:
    """Copies a whole tensor into `target`, each process its own shard if `target` is sharded."""
    full = full.to(target.device, target.dtype)
    if isinstance(target, DTensor):
        target.copy_(distribute_tensor(full, target.device_mesh, target.placements))
    else:
        target.copy_(full)


class Ema(EMAModel):
    """Diffusers' `EMAModel` with an fp32 shadow and checkpoints that hold whole tensors.

    A half-precision shadow would stop moving once `1 - decay` falls below its resolution.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], **kwargs: object) -> None:
        super().__init__(parameters, foreach=True, **kwargs)  # type: ignore[arg-type]
        self.shadow_params = [p.float() for p in self.shadow_params]

    def restart(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Takes the present parameters as the average."""
        for shadow, parameter in zip(self.shadow_params, parameters, strict=True):
            shadow.copy_(parameter.detach())

    def state_dict(self) -> dict:
        """Returns the number of updates and the whole shadow tensors on the CPU; every process must call it."""
        shadow = [full_tensor(p).cpu() for p in self.shadow_params]
        return {"optimization_step": self.optimization_step, "shadow_params": shadow}

    def load_state_dict(self, state_dict: dict) -> None:
        """Takes back what `state_dict` returned; device and sharding of the shadow stay as they are."""
        self.optimization_step = state_dict["optimization_step"]
        for shadow, full in zip(self.shadow_params, state_dict["shadow_params"], strict=True):
            copy_full_(shadow, full)
