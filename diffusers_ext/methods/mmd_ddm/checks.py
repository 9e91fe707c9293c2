"""Whether a scheduler can be trained through: it is tried on one number with known answers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import DDIMParallelScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler

from .chain import check_arguments, differentiable_sample

__all__ = ["check_chain"]

IMAGE, TOLERANCE = 1.0, 0.05


def check_chain(scheduler: Any, num_inference_steps: int) -> None:
    """Tries a scheduler on one number: it must add no noise, let gradients through, and end in the image.

    Args:
        scheduler: any Diffusers scheduler; it is not changed.
        num_inference_steps: S.

    Raises:
        ValueError: it is stochastic or not differentiable, does not bring noise to the image that an exact network
            predicts, steps to other timesteps than its grid's, or an argument is outside its range.
    """
    name = type(scheduler).__name__
    if not (hasattr(scheduler, "alphas_cumprod") or isinstance(scheduler, FlowMatchEulerDiscreteScheduler)):
        raise ValueError(
            f"`scheduler` must have a schedule of betas, or be a FlowMatchEulerDiscreteScheduler, got {name}."
        )
    check_arguments(scheduler, num_inference_steps, 0.0, "none")
    gains = torch.full((num_inference_steps,), 0.5, requires_grad=True)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        outputs = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            outputs.append(_run(scheduler, num_inference_steps, _scaling(iter(gains))))
    if not torch.isfinite(outputs[0]).all():
        raise ValueError(f"`scheduler` must give finite samples, got {name} with {outputs[0].item()}.")
    if not torch.equal(*outputs):
        raise ValueError(f"`scheduler` must be deterministic, got {name}, which adds noise; take DDIMScheduler, say.")
    gradient = torch.autograd.grad(outputs[0].sum(), gains)[0] if outputs[0].requires_grad else torch.zeros(1)
    if not (torch.isfinite(gradient).all() and (gradient != 0).all()):
        raise ValueError(f"`scheduler` must be differentiable at every step, got {name}; take DDIMScheduler, say.")
    with torch.no_grad():
        found = _run(scheduler, num_inference_steps, _exact_network(scheduler)).item()
    if not abs(found - IMAGE) < TOLERANCE:
        raise ValueError(
            f"`scheduler` must bring noise to the image that an exact network predicts, got {name}, which ends at "
            f"{found:.3g} of {IMAGE} in {num_inference_steps} steps; take DDIMScheduler, say."
        )
    if isinstance(scheduler, DDIMScheduler | DDIMParallelScheduler):
        _check_grid(scheduler, num_inference_steps)


def _run(scheduler: Any, steps: int, network: Callable[..., Any]) -> torch.Tensor:
    own = copy.deepcopy(scheduler)
    try:
        return differentiable_sample(network, own, torch.full((1, 1, 1, 1), 0.7), steps, checkpointing="none")
    except ValueError:
        raise
    except Exception as error:  # whatever a scheduler of another kind of model runs into
        raise ValueError(
            f"`scheduler` must step a sample from noise to an image, got {type(scheduler).__name__}: {error}"
        ) from error


def _scaling(gains: Iterator[torch.Tensor]) -> Callable[..., Any]:
    return lambda x, t, return_dict: (next(gains) * x,)


def _exact_network(scheduler: Any) -> Callable[..., Any]:
    """Returns a network that knows the one image there is."""
    kind = scheduler.config.get("prediction_type", "epsilon")

    def network(x: torch.Tensor, t: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            sigma = float(t) / scheduler.config["num_train_timesteps"]
            return ((x - (1 - sigma) * IMAGE) / sigma - IMAGE,)
        level = scheduler.alphas_cumprod[round(float(t))]
        alpha, sigma = level.sqrt(), (1 - level).sqrt()
        noise = (x - alpha * IMAGE) / sigma
        outputs = {"sample": torch.full_like(x, IMAGE), "v_prediction": alpha * noise - sigma * IMAGE}
        return (outputs.get(kind, noise),)

    return network


def _check_grid(scheduler: Any, steps: int) -> None:
    """Checks that Diffusers' DDIM, which steps T // S down whatever its grid is, lands on its grid."""
    own = copy.deepcopy(scheduler)
    own.set_timesteps(steps)
    down = scheduler.config["num_train_timesteps"] // steps
    if own.timesteps[0] == 0:
        warnings.warn(
            "the grid of one 'leading' step is timestep 0, though sampling starts from pure noise; "
            "`timestep_spacing='trailing'` starts at the other end.",
            stacklevel=2,
        )
    gaps = own.timesteps[:-1] - own.timesteps[1:]
    if len(gaps) and (gaps - down).abs().max() > 0.1 * down:
        raise ValueError(
            f"`timestep_spacing` must be 'leading' for {steps} steps of DDIMScheduler, got "
            f"{scheduler.config['timestep_spacing']!r}: it steps {down} down at a time, whatever its grid is."
        )
