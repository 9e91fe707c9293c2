"""Small networks and forward models for the tests."""

import torch
from diffusers import DDIMScheduler, ModelMixin, UNet2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config

from diffusers_ext import CropForwardModel, ForwardModel, ForwardModelPipeline

UNET = {
    "block_out_channels": [4, 8],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 2,
}


class Everything(ForwardModel):
    """Sees the signal itself, whatever the parameters."""

    def forward(self, signal, parameters):
        return signal * 1

    def sample_parameters(self, n, generator=None):
        return torch.zeros(n, 0)


class OnlyNoisy(ModelMixin, ConfigMixin):
    """Gives a denoiser of images the lifted x_t alone."""

    @register_to_config
    def __init__(self, signal_shape=(1, 8, 8)):
        super().__init__()
        self.unet = unet(1)

    def forward(self, sample, timestep, return_dict=True):
        return self.unet(sample[:, 2:3], timestep, return_dict=return_dict)


def unet(channels=6):
    torch.manual_seed(0)
    made = UNet2DModel(sample_size=8, in_channels=channels, out_channels=1, **UNET)
    for p in made.parameters():  # biases of 0 would hide what is mixed up
        torch.nn.init.normal_(p, std=0.2)
    return made.eval()


def scheduler(**options):
    defaults = {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing", "clip_sample": False}
    return DDIMScheduler(**{**defaults, "prediction_type": "sample", **options})


def crops(**options):
    """A pipeline of 8x8 signals that are seen in windows of 4x4."""
    made = ForwardModelPipeline(unet(), scheduler(), CropForwardModel(4, 8), **options)
    made.set_progress_bar_config(disable=True)
    return made


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def context(batch, views=1):
    """Some observations of `crops` and their corners."""
    corners = torch.randint(5, (batch, views, 2), generator=seeded(1))
    return torch.randn(batch, views, 1, 4, 4, generator=seeded(2)), corners
