"""The recipe: what it learns is the score of the noisy images, on measured values, without a clean one."""

import json
import math

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from diffusers_ext import Callback, GammaNoise, Noise2ScoreConfig, Noise2ScoreRecipe, PoissonNoise, Trainer

NET = {"base_channels": 6, "layers": 2}


def write(folder, images):
    np.savez(folder / "data.npz", images=images)
    (folder / "net.json").write_text(json.dumps(NET))


def config(folder, **changes):
    values = {
        "train_data_dir": str(folder / "data.npz"),
        "output_dir": str(folder / "run"),
        "network": "conv",
        "unet_config": str(folder / "net.json"),
        "resolution": 16,
        "channels": 1,
        "train_batch_size": 8,
        "max_train_steps": 4,
        "learning_rate": 1e-2,
        "ema_decay": 0.9,
        "logging_steps": 1,
        "num_validation_images": 2,
    }
    return Noise2ScoreConfig(**{**values, **changes})


class Watch(Callback):
    def __init__(self):
        self.smoothing, self.losses, self.calls = [], [], 0

    def on_start(self, trainer):
        def count(module, *_):
            self.calls += module.training

        trainer.ctx.modules.trainable.register_forward_hook(count)

    def on_log(self, trainer, logs):
        self.smoothing.append(logs["smoothing"])
        self.losses.append(logs["loss"])


def run(settings):
    watch, recipe = Watch(), Noise2ScoreRecipe(settings)
    Trainer(settings, recipe, [watch]).train()
    return watch, recipe


