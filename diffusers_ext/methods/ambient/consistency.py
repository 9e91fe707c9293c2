r"""What ties a denoiser below the level of the data to what it learned above: its own reverse process is a martingale.

For \(\sigma' < \sigma\) and \(x_{\sigma'}\) drawn from \(x_\sigma\) by the reverse process,
\(\mathbb E[D(x_{\sigma'}, \sigma') | x_\sigma] = D(x_\sigma, \sigma)\).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers.utils.torch_utils import randn_tensor

__all__ = ["consistency_loss", "reverse_step"]

Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _shaped(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return values.view(-1, *[1] * (x.ndim - 1))


def reverse_step(
    x: torch.Tensor, x0_pred: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    r"""Takes one step of the reverse process: \(x' = x + (1 - r)(D - x) + \sigma' \sqrt{1 - r}\, z\).

    With \(r = (\sigma' / \sigma)^2\): DDPM's ancestral step, or DDIM's with eta = 1, for samples \(x_0 + \sigma n\).

    Args:
        x: `(batch, ...)` samples of level `sigma`.
        x0_pred: the clean samples that the denoiser sees in them.
        sigma: `(batch,)` levels > 0.
        sigma_next: `(batch,)` levels, none above `sigma`.
        noise: standard normal, of `x`'s shape.

    Returns:
        Samples of level `sigma_next`.

    Example:
        >>> import torch
        >>> from diffusers_ext import reverse_step
        >>> x, zero = torch.ones(1, 1), torch.zeros(1, 1)
        >>> reverse_step(x, zero, torch.tensor([2.0]), torch.tensor([1.0]), zero)  # r = 1/4
        tensor([[0.2500]])
    """
    level, following = sigma.double(), sigma_next.double()
    rest = (level - following) * (level + following) / level**2
    pull, spread = _shaped(rest.to(x.dtype), x), _shaped((following * rest.sqrt()).to(x.dtype), x)
    return x + pull * (x0_pred - x) + spread * noise


def consistency_loss(
    denoise: Denoise,
    x: torch.Tensor,
    sigma: torch.Tensor,
    sigma_next: torch.Tensor,
    num_steps: int = 5,
    generator: torch.Generator | list[torch.Generator] | None = None,
    snap: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    r"""Measures how far a denoiser is from being consistent along its own reverse process.

    Two independent runs lead from `x` to `a` and `b` of level `sigma_next`; the mean over pixels of
    \((D(a) - D(x)) (D(b) - D(x))\) estimates the squared difference \(|\mathbb E D(x') - D(x)|^2\) without bias, so
    that single values may be negative. The gradient goes through the runs. A run of one step is exact only where the
    clean sample is known; far below the start several are needed.

    Args:
        denoise: function of samples `(batch, ...)` and levels `(batch,)` float64 that returns clean samples.
        x: `(batch, ...)` samples of level `sigma`.
        sigma: `(batch,)` levels > 0.
        sigma_next: `(batch,)` levels where the runs end, > 0 and none above `sigma`.
        num_steps: steps of each run, on a grid of equal ratios.
        generator: source of the runs' noise.
        snap: moves levels between to those that the network knows, where it does not know all.

    Returns:
        `(batch,)` in fp32.

    Raises:
        ValueError: levels are of another shape, not finite, not positive or increasing, or `num_steps` is below 1.

    Reference:
        arXiv 2404.10177, section 3.2, with the product of two runs instead of a squared mean, which is biased.

    Example:
        >>> import torch
        >>> from diffusers_ext import consistency_loss
        >>> one = torch.ones(1)
        >>> consistency_loss(lambda x, sigma: torch.tanh(x), torch.ones(1, 4), one, one)  # no way, no difference
        tensor([0.])
    """
    if not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"`num_steps` must be an integer >= 1, got {num_steps!r}.")
    for name, value in (("sigma", sigma), ("sigma_next", sigma_next)):
        if value.shape != (len(x),) or not bool((value.isfinite() & (value > 0)).all()):
            raise ValueError(f"`{name}` must hold {len(x)} finite levels > 0, got {value.tolist()}.")
    if bool((sigma_next > sigma).any()):
        raise ValueError(f"`sigma_next` must not be above `sigma`, got {sigma_next.tolist()} and {sigma.tolist()}.")
    sigma, sigma_next = sigma.double(), sigma_next.double()
    start = denoise(x, sigma)
    grid = [sigma * (sigma_next / sigma) ** (i / num_steps) for i in range(1, num_steps)]
    grid = [sigma, *(snap(level) if snap else level for level in grid), sigma_next]
    differences = []
    for _ in range(2):
        run, x0_pred = x, start
        for level, following in zip(grid, grid[1:], strict=False):
            noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            run = reverse_step(run, x0_pred, level, following, noise)
            x0_pred = denoise(run, following)
        differences.append((x0_pred - start).float().flatten(1))
    return (differences[0] * differences[1]).mean(1)
