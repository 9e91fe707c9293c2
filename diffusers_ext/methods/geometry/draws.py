"""Random rows of images, the same however images are batched, and what one noisy row tells of a field."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from diffusers_ext.generation.score_field import ScoreField
from diffusers_ext.generation.score_levels import as_levels
from diffusers_ext.training.config import is_number, is_whole, require

__all__ = [
    "check_images",
    "check_sigma",
    "check_sigmas",
    "check_tolerance",
    "default_sigmas",
    "denoising_moments",
    "image_seeds",
    "rows_of",
]


def image_seeds(count: int, generator: torch.Generator | None) -> list[int]:
    """Draws a seed for each image, one after the other: a batch is given what its images would be given alone."""
    if not isinstance(generator, torch.Generator | None):  # one for all: it draws their seeds
        raise ValueError(f"`generator` must be one torch.Generator or left out, got {generator!r}.")
    device = generator.device if generator is not None else "cpu"
    return [int(torch.randint(2**31, (1,), generator=generator, device=device)) for _ in range(count)]


def rows_of(
    x: torch.Tensor, seeds: Sequence[int], draws: int, batch_size: int, rademacher: bool = False
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields the draws of all images in batches.

    Args:
        x: `(images, ...)`.
        seeds: of each image.
        draws: of each image.
        batch_size: rows at most.
        rademacher: draw signs instead of normal values.

    Yields:
        The image of each row `(rows,)`, and what was drawn `(rows, ...)`.
    """
    rows: list[int] = []
    drawn: list[torch.Tensor] = []
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        found = torch.tensor(rows, device=x.device), torch.stack(drawn).to(x.device)
        rows.clear()
        drawn.clear()
        return found

    for image, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(draws):
            rows.append(image)
            if rademacher:
                signs = torch.randint(2, x.shape[1:], generator=generator)
                drawn.append((2 * signs - 1).to(dtype))
            else:
                drawn.append(torch.randn(x.shape[1:], generator=generator, dtype=dtype))
            if len(rows) == batch_size:
                yield batch()
    if rows:
        yield batch()


@torch.no_grad()
def denoising_moments(
    field: ScoreField, x: torch.Tensor, sigma: float, seeds: Sequence[int], draws: int, batch_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Noises every image and compares what the network sees with the noise.

    Returns:
        \(|E - \epsilon|^2\) and \(E \cdot (E - \epsilon)\) of every draw, both `(images, draws)` in float64.
    """
    errors, residuals = [], []
    for rows, noise in rows_of(x, seeds, draws, batch_size):
        seen = field.select(rows).eps(field.add_noise(x[rows], noise, sigma), sigma).flatten(1)
        error = seen - noise.flatten(1)
        errors.append(error.square().sum(1).double().cpu())
        residuals.append((seen * error).sum(1).double().cpu())
    return torch.cat(errors).view(len(x), draws), torch.cat(residuals).view(len(x), draws)


def default_sigmas(field: ScoreField, count: int = 25) -> list[float]:
    """Returns log-spaced sigmas over the scheduler's levels."""
    sigma = field.levels.sigma
    return torch.logspace(sigma[0].log10().item(), sigma[-1].log10().item(), count, dtype=torch.float64).tolist()


def check_sigmas(field: ScoreField, sigmas: float | Sequence[float] | torch.Tensor | None) -> list[float]:
    """Returns rising sigmas, the default ones for `None`.

    Raises:
        ValueError: none, one outside the scheduler's levels, or they do not rise.
    """
    if sigmas is None:
        return default_sigmas(field)
    found = as_levels(sigmas, "sigmas").flatten()
    if not len(found) or bool((found.diff() <= 0).any()):
        raise ValueError(f"`sigmas` must be one or more rising numbers, got {found.tolist()}.")
    field.at(found)
    return found.tolist()


def check_sigma(field: ScoreField, sigma: float | torch.Tensor) -> float:
    """Returns one sigma.

    Raises:
        ValueError: it is not one number within the scheduler's levels.
    """
    found = as_levels(sigma, "sigma")
    require(found.numel() == 1, "sigma", sigma, "one number")
    field.at(found)
    return float(found)


def check_images(
    field: ScoreField, x: torch.Tensor, batch_size: int, least: int = 1, name: str = "x", **counts: tuple[int, int]
) -> torch.Tensor:
    """Checks the field, images (called `name`), the batch size, and counts by name, each with the least accepted.

    Returns:
        The images without gradient, in float32 or float64.

    Raises:
        ValueError: one of them is wrong; the message names it.
    """
    if not isinstance(field, ScoreField):
        raise ValueError(f"`field` must be a ScoreField, got {type(field).__name__}.")
    images = isinstance(x, torch.Tensor) and x.is_floating_point() and x.ndim >= 2 and x.numel() > 0
    if not images or len(x) < least:
        found = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(f"`{name}` must be floats of the shape (images >= {least}, ...), got {found}.")
    require(bool(torch.isfinite(x).all()), name, "NaN or infinity", "finite")
    for count, (value, minimum) in {"batch_size": (batch_size, 1), **counts}.items():
        require(is_whole(value, minimum), count, value, f"an integer >= {minimum}")
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def check_tolerance(tol: float) -> None:
    """Checks the tolerance of a solver."""
    require(is_number(tol) and 0 < tol < 1, "tol", tol, "a number between 0 and 1")
