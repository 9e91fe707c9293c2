"""Between images and the latents that are diffused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = [
    "decoded",
    "encoded",
    "encoder_latents",
    "full_precision",
    "latent_factor",
    "latent_moments",
    "scaled_latents",
]


def latent_factor(vae: Any) -> int:
    """Returns how many times smaller latents are than their images, a side; 1 without an autoencoder."""
    if vae is None:
        return 1
    name = "block_out_channels" if hasattr(vae.config, "block_out_channels") else "encoder_block_out_channels"
    return 2 ** (len(vae.config[name]) - 1)


def encoder_latents(
    output: Any, sample: bool = False, generator: torch.Generator | list[torch.Generator] | None = None
) -> torch.Tensor:
    """Returns the latents in what an autoencoder's `encode` returned, before scaling and quantisation.

    Args:
        output: a posterior's, as of `AutoencoderKL`, or the latents themselves (`VQModel`, `AutoencoderTiny`,
            `AutoencoderDC`).
        sample: draw from a posterior instead of taking its mode.
        generator: draws it.
    """
    if hasattr(output, "latent_dist"):
        return output.latent_dist.sample(generator) if sample else output.latent_dist.mode()
    return output.latents if hasattr(output, "latents") else output.latent


def latent_moments(
    vae: Any, pixels: torch.Tensor, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encodes images in `[-1, 1]`.

    Args:
        vae: the autoencoder.
        pixels: `(batch, channels, height, width)`.
        dtype: precision of `vae`.

    Returns:
        Mean and standard deviation of the posterior, before scaling; the deviation is 0 where there is none.
    """
    output = vae.encode(pixels.to(dtype))
    mean = encoder_latents(output)
    return mean, output.latent_dist.std if hasattr(output, "latent_dist") else torch.zeros_like(mean)


def encoded(
    vae: Any,
    pixels: torch.Tensor,
    sample_posterior: bool = False,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> torch.Tensor:
    """Encodes images in `[-1, 1]` to scaled latents in fp32.

    Args:
        vae: the autoencoder.
        pixels: `(batch, channels, height, width)`.
        sample_posterior: draw from the posterior, where there is one, instead of taking its mode.
        generator: draws it.
    """
    return scaled_latents(vae, encoder_latents(vae.encode(pixels.to(vae.dtype)), sample_posterior, generator))


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
