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
    if not bool(torch.isfinite(latents).all()):
        raise ValueError("`latents` must be finite, got NaN or infinity.")
    if not expected_std > 0:
        raise ValueError(f"`expected_std` must be a number > 0, got {expected_std!r}.")
    values = latents.detach().cpu()
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    parts = [_figures(part, expected_std) for part in values.split(64)]
    columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    together = values.reshape(1, -1, *values.shape[-2:]) if values.ndim > 2 else values.reshape(1, -1)
    pooled = {name: float(value) for name, value in _figures(together, expected_std).items()}
    samples = tuple(range(len(latents)))
    return NoiseDiagnostics(**columns, pooled=pooled, expected_std=expected_std, inflation=inflation, samples=samples)  # pyright: ignore[reportArgumentType]


def _figures(values: torch.Tensor, expected_std: float) -> dict[str, torch.Tensor]:
    """Returns the figures of each of `(batch, ...)`, `(batch,)` float64."""
    scaled = values / expected_std if expected_std != 1 else values
    flat = scaled.flatten(1)
    count = flat.shape[1]
    mean = flat.mean(1, keepdim=True)
    centred = flat - mean
    squares = centred.square()
    total, fourth = squares.sum(1).double(), torch.linalg.vecdot(squares, squares).double()
    mean = mean[:, 0].double()
    spread = total / count > (4 * torch.finfo(flat.dtype).eps * mean).square()  # else rounding alone
    rms = (total / count + mean.square()).sqrt()
    # NumPy sorts many times faster than torch on a CPU.
    ordered = torch.from_numpy(np.sort(flat.numpy(), axis=1))
    tails = [_beyond(ordered, limit) for limit in (2.0, 3.0)]
    return {
        "rms": rms * expected_std,
        "norm_ratio": rms,
        "tail_2": tails[0],
        "tail_3": tails[1],
        "excess_kurtosis": torch.where(spread, fourth * count / total.square() - 3, 0.0),
        "ks": _ks_distance(ordered),
        "correlation": _neighbour_correlation(centred.reshape(values.shape), spread),
    }


def _beyond(ordered: torch.Tensor, limit: float) -> torch.Tensor:
    """Returns the share of sorted values of a larger magnitude."""
    edges = torch.tensor([[limit, -limit]], dtype=ordered.dtype).repeat(len(ordered), 1)
    above = ordered.shape[1] - torch.searchsorted(ordered, edges[:, :1].contiguous(), right=True)
    below = torch.searchsorted(ordered, edges[:, 1:].contiguous())
    return (above + below)[:, 0].double() / ordered.shape[1]


def _ks_distance(ordered: torch.Tensor) -> torch.Tensor:
    # The distance alone: neighbouring values depend on each other, so a p-value would mean nothing.
    count = ordered.shape[1]
    expected = torch.erfc(ordered * -math.sqrt(0.5)) / 2
    low, high = (expected - torch.arange(1, count + 1, dtype=ordered.dtype) / count).aminmax(dim=1)
    return torch.maximum(high.double() + 1 / count, -low.double())


def _neighbour_correlation(centred: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    """Returns the mean over both axes; `centred` has the mean 0."""
    found = []
    for dim in (-1, -2):
        length = centred.shape[dim]
        if centred.ndim < 3 or length < 2:
            continue
        a, b = (centred.narrow(dim, start, length - 1).flatten(1) for start in (0, 1))
        count = a.shape[1]
        mean_a, mean_b = a.double().mean(1), b.double().mean(1)
        product = (a * b).sum(1).double() / count - mean_a * mean_b
        scale = (a.square().sum(1).double() / count - mean_a.square()) * (
            b.square().sum(1).double() / count - mean_b.square()
        )
        found.append(torch.where(spread & (scale > 0), product / scale.clamp(min=1e-300).sqrt(), 0.0))
    if not found:
        return torch.full((len(centred),), float("nan"), dtype=torch.float64)
    return torch.stack(found).mean(0)


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
