r"""Frechet distance between Gaussians fitted to features.

\(d^2 = \lVert \mu_1 - \mu_2 \rVert^2 + \mathrm{tr}(C_1 + C_2 - 2 (C_1^{1/2} C_2 C_1^{1/2})^{1/2})\)
(Dowson and Landau, 1982; with Inception features it is the FID of Heusel et al., arXiv 1706.08500).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

__all__ = ["GaussianStatistics", "frechet_distance"]


@dataclass(frozen=True)
class GaussianStatistics:
    """Mean and covariance of a set of features.

    Attributes:
        mean: `(features,)` in float64.
        covariance: `(features, features)` in float64, with the divisor `n - 1`.
        n: how many samples they come from, at least 2.

    Raises:
        ValueError: shapes that do not fit, fewer than two samples, or values that are not finite.

    Example:
        >>> import torch
        >>> from diffusers_ext import GaussianStatistics
        >>> x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
        >>> parts = GaussianStatistics.from_features(x[:60]).update(x[60:])
        >>> torch.allclose(parts.covariance, GaussianStatistics.from_features(x).covariance)
        True
    """

    mean: torch.Tensor
    covariance: torch.Tensor
    n: int

    def __post_init__(self) -> None:
        if self.mean.ndim != 1 or self.covariance.shape != (len(self.mean), len(self.mean)):
            raise ValueError(
                "`mean` and `covariance` must have the shapes (features,) and (features, features), got "
                f"{tuple(self.mean.shape)} and {tuple(self.covariance.shape)}."
            )
        if self.n < 2:
            raise ValueError(f"`n` must be an integer >= 2, got {self.n!r}.")
        if not (torch.isfinite(self.mean).all() and torch.isfinite(self.covariance).all()):
            raise ValueError("`mean` and `covariance` must be finite, got NaN or infinity.")

    @classmethod
    def from_features(cls, features: torch.Tensor) -> GaussianStatistics:
        """Fits a Gaussian.

        Args:
            features: `(samples, features)`.

        Raises:
            ValueError: fewer than two samples, another shape, or values that are not finite.
        """
        mean, scatter = _moments(features, least=2)
        return cls(mean, scatter / (len(features) - 1), len(features))

    def update(self, features: torch.Tensor) -> GaussianStatistics:
        """Returns the statistics of these samples and further ones, so that a large set is read batch by batch.

        Args:
            features: `(samples, features)`, one sample or more.

        Raises:
            ValueError: no samples, another width, or values that are not finite.

        Reference:
            Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1982.
        """
        mean, scatter = _moments(features, least=1)
        if mean.shape != self.mean.shape:
            raise ValueError(f"`features` must have {len(self.mean)} columns, got {len(mean)}.")
        more = len(features)
        n = self.n + more
        shift = mean - self.mean
        scatter += self.covariance * (self.n - 1) + torch.outer(shift, shift) * (self.n * more / n)
        return GaussianStatistics(self.mean + shift * (more / n), scatter / (n - 1), n)

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file."""
        save_file({"mean": self.mean, "covariance": self.covariance, "n": torch.tensor(self.n)}, path)

    @classmethod
    def load(cls, path: str | Path) -> GaussianStatistics:
        """Reads what `save` wrote."""
        tensors = load_file(path)
        return cls(tensors["mean"], tensors["covariance"], int(tensors["n"]))


def _moments(features: torch.Tensor, least: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Checks features; returns their mean and the sum of outer products of the deviations, in float64."""
    if features.ndim != 2 or len(features) < least:
        raise ValueError(
            f"`features` must have the shape (samples >= {least}, features), got {tuple(features.shape)}."
        )
    if not torch.isfinite(features).all():
        raise ValueError("`features` must be finite, got NaN or infinity.")
    features = features.double()
    mean = features.mean(0)
    centred = features - mean
    return mean, centred.T @ centred


def frechet_distance(first: torch.Tensor | GaussianStatistics, second: torch.Tensor | GaussianStatistics) -> float:
    """Computes the squared Frechet distance between two sets of features, as FID reports it.

    Args:
        first: `(samples, features)`, or statistics computed before.
        second: likewise.

    Returns:
        A number >= 0. It is biased upwards by about the number of features divided by the number of samples: compare
        figures of equal sample counts only.

    Raises:
        ValueError: fewer than two samples, values that are not finite, or widths that differ.

    Example:
        >>> import torch
        >>> from diffusers_ext import frechet_distance
        >>> x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
        >>> round(frechet_distance(x, x + torch.tensor([3.0, 4.0, 0.0])), 4)
        25.0
    """
    a, b = (s if isinstance(s, GaussianStatistics) else GaussianStatistics.from_features(s) for s in (first, second))
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"`second` must have {len(a.mean)} features as `first`, got {len(b.mean)}.")
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    # Symmetric, so its eigenvalues are real: no complex square root that would have to be discarded.
    inner = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0)
    squared = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * inner.sqrt().sum()
    return max(0.0, squared.item())
