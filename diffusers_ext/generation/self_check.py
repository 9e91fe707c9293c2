"""What a pipeline's stock call hands to its scheduler, to compare with."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .prompts import fresh
from .seam import Reached, copied

__all__ = ["difference", "evaluating", "stock_steps"]


@torch.no_grad()
def stock_steps(
    pipe: Any, arguments: dict[str, Any], batch: int, steps: int = 2
) -> tuple[list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], list[Any]]:
    """Samples with the stock pipeline for some steps.

    Args:
        pipe: any pipeline with a scheduler; it and its scheduler stay as they are.
        arguments: of its call.
        batch: the number of samples in them.
        steps: after how many to end.

    Returns:
        For each step the input as the network meets it, the timestep, and the output that reached `scheduler.step`;
        and what the calls of `encode_prompt` returned.
    """
    found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    scaled: list[torch.Tensor] = []
    scheduler = copy.deepcopy(pipe.scheduler)
    original_step, original_scale = scheduler.step, getattr(scheduler, "scale_model_input", None)

    # On the object: some loops ask for the scheduler's very class, and for the arguments of `step`.
    @functools.wraps(original_step)
    def step(model_output: Any, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        x = (scaled or [sample])[0]
        found.append(
            (x[:batch].clone(), torch.as_tensor(timestep).flatten()[:1], torch.as_tensor(model_output).clone())
        )
        if len(found) == steps:
            raise Reached(None)
        return original_step(model_output, timestep, sample, *args, **kwargs)

    def scale_model_input(sample: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert original_scale is not None
        scaled[:] = [original_scale(sample, *args, **kwargs)]
        return scaled[0]

    scheduler.step = step
    if original_scale is not None:
        scheduler.scale_model_input = scale_model_input

    recorded: list[Any] = []
    original: Any = type(pipe)

    def encode_prompt(self: Any, *args: Any, **kwargs: Any) -> Any:
        recorded.append(original.encode_prompt(self, *args, **kwargs))
        return fresh(recorded[-1])

    members: dict[str, Any] = {"__module__": original.__module__}
    if hasattr(original, "encode_prompt"):
        members["encode_prompt"] = encode_prompt
    cls = type(original.__name__, (original,), members)
    stock = copied(pipe, cls, scheduler=scheduler, _progress_bar_config={"disable": True})
    with contextlib.suppress(Reached):
        stock(**arguments)
    return found, recorded


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Turns dropout off for a while."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def difference(output: torch.Tensor, wanted: torch.Tensor, tolerance: float, place: str) -> float:
    """Returns the largest difference of an output from the stock pipeline's.

    Raises:
        ValueError: it is above `tolerance` times the largest value, or the shapes differ.
    """
    wanted = wanted.to(output.device, torch.float32)
    same = output.shape == wanted.shape
    found, scale = float((output - wanted).abs().max()) if same else float("inf"), float(wanted.abs().max())
    if not found <= tolerance * scale:
        raise ValueError(
            f"The seam is broken at {place}: the output {tuple(output.shape)} differs by {found:.2g} (of {scale:.2g}) "
            f"from the {tuple(wanted.shape)} that the stock call hands to its scheduler."
        )
    return found
