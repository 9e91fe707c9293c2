r"""The probability flow \(dx/dt = f - g^2 s / 2\) of a process (2011.13456, section 4.3), with adaptive steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from scipy.integrate import RK45

from diffusers_ext.generation.score_field import ScoreField
from diffusers_ext.training.config import is_number, require

from .sde import SDE, SDEKind, make_sde

__all__ = ["rk45", "solve_probability_flow"]

FIRST_TIME = 1e-5  # as the authors': at 0 the score of data is not defined

# Dormand-Prince 5(4), and how its step follows the error: SciPy's.
STAGES, TIMES, WEIGHTS, ERROR = (torch.from_numpy(part).clone() for part in (RK45.A, RK45.C, RK45.B, RK45.E))
SAFETY, SMALLEST, LARGEST, EXPONENT = 0.9, 0.2, 10.0, -1 / 5

Slope = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _size(values: torch.Tensor) -> torch.Tensor:
    """Returns the root mean square of each row."""
    return values.square().mean(1).sqrt()


def _first_step(
    slope: Slope, x: torch.Tensor, f: torch.Tensor, start: float, end: float, rtol: float, atol: float
) -> torch.Tensor:
    """Returns the sizes of the first steps (Hairer, Norsett and Wanner, section II.4), as SciPy does."""
    rows = torch.arange(len(x), device=x.device)
    whole, sign = abs(end - start), 1.0 if end > start else -1.0
    scale = atol + x.abs() * rtol
    d0, d1 = _size(x / scale), _size(f / scale)
    h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1)
    h0 = h0.nan_to_num(1e-6).clamp(max=whole)  # where the slope is not finite, which the first step then refuses
    ahead = slope(torch.full_like(h0, start) + sign * h0, x + sign * h0[:, None] * f, rows)
    d2 = _size((ahead - f) / scale) / h0
    steepest = torch.maximum(d1, d2)
    h1 = torch.where(steepest <= 1e-15, (h0 * 1e-3).clamp(min=1e-6), (0.01 / steepest) ** (1 / 5))
    return torch.minimum(100 * h0, h1).clamp(max=whole)


def rk45(
    slope: Slope, x: torch.Tensor, start: float, end: float, rtol: float, atol: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Solves dx/dt = slope by Dormand-Prince 5(4), every row with steps of its own, as SciPy solves it alone.

    Args:
        slope: function of times `(rows,)`, states `(rows, size)` and the numbers of these rows.
        x: `(rows, size)` at the start.
        start: first time.
        end: last time, before or after it.
        rtol: tolerance relative to a state.
        atol: absolute tolerance.

    Returns:
        The states at the end, and how often the slope of each row was taken.

    Raises:
        RuntimeError: the tolerances ask for steps that are too small, or the slope is not finite.
    """
    sign = 1.0 if end > start else -1.0
    stages, weights, error = (part.to(x) for part in (STAGES, WEIGHTS, ERROR))
    t = torch.full((len(x),), start, dtype=x.dtype, device=x.device)
    f = slope(t, x, torch.arange(len(x), device=x.device))
    h = _first_step(slope, x, f, start, end, rtol, atol)
    calls = torch.full((len(x),), 2, dtype=torch.int64, device=x.device)
    rejected = torch.zeros_like(t, dtype=torch.bool)
    x = x.clone()
    while True:
        rows = ((end - t) * sign > 0).nonzero().flatten()
        if not len(rows):
            return x, calls
        now, before = t[rows], x[rows]
        least = 10 * torch.finfo(x.dtype).eps * now.abs().clamp(min=FIRST_TIME)
        if not bool((h[rows] >= least).all()):
            raise RuntimeError(
                f"the flow could not be followed beyond t = {now.tolist()}: `rtol` and `atol` are too small, or the "
                "network's output is not finite."
            )
        then = now + sign * h[rows]
        then = torch.where((then - end) * sign > 0, end, then)
        step = (then - now)[:, None]
        slopes = [f[rows]]
        for stage, share in zip(stages[1:], TIMES[1:].tolist(), strict=True):
            moved = before + step * sum(c * k for c, k in zip(stage.tolist(), slopes, strict=False) if c)
            slopes.append(slope(now + share * (then - now), moved, rows))
        after = before + step * sum(c * k for c, k in zip(weights.tolist(), slopes, strict=True) if c)
        last = slope(then, after, rows)
        calls[rows] += 6
        estimate = step * sum(c * k for c, k in zip(error.tolist(), [*slopes, last], strict=True) if c)
        ratio = _size(estimate / (atol + torch.maximum(before.abs(), after.abs()) * rtol))
        good = ratio < 1  # False also where it is not a number
        factor = torch.nan_to_num(SAFETY * ratio**EXPONENT, nan=SMALLEST, posinf=LARGEST)
        highest = torch.where(good, torch.where(rejected[rows], 1.0, LARGEST), 1.0)
        h[rows] = step[:, 0].abs() * torch.minimum(factor.clamp(min=SMALLEST), highest)
        rejected[rows] = ~good
        done = rows[good]
        t[done], x[done], f[done] = then[good], after[good], last[good]


