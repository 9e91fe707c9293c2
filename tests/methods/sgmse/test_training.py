"""The recipe: its loss on known outputs, exact resume, and what is saved."""

import json
import math

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from diffusers_ext import DNSMOS, OUVEScheduler, SBVEScheduler, SGMSEConfig, SGMSERecipe, Trainer, save_repo
from diffusers_ext.methods.sgmse import recipe
from diffusers_ext.methods.sgmse.recipe import enhancement_loss
from tests.training.tiny import Record

from .tiny import SMALL, SOUND, pipeline

soundfile = pytest.importorskip("soundfile")


@pytest.mark.parametrize("kind", ["score", "epsilon", "sample", "mean"])
def test_loss_of_outputs_that_are_known(kind):
    generator = torch.Generator().manual_seed(0)
    x0, y, z = (torch.randn(4, 1, 32, 32, dtype=torch.complex128, generator=generator) for _ in range(3))
    t = torch.tensor([0.03, 0.2, 0.6, 1.0], dtype=torch.float64)
    scheduler = OUVEScheduler(prediction_type=kind)
    std = scheduler.std(t)[:, None, None, None]
    x, mean = scheduler.add_noise(x0, z, t, y), scheduler.mean(x0, y, t)
    perfect = {"score": -z / std, "epsilon": z, "sample": x0, "mean": mean}[kind]
    assert enhancement_loss(scheduler, perfect, t, x, y, x0, z).item() == pytest.approx(0, abs=1e-20)
    nothing = {"score": 0 * x, "epsilon": 0 * x, "sample": 0 * x, "mean": x}[kind]
    expected = x0.abs().square().mean() if kind == "sample" else z.abs().square().mean()
    assert enhancement_loss(scheduler, nothing, t, x, y, x0, z).item() == pytest.approx(expected.item(), rel=1e-9)
    assert abs(expected.item() - 1) < 5 / math.sqrt(x0.numel())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sgmse")
    rng = np.random.default_rng(0)
    for i in range(4):
        clean = 0.3 * np.sin(np.arange(2000) * (0.1 + 0.1 * i))
        for name, wave in (("clean", clean), ("noisy", clean + 0.05 * rng.standard_normal(2000))):
            (folder / "pairs" / name).mkdir(parents=True, exist_ok=True)
            soundfile.write(folder / "pairs" / name / f"{i}.wav", wave, 8000)
    (folder / "unet.json").write_text(json.dumps(SMALL))
    save_repo(pipeline(), folder / "base")
    return folder


def config(folder, output_dir, **changes):
    values = {
        **SOUND,
        "train_data_dir": str(folder / "pairs"),
        "output_dir": str(output_dir),
        "unet_config": str(folder / "unet.json"),
        "num_frames": 8,
        "train_batch_size": 2,
        "max_train_steps": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "ema_decay": 0.5,
        "num_validation_images": 1,
        "validation_inference_steps": 1,
    }
    return SGMSEConfig(**{**values, **changes})


def train(config, **record):
    record = Record(**record)
    result = Trainer(config, SGMSERecipe(config), [record]).train()
    return result, record.losses


def weights(folder):
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(autouse=True)
def quick_listener(monkeypatch):
    """Stands for the networks of DNSMOS, which take seconds to load."""
    monkeypatch.setattr(recipe, "dnsmos", lambda wave, rate: DNSMOS(float(np.abs(wave).max() > 0), 0.0, 0.0, 0.0))


def test_figures_that_cannot_be_taken_are_left_out(folder, tmp_path, monkeypatch):
    def missing(*_):
        raise ImportError

    monkeypatch.setattr(recipe, "dnsmos", missing)
    monkeypatch.setattr(recipe, "estoi", missing)
    train(config(folder, tmp_path, max_train_steps=1))
    card = (tmp_path / "README.md").read_text()
    assert "| SI-SDR, noisy |" in card
    assert not any(name in card for name in ("ESTOI", "DNSMOS"))


