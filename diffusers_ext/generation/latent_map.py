"""From a pipeline's latents to its autoencoder's and back, learned from the pipeline's own decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .latents import encoder_latents, full_precision
from .prompts import Conditions
from .stepping import check_generator
from .stock_call import StockCall

__all__ = ["ImageLatents", "LatentMap"]

LARGEST = 8  # noise may leave [-1, 1]; beyond this an image was not brought there, such as one in 0..255
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


class ImageLatents:
    """Images to latents of a pipeline's loop and back, at one size.

    Args:
        stock: the pipeline's call.
        conditions: of one prompt.
        shape: of the latents of one sample, `(1, ...)`.
        network: the pipeline's.
        device: where the network runs.
        dtype: that of its input.

    Raises:
        ValueError: the pipeline's way from its latents to its autoencoder is another than `LatentMap` knows.
    """

    def __init__(
        self,
        stock: StockCall,
        conditions: Conditions,
        shape: tuple[int, ...],
        network: torch.nn.Module,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._stock, self._device = stock, device
        self._decoding: tuple[Any, Any] = (), {}  # further arguments of the autoencoder's `decode`
        played = conditions.joined(device, dtype)

        def decoded(latents: torch.Tensor) -> torch.Tensor:
            _, reached = stock.run_without_loop("decode", conditions.prompts, network, device, latents, played)
            if reached is None:
                raise ValueError("its call ended without decoding.")
            self._decoding = reached[1:]
            return reached[0].float()

        _ = stock.autoencoder  # refused by name where there is none
        try:
            self._map = LatentMap(decoded, shape, device)
        except ValueError as error:
            raise ValueError(f"{stock.name} gives no way from images to its latents: {error}") from error

    def encode(self, images: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None) -> torch.Tensor:
        """Returns latents; see `PipelineDenoiser.encode_images`."""
        wanted = tuple(self._map.shift.shape[1:])
        _check_images(images)
        check_generator(generator, len(images))
        if images.ndim == 4 and len(wanted) == 4:
            images = images.unsqueeze(2)  # one frame
        vae = self._stock.autoencoder
        with full_precision(vae):
            encoded = vae.encode(images.to(next(vae.parameters()).device, vae.dtype))
        z = encoder_latents(encoded, generator is not None, generator)
        if tuple(z.shape[1:]) != wanted:
            raise ValueError(
                f"{self._stock.name} decodes {wanted} at the size of this denoiser, but `images` "
                f"{tuple(images.shape)} are encoded to {tuple(z.shape[1:])}: the images have another size, or the "
                "pipeline does more around its autoencoder than permute, scale and shift."
            )
        return self._map.inverse(z.to(self._device, torch.float32))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Returns images; see `PipelineDenoiser.decode`."""
        shape = self._map.shape[1:]
        if not isinstance(latents, torch.Tensor) or tuple(latents.shape[1:]) != tuple(shape) or not len(latents):
            found = tuple(latents.shape) if isinstance(latents, torch.Tensor) else type(latents).__name__
            raise ValueError(f"`latents` must have the shape (batch, {', '.join(map(str, shape))}), got {found}.")
        vae = self._stock.autoencoder
        z = self._map(latents.float())
        with full_precision(vae):
            z = z.to(next(vae.parameters()).device, vae.dtype)
            args, kwargs = self._decoding
            images = vae.decode(z, *args, **{**kwargs, "return_dict": False})[0].float()
        return images.squeeze(2) if images.ndim == 5 else images


def _check_images(images: Any) -> None:
    if not isinstance(images, torch.Tensor) or not images.is_floating_point() or images.ndim not in (4, 5):
        tensor = isinstance(images, torch.Tensor)
        found = f"{images.dtype} of shape {tuple(images.shape)}" if tensor else type(images).__name__
        raise ValueError(f"`images` must be a tensor of floats (batch, 3, height, width), got {found}.")
    if images.numel() == 0 or images.shape[1] != 3:
        raise ValueError(f"`images` must have the shape (batch >= 1, 3, height, width), got {tuple(images.shape)}.")
    low, high = (float(value) for value in images.detach().aminmax())
    if not (low >= -LARGEST and high <= LARGEST):
        raise ValueError(f"`images` must lie in [-1, 1], got values from {low:.3g} to {high:.3g}.")
