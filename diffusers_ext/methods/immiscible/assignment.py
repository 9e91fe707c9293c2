r"""Noise assigned to data by a linear assignment within the batch (Immiscible Diffusion, arXiv 2406.12303).

For samples \(x_i\) and noise \(n_j\), the permutation \(\pi\) that minimises
\(\sum_i \lVert x_i - n_{\pi(i)} \rVert^2\) also maximises \(\sum_i \langle x_i, n_{\pi(i)} \rangle\), because the
norms do not depend on \(\pi\): one matrix product gives all costs. The batch of noise stays an exact permutation of
independent normals.

Subtracting a number from each row and each column of the costs changes every assignment's total alike, so the best one
stays the best. The solver grows shortest paths from potentials of 0; rows and columns are therefore shifted beforehand
by potentials that a few Sinkhorn iterations estimate, which makes the paths short.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from accelerate import Accelerator
from scipy.optimize import linear_sum_assignment

from diffusers_ext.rng import StepRNG

from .checks import check_batch, check_choice, check_count

__all__ = ["AssignmentNoise", "assignment_permutation"]

Cost = Literal["inner", "l2"]


def _costs(x: torch.Tensor, noise: torch.Tensor, cost: Cost) -> torch.Tensor:
    """Returns the `(rows of x, rows of noise)` matrix to minimise."""
    x, noise = x.flatten(1).float(), noise.flatten(1).float()
    return torch.cdist(x, noise) if cost == "l2" else (x @ noise.T).neg_()


def _shifted(costs: torch.Tensor) -> torch.Tensor:
    """Shifts rows and columns by estimates of the optimal potentials; the best assignment stays the same.

    Up to rounding that holds for any temperature and number of iterations; these do well on Gaussian and image data.
    """
    costs = costs - costs.amin(1, keepdim=True)
    costs -= costs.amin(0)
    temperature = (0.05 * costs.mean()).clamp(min=1e-30)  # all costs may be equal
    # Every row and column holds a 1, so all sums are positive. The limit keeps out denormal numbers, which are slow.
    kernel = (costs / -temperature).clamp_(min=-40).exp_()
    rows = columns = torch.ones_like(costs[0])
    for _ in range(8):
        rows = 1 / (kernel @ columns)
        columns = 1 / (rows @ kernel)
    return costs.sub_(temperature * rows.log()[:, None]).sub_(temperature * columns.log())


def _solve(costs: torch.Tensor) -> torch.Tensor:
    if len(costs) >= 256:  # below, the shift can cost more than it saves
        costs = _shifted(costs)
    return torch.from_numpy(linear_sum_assignment(costs.cpu().numpy())[1])


@torch.no_grad()
def assignment_permutation(x: torch.Tensor, noise: torch.Tensor, cost: Cost = "inner") -> torch.Tensor:
    """Computes which noise each sample gets in the best assignment of a batch.

    Args:
        x: `(batch, ...)` samples.
        noise: the same shape.
        cost: `"inner"` minimises the sum of squared distances (by inner products); `"l2"` the sum of plain
            distances, as the paper's code does.

    Returns:
        `(batch,)` int64 permutation on the CPU: sample `i` gets `noise[permutation[i]]`.

    Raises:
        ValueError: shapes differ, `x` is not finite, or `cost` is unknown.

    Reference:
        Li et al., "Immiscible Diffusion", NeurIPS 2024, arXiv 2406.12303, algorithm 1.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> assignment_permutation(x, torch.tensor([[-0.5, 2.0], [0.5, 2.0]]))
        tensor([1, 0])
    """
    check_choice("cost", cost, ("inner", "l2"))
    check_batch(x, name="x")
    if noise.shape != x.shape:
        raise ValueError(f"`noise` must have the shape {tuple(x.shape)} of `x`, got {tuple(noise.shape)}.")
    return _solve(_costs(x, noise, cost))


class AssignmentNoise:
    """Noise strategy: independent normals, permuted within the batch to lie near the data.

    Assignment keeps the noise of the whole batch normal, but not that of one class: class-conditional models should
    use `within_labels`. The solver's time grows a little faster than the square of the batch; above 1,024 samples
    `group_size=256` keeps it small.

    Args:
        cost: see `assignment_permutation`.
        group_size: solve consecutive groups of so many samples; by default the whole batch.
        gather: with several processes, solve over the batches of all of them together; all must be of one size.
        within_labels: pair only samples of the same class with each other's noise.

    Raises:
        ValueError: `cost` is unknown or `group_size` is not an integer >= 1.

    Reference:
        Li et al., "Immiscible Diffusion", NeurIPS 2024, arXiv 2406.12303, algorithm 1. Their code minimises plain
        distances (`cost="l2"`) from half-precision costs; we keep fp32 and take squared distances by default, which
        need one matrix product.

    Example:
        >>> import torch
        >>> from diffusers_ext import AssignmentNoise, StepRNG
        >>> rng = StepRNG(0)
        >>> rng.begin(0)
        >>> x = torch.linspace(-1, 1, 64).view(64, 1)
        >>> noise = AssignmentNoise()(x, rng=rng)
        >>> bool((noise.diff(dim=0) >= 0).all())  # in one dimension, the order of the data
        True
    """

    def __init__(
        self, cost: Cost = "inner", group_size: int | None = None, gather: bool = True, within_labels: bool = False
    ) -> None:
        check_choice("cost", cost, ("inner", "l2"))
        if group_size is not None:
            check_count("group_size", group_size)
        self.cost: Cost = cost
        self.group_size, self.gather, self.within_labels = group_size, gather, within_labels

    @torch.no_grad()
    def __call__(
        self,
        x0: torch.Tensor,
        *,
        rng: StepRNG,
        ids: Sequence[int] | None = None,
        labels: torch.Tensor | None = None,
        accelerator: Accelerator | None = None,
    ) -> torch.Tensor:
        """Returns noise of `x0`'s shape and dtype; see `NoiseStrategy`.

        Raises:
            ValueError: `x0` is not finite or not of one batch size on all processes, or `labels` are missing or do
                not fit.
        """
        check_batch(x0, labels)
        if self.within_labels and labels is None:
            raise ValueError("`labels` must be given for `within_labels`.")
        if self.gather and accelerator is not None and accelerator.num_processes > 1:
            return self._gathered(x0, rng, ids, labels, accelerator)
        noise = rng.randn_like(x0, ids)
        if len(x0) > 1:
            permutation = self._permutation(len(x0), labels, lambda part: _costs(x0[part], noise[part], self.cost))
            noise = noise[permutation.to(x0.device)]
        return noise.to(x0.dtype)

    def _gathered(
        self,
        x0: torch.Tensor,
        rng: StepRNG,
        ids: Sequence[int] | None,
        labels: torch.Tensor | None,
        accelerator: Accelerator,
    ) -> torch.Tensor:
        """Solves over all processes: each draws everybody's noise again, so that only costs travel."""
        batch, world = len(x0), accelerator.num_processes
        sizes = accelerator.gather(torch.tensor([batch], device=x0.device)).tolist()  # type: ignore[union-attr]
        if len(set(sizes)) > 1:
            raise ValueError(f"`x0` must have the same batch size on every process, got {sizes}.")
        all_ids: list[Sequence[int] | None] = [None] * world
        if ids is not None:
            gathered = accelerator.gather(torch.tensor(list(ids), device=x0.device))
            all_ids = list(gathered.view(world, batch).tolist())  # type: ignore[union-attr]
        noise = torch.cat([rng.randn_like(x0, all_ids[rank], rank=rank) for rank in range(world)])
        costs: torch.Tensor = accelerator.gather(_costs(x0, noise, self.cost))  # type: ignore[assignment]
        if self.within_labels:
            labels = accelerator.gather(labels)  # type: ignore[assignment]
        permutation = self._permutation(batch * world, labels, lambda part: costs[part][:, part])
        first = accelerator.process_index * batch
        return noise[permutation[first : first + batch].to(x0.device)].to(x0.dtype)

    def _permutation(
        self, n: int, labels: torch.Tensor | None, costs: Callable[[slice | torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Solves each group of samples on its own; `costs(group)` gives the matrix of a slice or of indices."""
        size, every = self.group_size or n, torch.arange(n)
        groups: list[slice | torch.Tensor] = [slice(first, first + size) for first in range(0, n, size)]
        if self.within_labels and labels is not None:
            present = labels.cpu()
            groups = [every[g][present[g] == label] for g in groups for label in present[g].unique()]
        permutation = every.clone()
        for group in groups:
            permutation[group] = every[group][_solve(costs(group))]
        return permutation
