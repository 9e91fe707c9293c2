"""Arguments: the command line, configuration files, and every refusal."""

import dataclasses
import json
import re

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from diffusers_ext import DenoisingConfig, ImmiscibleConfig, parse_config

from .tiny import UNET, make_config, run, write_data

BASE = ["--train_data_dir", "photos", "--max_train_steps", "10"]


def test_the_command_line_wins_over_the_file_and_both_are_typed(tmp_path):
    (tmp_path / "c.yaml").write_text("learning_rate: 1e-3\nmax_train_steps: 5\nuse_ema: false\nnoise: knn\n")
    config = parse_config(
        ImmiscibleConfig, ["--config", str(tmp_path / "c.yaml"), "--train_data_dir", "x", "--max_train_steps", "7"]
    )
    assert config.learning_rate == 1e-3
    assert isinstance(config.learning_rate, float)
    assert (config.max_train_steps, config.use_ema, config.noise) == (7, False, "knn")
    (tmp_path / "c.json").write_text(json.dumps({"noise": "knn", "noise_options": {"k": 8, "score": "inner"}}))
    config = parse_config(ImmiscibleConfig, [f"--config={tmp_path / 'c.json'}", *BASE])
    assert config.make_noise().k == 8


def test_defaults_are_the_documented_ones():
    config = parse_config(ImmiscibleConfig, BASE)
    assert (config.learning_rate, config.adam_beta1, config.adam_beta2) == (1e-4, 0.9, 0.999)
    assert (config.adam_weight_decay, config.adam_epsilon, config.max_grad_norm) == (1e-2, 1e-8, 1.0)
    assert (config.lr_scheduler, config.lr_warmup_steps) == ("constant", 500)
    assert (config.use_ema, config.ema_decay, config.seed) == (True, 0.9999, 0)


