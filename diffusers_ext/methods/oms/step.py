r"""The step from pure noise to the noise level at which a schedule really begins (One More Step, arXiv 2311.15744).

A schedule with \(\bar\alpha_T > 0\) trains its network on
\(x_T = \sqrt{\bar\alpha_T} x_0 + \sqrt{1 - \bar\alpha_T} n\), where a trace of the image is left, but sampling starts
from pure noise. The added step knows the conditional mean image \(\hat x_0\) and goes from \(x_S \sim N(0, I)\), where
\(\bar\alpha_S = 0\), to the first noise level \(a\) that the scheduler will use:

\[x = \sqrt{a}\, \hat x_0 + \sqrt{1 - a}\, n,\]

with fresh normal \(n\) ("ddpm": the posterior has no term in \(x_S\), as \(\bar\alpha_S = 0\)) or \(n = x_S\)
("ddim").
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["StartLevel", "oms_step", "start_latents", "start_level"]


@dataclass(frozen=True)
class StartLevel:
    r"""Where a scheduler begins.

    Attributes:
        alpha_cumprod: \(a\), the share of signal in the variance at its first timestep.
        sigma: \(\sqrt{(1 - a) / a}\), infinite for `a = 0`.
        variance_exploding: whether its samples are \(x_0 + \sigma n\) (Euler, LMS, Heun ...) instead of
            \(\sqrt{a} x_0 + \sqrt{1 - a} n\).
        init_noise_sigma: what pipelines multiply the latents by that they are given.
    """

    alpha_cumprod: float
    sigma: float
    variance_exploding: bool
    init_noise_sigma: float


def oms_step(
    x0_hat: torch.Tensor, alpha_cumprod: float, noise: torch.Tensor, legacy_variance: bool = False
) -> torch.Tensor:
    r"""Computes \(\sqrt{a} \hat x_0 + \sqrt{1 - a} n\).

    Args:
        x0_hat: `(batch, channels, height, width)` conditional mean, the negative of the network's v-prediction.
        alpha_cumprod: \(a\) in `[0, 1]`.
        noise: the same shape: fresh normals, or the sample the network saw for a deterministic step.
        legacy_variance: scale the noise by \(1 - a\) instead of \(\sqrt{1 - a}\), as the authors' code does.

    Returns:
        A tensor of `noise`'s dtype; computed in fp32.

    Raises:
        ValueError: shapes differ, or `alpha_cumprod` lies outside `[0, 1]`.

    Reference:
        Hu et al., "One More Step", arXiv 2311.15744, section 3.

    Example:
        >>> import torch
        >>> round(oms_step(torch.ones(1, 1, 1, 1), 0.36, torch.ones(1, 1, 1, 1)).item(), 4)
        1.4
    """
    for name, value in (("x0_hat", x0_hat), ("noise", noise)):
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"`{name}` must be a tensor, got {type(value).__name__}.")
    if x0_hat.shape != noise.shape:
        raise ValueError(f"`noise` must have the shape {tuple(x0_hat.shape)} of `x0_hat`, got {tuple(noise.shape)}.")
    if not (isinstance(alpha_cumprod, int | float) and 0 <= alpha_cumprod <= 1):
        raise ValueError(f"`alpha_cumprod` must lie in [0, 1], got {alpha_cumprod!r}.")
    scale = 1 - alpha_cumprod if legacy_variance else math.sqrt(1 - alpha_cumprod)
    return (math.sqrt(alpha_cumprod) * x0_hat.float() + scale * noise.float()).to(noise.dtype)


def start_level(scheduler: Any) -> StartLevel:
    """Reads where a scheduler begins; its timesteps must have been set.

    The level is that of the first sigma wherever the scheduler has sigmas, because Karras, exponential and beta sigmas
    do not lie on the training schedule; otherwise it is that of the first timestep.

    Args:
        scheduler: any Diffusers scheduler of a variance-preserving training schedule; it is left as it is.

    Raises:
        ValueError: its start is pure noise already (flow matching), or it has no `alphas_cumprod`.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
        >>> scheduler.set_timesteps(1000)
        >>> round(start_level(scheduler).alpha_cumprod, 6)
        0.00466
    """
    check_scheduler(scheduler)
    first = scheduler.timesteps[0]
    if first < scheduler.timesteps[-1]:
        raise ValueError(
            f"`scheduler` must go from noise to the image, got {type(scheduler).__name__} with timesteps that rise "
            f"from {first.item()} to {scheduler.timesteps[-1].item()}."
        )
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None:
        sigma = float(sigmas[0])
        alpha = 1 / (1 + sigma**2)
    else:
        alpha = float(scheduler.alphas_cumprod[int(first)])
        sigma = math.sqrt((1 - alpha) / alpha) if alpha > 0 else math.inf
    # Samples x0 + sigma * n are scaled down before the network sees them; the others are not. Asked of a copy: it
    # begins the count of steps.
    scaled = copy.deepcopy(scheduler).scale_model_input(torch.ones(1), first)
    exploding = not math.isclose(float(scaled), 1.0, rel_tol=1e-4)
    return StartLevel(alpha, sigma, exploding, float(scheduler.init_noise_sigma))


def check_scheduler(scheduler: Any) -> None:
    """Raises `ValueError` unless the scheduler starts from noise that a trace of the image would belong in."""
    name = type(scheduler).__name__
    config = getattr(scheduler, "config", None)
    if not isinstance(config, Mapping):
        raise ValueError(f"`scheduler` must be a Diffusers scheduler, got {scheduler!r}.")
    flow = config.get("prediction_type") == "flow_prediction" or config.get("use_flow_sigmas", False)
    if flow or name.startswith("FlowMatch"):
        raise ValueError(
            f"`scheduler` must be one of a variance-preserving schedule, got {name}: flow matching starts from pure "
            "noise in training too, so there is no step to add."
        )
    if "Inverse" in name:
        raise ValueError(f"`scheduler` must go from noise to the image, got {name}, which goes the other way.")
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            "`scheduler` must be one of a variance-preserving schedule, with `alphas_cumprod` (DDIM, PNDM, Euler, "
            f"LMS, DPM++, UniPC, LCM and others), got {name}."
        )


def start_latents(
    x0_hat: torch.Tensor, noise: torch.Tensor, level: StartLevel, legacy_variance: bool = False
) -> torch.Tensor:
    r"""Computes what to hand to a pipeline as `latents`, so that it starts where its network was trained.

    The pipeline will multiply it by `init_noise_sigma`; the result is on the scheduler's own scale:
    \(x\) of `oms_step`, or \(x / \sqrt{a}\) where its samples are \(x_0 + \sigma n\).

    Args:
        x0_hat: `(batch, channels, height, width)` conditional mean.
        noise: the same shape.
        level: of the pipeline's scheduler.
        legacy_variance: see `oms_step`.

    Returns:
        A tensor of `noise`'s shape and dtype.

    Raises:
        ValueError: shapes differ, or an argument is of another kind.
    """
    if not isinstance(level, StartLevel):
        raise ValueError(f"`level` must be what `start_level` returned, got {level!r}.")
    start = oms_step(x0_hat, level.alpha_cumprod, noise.float(), legacy_variance)
    if level.variance_exploding:
        start = start / math.sqrt(level.alpha_cumprod)
    return (start / level.init_noise_sigma).to(noise.dtype)
