r"""Local intrinsic dimension: of how many dimensions the data is around an image, seen at a noise level.

On normal data of eigenvalues \(\lambda\) the data means of `dsm` and `trace` are
\(d(\sigma) = \sum \lambda/(\lambda + \sigma^2)\): directions count that are wider than the noise. So dimension is a
curve over \(\sigma\), and a number only where the curve is flat.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from diffusers_ext.generation.score_field import ScoreField
from diffusers_ext.training.config import is_whole, require

from .draws import check_images, check_sigma, check_sigmas, check_tolerance, denoising_moments, image_seeds, rows_of
from .flow import flow_jacobian, probability_flow
from .gauge import SteinResidual
from .jacobian import probes_at
from .likelihood import log_likelihood

__all__ = ["LocalDimension", "find_plateau", "local_dimension", "rank_by_dimension", "slope_errors"]

Method = Literal["dsm", "trace", "flipd", "normal_bundle", "lidl", "flow_map"]
METHODS = ("dsm", "trace", "flipd", "normal_bundle", "lidl", "flow_map")
LARGEST = {"normal_bundle": 4096, "flow_map": 256}  # values a sample: a matrix of their square is held
FLAT = 0.2  # |d ln LID / d ln sigma| below which a curve is a plateau


@dataclass(frozen=True)
class LocalDimension:
    """Local dimension of every image by noise level.

    Attributes:
        sigmas: `(sigmas,)` noise levels.
        curve: `(images, sigmas)` float64.
        standard_error: the same shape, from the random draws; NaN where the method has none.
        masked: `(sigmas,)` bool: levels at which the field is no score, by the Stein residual of a data set.
        plateau: the sigma of each image's plateau, `None` where the curve has none, or, by `"dsm"`, where it may be
            flat by the chance of the draws; then the curve is the answer.
        value: the dimension there, or `None`.
    """

    sigmas: torch.Tensor
    curve: torch.Tensor
    standard_error: torch.Tensor
    masked: torch.Tensor
    plateau: list[float | None]
    value: list[float | None]


def find_plateau(
    sigmas: torch.Tensor,
    curve: torch.Tensor,
    dim: int,
    masked: torch.Tensor | None = None,
    slope_error: torch.Tensor | None = None,
) -> tuple[float, float] | None:
    """Finds where a curve of dimension over sigma is flattest.

    Args:
        sigmas: `(sigmas,)`, rising.
        curve: `(sigmas,)`.
        dim: values a sample, D.
        masked: `(sigmas,)` bool, levels that do not count.
        slope_error: `(sigmas,)` standard errors of the slopes, twice which are added to them: a few random draws make
            some curves flat by chance.

    Returns:
        Sigma and dimension where |d ln LID / d ln sigma| is least among 0.5 < LID < 0.9 D, or `None` if it is 0.2 or
        more there or nothing counts.

    Raises:
        ValueError: an argument is wrong.

    Example:
        >>> import torch
        >>> from diffusers_ext import find_plateau
        >>> sigmas = torch.logspace(-2, 1, 25)
        >>> plane = 3 / (1 + sigmas**2)  # three directions of standard deviation 1
        >>> round(find_plateau(sigmas, plane, dim=64)[1], 2)
        3.0
    """
    if not isinstance(sigmas, torch.Tensor) or not isinstance(curve, torch.Tensor):
        kinds = type(sigmas).__name__, type(curve).__name__
        raise ValueError(f"`sigmas` and `curve` must be tensors of one shape (sigmas,), got {kinds}.")
    if sigmas.ndim != 1 or sigmas.shape != curve.shape:
        shapes = tuple(sigmas.shape), tuple(curve.shape)
        raise ValueError(f"`sigmas` and `curve` must be tensors of one shape (sigmas,), got {shapes}.")
    if masked is not None and (getattr(masked, "dtype", None) != torch.bool or masked.shape != sigmas.shape):
        raise ValueError(f"`masked` must be bool of the shape {tuple(sigmas.shape)}, got {masked!r}.")
    if slope_error is not None and getattr(slope_error, "shape", None) != sigmas.shape:
        found = tuple(getattr(slope_error, "shape", ())) or slope_error
        raise ValueError(f"`slope_error` must have the shape {tuple(sigmas.shape)}, got {found}.")
    require(is_whole(dim), "dim", dim, "an integer >= 1")
    rising = bool((sigmas > 0).all() and (sigmas.diff() > 0).all())
    require(rising, "sigmas", sigmas.tolist(), "rising numbers > 0")
    if len(sigmas) < 2:
        return None
    sigmas, curve = sigmas.double().cpu(), curve.double().cpu()
    counted = (curve > 0.5) & (curve < 0.9 * dim)
    if masked is not None:
        counted &= ~masked.cpu()
    slope = torch.gradient(curve.clamp(min=1e-12).log(), spacing=(sigmas.log(),))[0].abs()
    if slope_error is not None:
        slope = slope + 2 * slope_error.double().cpu()
    slope = torch.where(counted, slope, math.inf)
    best = int(slope.argmin())
    return (sigmas[best].item(), curve[best].item()) if slope[best] < FLAT else None


def slope_errors(levels: Sequence[float], draws: torch.Tensor) -> torch.Tensor:
    """Returns the standard errors of d ln LID / d ln sigma, `(images, sigmas)`, from draws that levels have in common.

    Args:
        levels: rising noise levels.
        draws: `(images, draws, sigmas)`, whose means over draws are the dimensions.
    """
    relative = draws / draws.mean(1, keepdim=True).clamp(min=1e-12)
    if len(levels) < 2:
        return torch.zeros_like(draws[:, 0])
    spacing = torch.tensor(levels, dtype=draws.dtype).log()
    slopes = torch.gradient(relative, spacing=(spacing,), dim=2)[0]
    return slopes.std(1) / draws.shape[1] ** 0.5


def local_dimension(
    field: ScoreField,
    x: torch.Tensor,
    method: Method = "dsm",
    sigmas: float | Sequence[float] | None = None,
    num_draws: int | None = None,
    batch_size: int = 32,
    generator: torch.Generator | None = None,
    residual: SteinResidual | None = None,
    num_steps: int = 100,
    tol: float = 1e-4,
) -> LocalDimension:
    r"""Estimates the local intrinsic dimension of data around images.

    - `"dsm"`: \(\mathbb E|E(a x_0 + b\epsilon) - \epsilon|^2\), forward passes alone (arXiv 2510.12975).
    - `"trace"`: \(D - b\,\mathrm{tr} J\) at \(a x_0\).
    - `"flipd"`: that plus \(|E(a x_0)|^2\) (arXiv 2406.03537).
    - `"normal_bundle"`: of the singular values of centred rows \(E(a x_0 + b\epsilon)/\sqrt n\), those below 1/2
      (arXiv 2212.12611): directions with \(\lambda > \sigma^2\).
    - `"lidl"`: D plus the slope of \(\log p_\sigma(x_0)\) over \(\log\sigma\) by the probability flow (2206.14882).
    - `"flow_map"`: of the singular values of a sampler's Jacobian, those above \(\sqrt2\,\sigma\): the sampler is
      DDIM from the noise that leads to the image.

    Args:
        field: the denoiser.
        x: `(images, ...)` clean samples.
        method: one of the six.
        sigmas: rising noise levels; by default 25 log-spaced ones over the scheduler's. `"lidl"` takes two or more.
        num_draws: noises (or probes) an image and level; by default 32, for `"normal_bundle"` 8 D, and D or more.
        batch_size: rows in one call.
        generator: source of randomness. An image has the same noises at all levels.
        residual: the Stein residual of a data set at the same sigmas, which tells where the field is no score. `"dsm"`
            takes it from its own calls if x has two images or more; otherwise nothing is masked without it.
        num_steps: levels of the sampler of `"flow_map"`.
        tol: tolerance of the likelihoods of `"lidl"`.

    Raises:
        ValueError: an argument is wrong, or D is too large for the method (4,096 for `"normal_bundle"`, 256 for
            `"flow_map"`).
    """
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {METHODS}, got {method!r}.")
    x = check_images(field, x, batch_size)
    dim = x[0].numel()
    if dim > LARGEST.get(method, dim):
        raise ValueError(f"`x` must have at most {LARGEST[method]} values an image for {method!r}, got {dim}.")
    draws = num_draws if num_draws is not None else 8 * dim if method == "normal_bundle" else 32
    # Fewer rows than values span no more, and what they leave would count as directions of the data.
    least = dim if method == "normal_bundle" else 2
    for name, value, minimum in (("num_draws", draws, least), ("num_steps", num_steps, 2)):
        require(is_whole(value, minimum), name, value, f"an integer >= {minimum}")
    levels = check_sigmas(field, sigmas)
    if method == "lidl" and len(levels) < 2:
        raise ValueError(f"`sigmas` must be two or more for 'lidl', which takes a slope, got {levels}.")
    if residual is not None and not (isinstance(residual, SteinResidual) and residual.sigmas.tolist() == levels):
        raise ValueError("`residual` must be a SteinResidual of the same sigmas as the dimension.")
    check_tolerance(tol)
    seeds = image_seeds(len(x), generator)
    flatness = torch.zeros(len(x), len(levels), dtype=torch.float64)
    if method == "lidl":
        curve = _lidl(field, x, levels, draws, batch_size, seeds, tol)
        error = torch.full_like(curve, math.nan)
    elif method == "flow_map":
        curve = _flow_map(field, x, levels, num_steps, batch_size)
        error = torch.full_like(curve, math.nan)
    elif method == "dsm":
        moments = [denoising_moments(field, x, sigma, seeds, draws, batch_size) for sigma in levels]
        curve, residuals = (torch.stack([pair[k].mean(1) for pair in moments], 1) for k in (0, 1))
        error = torch.stack([pair[0].std(1) / draws**0.5 for pair in moments], 1)
        flatness = slope_errors(levels, torch.stack([pair[0] for pair in moments], 2))
        if residual is None and len(x) > 1:
            residual = SteinResidual.of_draws(levels, residuals, curve)
    else:
        of_level = {"trace": _trace, "flipd": _trace, "normal_bundle": _normal_bundle}[method]
        columns = [of_level(field, x, sigma, draws, batch_size, seeds, method == "flipd") for sigma in levels]
        curve, error = (torch.stack(found, 1) for found in zip(*columns, strict=True))
    of = torch.tensor(levels, dtype=torch.float64)
    masked = residual.masked if residual is not None else torch.zeros(len(levels), dtype=torch.bool)
    found = [find_plateau(of, row, dim, masked, more) for row, more in zip(curve, flatness, strict=True)]
    plateaus, values = ([None if f is None else f[k] for f in found] for k in (0, 1))
    return LocalDimension(of, curve, error, masked, plateaus, values)


Column = tuple[torch.Tensor, torch.Tensor]


def _trace(
    field: ScoreField, x: torch.Tensor, sigma: float, draws: int, batch_size: int, seeds: list[int], flipd: bool
) -> Column:
    a, b = (float(value) for value in (field.at(sigma).a, field.at(sigma).b))
    probes = probes_at(field, a * x, sigma, seeds, draws, batch_size)
    found = x[0].numel() - b * probes.trace
    if flipd:
        for rows in torch.arange(len(x)).split(batch_size):
            with torch.no_grad():
                seen = field.select(rows).eps(a * x[rows], sigma)
            found[rows] += seen.flatten(1).square().sum(1).double().cpu()
    return found, b * probes.trace_error


@torch.no_grad()
def _normal_bundle(
    field: ScoreField, x: torch.Tensor, sigma: float, draws: int, batch_size: int, seeds: list[int], _: bool
) -> Column:
    counts = [int((values < 0.5).sum()) for values in normal_bundle_values(field, x, sigma, draws, batch_size, seeds)]
    count = torch.tensor(counts, dtype=torch.float64)
    return count, torch.full_like(count, math.nan)


@torch.no_grad()
def normal_bundle_values(
    field: ScoreField, x: torch.Tensor, sigma: float, draws: int, batch_size: int, seeds: list[int]
) -> list[torch.Tensor]:
    """Returns the singular values of every image's centred rows over sqrt(draws), falling; one Gram matrix is held."""
    found = []
    for image, seed in enumerate(seeds):
        one, of_image = x[image : image + 1], field.select(torch.tensor([image]))
        dim = one.numel()
        gram = torch.zeros(dim, dim, dtype=torch.float64)
        total = torch.zeros(dim, dtype=torch.float64)
        for rows, noise in rows_of(one, [seed], draws, batch_size):
            seen = of_image.eps(field.add_noise(one[rows], noise, sigma), sigma).flatten(1).double().cpu()
            gram += seen.T @ seen
            total += seen.sum(0)
        gram = gram / draws - torch.outer(total, total) / draws**2
        require(bool(gram.isfinite().all()), "field", "NaN or infinity", f"finite at sigma {sigma:.4g}")
        found.append(torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0))
    return found


