"""Both trainings as a user runs them, from frames on the disk to a denoised image."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from diffusers_ext import (
    CameraTruth,
    PNNPConfig,
    PNNPNoiseConfig,
    PNNPNoiseRecipe,
    PNNPRecipe,
    Trainer,
    noise_divergence,
    simulate_dark_frames,
    simulate_flat_pairs,
)
from diffusers_ext.methods.pnnp.recipe import denoising_loss
from diffusers_ext.train import main
from tests.training.tiny import Record

TRUTH, ISOS = CameraTruth(64, 96), (400, 1600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Dark frames as .npy, flats as .tif, clean images as .npy."""
    folder = tmp_path_factory.mktemp("pnnp")
    for iso, frames in simulate_dark_frames(TRUTH, ISOS, 12).items():
        (folder / "darks" / f"ISO{iso}").mkdir(parents=True)
        for i, frame in enumerate(frames):
            np.save(folder / "darks" / f"ISO{iso}" / f"{i:02d}.npy", frame)
    for iso, pairs in simulate_flat_pairs(TRUTH, ISOS).items():
        (folder / "flats" / str(iso)).mkdir(parents=True)
        for i, frame in enumerate(frame for pair in pairs for frame in pair):
            Image.fromarray(frame).save(folder / "flats" / str(iso) / f"{i}.tif")
    (folder / "clean").mkdir()
    y, x = np.mgrid[:96, :128]
    for i in range(4):
        scene = 6000 + 5000 * np.sin(x / (9 + i)) * np.cos(y / (7 + i))
        np.save(folder / "clean" / f"{i}.npy", (512 + scene).astype(np.uint16))
    (folder / "unet.json").write_text(json.dumps({"base_channels": 4}))
    return folder


def noise_config(folder, output_dir, **changes):
    values = {
        "dark_frames_dir": str(folder / "darks"),
        "output_dir": str(output_dir),
        "camera": "sony_a7s2",
        "max_train_steps": 6,
        "num_values": 500,
        "num_points": 50,
        "hidden_channels": 4,
        "logging_steps": 1,
        "checkpointing_steps": 3,
        "num_validation_images": 0,
    }
    return PNNPNoiseConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def learned(folder):
    """The camera's noise, by the command."""
    arguments = {
        "dark_frames_dir": folder / "darks",
        "flat_frames_dir": folder / "flats",
        "black_level": 512,
        "white_level": 16383,
        "output_dir": folder / "noise",
        "max_train_steps": 120,
        "num_values": 4096,
        "ema_decay": 0.95,
        "validation_steps": 100,
    }
    main(["pnnp_noise", *(word for name, value in arguments.items() for word in (f"--{name}", str(value)))])
    return DiffusionPipeline.from_pretrained(folder / "noise")


