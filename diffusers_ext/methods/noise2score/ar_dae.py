"""Learning the score of noisy images from them alone: the amortised residual denoising autoencoder (AR-DAE)."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["annealed_smoothing", "ar_dae_loss", "estimate_noise_std"]


def ar_dae_loss(
    score: Callable[[torch.Tensor], torch.Tensor], y: torch.Tensor, u: torch.Tensor, smoothing: float
) -> torch.Tensor:
    r"""Returns the mean of \(|u + s R(y + s u)|^2\), one call of the score (Noise2Score, arXiv 2106.07009, eq. 13).

    Its minimiser R is the score of y with normal noise of deviation s on top, and R = 0 has the loss 1.

    Args:
        score: R, a function of `(batch, ...)`.
        y: `(batch, ...)` noisy samples, in the units of `NoiseModel.score_input`.
        u: standard normal numbers of y's shape.
        smoothing: s > 0.

    Example:
        >>> import torch
        >>> from diffusers_ext import ar_dae_loss
        >>> y, u = torch.randn(2, 100_000, generator=torch.Generator().manual_seed(0))
        >>> round(ar_dae_loss(lambda v: -v / 1.25, y, u, 0.5).item(), 2)  # 1 - s^2 / (1 + s^2)
        0.8
    """
    return (u + smoothing * score(y + smoothing * u)).square().mean()


def annealed_smoothing(samples_seen: int, start: float, end: float, annealing_samples: int) -> float:
    """Returns the smoothing of a position in the run: linear from `start` to `end`, then constant for good.

    Args:
        samples_seen: samples before this one, counted over the whole run.
        start: smoothing of the first sample.
        end: smoothing from `annealing_samples` on.
        annealing_samples: length of the way; 0 begins at the end.
    """
    share = min(samples_seen / annealing_samples, 1.0) if annealing_samples else 1.0
    return start + (end - start) * share


def estimate_noise_std(y: torch.Tensor) -> float:
    """Estimates the deviation of white noise from the median of diagonal Haar coefficients (Donoho and Johnstone).

    Args:
        y: `(..., height, width)` noisy images of at least 2x2 pixels.
    """
    height, width = y.shape[-2] // 2 * 2, y.shape[-1] // 2 * 2
    y = y[..., :height, :width].float()
    detail = y[..., ::2, ::2] - y[..., 1::2, ::2] - y[..., ::2, 1::2] + y[..., 1::2, 1::2]
    return float(detail.abs().median() / 2 / 0.6744898)
