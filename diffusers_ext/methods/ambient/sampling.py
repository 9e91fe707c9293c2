"""EDM's second-order sampler, and stopping it early."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["edm_levels", "heun_step"]


def edm_levels(
    num_inference_steps: int,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    stop_at_sigma: float | None = None,
) -> torch.Tensor:
    r"""Returns the levels of EDM's sampler: equally spaced in \(\sigma^{1/\rho}\), then 0.

    Args:
        num_inference_steps: steps.
        sigma_min: the last level above 0.
        sigma_max: the first.
        rho: 7 puts most of the steps at low levels.
        stop_at_sigma: end here instead of at 0: levels below are left out.

    Returns:
        Levels in float64, `(num_inference_steps + 1,)` where they end at 0.

    Raises:
        ValueError: a level is not finite, not positive, or out of order, or there is no step.

    Reference:
        Karras et al. 2022, arXiv 2206.00364, eq. 5.

    Example:
        >>> from diffusers_ext import edm_levels
        >>> edm_levels(3, sigma_min=1.0, sigma_max=4.0, rho=1.0).tolist()
        [4.0, 2.5, 1.0, 0.0]
        >>> edm_levels(3, sigma_min=1.0, sigma_max=4.0, rho=1.0, stop_at_sigma=2.0).tolist()
        [4.0, 2.5, 2.0]
    """
    if not isinstance(num_inference_steps, int) or num_inference_steps < 1:
        raise ValueError(f"`num_inference_steps` must be an integer >= 1, got {num_inference_steps!r}.")
    if not 0 < sigma_min < sigma_max < float("inf"):
        raise ValueError(f"`sigma_min` and `sigma_max` must be levels 0 < min < max, got {sigma_min} and {sigma_max}.")
    if stop_at_sigma is not None and not 0 < stop_at_sigma < sigma_max:
        raise ValueError(
            f"`stop_at_sigma` must lie between 0 and the first level, {sigma_max}, got {stop_at_sigma!r}."
        )
    ramp = torch.arange(num_inference_steps, dtype=torch.float64) / max(1, num_inference_steps - 1)
    levels = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    end = 0.0 if stop_at_sigma is None else stop_at_sigma
    return torch.cat([levels[levels > end], torch.tensor([end], dtype=torch.float64)])


def heun_step(
    denoise: Callable[[torch.Tensor, float], torch.Tensor], x: torch.Tensor, sigma: float, sigma_next: float
) -> torch.Tensor:
    """Takes one step of Heun's method along the probability flow of samples x_0 + sigma n; to 0, Euler's.

    Args:
        denoise: function of samples and their level that returns clean samples.
        x: `(batch, ...)` samples of level `sigma`.
        sigma: their level, above `sigma_next`.
        sigma_next: the level to reach, at least 0.

    Returns:
        Samples of level `sigma_next`.

    Reference:
        Karras et al. 2022, arXiv 2206.00364, algorithm 1 without its noise.

    Example:
        >>> import torch
        >>> from diffusers_ext import heun_step
        >>> heun_step(lambda x, sigma: torch.zeros_like(x), torch.ones(1), 2.0, 1.0)  # of one point the flow is linear
        tensor([0.5000])
    """
    slope = (x - denoise(x, sigma)) / sigma
    euler = x + (sigma_next - sigma) * slope
    if sigma_next == 0:
        return euler
    return x + (sigma_next - sigma) / 2 * (slope + (euler - denoise(euler, sigma_next)) / sigma_next)