def test_it_learns_the_score_of_white_noise(tmp_path):
    """Grey images with normal noise of 0.2 around 0.5: the score is -(y - 0.5) / (0.2^2 + sa^2)."""
    rng = np.random.default_rng(0)
    write(tmp_path, 0.5 + 0.2 * rng.standard_normal((32, 24, 24)).astype(np.float32))
    # Longer strides for the learning rate would be wilder; the last ones are averaged.
    watch, recipe = run(
        config(tmp_path, max_train_steps=250, ema_decay=0.98, num_validation_images=8, validation_steps=125)
    )
    std, (start, end) = 0.2, recipe.smoothing
    assert start == end == pytest.approx(0.3 * std, rel=0.05)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "run")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.config["noise"] == "gaussian"
    assert pipeline.smoothing == end
    y = torch.tensor(0.5 + 0.2 * rng.standard_normal((4, 1, 40, 40)), dtype=torch.float32)
    with torch.no_grad():
        score = pipeline.unet(y).sample
    exact = -(y - 0.5) / (std**2 + end**2)
    assert (score - exact)[..., 3:-3, 3:-3].square().mean() < 0.05 * exact.square().mean()
    # Denoised by it, images of constant grey are constant; floats outside of [0, 1] were kept in training.
    x = pipeline(y, noise_parameter=std, output_type="pt").images[..., 3:-3, 3:-3]
    assert (x - 0.5).square().mean().sqrt() < 0.3 * std
    # One call of the network a step, and the loss of the exact score in the end: 1 - sa^2 / (sigma^2 + sa^2).
    assert watch.calls == 250
    assert np.mean(watch.losses[-50:]) == pytest.approx(std**2 / (std**2 + end**2), rel=0.05)
    lines = [json.loads(line) for line in (tmp_path / "run" / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines][:2] == [125, 250]
    assert all(line["score_loss"] == pytest.approx(std**2 / (std**2 + end**2), rel=0.1) for line in lines)
    assert "psnr" not in lines[0]  # nothing is clean here
    assert "held-out AR-DAE loss" in (tmp_path / "run" / "README.md").read_text()


def test_smoothing_falls_once_and_goes_on_where_a_run_stopped(tmp_path):
    rng = np.random.default_rng(0)
    write(tmp_path, (rng.poisson(20, (8, 16, 16)) * 0.02).astype(np.float32))
    changes = {"noise": "poisson", "noise_parameter": 0.02, "annealing_samples": 32, "num_validation_images": 0}
    expected = [1.5, 1.375, 1.25, 1.125, 1.0, 1.0]  # 8 samples a step, one epoch
    watch, recipe = run(config(tmp_path, max_train_steps=6, checkpointing_steps=3, **changes))
    assert watch.smoothing == pytest.approx(expected)
    assert isinstance(recipe.noise_model, PoissonNoise)
    whole = (tmp_path / "run" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    checkpoint = str(next(p for p in (tmp_path / "run").glob("checkpoint-*") if int(p.name.split("-")[-1]) == 3))
    resumed = {"resume_from_checkpoint": checkpoint, "overwrite_output_dir": True}
    watch, _ = run(config(tmp_path, max_train_steps=6, **resumed, **changes))
    assert watch.smoothing == pytest.approx(expected[3:])
    assert (tmp_path / "run" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == whole


def test_counts_are_learned_in_counts_and_noise_is_measured(tmp_path):
    """The units of the score, the smoothing and the scales of each family."""
    rng = np.random.default_rng(0)
    cases = {
        "poisson": (rng.poisson(25, (8, 16, 16)) * 0.02, {"noise_parameter": 0.02}, (1.5, 1.0), 5.0),
        "gamma": (rng.gamma(50, 0.5 / 50, (8, 16, 16)), {}, (0.3 / math.sqrt(50),) * 2, 1 / math.sqrt(50)),
        "exponential": (rng.exponential(0.5, (8, 16, 16)), {}, None, None),
        "poisson_gaussian": (rng.normal(0.5, 0.1, (8, 16, 16)), {}, (0.03, 0.03), 0.1),
        "gaussian": (rng.normal(0.5, 0.1, (8, 16, 16)), {"sigma_max": 0.05, "sigma_min": 0.02}, (0.05, 0.02), 0.1),
    }
    for name, (images, changes, smoothing, std) in cases.items():
        write(tmp_path, images.astype(np.float32))
        settings = config(tmp_path, noise=name, max_train_steps=1, num_validation_images=1, **changes,
                          overwrite_output_dir=True)  # fmt: skip
        _, recipe = run(settings)
        net = DiffusionPipeline.from_pretrained(tmp_path / "run").unet.config
        if smoothing is not None:
            assert recipe.smoothing == pytest.approx(smoothing, rel=0.1)
            assert net.score_scale == pytest.approx(1 / math.hypot(std, smoothing[1]), rel=0.15)
        assert net.smoothing == recipe.smoothing[1]
        assert net.input_scale == (0.02 if name == "poisson" else 1.0)
        if name == "gamma":
            assert isinstance(recipe.noise_model, GammaNoise)
            assert recipe.noise_model.shape == pytest.approx(50, rel=0.2)


def test_blind_training_corrupts_clean_images_at_every_level(tmp_path, monkeypatch):
    write(tmp_path, np.full((16, 20, 20), 0.5, np.float32))
    drawn = []
    make = Noise2ScoreConfig.make_noise

    def watched(self, parameter):
        drawn.append(parameter)
        return make(self, parameter)

    monkeypatch.setattr(Noise2ScoreConfig, "make_noise", watched)
    settings = config(tmp_path, parameter_range="0.05,0.2", max_train_steps=60, checkpointing_steps=100,
                      unet_config=None, network="unet2d", resolution=8, max_train_samples=16, validation_steps=60,
                      ema_decay=0.5, learning_rate=1e-3)  # fmt: skip
    (tmp_path / "net.json").write_text(json.dumps({
        "block_out_channels": [8, 8], "norm_num_groups": 2, "layers_per_block": 1,
        "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2,
    }))  # fmt: skip
    settings.unet_config = str(tmp_path / "net.json")
    drawn.clear()
    run(settings)
    levels = np.log(drawn[-60:])
    assert np.exp(levels).min() > 0.05
    assert np.exp(levels).max() < 0.2
    assert np.mean(levels) == pytest.approx(math.log(0.1), abs=4 * math.log(4) / math.sqrt(12 * 60))
    line = json.loads((tmp_path / "run" / "validation.jsonl").read_text().splitlines()[0])
    assert line["psnr"] > 10  # clean images are known here
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "run")
    assert pipeline.config["score_scale"] == pytest.approx(1 / math.hypot(0.1, 0.03), rel=0.1)
    assert pipeline.smoothing == pytest.approx(0.03, rel=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise": "poisson"}, "`noise_parameter` must be given for poisson noise, got None"),
        ({"noise_parameter": -1.0}, "`sigma` must be a finite number > 0, got -1.0"),
        ({"noise": "gamma", "noise_parameter": 0.5}, "`shape` must be a finite number > 1, got 0.5"),
        ({"noise": "exponential", "parameter_range": "1,2"}, "`noise` must be 'gaussian', 'poisson' or 'gamma' with"),
        ({"parameter_range": "0.2,0.1"}, "`parameter_range` must be two numbers above 0 .* got '0.2,0.1'"),
        ({"parameter_range": "0.1"}, "`parameter_range` must be two numbers"),
        ({"parameter_range": "0.1,0.2", "noise_parameter": 0.1}, "`noise_parameter` must be left out with a range"),
        ({"noise": "poisson_gaussian", "noise_parameter": 0.1}, "`read_std` must be given"),
        ({"sigma_max": 0.1, "sigma_min": 0.2}, "`sigma_min` must be at most `sigma_max`, 0.1, got 0.2"),
        ({"sigma_max": 0.0}, "`sigma_max` must be a number > 0"),
        ({"annealing_samples": -1}, "`annealing_samples` must be an integer >= 0, got -1"),
        ({"sigma_column": "sigma"}, "`sigma_column` must be left out"),
        ({"streaming": True}, "`streaming` must be False"),
    ],
)
def test_bad_input_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


def test_images_outside_of_the_noise_s_range_are_refused(tmp_path):
    write(tmp_path, np.full((8, 16, 16), -0.5, np.float32))
    with pytest.raises(ValueError, match="`train_data_dir` must not be negative for PoissonNoise"):
        run(config(tmp_path, noise="poisson", noise_parameter=0.1))
    write(tmp_path, np.full((8, 16, 16), 0.5, np.float32))
    with pytest.raises(ValueError, match="`train_data_dir` must be a set of noisy images"):
        run(config(tmp_path))
