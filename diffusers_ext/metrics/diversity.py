"""How much samples differ among themselves."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["intra_cluster_distance"]


def intra_cluster_distance(
    samples: torch.Tensor,
    references: torch.Tensor,
    distance: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = torch.cdist,
) -> float:
    """Computes the mean distance between samples that are nearest to the same reference.

    Samples that copy the few images that a model was adapted to have small distances in their clusters; with LPIPS it
    is the Intra-LPIPS of Ojha et al. (arXiv 2104.06820, section 4.2).

    Args:
        samples: `(samples, features)`, or whatever `distance` takes.
        references: `(references, features)`, the images adapted to.
        distance: function from two such sets to the matrix of distances between them; by default Euclidean.

    Returns:
        The mean over clusters of the mean distance of their pairs; clusters of fewer than two samples do not count.

    Raises:
        ValueError: no cluster has two samples.

    Example:
        >>> import torch
        >>> from diffusers_ext import intra_cluster_distance
        >>> intra_cluster_distance(torch.tensor([[0.0], [1.0], [9.0], [12.0]]), torch.tensor([[0.0], [10.0]]))
        2.0
    """
    nearest = distance(samples, references).argmin(1)
    means = []
    for index in range(len(references)):
        cluster = samples[nearest == index]
        if len(cluster) >= 2:
            n = len(cluster)
            matrix = distance(cluster, cluster)
            means.append((matrix.sum() - matrix.diagonal().sum()) / (n * (n - 1)))
    if not means:
        raise ValueError(f"`samples` must hold two that are nearest to one reference, got {len(samples)} in all.")
    return torch.stack(means).mean().item()