def test_refuses_unknown_names_with_the_nearest(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("learning_rat: 1e-3\n")
    with pytest.raises(ValueError, match=r"unknown argument 'learning_rat'.*did you mean --learning_rate"):
        parse_config(ImmiscibleConfig, ["--config", str(tmp_path / "c.yaml"), *BASE])
    with pytest.raises(SystemExit):
        parse_config(ImmiscibleConfig, [*BASE, "--learning_rat", "1"])
    assert "did you mean --learning_rate" in capsys.readouterr().err
    (tmp_path / "bad.yaml").write_text("lr_scheduler: cosinus\n")
    with pytest.raises(SystemExit):
        parse_config(ImmiscibleConfig, ["--config", str(tmp_path / "bad.yaml"), *BASE])
    assert "cosinus" in capsys.readouterr().err
    with pytest.raises(ValueError, match="`config` must be an existing"):
        parse_config(ImmiscibleConfig, ["--config", "missing.yaml"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_train_steps": None}, "exactly one of `max_train_steps` and `num_train_epochs`"),
        ({"num_train_epochs": 2}, "exactly one of `max_train_steps` and `num_train_epochs`"),
        ({"mixed_precision": "fp8"}, r"`mixed_precision` must be one of \['no', 'fp16', 'bf16'\], got 'fp8'"),
        ({"lr_scheduler": "cosinus"}, "`lr_scheduler` must be one of"),
        ({"train_data_dir": None}, "exactly one of `dataset_name` and `train_data_dir`"),
        ({"dataset_name": "a/b"}, "exactly one of `dataset_name` and `train_data_dir`"),
        ({"noise": "pink"}, "`noise` must be one of .*'assignment'.*got 'pink'"),
        ({"noise": "knn", "k": 0}, "`k` must be .*got 0"),
        ({"noise_options": "{"}, "`noise_options` must be a JSON object"),
        ({"noise_options": '{"q": 1}'}, "`noise_options` must be a JSON object of arguments of GaussianNoise"),
        ({"noise": "assignment", "group_size": 0}, "`group_size` must be .*got 0"),
        ({"image_scale": 0.0}, "`image_scale` must be a number > 0, got 0.0"),
        ({"seed": -1}, "`seed` must be an integer >= 0, got -1"),
        ({"learning_rate": float("nan")}, "`learning_rate` must be a finite number, got nan"),
        ({"train_batch_size": 0}, "`train_batch_size` must be an integer >= 1, got 0"),
        ({"report_to": "excel"}, "`report_to` must be 'none' or a list from"),
        ({"push_to_hub": True}, "`hub_model_id` must be given"),
        ({"prediction_type": "flow", "snr_gamma": 5.0}, "`snr_gamma` must be left out"),
        ({"prediction_type": "edm", "snr_gamma": 5.0}, "`snr_gamma` must be left out with `prediction_type='edm'`"),
        ({"p_std": 0.0}, "`p_std` must be a number > 0, got 0.0"),
        ({"sigma_data": -1.0}, "`sigma_data` must be a number > 0, got -1.0"),
        ({"prediction_type": "epsilon", "timestep_sampling": "logit_normal"}, "`timestep_sampling` must be 'uniform'"),
        ({"pretrained_model_name_or_path": "x"}, "`unet_config` must be left out"),
        ({"pretrained_model_name_or_path": "x", "unet_config": None, "vae": "y"}, "`vae` must be left out"),
        ({"validation_steps": 1, "num_validation_images": 0}, "`num_validation_images` must be .* got 0"),
        ({"streaming": True, "dataloader_num_workers": 2}, "`dataloader_num_workers` must be 0 or 1 .*got 2"),
        ({"push_to_hub": True, "hub_model_id": "a/b/c"}, "`hub_model_id` must be given .*got 'a/b/c'"),
        ({"seed": 2**64}, r"`seed` must be an integer in 0\.\."),
        ({"max_train_samples": -1}, "`max_train_samples` must be an integer >= 1 or left out, got -1"),
    ],
)
def test_bad_values_are_refused_when_the_configuration_is_made(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_data_dir": "/nowhere"}, "`train_data_dir` must be .*'/nowhere'"),
        ({"lr_scheduler": "cosine", "lr_warmup_steps": 7}, "`lr_warmup_steps` must be at most .*6, got 7"),
        ({"train_batch_size": 65}, "`train_batch_size` must be small enough .*data's 64, got 65"),
        ({"resolution": 9}, "`resolution` must be a multiple of 2.*got 9"),
        (
            {"unet_config": "/nowhere.json"},
            "`unet_config` must be an existing file or one of .*'unet_28'.*got '/nowhere.json'",
        ),
        ({"label_column": "kind"}, "`label_column` must be one of the columns .*got 'kind'"),
    ],
)
def test_bad_data_and_models_are_refused_before_training(tmp_path, changes, message):
    data = write_data(tmp_path / "data")
    with pytest.raises(ValueError, match=message):
        run(data, tmp_path / "out", **changes)
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_an_empty_folder_and_a_corrupt_image_are_refused(tmp_path):
    data = write_data(tmp_path / "data")
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match="images"):
        run(data, tmp_path / "out", train_data_dir=str(tmp_path / "images"))
    for i in range(5):
        Image.fromarray(np.full((8, 8), i, np.uint8)).save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "images" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    with pytest.raises(ValueError, match=r"broken\.png"):
        run(data, tmp_path / "out", train_data_dir=str(tmp_path / "images"))


def named(kind):
    hints = ((f.name, str(f.type).split(" | ")[0]) for f in dataclasses.fields(DenoisingConfig))
    return [name for name, hint in hints if hint == kind]


# Read now: the parser replaces the annotations of the fields by types.
INTEGERS, FLOATS, TEXTS, SWITCHES = (named(kind) for kind in ("int", "float", "str", "bool"))


@pytest.mark.parametrize("name", [*INTEGERS, *FLOATS])
def test_every_number_refuses_what_is_none(name):
    bad = [float("nan"), float("inf"), -float("inf"), "3", True, [1], *([1.5] if name in INTEGERS else [])]
    bad += [] if name == "p_mean" else [-1]  # a logarithm may be negative
    for value in bad:
        with pytest.raises(ValueError, match=f"`{name}` must be .*got {re.escape(repr(value))}"):
            DenoisingConfig(**{"train_data_dir": "x", "max_train_steps": 1, name: value})


@pytest.mark.parametrize("name", [*TEXTS, *SWITCHES])
def test_every_text_and_switch_refuses_other_types(name):
    for value in (5, "" if name in TEXTS else "yes"):
        with pytest.raises(ValueError, match=f"`{name}` must be .*got {value!r}"):
            DenoisingConfig(**{"train_data_dir": "x", "max_train_steps": 1, name: value})


