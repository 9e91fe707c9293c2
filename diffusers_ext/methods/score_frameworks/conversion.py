r"""One denoiser under three frameworks: a network trained in one, called in another.

All see noisy data \(x_t = a x_0 + b\,n\). A framework (DDPM, NCSN, an SDE) is a pair a(t), b(t); what the network sees
is \(\sigma = b/a\) alone, so that \(y = x_t/a = x_0 + \sigma n\) is common to all. The score of y is
\(-\epsilon/\sigma\), that of \(x_t\) is \(-\epsilon/b\). Timesteps of a network are those of its own schedule: see
`timestep_of_sigma`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from diffusers_ext.generation.score_levels import PREDICTIONS, as_levels, noise_from_output, sigma_of_timestep
from diffusers_ext.training.config import require

from .langevin import falling_sigmas

__all__ = ["NCSNDenoiser", "ncsn_as_denoiser", "score_from_output"]


def score_from_output(
    output: torch.Tensor, sample: torch.Tensor, sigma: float | torch.Tensor, prediction_type: str
) -> torch.Tensor:
    r"""Returns the score of noisy data that an output of the network means.

    Args:
        output: `(batch, ...)` of the network.
        sample: `(batch, ...)`, \(y = x_0 + \sigma n\); the network was given \(y / \sqrt{1 + \sigma^2}\), of flow
            matching \(y / (1 + \sigma)\).
        sigma: noise level, or `(batch,)` of them, above 0.
        prediction_type: `"epsilon"`, `"sample"`, `"v_prediction"` or `"flow_prediction"`.

    Returns:
        The gradient of the log-density of y, of its shape. That of \(a y\) is 1/a times it.

    Raises:
        ValueError: the prediction type is unknown, a level is not above 0, or shapes differ.

    Example:
        >>> import torch
        >>> from diffusers_ext import score_from_output
        >>> score_from_output(torch.tensor([[0.5]]), torch.tensor([[1.0]]), 2.0, "epsilon")
        tensor([[-0.2500]])
    """
    if prediction_type not in PREDICTIONS:
        raise ValueError(f"`prediction_type` must be one of {list(PREDICTIONS)}, got {prediction_type!r}.")
    for name, value in (("output", output), ("sample", sample)):
        floats = isinstance(value, torch.Tensor) and value.is_floating_point() and value.shape == sample.shape
        require(floats, name, type(value).__name__, "a tensor of floats, both of one shape")
    level = as_levels(sigma, "sigma")
    good = bool(((level > 0) & level.isfinite()).all()) and level.numel() in (1, len(sample))
    require(good, "sigma", sigma, f"above 0 and finite, one or {len(sample)}")
    if level.ndim:
        level = level.view(-1, *[1] * (sample.ndim - 1))
    a = 1 / (1 + level) if prediction_type == "flow_prediction" else (1 + level.square()).rsqrt()
    a, level = a.to(sample), level.to(sample)
    return -noise_from_output(output, a * sample, a, a * level, prediction_type) / level


class NCSNDenoiser(nn.Module):
    """What `ncsn_as_denoiser` returns.

    Attributes:
        alphas_cumprod: `(levels,)` float64, by rising sigma: the schedule on which it predicts noise.
        betas: the same as a list, for `trained_betas` of a scheduler.
    """

    def __init__(self, model: Callable[..., Any], sigmas: torch.Tensor, scaled_by_sigma: bool) -> None:
        super().__init__()
        self.model, self.scaled_by_sigma = model, scaled_by_sigma
        self.sigmas = sigmas
        rising = sigmas.flip(0)
        self.alphas_cumprod = 1 / (1 + rising.square())
        before = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])
        self.betas: list[float] = (1 - self.alphas_cumprod / before).tolist()

    def forward(self, sample: torch.Tensor, timestep: float | torch.Tensor) -> torch.Tensor:
        r"""Returns the noise in a sample.

        Args:
            sample: `(batch, ...)`, \(a x_0 + b\,n\) of the schedule.
            timestep: one or `(batch,)` of them in `0..levels - 1`, by rising sigma.
        """
        t = as_levels(timestep, "timestep").expand(len(sample))
        shape = (-1, *[1] * (sample.ndim - 1))
        own = sigma_of_timestep(self.alphas_cumprod, t)
        y = sample * (1 + own.square()).sqrt().to(sample).view(shape)
        level = len(self.sigmas) - 1 - t.round().long()
        output = self.model(y, level.to(sample.device))
        output = output if isinstance(output, torch.Tensor) else output[0]
        require(output.shape == sample.shape, "model", tuple(output.shape), f"one that returns {tuple(sample.shape)}")
        return -(self.sigmas[level].to(sample).view(shape) * output if self.scaled_by_sigma else output)


def ncsn_as_denoiser(
    model: Callable[..., Any], sigmas: list[float] | torch.Tensor, scaled_by_sigma: bool = True
) -> NCSNDenoiser:
    r"""Turns a noise-conditional score network into a denoiser that predicts noise (1907.05600, 2006.09011).

    At level l it is \(\epsilon = -\sigma_l s(y, l)\). A sample between levels goes to the nearest; the score is then
    multiplied by that level's sigma, not by its own.

    Args:
        model: function of y, `(batch, ...)`, not scaled, and labels `(batch,)`, 0 at the largest sigma.
        sigmas: `(levels,)` its falling noise levels; see `geometric_sigmas`.
        scaled_by_sigma: whether its output is the score s (NCSNv2 divides by sigma inside); else it is sigma s.

    Returns:
        A module of (sample, timestep), as a DDPM-trained network, on the schedule with its `betas` as `trained_betas`.

    Raises:
        ValueError: `sigmas` are not falling numbers above 0, or the model is no function.

    Example:
        >>> import torch
        >>> from diffusers import DDIMScheduler
        >>> from diffusers_ext import geometric_sigmas, ncsn_as_denoiser
        >>> sigmas = geometric_sigmas(10.0, 0.01, 20)
        >>> def network(y, label):  # the score of standard normal data; a trained network otherwise
        ...     return -y / (1 + sigmas[label, None] ** 2)
        >>> denoiser = ncsn_as_denoiser(network, sigmas)
        >>> scheduler = DDIMScheduler(len(denoiser.betas), trained_betas=denoiser.betas)
        >>> x, t = torch.ones(1, 1, dtype=torch.float64), 5
        >>> bool(torch.isclose(denoiser(x, t), (1 - denoiser.alphas_cumprod[t]).sqrt() * x))
        True
    """
    require(callable(model), "model", type(model).__name__, "a network or a function of y and labels")
    return NCSNDenoiser(model, falling_sigmas(sigmas), scaled_by_sigma)
