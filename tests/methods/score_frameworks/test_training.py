"""Training at the noise levels of NCSN and of SDEs."""

import json

import pytest
import torch
from diffusers import DDPMScheduler

from diffusers_ext import (
    VPSDE,
    AmbientConfig,
    FrameworkTimesteps,
    ImageGenerationPipeline,
    ImmiscibleRecipe,
    ScoreSDEScheduler,
    StepRNG,
    SubVPSDE,
    Trainer,
    geometric_sigmas,
    sigma_of_timestep,
)
from diffusers_ext.training.objectives import EpsX0V
from tests.training.tiny import make_config, write_data

ALPHAS = DDPMScheduler().alphas_cumprod


def levels(law, n=20_000):
    t = law(n, StepRNG(0, 0, 0))
    assert t.dtype == torch.float32
    return sigma_of_timestep(ALPHAS, t)


def test_levels_of_ncsn():
    wanted = geometric_sigmas(20.0, 0.05, dimension=64)
    found = levels(FrameworkTimesteps("ncsn", ALPHAS, 64, 0.05, 20.0))
    nearest = (found[:, None].log() - wanted.log()).abs()
    assert nearest.min(1).values.max() < 1e-5
    counts = nearest.argmin(1).bincount(minlength=len(wanted)) / len(found)
    assert (counts * len(wanted) - 1).abs().max() < 0.15  # 4 standard errors


def test_levels_of_processes():
    """Quantiles: times are uniform, so that the level which a draw exceeds with probability p is that of t = 1 - p."""
    p = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    for name, sde in (("vp", VPSDE()), ("subvp", SubVPSDE())):
        law = FrameworkTimesteps(name, ALPHAS)
        wanted = sde.sigma(1 - p)
        torch.testing.assert_close(sigma_of_timestep(ALPHAS, law.at(p)), wanted, atol=0, rtol=1e-6)
        found = levels(law)
        shares = torch.stack([(found > sigma).double().mean() for sigma in wanted])
        torch.testing.assert_close(shares, p, atol=0.012, rtol=0)
    found = levels(FrameworkTimesteps("ve", ALPHAS, sigma_min=0.1, sigma_max=10.0)).log10()
    assert found.mean().item() == pytest.approx(0.0, abs=0.017)  # uniform in -1..1
    assert found.std().item() == pytest.approx(3**-0.5, abs=0.01)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_objective_between_timesteps(kind):
    objective = EpsX0V(DDPMScheduler(prediction_type=kind), "min_snr")
    x0, noise = torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2)
    t = torch.tensor([0, 412, 999])
    for of_int, of_float in zip(objective.make(x0, noise, t), objective.make(x0, noise, t.float()), strict=True):
        torch.testing.assert_close(of_float, of_int, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(objective.weights(t.float()), objective.weights(t), atol=1e-4, rtol=1e-3)
    t = torch.tensor([0.5, 300.25, 998.75])
    noisy, target = objective.make(x0, noise, t)
    sigma = sigma_of_timestep(ALPHAS, t).float().view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy * (1 + sigma**2).sqrt(), x0 + sigma * noise, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(objective.predicted_sample(target, noisy, t)[:2], x0[:2], atol=1e-4, rtol=1e-4)


def test_a_run_at_the_levels_of_a_process(tmp_path):
    """What it saves is a model of the schedule as any: other samplers take it by exchanging the scheduler."""
    data, losses = write_data(tmp_path / "data"), {}
    for framework in ("ddpm", "ncsn", "subvp"):
        config = make_config(
            data, tmp_path / framework, framework=framework, max_train_steps=2, num_validation_images=0
        )
        recipe = ImmiscibleRecipe(config)
        Trainer(config, recipe).train()
        losses[framework] = json.loads((tmp_path / framework / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert len(set(losses.values())) == 3
    assert "at the times of a sub-VP process" in (tmp_path / "subvp" / "README.md").read_text()
    pipeline = ImageGenerationPipeline.from_pretrained(tmp_path / "subvp")
    pipeline.scheduler = ScoreSDEScheduler.from_config(pipeline.scheduler.config, sde="subvp")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(2, num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(0)).images
    assert images.std() > 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"framework": "edm"}, r"`framework` must be one of \['ddpm', 'ncsn', 'vp', 've', 'subvp'\], got 'edm'"),
        ({"framework": "ve", "prediction_type": "flow"}, "`prediction_type` must be 'epsilon', .* `framework='ve'`"),
        (
            {"framework": "vp", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
            "`rescale_betas_zero_snr` must be False with `framework='vp'`",
        ),
        ({"framework": "vp", "sigma_max": 5.0}, "`sigma_max` must be left out unless `framework` is 'ncsn' or 've'"),
        ({"framework": "ve", "sigma_min": 0.0}, "`sigma_min` must be left out unless .* a number > 0, got 0.0"),
    ],
)
def test_wrong_arguments(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, tmp_path, **changes)


def test_levels_outside_the_schedule():
    with pytest.raises(ValueError, match="`sigma_max` must be within the schedule's levels, 0.01 to 157.4, got 200.0"):
        FrameworkTimesteps("ve", ALPHAS, sigma_max=200.0)
    with pytest.raises(ValueError, match="`framework` must be 'ddpm'"):
        AmbientConfig(
            train_data_dir="x", sigma_column="sigma", framework="ve", prediction_type="epsilon", max_train_steps=1
        )
