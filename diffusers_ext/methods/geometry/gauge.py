r"""How far a field is from a score, and fields that differ from it by a gauge.

A field is the gradient of a log-density plus a remainder r. Densities and samples are those of the gradient part
exactly if \(\mathrm{div}(p\, r) = 0\), a gauge freedom (arXiv 2402.03845, section 3): an asymmetric Jacobian alone
tells nothing, and neither does a symmetric one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from diffusers_ext.generation.score_field import ScoreField
from diffusers_ext.training.config import is_number

from .draws import check_images, check_sigmas, denoising_moments, image_seeds, rows_of
from .jacobian import probes_at

__all__ = [
    "Conservativity",
    "GaugeResidual",
    "SteinResidual",
    "TestFunctions",
    "conservativity",
    "gauge_residual",
    "gauge_transform",
    "ratio_error",
    "stein_residual",
    "weak_terms",
]

FUNCTIONS = 32  # linear ones, and as many random cosines


@dataclass(frozen=True)
class SteinResidual:
    r"""\(R = \mathbb E[E \cdot (E - \epsilon)]\) by noise level, `(sigmas,)` float64 tensors.

    Attributes:
        sigmas: noise levels.
        value: R; 0 for the score, \(b^2 \mathbb E|r|^2\) if the error r is a gauge.
        standard_error: of R, over images.
        denoising_error: \(\mathbb E|E - \epsilon|^2\), the training loss summed over an image.
    """

    sigmas: torch.Tensor
    value: torch.Tensor
    standard_error: torch.Tensor
    denoising_error: torch.Tensor

    @property
    def masked(self) -> torch.Tensor:
        """Where the field is no score: |R| less two standard errors is beyond a tenth of the denoising error."""
        return self.value.abs() - 2 * self.standard_error > 0.1 * self.denoising_error

    @classmethod
    def of_draws(cls, sigmas: Sequence[float], residuals: torch.Tensor, errors: torch.Tensor) -> SteinResidual:
        """Takes means over images of `(images, sigmas)` values that were averaged over their draws."""
        of = torch.as_tensor(sigmas, dtype=torch.float64)
        return cls(of, residuals.mean(0), residuals.std(0) / len(residuals) ** 0.5, errors.mean(0))


def stein_residual(
    field: ScoreField,
    x: torch.Tensor,
    sigmas: float | Sequence[float] | None = None,
    num_draws: int = 1,
    batch_size: int = 32,
    generator: torch.Generator | None = None,
) -> SteinResidual:
    """Measures on a data set how far a field is from the score, by forward passes alone.

    Only the mean over data is 0 for the true score, not the value of one image: hence at least two images, of the data
    that the network was trained on.

    Args:
        field: the denoiser.
        x: `(images, ...)` clean samples.
        sigmas: noise levels; by default 25 log-spaced ones over the scheduler's.
        num_draws: noises an image and level.
        batch_size: samples in one call.
        generator: source of randomness.

    Raises:
        ValueError: fewer than two images, or another argument is wrong.
    """
    x = check_images(field, x, batch_size, least=2, num_draws=(num_draws, 1))
    levels, seeds = check_sigmas(field, sigmas), image_seeds(len(x), generator)
    moments = [denoising_moments(field, x, sigma, seeds, num_draws, batch_size) for sigma in levels]
    errors, residuals = (torch.stack([pair[k].mean(1) for pair in moments], 1) for k in (0, 1))
    return SteinResidual.of_draws(levels, residuals, errors)


class TestFunctions:
    r"""The functions \(\phi\) of the weak residual: \(|x|^2/2\), 32 linear ones and 32 cosines of random directions.

    Args:
        dim: values a sample.
        seed: of the directions; images that are measured apart need the same.
    """

    __test__ = False  # no class of tests

    def __init__(self, dim: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        linear = torch.randn(FUNCTIONS, dim, generator=generator, dtype=torch.float64)
        self.linear = linear / linear.norm(dim=1, keepdim=True)
        self.waves = torch.randn(FUNCTIONS, dim, generator=generator, dtype=torch.float64) / dim**0.5
        self.phases = 2 * torch.pi * torch.rand(FUNCTIONS, generator=generator, dtype=torch.float64)
        self.names = [
            "|x|^2/2",
            *(f"linear {i}" for i in range(FUNCTIONS)),
            *(f"cosine {i}" for i in range(FUNCTIONS)),
        ]

    def along(self, x: torch.Tensor, direction: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        r"""Returns \(\nabla\phi(x) \cdot d\) and \(|\nabla\phi(x)|^2\), both `(rows, functions)`, of flat rows."""
        linear, waves, phases = (value.to(x) for value in (self.linear, self.waves, self.phases))
        slopes = -(x @ waves.T + phases).sin()
        products = [(x * direction).sum(1, keepdim=True), direction @ linear.T, slopes * (direction @ waves.T)]
        norms = [x.square().sum(1, keepdim=True), x.new_ones(len(x), FUNCTIONS), slopes**2 * waves.square().sum(1)]
        return torch.cat(products, 1), torch.cat(norms, 1)


@torch.no_grad()
def weak_terms(
    field: ScoreField,
    x: torch.Tensor,
    sigma: float,
    functions: TestFunctions,
    seeds: list[int],
    draws: int,
    batch_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns every image's mean of -(E - e).grad phi / b and of |grad phi|^2, both `(images, functions)` float64."""
    b, values, norms = float(field.at(sigma).b), [], []
    for rows, noise in rows_of(x, seeds, draws, batch_size):
        noisy = field.add_noise(x[rows], noise, sigma)
        error = (field.select(rows).eps(noisy, sigma) - noise).flatten(1)
        product, norm = functions.along(noisy.flatten(1), error)
        values.append(-product.double().cpu() / b)
        norms.append(norm.double().cpu())
    value, norm = (torch.cat(found).view(len(x), draws, -1).mean(1) for found in (values, norms))
    return value, norm