def _lidl(
    field: ScoreField, x: torch.Tensor, levels: list[float], draws: int, batch_size: int, seeds: list[int], tol: float
) -> torch.Tensor:
    rows = []
    for image, seed in enumerate(seeds):
        of_image, one = field.select(torch.tensor([image])), x[image : image + 1]
        nats = [
            log_likelihood(
                of_image,
                one,
                sigma,
                tol=tol,
                num_probes=draws,
                batch_size=batch_size,
                generator=torch.Generator().manual_seed(seed),  # the same probes, so that their error cancels
            ).nats[0]
            for sigma in levels
        ]
        spacing = torch.tensor(levels, dtype=torch.float64).log()
        rows.append(one.numel() + torch.gradient(torch.stack(nats), spacing=(spacing,))[0])
    return torch.stack(rows)


def _flow_map(
    field: ScoreField, x: torch.Tensor, levels: list[float], num_steps: int, batch_size: int
) -> torch.Tensor:
    high = float(field.levels.sigma[-1])
    grid = torch.logspace(math.log10(levels[0]), math.log10(high), num_steps, dtype=torch.float64).tolist()
    grid = sorted({*grid[1:-1], high, *levels}, reverse=True)
    counts = torch.full((len(x), len(levels)), float(x[0].numel()), dtype=torch.float64)
    for image in range(len(x)):
        of_image = field.select(torch.tensor([image]))
        noise = probability_flow(of_image, x[image : image + 1], grid[::-1])
        for sigma, jacobian in zip(grid[1:], flow_jacobian(of_image, noise, grid, "ddim", batch_size), strict=True):
            if sigma in levels:
                values = torch.linalg.svdvals(jacobian[0].double())
                counts[image, levels.index(sigma)] = float((values > 2**0.5 * sigma).sum())
    return counts