def test_a_tracker_that_is_not_installed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers_ext.training.config.get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(
        ValueError, match=r"`report_to` must be an installed package \(pip install wandb\), got 'wandb'"
    ):
        make_config(tmp_path, tmp_path, report_to="tensorboard,wandb")


def test_configuration_files_refuse_lists_and_bad_syntax_in_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "list.yaml").write_text("learning_rate: [1, 2]\n")
    (tmp_path / "broken.yaml").write_text("a: [\n")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "number.yaml").write_text("7\n")
    (tmp_path / "minus.yaml").write_text("learning_rate: -1\n")
    for file, message in {
        "list.yaml": "`learning_rate` in .*list.yaml must be a single value, got the list",
        "broken.yaml": "`config` must be a YAML or JSON file, got .*broken.yaml",
        "broken.json": "`config` must be a YAML or JSON file, got .*broken.json",
        "number.yaml": "`config` must hold a mapping of argument names to values, got int",
        "minus.yaml": "`learning_rate` must be a number > 0, got -1.0",
    }.items():
        words = ["--config", str(tmp_path / file), *BASE]
        with pytest.raises(ValueError, match=message):
            parse_config(ImmiscibleConfig, words)
        monkeypatch.setattr("sys.argv", ["train", *words])
        with pytest.raises(SystemExit):
            parse_config(ImmiscibleConfig)
        assert re.search(f"error: {message}", capsys.readouterr().err)


def test_output_folders_that_cannot_be_written_are_refused_before_training(tmp_path):
    data = write_data(tmp_path / "data")
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", "/proc/nowhere"):
        with pytest.raises(
            ValueError, match=f"`output_dir` must be a folder to write into, got '{re.escape(str(folder))}'"
        ):
            run(data, folder)


def test_bad_files_are_refused_before_training(tmp_path):
    data = write_data(tmp_path / "data")
    whole = (data / "data.npz").read_bytes()
    (data / "short.npz").write_bytes(whole[: len(whole) // 2])
    (data / "words.json").write_text("[1]")
    (data / "odd.json").write_text(json.dumps({**UNET, "block_out_channels": [3, 8]}))
    Dataset.from_dict({"text": ["a", "b"]}).to_parquet(str(data / "text.parquet"))
    for changes, message in [
        ({"train_data_dir": str(data / "short.npz")}, "`train_data_dir` must be a NumPy file"),
        ({"train_data_dir": str(data / "text.parquet")}, r"`image_column` must be one of the columns \['text'\]"),
        ({"train_data_dir": str(data / "text.parquet"), "image_column": "text"}, "images cannot be read"),
        ({"unet_config": str(data / "words.json")}, "`unet_config` must be a JSON object"),
        ({"unet_config": str(data / "odd.json")}, "`unet_config` must describe a `UNet2DModel`"),
        ({"vae": "/nowhere"}, "`vae` must be a Hub repo or a folder .*'/nowhere'"),
        (
            {"unet_config": None, "pretrained_model_name_or_path": "/nowhere"},
            "`pretrained_model_name_or_path` must be",
        ),
        (
            {"num_train_timesteps": 1},
            "`validation_inference_steps` must be a number of steps that DDIMScheduler takes.*got 2",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            run(data, tmp_path / "out", **changes)
    np.savez(data / "plain.npz", images=np.zeros((8, 8, 8), np.uint8))
    with pytest.raises(ValueError, match="`label_column` must name a column of class labels for `class_conditional`"):
        run(data, tmp_path / "out", train_data_dir=str(data / "plain.npz"), class_conditional=True)
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_a_pretrained_model_must_fit(tmp_path):
    data = write_data(tmp_path / "data")
    run(data, tmp_path / "first", max_train_steps=1)
    common = {"unet_config": None, "pretrained_model_name_or_path": str(tmp_path / "first")}
    with pytest.raises(ValueError, match="`channels` must be 1, as the model takes, got 3"):
        run(data, tmp_path / "out", channels=3, **common)
    with pytest.raises(ValueError, match="`prediction_type` must be 'epsilon'.*got 'flow'"):
        run(data, tmp_path / "out", prediction_type="flow", **common)
    with pytest.raises(ValueError, match="`class_conditional` must be False"):
        run(data, tmp_path / "out", class_conditional=True, **common)