@dataclass(frozen=True)
class GaugeResidual:
    r"""The weak gauge residual, `(sigmas, functions)` float64 tensors.

    Attributes:
        sigmas: noise levels.
        value: \(G(\phi) = -\mathbb E[(E - \epsilon)\cdot\nabla\phi(x_t)]/b\), which is 0 for every \(\phi\) exactly if
            the field's gradient part is the score.
        standard_error: of G, over images.
        scale: \(\sqrt{\mathbb E|\nabla\phi|^2}\).
        names: of the functions.
    """

    sigmas: torch.Tensor
    value: torch.Tensor
    standard_error: torch.Tensor
    scale: torch.Tensor
    names: list[str]

    @property
    def relative(self) -> torch.Tensor:
        """G over the function's scale: values of all functions compare."""
        return self.value / self.scale

    @property
    def z(self) -> torch.Tensor:
        """G in standard errors."""
        return self.value / self.standard_error

    @classmethod
    def of_terms(cls, sigmas: Sequence[float], values: torch.Tensor, norms: torch.Tensor) -> GaugeResidual:
        """Takes means over images of `(images, sigmas, functions)` terms."""
        names = TestFunctions(1).names
        of = torch.as_tensor(sigmas, dtype=torch.float64)
        return cls(of, values.mean(0), values.std(0) / len(values) ** 0.5, norms.mean(0).sqrt(), names)


def gauge_residual(
    field: ScoreField,
    x: torch.Tensor,
    sigmas: float | Sequence[float] | None = None,
    num_draws: int = 1,
    batch_size: int = 32,
    generator: torch.Generator | None = None,
    functions: TestFunctions | None = None,
) -> GaugeResidual:
    r"""Tests whether the gradient part of a field is the score, from data and forward passes alone.

    Args:
        field: the denoiser.
        x: `(images, ...)` clean samples, of the data that the network was trained on.
        sigmas: noise levels; by default 25 log-spaced ones over the scheduler's.
        num_draws: noises an image and level.
        batch_size: samples in one call.
        generator: source of randomness.
        functions: by default \(|x|^2/2\), 32 linear ones and 32 random cosines.

    Raises:
        ValueError: fewer than two images, or another argument is wrong.
    """
    x = check_images(field, x, batch_size, least=2, num_draws=(num_draws, 1))
    levels, seeds = check_sigmas(field, sigmas), image_seeds(len(x), generator)
    functions = functions or TestFunctions(x[0].numel())
    if not isinstance(functions, TestFunctions) or functions.linear.shape[1] != x[0].numel():
        raise ValueError(f"`functions` must be TestFunctions of {x[0].numel()} values, got {functions!r}.")
    terms = [weak_terms(field, x, sigma, functions, seeds, num_draws, batch_size) for sigma in levels]
    values, norms = (torch.stack(found, 1) for found in zip(*terms, strict=True))
    return GaugeResidual.of_terms(levels, values, norms)


@dataclass(frozen=True)
class Conservativity:
    r"""How asymmetric the Jacobian is at noisy data, `(sigmas,)` float64 tensors; 0 for a gradient, at most 1.

    Attributes:
        sigmas: noise levels.
        eps: \(|J - J^\top|^2 / 4|J|^2\) of \(J = \partial E/\partial x\), means over images above and below.
        eps_error: its standard error.
        denoiser: the same of the denoiser's Jacobian \(N = I - bJ\); the one to quote.
        denoiser_error: its standard error.
    """

    sigmas: torch.Tensor
    eps: torch.Tensor
    eps_error: torch.Tensor
    denoiser: torch.Tensor
    denoiser_error: torch.Tensor


