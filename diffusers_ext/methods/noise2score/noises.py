r"""Families of noise: how an image gets it, where a score is asked, and the formula that takes it away."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from diffusers.utils.torch_utils import randn_tensor

__all__ = [
    "FAMILIES",
    "AdditiveGaussianNoise",
    "ExponentialFamilyNoise",
    "ExponentialNoise",
    "GammaNoise",
    "NoiseModel",
    "PoissonGaussianNoise",
    "PoissonNoise",
]

Generator = torch.Generator | list[torch.Generator] | None
Function = Callable[[torch.Tensor], torch.Tensor]

FLOOR = 1e-3  # stands for a value 0 that has no logarithm


def _require(condition: bool, name: str, value: object, accepted: str) -> None:
    if not condition:
        raise ValueError(f"`{name}` must be {accepted}, got {value!r}.")


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _drawn(
    x: torch.Tensor, generator: Generator, draw: Callable[[torch.Tensor, torch.Generator | None], torch.Tensor]
) -> torch.Tensor:
    """Draws on the generator's device, image by image from a list of generators, as Diffusers does for normals."""
    if isinstance(generator, list):
        _require(len(generator) == len(x), "generator", len(generator), f"a list of {len(x)}, one an image")
        return torch.cat([_drawn(row[None], g, draw) for row, g in zip(x, generator, strict=True)])
    device = x.device if generator is None else generator.device
    return draw(x.to(device), generator).to(x.device)


def _positive(denominator: torch.Tensor, least: float) -> torch.Tensor:
    """Puts `least` where a denominator is not positive, which no score of such noise gives, and says how often."""
    wrong = ~(denominator > 0)
    if bool(wrong.any()):
        warnings.warn(
            f"{int(wrong.sum())} of {wrong.numel()} denominators were not positive and are clamped: the score is no "
            "score of this noise there.",
            stacklevel=4,
        )
        return denominator.masked_fill(wrong, least)
    return denominator


class NoiseModel:
    """A family of noise with its parameter.

    Attributes:
        valid_range: least and greatest value that a noisy image can have.
    """

    valid_range: ClassVar[tuple[float, float]] = (-math.inf, math.inf)

    def corrupt(self, x: torch.Tensor, generator: Generator = None) -> torch.Tensor:
        """Returns a noisy copy of clean values.

        Args:
            x: `(batch, ...)` clean values; not negative where `valid_range` begins at 0.
            generator: source of the noise, or one an image.

        Raises:
            ValueError: x is outside its range or not finite.
        """
        self.check(x, "x")
        precise = x if x.dtype in (torch.float32, torch.float64) else x.float()
        return self._corrupt(precise, generator).to(x.dtype)

    def score_input(self, y: torch.Tensor) -> torch.Tensor:
        """Brings noisy values to the units in which their score is learned and asked."""
        return y

    def check(self, y: torch.Tensor, name: str) -> None:
        """Raises a `ValueError` where values are not finite or outside `valid_range`."""
        low, high = (float(v) for v in y.aminmax()) if y.numel() else (0.0, 0.0)
        _require(math.isfinite(low) and math.isfinite(high), name, [low, high], "finite")
        least, noise = self.valid_range[0], type(self).__name__
        if low < least:
            raise ValueError(f"`{name}` must not be negative for {noise}, got values from {low:.4g} to {high:.4g}.")

    def denoise(self, y: torch.Tensor, score: Function, smoothing: float) -> torch.Tensor:
        """The formula of `posterior_mean`, whose arguments are checked."""
        raise NotImplementedError

    def _corrupt(self, x: torch.Tensor, generator: Generator) -> torch.Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class AdditiveGaussianNoise(NoiseModel):
    r"""\(y = x + \sigma n\) with normal n; \(E[x|y] = y + \sigma^2 l'(y)\), exactly.

    A score R that was learned with noise of deviation s on top is that of \(\sigma^2 + s^2\), so that
    \(x = y + (\sigma^2 + s^2) R(y)\).

    Args:
        sigma: standard deviation in the units of y, such as 25 / 255 for images in [0, 1].
    """

    sigma: float

    def __post_init__(self) -> None:
        _require(_finite(self.sigma) and self.sigma > 0, "sigma", self.sigma, "a finite number > 0")

    def _corrupt(self, x: torch.Tensor, generator: Generator) -> torch.Tensor:
        return x + self.sigma * randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)

    def denoise(self, y: torch.Tensor, score: Function, smoothing: float) -> torch.Tensor:
        """The formula of `posterior_mean`, whose arguments are checked."""
        return y + (self.sigma**2 + smoothing**2) * score(y)


