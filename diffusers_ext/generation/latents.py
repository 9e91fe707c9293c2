"""Between images and the latents that are diffused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["decoded", "encoded", "full_precision", "latent_factor", "latent_moments", "scaled_latents"]


def latent_factor(vae: Any) -> int:
    """Returns how many times smaller latents are than their images, a side; 1 without an autoencoder."""
    return 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)


def latent_moments(
    vae: Any, pixels: torch.Tensor, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encodes images in `[-1, 1]`.

    Args:
        vae: an `AutoencoderKL`.
        pixels: `(batch, channels, height, width)`.
        dtype: precision of `vae`.

    Returns:
        Mean and standard deviation of the posterior, before scaling.
    """
    posterior = vae.encode(pixels.to(dtype)).latent_dist
    return posterior.mean, posterior.std


def encoded(
    vae: Any,
    pixels: torch.Tensor,
    sample_posterior: bool = False,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> torch.Tensor:
    """Encodes images in `[-1, 1]` to scaled latents in fp32, by an `AutoencoderKL` or a `VQModel`.

    Args:
        vae: the autoencoder.
        pixels: `(batch, channels, height, width)`.
        sample_posterior: draw from the posterior of an `AutoencoderKL` instead of taking its mean.
        generator: draws it.
    """
    output = vae.encode(pixels.to(vae.dtype))
    if not hasattr(output, "latent_dist"):
        return scaled_latents(vae, output.latents)  # before quantisation
    posterior = output.latent_dist
    return scaled_latents(vae, posterior.sample(generator) if sample_posterior else posterior.mean)


def scaled_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Brings latents of an autoencoder into the space that is diffused, in fp32."""
    return (latents.float() - _shift(vae)) * vae.config.scaling_factor


def decoded(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Brings scaled latents back and decodes them to images in `[-1, 1]`."""
    latents = latents / vae.config.scaling_factor + _shift(vae)
    return vae.decode(latents.to(vae.dtype), return_dict=False)[0]


def _shift(vae: Any) -> float:
    return getattr(vae.config, "shift_factor", None) or 0.0


@contextmanager
def full_precision(vae: Any) -> Iterator[None]:
    """Holds a half-precision autoencoder that would overflow (`force_upcast`) in fp32 for a while."""
    dtype = vae.dtype
    if dtype != torch.float16 or not getattr(vae.config, "force_upcast", False):
        yield
        return
    vae.to(torch.float32)
    try:
        yield
    finally:
        vae.to(dtype)
