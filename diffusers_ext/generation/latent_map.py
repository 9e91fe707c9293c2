"""From a pipeline's latents to its autoencoder's and back, learned from the pipeline's own decoding."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["LatentMap"]

BASE = 1024  # digits of positions, exact in fp32 after any scale and shift


class LatentMap:
    """The affine map z(L) from latents in which a loop steps to those that the autoencoder decodes.

    It permutes (packing) and gives each element a scale and a shift (scaling and shift factors, means and standard
    deviations). Shift and scale are read off z(0) and z(1), the permutation off latents that hold their own positions.

    Args:
        decoded: a function L -> z for one sample, that is all of the pipeline's call behind the loop.
        shape: `(1, ...)`, that of L.
        device: where L is wanted.

    Raises:
        ValueError: z is another kind of function of L.
    """

    def __init__(
        self, decoded: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...], device: torch.device
    ) -> None:
        zeros = torch.zeros(shape, device=device)
        self.shape = shape
        self.shift = decoded(zeros)
        self.scale = decoded(zeros + 1) - self.shift
        count = zeros.numel()
        if self.shift.shape[0] != 1:
            raise ValueError(f"frames lie in the batch of the autoencoder's latents {tuple(self.shift.shape)}.")
        if self.shift.numel() != count or not bool((self.scale != 0).all()):
            raise ValueError(f"latents {shape} and those of the autoencoder {tuple(self.shift.shape)} do not match.")
        position = torch.arange(count, device=device)
        self.source, unit = torch.zeros_like(position), 1
        while unit < count:
            digit = (position // unit % BASE).float().view(shape)
            found = ((decoded(digit) - self.shift) / self.scale).round().long()
            self.source, unit = self.source + found.flatten() * unit, unit * BASE
        if not torch.equal(self.source.sort().values, position):
            raise ValueError("the pipeline does more to its latents than permute, scale and shift them.")
        self.target = torch.empty_like(self.source)
        self.target[self.source] = position
        trial = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
        difference = (decoded(trial) - self(trial)).abs().max()
        if not difference <= 1e-4 * self(trial).abs().max():
            raise ValueError("the pipeline's way from its latents to the autoencoder's is not affine.")

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        """Returns z for L of any batch, differentiably."""
        z = latents.flatten(1)[:, self.source.to(latents.device)].view(-1, *self.shift.shape[1:])
        return z * self.scale.to(latents.device) + self.shift.to(latents.device)

    def inverse(self, z: torch.Tensor) -> torch.Tensor:
        """Returns L for z of any batch."""
        latents = (z - self.shift.to(z.device)) / self.scale.to(z.device)
        return latents.flatten(1)[:, self.target.to(z.device)].view(-1, *self.shape[1:])
