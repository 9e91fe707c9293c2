"""Generation, alignment, fine-tuning and evaluation on tiny models: whole, resumed, and on two processes."""

import hashlib
import json
import re
import signal
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from safetensors.torch import load_file

from diffusers_ext import (
    AlignSetConfig,
    EvaluateConfig,
    GenerateConfig,
    ImageClassifierFeatures,
    ImageGenerationPipeline,
    SDAClassifierConfig,
    SDAClassifierRecipe,
    SDATTAPipeline,
    Trainer,
    align_set,
    evaluate,
    generate,
    load_images,
    parse_config,
    stream_logits,
    stream_order,
)
from diffusers_ext.cli import main
from diffusers_ext.methods.sda.shards import ImageShards
from tests import processes

from .tiny import unet

ALIGNMENT = {"num_steps": 10, "strength": 0.2, "guidance_weight": 1.0, "factor": 2, "detach_unet": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models, clean images, and the synthetic and aligned sets made of them."""
    root = tmp_path_factory.mktemp("sda")
    scheduler = DDIMScheduler(clip_sample=False)
    ImageGenerationPipeline(unet(), scheduler).save_pretrained(root / "unconditional")
    net = unet(num_class_embeds=4)
    ImageGenerationPipeline(net, scheduler, null_class_label=3).save_pretrained(root / "conditional")
    torch.manual_seed(0)
    model = ImageClassifierFeatures(sample_size=8, num_classes=3, block_out_channels=(4,), feature_dim=6)
    model.save_pretrained(root / "classifier")
    rng = np.random.default_rng(0)
    np.savez(root / "clean.npz", images=rng.integers(0, 256, (24, 8, 8), dtype=np.uint8), labels=np.arange(24) % 3)
    generate(generation(root, root / "synthetic"))
    align_set(alignment(root, root / "aligned"))
    return root


def generation(root, output, **changes):
    values = {"images_per_class": 4, "num_inference_steps": 2, "batch_size": 3, **changes}
    return GenerateConfig(pretrained_model_name_or_path=str(root / "conditional"), output_dir=str(output), **values)


def alignment(root, output, **changes):
    values = {"train_data_dir": str(root / "synthetic"), "batch_size": 5, **ALIGNMENT, **changes}
    values.setdefault("pretrained_model_name_or_path", str(root / "unconditional"))
    return AlignSetConfig(output_dir=str(output), **values)


def digests(path):
    files = sorted((path / "data").glob("*.parquet"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def script_of(folder, *commands, killed_at=None):
    """Writes a script that runs the command line, one command after the other, and is killed at a shard."""
    script = folder / "commands.py"
    script.write_text(
        "import os, signal\nfrom accelerate import PartialState\n"
        "from diffusers_ext.methods.sda.shards import ImageShards\n"
        "from diffusers_ext.cli import main\n\nwrite = ImageShards._write\n\n\n"
        "def noted(self, shard, rows):\n    print(f'process {PartialState().process_index} made {shard}')\n"
        f"    if shard == {killed_at}:\n        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    write(self, shard, rows)\n\n\nImageShards._write = noted\n"
        f"for words in {list(commands)}:\n    main(words)\n"
    )
    return script


def words(command, config, *names):
    return [command, *(word for name in names for word in (f"--{name}", str(getattr(config, name))))]


GENERATION = ("pretrained_model_name_or_path", "images_per_class", "num_inference_steps", "batch_size", "output_dir")


def test_the_set_is_balanced_and_readable_by_anyone(folder):
    rows = datasets.load_dataset("parquet", data_dir=str(folder / "synthetic" / "data"), split="train")
    assert rows["label"] == [0, 1, 2] * 4
    assert rows["index"] == list(range(12))
    assert rows.features["label"].names == ["0", "1", "2"]
    assert rows[0]["image"].size == (8, 8)
    assert len(load_images(train_data_dir=str(folder / "synthetic"), resolution=8, channels=1)) == 12


def test_an_image_is_what_the_pipeline_draws_from_its_seed(folder):
    other = generate(generation(folder, folder / "other-batches", batch_size=12))
    a, b = (load_images(train_data_dir=str(d), resolution=8, channels=1) for d in (other, folder / "synthetic"))
    difference = torch.stack([a[i]["pixel_values"] - b[i]["pixel_values"] for i in range(12)])
    assert difference.abs().max() <= 2 / 255 + 1e-6  # one grey level, where rounding falls the other way
    assert len({tuple(b[i]["pixel_values"].flatten().tolist()) for i in range(12)}) == 12


def test_two_processes_make_the_same_sets(folder):
    drawn, config = generation(folder, folder / "two"), alignment(folder, folder / "aligned-two")
    names = ("pretrained_model_name_or_path", "train_data_dir", "batch_size", *ALIGNMENT, "output_dir")
    script = script_of(folder, words("generate", drawn, *GENERATION), words("align", config, *names))
    ranks = processes.run_ranks([sys.executable, script], 2)
    assert [rank.returncode for rank in ranks] == [0, 0], ranks
    said = "".join(rank.stdout for rank in ranks)
    # Four shards drawn and three aligned, each by one process.
    assert sorted(re.findall(r"process \d made \d", said)) == [
        f"process {shard % 2} made {shard}" for shard in (0, 0, 2, 2, 1, 1, 3)
    ]
    assert digests(folder / "two") == digests(folder / "synthetic")
    assert digests(folder / "aligned-two") == digests(folder / "aligned")


def test_killed_and_started_again_it_is_the_same_and_nothing_is_redone(folder):
    reference = generation(folder, folder / "long", images_per_class=8)
    generate(reference)
    config = generation(folder, folder / "killed", images_per_class=8)
    script = script_of(folder, words("generate", config, *GENERATION), killed_at=3)
    assert processes.run([sys.executable, script]).returncode == -signal.SIGKILL
    made = {path: path.stat().st_mtime_ns for path in (folder / "killed" / "data").glob("*.parquet")}
    assert len(made) == 3
    with pytest.raises(ValueError, match=r"must be a finished data set, got .* of 8 shards"):
        align_set(alignment(folder, folder / "never", train_data_dir=str(folder / "killed")))
    generate(config)
    assert digests(folder / "killed") == digests(folder / "long")
    assert all(path.stat().st_mtime_ns == when for path, when in made.items())


def test_other_settings_are_not_mixed_in(folder):
    with pytest.raises(ValueError, match=r"`seed` must be 0 as in the half-made or finished set"):
        generate(generation(folder, folder / "synthetic", seed=1))


def test_unreadable_images_are_named_and_counted(folder, caplog):
    pictures = folder / "pictures"
    for label in ("a", "b"):
        (pictures / label).mkdir(parents=True)
        for i in range(2):
            Image.new("L", (8, 8), 60 * i).save(pictures / label / f"{i}.png")
    (pictures / "a" / "broken.png").write_bytes(b"no picture")
    align_set(alignment(folder, folder / "skipping", train_data_dir=str(pictures)))
    assert "broken.png" in caplog.text
    assert "1 of 5 images could not be read and were skipped" in caplog.text
    rows = datasets.load_dataset("parquet", data_dir=str(folder / "skipping" / "data"), split="train")
    assert rows["label"] == [0, 0, 1, 1]


def classifier_config(folder, output, **changes):
    values = {"max_train_steps": 4, "train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, **ALIGNMENT}
    return SDAClassifierConfig(
        pretrained_model_name_or_path=str(folder / "unconditional"), classifier=str(folder / "classifier"),
        output_dir=str(output), **{"train_data_dir": str(folder / "aligned"), **values, **changes},
    )  # fmt: skip


def tuned(folder, output, **changes):
    config = classifier_config(folder, output, **changes)
    if not (output / "model_index.json").is_file():
        Trainer(config, SDAClassifierRecipe(config)).train()
    return SDATTAPipeline.from_pretrained(output)


def test_fine_tuning_keeps_the_source_and_resumes_exactly(folder):
    pipeline = tuned(folder, folder / "tuned")
    source = load_file(folder / "classifier" / "diffusion_pytorch_model.safetensors")
    kept, changed = pipeline.classifier.state_dict(), pipeline.adapted_classifier.state_dict()
    assert all(torch.equal(kept[k], v) for k, v in source.items())
    assert not torch.equal(changed["head.1.weight"], source["head.1.weight"])
    assert torch.equal(changed["body.1.running_mean"], source["body.1.running_mean"])
    assert pipeline.config["alignment"]["num_steps"] == 10
    parts = classifier_config(folder, folder / "parts", checkpointing_steps=2, resume_from_checkpoint="latest")

    class Stopping(SDAClassifierRecipe):
        def training_step(self, batch, ctx):
            if ctx.step == 2 and not (folder / "stopped").exists():
                (folder / "stopped").touch()
                raise KeyboardInterrupt
            return super().training_step(batch, ctx)

    with pytest.raises(KeyboardInterrupt):
        Trainer(parts, Stopping(parts)).train()
    from tests.conftest import reset_accelerate

    reset_accelerate()
    again = tuned(folder, folder / "parts", checkpointing_steps=2, resume_from_checkpoint="latest")
    assert all(torch.equal(v, changed[k]) for k, v in again.adapted_classifier.state_dict().items())


def test_head_only_trains_the_last_layer(folder):
    pipeline = tuned(folder, folder / "head", head_only=True)
    source, changed = pipeline.classifier.state_dict(), pipeline.adapted_classifier.state_dict()
    assert {k for k in source if not torch.equal(source[k], changed[k])} == {"head.1.weight", "head.1.bias"}


def test_mixing_takes_the_asked_share_of_source_images(folder):
    config = classifier_config(
        folder, folder / "mixed", source_data_dir=str(folder / "clean.npz"), source_fraction=0.25
    )
    recipe = SDAClassifierRecipe(config)
    from types import SimpleNamespace

    data = recipe.dataset(SimpleNamespace(accelerator=SimpleNamespace(is_main_process=True)))
    own = {tuple(recipe.data.get(i)["pixel_values"].flatten().tolist()) for i in range(12)}
    draws = [data.get(i % 12, torch.Generator().manual_seed(i))["pixel_values"] for i in range(400)]
    share = np.mean([tuple(d.flatten().tolist()) not in own for d in draws])
    assert 0.19 < share < 0.31


def evaluation(folder, output, **changes):
    values = {"corruptions": "gaussian_noise,fog", "severities": "1,5", "stream_batch_size": 6, **changes}
    return EvaluateConfig(
        output_dir=str(output),
        **{"pretrained_model_name_or_path": str(folder / "tuned"), "data_dir": str(folder / "clean.npz"), **values},
    )  # fmt: skip


def test_evaluation_adds_up_and_does_no_cell_twice(folder):
    pipeline = tuned(folder, folder / "tuned")
    results = evaluate(evaluation(folder, folder / "evaluation"))
    data = np.load(folder / "clean.npz")
    pixels = torch.from_numpy(data["images"])[:, None] / 127.5 - 1
    with torch.no_grad():
        right = (pipeline.classifier.eval()(pixels).argmax(1).numpy() == data["labels"]).mean()
    assert results["images"] == 24
    assert results["accuracy"]["source"]["clean"] == pytest.approx(100 * right)
    cell = np.load(folder / "evaluation" / "cells" / "fog-5.npz")
    sda = ((cell["sx"] + cell["fa"]).argmax(1) == cell["labels"]).mean()
    assert results["accuracy"]["sda"]["fog-5"] == pytest.approx(100 * sda)
    assert results["accuracy"]["sda"]["mean"] == pytest.approx(
        np.mean([v for k, v in results["accuracy"]["sda"].items() if k not in ("clean", "mean")])
    )
    p = results["accuracy"]["dda"]["fog-5"]
    assert results["standard_error"]["dda"]["fog-5"] == pytest.approx((p * (100 - p) / 24) ** 0.5)
    assert set(results["accuracy"]) >= {"tent_single", "tent_sorted", "bn_shuffled"}
    (folder / "evaluation" / "cells" / "fog-5.npz").unlink()
    before = {p: p.stat().st_mtime_ns for p in (folder / "evaluation" / "cells").iterdir()}
    assert evaluate(evaluation(folder, folder / "evaluation")) == results
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    assert re.search(r"\| mean \|", (folder / "evaluation" / "table.md").read_text())
    assert Image.open(folder / "evaluation" / "accuracies.png").size[0] > 500
    with pytest.raises(ValueError, match="`seed` must be 0 as in"):
        evaluate(evaluation(folder, folder / "evaluation", seed=1))


def test_streams_change_batch_statistics_and_tent():
    torch.manual_seed(0)
    model = ImageClassifierFeatures(sample_size=8, num_classes=3, block_out_channels=(4,), feature_dim=6).eval()
    images, labels = torch.randn(12, 1, 8, 8), torch.arange(12) % 3
    order = stream_order("sorted", labels)
    assert labels[order].tolist() == sorted(labels.tolist())
    assert sorted(stream_order("shuffled", labels).tolist()) == list(range(12))
    for method in ("bn", "tent"):
        straight = stream_logits(model, images, method, 4)
        turned = torch.empty_like(straight)
        turned[order] = stream_logits(model, images[order], method, 4)
        assert (straight - turned).abs().max() > 1e-3
    # One batch of everything: plain batch normalisation in training mode, dropout off.
    reference = ImageClassifierFeatures(sample_size=8, num_classes=3, block_out_channels=(4,), feature_dim=6).eval()
    reference.load_state_dict(model.state_dict())
    reference.body[1].train()
    with torch.no_grad():
        assert torch.allclose(stream_logits(model, images, "bn", 12), reference(images), atol=1e-5)
    # Tent predicts before it steps, and a step lowers the entropy of the batch.
    twice = stream_logits(model, torch.cat([images, images]), "tent", 12, learning_rate=1e-2).softmax(1)
    entropy = -(twice * twice.log()).sum(1)
    assert torch.allclose(twice[:12], reference(images).softmax(1), atol=1e-5)
    assert entropy[12:].mean() < entropy[:12].mean()


@pytest.mark.parametrize(
    ("make", "changes", "match"),
    [
        (generation, {"class_names": "a,,b"}, "`class_names` must be different names"),
        (generation, {"class_names": " "}, "`class_names` must be"),
        (generation, {"images_per_class": 0}, "`images_per_class` must be an integer >= 1"),
        (generation, {"prompt_template": "a photo"}, "`prompt_template` must be a text with {}"),
        (alignment, {"strength": 1.0}, "`strength` must be in"),
        (evaluation, {"corruptions": "rain"}, "`corruptions` must be names from"),
        (evaluation, {"severities": "0"}, "`severities` must be numbers from 1 to 5"),
        (evaluation, {"severities": "6"}, "`severities` must be numbers from 1 to 5"),
        (classifier_config, {"label_smoothing": 1.0}, "`label_smoothing` must be"),
        (classifier_config, {"source_fraction": 0.5}, "`source_fraction` must be 0 without `source_data_dir`"),
    ],
)
def test_arguments_out_of_range(make, changes, match):
    with pytest.raises(ValueError, match=match):
        make(Path("x"), "y", **changes)


def test_models_and_sets_that_do_not_fit(folder):
    with pytest.raises(ValueError, match="`class_names` must be 3 names as the model has classes, got 2"):
        generate(generation(folder, folder / "no", class_names="a,b"))
    config = alignment(folder, folder / "no", pretrained_model_name_or_path=str(folder / "conditional"))
    with pytest.raises(ValueError, match="must have an unconditional `unet`"):
        align_set(config)
    with pytest.raises(ValueError, match="must be a pipeline's Hub repo or folder"):
        align_set(alignment(folder, folder / "no", pretrained_model_name_or_path=str(folder / "nothing")))
    np.savez(folder / "two.npz", images=np.zeros((8, 8, 8), np.uint8), labels=np.arange(8) % 2)
    config = classifier_config(folder, folder / "no", train_data_dir=str(folder / "two.npz"))
    with pytest.raises(ValueError, match="must have the 3 classes of `classifier`, got 2"):
        Trainer(config, SDAClassifierRecipe(config)).train()
    with pytest.raises(ValueError, match="must be an SDATTAPipeline"):
        evaluate(evaluation(folder, folder / "no", pretrained_model_name_or_path=str(folder / "unconditional")))
    np.savez(folder / "four.npz", images=np.zeros((8, 8, 8), np.uint8), labels=np.arange(8) % 4)
    with pytest.raises(ValueError, match="must have the classifier's 3 classes, got label 3"):
        evaluate(evaluation(folder, folder / "no", data_dir=str(folder / "four.npz")))


def test_the_command_line_says_what_is_wrong(capsys):
    with pytest.raises(SystemExit, match="error: `severities` must be numbers from 1 to 5, got '9'"):
        main(["evaluate", "--pretrained_model_name_or_path", "x", "--data_dir", "y", "--severities", "9"])
    with pytest.raises(SystemExit, match="0"):
        main(["generate", "--help"])
    assert "--images_per_class" in capsys.readouterr().out


def test_the_training_script_takes_its_arguments():
    words = "--pretrained_model_name_or_path a --classifier b --train_data_dir c --strength 0.25 --detach_unet"
    config = parse_config(SDAClassifierConfig, words.split())
    assert config.alignment().calls == 25
    assert config.detach_unet
    assert (config.lr_scheduler, config.num_train_epochs, config.learning_rate) == ("cosine", 30, 2e-5)


def test_settings_are_plain_json(folder):
    settings = json.loads((folder / "synthetic" / "settings.json").read_text())
    assert settings["class_names"] == ["0", "1", "2"]
    assert ImageShards(folder / "synthetic", {k: settings[k] for k in settings if k not in ("count", "shard_size")},
                       12, 3, ["0", "1", "2"]).missing() == []  # fmt: skip
