"""Zero terminal SNR: the schedule, what it does on Gaussian data, and switching a noise-predicting model to it."""

import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, DDIMScheduler, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput

from diffusers_ext import ImageGenerationPipeline

from .tiny import run, write_data

MEAN, STD = 0.6, 0.2


class ExactV(ModelMixin, ConfigMixin):
    """E[v | x_t] for data N(mean, std^2) on the rescaled schedule."""

    @register_to_config
    def __init__(self, sample_size=4, in_channels=1):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.alphas = DDIMScheduler(rescale_betas_zero_snr=True).alphas_cumprod.double()

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        alpha = self.alphas[timestep]
        data, noise = alpha.sqrt(), (1 - alpha).sqrt()
        away = (sample.double() - data * MEAN) / (alpha * STD**2 + noise**2)
        out = (data * noise * away - noise * (MEAN + data * STD**2 * away)).to(sample.dtype)
        return UNet2DOutput(out) if return_dict else (out,)


def test_sampling_from_pure_noise_is_exact_on_gaussian_data():
    scheduler = DDIMScheduler(
        rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False
    )
    pipeline = ImageGenerationPipeline(ExactV(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    start = torch.linspace(-2, 2, 16).view(1, 1, 4, 4)
    out = pipeline(latents=start, num_inference_steps=500, output_type="latent").images
    torch.testing.assert_close(out, MEAN + STD * start, atol=0.01, rtol=0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def test_a_noise_predicting_model_is_switched(data, tmp_path):
    run(data, tmp_path / "first", max_train_steps=2, prediction_type="epsilon")
    changes = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "unet_config": None}
    run(data, tmp_path / "second", max_train_steps=2, pretrained_model_name_or_path=str(tmp_path / "first"), **changes)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "second")
    config = pipeline.scheduler.config
    assert (config.prediction_type, config.timestep_spacing) == ("v_prediction", "trailing")
    assert pipeline.scheduler.alphas_cumprod[-1] == 0
    images = pipeline(2, num_inference_steps=3, output_type="np").images
    assert np.isfinite(images).all()


@pytest.mark.parametrize("prediction", [None, "epsilon", "flow"])
def test_predicting_noise_at_pure_noise_is_refused(data, tmp_path, prediction):
    with pytest.raises(
        ValueError, match="`prediction_type` must be 'v_prediction' or 'sample' with `rescale_betas_zero"
    ):
        run(data, tmp_path, rescale_betas_zero_snr=True, prediction_type=prediction)


def test_betas_are_checked_and_used(data, tmp_path):
    with pytest.raises(ValueError, match="`beta_end` must be a number below 1 and not below `beta_start`, 0.1"):
        run(data, tmp_path, beta_start=0.1)
    run(data, tmp_path, max_train_steps=1, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    alphas = DiffusionPipeline.from_pretrained(tmp_path).scheduler.alphas_cumprod
    assert alphas[-1].item() == pytest.approx(4.660095e-3, rel=1e-6)


class Halves(ModelMixin, ConfigMixin):
    """Predicts x for the null label 1, and 3x + 1 for label 0."""

    @register_to_config
    def __init__(self, sample_size=4, in_channels=1, num_class_embeds=2):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.class_embedding = True

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        null = (class_labels == 1).view(-1, 1, 1, 1)
        out = torch.where(null, sample, 3 * sample + 1)
        return UNet2DOutput(out) if return_dict else (out,)


def test_guidance_rescale_restores_the_standard_deviation():
    pipeline = ImageGenerationPipeline(Halves(), DDIMScheduler(), null_class_label=1)
    pipeline._guidance_rescale = 1.0
    x, labels = torch.randn(2, 1, 4, 4), torch.zeros(2, dtype=torch.long)
    full = pipeline._predict(x, torch.tensor(5), labels, 4.0)
    torch.testing.assert_close(full.flatten(1).std(1), 3 * x.flatten(1).std(1))
    pipeline._guidance_rescale = 0.0
    guided = pipeline._predict(x, torch.tensor(5), labels, 4.0)
    torch.testing.assert_close(guided, x + 4 * (2 * x + 1))
    pipeline._guidance_rescale = 0.5
    torch.testing.assert_close(pipeline._predict(x, torch.tensor(5), labels, 4.0), 0.5 * full + 0.5 * guided)
    with pytest.raises(ValueError, match=r"`guidance_rescale` must be a number in \[0, 1\]"):
        pipeline(class_labels=0, guidance_scale=2.0, guidance_rescale=1.5)
