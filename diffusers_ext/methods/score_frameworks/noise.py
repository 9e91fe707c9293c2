r"""Simplex noise: smooth random fields of several sizes, for anomalies that are larger than pixels (AnoDDPM).

In three dimensions the vertices of the simplex lattice carry random gradients g of length 1, and a point p gets
\(\sum_v \max(1/2 - |p - v|^2, 0)^4\, g_v \cdot (p - v)\) over the vertices v around it. An image is a plane through it
at a random place. Octaves of half the size each are added.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from accelerate import Accelerator

from diffusers_ext.rng import StepRNG
from diffusers_ext.training.config import is_number, is_whole, require

__all__ = ["SimplexNoise"]

TABLE = 512  # gradients of a field; vertices share them by a hash
PRIMES = (73856093, 19349663, 83492791)
SPREAD = 1e4  # of the random places, in cells of the lattice: no place is likelier than another
# Variance of one octave: vertices have the density 2, gradients the variance 1/3 a coordinate, and
# 2 * 4 pi / 3 * integral of (1/2 - r^2)^8 r^4 dr is a beta function.
VARIANCE = 8 * math.pi / 3 * 0.5**11.5 * math.gamma(2.5) * math.gamma(9) / math.gamma(11.5)
PUBLISHED = 105.0  # brings one octave to about [-1, 1]


class SimplexNoise:
    """Noise strategy and source of noise: octaves of three-dimensional simplex noise (AnoDDPM, section 3.3).

    A denoiser trained with it can be asked to remove structures as large as lesions, which Gaussian noise of moderate
    strength leaves. Each channel of each sample has a field of its own.

    Args:
        frequency: size of the largest structures, in pixels, a number > 0 (in AnoDDPM's words its "frequency").
        octaves: how many sizes are added, each half the one before.
        persistence: amplitude of an octave, in that of the one before, in (0, 1].
        unit_variance: scale to variance 1, as a diffusion's noise is; else the amplitudes are those published, one
            octave in about [-1, 1].

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> import torch
        >>> from diffusers_ext import SimplexNoise
        >>> noise = SimplexNoise().sample((2, 1, 64, 64), torch.Generator().manual_seed(0))
        >>> neighbours = (noise[..., 1:] * noise[..., :-1]).mean() / noise.square().mean()
        >>> bool(neighbours > 0.8)
        True
    """

    def __init__(
        self, frequency: float = 64.0, octaves: int = 6, persistence: float = 0.8, unit_variance: bool = True
    ) -> None:
        require(is_number(frequency) and frequency > 0, "frequency", frequency, "a number > 0")
        require(is_whole(octaves), "octaves", octaves, "an integer >= 1")
        inside = is_number(persistence) and 0 < persistence <= 1
        require(inside, "persistence", persistence, "a number in (0, 1]")
        self.frequency, self.octaves, self.persistence = float(frequency), octaves, float(persistence)
        amplitudes = [persistence**i for i in range(octaves)]
        scale = 1 / math.sqrt(VARIANCE * sum(a**2 for a in amplitudes)) if unit_variance else PUBLISHED
        self.amplitudes = [scale * a for a in amplitudes]

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
            ValueError: `x0` is no batch of images.
        """
        draws = rng.randn_like(x0.new_empty(self._draws(tuple(x0.shape)), dtype=torch.float32), ids)
        return self._fields(draws, tuple(x0.shape)).to(x0.dtype)

    @torch.no_grad()
    def sample(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """Returns noise of a shape.

        Args:
            shape: `(batch, channels, height, width)`.
            generator: draws it, on its own device.
            device: of the result.
            dtype: likewise.

        Raises:
            ValueError: the shape has other than four dimensions.
        """
        where = generator.device if generator is not None else torch.device(device)
        draws = torch.randn(self._draws(shape), generator=generator, device=where)
        return self._fields(draws.to(device), shape).to(dtype)

    def _draws(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        if len(shape) != 4:
            raise ValueError(f"`shape` must be (batch, channels, height, width) for simplex noise, got {shape}.")
        return shape[0], shape[1], 3 * (TABLE + self.octaves)

    def _fields(self, draws: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Makes fields of normal numbers, `(batch, channels, ...)` of `_draws`."""
        rows = draws.flatten(0, 1)
        places = SPREAD * rows[:, 3 * TABLE :].unflatten(1, (self.octaves, 3))
        gradients = rows[:, : 3 * TABLE].unflatten(1, (TABLE, 3))
        gradients = gradients / gradients.norm(dim=2, keepdim=True).clamp(min=1e-12)
        table = gradients.flatten(0, 1).T.contiguous()
        first = torch.arange(len(rows), device=draws.device).mul(TABLE).view(-1, 1, 1)
        down = torch.arange(shape[2], device=draws.device, dtype=torch.float32).view(1, -1, 1)
        right = torch.arange(shape[3], device=draws.device, dtype=torch.float32).view(1, 1, -1)
        total = torch.zeros(len(rows), shape[2], shape[3], device=draws.device)
        for octave, amplitude in enumerate(self.amplitudes):
            cell = self.frequency / 2**octave
            x, y, z = places[:, octave].remainder(1024).view(-1, 3, 1, 1).unbind(1)
            total += amplitude * _simplex(right / cell + x, down / cell + y, z, table, first, octave)
        return total.view(shape)


def _simplex(
    x: torch.Tensor, y: torch.Tensor, z: torch.Tensor, table: torch.Tensor, first: torch.Tensor, salt: int
) -> torch.Tensor:
    """Evaluates simplex noise.

    Args:
        x: `(fields, 1, width)`, coordinates in cells of the lattice.
        y: `(fields, height, 1)`.
        z: `(fields, 1, 1)`.
        table: `(3, fields * TABLE)` gradients.
        first: `(fields, 1, 1)`, where a field's gradients begin.
        salt: tells octaves apart, whose vertices are others.
    """
    skew = (x + y + z) / 3
    i, j, k = ((c + skew).floor() for c in (x, y, z))
    unskew = (i + j + k) / 6
    dx, dy, dz = x - i + unskew, y - j + unskew, z - k + unskew  # from the cell's first vertex
    # The cell is cut into six simplices by the order of the coordinates: steps go along the largest first.
    xy, yz, xz = dx >= dy, dy >= dz, dx >= dz
    ranks = [xy.float() + xz.float(), (~xy).float() + yz.float(), (~xz).float() + (~yz).float()]
    total = torch.zeros_like(dx)
    for corner in range(4):
        sx, sy, sz = ((rank >= 3 - corner).float() if 0 < corner < 3 else float(corner == 3) for rank in ranks)
        px, py, pz = (d - s + corner / 6 for d, s in ((dx, sx), (dy, sy), (dz, sz)))
        weight = (0.5 - px.square() - py.square() - pz.square()).clamp_(min=0).square_().square_()
        hashed = ((i + sx).int() * PRIMES[0]) ^ ((j + sy).int() * PRIMES[1]) ^ ((k + sz).int() * PRIMES[2])
        hashed = (hashed ^ (hashed >> 13)) + salt * 0x9E37
        vertex = ((hashed & (TABLE - 1)) + first).flatten()
        # `index_select` is several times faster than indexing here.
        gx, gy, gz = (g.index_select(0, vertex).view_as(dx) for g in table)
        total += weight * (gx * px + gy * py + gz * pz)
    return total
