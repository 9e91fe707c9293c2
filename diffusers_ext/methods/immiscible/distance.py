"""How much nearer paired noise lies to the data than independent noise would."""

from __future__ import annotations

import torch

from .checks import check_batch

__all__ = ["distance_cut"]


@torch.no_grad()
def distance_cut(x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    r"""Computes the relative cut of the mean distance between samples and their noise.

    For independent noise \(\lVert x - n \rVert^2\) has mean \(S = \lVert x \rVert^2 + D\) and variance
    \(V = 2D + 4 \lVert x \rVert^2\), hence \(E \lVert x - n \rVert \approx \sqrt{S} (1 - V / (8 S^2))\), with an error
    of the order \(D^{-2}\). The cut is 1 minus the ratio of the mean distance found to the mean of these.

    Args:
        x0: `(batch, ...)` samples in the space that is diffused.
        noise: the same shape, as a noise strategy returned it.

    Returns:
        A scalar fp32 tensor on `x0`'s device, which is not waited for: about 0 for independent noise (standard
        deviation at most `1 / sqrt(2 * D * batch)`), a few hundredths for paired noise of some thousand dimensions.

    Raises:
        ValueError: shapes differ or `x0` is not finite.

    Example:
        >>> import torch
        >>> from diffusers_ext import distance_cut
        >>> x = torch.randn(64, 3072, generator=torch.Generator().manual_seed(0))
        >>> noise = torch.randn(64, 3072, generator=torch.Generator().manual_seed(1))
        >>> bool(distance_cut(x, noise).abs() < 0.01)
        True
    """
    check_batch(x0)
    if noise.shape != x0.shape:
        raise ValueError(f"`noise` must have the shape {tuple(x0.shape)} of `x0`, got {tuple(noise.shape)}.")
    x, n = x0.flatten(1).float(), noise.flatten(1).float()
    norm, dimension = x.square().sum(1), x.shape[1]
    mean, variance = norm + dimension, 2 * dimension + 4 * norm
    independent = mean.sqrt() * (1 - variance / (8 * mean**2))
    return 1 - (x - n).norm(dim=1).mean() / independent.mean()
