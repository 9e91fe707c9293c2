"""Distances between two samples of noise, by which the proxy is trained: of quantiles, of distribution functions."""

from __future__ import annotations

import torch
from torch import nn

from diffusers_ext.training.config import require

__all__ = ["DistributionLoss", "cdf_loss", "loss_points", "quantile_loss"]

LEAST = 1e-4  # probability of the outermost points


def _check(x: torch.Tensor, y: torch.Tensor) -> None:
    shapes = tuple(x.shape), tuple(y.shape)
    same = x.ndim == y.ndim and x.shape[:-1] == y.shape[:-1] and min(x.shape[-1:] + y.shape[-1:]) >= 2
    require(same, "x", shapes[0], f"(..., values) as `y`, with at least 2 values, {shapes[1]}")


def quantile_loss(x: torch.Tensor, y: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """Returns the mean distance of the quantiles of two samples, mean_j |Q_x(p_j) - Q_y(p_j)|.

    Args:
        x: `(..., values)`.
        y: `(..., values)`, of any number.
        probabilities: `(points,)` p in [0, 1].

    Raises:
        ValueError: the samples do not fit.
    """
    _check(x, y)
    x, y = x.sort(-1).values, y.sort(-1).values
    return (_quantiles(x, probabilities) - _quantiles(y, probabilities)).abs().mean()


def cdf_loss(x: torch.Tensor, y: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Returns the mean distance of the empirical distribution functions, mean_j |F_x(g_j) - F_y(g_j)|.

    F is (rank - 1) / (N - 1) at the sorted values, a straight line between them, and 0 and 1 outside; it has a
    gradient through the values on both sides of a point.

    Args:
        x: `(..., values)`.
        y: `(..., values)`, of any number.
        points: `(points,)` g.

    Raises:
        ValueError: the samples do not fit.
    """
    _check(x, y)
    return (_cdf(x.sort(-1).values, points) - _cdf(y.sort(-1).values, points)).abs().mean()


def _quantiles(ordered: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    place = probabilities.double() * (ordered.shape[-1] - 1)
    low = place.floor().long().clamp_max(ordered.shape[-1] - 2)
    return torch.lerp(ordered[..., low], ordered[..., low + 1], (place - low).to(ordered.dtype))


def _cdf(ordered: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    count = ordered.shape[-1]
    points = points.to(ordered.dtype).expand(*ordered.shape[:-1], -1).contiguous()
    rank = torch.searchsorted(ordered.detach(), points, right=True)
    inside = (rank > 0) & (rank < count)
    above = rank.clamp(1, count - 1)
    low, high = ordered.gather(-1, above - 1), ordered.gather(-1, above)
    # Where a point is outside both are replaced before the division, so that no gradient is NaN.
    width = torch.where(inside, high - low, 1.0)
    share = torch.where(inside, points - low, 0.0) / width
    return torch.where(inside, above - 1 + share, torch.where(rank > 0, count - 1.0, 0.0)) / (count - 1)


def loss_points(num_points: int, generator: torch.Generator | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws where the losses look: probabilities, dense in the tails, and points of a unit normal.

    p_j = Phi(8 u_j - 4) + 1e-4 N(0, 1), cut to [0, 1], and g_j = Phi^-1(u_j + 5e-5 N(0, 1)), for u even in
    [1e-4, 1 - 1e-4].

    Returns:
        `(num_points,)` each, in rising order, in float32.
    """
    device = generator.device if generator is not None else torch.device("cpu")
    u = torch.linspace(LEAST, 1 - LEAST, num_points, dtype=torch.float64, device=device)
    jitter = torch.randn((2, num_points), generator=generator, device=device, dtype=torch.float64) * LEAST
    p = (torch.special.ndtr(8 * u - 4) + jitter[0]).clamp(0, 1)
    g = torch.special.ndtri((u + jitter[1] / 2).clamp(LEAST, 1 - LEAST))
    return p.sort().values.float(), g.sort().values.float()


class DistributionLoss(nn.Module):
    """Both distances, in units of the real sample's standard deviation; each side is sorted once.

    Args:
        num_points: of each.
        quantile_weight: weight of the quantiles.
        cdf_weight: weight of the distribution functions.

    Raises:
        ValueError: fewer than 2 points, or negative weights.

    Example:
        >>> import torch
        >>> from diffusers_ext import DistributionLoss
        >>> x = torch.linspace(-1, 1, 100)
        >>> DistributionLoss()(x, x).item()
        0.0
    """

    def __init__(self, num_points: int = 1000, quantile_weight: float = 1.0, cdf_weight: float = 1.0) -> None:
        super().__init__()
        require(num_points >= 2, "num_points", num_points, "an integer >= 2")
        for name, value in (("quantile_weight", quantile_weight), ("cdf_weight", cdf_weight)):
            require(value >= 0, name, value, "a number >= 0")
        self.num_points, self.quantile_weight, self.cdf_weight = num_points, quantile_weight, cdf_weight

    def forward(
        self, model: torch.Tensor, real: torch.Tensor, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Compares two samples.

        Args:
            model: `(..., values)` noise of the model, with gradient.
            real: `(..., values)` recorded noise.
            generator: draws the points.

        Raises:
            ValueError: the samples do not fit.
        """
        _check(model, real)
        scale = real.std(-1, keepdim=True).clamp_min(torch.finfo(real.dtype).tiny)
        x, y = (model / scale).sort(-1).values, (real / scale).sort(-1).values
        p, g = (points.to(x.device) for points in loss_points(self.num_points, generator))
        quantiles = (_quantiles(x, p) - _quantiles(y, p)).abs().mean()
        return self.quantile_weight * quantiles + self.cdf_weight * (_cdf(x, g) - _cdf(y, g)).abs().mean()