def test_the_noise_is_learned(folder, learned):
    """Nearer to the truth than the Gaussian of the right deviation, and of the right deviation; gain from flats."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    for iso in ISOS:
        true = torch.from_numpy(TRUTH.pixel_noise((10**6,), iso, rng))
        found = learned.proxy.sample((1, 10**6), iso, generator)[0]
        assert found.std().item() == pytest.approx(TRUTH.pixel_std(iso), rel=0.03)
        # As the camera records it: the noise of rounding is counted once.
        assert found.round().std().item() == pytest.approx(true.round().std().item(), rel=0.03)
        if iso == 1600:
            normal = torch.randn(10**6, generator=generator) * TRUTH.pixel_std(iso)
            assert noise_divergence(true, found) < 0.8 * noise_divergence(true, normal)
    assert learned.profile.gain(1600) == pytest.approx(TRUTH.gain(1600), rel=0.1)
    assert learned.profile.black_level == 512
    assert (folder / "noise" / "samples").is_dir()
    card = (folder / "noise" / "README.md").read_text()
    assert "deviation over the recorded one, ISO 400" in card


def test_a_stopped_run_goes_on_exactly_and_reads_no_frame_again(folder, tmp_path, monkeypatch):
    config = noise_config(folder, tmp_path / "run")
    watch = Record()
    Trainer(config, PNNPNoiseRecipe(config), [watch]).train()
    weights = (tmp_path / "run" / "proxy" / "diffusion_pytorch_model.safetensors").read_bytes()
    monkeypatch.setattr("diffusers_ext.methods.pnnp.noise_recipe.read_frames", None)
    checkpoint = next(path for path in (tmp_path / "run").glob("checkpoint-*") if int(path.name.split("-")[-1]) == 3)
    config = noise_config(folder, tmp_path / "run", resume_from_checkpoint=str(checkpoint), overwrite_output_dir=True)
    again = Record()
    Trainer(config, PNNPNoiseRecipe(config), [again]).train()
    assert again.losses == watch.losses[3:]
    assert (tmp_path / "run" / "proxy" / "diffusion_pytorch_model.safetensors").read_bytes() == weights


def config(folder, output_dir, **changes):
    values = {
        "train_data_dir": str(folder / "clean"),
        "output_dir": str(output_dir),
        "camera": "sony_a7s2",
        "unet_config": str(folder / "unet.json"),
        "resolution": 32,
        "max_train_steps": 4,
        "learning_rate": 2e-3,
        "logging_steps": 1,
        "checkpointing_steps": 2,
        "num_validation_images": 2,
    }
    return PNNPConfig(**{**values, **changes})


def test_a_denoiser_is_trained_on_it(folder, learned, tmp_path):
    """It takes noise away from patches, and from a frame of the pipeline; dark frames go with it."""
    changes = {"camera": None, "noise_model": str(folder / "noise"), "iso": "1600,1600", "ratio": "250,300"}
    settings = config(folder, tmp_path / "run", max_train_steps=100, learning_rate=5e-3, ema_decay=0.8, **changes)
    recipe = PNNPRecipe(settings)
    Trainer(settings, recipe).train()
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "run")
    pipeline.set_progress_bar_config(disable=True)
    figures = recipe.figures(pipeline, torch.Generator().manual_seed(0))
    assert figures["PSNR, denoised"] > figures["PSNR, noisy"] + 0.5
    assert (pipeline.config["white_level"], pipeline.config["black_level"]) == (16383, 512)
    frame = np.full((64, 96), 700, np.uint16)
    assert pipeline(frame, iso=1600, ratio=50.0).images[0].shape == (64, 96)
    assert torch.equal(pipeline.dark.slope, learned.dark.slope)
    assert "PSNR, denoised" in (tmp_path / "run" / "README.md").read_text()


def test_the_denoiser_s_run_goes_on_exactly(folder, tmp_path):
    settings = config(folder, tmp_path / "run", loss="l2")
    watch = Record()
    Trainer(settings, PNNPRecipe(settings), [watch]).train()
    checkpoint = next(path for path in (tmp_path / "run").glob("checkpoint-*") if int(path.name.split("-")[-1]) == 2)
    resumed = {"resume_from_checkpoint": str(checkpoint), "overwrite_output_dir": True, "loss": "l2"}
    settings, again = config(folder, tmp_path / "run", **resumed), Record()
    Trainer(settings, PNNPRecipe(settings), [again]).train()
    assert again.losses == watch.losses[2:]


def test_the_loss_cuts_nothing():
    output = torch.tensor([-1.0, 3.0], requires_grad=True)
    clean = torch.tensor([0.5, 0.5])
    assert denoising_loss(output, clean, "l1").item() == 2
    assert denoising_loss(output, clean, "l2").item() == pytest.approx((1.5**2 + 2.5**2) / 2)
    denoising_loss(output, clean, "l1").backward()
    assert output.grad.tolist() == [-0.5, 0.5]


def start(recipe, make, *arguments, **changes):
    settings = make(*arguments, **changes)
    Trainer(settings, recipe(settings)).train()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"camera": None}, "one of `flat_frames_dir`, `camera` and `iso_to_gain` must be given"),
        ({"iso_to_gain": "0.1,0"}, "one of `flat_frames_dir`, `camera` and `iso_to_gain` must be given"),
        ({"camera": None, "iso_to_gain": "0.1"}, "`iso_to_gain` must be 2 numbers with commas between them"),
        ({"native_limits": "1600,400"}, "`native_limits` must be rising numbers > 0"),
        ({"num_values": 1}, "`num_values` must be an integer >= 2"),
        ({"black_level": 20000.0}, "`white_level` must be above black_level"),
        ({"dark_frames_dir": "nowhere"}, "`dark_frames_dir` must be an existing folder"),
    ],
)
def test_wrong_arguments_of_the_noise_are_refused(folder, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        start(PNNPNoiseRecipe, noise_config, folder, tmp_path / "run", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise_model": "x"}, "exactly one of `noise_model` and `camera` must be given"),
        ({"camera": None}, "exactly one of `noise_model` and `camera` must be given"),
        ({"pixel_noise": "proxy"}, "`pixel_noise` must be 'gaussian' with `camera`"),
        ({"ratio": "0.5,2"}, "`ratio` must be two numbers >= 1, not falling"),
        ({"iso": "800,400"}, "`iso` must be two numbers > 0, not falling"),
        ({"resolution": 64}, "`resolution` must be at most half of the images' sides"),
        ({"pattern": "RGB"}, "`pattern` must be one of"),
        ({"camera": None, "noise_model": "nowhere"}, "`noise_model` must be a SensorNoisePipeline's repo or folder"),
    ],
)
def test_wrong_arguments_of_the_denoiser_are_refused(folder, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        start(PNNPRecipe, config, folder, tmp_path / "run", **changes)
