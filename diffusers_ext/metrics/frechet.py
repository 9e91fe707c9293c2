r"""Frechet distance between Gaussians fitted to features.

\(d^2 = \lVert \mu_1 - \mu_2 \rVert^2 + \mathrm{tr}(C_1 + C_2 - 2 (C_1^{1/2} C_2 C_1^{1/2})^{1/2})\)
(Dowson and Landau, 1982; with Inception features it is the FID of Heusel et al., arXiv 1706.08500).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["GaussianStatistics", "frechet_distance"]


@dataclass(frozen=True)
class GaussianStatistics:
    """Mean and covariance of a set of features.

    Attributes:
        mean: `(features,)` in float64.
        covariance: `(features, features)` in float64, with the divisor `n - 1`.
        n: how many samples they come from.
    """

    mean: torch.Tensor
    covariance: torch.Tensor
    n: int

    @classmethod
    def from_features(cls, features: torch.Tensor) -> GaussianStatistics:
        """Fits a Gaussian.

        Args:
            features: `(samples, features)`.

        Raises:
            ValueError: fewer than two samples, another shape, or values that are not finite.
        """
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"`features` must have the shape (samples >= 2, features), got {tuple(features.shape)}.")
        if not torch.isfinite(features).all():
            raise ValueError("`features` must be finite, got NaN or infinity.")
        features = features.double()
        mean = features.mean(0)
        centred = features - mean
        return cls(mean, centred.T @ centred / (len(features) - 1), len(features))


def frechet_distance(
    first: torch.Tensor | GaussianStatistics, second: torch.Tensor | GaussianStatistics
) -> float:
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
    squared = (
        (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * inner.sqrt().sum()
    )
    return max(0.0, squared.item())