def test_a_resumed_run_is_the_whole_one(folder, tmp_path, capsys):
    mixed = {"train_data_dir": str(folder / "pairs" / "clean"), "noise_dir": str(folder / "pairs" / "noisy")}
    mixed |= {"reverberation": True, "validation_data_dir": str(folder / "pairs"), "validation_steps": 2}
    whole, losses = train(config(folder, tmp_path / "whole", **mixed))
    assert "samples/s" in capsys.readouterr().err
    assert whole.steps == 4
    half, first = train(config(folder, tmp_path / "half", **mixed), signal_at=2)
    assert half.stopped_by == "SIGTERM"
    _, second = train(config(folder, tmp_path / "half", **mixed, resume_from_checkpoint="latest"))
    assert first + second == losses
    assert len(set(losses)) == 4
    found = [weights(tmp_path / name) for name in ("whole", "half")]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])

    loaded = DiffusionPipeline.from_pretrained(tmp_path / "whole")
    loaded.set_progress_bar_config(disable=True)
    result = loaded(np.random.default_rng(0).standard_normal(500), 8000, num_inference_steps=1)
    assert result.audios[0].shape == (500,)
    assert [loaded.config[name] for name in SOUND] == list(SOUND.values())
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "| SI-SDR, enhanced |" in card
    assert "| DNSMOS, noisy | 1 |" in card
    assert "pipeline_tag: audio-to-audio" in card
    logs = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [log["step"] for log in logs if "SI-SDR, noisy" in log] == [2, 4]
    noisy = [log["SI-SDR, noisy"] for log in logs if "SI-SDR, noisy" in log]
    assert noisy[0] == noisy[1] == pytest.approx(10 * math.log10(0.045 / 0.0025), abs=1.5)
    size = Image.open(tmp_path / "whole" / "samples" / "step-0000002.png").size
    assert size == (3 * 8, 32)  # noisy, enhanced and clean


def test_the_bridge_and_fine_tuning(folder, tmp_path):
    bridge = config(folder, tmp_path / "bridge", process="sbve", prediction_type="sample", max_train_steps=1)
    train(bridge)
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "bridge")
    assert isinstance(loaded.scheduler, SBVEScheduler)
    changes = {"pretrained_model_name_or_path": str(folder / "base"), "unet_config": None, "learning_rate": 1e-9}
    train(config(folder, tmp_path / "tuned", **changes, max_train_steps=1, num_validation_images=0))
    assert "SI-SDR" not in (tmp_path / "tuned" / "README.md").read_text()
    before, after = weights(folder / "base"), weights(tmp_path / "tuned")
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    assert DiffusionPipeline.from_pretrained(tmp_path / "tuned").scheduler.config.algorithm == "transitions"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_data_dir": ""}, "`train_data_dir` must be a text that is not empty"),
        ({"train_data_dir": "nowhere"}, "`train_data_dir` must be an existing folder"),
        ({"train_data_dir": "{}/base"}, "`train_data_dir` must be a folder with the folders clean and noisy"),
        ({"snr_min": 20.0}, "`snr_min` must be at most snr_max"),
        ({"reverberation_min": 2.0}, "`reverberation_min` must be"),
        ({"num_frames": 7}, "`num_frames` must be a multiple of 2"),
        ({"n_fft": 60}, "`n_fft` must be such that"),
        ({"time_min": 0.0}, "`time_min` must be"),
        ({"sigma_min": 1.0}, "`sigma_min` must be"),
        ({"process": "sbve"}, "`prediction_type` must be 'sample' with process 'sbve'"),
        ({"pretrained_model_name_or_path": "x"}, "`unet_config` must be left out"),
        ({"pretrained_model_name_or_path": "x", "unet_config": None}, "must be a SpeechEnhancementPipeline's repo"),
    ],
)
def test_wrong_arguments(folder, tmp_path, changes, message):
    changes = {k: v.format(folder) if isinstance(v, str) else v for k, v in changes.items()}
    with pytest.raises(ValueError, match=message):
        train(config(folder, tmp_path, **changes))
