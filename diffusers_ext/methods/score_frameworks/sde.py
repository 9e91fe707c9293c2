r"""The three processes of Score SDE (2011.13456) between data at time 0 and noise at time 1.

A sample at time t is \(x = a x_0 + b\,n\); \(dx = f\,dt + g\,dw\) with \(f = -\beta x / 2\), 0 for the exploding one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from diffusers_ext.training.config import is_number

from .langevin import check_sigmas

__all__ = ["SDE", "VESDE", "VPSDE", "SDEKind", "SubVPSDE", "make_sde"]

SDEKind = Literal["vp", "ve", "subvp"]


class SDE:
    """A process. Times are float64 tensors of any shape in [0, 1], and so is what the methods return."""

    def a(self, t: torch.Tensor) -> torch.Tensor:
        """Returns the factor of the data at a time."""
        raise NotImplementedError

    def b(self, t: torch.Tensor) -> torch.Tensor:
        """Returns the standard deviation of the noise at a time."""
        raise NotImplementedError

    def drift_rate(self, t: torch.Tensor) -> torch.Tensor:
        """Returns f / x."""
        raise NotImplementedError

    def squared_diffusion(self, t: torch.Tensor) -> torch.Tensor:
        """Returns g squared."""
        raise NotImplementedError

    def a_of_sigma(self, sigma: torch.Tensor) -> torch.Tensor:
        """Returns the factor of the data where b / a is sigma."""
        raise NotImplementedError

    def time(self, sigma: torch.Tensor) -> torch.Tensor:
        """Returns the time at which b / a is sigma; it may lie beyond [0, 1]."""
        raise NotImplementedError

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """Returns b / a, which is all that a network sees of a time."""
        return self.b(t) / self.a(t)

    def drift(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Returns f; t broadcasts to x."""
        return self.drift_rate(t) * x

    def diffusion(self, t: torch.Tensor) -> torch.Tensor:
        """Returns g."""
        return self.squared_diffusion(t).sqrt()


