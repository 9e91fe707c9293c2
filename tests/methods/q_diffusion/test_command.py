"""From a pipeline to a repo of a quantized one, by one command."""

import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from diffusers_ext import QDiffusionConfig, prediction_error, train
from diffusers_ext.methods.q_diffusion import command
from diffusers_ext.methods.q_diffusion.calibration import Calibration

from .tiny import pipeline

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command")
    pipeline().save_pretrained(folder / "plain")
    np.savez(folder / "data.npz", images=np.random.default_rng(0).integers(0, 256, (6, 8, 8), dtype=np.uint8))
    return folder


def words(folder, **changes):
    values = {
        "pretrained_model_name_or_path": folder / "plain",
        "output_dir": folder / "made",
        "train_data_dir": folder / "data.npz",
        "weight_bits": 8,
        "act_bits": 8,
        "num_samples": 4,
        "num_timesteps": 2,
        "num_inference_steps": 2,
        "sample_batch_size": 4,
        "iters": 2,
        "act_iters": 2,
        "num_evaluation_images": 4,
        **changes,
    }
    return [f"--{name}={value}" for name, value in values.items() if value is not None]


def test_the_command_writes_a_repo_that_loads(folder, capsys, monkeypatch):
    pushed = []
    monkeypatch.setattr(command, "push_repo", lambda *args, **kwargs: pushed.append((args, kwargs)))
    monkeypatch.setattr(command, "get_token", lambda: "token")
    train.main(["q_diffusion", *words(folder), "--push_to_hub", "--hub_model_id", "me/small"])
    made = folder / "made"
    assert capsys.readouterr().out.strip() == str(made)
    assert pushed == [((made, "me/small"), {"private": None})]
    loaded, plain = (DiffusionPipeline.from_pretrained(path) for path in (made, folder / "plain"))
    assert loaded.unet.is_quantized
    results = json.loads((made / "results.json").read_text())
    # The figure of the card, found again by hand.
    held_out = Calibration.load(made / "cache" / "held_out")
    error = prediction_error(loaded.unet, plain.unet, held_out)
    arguments = held_out.arguments()
    with torch.no_grad():
        outputs = [p.unet(**arguments).sample for p in (loaded, plain)]
    by_hand = (outputs[0] - outputs[1]).square().sum() / outputs[1].square().sum()
    assert error == pytest.approx(by_hand.item(), rel=1e-4)
    assert results["relative error of the prediction on held-out states"] == pytest.approx(error, rel=1e-6)
    assert 0 < error < 0.05
    assert {name.split(" distance")[0] for name in results if "real images, after" in name} == {"Frechet", "kernel"}
    card = (made / "README.md").read_text()
    assert "Needs `import diffusers_ext`" in card
    assert "2302.04304" in card
    assert "import diffusers_ext" in re.search(r"```python\n(.*?)```", card, re.S)[1]
    assert (made / "sample.png").is_file()
    before = {path: path.stat().st_mtime_ns for path in (made / "cache").rglob("*.safetensors")}
    train.main(["q_diffusion", *words(folder)])  # what is finished is not done again
    assert {path: path.stat().st_mtime_ns for path in (made / "cache").rglob("*.safetensors")} == before


def test_the_script_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["quantize_qdiff.py", "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "training" / "quantize_qdiff.py"), run_name="__main__")
    assert "--weight_bits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretrained_model_name_or_path": None}, "`pretrained_model_name_or_path` must be a Hub repo or folder"),
        ({"weight_bits": 9}, "`weight_bits` must be an int in 2..8, got 9"),
        ({"num_timesteps": 3}, "`num_timesteps` must be at most the 2 `num_inference_steps`, got 3"),
        ({"num_evaluation_images": 1}, "`num_evaluation_images` must be 0 or at least 2, got 1"),
        ({"compute": "int8", "act_bits": None}, "`compute` must be other than 'int8' without `act_bits`"),
        ({"prompts": "nowhere.txt"}, "`prompts` must be an existing file or folder, got 'nowhere.txt'"),
        ({"push_to_hub": True}, "`hub_model_id` must be given with `push_to_hub`"),
        ({"modules_to_not_convert": "nix"}, "`modules_to_not_convert` must name modules of UNet2DModel"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(folder, changes, message):
    with pytest.raises(SystemExit) as end:
        train.main(["q_diffusion", *words(folder, output_dir=folder / "wrong", **changes)])
    assert message in str(end.value.code)
    assert not (folder / "wrong" / "cache" / "states").exists()


def test_the_source_is_not_overwritten(folder):
    with pytest.raises(ValueError, match="`output_dir` must be another folder than the model's"):
        QDiffusionConfig(str(folder / "plain"), output_dir=str(folder / "plain"))
