r"""The loss of a network that learns the variance of its reverse process beside the mean.

Its output v gives \(\log \sigma_t^2 = \frac{v + 1}{2} \log \beta_t + \frac{1 - v}{2} \log \tilde\beta_t\) with the
posterior variance \(\tilde\beta_t\). The term of the variational bound at t is the divergence of the posterior
\(q(x_{t-1} | x_t, x_0)\) from that Gaussian, at the first timestep minus the log-likelihood of 8-bit pixels.
"""

from __future__ import annotations

import math
from typing import Any

import torch

__all__ = ["LearnedVariance"]

BIN = 1 / 255  # half the width of a pixel's value in [-1, 1]
LEAST = 1e-12  # probability that a pixel has at least, so that no estimate costs without bound


class LearnedVariance:
    """Computes the terms of the variational bound.

    Args:
        scheduler: a variance-preserving scheduler with `betas`.

    Reference:
        Nichol, Dhariwal, "Improved Denoising Diffusion Probabilistic Models", arXiv 2102.09672, eq. 15 and 16.
    """

    def __init__(self, scheduler: Any) -> None:
        beta = scheduler.betas.double()
        abar = (1 - beta).cumprod(0)
        before = torch.cat([torch.ones_like(abar[:1]), abar[:-1]])
        posterior = beta * (1 - before) / (1 - abar)
        # The posterior's variance is 0 at the first timestep; the second's stands in for it.
        self.low, self.high = torch.cat([posterior[1:2], posterior[1:]]).log(), beta.log()
        self.of_x0, self.of_noisy = before.sqrt() * beta / (1 - abar), (1 - beta).sqrt() * (1 - before) / (1 - abar)

    def bound(
        self, x0: torch.Tensor, noisy: torch.Tensor, t: torch.Tensor, estimate: torch.Tensor, output: torch.Tensor
    ) -> torch.Tensor:
        """Computes the bound's terms.

        Args:
            x0: `(batch, channels, height, width)` pixels in `[-1, 1]`.
            noisy: likewise, at timestep `t`.
            t: `(batch,)` int timesteps.
            estimate: what the network takes `x0` for; it gets no gradient from here.
            output: v, of the same shape.

        Returns:
            `(batch,)` bits per pixel and channel, times T / 1000: the weight of 0.001 of the whole bound.
        """

        def at(values: torch.Tensor) -> torch.Tensor:
            return values.to(t.device)[t].float().view(-1, *[1] * (x0.ndim - 1))

        share = (output.float() + 1) / 2
        log_variance = share * at(self.high) + (1 - share) * at(self.low)
        apart = at(self.of_x0) * (x0.float() - estimate.detach().float())  # of the two means
        ratio = at(self.low) - log_variance
        divergence = 0.5 * (ratio.exp() - 1 - ratio + apart.square() * (-log_variance).exp())
        mean = at(self.of_x0) * estimate.detach().float() + at(self.of_noisy) * noisy.float()
        first = (t == 0).view(-1, *[1] * (x0.ndim - 1))
        terms = torch.where(first, -pixel_log_likelihood(x0.float(), mean, log_variance), divergence)
        return terms.flatten(1).mean(1) / math.log(2) * len(self.high) / 1000


def pixel_log_likelihood(x: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """Computes the log-probability of 8-bit pixels in [-1, 1] under a Gaussian; the outer bins reach to infinity."""
    scale = (-0.5 * log_variance).exp()
    upper, lower = scale * (x - mean + BIN), scale * (x - mean - BIN)
    probability = torch.special.ndtr(upper) - torch.special.ndtr(lower)
    probability = torch.where(x > 0.999, torch.special.ndtr(-lower), probability)
    probability = torch.where(x < -0.999, torch.special.ndtr(upper), probability)
    return probability.clamp(min=LEAST).log()
