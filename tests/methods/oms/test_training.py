"""Training the module: its minimiser, what it loads, precomputation, resume, and refusals."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, UNet2DModel
from safetensors.torch import load_file

from diffusers_ext import ImageGenerationPipeline, OMSConfig, OMSPipeline, OMSRecipe, Trainer, save_repo
from tests.training.tiny import UNET, Record

from .gaussian import STABLE_DIFFUSION

MODULE = {**UNET, "dropout": 0.0}
COLOURS = np.array([0.1, 0.5, 0.9])  # mean brightness of the classes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base of three classes and a null label, and images around the mean of their class."""
    folder = tmp_path_factory.mktemp("oms")
    labels = np.arange(300) % 3
    noise = np.random.default_rng(0).normal(0, 0.05, (300, 8, 8))
    np.savez(folder / "data.npz", images=(COLOURS[labels, None, None] + noise).clip(0, 1), labels=labels)
    (folder / "module.json").write_text(json.dumps(MODULE))
    torch.manual_seed(0)
    unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, num_class_embeds=4, **MODULE)
    scheduler = DDIMScheduler(**STABLE_DIFFUSION, clip_sample=False, timestep_spacing="trailing")
    save_repo(ImageGenerationPipeline(unet, scheduler, null_class_label=3, image_scale=2.0), folder / "base")
    # The base's UNet is not needed: nothing is left of it but its configuration.
    shutil.copytree(folder / "base", folder / "base-without-weights")
    (folder / "base-without-weights" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    return folder


def config(folder, output_dir, **changes):
    values = {
        "pretrained_model_name_or_path": str(folder / "base-without-weights"),
        "train_data_dir": str(folder / "data.npz"),
        "module_config": str(folder / "module.json"),
        "output_dir": str(output_dir),
        "resolution": 8,
        "channels": 1,
        "center_crop": True,
        "train_batch_size": 32,
        "max_train_steps": 12,
        "learning_rate": 1e-2,
        "ema_decay": 0.9,
        "logging_steps": 1,
        "num_validation_images": 3,
    }
    return OMSConfig(**{**values, **changes})


def train(config, **record):
    record = Record(**record)
    result = Trainer(config, OMSRecipe(config), [record]).train()
    return result, record.losses


def weights(folder):
    return load_file(folder / "oms_module" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """An unbroken run: its losses and weights."""
    output_dir = tmp_path_factory.mktemp("whole")
    _, losses = train(config(folder, output_dir))
    return losses, weights(output_dir)


def test_the_module_learns_minus_the_mean_of_its_class(folder, tmp_path):
    train(config(folder, tmp_path, max_train_steps=150, condition_dropout=0.2))
    base = DiffusionPipeline.from_pretrained(folder / "base")
    pipeline = OMSPipeline.from_pretrained(tmp_path, base=base)
    assert pipeline.config["image_scale"] == 2.0
    data = np.load(folder / "data.npz")
    module = pipeline.oms_module
    with torch.no_grad():
        for label in range(4):  # the null label stands for all of them
            noise = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(label))
            out = module(noise, torch.full((64,), label)).sample
            images = data["images"] if label == 3 else data["images"][data["labels"] == label]
            expected = -2 * (2 * images.mean() - 1)
            assert out.mean().item() == pytest.approx(expected, abs=0.12)
            assert out.mean((1, 2, 3)).std() < 0.1  # the noise tells nothing, so the output does not depend on it


def test_precomputing_changes_nothing(folder, tmp_path, whole):
    _, found = train(config(folder, tmp_path, precompute=True))
    assert found == whole[0]
    a, b = whole[1], weights(tmp_path)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_an_interrupted_precomputation_goes_on(folder, tmp_path, monkeypatch, whole):
    moments, calls = OMSRecipe._moments, []

    def dying(self, items, ctx):
        calls.append(len(items))
        if sum(calls) > 256:
            raise KeyboardInterrupt
        return moments(self, items, ctx)

    monkeypatch.setattr(OMSRecipe, "_moments", dying)
    with pytest.raises(KeyboardInterrupt):
        train(config(folder, tmp_path / "cut", precompute=True))
    files = list((tmp_path / "cut").glob("precomputed-*/*"))
    assert [f.name for f in files] == ["00000000.safetensors"]
    written = files[0].stat().st_mtime_ns
    monkeypatch.setattr(OMSRecipe, "_moments", moments)
    _, found = train(config(folder, tmp_path / "cut", precompute=True))
    assert found == whole[0]
    assert files[0].stat().st_mtime_ns == written


def test_a_resumed_run_equals_the_uninterrupted_one(folder, tmp_path, whole):
    result, first = train(config(folder, tmp_path), signal_at=5)
    assert result.stopped_by == "SIGTERM"
    _, second = train(config(folder, tmp_path, resume_from_checkpoint="latest"))
    assert first + second == whole[0]
    a, b = whole[1], weights(tmp_path)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_output_is_a_repo_that_names_its_base(folder, tmp_path):
    train(config(folder, tmp_path, max_train_steps=1))
    assert {"README.md", "model_index.json", "oms_module", "pipeline.py", "sample.png"} <= {
        p.name for p in tmp_path.iterdir()
    }
    card = (tmp_path / "README.md").read_text()
    assert f'DiffusionPipeline.from_pretrained("{folder / "base-without-weights"}")' in card
    assert "base_model:" not in card  # a folder is no repo of the Hub
    assert f'OMSPipeline.from_pretrained("{tmp_path}", base=base)' in card


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretrained_model_name_or_path": None}, "`pretrained_model_name_or_path` must be given"),
        (
            {"pretrained_model_name_or_path": "/nowhere"},
            "`pretrained_model_name_or_path` must be a Hub repo or a folder",
        ),
        ({"module_config": "/nowhere.json"}, "`module_config` must be an existing file or one of"),
        ({"module_config": __file__}, "`module_config` must be a JSON object in a file"),
        ({"channels": 3}, "`channels` must be 1"),
        ({"condition_dropout": 1.0}, r"`condition_dropout` must be a number in \[0, 1\)"),
        ({"precompute": True, "random_flip": True}, "`precompute` must be False with"),
        ({"precompute": True, "center_crop": False}, "`precompute` must be False with"),
    ],
)
def test_bad_arguments(folder, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(config(folder, tmp_path, **changes))


def test_flow_matching_bases_are_refused(folder, tmp_path):
    unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, **MODULE)
    save_repo(ImageGenerationPipeline(unet, FlowMatchEulerDiscreteScheduler()), tmp_path / "flow")
    with pytest.raises(ValueError, match="flow matching starts from pure noise"):
        train(config(folder, tmp_path / "out", pretrained_model_name_or_path=str(tmp_path / "flow")))


def test_a_base_with_classes_wants_labels(folder, tmp_path):
    np.savez(tmp_path / "data.npz", images=np.zeros((40, 8, 8), np.uint8))
    with pytest.raises(ValueError, match="`label_column` must name a column of class labels"):
        train(config(folder, tmp_path / "out", train_data_dir=str(tmp_path / "data.npz")))
