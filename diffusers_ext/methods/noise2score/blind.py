"""Finding the noise's parameter from one noisy image: the one whose result has the least penalty (section 3.3)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from scipy.optimize import minimize_scalar

from .noises import AdditiveGaussianNoise, GammaNoise, NoiseModel, PoissonNoise

__all__ = ["BLIND_FAMILIES", "NoiseEstimate", "estimate_noise_parameter", "penalty_of"]

# Family -> how many values are tried before the best is refined; the numbers of the authors' code.
BLIND_FAMILIES = {"gaussian": 50, "poisson": 100, "gamma": 80}

Penalty = Callable[[torch.Tensor, torch.Tensor], Any]


@dataclass(frozen=True)
class NoiseEstimate:
    """What `estimate_noise_parameter` found.

    Attributes:
        parameter: of the least penalty.
        parameters: the values that were tried, rising.
        penalties: their penalties. A minimum at an end, or a flat curve, says that the estimate is not to be trusted.
    """

    parameter: float
    parameters: list[float]
    penalties: list[float]


def total_variation(x: torch.Tensor) -> torch.Tensor:
    """Returns the mean of absolute differences of neighbours, over rows plus over columns."""
    across, down = x.diff(dim=-1), x.diff(dim=-2)
    return sum((d.square_().add_(1e-12).sqrt_().mean() for d in (across, down)), torch.zeros((), device=x.device))


def penalty_of(family: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Returns the penalty of a denoised image in the paper: total variation, with a term of the noise beside it.

    Args:
        family: `"gaussian"`, `"poisson"` or `"gamma"`.
        x: denoised values.
        y: noisy ones.
    """
    if family == "gaussian":
        return total_variation(x)
    inside = x > 0
    count = inside.sum().clamp_min(1)
    safe = torch.where(inside, x, 1.0)
    if family == "poisson":
        fit = torch.where(inside, safe - y * safe.log(), 0.0)
        return 0.1 * total_variation(x.clamp_min(0)) + fit.sum() / count
    ratio = y / safe
    fit = torch.where(inside, safe.log() + ratio + ratio.square(), 0.0)
    return total_variation(x) + fit.sum() / count


@torch.no_grad()
def estimate_noise_parameter(
    y: torch.Tensor,
    score: Callable[[torch.Tensor], torch.Tensor],
    family: str,
    blind_range: tuple[float, float],
    smoothing: float = 0.0,
    penalty: Literal["tv"] | Penalty = "tv",
    **options: Any,
) -> NoiseEstimate:
    """Estimates sigma, z or k of one image by the penalty of what comes out.

    For Gaussian and log-Gamma noise the score is called once, for Poisson noise once for each value that is tried.
    Because the noise that training added is part of the formula, what is found is the parameter of the noise alone.

    Args:
        y: `(1, channels, height, width)`, one noisy image.
        score: see `posterior_mean`.
        family: `"gaussian"`, `"poisson"` or `"gamma"`.
        blind_range: least and greatest parameter. The authors search sigma in 6/255 to 55/255, z in 0.005 to 0.1 and k
            in 40 to 120.
        smoothing: see `posterior_mean`.
        penalty: `"tv"` for the paper's, or a function (x, y) -> number of the denoised and the noisy image.
        options: further arguments of the noise, such as `domain` or `estimator`.

    Returns:
        The estimate with the curve that it is the least of.

    Raises:
        ValueError: an argument is wrong.
    """
    make = noise_maker(family, **options)
    low, high = check_range(blind_range)
    make(low).check(y, "y")
    y = y if y.dtype in (torch.float32, torch.float64) else y.float()
    if family != "poisson":  # there the parameter is not part of the question
        first = make(low)
        y = first._floored(y) if isinstance(first, GammaNoise) else y
        score = _constant(score(first.score_input(y)))

    def measure(parameter: float) -> float:
        x = make(float(parameter)).denoise(y, score, smoothing)
        return float(penalty_of(family, x, y) if penalty == "tv" else penalty(x, y))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of candidates; the final result has its own
        parameters = np.linspace(low, high, BLIND_FAMILIES[family])
        penalties = np.array([measure(p) for p in parameters])
        best = int(np.nanargmin(penalties))
        around = parameters[max(best - 1, 0)], parameters[min(best + 1, len(parameters) - 1)]
        found: Any = minimize_scalar(measure, bounds=around, method="bounded", options={"xatol": 1e-3 * (high - low)})
    parameter = float(found.x) if found.fun < penalties[best] else float(parameters[best])
    return NoiseEstimate(parameter, parameters.tolist(), penalties.tolist())


def _constant(value: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda _: value


def noise_maker(family: str, **options: Any) -> Callable[[float], NoiseModel]:
    """Returns how to make the noise of a family from its one parameter.

    Raises:
        ValueError: no blind search is known for this family.
    """
    kinds: dict[str, tuple[Callable[..., NoiseModel], str]] = {
        "gaussian": (AdditiveGaussianNoise, ""),
        "poisson": (PoissonNoise, "estimator"),
        "gamma": (GammaNoise, "domain"),
    }
    if family not in kinds:
        raise ValueError(f"`noise` must be one of {list(kinds)} without its parameter, got {family!r}.")
    kind, taken = kinds[family]
    own = {name: value for name, value in options.items() if name == taken}
    return lambda parameter: kind(parameter, **own)


def check_range(blind_range: Any) -> tuple[float, float]:
    """Returns the ends of a search.

    Raises:
        ValueError: they are not two rising numbers above 0.
    """
    ends = blind_range if isinstance(blind_range, tuple | list) else ()
    if len(ends) != 2 or not all(isinstance(v, int | float) and math.isfinite(v) for v in ends):
        raise ValueError(f"`blind_range` must be two finite numbers, got {blind_range!r}.")
    if not 0 < ends[0] < ends[1]:
        raise ValueError(f"`blind_range` must be two rising numbers > 0, got {blind_range!r}.")
    return float(ends[0]), float(ends[1])
