r"""Kernel distance: the unbiased squared maximum mean discrepancy with a polynomial kernel.

\(k(x, y) = (\gamma \langle x, y \rangle + c)^d\); with Inception features it is the KID of Binkowski et al.
(arXiv 1801.01401, which gives the estimator in section 3.1).
"""

from __future__ import annotations

from typing import overload

import torch

__all__ = ["kernel_distance"]

BLOCK = 2048  # rows of the kernel matrix held at a time


@overload
def kernel_distance(
    first: torch.Tensor,
    second: torch.Tensor,
    degree: int = 3,
    gamma: float | None = None,
    coef0: float = 1.0,
    subsets: None = None,
    subset_size: int = 1000,
    generator: torch.Generator | None = None,
) -> float: ...


@overload
def kernel_distance(
    first: torch.Tensor,
    second: torch.Tensor,
    degree: int = 3,
    gamma: float | None = None,
    coef0: float = 1.0,
    *,
    subsets: int,
    subset_size: int = 1000,
    generator: torch.Generator | None = None,
) -> tuple[float, float]: ...


def kernel_distance(
    first: torch.Tensor,
    second: torch.Tensor,
    degree: int = 3,
    gamma: float | None = None,
    coef0: float = 1.0,
    subsets: int | None = None,
    subset_size: int = 1000,
    generator: torch.Generator | None = None,
) -> float | tuple[float, float]:
    """Computes the unbiased squared MMD between two sets of features; its expectation is 0 for equal laws.

    Args:
        first: `(samples, features)`, at least two samples.
        second: likewise.
        degree: d of the kernel.
        gamma: scale of the inner product, by default 1 / number of features.
        coef0: c of the kernel.
        subsets: number of random subsets to average over, as KID is reported; by default all samples are used once.
        subset_size: samples of each side in a subset, drawn without replacement.
        generator: draws the subsets, by default torch's global one.

    Returns:
        The estimate in float64, which can be negative; with `subsets` the mean and the standard deviation (divisor
        `subsets`) of the estimates.

    Raises:
        ValueError: fewer than two samples, values that are not finite, widths that differ, or subsets that cannot be
            drawn.

    Example:
        >>> import torch
        >>> from diffusers_ext import kernel_distance
        >>> x, y = torch.randn(2, 500, 4, generator=torch.Generator().manual_seed(0))
        >>> abs(kernel_distance(x, y)) < 0.1 < kernel_distance(x, y + 1)
        True
        >>> mean, deviation = kernel_distance(x, y + 1, subsets=10, subset_size=100)
    """
    for name, features in (("first", first), ("second", second)):
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"`{name}` must have the shape (samples >= 2, features), got {tuple(features.shape)}.")
        if not torch.isfinite(features).all():
            raise ValueError(f"`{name}` must be finite, got NaN or infinity.")
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"`second` must have {first.shape[1]} features as `first`, got {second.shape[1]}.")
    first, second = first.double(), second.double()
    scale = 1 / first.shape[1] if gamma is None else gamma
    if subsets is None:
        return _estimate(first, second, degree, scale, coef0)
    if subsets < 1:
        raise ValueError(f"`subsets` must be an integer >= 1 or left out, got {subsets!r}.")
    fewest = min(len(first), len(second))
    if not 2 <= subset_size <= fewest:
        raise ValueError(f"`subset_size` must be in 2..{fewest}, the samples there are, got {subset_size!r}.")

    def drawn(features: torch.Tensor) -> torch.Tensor:
        return features[torch.randperm(len(features), generator=generator)[:subset_size]]

    estimates = [_estimate(drawn(first), drawn(second), degree, scale, coef0) for _ in range(subsets)]
    values = torch.tensor(estimates, dtype=torch.float64)
    return values.mean().item(), values.std(correction=0).item()


def _estimate(first: torch.Tensor, second: torch.Tensor, degree: int, scale: float, coef0: float) -> float:
    def total(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.stack([((scale * block @ y.T + coef0) ** degree).sum() for block in x.split(BLOCK)]).sum()

    def within(x: torch.Tensor) -> torch.Tensor:
        diagonal = ((scale * x.square().sum(1) + coef0) ** degree).sum()
        return (total(x, x) - diagonal) / (len(x) * (len(x) - 1))

    between = total(first, second) / (len(first) * len(second))
    return (within(first) + within(second) - 2 * between).item()
