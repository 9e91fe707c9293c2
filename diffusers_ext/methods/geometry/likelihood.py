r"""Log-likelihood by the probability flow.

\(\log p_{\sigma_{\min}}(x) = \log N(y_T; 0, \sigma_T^2 + 1) + \int_{\sigma_{\min}}^{\sigma_T}
\mathrm{tr}\,\partial E/\partial y \; d\sigma\) along \(dy/d\sigma = E\) from \(y = x\) at \(\sigma_{\min}\)
(Song et al., arXiv 2011.13456, section 4.3, in the variable in which the flow is smooth).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from scipy.integrate import solve_ivp

from diffusers_ext.generation.score_field import ScoreField
from diffusers_ext.generation.score_levels import as_levels
from diffusers_ext.training.config import is_number, require

from .draws import check_images, check_tolerance, image_seeds, rows_of
from .flow import at_y
from .jacobian import vector_jacobian

__all__ = ["LogLikelihood", "log_likelihood"]


@dataclass(frozen=True)
class LogLikelihood:
    """Log-likelihood of every image, `(images,)` float64 tensors.

    Attributes:
        nats: log-density at noise `sigma_min`, in the units of the network's images.
        standard_error: of nats, from the probes alone; 0 with exact traces.
        bits_per_dim: -log2 of the probability of 8-bit pixels over the number of values. Images in [-1, 1] have
            pixels 2/256 wide, hence the "+7" of the literature.
        sigma_min: the noise level at which the density is taken. On data of k dimensions it changes with
            -(D - k) log sigma_min: compare at equal sigma_min only.
        calls: calls of the network, each with a backward pass.
    """

    nats: torch.Tensor
    standard_error: torch.Tensor
    bits_per_dim: torch.Tensor
    sigma_min: float
    calls: torch.Tensor


class _Traces:
    """E and the trace of its derivative by y, at one sigma, of one image."""

    def __init__(self, field: ScoreField, signs: torch.Tensor, exact: bool, batch_size: int) -> None:
        self.field, self.signs, self.batch_size = field, signs, batch_size
        self.scale = 1.0 if not exact else float(len(signs))  # unit vectors' values add up to the trace
        self.calls = 0
        self.seen: dict[float, torch.Tensor] = {}

    def __call__(self, y: torch.Tensor, sigma: float) -> tuple[torch.Tensor, float]:
        a = self.field.coefficients(sigma, y)[0]
        values = []
        seen = y
        for signs in self.signs.split(self.batch_size):
            at = (a * y).expand_as(signs)
            rows, product = vector_jacobian(self.field, at, sigma, signs)
            seen = rows[0]
            values.append((product * signs).flatten(1).sum(1).double().cpu())
        self.calls += 1
        self.seen[sigma] = self.scale * float(a) * torch.cat(values)
        return seen, self.seen[sigma].mean().item()

    def probe_error(self) -> float:
        """Returns the standard error of the integral over sigma that the probes bring."""
        if self.scale != 1.0 or len(self.signs) < 2:
            return 0.0
        sigmas = sorted(self.seen)
        each = torch.trapezoid(torch.stack([self.seen[s] for s in sigmas]), torch.tensor(sigmas).double(), dim=0)
        return (each.std() / len(each) ** 0.5).item()


def _rk45(traces: _Traces, y: torch.Tensor, low: float, high: float, tol: float) -> tuple[torch.Tensor, float]:
    r"""Solves for \(z = y \cos\varphi\) over the angle \(\varphi = \arctan\sigma\), and for its density.

    z keeps the scale of the data up to noise, whatever the schedule, and its slope is the v-prediction, so that steps
    may be long at both ends: \(dz/d\varphi = (E - z \sin\varphi) / \cos\varphi\).
    """
    shape, dim = y.shape, y.numel()

    def slope(angle: float, state: np.ndarray) -> np.ndarray:
        if not math.isfinite(angle):  # SciPy's first step, where the field is not finite: it would never end
            raise OverflowError
        cosine, sine = math.cos(angle), math.sin(angle)
        z = state[:-1]
        at = torch.from_numpy(z / cosine).to(y).view(shape)
        seen, trace = traces(at, min(max(math.tan(angle), low), high))
        eps = seen.double().cpu().numpy().ravel()
        return np.append((eps - z * sine) / cosine, trace / cosine**2 - dim * sine / cosine)

    ends = math.atan(low), math.atan(high)
    start = np.append(y.double().cpu().numpy().ravel() * math.cos(ends[0]), 0.0)
    try:
        result: Any = solve_ivp(slope, ends, start, method="RK45", rtol=tol, atol=tol)
    except OverflowError:
        result = None
    if result is None or not result.success:
        return torch.full_like(y, math.nan), math.nan
    squeezed = dim * math.log(math.cos(ends[0]) / math.cos(ends[1]))  # density of y against that of z
    end = torch.from_numpy(result.y[:-1, -1] / math.cos(ends[1])).to(y).view(shape)
    return end, float(result.y[-1, -1]) + squeezed


def _heun(traces: _Traces, y: torch.Tensor, sigmas: list[float]) -> tuple[torch.Tensor, float]:
    integral, (seen, trace) = 0.0, traces(y, sigmas[0])
    for now, then in zip(sigmas, sigmas[1:], strict=False):
        step = then - now
        traces.calls += 1
        with torch.no_grad():
            ahead = at_y(traces.field, (y + step * seen)[None], then)[0]
        y = y + step / 2 * (seen + ahead)
        before = now * trace
        seen, trace = traces(y, then)
        integral += math.log(then / now) / 2 * (before + then * trace)
    return y, integral


def log_likelihood(
    field: ScoreField,
    x: torch.Tensor,
    sigma_min: float | None = None,
    method: Literal["rk45", "heun"] = "rk45",
    tol: float = 1e-4,
    num_steps: int = 100,
    num_probes: int = 8,
    trace: Literal["hutchinson", "exact"] = "hutchinson",
    batch_size: int = 32,
    generator: torch.Generator | None = None,
    bin_width: float = 2 / 256,
) -> LogLikelihood:
    r"""Computes log-likelihoods by the probability flow.

    `"rk45"` is Dormand-Prince 5(4) (SciPy's) in the angle arctan(sigma), which controls sample and log p together;
    the network must take fractional timesteps. `"heun"` uses the scheduler's own levels nearest to log-spaced sigmas,
    steps in sigma and sums the trace in log sigma; it needs three times the calls, or more.

    Args:
        field: the denoiser.
        x: `(images, ...)` samples at noise `sigma_min`: clean images, as a rule.
        sigma_min: lowest level, by default the scheduler's.
        method: `"rk45"` or `"heun"`.
        tol: relative and absolute tolerance of `"rk45"`.
        num_steps: steps of `"heun"`, before equal levels are taken together.
        num_probes: Rademacher probes of the trace, the same at all levels.
        trace: `"hutchinson"`, or `"exact"` with D products in place of probes.
        batch_size: rows in one call.
        generator: source of the probes.
        bin_width: of a pixel, for `bits_per_dim`.

    Raises:
        ValueError: an argument is wrong.

    Warns:
        UserWarning: an image is so far off that its flow overflows; its nats are -inf.
    """
    x = check_images(field, x, batch_size, num_probes=(num_probes, 2), num_steps=(num_steps, 2))
    if method not in ("rk45", "heun"):
        raise ValueError(f"`method` must be 'rk45' or 'heun', got {method!r}.")
    if trace not in ("hutchinson", "exact"):
        raise ValueError(f"`trace` must be 'hutchinson' or 'exact', got {trace!r}.")
    check_tolerance(tol)
    require(is_number(bin_width) and bin_width > 0, "bin_width", bin_width, "a number > 0")
    levels = field.levels.sigma
    low, high = float(levels[0]), float(levels[-1])
    if sigma_min is not None:
        found = as_levels(sigma_min, "sigma_min")
        inside = bool(((found >= low * (1 - 1e-6)) & (found <= high * (1 + 1e-6))).all()) and found.numel() == 1
        require(inside, "sigma_min", sigma_min, f"one number within the scheduler's levels, {low:.4g} to {high:.4g}")
        low = float(found)
    dim = x[0].numel()
    own = [low, *levels[levels > low * (1 + 1e-9)].tolist()]
    wanted = torch.logspace(math.log10(low), math.log10(high), num_steps + 1, dtype=torch.float64)
    nearest = (torch.tensor(own, dtype=torch.float64)[:, None] - wanted).abs().argmin(0).unique()
    results, errors, calls = [], [], []
    for image, seed in enumerate(image_seeds(len(x), generator)):
        one = x[image : image + 1]
        if trace == "exact":
            signs = torch.eye(dim, dtype=torch.float64).to(one).view(dim, *x.shape[1:])
        else:
            signs = torch.cat([drawn for _, drawn in rows_of(one, [seed], num_probes, num_probes, rademacher=True)])
        traces = _Traces(field.select(torch.tensor([image])), signs, trace == "exact", batch_size)
        y = x[image].to(signs.dtype)
        with np.errstate(all="ignore"):
            y, integral = (
                _rk45(traces, y, low, high, tol)
                if method == "rk45"
                else _heun(traces, y, [own[i] for i in nearest.tolist()])
            )
        variance = high**2 + 1
        prior = -0.5 * (y.double().square().sum().item() / variance + dim * math.log(2 * math.pi * variance))
        results.append(prior + integral)
        errors.append(traces.probe_error())
        calls.append(traces.calls)
    nats = torch.tensor(results, dtype=torch.float64)
    if not bool(torch.isfinite(nats).all()):
        bad = (~torch.isfinite(nats)).nonzero().flatten().tolist()
        warnings.warn(f"the probability flow overflows for images {bad}: their log-likelihood is -inf.", stacklevel=2)
        nats = torch.where(torch.isfinite(nats), nats, -math.inf)
    bits = -nats / (dim * math.log(2)) - math.log2(bin_width)
    return LogLikelihood(nats, torch.tensor(errors).double(), bits, low, torch.tensor(calls))
