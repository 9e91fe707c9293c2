"""What a run is told before its first step: the size of its network, its speed's unit, options without effect."""

import re
import warnings

import pytest
import torch
from diffusers import UNet2DModel

from diffusers_ext import ImmiscibleRecipe, Trainer
from diffusers_ext.training import lora
from diffusers_ext.training.networks import size_note, sized_unet

from .tiny import make_config, run, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(
    ("sizes", "least", "most"), [((4, 8, 16), 1e6, 3e6), ((28, 32, 48), 10e6, 20e6), ((64, 256), 113e6, 115e6)]
)
def test_the_default_network_suits_the_size(sizes, least, most):
    for size in sizes:
        for channels, classes in ((1, None), (4, 11)):
            with torch.device("meta"):
                network = UNet2DModel(
                    sample_size=size,
                    in_channels=channels,
                    out_channels=channels,
                    num_class_embeds=classes,
                    **sized_unet(size),
                )
            assert least <= sum(p.numel() for p in network.parameters()) <= most


def test_size_and_disk_are_told_and_right(data, tmp_path, capsys):
    changes = {"unet_config": None, "max_train_steps": 1, "num_validation_images": 0, "class_conditional": True}
    _, _, trainer = run(data, tmp_path / "out", **changes)
    text = capsys.readouterr().err
    count = sum(p.numel() for p in trainer.ctx.modules.trainable.parameters())
    assert f"UNet2DModel: {count / 1e6:.1f} M parameters; a checkpoint takes about" in text
    assert "--unet_config chooses another network" in text
    assert text.index("parameters") < text.index("training:")
    disk = sum(path.stat().st_size for path in (tmp_path / "out" / "checkpoint-1").iterdir())
    assert float(re.search(r"about (\d+) MB of disk", text)[1]) * 1e6 == pytest.approx(disk, rel=0.05)


def test_the_bar_calls_samples_what_the_recipe_does(data, tmp_path, capsys):
    class Sounds(ImmiscibleRecipe):
        sample_name = "clips"

    config = make_config(data, tmp_path, max_train_steps=2, num_validation_images=0)
    Trainer(config, Sounds(config)).train()
    text = capsys.readouterr().err
    assert re.search(r"lr 1\.00e-03, \d+ clips/s", text)
    assert "images/s" not in text
    assert "samples_per_second" in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("changes", "idle"),
    [
        ({"noise": "gaussian", "k": 4}, "`k` does nothing with the gaussian noise"),
        (
            {"noise": "knn", "k": 4, "cost": "l2", "within_labels": True},
            "`cost`, `within_labels` does nothing with the knn",
        ),
        (
            {"noise": "knn", "noise_options": '{"k": 8}', "k": 4},
            "`k` does nothing with `noise_options`, which is used",
        ),
    ],
)
def test_options_without_effect_are_said(changes, idle):
    with pytest.warns(UserWarning, match=idle):
        make_config("data", "out", **changes)


def test_options_with_effect_are_taken_in_silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make_config("data", "out", noise="knn", k=8, score="inner").make_noise().k == 8
        assert make_config("data", "out", noise="knn").make_noise().k == 4
        noise = make_config(
            "data", "out", noise="assignment", cost="l2", group_size=2, within_labels=True
        ).make_noise()
        assert (noise.cost, noise.group_size, noise.within_labels) == ("l2", 2, True)


@pytest.mark.parametrize(
    "changes",
    [
        {"noise": "assignment", "train_batch_size": 1},
        {"noise": "assignment", "group_size": 1},
        {"noise": "knn", "k": 1},
    ],
)
def test_noise_without_a_choice_is_said(data, tmp_path, changes):
    with pytest.warns(UserWarning, match=f"{changes['noise']} noise does nothing with .* of 1: it is gaussian"):
        run(data, tmp_path, max_train_steps=1, num_validation_images=0, **changes)


def test_a_checkpoint_of_adapters_takes_no_more_than_they_do():
    network = torch.nn.Sequential(torch.nn.Linear(1000, 1000, bias=False), torch.nn.Linear(10, 10, bias=False))
    network[0].requires_grad_(False)
    config = make_config("data", "out", use_ema=False)
    said = "Sequential: 1.0 M parameters, 100 of them trained; a checkpoint takes about {} of disk"
    assert size_note(network, config, True, None).startswith(said.format("1.2 kB"))  # 100 weights and twice AdamW's
    assert size_note(network, config, False, None).startswith(said.format("4.0 MB"))


def test_layers_of_adapters_need_peft(monkeypatch):
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="`lora_rank` must be left out without peft"):
        lora.require_peft()
