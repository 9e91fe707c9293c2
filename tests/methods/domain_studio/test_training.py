"""DomainStudio's recipe: plain training at weight 0, the frozen source, repos, and refusals."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LDMPipeline,
    UNet2DModel,
    VQModel,
)
from safetensors.torch import load_file

from diffusers_ext import (
    DenoisingConfig,
    DenoisingRecipe,
    DomainStudioConfig,
    DomainStudioRecipe,
    ImageGenerationPipeline,
    Trainer,
    push_repo,
    save_repo,
)
from diffusers_ext.methods.domain_studio.unconditional import UnconditionalModel
from tests import processes
from tests.methods.oms.tiny import stable_diffusion
from tests.training.tiny import UNET, Record


def network(**options):
    torch.manual_seed(0)
    arguments = {**UNET, "dropout": 0.0, "sample_size": 8, "in_channels": 1, "out_channels": 1, **options}
    return UNet2DModel(**arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Untrained source models, and ten images."""
    folder = tmp_path_factory.mktemp("domain")
    rng = np.random.default_rng(0)
    for name, n in (("ten", 10), ("one", 1)):
        np.savez(folder / f"{name}.npz", images=rng.integers(0, 256, (n, 8, 8), dtype=np.uint8))
    save_repo(ImageGenerationPipeline(network(), DDPMScheduler(), image_scale=2.0), folder / "base")
    save_repo(ImageGenerationPipeline(network(), FlowMatchEulerDiscreteScheduler()), folder / "flow")
    save_repo(ImageGenerationPipeline(network(num_class_embeds=3), DDIMScheduler()), folder / "classes")
    stable_diffusion().save_pretrained(folder / "text")
    save_repo(ImageGenerationPipeline(network(), DDPMScheduler(rescale_betas_zero_snr=True)), folder / "blind")
    save_repo(ImageGenerationPipeline(network(), EDMEulerScheduler()), folder / "karras")
    save_repo(ImageGenerationPipeline(network(sample_size=(8, 16)), DDIMScheduler()), folder / "oblong")
    vqvae = VQModel(in_channels=1, out_channels=1, block_out_channels=(4,), norm_num_groups=2, latent_channels=1)
    LDMPipeline(vqvae, network(), DDIMScheduler()).save_pretrained(folder / "vq")
    return folder


COMMON = {
    "train_batch_size": 4,
    "max_train_steps": 3,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "num_validation_images": 2,
    "validation_inference_steps": 2,
    "ema_decay": 0.5,
}
PLAIN = {"pair_weight": 0.0, "hf_pair_weight": 0.0, "hf_mse_weight": 0.0}


def config(folder, output_dir, **changes):
    values = {
        **COMMON,
        "pretrained_model_name_or_path": str(folder / "base"),
        "train_data_dir": str(folder / "ten.npz"),
        "output_dir": str(output_dir),
        "resolution": 8,
        "channels": 1,
    }
    return DomainStudioConfig(**{**values, **changes})


def train(config, **record):
    record = Record(**record)
    recipe = DomainStudioRecipe(config)
    trainer = Trainer(config, recipe, [record])
    result = trainer.train()
    return result, record.losses, trainer


def weights(folder, file="unet/diffusion_pytorch_model.safetensors"):
    return load_file(Path(folder) / file)


def test_at_weight_zero_it_is_plain_training(folder, tmp_path):
    values = config(folder, tmp_path / "ours", **PLAIN)
    _, ours, _ = train(values)
    plain = DenoisingConfig(
        **COMMON,
        adam_weight_decay=0.0,
        pretrained_model_name_or_path=str(folder / "base"),
        train_data_dir=str(folder / "ten.npz"),
        output_dir=str(tmp_path / "plain"),
        resolution=8,
        channels=1,
    )
    record = Record()
    Trainer(plain, DenoisingRecipe(plain), [record]).train()
    assert ours == pytest.approx(record.losses, abs=1e-6)
    a, b = weights(tmp_path / "ours"), weights(tmp_path / "plain")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-6)


def test_the_source_stays_and_the_pair_loss_begins_at_zero(folder, tmp_path):
    values = config(folder, tmp_path / "out", learning_rate=1e-2)
    record = Record()
    trainer = Trainer(values, DomainStudioRecipe(values), [record])
    trainer.train()
    assert abs(record.logs[0]["pair"]) < 1e-5
    assert abs(record.logs[0]["hf_pair"]) < 1e-5
    assert record.logs[-1]["pair"] > 0
    source = trainer.ctx.modules.frozen["source"]
    before = weights(values.pretrained_model_name_or_path)
    assert all(torch.equal(before[name], value) for name, value in source.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in source.parameters())
    assert not source.training


