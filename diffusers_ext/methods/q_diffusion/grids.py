"""Uniform quantization grids: integers q of b bits stand for the numbers (q - z) d."""

from __future__ import annotations

from typing import Literal

import torch

__all__ = ["ScaleMethod", "fake_quantize", "quantization_grid", "quantize"]

ScaleMethod = Literal["max", "mse"]

CANDIDATES, POWER = 80, 2.4  # ranges tried by "mse", and the power of the error that chooses among them
SMALLEST = 1e-8  # of all steps
CACHED = 2**16  # numbers that are tried together: as many as a processor's cache holds


def quantization_grid(
    x: torch.Tensor,
    bits: int,
    method: ScaleMethod = "max",
    symmetric: bool = False,
    per_channel: bool = False,
    zero_at_0: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Finds the step d and the zero point z of a quantizer of `bits` bits (section 3 of arXiv 2302.04304, 1911.07190).

    The range always holds 0. "max" takes the whole range of x. "mse" shrinks it by 0, 1, ..., 79 % and keeps the range
    of least mean `|x - x_hat|^2.4`, the first of equal ones. A symmetric grid has `2^(b-1) - 1` steps to either side
    of 0, and one more below.

    Args:
        x: any shape; with `per_channel` `(channels, ...)`.
        bits: b, 2..16.
        method: `"max"` or `"mse"`.
        symmetric: a grid that is symmetric about 0.
        per_channel: a grid of its own for each row of x.
        zero_at_0: z = 0 and d = max / (2^b - 1), for what is never negative, such as attention probabilities.

    Returns:
        d and z in fp32, `(channels,)`, or `()` without `per_channel`. z is a whole number in `0..2^b - 1`, for a
        symmetric grid `2^(b-1)`: its integers are stored shifted to the same range.

    Raises:
        ValueError: an argument is outside its range, or x is empty.

    Example:
        >>> import torch
        >>> from diffusers_ext import quantization_grid
        >>> step, zero = quantization_grid(torch.tensor([-1.0, 0.0, 2.0]), bits=2)
        >>> step.item(), zero.item()
        (1.0, 1.0)
    """
    if not isinstance(bits, int) or not 2 <= bits <= 16:
        raise ValueError(f"`bits` must be an integer in 2..16, got {bits!r}.")
    if method not in ("max", "mse"):
        raise ValueError(f"`method` must be one of ['max', 'mse'], got {method!r}.")
    if not x.numel():
        raise ValueError(f"`x` must hold at least one number, got the shape {tuple(x.shape)}.")
    rows = x.detach().float()
    rows = rows.reshape(len(x), -1) if per_channel else rows.reshape(1, -1)
    low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    if zero_at_0:
        low = torch.zeros_like(low)
    if method == "max":
        # In double precision, so that a range of whole steps does not round to another zero point.
        step, zero = (value.float() for value in _grid(low.double(), high.double(), bits, symmetric))
    else:
        count = max(1, CACHED // rows.shape[1])
        pieces = zip(rows.split(count), low.split(count), high.split(count), strict=True)
        found = [_least_error(*piece, bits, symmetric) for piece in pieces]
        step, zero = torch.cat([step for step, _ in found]), torch.cat([zero for _, zero in found])
    return (step, zero) if per_channel else (step[0], zero[0])


def _grid(low: torch.Tensor, high: torch.Tensor, bits: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if symmetric:
        half = 2 ** (bits - 1)
        step = (torch.maximum(-low, high) / (half - 1)).clamp(min=SMALLEST)
        return step, torch.full_like(step, half)
    step = ((high - low) / (2**bits - 1)).clamp(min=SMALLEST)
    return step, (-low / step).round()


def _least_error(
    rows: torch.Tensor, low: torch.Tensor, high: torch.Tensor, bits: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    least = torch.full_like(low, torch.inf)
    best_step, best_zero = torch.empty_like(low), torch.empty_like(low)
    for i in range(CANDIDATES):
        shrink = 1.0 - i * 0.01
        step, zero = _grid(low * shrink, high * shrink, bits, symmetric)
        error = fake_quantize(rows, step[:, None], zero[:, None], bits).sub_(rows).abs_().pow_(POWER).mean(1)
        better = error < least
        least = torch.where(better, error, least)
        best_step, best_zero = torch.where(better, step, best_step), torch.where(better, zero, best_zero)
    return best_step, best_zero


def quantize(x: torch.Tensor, step: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns the integers `clamp(round(x / d) + z, 0, 2^b - 1)` as floating-point numbers, halves rounded to even.

    Args:
        x: any shape.
        step: d, of a shape that broadcasts to x.
        zero: z, likewise.
        bits: b.
    """
    return ((x / step).round() + zero).clamp(0, 2**bits - 1)


def fake_quantize(x: torch.Tensor, step: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns `(q - z) d`: x as it comes back from its integers; see `quantize`."""
    return (quantize(x, step, zero, bits) - zero) * step
