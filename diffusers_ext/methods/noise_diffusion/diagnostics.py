"""How far inverted states are from the noise that a sampler starts from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats

__all__ = ["NoiseDiagnostics", "noise_diagnostics", "plot_noise_diagnostics"]


@dataclass(frozen=True)
class NoiseDiagnostics:
    """Figures of every sample, `(batch,)` float64 tensors, and of all values together.

    Attributes:
        rms: root mean square.
        norm_ratio: norm over that of expected noise, `rms / expected_std`; 1 for noise.
        tail_2: share of values beyond 2 expected standard deviations; 0.0455 for noise.
        tail_3: the same beyond 3; 0.0027 for noise.
        excess_kurtosis: 0 for noise; heavy tails raise it.
        ks: Kolmogorov-Smirnov distance to the normal law of standard deviation `expected_std`.
        correlation: correlation of neighbouring values, the mean of both axes; 0 for noise. NaN where samples have
            fewer than two dimensions.
        pooled: the same figures of all samples' values together, by name.
        expected_std: standard deviation of the expected noise.
        inflation: factor by which the inversion alone inflates the standard deviation of normal data, or `None`.
        samples: number of each sample among all that there are; a pipeline looks at some of many.
    """

    rms: torch.Tensor
    norm_ratio: torch.Tensor
    tail_2: torch.Tensor
    tail_3: torch.Tensor
    excess_kurtosis: torch.Tensor
    ks: torch.Tensor
    correlation: torch.Tensor
    pooled: dict[str, float]
    expected_std: float
    inflation: float | None
    samples: tuple[int, ...]

    @property
    def own_norm_ratio(self) -> torch.Tensor:
        """`norm_ratio` without the inversion's share: what the image itself brings."""
        return self.norm_ratio / (1.0 if self.inflation is None else self.inflation)

    def __str__(self) -> str:
        lines = ["sample   rms  norm ratio  beyond 2  beyond 3  kurtosis     KS  correlation"]
        rows = [(str(s), {n: float(getattr(self, n)[i]) for n in self.pooled}) for i, s in enumerate(self.samples)]
        for title, row in [*rows, ("all", self.pooled)]:
            lines.append(
                f"{title:>6}{row['rms']:6.3f}{row['norm_ratio']:12.3f}{row['tail_2']:10.4f}{row['tail_3']:10.4f}"
                f"{row['excess_kurtosis']:10.3f}{row['ks']:7.4f}{row['correlation']:13.3f}"
            )
        if self.inflation is not None:
            lines.append(f"The inversion alone brings a norm ratio of {self.inflation:.3f} for normal data.")
        return "\n".join(lines)


