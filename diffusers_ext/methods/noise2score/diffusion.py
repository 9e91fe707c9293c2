"""A diffusion model of clean images is a score of noisy ones: the Gaussian Noise2Score without its training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from diffusers_ext.generation.score_field import ScoreField

__all__ = ["score_from_diffusion"]


def score_from_diffusion(
    model: Callable[..., Any], scheduler: Any, sigma: float, **model_kwargs: Any
) -> Callable[[torch.Tensor], torch.Tensor]:
    r"""Returns the score of images with Gaussian noise as a diffusion model knows it.

    On every schedule and for every prediction type it is \(-\epsilon_\theta / \sigma\) at the level at which noise and
    image have the ratio sigma, of y = x + sigma n with x in the model's own range, mostly [-1, 1]: for an image in
    [0, 1] take 2 y - 1 and twice its sigma, as below. With `AdditiveGaussianNoise(sigma)`, `posterior_mean` gives the
    model's own estimate of the clean image.

    Args:
        model: a `UNet2DModel` or another denoiser; see `ScoreField`.
        scheduler: its scheduler.
        sigma: noise of the images, in the units of x; within the scheduler's levels.
        model_kwargs: further arguments of the model, such as `class_labels`.

    Returns:
        A function of y, for `posterior_mean`.

    Raises:
        ValueError: the level is outside the scheduler's, or its schedule is not known.

    Example:
        >>> import torch
        >>> from diffusers import DDIMScheduler
        >>> from diffusers_ext import AdditiveGaussianNoise, posterior_mean, score_from_diffusion
        >>> scheduler = DDIMScheduler()
        >>> def model(x, t):  # of standard normal images; a trained network otherwise
        ...     return (1 - scheduler.alphas_cumprod[t.long()]).sqrt()[:, None] * x
        >>> y, sigma = torch.tensor([[0.9]]), 0.25  # in [0, 1]
        >>> score = score_from_diffusion(model, scheduler, 2 * sigma)
        >>> x = (posterior_mean(2 * y - 1, score, AdditiveGaussianNoise(2 * sigma)) + 1) / 2
        >>> round(x.item(), 3)  # 0.5 + 0.4 / (1 + 0.5 ** 2)
        0.82
    """
    field = ScoreField(model, scheduler, **model_kwargs)
    a = float(field.at(sigma).a)

    def score(y: torch.Tensor) -> torch.Tensor:
        # The model's sample is a y, so that its score is 1 / a of that of y.
        return a * field.score(a * y, sigma)

    return score