def rank_by_dimension(
    field: ScoreField,
    x: torch.Tensor,
    sigma: float | None = None,
    num_draws: int = 32,
    batch_size: int = 32,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Ranks the images of a data set by local dimension: too simple ones first, odd ones last.

    All images are compared at one noise level, by `"dsm"`.

    Args:
        field: the denoiser.
        x: `(images, ...)` clean samples, of the data that the network was trained on.
        sigma: noise level; by default that of the plateau of the mean curve, or, if it has none, the least of 25
            log-spaced ones at which the field is a score by its Stein residual.
        num_draws: noises an image.
        batch_size: samples in one call.
        generator: source of randomness.

    Returns:
        Indices `(images,)` by rising dimension, dimensions `(images,)` in the images' own order, and sigma.

    Raises:
        ValueError: an argument is wrong, or the field is a score at none of the levels.
    """
    x = check_images(field, x, batch_size, least=2, num_draws=(num_draws, 2))
    sigma = None if sigma is None else check_sigma(field, sigma)
    found = local_dimension(field, x, sigmas=sigma, num_draws=num_draws, batch_size=batch_size, generator=generator)
    index = 0
    if sigma is None:
        flat = find_plateau(found.sigmas, found.curve.mean(0), x[0].numel(), found.masked)
        if flat is None and bool(found.masked.all()):
            raise ValueError(
                "`field` must be a score at some noise level, got a Stein residual beyond the mask at all."
            )
        index = int((~found.masked).nonzero()[0]) if flat is None else found.sigmas.tolist().index(flat[0])
    values = found.curve[:, index]
    require(bool(values.isfinite().all()), "field", "NaN or infinity", f"finite at sigma {found.sigmas[index]:.4g}")
    return values.argsort(stable=True), values, found.sigmas[index].item()