@pytest.mark.parametrize(
    "scheduler",
    [EulerDiscreteScheduler(), DPMSolverMultistepScheduler(), DDPMScheduler(beta_schedule="sigmoid")],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_the_noise_is_that_of_the_schedule_whatever_the_scheduler(tmp_path, scheduler):
    for channels in (1, 2):
        save_repo(ImageGenerationPipeline(network(out_channels=channels), scheduler), tmp_path / str(channels))
        noising = UnconditionalModel(str(tmp_path / str(channels))).training_scheduler
        t = torch.tensor([0, 100, 900])
        found = noising.add_noise(torch.zeros(3, 1), torch.ones(3, 1), t).flatten()
        torch.testing.assert_close(found, (1 - (1 - scheduler.betas).cumprod(0)[t]).sqrt(), rtol=1e-4, atol=1e-5)


def test_flow_models_train(folder, tmp_path):
    _, losses, _ = train(config(folder, tmp_path, pretrained_model_name_or_path=str(folder / "flow")))
    assert np.isfinite(losses).all()


def test_a_resumed_run_equals_the_uninterrupted_one(folder, tmp_path):
    _, expected, _ = train(config(folder, tmp_path / "whole", max_train_steps=5))
    result, first, _ = train(config(folder, tmp_path / "cut", max_train_steps=5), signal_at=2)
    assert result.stopped_by == "SIGTERM"
    _, second, _ = train(config(folder, tmp_path / "cut", max_train_steps=5, resume_from_checkpoint="latest"))
    assert first + second == expected
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_script_makes_a_repo(folder, tmp_path):
    arguments = {k: v for k, v in config(folder, tmp_path).to_dict().items() if v is not None}
    (tmp_path / "arguments.json").write_text(json.dumps(arguments))
    run = processes.run([sys.executable, "training/train_domain_studio.py", "--config", tmp_path / "arguments.json"])
    assert run.returncode == 0, run.stderr
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    assert isinstance(pipeline, ImageGenerationPipeline)
    assert pipeline.config["image_scale"] == 2.0
    assert "2306.14153" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretrained_model_name_or_path": None}, "`pretrained_model_name_or_path` must be given"),
        ({"train_data_dir": "one"}, "`train_data_dir` must be a folder of at least 2 images, not 1"),
        ({"train_batch_size": 2}, "`train_batch_size` must be an integer >= 3 with a pair loss"),
        ({"train_batch_size": 11}, "`train_batch_size` must be small enough"),
        ({"resolution": 16}, "`resolution` must be 8, the size of the model's images, got 16"),
        ({"channels": 3}, "`channels` must be 1, as"),
        ({"pair_weight": -1.0}, "`pair_weight` must be a number >= 0, got -1.0"),
        ({"pretrained_model_name_or_path": "classes"}, "must be a model without classes, got .* with 3"),
        (
            {"pretrained_model_name_or_path": "text"},
            r"StableDiffusionPipeline with \['text_encoder'\]: .*domain_studio_text",
        ),
        ({"pretrained_model_name_or_path": "blind"}, "must have a scheduler .* got .*blind.* that ends at zero SNR"),
        ({"pretrained_model_name_or_path": "karras"}, "must have a scheduler .* with EDMEulerScheduler"),
        (
            {"pretrained_model_name_or_path": "vq"},
            r"must consist of a `unet`.* got .*vq' with \['vqvae'\] beside them",
        ),
        (
            {"pretrained_model_name_or_path": "oblong"},
            r"must be a model of square images.* got `sample_size` \[8, 16\]",
        ),
        ({"max_pair_timestep": -1}, "`max_pair_timestep` must be an integer >= 0 or left out, got -1"),
        ({"max_pair_timestep": 1000}, r"`max_pair_timestep` must be in 0\.\.999, the model's timesteps.* got 1000"),
        ({"similarity_space": "latent"}, "`similarity_space` must be 'pixel' for a model of pixels, got 'latent'"),
        ({"validation_inference_steps": 1001}, "`validation_inference_steps` must be a number of steps that DDIMSch"),
    ],
)
def test_bad_arguments(folder, tmp_path, changes, message):
    named = {"train_data_dir": ".npz", "pretrained_model_name_or_path": ""}
    values = {k: f"{folder / v}{named[k]}" if k in named and v is not None else v for k, v in changes.items()}
    with pytest.raises(ValueError, match=message):
        train(config(folder, tmp_path, **values))


def test_the_source_is_not_written_over(folder):
    with pytest.raises(ValueError, match="`output_dir` must be another folder than the source model's"):
        train(config(folder, folder / "base"))


def test_the_limit_on_pairs_counts_in_the_network_s_timesteps(folder, tmp_path):
    """A flow at 100 of 1000 is at noise level 0.1: with the limit below all levels no pair is left."""
    record = Record()
    for limit in (0, 999):
        values = config(folder, tmp_path / str(limit), pretrained_model_name_or_path=str(folder / "flow"))
        values = dataclasses.replace(values, max_pair_timestep=limit, max_train_steps=2, learning_rate=1e-2)
        Trainer(values, DomainStudioRecipe(values), [record]).train()
    logs = [entry["pair"] for entry in record.logs]
    assert logs[:2] == [0, 0]
    assert logs[3] > 0


def test_push_wants_a_repo(tmp_path):
    with pytest.raises(ValueError, match="model_index.json or pytorch_lora_weights.safetensors"):
        push_repo(tmp_path, "me/nothing")
