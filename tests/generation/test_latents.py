"""Autoencoders of every kind: posteriors, plain latents, codebooks."""

import pytest
import torch
from diffusers import AutoencoderTiny, VQModel

from diffusers_ext.generation.latents import decoded, encoded, latent_factor, latent_moments, scaled_latents
from tests.tiny_pipelines import autoencoder, deep_compression_autoencoder

PIXELS = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def tiny():
    widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    return AutoencoderTiny(**widths, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), scaling_factor=0.5)


def codebook():
    return VQModel(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
                   up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4)  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("make", [autoencoder, tiny, deep_compression_autoencoder, codebook])
def test_latents_of_every_kind(make):
    torch.manual_seed(0)
    vae = make().eval()
    mean, std = latent_moments(vae, PIXELS)
    assert mean.shape[2] * latent_factor(vae) == 16
    output = vae.encode(PIXELS)
    if make is autoencoder:
        assert torch.equal(mean, output.latent_dist.mean)
        assert torch.equal(std, output.latent_dist.std)
    else:
        assert torch.equal(mean, getattr(output, "latents", getattr(output, "latent", None)))
        assert (std == 0).all()
    found = encoded(vae, PIXELS)
    torch.testing.assert_close(found, mean * vae.config.scaling_factor)
    assert torch.equal(found, scaled_latents(vae, mean))
    torch.testing.assert_close(decoded(vae, found), vae.decode(mean).sample, atol=1e-5, rtol=1e-4)
