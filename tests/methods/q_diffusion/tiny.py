"""Small networks and pipelines with random weights."""

import torch
from diffusers import DDIMScheduler, UNet2DModel

from diffusers_ext import ImageGenerationPipeline


def unet(width=8, **options):
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(width, 2 * width), layers_per_block=1,
        norm_num_groups=4, attention_head_dim=4, dropout=0.5, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), **options,
    ).eval()  # fmt: skip


def pipeline(network=None, steps=100):
    made = ImageGenerationPipeline(network or unet(), DDIMScheduler(num_train_timesteps=steps, clip_sample=False))
    made.set_progress_bar_config(disable=True)
    return made
