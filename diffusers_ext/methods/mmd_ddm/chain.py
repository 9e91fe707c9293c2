r"""Sampling with gradients: the whole chain from noise to sample as a function of the network's weights.

For DDIM with \(\eta = 0\), from t to the next timestep s,
\(\hat x_0 = (x_t - \sqrt{1 - \bar\alpha_t}\, \epsilon(x_t, t)) / \sqrt{\bar\alpha_t}\) and
\(x_s = \sqrt{\bar\alpha_s}\, \hat x_0 + \sqrt{1 - \bar\alpha_s}\, \epsilon(x_t, t)\), without clipping.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint

from diffusers_ext.generation.stepping import scaled_input, set_timesteps, step_arguments

__all__ = ["check_arguments", "clamped", "differentiable_sample"]

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")


def differentiable_sample(
    unet: Callable[..., Any],
    scheduler: Any,
    noise: torch.Tensor,
    num_inference_steps: int,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
    checkpointing: Literal["step", "none"] = "step",
    model_kwargs: dict[str, Any] | None = None,
) -> torch.Tensor:
    """Runs a sampler from noise to sample and keeps the gradient through all of its steps.

    Args:
        unet: network, called as `unet(sample, timestep, **model_kwargs, return_dict=False)[0]`.
        scheduler: a Diffusers scheduler that makes one network call a step; its timesteps are set anew.
        noise: `(batch, ...)` standard normal start.
        num_inference_steps: S, the exact number of network calls, in 1..T.
        eta: DDIM's eta in [0, 1], for schedulers that take it.
        generator: draws the noise of `eta` > 0.
        checkpointing: `"step"` recomputes every network call in the backward pass, so that memory is that of one
            call, not of S, at up to 1.5 times the time; `"none"` keeps all activations.
        model_kwargs: further arguments of the network.

    Returns:
        `(batch, ...)` samples, not clipped.

    Raises:
        ValueError: an argument is outside its range, or the scheduler clips, or does not make S steps of S.

    Reference:
        Aiello, Valsesia, Magli, "Fast Inference in Denoising Diffusion Models via MMD Finetuning", 2023, arXiv
        2301.07969. Their code takes one step too many where S does not divide T.

    Example:
        >>> import torch
        >>> from diffusers import DDIMScheduler
        >>> from diffusers_ext import differentiable_sample
        >>> scale = torch.tensor(0.9, requires_grad=True)
        >>> network = lambda x, t, return_dict: (scale * x,)
        >>> noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        >>> sample = differentiable_sample(network, DDIMScheduler(clip_sample=False), noise, num_inference_steps=5)
        >>> sample.square().mean().backward()
        >>> scale.grad is not None
        True
    """
    check_arguments(scheduler, num_inference_steps, eta, checkpointing)
    try:
        timesteps = set_timesteps(scheduler, num_inference_steps, noise.device)
    except Exception as error:  # schedulers raise many kinds
        raise ValueError(
            f"`num_inference_steps` must be a number of steps that {type(scheduler).__name__} makes as it is "
            f"configured, got {num_inference_steps}: {error}"
        ) from error
    if len(timesteps) != num_inference_steps:
        raise ValueError(
            f"`scheduler` must make one network call a step, got {type(scheduler).__name__} with {len(timesteps)} "
            f"calls in {num_inference_steps} steps."
        )
    arguments, condition = step_arguments(scheduler, eta, generator), model_kwargs or {}

    def predict(sample: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return unet(sample, t, **condition, return_dict=False)[0]

    sample = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in timesteps:
        x = scaled_input(scheduler, sample, t)
        if checkpointing == "step" and torch.is_grad_enabled():
            prediction = checkpoint(predict, x, t, use_reentrant=False)
        else:
            prediction = predict(x, t)
        sample = scheduler.step(prediction, t, sample, **arguments, return_dict=False)[0]
    # Multistep schedulers would hold the graph of this chain until the next one.
    set_timesteps(scheduler, num_inference_steps, noise.device)
    return sample


def check_arguments(scheduler: Any, num_inference_steps: int, eta: float, checkpointing: str) -> None:
    """Checks the arguments of `differentiable_sample`; see its `Raises`."""
    length = scheduler.config.num_train_timesteps
    if type(num_inference_steps) is not int or not 1 <= num_inference_steps <= length:
        raise ValueError(
            f"`num_inference_steps` must be an integer in 1..{length}, the scheduler's timesteps, got "
            f"{num_inference_steps!r}."
        )
    if not 0 <= eta <= 1:
        raise ValueError(f"`eta` must be a number in [0, 1], got {eta!r}.")
    if checkpointing not in ("step", "none"):
        raise ValueError(f"`checkpointing` must be 'step' or 'none', got {checkpointing!r}.")
    if scheduler.config.get("prediction_type", "epsilon") not in PREDICTIONS:
        raise ValueError(
            f"`scheduler.config.prediction_type` must be one of {list(PREDICTIONS)}, got "
            f"{scheduler.config.prediction_type!r}."
        )
    accepted = inspect.signature(type(scheduler).__init__).parameters  # a config may hold other schedulers' entries
    for name in ("clip_sample", "thresholding"):
        if name in accepted and scheduler.config[name]:
            raise ValueError(f"`scheduler.config.{name}` must be False, got True: it stops gradients in the chain.")


def clamped(images: torch.Tensor, mode: Literal["hard", "ste"] = "hard") -> torch.Tensor:
    """Clamps images to `[-1, 1]`.

    Args:
        images: any shape.
        mode: `"hard"` gives no gradient to pixels outside; `"ste"` passes theirs through unchanged.

    Raises:
        ValueError: the mode is unknown.
    """
    if mode not in ("hard", "ste"):
        raise ValueError(f"`clamp` must be 'hard' or 'ste', got {mode!r}.")
    inside = images.clamp(-1, 1)
    return inside if mode == "hard" else images + (inside - images).detach()
