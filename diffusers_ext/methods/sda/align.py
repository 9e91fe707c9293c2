r"""Diffusion-driven adaptation: an image is noised, then denoised under the guidance of its own low frequencies.

With N of R respaced timesteps, ascending index:

    z_N     = sqrt(abar_N) x + sqrt(1 - abar_N) e
    z_{i-1} = mean(z_i) + sigma_i n - w grad_{z_i} ||phi(x) - phi(x0_hat(z_i))||,    i = N-1, ..., 0

where x0_hat is the network's estimate, clamped to [-1, 1]. Noise is added at level N and removed from level N - 1 on,
as the authors do. The gradient of the norm has a closed form, so that a step costs one vector-Jacobian product of the
network, or none with `detach_unet`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor

from diffusers_ext.generation.stepping import check_generator

from .lowpass import LowPass, Norm

__all__ = ["AlignConfig", "align"]


@dataclass(frozen=True)
class AlignConfig:
    """How images are adapted.

    Args:
        num_steps: R, to how many timesteps the schedule is respaced.
        strength: N / R in [0, 1): how far the image is noised. `round(strength * num_steps)` is the number of calls
            of the network; 0 leaves images as they are.
        guidance_weight: w. The norm grows with the square root of channels x height x width; 6 is the authors' for
            256x256 colour images and 50 steps.
        factor: D of the low-pass filter.
        norm: one norm an image, or one over the batch as in the authors' code, where the result depends on the batch.
        sampler: `"ddpm"` draws noise at every step, `"ddim"` is deterministic after the first noise.
        detach_unet: hold the predicted noise fixed in the gradient, which then is a closed form without a backward
            pass through the network.

    Raises:
        ValueError: an argument is outside its range.
    """

    num_steps: int = 100
    strength: float = 0.5
    guidance_weight: float = 6.0
    factor: int = 4
    norm: Norm = "per_sample"
    sampler: Literal["ddpm", "ddim"] = "ddpm"
    detach_unet: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.num_steps, int) or self.num_steps < 1:
            raise ValueError(f"`num_steps` must be an integer >= 1, got {self.num_steps!r}.")
        if not 0 <= self.strength < 1 or self.calls >= self.num_steps:
            raise ValueError(
                f"`strength` must be in [0, 1) and leave one of {self.num_steps} steps, got {self.strength!r}."
            )
        if not (self.guidance_weight >= 0 and math.isfinite(self.guidance_weight)):
            raise ValueError(f"`guidance_weight` must be a number >= 0, got {self.guidance_weight!r}.")
        if self.norm not in ("per_sample", "batch"):
            raise ValueError(f"`norm` must be 'per_sample' or 'batch', got {self.norm!r}.")
        if self.sampler not in ("ddpm", "ddim"):
            raise ValueError(f"`sampler` must be 'ddpm' or 'ddim', got {self.sampler!r}.")

    @property
    def calls(self) -> int:
        """N, the number of calls of the network."""
        return round(self.strength * self.num_steps)


class _Schedule:
    """The respaced noise schedule: all coefficients as plain numbers, so that no step waits for the device."""

    def __init__(self, scheduler: Any, num_steps: int) -> None:
        abar: torch.Tensor | None = getattr(scheduler, "alphas_cumprod", None)
        kind = getattr(scheduler.config, "prediction_type", None)
        if abar is None or kind not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(
                "`scheduler` must have `alphas_cumprod` and the prediction type 'epsilon', 'v_prediction' or "
                f"'sample', got {type(scheduler).__name__} with {kind!r}."
            )
        if num_steps > len(abar):
            raise ValueError(f"`num_steps` must be at most the schedule's {len(abar)}, got {num_steps}.")
        self.prediction_type = kind
        self.timesteps = np.linspace(0, len(abar) - 1, num_steps).round().astype(int).tolist()
        kept = abar.double().cpu()[self.timesteps]
        before = torch.cat([torch.ones(1, dtype=kept.dtype), kept[:-1]])
        beta = 1 - kept / before
        variance = beta * (1 - before) / (1 - kept)
        self.abar: list[float] = kept.tolist()
        self.before: list[float] = before.tolist()
        self.beta: list[float] = beta.tolist()
        # The first posterior variance is 0; its logarithm is that of the second, as in the authors' code.
        clipped = torch.cat([variance[1:2], variance[1:]]) if num_steps > 1 else beta
        self.log_variance: list[float] = clipped.log().tolist()

    def estimate(self, i: int, z: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Returns x0_hat before clamping."""
        signal, noise = math.sqrt(self.abar[i]), math.sqrt(1 - self.abar[i])
        if self.prediction_type == "epsilon":
            return (z - noise * output) / signal
        return output if self.prediction_type == "sample" else signal * z - noise * output

    def mean(self, i: int, z: torch.Tensor, x0: torch.Tensor, sampler: str) -> torch.Tensor:
        """Returns the mean of z_{i-1}: of the ancestral step, or the whole deterministic one."""
        abar, before = self.abar[i], self.before[i]
        if sampler == "ddim":
            noise = (z - math.sqrt(abar) * x0) / math.sqrt(1 - abar)
            return math.sqrt(before) * x0 + math.sqrt(1 - before) * noise
        of_x0 = math.sqrt(before) * self.beta[i] / (1 - abar)
        of_z = math.sqrt(1 - self.beta[i]) * (1 - before) / (1 - abar)
        return of_x0 * x0 + of_z * z

    def sigma(self, i: int, variance: torch.Tensor | None) -> float | torch.Tensor:
        """Returns the ancestral step's standard deviation: beta, or what a learned range interpolates."""
        if variance is None:
            return math.sqrt(self.beta[i])
        share = (variance + 1) / 2
        return (0.5 * (share * math.log(self.beta[i]) + (1 - share) * self.log_variance[i])).exp()