def ratio_error(above: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
    """Returns the standard error of mean(above) / mean(below) over the first dimension, to first order."""
    ratio = above.mean(0) / below.mean(0)
    return (above - ratio * below).std(0) / below.mean(0).abs() / len(above) ** 0.5


def conservativity(
    field: ScoreField,
    x: torch.Tensor,
    sigmas: float | Sequence[float] | None = None,
    num_probes: int = 32,
    batch_size: int = 32,
    generator: torch.Generator | None = None,
) -> Conservativity:
    """Measures how asymmetric the Jacobian of a field is, at one noisy sample of each image.

    An asymmetric field may have the right density and a symmetric one the wrong one; see `gauge_residual`. Symmetry
    matters where dimension is read from the field (arXiv 2402.03845, section 4).

    Args:
        field: the denoiser.
        x: `(images, ...)` clean samples.
        sigmas: noise levels; by default 25 log-spaced ones over the scheduler's.
        num_probes: probes an image and level, see `jacobian_probes`.
        batch_size: probes in one call.
        generator: source of randomness.

    Raises:
        ValueError: fewer than two images or probes, or another argument is wrong.
    """
    x = check_images(field, x, batch_size, least=2, num_probes=(num_probes, 2))
    levels, seeds = check_sigmas(field, sigmas), image_seeds(len(x), generator)
    columns = []
    for sigma in levels:
        noise = torch.cat([drawn for _, drawn in rows_of(x, seeds, 1, len(x))])
        found = probes_at(field, field.add_noise(x, noise, sigma), sigma, seeds, num_probes, batch_size)
        of_eps = found.squared_asymmetry / 4, found.squared_norm
        of_denoiser = found.denoiser_squared_asymmetry / 4, found.denoiser_squared_norm
        row = [(a.mean() / n.mean(), ratio_error(a, n)) for a, n in (of_eps, of_denoiser)]
        columns.append(torch.stack([*row[0], *row[1]]))
    return Conservativity(torch.tensor(levels, dtype=torch.float64), *torch.stack(columns, 1))


Beta = float | Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def gauge_transform(field: ScoreField, Q: torch.Tensor, beta: Beta = 1.0) -> ScoreField:  # noqa: N803
    r"""Adds the gauge \(r = Q\,\nabla(\beta p)/p = Q\nabla\beta + \beta\, Q s\) to a field.

    If the field is the score of p, densities and samples by its probability flow stay those of p, for any
    antisymmetric Q and any \(\beta\): \(\mathrm{div}(p\, r) = 0\).

    Args:
        field: the denoiser.
        Q: `(D, D)`, antisymmetric, on flattened samples.
        beta: a number, or a function of \(y = x_t/a\) `(batch, ...)` and sigma `(batch,)` that returns `(batch,)`.

    Returns:
        A field with the same levels.

    Raises:
        ValueError: Q is no antisymmetric matrix.
    """
    if not isinstance(field, ScoreField):
        raise ValueError(f"`field` must be a ScoreField, got {type(field).__name__}.")
    floats = isinstance(Q, torch.Tensor) and Q.is_floating_point() and Q.numel() > 0
    square = floats and Q.ndim == 2 and Q.shape[0] == Q.shape[1] and bool(torch.isfinite(Q).all())
    if not square or not torch.allclose(Q, -Q.T, atol=1e-6 * float(Q.abs().max())):
        found = f"one of shape {tuple(Q.shape)}" if isinstance(Q, torch.Tensor) else type(Q).__name__
        raise ValueError(f"`Q` must be an antisymmetric (D, D) matrix of finite numbers, got {found}.")
    if not callable(beta) and not is_number(beta):
        raise ValueError(f"`beta` must be a finite number or a function of y and sigma, got {beta!r}.")
    return _Gauged(field, Q, beta)


class _Gauged(ScoreField):
    def __init__(self, field: ScoreField, Q: torch.Tensor, beta: Beta) -> None:  # noqa: N803
        self.field, self.Q, self.beta, self.schedule = field, Q, beta, field.schedule
        self.model_kwargs: dict[str, Any] = {}

    def select(self, rows: torch.Tensor) -> ScoreField:
        return _Gauged(self.field.select(rows), self.Q, self.beta)

    def eps(self, x: torch.Tensor, sigma: float | torch.Tensor, beyond: bool = False) -> torch.Tensor:
        seen = self.field.eps(x, sigma, beyond)
        if len(self.Q) != x[0].numel():
            raise ValueError(f"`x` must have {len(self.Q)} values an image, as `Q` is for, got {x[0].numel()}.")
        Q = self.Q.to(seen)  # noqa: N806
        if not callable(self.beta):
            return seen + self.beta * (seen.flatten(1) @ Q.T).view_as(seen)
        graph = x.requires_grad and torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            a, b = self.field.coefficients(sigma, x, beyond)
            levels = torch.as_tensor(sigma, dtype=seen.dtype, device=x.device).expand(len(x))
            y = (x if graph else x.detach().clone().requires_grad_()) / a
            beta = self.beta(y, levels)
            if not isinstance(beta, torch.Tensor) or beta.shape != (len(x),):
                raise ValueError(f"`beta` must return a tensor of the shape ({len(x)},), got {beta!r}.")
            if not beta.requires_grad:
                raise ValueError(
                    "`beta` must return a function of y that is differentiable; give a constant as a number."
                )
            slope = torch.autograd.grad(beta.sum(), y, create_graph=graph)[0].flatten(1)
        ratio = (b / a).view(-1, 1)  # the gradient by x is that by y over a
        turned = beta.view(-1, 1) * (seen.flatten(1) @ Q.T) - ratio * (slope @ Q.T)
        return seen + turned.view_as(seen)
