"""Between images and the latents that are diffused."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["decoded", "latent_moments", "scaled_latents"]


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


def scaled_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Brings latents of a VAE into the space that is diffused, in fp32."""
    return (latents.float() - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def decoded(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Brings scaled latents back and decodes them to images in `[-1, 1]`."""
    latents = latents / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
    return vae.decode(latents.to(vae.dtype), return_dict=False)[0]
