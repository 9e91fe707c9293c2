"""Small networks and pipelines of speech enhancement."""

import torch

from diffusers_ext import OUVEScheduler, SGMSEUNet2DModel, SpeechEnhancementPipeline

SMALL = {
    "block_out_channels": (8, 12),
    "layers_per_block": 1,
    "add_attention": False,
    "down_block_types": ("SkipDownBlock2D",) * 2,
    "up_block_types": ("SkipUpBlock2D",) * 2,
}
SOUND = {"sample_rate": 8000, "n_fft": 62, "hop_length": 16}


class Mirror(SGMSEUNet2DModel):
    """Knows the clean speech of recordings that are minus it."""

    def forward(self, sample, timestep, return_dict=True):
        return (-sample[:, 2:],)


def transitions():
    return OUVEScheduler(prediction_type="sample", algorithm="transitions")


def pipeline(unet=None, scheduler=None, seed=0, **options):
    torch.manual_seed(seed)
    unet = SGMSEUNet2DModel(**SMALL, residual=0.5) if unet is None else unet
    made = SpeechEnhancementPipeline(unet.eval(), scheduler or transitions(), **{**SOUND, **options})
    made.set_progress_bar_config(disable=True)
    return made