@dataclass(frozen=True)
class PoissonNoise(NoiseModel):
    r"""\(y = z c\) with counts c ~ Poisson(x / z); the score is asked in counts.

    `"midpoint"` is Robbins' exact \(E[x|c] = z (c + 1)\, p(c+1) / p(c)\) with the ratio taken as
    \(\exp l'(c + \tfrac12)\); `"mode"` is the paper's \(x = z (c + \tfrac12) \exp l'(c)\), which is about
    \(\tfrac12 z\) times a factor below 1 too low, but can have the better PSNR with a score that was learned.

    Args:
        scale: z, the value of one count (the papers' zeta); 1 / z is the number of counts that a value 1 has.
        estimator: `"midpoint"` or `"mode"`.
    """

    scale: float
    estimator: Literal["midpoint", "mode"] = "midpoint"
    valid_range: ClassVar[tuple[float, float]] = (0.0, math.inf)

    def __post_init__(self) -> None:
        _require(_finite(self.scale) and self.scale > 0, "scale", self.scale, "a finite number > 0")
        _require(self.estimator in ("midpoint", "mode"), "estimator", self.estimator, "'midpoint' or 'mode'")

    def _corrupt(self, x: torch.Tensor, generator: Generator) -> torch.Tensor:
        return self.scale * _drawn(x / self.scale, generator, lambda rate, g: torch.poisson(rate, generator=g))

    def score_input(self, y: torch.Tensor) -> torch.Tensor:
        """Returns counts."""
        return y / self.scale

    def denoise(self, y: torch.Tensor, score: Function, smoothing: float) -> torch.Tensor:
        """The formula of `posterior_mean`, whose arguments are checked."""
        counts = self.score_input(y)
        if self.estimator == "mode":
            return self.scale * (counts + 0.5) * score(counts).exp()
        return self.scale * (counts + 1) * score(counts + 0.5).exp()


@dataclass(frozen=True)
class PoissonGaussianNoise(NoiseModel):
    r"""\(y = z c + s n\): Poisson counts and the read noise of a camera; y may be negative, the score is asked in y.

    \(E[x|y] = (y + z + s^2 l'(y + z))\, p(y+z) / p(y)\), exactly, with the ratio taken as
    \(\exp(z\, l'(y + z/2))\): two calls of the score. The error is at most 0.026 counts at s = z and 0.005 from
    s = 2 z on; below s = z the comb of counts shows, up to 0.65 counts at s = z / 2. Noise that the score's training
    added is read noise too.

    Args:
        scale: z, the value of one count.
        read_std: s, the standard deviation of the read noise, in the units of y.
    """

    scale: float
    read_std: float

    def __post_init__(self) -> None:
        for name in ("scale", "read_std"):
            value = getattr(self, name)
            _require(_finite(value) and value > 0, name, value, "a finite number > 0")

    def check(self, y: torch.Tensor, name: str) -> None:
        """Raises a `ValueError` where values are not finite, or clean ones negative."""
        super().check(y, name)
        if name == "x":
            PoissonNoise(self.scale).check(y, name)

    def _corrupt(self, x: torch.Tensor, generator: Generator) -> torch.Tensor:
        counts = PoissonNoise(self.scale).corrupt(x, generator)
        return AdditiveGaussianNoise(self.read_std).corrupt(counts, generator)

    def denoise(self, y: torch.Tensor, score: Function, smoothing: float) -> torch.Tensor:
        """The formula of `posterior_mean`, whose arguments are checked."""
        variance = self.read_std**2 + smoothing**2
        ratio = (self.scale * score(y + self.scale / 2)).exp()
        return (y + self.scale + variance * score(y + self.scale)) * ratio


class _Multiplicative(NoiseModel):
    """What Gamma and exponential noise share: y = x g with g ~ Gamma(k, scale 1/k)."""

    valid_range: ClassVar[tuple[float, float]] = (0.0, math.inf)
    domain: Literal["log", "linear"]

    @property
    def k(self) -> float:
        """The shape."""
        raise NotImplementedError

    def score_input(self, y: torch.Tensor) -> torch.Tensor:
        """Returns log y in the log domain, where 0 is put to 0.001 with a warning; y itself in the linear one."""
        return self._floored(y).log() if self.domain == "log" else y

    def _floored(self, y: torch.Tensor) -> torch.Tensor:
        zero = y <= 0
        if bool(zero.any()):
            warnings.warn(
                f"{int(zero.sum())} of {zero.numel()} values are 0, which {type(self).__name__} does not give; they "
                f"are taken as {FLOOR}.",
                stacklevel=4,
            )
            return y.masked_fill(zero, FLOOR)
        return y

    def _corrupt(self, x: torch.Tensor, generator: Generator) -> torch.Tensor:
        shape = torch.full_like(x, self.k)
        return x * _drawn(shape, generator, lambda k, g: torch._standard_gamma(k, generator=g)) / self.k

    def denoise(self, y: torch.Tensor, score: Function, smoothing: float) -> torch.Tensor:
        """The formula of `posterior_mean`, whose arguments are checked."""
        k = self.k
        y = self._floored(y)
        # The noise of log y has the variance 1/k, to which training has added smoothing^2.
        pull = (1 + k * smoothing**2) * score(y.log()) if self.domain == "log" else 1 + y * score(y)
        return k * y / _positive(k - pull, FLOOR * k)


