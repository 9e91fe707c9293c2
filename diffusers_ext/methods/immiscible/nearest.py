r"""Noise chosen as the nearest of k candidates (Improved Immiscible Diffusion, arXiv 2505.18521).

With \(u = x / \lVert x \rVert\), the distance from \(x\) to a candidate \(n\) depends on two numbers only:
\(z = \langle n, u \rangle \sim N(0, 1)\) and \(q = \lVert n - z u \rVert^2 \sim \chi^2_{D-1}\), since
\(\lVert x - n \rVert^2 = \lVert x \rVert^2 - 2 \lVert x \rVert z + z^2 + q\). So the chosen candidate can be drawn
exactly from k pairs of numbers and one vector, in time and memory \(O(D + k)\) instead of \(O(kD)\).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from diffusers_ext.rng import StepRNG

from .checks import check_batch, check_choice, check_count

__all__ = ["NearestNoise", "knn_sample", "knn_select"]

Score = Literal["l2", "inner"]


@torch.no_grad()
def knn_select(x: torch.Tensor, candidates: torch.Tensor, score: Score = "l2") -> torch.Tensor:
    """Selects for each sample the best of its candidates.

    Args:
        x: `(batch, ...)` samples.
        candidates: `(batch, k, ...)`.
        score: `"l2"` takes the nearest, `"inner"` the one of largest inner product.

    Returns:
        A tensor of `x`'s shape and the candidates' dtype.

    Raises:
        ValueError: shapes do not fit, `x` is not finite, or `score` is unknown.

    Reference:
        Li et al., "Improved Immiscible Diffusion", arXiv 2505.18521, section 3.2.

    Example:
        >>> import torch
        >>> knn_select(torch.tensor([[1.0, 0.0]]), torch.tensor([[[0.0, 3.0], [0.5, 0.1]]]))
        tensor([[0.5000, 0.1000]])
    """
    check_choice("score", score, ("l2", "inner"))
    check_batch(x, name="x")
    if candidates.ndim != x.ndim + 1 or candidates[:, 0].shape != x.shape:
        raise ValueError(
            f"`candidates` must have the shape (batch, k, ...) for `x` of {tuple(x.shape)}, got "
            f"{tuple(candidates.shape)}."
        )
    flat = candidates.flatten(2).float()
    inner = (flat @ x.flatten(1).float().unsqueeze(-1)).squeeze(-1)
    # ||x||^2 is the same for all candidates of a sample.
    best = inner.argmax(1) if score == "inner" else (flat.square().sum(-1) - 2 * inner).argmin(1)
    return candidates[torch.arange(len(x), device=x.device), best]


@torch.no_grad()
def knn_sample(x: torch.Tensor, k: int, score: Score = "l2", generator: torch.Generator | None = None) -> torch.Tensor:
    """Draws, for each sample, a normal vector distributed as the best of `k` candidates, without making them.

    Args:
        x: `(batch, ...)` samples; only their directions and norms matter.
        k: number of candidates.
        score: `"l2"` for the nearest, `"inner"` for the largest inner product.
        generator: source of the random numbers, on `x`'s device.

    Returns:
        A tensor of `x`'s shape in fp32.

    Raises:
        ValueError: `k` is not an integer >= 1, `score` is unknown or `x` is not finite.

    Reference:
        Li et al., "Improved Immiscible Diffusion", arXiv 2505.18521, section 3.2; the exact sampler is ours.

    Example:
        >>> import torch
        >>> x = torch.full((4, 3), 2.0)
        >>> noise = knn_sample(x, k=64, generator=torch.Generator().manual_seed(0))
        >>> bool((x - noise).norm(dim=1).mean() < x.norm(dim=1).mean())
        True
    """
    check_count("k", k)
    check_choice("score", score, ("l2", "inner"))
    check_batch(x, name="x")
    return _combine(x, *_draw(x, k, score, generator), score)


def _draw(
    x: torch.Tensor, k: int, score: Score, generator: torch.Generator | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draws one vector, k positions along x and, for distances, k squared lengths across it, per sample."""
    batch, dimension = len(x), x[0].numel()
    vector = torch.randn((batch, dimension), generator=generator, device=x.device)
    along = torch.randn((batch, k), generator=generator, device=x.device)
    if score == "inner" or dimension == 1:
        return vector, along, torch.zeros_like(along)
    # A chi-square variable is twice a gamma variable; torch draws gammas with a generator only by this function.
    shape = torch.full((batch, k), (dimension - 1) / 2, device=x.device)
    return vector, along, 2 * torch._standard_gamma(shape, generator=generator)


