"""The variational bound of a learned variance: closed forms, and training that reaches the variance alone."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline
from torch.distributions import Normal, kl_divergence

from diffusers_ext import DomainStudioConfig, DomainStudioRecipe, ImageGenerationPipeline, Trainer, save_repo
from diffusers_ext.methods.domain_studio.unconditional import UnconditionalModel
from diffusers_ext.methods.domain_studio.variance import LearnedVariance, pixel_log_likelihood
from tests.training.tiny import Record

from .test_training import COMMON, network

T = torch.tensor([1, 10, 500, 999])


def drawn(n=4):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 1, 4, 4, generator=generator).clamp(-1, 1) for _ in range(4)]


def posterior(x0, noisy, t):
    """Mean and deviation of q(x_{t-1} | x_t, x_0), from the two Gaussians that it is the product of."""
    betas = DDPMScheduler().betas.double()
    abar, beta = (1 - betas).cumprod(0), betas[t].view(-1, 1, 1, 1)
    before = abar[t - 1].view(-1, 1, 1, 1)
    precision = (1 - beta) / beta + 1 / (1 - before)
    mean = ((1 - beta).sqrt() / beta * noisy + before.sqrt() / (1 - before) * x0) / precision
    return mean, precision.rsqrt(), beta


def test_it_is_the_divergence_of_two_gaussians():
    x0, noisy, estimate, v = (part.double() for part in drawn())
    found = LearnedVariance(DDPMScheduler()).bound(x0, noisy, T, estimate, v)
    true_mean, true_std, beta = posterior(x0, noisy, T)
    mean, low, _ = posterior(estimate, noisy, T)
    log_variance = (v + 1) / 2 * beta.log() + (1 - v) / 2 * (low**2).log()
    expected = kl_divergence(Normal(true_mean, true_std), Normal(mean, (0.5 * log_variance).exp()))
    expected = expected.mean((1, 2, 3)) / np.log(2)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


def test_the_posterior_itself_costs_nothing():
    x0, noisy, _, v = drawn()
    found = LearnedVariance(DDPMScheduler()).bound(x0, noisy, T, x0, torch.full_like(v, -1.0))
    torch.testing.assert_close(found, torch.zeros(4), atol=1e-6, rtol=0)


def test_the_probabilities_of_a_pixel_s_values_add_up():
    values = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, log_variance in ((0.1, -3.0), (-0.99, -8.0), (1.5, 0.0)):
        log = pixel_log_likelihood(values, torch.tensor(mean).double(), torch.tensor(log_variance).double())
        assert log.exp().sum().item() == pytest.approx(1, abs=1e-6)
    far = pixel_log_likelihood(torch.tensor([1.0, 0.0, -1.0]), torch.tensor([-9.0, 9.0, 9.0]), torch.tensor(-9.0))
    torch.testing.assert_close(far, torch.full((3,), 1e-12).log())  # bounded, whatever the estimate
    # The first timestep is measured by them, in bits: a sure pixel costs none.
    x0 = torch.zeros(1, 1, 2, 2)
    bound = LearnedVariance(DDPMScheduler(beta_start=1e-8))
    assert bound.bound(x0, x0, torch.tensor([0]), x0, -torch.ones_like(x0)).item() == pytest.approx(0, abs=1e-6)


def test_it_counts_as_a_thousandth_of_the_whole_bound():
    x0, noisy, estimate, v = drawn()
    t = torch.arange(4) + 1
    whole = LearnedVariance(DDPMScheduler(trained_betas=[0.01] * 4000)).bound(x0, noisy, t, estimate, v)
    short = LearnedVariance(DDPMScheduler(trained_betas=[0.01] * 500)).bound(x0, noisy, t, estimate, v)
    torch.testing.assert_close(whole, 8 * short)


def test_a_variance_that_is_no_range_is_refused(tmp_path):
    save_repo(ImageGenerationPipeline(network(out_channels=2), DDPMScheduler(variance_type="learned")), tmp_path)
    with pytest.raises(
        ValueError, match="must be a model .* does not learn its variance .*or, for DomainStudio, a range"
    ):
        UnconditionalModel(str(tmp_path))


def test_only_the_variance_is_taught():
    x0, noisy, estimate, v = drawn()
    estimate, v = estimate.requires_grad_(), v.requires_grad_()
    LearnedVariance(DDPMScheduler()).bound(x0, noisy, torch.tensor([0, 1, 10, 500]), estimate, v).sum().backward()
    assert estimate.grad is None
    assert torch.isfinite(v.grad).all()
    assert (v.grad.flatten(1).abs().sum(1) > 0).all()


def test_a_model_that_learns_its_variance_is_adapted_and_sampled(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (10, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "ten.npz", images=images)
    source = network(out_channels=2)
    save_repo(ImageGenerationPipeline(source, DDPMScheduler(variance_type="learned_range")), tmp_path / "base")
    config = DomainStudioConfig(
        **{**COMMON, "max_train_steps": 30, "learning_rate": 1e-2},
        pretrained_model_name_or_path=str(tmp_path / "base"),
        train_data_dir=str(tmp_path / "ten.npz"),
        output_dir=str(tmp_path / "out"),
        resolution=8,
        channels=1,
    )
    record = Record()
    Trainer(config, DomainStudioRecipe(config), [record]).train()
    logs = record.logs
    bounds = [entry["vlb"] for entry in logs]
    assert np.mean(bounds[-10:]) < np.mean(bounds[:10])
    assert logs[0]["pair"] == pytest.approx(0, abs=1e-5)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.scheduler.config.variance_type == "learned_range"
    pipeline.set_progress_bar_config(disable=True)
    call = {"batch_size": 2, "num_inference_steps": 4, "output_type": "pt"}
    learned = pipeline(**call, generator=torch.Generator().manual_seed(0)).images
    # A scheduler without a learned variance sees the prediction alone, also where its config remembers one.
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    found = pipeline(**call, generator=torch.Generator().manual_seed(0)).images
    plain = network()
    weights = pipeline.unet.state_dict()
    plain.load_state_dict({k: v[:1] if k.startswith("conv_out") else v for k, v in weights.items()})
    expected = ImageGenerationPipeline(plain, pipeline.scheduler)
    expected.set_progress_bar_config(disable=True)
    torch.testing.assert_close(found, expected(**call, generator=torch.Generator().manual_seed(0)).images)
    assert not torch.equal(learned, found)