@torch.no_grad()
def solve_probability_flow(
    model: Callable[..., Any],
    scheduler: Any,
    sample: torch.Tensor,
    direction: Literal["generate", "encode"] = "generate",
    sde: SDEKind | SDE | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    **model_kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Follows the probability flow of a process between t = 1 (noise) and t = 0.00001 (data) by RK45.

    Every sample has steps of its own, so that it does not depend on its batch. `probability_flow` makes the steps of
    Heun's method that it is told, in sigma.

    Args:
        model: the network: as for `ScoreField`.
        scheduler: its scheduler, by which the network's timesteps are known; a `ScoreSDEScheduler`, or another one.
        sample: `(batch, ...)` of the process: at t = 1 normal noise times its standard deviation, 1 or VE's largest
            sigma, for `"generate"`; images for `"encode"`.
        direction: `"generate"` or `"encode"`.
        sde: the process, or its name; VE then goes from 0.01 to the network's largest level. By default that of a
            `ScoreSDEScheduler`, else VP.
        rtol: tolerance of a step, relative to the sample.
        atol: its absolute tolerance.
        model_kwargs: further arguments of the model; see `ScoreField`.

    Returns:
        The samples at the other end, and the calls of the network `(batch,)` that each took.

    Raises:
        ValueError: an argument is wrong.
        RuntimeError: the flow could not be followed to these tolerances.

    Example:
        >>> import torch
        >>> from diffusers import DDPMScheduler
        >>> from diffusers_ext import sigma_of_timestep, solve_probability_flow
        >>> scheduler = DDPMScheduler()
        >>> def of_normal_data(x, t):  # of data of variance 0.25; a trained network otherwise
        ...     sigma = sigma_of_timestep(scheduler.alphas_cumprod, t)[:, None]
        ...     return sigma * (1 + sigma**2).sqrt() / (0.25 + sigma**2) * x
        >>> images, calls = solve_probability_flow(of_normal_data, scheduler, torch.tensor([[1.0], [-2.0]]))
        >>> images.flatten().round(decimals=2)
        tensor([ 0.5000, -1.0000])
    """
    if direction not in ("generate", "encode"):
        raise ValueError(f"`direction` must be 'generate' or 'encode', got {direction!r}.")
    for name, value in (("rtol", rtol), ("atol", atol)):
        require(is_number(value) and value > 0, name, value, "a number above 0")
    floats = isinstance(sample, torch.Tensor) and sample.is_floating_point() and sample.ndim >= 2 and len(sample) > 0
    found = tuple(sample.shape) if isinstance(sample, torch.Tensor) else type(sample).__name__
    good = floats and bool(torch.isfinite(sample).all())
    require(good, "sample", found, "finite floats of the shape (batch, ...)")
    field = ScoreField(model, scheduler, **model_kwargs)
    process: Any = getattr(scheduler, "sde", "vp") if sde is None else sde
    if not isinstance(process, SDE):
        process = make_sde(process, sigma_max=field.levels.sigma[-1].item())
    shape = sample.shape[1:]

    def slope(t: torch.Tensor, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        t = t.cpu().double()
        sigma, a = process.sigma(t), process.a(t)
        seen = (x / a.to(x)[:, None]).view(-1, *shape)
        scale = field.coefficients(sigma, seen, beyond=True)[0].to(x)
        eps = field.select(rows).eps(scale * seen, sigma, beyond=True).to(x).flatten(1)
        noise = (process.squared_diffusion(t) / (2 * process.b(t))).to(x)
        return process.drift_rate(t).to(x)[:, None] * x + noise[:, None] * eps

    ends = (1.0, FIRST_TIME) if direction == "generate" else (FIRST_TIME, 1.0)
    precision = torch.float32 if sample.device.type == "mps" else torch.float64
    found, calls = rk45(slope, sample.to(precision).flatten(1), *ends, rtol, atol)
    return found.view(sample.shape).to(sample.dtype), calls
