"""The recipes of ambient diffusion: plain training on clean images, exact resume, frozen noise, repos, refusals."""

import json
import re

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, UNet2DModel
from PIL import Image
from safetensors.torch import load_file

from diffusers_ext import (
    AmbientConfig,
    AmbientPipeline,
    AmbientRecipe,
    AmbientTextConfig,
    AmbientTextRecipe,
    DenoisingConfig,
    DenoisingRecipe,
    ImageGenerationPipeline,
    TextToImageConfig,
    TextToImageRecipe,
    Trainer,
    save_repo,
)
from tests import tiny_pipelines
from tests.methods.oms.tiny import stable_diffusion
from tests.training.tiny import UNET, Record

N = 24
LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Noisy images in a file, clean ones, a small network, and text-to-image pipelines with six images."""
    folder = tmp_path_factory.mktemp("ambient")
    rng = np.random.default_rng(0)
    clean = rng.integers(0, 256, (N, 8, 8), dtype=np.uint8)
    levels = np.where(np.arange(N) % 3 == 0, 0.0, 0.2 + 0.01 * np.arange(N))
    noisy = clean / 127.5 - 1 + levels[:, None, None] * rng.standard_normal((N, 8, 8))
    np.savez(folder / "noisy.npz", images=noisy.astype(np.float32), sigma=levels, labels=np.arange(N) % 2)
    np.savez(folder / "clean.npz", images=clean, sigma=0 * levels, labels=np.arange(N) % 2)
    (folder / "unet.json").write_text(json.dumps({**UNET, "dropout": 0.0}))
    (folder / "photos").mkdir()
    lines = []
    for i in range(6):
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": "a red cat", "level": 0.3 * (i % 2), "none": 0.0}))
    (folder / "photos" / "metadata.jsonl").write_text("\n".join(lines))
    stable_diffusion().save_pretrained(folder / "stable_diffusion")
    tiny_pipelines.seeded(tiny_pipelines.stable_diffusion_3).save_pretrained(folder / "stable_diffusion_3")
    return folder


COMMON = {
    "train_batch_size": 4,
    "max_train_steps": 4,
    "learning_rate": 1e-3,
    "lr_warmup_steps": 0,
    "ema_decay": 0.9,
    "logging_steps": 1,
    "num_validation_images": 0,
}


def arguments(folder, output_dir, **changes):
    values = {
        **COMMON,
        "train_data_dir": str(folder / "noisy.npz"),
        "unet_config": str(folder / "unet.json"),
        "output_dir": str(output_dir),
        "resolution": 8,
        "channels": 1,
        "sigma_column": "sigma",
        "value_range": "-1,1",
    }
    return {k: v for k, v in {**values, **changes}.items() if v is not None}


def config(folder, output_dir, **changes):
    return AmbientConfig(**arguments(folder, output_dir, **changes))


def train(config, recipe=AmbientRecipe, record=None):
    record = record or Record()
    trainer = Trainer(config, recipe(config), [record])
    trainer.train()
    return record, trainer


def weights(folder, file="unet/diffusion_pytorch_model.safetensors"):
    return load_file(folder / file)


@pytest.mark.parametrize("prediction_type", ["edm", "epsilon"])
def test_with_clean_images_it_is_plain_training_bit_by_bit(folder, tmp_path, prediction_type):
    common = {"train_data_dir": str(folder / "clean.npz"), "prediction_type": prediction_type, "value_range": None}
    ours, _ = train(config(folder, tmp_path / "ours", **common, add_noise=True))
    plain = DenoisingConfig(**arguments(folder, tmp_path / "plain", **common, sigma_column=None))
    theirs, _ = train(plain, DenoisingRecipe)
    assert ours.losses == theirs.losses
    a, b = weights(tmp_path / "ours"), weights(tmp_path / "plain")
    assert all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize(
    "changes",
    [
        {"augmentation": "flip,turn,roll", "weighting": "uniform"},
        {"prediction_type": "v_prediction", "levels": "clamp", "class_conditional": True},
        {"prediction_type": "flow", "sigma_column": None, "sigma": 0.4, "consistency_weight": 0.5,
         "consistency_every": "all", "consistency_steps": 2},
        {"consistency_weight": 1.0, "consistency_steps": 1},
    ],
)  # fmt: skip
def test_kinds_of_training_leave_a_repo_that_samples(folder, tmp_path, changes):
    record, trainer = train(config(folder, tmp_path, num_validation_images=2, validation_inference_steps=2, **changes))
    assert np.isfinite(record.losses).all()
    if "consistency_weight" in changes:
        assert all("consistency" in logs for logs in record.logs)
        assert any(logs["consistency"] != 0 for logs in record.logs)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline) is AmbientPipeline
    what = {"class_labels": [0, 1]} if changes.get("class_conditional") else {"batch_size": 2}
    images = pipeline(**what, num_inference_steps=8, stop_at_sigma=0.4, output_type="pt").images
    assert images.shape == (2, 1, 8, 8)
    assert images.isfinite().all()
    card = (tmp_path / "README.md").read_text()
    assert "Ambient Diffusion" in card
    assert "2411.02780" in card
    assert ("of level 0.4" if "sigma" in changes else "of each image's own level") in card


def test_the_step_is_the_loss_of_the_noisy_images_by_hand(folder, tmp_path):
    values = config(folder, tmp_path, prediction_type="epsilon", use_ema=False, max_train_steps=1)
    recipe, seen = AmbientRecipe(values), {}
    trainer = Trainer(values, recipe)
    step = AmbientRecipe.training_step

    def watched(self, batch, ctx):
        seen["batch"] = batch
        make = self.task.make
        self.task.make = lambda *args: seen.setdefault("made", (args, make(*args)))[1]
        seen["output"] = step(self, batch, ctx)
        seen["unet"] = UNet2DModel.from_config(ctx.model.config)
        seen["unet"].load_state_dict(ctx.model.state_dict())
        return seen["output"]

    recipe.training_step = lambda batch, ctx: watched(recipe, batch, ctx)
    trainer.train()
    batch, ((y, sigma_n, noise, t, weight), _) = seen["batch"], seen["made"]
    stored = np.load(folder / "noisy.npz")
    rows = batch["index"].numpy()
    torch.testing.assert_close(y[:, 0], torch.from_numpy(stored["images"][rows]), atol=1e-6, rtol=0)
    torch.testing.assert_close(sigma_n.double(), torch.from_numpy(stored["sigma"][rows]), atol=1e-6, rtol=0)
    alpha = DDIMScheduler().alphas_cumprod[t].double()
    level, own = ((1 - alpha) / alpha).sqrt(), sigma_n.double()
    assert (level > own).all()
    z = y + ((level**2 - own**2).sqrt()).view(-1, 1, 1, 1) * noise
    scale = alpha.sqrt().view(-1, 1, 1, 1)
    with torch.no_grad():
        epsilon = seen["unet"]((scale * z).float(), t).sample.double()
    d = z - level.view(-1, 1, 1, 1) * epsilon
    q = ((own / level) ** 2).view(-1, 1, 1, 1)
    each = ((1 - q) * d + q * z - y).square().mean((1, 2, 3)) / level**2
    torch.testing.assert_close(seen["output"].loss.double(), (weight * each).mean(), rtol=1e-4, atol=0)
    # The part of the steps above each image's level.
    table = DDIMScheduler().alphas_cumprod
    table = ((1 - table) / table).sqrt()
    parts = [1.0 if s == 0 else (table > s).double().mean().item() for s in own]
    assert weight.tolist() == pytest.approx(parts, abs=2e-3)


def test_a_stream_brings_its_noise_and_its_levels(folder, tmp_path):
    rng, rows = np.random.default_rng(0), []
    (tmp_path / "data").mkdir()
    for i in range(6):
        values = rng.standard_normal((8, 8)).astype(np.float32)
        Image.fromarray(values).save(tmp_path / "data" / f"{i}.tiff")
        rows.append({"file_name": f"{i}.tiff", "sigma": 0.3 * (i % 2), "many": 200.0 * (i % 2)})
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    changes = {"train_data_dir": str(tmp_path / "data"), "streaming": True, "max_train_steps": 2}
    recipe, seen = AmbientRecipe(config(folder, tmp_path / "out", **changes)), []
    noisy = recipe.noisy
    recipe.noisy = lambda sample, batch, ctx: seen.append((sample.x0, found := noisy(sample, batch, ctx))) or found
    Trainer(recipe.config, recipe).train()
    for x0, (y, levels) in seen:
        assert torch.equal(y, x0)  # nothing is added or clipped
        assert y.abs().max() > 1
        assert {round(level, 4) for level in levels.tolist()} == {0.0, 0.3}
    with pytest.raises(ValueError, match=r"below the largest noise level of the schedule, 157.4, got 200"):
        train(config(folder, tmp_path / "no", **changes, sigma_column="many", prediction_type="epsilon"))


@pytest.mark.parametrize("workers", [0, 2])
def test_added_noise_is_the_same_in_epochs_resumes_and_without_its_file(folder, tmp_path, workers):
    changes = {"train_data_dir": str(folder / "clean.npz"), "sigma_column": None, "value_range": None, "sigma": 0.3}
    changes |= {"add_noise": True, "noisy_fraction": 0.6, "max_train_steps": 12, "augmentation": "roll"}
    changes |= {"dataloader_num_workers": workers}
    whole, trainer = train(config(folder, tmp_path / "whole", **changes))
    frozen = trainer.recipe.frozen
    seen = frozen.levels(torch.arange(N))
    assert 4 <= int((seen > 0).sum()) <= 22
    files = list((tmp_path / "whole" / "cache").glob("frozen-noise-*.npy"))
    assert len(files) == 1
    if workers:
        return
    alone, _ = train(config(folder, tmp_path / "alone", **changes, noise_file=False))
    assert not list((tmp_path / "alone").rglob("frozen-noise-*"))
    assert alone.losses == whole.losses
    part = {**changes, "checkpointing_steps": 5}
    train(config(folder, tmp_path / "part", **part), record=Record(signal_at=5))
    rest, _ = train(config(folder, tmp_path / "part", **part, resume_from_checkpoint="latest"))
    assert rest.losses == whole.losses[5:]
    a, b = weights(tmp_path / "part"), weights(tmp_path / "whole")
    assert all(torch.equal(a[name], b[name]) for name in b)


def make_vae():
    torch.manual_seed(0)
    return AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=2, block_out_channels=(4, 4), norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=0.5,
    )  # fmt: skip


def test_models_of_latents_and_of_other_scales_are_fine_tuned(folder, tmp_path):
    clean = {"train_data_dir": str(folder / "clean.npz"), "sigma_column": None, "value_range": None, "sigma": 0.3}
    clean |= {"add_noise": True, "unet_config": None}
    make_vae().save_pretrained(tmp_path / "vae")
    _, trainer = train(config(folder, tmp_path / "latent", **{**clean, "unet_config": str(folder / "unet.json")},
                              vae=str(tmp_path / "vae"), augmentation=None))  # fmt: skip
    assert trainer.recipe.frozen._drawn.shape == (N, 2, 4, 4)
    assert DiffusionPipeline.from_pretrained(tmp_path / "latent").vae is not None
    latent = {"pretrained_model_name_or_path": str(tmp_path / "latent"), "unet_config": None}
    values = config(folder, tmp_path / "no", **latent)
    with pytest.raises(ValueError, match="`add_noise` must be set for a model of latents"):
        train(values)
    unet = UNet2DModel(**{**UNET, "dropout": 0.0}, sample_size=8, in_channels=1, out_channels=1)
    for name, scheduler in (("flow", FlowMatchEulerDiscreteScheduler()), ("ddim", DDIMScheduler())):
        save_repo(ImageGenerationPipeline(unet, scheduler, image_scale=2.0), tmp_path / name)
        base = {"pretrained_model_name_or_path": str(tmp_path / name)}
        _, trainer = train(config(folder, tmp_path / f"{name}-out", **base, unet_config=None))
        assert trainer.recipe.image_scale == 2.0
        batch = {"sigma": torch.tensor([0.0, 0.3])}
        sample = trainer.recipe.encode({"pixel_values": torch.ones(2, 1, 8, 8)}, trainer.ctx)
        y, levels = trainer.recipe.noisy(sample, batch, trainer.ctx)
        assert levels.tolist() == pytest.approx([0, 0.6])  # noise is scaled with the images
        assert (y == 2).all()
        _, trainer = train(config(folder, tmp_path / f"{name}-added", **base, **clean))
        assert trainer.recipe.frozen.sigma == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sigma": 0.1}, "exactly one of `sigma` and `sigma_column` must be given, got 0.1 and 'sigma'"),
        ({"sigma_column": None}, "exactly one of `sigma` and `sigma_column` must be given, got None and None"),
        ({"sigma": -0.1, "sigma_column": None}, "`sigma` must be a number > 0, got -0.1"),
        ({"sigma": float("nan"), "sigma_column": None}, "`sigma` must be a finite number, got nan"),
        ({"noisy_fraction": 0.5}, "`noisy_fraction` must be 1 where noise is not added here"),
        ({"noisy_fraction": 0.0}, r"`noisy_fraction` must be a number in \(0, 1\], got 0.0"),
        ({"noise_seed": -1}, "`noise_seed` must be an integer >= 0, got -1"),
        ({"consistency_weight": -1.0}, "`consistency_weight` must be a number >= 0, got -1.0"),
        ({"consistency_steps": 0}, "`consistency_steps` must be an integer >= 1, got 0"),
        ({"consistency_every": "never"}, r"`consistency_every` must be one of \['below', 'all'\]"),
        ({"max_amplification": 1.0}, "`max_amplification` must be a number > 1"),
        ({"weighting": "omni"}, r"`weighting` must be one of \['paper', 'uniform'\]"),
        ({"streaming": True, "add_noise": True, "value_range": None},
         "`streaming` must be False where noise is added here: it belongs to a place in the data"),
        ({"noise": "knn"}, "`noise` must be 'gaussian' without `noise_offset`, got 'knn'"),
        ({"noise_offset": 0.1}, "`noise` must be 'gaussian' without `noise_offset`, got 'gaussian' and"),
        ({"augmentation": "flip,rotate"}, r"`augmentation` must be of \['flip', 'turn', 'roll'\], got \['rotate'\]"),
        ({"add_noise": True}, "`value_range` must be left out with `add_noise`"),
        ({"value_range": "1,0"}, "`value_range` must be two finite numbers, low < high"),
        ({"vae": "x"}, "`add_noise` must be set for a model of latents"),
        ({"vae": "x", "add_noise": True, "value_range": None, "random_flip": True},
         r"`augmentation` and `random_flip` must be left out for a model of latents, got \['flip'\]"),
        ({"conservativity_weight": 1.0}, "`conservativity_weight` must be 0"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(folder, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(folder, tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sigma_column": "level"}, "`sigma_column` must be one of the columns"),
        ({"resolution": 16}, "`resolution` must be at most the size of every image, none of which is resized"),
        ({"sigma_column": None, "sigma": 200.0, "prediction_type": "epsilon"},
         "`sigma` must be below the largest noise level of the schedule, 157.4, got 200"),
        ({"prediction_type": "epsilon", "snr_gamma": 5.0, "levels": "clamp"}, "`snr_gamma` must be left out with"),
    ],
)  # fmt: skip
def test_bad_data_are_refused_before_training(folder, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(config(folder, tmp_path, **changes))
    assert not list(tmp_path.glob("checkpoint-*"))


# ---------------------------------------------------------------- text-to-image pipelines


def text_arguments(folder, output_dir, name="stable_diffusion", **changes):
    values = {
        **COMMON,
        "train_batch_size": 3,
        "max_train_steps": 2,
        "pretrained_model_name_or_path": str(folder / name),
        "train_data_dir": str(folder / "photos"),
        "output_dir": str(output_dir),
        "resolution": 16 if name == "stable_diffusion" else 32,
        "center_crop": True,
    }
    return {**values, **changes}


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_3"])
def test_a_pipeline_on_clean_images_is_trained_as_ever(folder, tmp_path, name):
    ours = AmbientTextConfig(**text_arguments(folder, tmp_path / "ours", name, lora_rank=2, sigma_column="none"))
    plain = TextToImageConfig(**text_arguments(folder, tmp_path / "plain", name, lora_rank=2))
    assert train(ours, AmbientTextRecipe)[0].losses == train(plain, TextToImageRecipe)[0].losses
    a, b = weights(tmp_path / "ours", LORA), weights(tmp_path / "plain", LORA)
    assert all(torch.equal(a[key], b[key]) for key in b)


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_3"])
def test_lora_on_noised_latents_with_consistency(folder, tmp_path, name):
    changes = {"lora_rank": 2, "sigma_column": "level", "consistency_weight": 0.5, "consistency_every": "all"}
    values = AmbientTextConfig(
        **text_arguments(folder, tmp_path, name, **changes, consistency_steps=1, cache_latents=True)
    )
    record, trainer = train(values, AmbientTextRecipe)
    assert np.isfinite(record.losses).all()
    assert any(logs["consistency"] != 0 for logs in record.logs)
    recipe = trainer.recipe
    assert recipe.frozen.levels(torch.arange(6)).tolist() == pytest.approx([0, 0.3] * 3)
    assert recipe.frozen._drawn.shape[0] == 6
    layers = weights(tmp_path, LORA)
    assert any(value.abs().max() > 0 for key, value in layers.items() if "lora_B" in key or "lora.up" in key)
    assert "2404.10177" in (tmp_path / "README.md").read_text()


def test_one_timestep_for_all_leaves_out_samples_that_are_noisier(folder, tmp_path):
    _, trainer = train(AmbientTextConfig(**text_arguments(folder, tmp_path, sigma_column="level")), AmbientTextRecipe)
    recipe = trainer.recipe
    task, own = next(iter(recipe.tasks.values())), torch.tensor([0.0, 0.3, 5.0])
    left_out = set()
    for step in range(60):
        trainer.rng.begin(step)
        t, weight = task.draw(own, trainer.rng, one_timestep=True)
        assert len(t.unique()) == 1
        level = task.schedule.sigma(t)
        assert weight.tolist() == [1.0, float(level[1] > 0.3), float(level[2] > 5)]
        made = task.make(torch.randn(3, 4), own, torch.randn(3, 4), t, weight)
        prediction = torch.randn(3, 4).requires_grad_()
        (gradient,) = torch.autograd.grad(task.loss(prediction, made), prediction)
        assert ((gradient == 0).all(1) == (weight == 0)).all()
        left_out |= {int(weight.sum())}
    assert left_out == {1, 2, 3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sigma": 0.3, "random_flip": True}, "`random_flip` must be False: noise belongs to an image as it is"),
        ({}, "exactly one of `sigma` and `sigma_column`"),
        (
            {"sigma": 0.3, "class_data_dir": "c", "class_prompt": "a cat", "instance_prompt": "a red cat"},
            "`class_data_dir` must be left out: images of a class have no noise of their own",
        ),
    ],
)
def test_bad_arguments_of_text_are_refused(folder, tmp_path, changes, message):
    with pytest.raises(ValueError, match=re.escape(message) if "(" in message else message):
        AmbientTextConfig(**text_arguments(folder, tmp_path, **changes))