def check_images(images: torch.Tensor, unet: Any) -> None:
    """Checks images against the network that is to adapt them.

    Raises:
        ValueError: the shape does not fit, or the values leave [-1, 1].
    """
    channels, size = unet.config.in_channels, unet.config.sample_size
    sides = (size, size) if isinstance(size, int) else size
    expected = (channels, *(sides or images.shape[2:]))
    if images.ndim != 4 or tuple(images.shape[1:]) != expected:
        raise ValueError(
            f"`images` must have the shape (batch, {', '.join(map(str, expected))}) of the diffusion model, got "
            f"{tuple(images.shape)}."
        )
    if not images.is_floating_point():
        raise ValueError(f"`images` must be floats in [-1, 1], got {images.dtype}.")


def align(
    unet: Any,
    scheduler: Any,
    images: torch.Tensor,
    config: AlignConfig | None = None,
    *,
    generator: torch.Generator | list[torch.Generator] | None = None,
    low_pass: LowPass | None = None,
    callback: Callable[[int, int, torch.Tensor], torch.Tensor | None] | None = None,
    interrupted: Callable[[], bool] | None = None,
) -> torch.Tensor:
    """Pulls images to the domain of a diffusion model while their low frequencies stay.

    Args:
        unet: an unconditional `UNet2DModel`, or any module called and configured like one. With twice as many output
            channels as input channels, the second half is a learned-range variance.
        scheduler: whose `alphas_cumprod` and prediction type it was trained with; its own sampling is not used.
        images: `(batch, channels, height, width)` in [-1, 1], of the network's size.
        config: how; by default the paper's settings.
        generator: source of noise; a list has one an image, and then an image's result does not depend on its batch.
        low_pass: the filter, to reuse it over calls; by default it is made here.
        callback: called as `(index, timestep, z)` after every step, index 0 first; a tensor that it returns replaces
            z.
        interrupted: asked before every step; once it answers yes, z is returned as it is.

    Returns:
        Adapted images of the same shape and dtype, in [-1, 1].

    Raises:
        ValueError: an argument is wrong; the message names it.

    Reference:
        Gao et al. 2023 (arXiv 2207.03442), algorithm 1, there with a norm over the whole batch.

    Example:
        >>> import torch
        >>> from diffusers import DDPMScheduler, UNet2DModel
        >>> from diffusers_ext import AlignConfig, align
        >>> unet = UNet2DModel(
        ...     sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=2,
        ...     down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        ... )
        >>> config = AlignConfig(num_steps=10, strength=0.2, factor=2)
        >>> align(unet, DDPMScheduler(), torch.zeros(2, 1, 8, 8), config).shape
        torch.Size([2, 1, 8, 8])
    """
    config = config or AlignConfig()
    check_images(images, unet)
    schedule = _Schedule(scheduler, config.num_steps)
    check_generator(generator, len(images))
    low_pass = low_pass or LowPass((images.shape[2], images.shape[3]), config.factor, images.device)
    start = config.calls
    if start == 0:
        return images.clone()
    x = images.float()
    reduced = low_pass.reduce(x)

    def noise() -> torch.Tensor:
        return randn_tensor(tuple(x.shape), generator=generator, device=x.device, dtype=x.dtype)

    z = math.sqrt(schedule.abar[start]) * x + math.sqrt(1 - schedule.abar[start]) * noise()
    for i in range(start - 1, -1, -1):
        if interrupted is not None and interrupted():
            break
        x0, variance, gradient = _guided(unet, schedule, i, z, low_pass, reduced, config)
        z_next = schedule.mean(i, z, x0, config.sampler)
        if i and config.sampler == "ddpm":
            z_next = z_next + schedule.sigma(i, variance) * noise()
        z = z_next if gradient is None else z_next - config.guidance_weight * gradient
        if callback is not None:
            changed = callback(start - 1 - i, schedule.timesteps[i], z)
            z = z if changed is None else changed
    return z.clamp(-1, 1).to(images.dtype)


def _guided(
    unet: Any,
    schedule: _Schedule,
    i: int,
    z: torch.Tensor,
    low_pass: LowPass,
    reduced: torch.Tensor,
    config: AlignConfig,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Returns the clamped estimate, the raw variance where the network has one, and the norm's gradient in z."""
    weighted = config.guidance_weight > 0
    through = weighted and not config.detach_unet
    channels = z.shape[1]
    # What the backward pass needs is kept as it was in the forward pass: hooks of layerwise casting and of offloading
    # change the weights in between.
    kept = torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), lambda t: t)
    with torch.set_grad_enabled(through), kept:
        z = z.detach().requires_grad_(through)
        output = unet(z.to(unet.dtype), schedule.timesteps[i], return_dict=False)[0].float()
        variance = output[:, channels:].detach() if output.shape[1] == 2 * channels else None
        raw = schedule.estimate(i, z, output[:, :channels])
    x0 = raw.detach().clamp(-1, 1)
    if not weighted:
        return x0, variance, None
    slope = low_pass.distance(reduced, x0, config.norm)[1]
    slope = torch.where(raw.detach() == x0, slope, 0)  # the clamp's own derivative
    if config.detach_unet:
        return x0, variance, slope / math.sqrt(schedule.abar[i])
    # A unit vector has small entries, which half precision would lose on the way; a power of two changes nothing else.
    scale = 2.0 ** round(math.log2(z[0].numel()) / 2)
    gradient = torch.autograd.grad(raw, z, slope * scale)[0] / scale
    return x0, variance, gradient