@dataclass(frozen=True)
class GammaNoise(_Multiplicative):
    r"""\(y = x g\) with g ~ Gamma(k, scale 1/k), the speckle of k looks.

    In the log domain, with \(v = \log y\), \(x = k y / (k - l'_v(v))\); in the linear one
    \(x = k y / ((k - 1) - y\, l'(y))\). They are the same, \(1 / E[1/x|y]\), but the noise of log y is about
    \(1/\sqrt k\) everywhere, so that one smoothing fits dark and bright pixels.

    Args:
        shape: k > 1; the noise's relative deviation is \(1/\sqrt k\).
        domain: where the score is learned and asked, `"log"` or `"linear"`.
    """

    shape: float
    domain: Literal["log", "linear"] = "log"

    def __post_init__(self) -> None:
        _require(_finite(self.shape) and self.shape > 1, "shape", self.shape, "a finite number > 1")
        _require(self.domain in ("log", "linear"), "domain", self.domain, "'log' or 'linear'")

    @property
    def k(self) -> float:
        """The shape."""
        return self.shape


@dataclass(frozen=True)
class ExponentialNoise(_Multiplicative):
    r"""\(y = x g\) with g ~ Exp(1), the speckle of one look: \(x = -1 / l'(y)\).

    Args:
        domain: where the score is learned and asked, `"linear"` or `"log"`, where \(x = y / (1 - l'_v(\log y))\).
    """

    domain: Literal["log", "linear"] = "linear"

    def __post_init__(self) -> None:
        _require(self.domain in ("log", "linear"), "domain", self.domain, "'log' or 'linear'")

    @property
    def k(self) -> float:
        """The shape, 1."""
        return 1.0

    def denoise(self, y: torch.Tensor, score: Function, smoothing: float) -> torch.Tensor:
        """The formula of `posterior_mean`, whose arguments are checked."""
        if self.domain == "log":
            return super().denoise(y, score, smoothing)
        return 1 / _positive(-score(y), FLOOR)


@dataclass(frozen=True)
class ExponentialFamilyNoise(NoiseModel):
    r"""Any noise \(p(y|\eta) = \exp(\eta T(y) - \varphi(\eta))\,b(y)\): \(E[\eta|y] = (l' - (\log b)') / T'\) at y.

    Args:
        log_base_grad: \((\log b)'\), a function of y.
        natural_to_mean: brings the natural parameter \(\eta\) to the clean value x.
        statistic_grad: \(T'\), a function of y; by default \(T(y) = y\).
        sampler: draws noisy values from clean ones, (x, generator) -> y; only `corrupt` needs it.

    Example:
        >>> import torch
        >>> from diffusers_ext import ExponentialFamilyNoise, posterior_mean
        >>> gaussian = ExponentialFamilyNoise(lambda y: -y / 0.25, lambda eta: 0.25 * eta)  # of variance 0.25
        >>> posterior_mean(torch.tensor([2.5]), lambda y: -y / 1.25, gaussian)
        tensor([2.])
    """

    log_base_grad: Function
    natural_to_mean: Function
    statistic_grad: Function | None = None
    sampler: Callable[[torch.Tensor, Generator], torch.Tensor] | None = None

    def __post_init__(self) -> None:
        for name in ("log_base_grad", "natural_to_mean"):
            _require(callable(getattr(self, name)), name, getattr(self, name), "a function of a tensor")

    def _corrupt(self, x: torch.Tensor, generator: Generator) -> torch.Tensor:
        if self.sampler is None:
            raise ValueError("`sampler` must be given to `ExponentialFamilyNoise` for `corrupt`, got None.")
        return self.sampler(x, generator)

    def denoise(self, y: torch.Tensor, score: Function, smoothing: float) -> torch.Tensor:
        """The formula of `posterior_mean`, whose arguments are checked."""
        eta = score(y) - self.log_base_grad(y)
        return self.natural_to_mean(eta if self.statistic_grad is None else eta / self.statistic_grad(y))


# The families that have names in the pipeline and in training.
FAMILIES: dict[str, type[NoiseModel]] = {
    "gaussian": AdditiveGaussianNoise,
    "poisson": PoissonNoise,
    "poisson_gaussian": PoissonGaussianNoise,
    "gamma": GammaNoise,
    "exponential": ExponentialNoise,
}
