"""Training in the other frameworks: which noise levels a step draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from diffusers_ext.generation.score_levels import sigma_of_timestep, timestep_of_sigma
from diffusers_ext.rng import StepRNG
from diffusers_ext.training.timesteps import Timesteps

from .langevin import check_sigmas, geometric_sigmas
from .ode import FIRST_TIME
from .sde import make_sde

__all__ = ["FrameworkTimesteps"]


class FrameworkTimesteps(Timesteps):
    r"""Timesteps of a schedule of betas, fractions included, that have the noise levels of another framework.

    With the plain loss on noise a network learns NCSN's denoising score matching, weighted by \(\sigma^2\), or Score
    SDE's, weighted by the variance \(b^2\): \(\lVert \epsilon - n \rVert^2 = b^2 \lVert s + n / b \rVert^2\). It stays
    a network of the schedule, so that every sampler takes it.

    Args:
        framework: `"ncsn"`: geometric levels, as many as NCSNv2 chooses for the dimension, all as often; `"vp"`,
            `"ve"` or `"subvp"`: times uniform in 0.00001 to 1. Levels of VP and sub-VP beyond the schedule's get its
            nearest.
        alphas_cumprod: `(num_train_timesteps,)` of the schedule.
        dimension: number of values of a sample, for `"ncsn"`.
        sigma_min: smallest level of `"ncsn"` and `"ve"`, by default 0.01, or the schedule's if that is larger.
        sigma_max: largest level of the same, by default the schedule's.

    Raises:
        ValueError: a level is outside the schedule's, or an argument is wrong.

    Example:
        >>> import torch
        >>> from diffusers import DDPMScheduler
        >>> from diffusers_ext import FrameworkTimesteps, sigma_of_timestep
        >>> alphas = DDPMScheduler().alphas_cumprod
        >>> law = FrameworkTimesteps("ve", alphas, sigma_min=0.1, sigma_max=10.0)
        >>> sigma_of_timestep(alphas, law.at(torch.tensor([0.25, 0.5, 0.75])))
        tensor([3.1623, 1.0000, 0.3162], dtype=torch.float64)
    """

    def __init__(
        self,
        framework: Literal["ncsn", "vp", "ve", "subvp"],
        alphas_cumprod: torch.Tensor,
        dimension: int | None = None,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
    ) -> None:
        least, most = (sigma_of_timestep(alphas_cumprod, t).item() for t in (0, len(alphas_cumprod) - 1))
        low = max(0.01, least) if sigma_min is None else sigma_min
        high = most if sigma_max is None else sigma_max
        check_sigmas(high, low)
        for name, value in (("sigma_min", low), ("sigma_max", high)):
            if not least * (1 - 1e-6) <= value <= most * (1 + 1e-6):
                raise ValueError(
                    f"`{name}` must be within the schedule's levels, {least:.4g} to {most:.4g}, got {value!r}."
                )
        self.alphas_cumprod = alphas_cumprod
        if framework == "ncsn":
            self.levels: torch.Tensor | None = geometric_sigmas(high, low, dimension=dimension)
        else:
            self.levels, self.sde = None, make_sde(framework, sigma_min=low, sigma_max=high)

    def __call__(
        self, n: int, rng: StepRNG, ids: Sequence[int] | None = None, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """Returns `(n,)` float32 timesteps."""
        return self.at(rng.rand(n, ids, device=device)).float()

    def at(self, p: torch.Tensor) -> torch.Tensor:
        """See `Timesteps.at`."""
        p = p.double()
        if self.levels is not None:
            place = (p * len(self.levels)).long().clamp(max=len(self.levels) - 1)
            sigma = self.levels[place.cpu()]
        else:
            sigma = self.sde.sigma((1 - p).clamp(min=FIRST_TIME).cpu())
        return timestep_of_sigma(self.alphas_cumprod, sigma).to(p.device)
