"""The command line: what its help says, the methods that train by name, and the configurations that ship."""

import dataclasses
import logging
import re
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

import diffusers_ext
from diffusers_ext import cli, train
from diffusers_ext.data.digits import DIGITS
from diffusers_ext.training.config import GROUPS
from diffusers_ext.training.shipped import shipped_configs

ROOT = Path(__file__).resolve().parents[1]


def said(capsys, *words, code=0):
    with pytest.raises(SystemExit) as end:
        cli.main(list(words))
    assert end.value.code == code
    return "".join(capsys.readouterr())


def test_the_first_help_lists_the_commands_with_a_line_each(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    text = said(capsys, "--help")
    assert re.findall(r"^    (\w+) +\w", text, re.M) == list(cli.COMMANDS)
    for command in cli.COMMANDS:
        assert f"usage: diffusers-ext {command} " in said(capsys, command, "--help")
    assert "invalid choice: 'trian'" in said(capsys, "trian", code=2)


def test_every_method_trains_by_name_and_by_its_script(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert re.findall(r"^    (\w+)\s+\w", said(capsys, "train", "--help"), re.M) == [
        *train.METHODS,
        *train.FINISHED,
    ]
    scripts = {path.stem.removeprefix("train_"): path.read_text() for path in (ROOT / "training").glob("train_*.py")}
    recipes = {name: re.search(r"run_training\((\w+)\)", text) for name, text in scripts.items()}
    assert {name: found[1] for name, found in recipes.items() if found} == {
        name: recipe for name, (recipe, _) in train.METHODS.items()
    }


@pytest.mark.parametrize("method", train.METHODS)
def test_the_help_of_a_method_is_grouped_and_shows_every_argument_once(capsys, monkeypatch, method):
    monkeypatch.setenv("COLUMNS", "120")
    text = said(capsys, "train", method, "--help")
    headings = re.findall(r"^([a-z ]+):$", text, re.M)
    assert headings == ["options", *(name for name in GROUPS if name in headings)]
    assert {"data", "model", "method", "optimisation", "saving and logging", "sharing"} == set(headings[1:])
    fields = dataclasses.fields(getattr(diffusers_ext, train.METHODS[method][0]).Config)
    shown = re.findall(r"^  --(\w+)", text, re.M)
    assert sorted(name for name in shown if not name.startswith("no_")) == sorted(
        ["help", "config", *(field.name for field in fields)]
    )
    parts = dict(zip(headings, re.split(r"^[a-z ]+:$", text, flags=re.M)[1:], strict=True))
    for name, group in {
        "train_data_dir": "data",
        "pretrained_model_name_or_path": "model",
        "learning_rate": "optimisation",  # also where a method has another default
        "output_dir": "saving and logging",
        "push_to_hub": "sharing",
    }.items():
        if name in {field.name for field in fields}:
            assert f"--{name}" in parts[group]
    assert re.search(r"--checkpointing_steps int.*\(default: 500\)", text)
    assert "(default: None)" not in text


def test_what_is_wrong_is_said_in_one_line(capsys):
    text = said(capsys, "train", "immiscible", "--train_dir", "x", code=2)
    assert text.startswith(
        "diffusers-ext train immiscible: error: unknown arguments: --train_dir x (did you mean --train"
    )
    assert len(text.splitlines()) == 1
    with pytest.raises(SystemExit) as end:
        cli.main(["train", "immiscible", "--config", "digit"])
    assert re.fullmatch(
        "error: `config` must be an existing file or one of .*'digits'.*, got 'digit'.", end.value.code
    )
    assert "PANEL must be one of" in said(capsys, "demo", "nothing", code=2)


def test_a_shipped_configuration_trains_by_name(tmp_path, capsys):
    words = ["immiscible", "--config", "digits", "--unet_config", "unet_28", "--train_data_dir", str(DIGITS)]
    words += ["--output_dir", str(tmp_path), "--max_train_steps", "2", "--lr_warmup_steps", "0", "--noise", "knn"]
    words += ["--train_batch_size", "4", "--num_validation_images", "1", "--validation_inference_steps", "1"]
    train.main(words)
    card = (tmp_path / "README.md").read_text()
    assert '"lr_scheduler": "cosine"' in card  # from digits.yaml
    assert '"noise": "knn"' in card  # the command line wins
    unet = diffusers_ext.ImageGenerationPipeline.from_pretrained(tmp_path).unet
    assert unet.config.block_out_channels == [8, 16, 32]


def test_configurations_are_listed_and_found(capsys):
    cli.main(["config"])
    assert re.findall(r"^(\w+) +\w", capsys.readouterr().out, re.M) == list(shipped_configs())
    cli.main(["config", "ddp"])
    assert Path(capsys.readouterr().out.strip()).read_text().startswith("# Several GPUs")
    assert {"single", "ddp", "fsdp2", "deepspeed_zero2", "digits", "unet_28"} <= shipped_configs().keys()


def test_the_shipped_launch_configuration_leaves_no_default_unset(caplog, monkeypatch):
    monkeypatch.setattr("accelerate.commands.launch.default_config_file", "/nowhere")

    def warnings_of(*words):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            _validate_launch_command(launch_command_parser().parse_args([*words, "script.py"]))
        return [record.message for record in caplog.records if "defaults used instead" in record.message]

    assert warnings_of()
    assert not warnings_of("--config_file", str(shipped_configs()["single"]))


def test_a_reader_that_has_seen_enough_is_no_error(monkeypatch):
    """`diffusers-ext info | head -1`."""

    def broken(words):
        raise BrokenPipeError

    closed = []
    monkeypatch.setitem(cli.COMMANDS, "info", ("", broken))
    monkeypatch.setattr(cli.os, "dup2", lambda *files: closed.append(files))
    cli.main(["info"])
    assert len(closed) == 1
