"""Samplers of Gaussian data are linear in their noise: exact means and variances without drawing any."""

import torch
from diffusers import DDPMScheduler

from diffusers_ext import sigma_of_timestep
from diffusers_ext.methods.score_frameworks.sampling import ddim_step


def exact_scheduler():
    """The linear schedule without clipping, and without the rounding of stock float32 levels."""
    scheduler = DDPMScheduler(clip_sample=False)
    scheduler.alphas_cumprod = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    return scheduler


class GaussianUNet:
    """The noise in N(0, variance) images on the linear schedule, with a configuration as pipelines want it."""

    config = {"in_channels": 1}  # noqa: RUF012

    def __init__(self, variance):
        self.variance, self.alphas_cumprod = variance, exact_scheduler().alphas_cumprod

    def __call__(self, x, t):
        sigma = sigma_of_timestep(self.alphas_cumprod, t).to(x).view(-1, *[1] * (x.ndim - 1))
        return sigma * (1 + sigma**2).sqrt() / (self.variance + sigma**2) * x


def responses(clean, estimator, sigmas, shape, start=None):
    """Runs DDIM with eta 1 without noise, and once for each draw with noise that is 1 in its first pixel.

    Args:
        clean: function of (x, sigma).
        estimator: gives the levels' coefficients.
        sigmas: the levels, 0 behind them.
        shape: of a sample.
        start: what the first draw is multiplied by, and what is added to it; by default 1 and 0.

    Returns:
        The sample without noise, and what each draw adds to it, `(draws, ...)`.
    """
    factor, first = start or (1.0, 0.0)
    draws = len(sigmas) - 1
    numbers = iter(range(1, draws + 1))

    def draw():
        noise = torch.zeros(draws + 1, *shape, dtype=torch.float64)
        noise[next(numbers)].view(-1)[0] = 1
        return noise

    x = factor * draw() + first
    for sigma, lower in zip(sigmas, sigmas[1:], strict=False):
        x = ddim_step(x, clean(x, sigma), estimator.coefficients(sigma), estimator.coefficients(lower), 1.0, draw)
    return x[0], x[1:] - x[0]