@torch.no_grad()
def noise_diagnostics(
    latents: torch.Tensor, expected_std: float = 1.0, inflation: float | None = None
) -> NoiseDiagnostics:
    """Compares states with normal noise.

    Args:
        latents: `(batch, ...)`; the last two dimensions are taken as space.
        expected_std: standard deviation of the noise that they should be.
        inflation: what the inversion alone makes of normal data, `expected_inverted_std(levels)`, shown beside.

    Raises:
        ValueError: no samples, fewer than two values in each, values that are not finite, or `expected_std` <= 0.

    Example:
        >>> import torch
        >>> from diffusers_ext import noise_diagnostics
        >>> found = noise_diagnostics(1.1 * torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
        >>> round(found.pooled["norm_ratio"], 2), round(found.pooled["tail_2"], 2)
        (1.1, 0.07)
    """
    if latents.ndim < 2 or len(latents) == 0 or latents[0].numel() < 2:
        raise ValueError(
            "`latents` must have the shape (batch >= 1, ...) with at least two values each, got "
            f"{tuple(latents.shape)}."
        )
    if not bool(torch.isfinite(latents.sum())) and not bool(torch.isfinite(latents).all()):
        raise ValueError("`latents` must be finite, got NaN or infinity.")
    if not expected_std > 0:
        raise ValueError(f"`expected_std` must be a number > 0, got {expected_std!r}.")
    values = latents.detach().cpu()
    array = values.to(torch.promote_types(values.dtype, torch.float32)).numpy()
    size = max(1, 2**16 // array[0].size)  # what a processor's cache holds
    parts = [_figures(array[start : start + size], expected_std) for start in range(0, len(array), size)]
    columns = {name: torch.from_numpy(np.concatenate([part[name] for part in parts])) for name in parts[0]}
    together = array.reshape(1, -1, *(array.shape[-2:] if array.ndim > 2 else ()))
    pooled = {k: float(v[0]) for k, v in (parts[0] if len(array) == 1 else _figures(together, expected_std)).items()}
    rest: dict[str, Any] = {"expected_std": expected_std, "inflation": inflation}
    return NoiseDiagnostics(**columns, **rest, pooled=pooled, samples=tuple(range(len(array))))


# NumPy: its calls cost less than torch's, which counts for few small states, and it sorts many times faster.
def _figures(values: np.ndarray, expected_std: float) -> dict[str, np.ndarray]:
    """Returns the figures of each of `(batch, ...)`, `(batch,)` float64."""
    flat = values.reshape(len(values), -1)
    flat = flat / flat.dtype.type(expected_std) if expected_std != 1 else flat
    count = flat.shape[1]
    mean = flat.mean(1, keepdims=True)
    centred = flat - mean
    squares = np.square(centred)
    mean = mean[:, 0].astype(np.float64)
    total = _total(squares)
    variance = total / count
    fourth = np.square(squares, out=squares).mean(1).astype(np.float64)
    spread = variance > (4 * np.finfo(flat.dtype).eps * mean) ** 2  # else rounding alone
    rms = np.sqrt(variance + mean**2)
    ordered = np.sort(flat, axis=1)
    tails = [[count - np.searchsorted(row, x, "right") + np.searchsorted(row, -x) for row in ordered] for x in (2, 3)]
    return {
        "rms": rms * expected_std,
        "norm_ratio": rms,
        "tail_2": np.array(tails[0]) / count,
        "tail_3": np.array(tails[1]) / count,
        "excess_kurtosis": np.where(spread, fourth / np.where(spread, variance, 1) ** 2 - 3, 0.0),
        "ks": _ks_distance(ordered),
        "correlation": _neighbour_correlation(centred.reshape(values.shape), total, spread),
    }


def _ks_distance(ordered: np.ndarray) -> np.ndarray:
    # The distance alone: neighbouring values depend on each other, so a p-value would mean nothing.
    count = ordered.shape[1]
    # torch has the fast error function.
    above = torch.erfc(torch.from_numpy(ordered * ordered.dtype.type(-math.sqrt(0.5)))).numpy()
    above *= 0.5
    above -= np.arange(1, count + 1, dtype=ordered.dtype) / count
    return np.maximum(above.max(1).astype(np.float64) + 1 / count, -above.min(1).astype(np.float64))


def _neighbour_correlation(centred: np.ndarray, squares: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """Returns the mean over both axes; `squares` are the sums of squares of `centred`, whose mean is 0."""
    found = []
    for axis in (-1, -2):
        if centred.ndim < 3 or centred.shape[axis] < 2:
            continue
        cuts = (slice(0, -1), slice(1, None), slice(0, 1), slice(-1, None))
        a, b, first, last = (centred[(..., cut) + (slice(None),) * (-1 - axis)] for cut in cuts)
        count = a[0].size
        # Either neighbour is all but one line: its sums are those of all without the line's.
        mean_a, mean_b = (-_total(line) / count for line in (last, first))
        variance_a, variance_b = (
            (squares - _total(line * line)) / count - mean**2 for line, mean in ((last, mean_a), (first, mean_b))
        )
        scale = variance_a * variance_b
        there = spread & (scale > 0)
        found.append(
            np.where(there, (_total(a * b) / count - mean_a * mean_b) / np.sqrt(np.where(there, scale, 1)), 0.0)
        )
    return np.mean(found, axis=0) if found else np.full(len(centred), np.nan)


def _total(values: np.ndarray) -> np.ndarray:
    return values.reshape(len(values), -1).sum(1).astype(np.float64)


def plot_noise_diagnostics(
    latents: dict[str, torch.Tensor], expected_std: float = 1.0, inflation: float | None = None
) -> Any:
    """Draws the histograms of sets of states over the expected normal law, and their figures beside them.

    Args:
        latents: title -> `(batch, ...)` states.
        expected_std: as in `noise_diagnostics`.
        inflation: as in `noise_diagnostics`; the law of that standard deviation is drawn too.

    Returns:
        A `matplotlib.figure.Figure`, to be saved by `.savefig(path)`.

    Raises:
        ValueError: as in `noise_diagnostics`, or `latents` is empty.
        ImportError: matplotlib is not installed.
    """
    if not latents:
        raise ValueError("`latents` must hold at least one set of states, got none.")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the plot needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(10, 1.2 + 0.45 * len(latents) + 2.2), constrained_layout=True)
    top, bottom = figure.subplots(2, 1, height_ratios=(3, 0.6 + 0.5 * len(latents)))
    axis = np.linspace(-5, 5, 401)
    top.fill_between(axis, stats.norm.pdf(axis), color="0.85", label="expected noise")
    if inflation is not None:
        top.plot(axis, stats.norm.pdf(axis, scale=inflation), "k:", lw=1, label="normal data, inverted")
    rows = {}
    for title, states in latents.items():
        rows[title] = noise_diagnostics(states, expected_std).pooled
        values = (states.detach().double().cpu() / expected_std).flatten().clamp(-5, 5).numpy()
        top.hist(values, np.linspace(-5, 5, 101), density=True, histtype="step", label=title)
    top.set(xlabel="value / expected standard deviation", yticks=[], xlim=(-5, 5))
    top.legend(fontsize=8)
    names = list(next(iter(rows.values())))
    cells = [[f"{row[name]:.3f}" for name in names] for row in rows.values()]
    titles = [name.replace("_", " ").replace("tail ", "beyond ") for name in names]
    bottom.table(cells, rowLabels=list(rows), colLabels=titles, loc="center")
    bottom.axis("off")
    return figure