@dataclass(frozen=True)
class VPSDE(SDE):
    r"""The variance-preserving process, DDPM's limit: \(\beta = \beta_0 + t (\beta_1 - \beta_0)\), \(g^2 = \beta\).

    Args:
        beta_min: beta at time 0.
        beta_max: beta at time 1.

    Raises:
        ValueError: they are not 0 < beta_min < beta_max.

    Example:
        >>> import torch
        >>> from diffusers_ext import VPSDE
        >>> sde, t = VPSDE(), torch.tensor(0.5)
        >>> sde.a(t) ** 2 + sde.b(t) ** 2, sde.time(sde.sigma(t))
        (tensor(1.), tensor(0.5000))
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        if not (is_number(self.beta_min) and is_number(self.beta_max) and 0 < self.beta_min < self.beta_max):
            raise ValueError(
                f"`beta_min` must be a number between 0 and `beta_max`, {self.beta_max}, got {self.beta_min!r}."
            )

    def beta(self, t: torch.Tensor) -> torch.Tensor:
        """Returns beta at a time."""
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def integral(self, t: torch.Tensor) -> torch.Tensor:
        """Returns the integral of beta from 0 to a time."""
        return t * self.beta_min + t**2 / 2 * (self.beta_max - self.beta_min)

    def a(self, t: torch.Tensor) -> torch.Tensor:
        """See `SDE.a`."""
        return torch.exp(-self.integral(t) / 2)

    def b(self, t: torch.Tensor) -> torch.Tensor:
        """See `SDE.b`."""
        return (-torch.expm1(-self.integral(t))).sqrt()

    def drift_rate(self, t: torch.Tensor) -> torch.Tensor:
        """See `SDE.drift_rate`."""
        return -self.beta(t) / 2

    def squared_diffusion(self, t: torch.Tensor) -> torch.Tensor:
        """See `SDE.squared_diffusion`."""
        return self.beta(t)

    def a_of_sigma(self, sigma: torch.Tensor) -> torch.Tensor:
        """See `SDE.a_of_sigma`."""
        return (1 + sigma.square()).rsqrt()

    def time(self, sigma: torch.Tensor) -> torch.Tensor:
        """See `SDE.time`."""
        slope, rise = self.beta_max - self.beta_min, -2 * self.a_of_sigma(sigma).log()
        return 2 * rise / (self.beta_min + (self.beta_min**2 + 2 * slope * rise).sqrt())


@dataclass(frozen=True)
class SubVPSDE(VPSDE):
    r"""The sub-variance-preserving process: a as `VPSDE`, \(b = 1 - a^2\), \(g^2 = \beta (1 - e^{-2 \int \beta})\).

    Args:
        beta_min: beta at time 0.
        beta_max: beta at time 1.

    Raises:
        ValueError: they are not 0 < beta_min < beta_max.
    """

    def b(self, t: torch.Tensor) -> torch.Tensor:
        """See `SDE.b`."""
        return -torch.expm1(-self.integral(t))

    def squared_diffusion(self, t: torch.Tensor) -> torch.Tensor:
        """See `SDE.squared_diffusion`."""
        return -self.beta(t) * torch.expm1(-2 * self.integral(t))

    def a_of_sigma(self, sigma: torch.Tensor) -> torch.Tensor:
        """See `SDE.a_of_sigma`."""
        return 2 / (sigma + (sigma.square() + 4).sqrt())


@dataclass(frozen=True)
class VESDE(SDE):
    r"""The variance-exploding process, NCSN's limit: a = 1, \(b = \sigma_{min} (\sigma_{max} / \sigma_{min})^t\).

    Args:
        sigma_min: b at time 0.
        sigma_max: b at time 1.

    Raises:
        ValueError: they are not 0 < sigma_min < sigma_max.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        check_sigmas(self.sigma_max, self.sigma_min)

    def _log_ratio(self) -> torch.Tensor:
        return torch.tensor(self.sigma_max / self.sigma_min, dtype=torch.float64).log()

    def a(self, t: torch.Tensor) -> torch.Tensor:
        """See `SDE.a`."""
        return torch.ones_like(t)

    def b(self, t: torch.Tensor) -> torch.Tensor:
        """See `SDE.b`."""
        return self.sigma_min * torch.exp(t * self._log_ratio())

    def drift_rate(self, t: torch.Tensor) -> torch.Tensor:
        """See `SDE.drift_rate`."""
        return torch.zeros_like(t)

    def squared_diffusion(self, t: torch.Tensor) -> torch.Tensor:
        """See `SDE.squared_diffusion`."""
        return 2 * self._log_ratio() * self.b(t).square()

    def a_of_sigma(self, sigma: torch.Tensor) -> torch.Tensor:
        """See `SDE.a_of_sigma`."""
        return torch.ones_like(sigma)

    def time(self, sigma: torch.Tensor) -> torch.Tensor:
        """See `SDE.time`."""
        return (sigma / self.sigma_min).log() / self._log_ratio()


def make_sde(
    kind: SDEKind,
    beta_min: float = 0.1,
    beta_max: float = 20.0,
    sigma_min: float = 0.01,
    sigma_max: float = 50.0,
) -> SDE:
    """Makes the process of a name.

    Args:
        kind: `"vp"`, `"ve"` or `"subvp"`.
        beta_min: of `"vp"` and `"subvp"`.
        beta_max: of the same.
        sigma_min: of `"ve"`.
        sigma_max: of the same.

    Raises:
        ValueError: the name is unknown, or a number is outside its range.
    """
    if kind == "ve":
        return VESDE(sigma_min, sigma_max)
    kinds = {"vp": VPSDE, "subvp": SubVPSDE}
    if kind not in kinds:
        raise ValueError(f"`sde` must be 'vp', 've' or 'subvp', got {kind!r}.")
    return kinds[kind](beta_min, beta_max)
