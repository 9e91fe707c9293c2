r"""Kernels, and the squared maximum mean discrepancy (MMD) between two sets of features.

\(\mathrm{MMD}^2 = E[k(x, x')] + E[k(y, y')] - 2 E[k(x, y)]\), estimated without bias (Gretton et al., 2012, lemma 6).
With the cubic kernel and Inception features it is the KID of Binkowski et al. (arXiv 1801.01401, section 3.1).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import torch

__all__ = [
    "kernel_distance",
    "mmd2",
    "polynomial_kernel",
    "rational_quadratic_kernel",
    "rbf_kernel",
]

BLOCK = 2048  # rows of the kernel matrix held at a time


def polynomial_kernel(
    x: torch.Tensor, y: torch.Tensor, degree: int = 3, gamma: float | None = None, coef0: float = 1.0
) -> torch.Tensor:
    """Computes `(gamma <x, y> + coef0) ** degree` for all pairs of rows; degree 1 is linear.

    Args:
        x: `(n, features)`.
        y: `(m, features)`.
        degree: an integer >= 1.
        gamma: scale of the inner product, by default 1 / number of features.
        coef0: the constant.

    Returns:
        `(n, m)`.

    Raises:
        ValueError: `degree` is less than 1 or no integer.
    """
    if not isinstance(degree, int) or degree < 1:
        raise ValueError(f"`degree` must be an integer >= 1, got {degree!r}.")
    scale = 1 / x.shape[1] if gamma is None else gamma
    return (scale * (x @ y.T) + coef0) ** degree


def rbf_kernel(x: torch.Tensor, y: torch.Tensor, gamma: float | None = None) -> torch.Tensor:
    """Computes `exp(-gamma |x - y|^2)` for all pairs of rows.

    Args:
        x: `(n, features)`.
        y: `(m, features)`.
        gamma: by default 1 / number of features.

    Returns:
        `(n, m)`.
    """
    return torch.exp(-(1 / x.shape[1] if gamma is None else gamma) * _squared_distances(x, y))


def rational_quadratic_kernel(
    x: torch.Tensor, y: torch.Tensor, scales: Sequence[float] = (0.2, 0.5, 1.0, 2.0, 5.0)
) -> torch.Tensor:
    """Computes `sum over l of (1 + |x - y|^2 / (2 l)) ** -l` for all pairs of rows.

    Args:
        x: `(n, features)`.
        y: `(m, features)`.
        scales: the values of l, each > 0.

    Returns:
        `(n, m)`.

    Raises:
        ValueError: there are no scales, or one is not positive.
    """
    if len(scales) == 0 or not all(scale > 0 for scale in scales):
        raise ValueError(f"`scales` must be numbers > 0, at least one, got {scales!r}.")
    squared = _squared_distances(x, y)
    return torch.stack([(1 + squared / (2 * scale)) ** -scale for scale in scales]).sum(0)


def _squared_distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x.square().sum(1, keepdim=True) + y.square().sum(1) - 2 * x @ y.T).clamp(min=0)


Kernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
KERNELS: dict[str, Callable[..., torch.Tensor]] = {
    "polynomial": polynomial_kernel,
    "rbf": rbf_kernel,
    "rational_quadratic": rational_quadratic_kernel,
}


def mmd2(
    first: torch.Tensor,
    second: torch.Tensor,
    kernel: Literal["polynomial", "rbf", "rational_quadratic"] | Kernel = "polynomial",
    unbiased: bool = True,
    **options: Any,
) -> torch.Tensor:
    """Computes the squared MMD between two sets of features, with gradients.

    Args:
        first: `(n, features)`, at least two samples.
        second: `(m, features)`, at least two; n and m may differ.
        kernel: name of a kernel, or a function from `(n, features)` and `(m, features)` to `(n, m)`.
        unbiased: leave the pairs of a sample with itself out; the estimate may then be negative.
        **options: arguments of the named kernel.

    Returns:
        A scalar in float64, for it is a small difference of large sums; gradients come back in the features' dtype.

    Raises:
        ValueError: fewer than two samples, values that are not finite, widths that differ, or an unknown kernel.

    Reference:
        Gretton et al., "A kernel two-sample test", JMLR 13, 2012, eq. 3 and (biased) eq. 5.

    Example:
        >>> import torch
        >>> from diffusers_ext import mmd2
        >>> x, y = torch.randn(2, 200, 4, generator=torch.Generator().manual_seed(0))
        >>> bool(mmd2(x, y, "rbf").abs() < 0.02 < mmd2(x, y + 1, "rbf"))
        True
    """
    _check(first, second)
    if isinstance(kernel, str):
        if kernel not in KERNELS:
            raise ValueError(f"`kernel` must be one of {sorted(KERNELS)} or a function, got {kernel!r}.")
        kernel = functools.partial(KERNELS[kernel], **options)
    return _estimate(first.double(), second.double(), kernel, unbiased)


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
    _check(first, second)
    first, second = first.double(), second.double()
    kernel = functools.partial(polynomial_kernel, degree=degree, gamma=gamma, coef0=coef0)
    if subsets is None:
        return _estimate(first, second, kernel).item()
    if subsets < 1:
        raise ValueError(f"`subsets` must be an integer >= 1 or left out, got {subsets!r}.")
    fewest = min(len(first), len(second))
    if not 2 <= subset_size <= fewest:
        raise ValueError(f"`subset_size` must be in 2..{fewest}, the samples there are, got {subset_size!r}.")

    def drawn(features: torch.Tensor) -> torch.Tensor:
        return features[torch.randperm(len(features), generator=generator)[:subset_size]]

    estimates = [_estimate(drawn(first), drawn(second), kernel) for _ in range(subsets)]
    values = torch.stack(estimates)
    return values.mean().item(), values.std(correction=0).item()


def _check(first: torch.Tensor, second: torch.Tensor) -> None:
    for name, features in (("first", first), ("second", second)):
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"`{name}` must have the shape (samples >= 2, features), got {tuple(features.shape)}.")
        if not torch.isfinite(features).all():
            raise ValueError(f"`{name}` must be finite, got NaN or infinity.")
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"`second` must have {first.shape[1]} features as `first`, got {second.shape[1]}.")


def _estimate(first: torch.Tensor, second: torch.Tensor, kernel: Kernel, unbiased: bool = True) -> torch.Tensor:
    def between(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.stack([kernel(block, y).sum() for block in x.split(BLOCK)]).sum() / (len(x) * len(y))

    def within(x: torch.Tensor) -> torch.Tensor:
        if not unbiased:
            return between(x, x)
        sums = []
        for start in range(0, len(x), BLOCK):
            block = kernel(x[start : start + BLOCK], x)
            sums.append(block.sum() - block.diagonal(start).sum())
        return torch.stack(sums).sum() / (len(x) * (len(x) - 1))

    return within(first) + within(second) - 2 * between(first, second)
