r"""The Jacobian \(J = \partial E/\partial x\) of a field: exactly, or by probes through vector-Jacobian products.

Only `torch.autograd.grad` is used: forward mode fails in fused attention on CPUs, functional transforms under gradient
checkpointing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffusers_ext.generation.score_field import ScoreField

from .draws import check_images, check_sigma, image_seeds, rows_of

__all__ = ["JacobianProbes", "exact_jacobian", "jacobian_probes", "vector_jacobian"]


@dataclass(frozen=True)
class JacobianProbes:
    r"""Estimates for every image, `(images,)` float64 tensors.

    Attributes:
        trace: of J.
        trace_error: its standard error.
        squared_norm: \(|J|^2\), squared Frobenius norm.
        squared_asymmetry: \(|J - J^\top|^2\).
        denoiser_squared_norm: \(|N|^2\) of the denoiser's Jacobian \(N = I - bJ\).
        denoiser_squared_asymmetry: \(|N - N^\top|^2 = b^2 |J - J^\top|^2\).
    """

    trace: torch.Tensor
    trace_error: torch.Tensor
    squared_norm: torch.Tensor
    squared_asymmetry: torch.Tensor
    denoiser_squared_norm: torch.Tensor
    denoiser_squared_asymmetry: torch.Tensor


def vector_jacobian(
    field: ScoreField, x: torch.Tensor, sigma: float | torch.Tensor, vectors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Returns E at the rows of x, and \(v^\top J\) of each row, both of x's shape."""
    # In inference mode there would silently be no gradient; of what was made in it, autograd takes copies alone.
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        seen = field.eps(x, sigma)
        vectors = vectors.to(seen.dtype).clone()
        # A field that does not depend on x has no gradient at all.
        product = torch.autograd.grad(seen, x, vectors, allow_unused=True)[0] if seen.grad_fn else None
    return seen.detach(), torch.zeros_like(seen) if product is None else product


def jacobian_probes(
    field: ScoreField,
    x: torch.Tensor,
    sigma: float,
    num_probes: int = 32,
    batch_size: int = 32,
    generator: torch.Generator | None = None,
) -> JacobianProbes:
    r"""Estimates trace, norm and asymmetry of J at noisy samples.

    With m Rademacher rows V, \(G = VJ\) and \(M = GV^\top\): \(\mathrm{tr} J\) is the mean of \(M_{ii}\), \(|J|^2\)
    that of \(|G_i|^2\), and \(|J - J^\top|^2\) that of \((M_{ij} - M_{ji})^2\) over \(i \ne j\), all without bias.

    Args:
        field: the denoiser.
        x: `(images, ...)` where J is taken: noisy samples as the network is given them.
        sigma: their noise level.
        num_probes: m; one call of the network and one backward pass each.
        batch_size: probes in one call.
        generator: source of randomness.

    Raises:
        ValueError: fewer than two probes, or another argument is wrong.
    """
    x = check_images(field, x, batch_size, num_probes=(num_probes, 2))
    sigma = check_sigma(field, sigma)
    return probes_at(field, x, sigma, image_seeds(len(x), generator), num_probes, batch_size)


def probes_at(
    field: ScoreField, x: torch.Tensor, sigma: float, seeds: list[int], num_probes: int, batch_size: int
) -> JacobianProbes:
    """See `jacobian_probes`; `seeds` are those of the images."""
    b = float(field.at(sigma).b)
    found = []
    for image, seed in enumerate(seeds):
        of_image, products, vectors = field.select(torch.tensor([image])), [], []
        for rows, signs in rows_of(x[image : image + 1], [seed], num_probes, batch_size, rademacher=True):
            at = x[image].expand(len(rows), *x.shape[1:])
            products.append(vector_jacobian(of_image, at, sigma, signs)[1].flatten(1))
            vectors.append(signs.flatten(1))
        v, g = torch.cat(vectors), torch.cat(products)
        m = (g @ v.T).double().cpu()
        diagonal = m.diagonal()
        norms, own = g.square().sum(1).double().cpu(), v.shape[1] - 2 * b * diagonal
        asymmetry = (m - m.T).square().sum() / (num_probes * (num_probes - 1))
        error = diagonal.std() / num_probes**0.5
        found.append(
            torch.stack(
                [
                    diagonal.mean(),
                    error,
                    norms.mean(),
                    asymmetry,
                    (own + b * b * norms).mean(),  # |v - b G|^2
                    b * b * asymmetry,
                ]
            )
        )
    return JacobianProbes(*torch.stack(found, 1))


def exact_jacobian(field: ScoreField, x: torch.Tensor, sigma: float, batch_size: int = 64) -> torch.Tensor:
    r"""Computes J at noisy samples, row by row: D calls of the network and D backward passes an image.

    Args:
        field: the denoiser.
        x: `(images, ...)`.
        sigma: their noise level.
        batch_size: rows in one call.

    Returns:
        `(images, D, D)`, entry (i, j) the derivative of \(E_i\) by \(x_j\).

    Raises:
        ValueError: an argument is wrong.
    """
    x = check_images(field, x, batch_size)
    sigma, dim = check_sigma(field, sigma), x[0].numel()
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    jacobian = torch.empty(len(x), dim, dim, dtype=dtype, device=x.device)
    units = torch.eye(dim, dtype=dtype, device=x.device).view(dim, *x.shape[1:])
    for image in range(len(x)):
        of_image = field.select(torch.tensor([image]))
        for part in torch.arange(dim).split(batch_size):
            at = x[image].expand(len(part), *x.shape[1:])
            jacobian[image, part] = vector_jacobian(of_image, at, sigma, units[part])[1].flatten(1)
    return jacobian
