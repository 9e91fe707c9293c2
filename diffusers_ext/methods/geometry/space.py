"""Images as a pipeline's network meets them."""

from __future__ import annotations

from typing import Any

import torch

from diffusers_ext.generation.latents import encoded

__all__ = ["diffused"]


@torch.no_grad()
def diffused(pipe: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Brings images in [-1, 1] into the space that a pipeline of a UNet diffuses: pixels or latents, scaled.

    Args:
        pipe: an `ImageGenerationPipeline` or another one of a UNet, with or without autoencoder.
        pixels: `(batch, channels, height, width)`.

    Returns:
        Clean samples in fp32, on the network's device; of latents the posterior's mean.
    """
    vae = getattr(pipe, "vae", None) or getattr(pipe, "vqvae", None)
    pixels = pixels.to(pipe.unet.device)
    samples = pixels if vae is None else encoded(vae, pixels)
    return samples.float() * float(pipe.config.get("image_scale") or 1.0)