def _combine(
    x: torch.Tensor, vector: torch.Tensor, along: torch.Tensor, across: torch.Tensor, score: Score
) -> torch.Tensor:
    """Makes the best candidate out of `_draw`'s numbers, in the memory of `vector`."""
    flat = x.flatten(1).float()
    norm = flat.norm(dim=1, keepdim=True)
    inverse = torch.where(norm > 0, 1 / norm, 0)
    best = along.argmax(1) if score == "inner" else (along**2 - 2 * norm * along + across).argmin(1)
    z, q = along.gather(1, best[:, None]), across.gather(1, best[:, None])
    present = (vector * flat).sum(1, keepdim=True) * inverse
    if score == "inner":  # what lies across x has the right law already
        return vector.addcmul_(flat, (z - present) * inverse).view(x.shape)
    # At the origin there is no direction to take out: the whole vector gets the best candidate's length.
    length = torch.where(norm > 0, q, q + z**2).sqrt()
    vector.addcmul_(flat, -present * inverse)
    vector.mul_(length / vector.norm(dim=1, keepdim=True).clamp(min=1e-30))  # one dimension leaves no length
    return vector.addcmul_(flat, z * inverse).view(x.shape)


class NearestNoise:
    """Noise strategy: for each sample, the nearest of `k` normals.

    The noise of one sample is no longer standard normal: its mean leans towards the sample, its energy falls, and the
    divergence from the normal is `ln k - (k - 1) / k` nats. `score="inner"` with a `center` leans less.

    Args:
        k: number of candidates; 1 is plain noise. The papers use 4 for flow matching, 8 for DDIM and 64 for latents.
        score: `"l2"` chooses by distance, `"inner"` by the inner product with `x0 - center`.
        center: the data's mean, broadcastable to a sample; only for `"inner"`.
        method: `"fast"` draws the result exactly in O(D + k); `"candidates"` makes all candidates.
        pool: choose by averages over squares of so many pixels a side, of sample and candidates alike.

    Raises:
        ValueError: an argument is outside its range.

    Reference:
        Li et al., "Improved Immiscible Diffusion", arXiv 2505.18521, section 3.2; the exact sampler is ours.

    Example:
        >>> import torch
        >>> from diffusers_ext import NearestNoise, StepRNG
        >>> rng = StepRNG(0)
        >>> rng.begin(0)
        >>> x = torch.ones(2, 1, 8, 8)
        >>> NearestNoise(k=8)(x, rng=rng).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        k: int = 4,
        score: Score = "l2",
        center: torch.Tensor | float | None = None,
        method: Literal["fast", "candidates"] = "fast",
        pool: int | None = None,
    ) -> None:
        check_count("k", k)
        check_choice("score", score, ("l2", "inner"))
        check_choice("method", method, ("fast", "candidates"))
        if pool is not None:
            check_count("pool", pool)
        if center is not None and score != "inner":
            raise ValueError(f"`center` must be None unless `score` is 'inner', got a center with {score!r}.")
        self.k, self.method, self.pool = k, method, pool
        self.score: Score = score
        self.center = None if center is None else torch.as_tensor(center)

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
            ValueError: `x0` is not finite, or `pool` does not divide its height and width.
        """
        check_batch(x0, labels)
        if self.k == 1:
            return rng.randn_like(x0, ids).to(x0.dtype)
        x = x0.float()
        if self.center is not None:
            x = x - self.center.to(x)
        if self.pool is None:
            return self._nearest(x, rng, ids).to(x0.dtype)
        # Block averages of normals, times the root of the block's size, are standard normals again: draw the best of
        # those, and put it in the place of the averages of one plain draw.
        noise = rng.randn_like(x, ids)
        root = self.pool  # of pool**2 pixels
        chosen = self._nearest(self._averages(x) * root, rng, ids) / root
        change = chosen - self._averages(noise)
        change = change.repeat_interleave(self.pool, -1).repeat_interleave(self.pool, -2)
        return (noise + change).to(x0.dtype)

    def _averages(self, x: torch.Tensor) -> torch.Tensor:
        assert self.pool is not None
        if x.ndim < 4 or x.shape[-1] % self.pool or x.shape[-2] % self.pool:
            raise ValueError(
                f"`pool` must divide height and width of `x0` (batch, channels, ..., height, width), got {self.pool} "
                f"for {tuple(x.shape)}."
            )
        pooled = F.avg_pool2d(x.flatten(0, -4), self.pool)
        return pooled.view(*x.shape[:-2], *pooled.shape[-2:])

    def _nearest(self, x: torch.Tensor, rng: StepRNG, ids: Sequence[int] | None) -> torch.Tensor:
        if rng.scope == "sample" and ids is not None:
            generators = [rng.generator("noise", x.device, id=i) for i in ids]
            rows = list(x.split(1))
        else:
            generators, rows = [rng.generator("noise", x.device)], [x]
        if self.method == "candidates":
            drawn = [
                torch.randn((len(r), self.k, *r.shape[1:]), generator=g, device=x.device)
                for r, g in zip(rows, generators, strict=True)
            ]
            return knn_select(x, torch.cat(drawn), self.score)
        parts = [_draw(r, self.k, self.score, g) for r, g in zip(rows, generators, strict=True)]
        vector, along, across = (torch.cat(part) for part in zip(*parts, strict=True))
        return _combine(x, vector, along, across, self.score)
