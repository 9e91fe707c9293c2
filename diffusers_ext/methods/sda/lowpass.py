r"""The low-pass filter of the guidance: cubic resizing down by a factor and up again.

Resizing is linear and separable, \(\phi(x) = A_h x A_w^T\) with \(A = U D\): \(D\) reduces a side by the factor with
antialiasing, \(U\) enlarges it again. What lies outside the image counts as zero, and weights are not renormalised at
the border. All that guidance needs is computed at the reduced size: with \(d = D_h (x - y) D_w^T\) and the Gram
matrices \(G = U^T U\),

    ||phi(x) - phi(y)||^2 = <d, G_h d G_w>,    gradient in y: -D_h^T (G_h d G_w) D_w / ||phi(x) - phi(y)||.
"""

from __future__ import annotations

from typing import Literal

import torch

__all__ = ["LowPass"]

Norm = Literal["per_sample", "batch"]


def _cubic(x: torch.Tensor) -> torch.Tensor:
    """Keys' cubic kernel with a = -0.5."""
    x = x.abs()
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def _resize_matrix(size: int, target: int) -> torch.Tensor:
    """Returns the `(target, size)` matrix of cubic resizing, in double precision."""
    scale = target / size
    stretch = min(scale, 1.0)  # antialiasing: the kernel is as wide as an output pixel
    centre = (torch.arange(target, dtype=torch.float64) + 0.5) / scale - 0.5
    reach = int(2 / stretch) + 2
    # Weights are normalised over all pixels, those outside too, which are then left out.
    position = torch.arange(-reach, size + reach, dtype=torch.float64)
    weights = _cubic((position[None] - centre[:, None]) * stretch)
    weights = weights / weights.sum(1, keepdim=True)
    return weights[:, reach : reach + size]


class LowPass:
    r"""A low-pass filter for images of one size; its matrices are made once.

    Args:
        size: height and width, or one number for both.
        factor: D, by which both sides are reduced; 1 filters nothing.
        device: where images are.
        dtype: precision of the matrices.

    Raises:
        ValueError: `factor` is no positive integer, or does not divide the size.

    Reference:
        Gao et al. 2023, "Back to the Source" (arXiv 2207.03442).

    Example:
        >>> import torch
        >>> from diffusers_ext import LowPass
        >>> low_pass = LowPass(16, factor=4)
        >>> filtered = low_pass(torch.ones(1, 1, 16, 16))
        >>> filtered.shape, round(filtered[0, 0, 0, 0].item(), 4)
        (torch.Size([1, 1, 16, 16]), 0.3567)
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        factor: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        sizes = (size, size) if isinstance(size, int) else tuple(size)
        if not isinstance(factor, int) or factor < 1 or any(side % factor or side < factor for side in sizes):
            raise ValueError(
                f"`factor` must be an integer >= 1 that divides height and width {sizes}, got {factor!r}."
            )
        down = [_resize_matrix(side, side // factor) for side in sizes]
        up = [_resize_matrix(side // factor, side) for side in sizes]
        self.factor = factor
        self._down_h, self._down_w = (m.to(device, dtype) for m in down)
        self._up_h, self._up_w = (m.to(device, dtype) for m in up)
        self._gram_h, self._gram_w = ((m.T @ m).to(device, dtype) for m in up)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Filters `(batch, channels, height, width)` images."""
        return self._up_h @ self.reduce(images) @ self._up_w.T

    def reduce(self, images: torch.Tensor) -> torch.Tensor:
        """Returns `(batch, channels, height / factor, width / factor)`: what the filter keeps of the images."""
        return self._down_h @ images @ self._down_w.T

    def distance(
        self, reduced: torch.Tensor, images: torch.Tensor, norm: Norm = "per_sample"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes the distance of filtered images to a reference, and its gradient, without autograd.

        Args:
            reduced: `reduce(reference)`.
            images: `(batch, channels, height, width)`.
            norm: one norm for each image, or one over the whole batch, by which each result depends on the others.

        Returns:
            The norm, `(batch, 1, 1, 1)` or `(1, 1, 1, 1)`, and its gradient of the shape of `images`; where the norm
            is 0, so is the gradient.
        """
        difference = reduced - self.reduce(images)
        weighted = self._gram_h @ difference @ self._gram_w
        axes = (1, 2, 3) if norm == "per_sample" else (0, 1, 2, 3)
        length = (difference * weighted).sum(axes, keepdim=True).clamp_min(0).sqrt()
        inverse = torch.where(length > 0, 1 / length.clamp_min(torch.finfo(length.dtype).tiny), 0)
        return length, -(self._down_h.T @ (weighted * inverse) @ self._down_w)
