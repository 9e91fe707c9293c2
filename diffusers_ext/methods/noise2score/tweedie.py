r"""The clean image that is to be expected of a noisy one, from the score of the noisy images.

Every formula here is of Noise2Score (arXiv 2106.07009, section 3) or an exact identity that it approximates: for noise
of an exponential family \(p(y|\eta) = \exp(\eta T(y) - \varphi(\eta))\,b(y)\), Tweedie's
\(E[\eta|y] = (l'(y) - (\log b)'(y)) / T'(y)\) with \(l' = (\log p)'\) the score of the noisy images.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .noises import NoiseModel

__all__ = ["posterior_mean"]

Score = Callable[[torch.Tensor], torch.Tensor]


def posterior_mean(y: torch.Tensor, score: Score, noise: NoiseModel, smoothing: float = 0.0) -> torch.Tensor:
    r"""Denoises by a closed formula of the noise's family.

    Args:
        y: `(batch, ...)` noisy values, as they were recorded: not clipped, not rounded.
        score: the gradient of the log-density of the noisy values in the units of `noise.score_input`: of y itself for
            Gaussian, mixed, exponential and linear Gamma noise, of counts y / scale for Poisson noise, of log y for
            Gamma noise in the log domain. It is called once, for mixed noise twice.
        noise: family and parameter: `AdditiveGaussianNoise`, `PoissonNoise`, `PoissonGaussianNoise`, `GammaNoise`,
            `ExponentialNoise` or `ExponentialFamilyNoise`.
        smoothing: standard deviation, in the same units, of the Gaussian noise that the score's training added (`sa`
            of AR-DAE): the score is that of y with this noise on top, which Gaussian, mixed and log-Gamma noise
            correct for. Poisson, linear and general noise have no such correction; keep it small there.

    Returns:
        \(E[x|y]\) of y's shape and dtype; for Gamma and exponential noise \(1 / E[1/x|y]\), as in the paper.

    Raises:
        ValueError: y is outside the noise's range, or an argument is wrong.

    Example:
        >>> import torch
        >>> from diffusers_ext import AdditiveGaussianNoise, posterior_mean
        >>> def score(y):  # of N(0, 4) under noise of variance 1; a trained network otherwise
        ...     return -y / 5
        >>> posterior_mean(torch.tensor([10.0]), score, AdditiveGaussianNoise(1.0))
        tensor([8.])
    """
    if not isinstance(noise, NoiseModel):
        raise ValueError(f"`noise` must be a noise model such as AdditiveGaussianNoise(0.1), got {noise!r}.")
    if not isinstance(y, torch.Tensor) or not y.is_floating_point():
        raise ValueError(f"`y` must be a tensor of floats, got {getattr(y, 'dtype', type(y).__name__)}.")
    if not (isinstance(smoothing, int | float) and math.isfinite(smoothing) and smoothing >= 0):
        raise ValueError(f"`smoothing` must be a finite number >= 0, got {smoothing!r}.")
    noise.check(y, "y")
    precise = y if y.dtype in (torch.float32, torch.float64) else y.float()
    return noise.denoise(precise, score, smoothing).to(y.dtype)
