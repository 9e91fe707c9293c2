"""`diffusers-ext inspect` on the shipped digits model, and the callback in a run of seconds."""

import json
import logging
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DModel

from diffusers_ext import (
    ImageGenerationPipeline,
    ImmiscibleRecipe,
    InspectConfig,
    ScoreField,
    SteinResidualCallback,
    Trainer,
    inspect_model,
    load_images,
    local_dimension,
    stein_residual,
)
from diffusers_ext.cli import main
from diffusers_ext.data.assets import ASSETS
from diffusers_ext.data.digits import DIGITS
from diffusers_ext.methods.geometry import inspection
from diffusers_ext.methods.geometry.report import summary
from diffusers_ext.methods.geometry.space import diffused
from diffusers_ext.rng import mix
from tests.tiny_pipelines import build
from tests.training.tiny import make_config, write_data

MODEL = str(ASSETS / "digits-epsilon")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The command, once: two images, stopped after the first and begun again."""
    folder = tmp_path_factory.mktemp("inspect")
    words = ["inspect", MODEL, "--data", str(DIGITS), "--output_dir", str(folder), "--num_images", "2"]
    words += ["--num_sigmas", "4", "--num_draws", "3", "--batch_size", "16"]
    words += ["--quantities", "dsm,gauge,asymmetry"]
    measure, calls = inspection.measure, []

    def stopping(*args):
        calls.append(args[2])
        if len(calls) == 2:
            raise InterruptedError
        return measure(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspection, "measure", stopping)
        with pytest.raises(InterruptedError):
            main(words)
        main(words)
    return folder, words, calls


def test_a_stopped_inspection_goes_on(run):
    folder, words, calls = run
    assert calls == [0, 1, 1]  # the first image was not measured again
    before = (folder / "images" / "000001.json").read_text()
    (folder / "images" / "000001.json").unlink()
    (folder / "images" / "000000.json").rename(folder / "aside")
    main(words)
    assert (folder / "images" / "000001.json").read_text() == before  # whatever was measured with it
    assert (folder / "images" / "000000.json").read_text() == (folder / "aside").read_text()


def test_its_figures_are_those_of_the_functions(run):
    folder, *_ = run
    found = json.loads((folder / "inspection.json").read_text())
    text = (folder / "inspection.txt").read_text()
    assert "2 images of 784 values" in text
    assert "asymmetry of the denoiser's Jacobian" in text
    assert "weak gauge residual" in text
    assert (folder / "inspection.png").stat().st_size > 5000
    records = [json.loads((folder / "images" / f"00000{i}.json").read_text()) for i in range(2)]
    ratio = np.mean([r["stein"] for r in records], 0) / np.mean([r["dsm"] for r in records], 0)
    assert np.allclose(found["stein"]["ratio"], ratio)
    assert np.allclose(found["dimension"]["dsm"]["mean"], np.mean([r["dsm"] for r in records], 0))
    # The shipped model knows no sigma below 0.029, and its curve falls from there without a rest.
    assert found["stein"]["sigmas"][0] == pytest.approx(0.0292, abs=1e-4)
    curve = found["dimension"]["dsm"]
    assert curve["mean"] == sorted(curve["mean"], reverse=True)
    assert curve["plateau"] is None
    assert "plateau of dsm: none" in text
    # By hand, from the same seeds.
    pipe = DiffusionPipeline.from_pretrained(MODEL)
    data = load_images(train_data_dir=str(DIGITS), resolution=28, channels=1, max_train_samples=2)
    x = diffused(pipe, torch.stack([data[i]["pixel_values"] for i in range(2)]))
    field, sigma = ScoreField.from_pipeline(pipe), found["stein"]["sigmas"][2]
    generator = torch.Generator().manual_seed(mix(0, 1))
    alone = local_dimension(field, x[1:], sigmas=sigma, num_draws=3, generator=generator)
    assert alone.curve[0, 0].item() == pytest.approx(records[1]["dsm"][2], rel=1e-4)


def test_a_curve_without_plateau_stands_in_the_table():
    records = [{"trace": {"sigmas": [0.1, 1.0], "curve": curve}} for curve in ([4.0, 1.0], [6.0, 2.0])]
    assert "trace by sigma: 5.0 at 0.1, 1.5 at 1" in str(summary(records, [0.1, 1.0], 16))


def test_an_estimate_is_printed_first(run, tmp_path, caplog, monkeypatch):
    order = []
    monkeypatch.setattr(inspection, "measure", lambda *args: order.append("measured") or {})
    monkeypatch.setattr(inspection, "summary", lambda *args: type("S", (), {"save": lambda self, folder: None})())
    config = InspectConfig(MODEL, str(DIGITS), str(tmp_path), "dsm,trace,likelihood", num_images=2, batch_size=4)
    handler = logging.Handler()
    handler.emit = lambda record: order.append(record.getMessage())
    inspection.logger.addHandler(handler)
    inspect_model(config)
    inspection.logger.removeHandler(handler)
    assert order[1:] == ["measured", "measured"]
    assert "for 2 images (an image: dsm " in order[0]
    assert "likelihood" in order[0]


def test_bad_input(run, tmp_path):
    folder, words, _ = run
    data = str(DIGITS)
    for kwargs, message in [
        ({"quantities": "dsm,beauty"}, "`quantities` must be some of dsm, gauge"),
        ({"num_images": 1}, "`num_images` must be an integer >= 2, got 1"),
        ({"batch_size": 0}, "`batch_size` must be an integer >= 1, got 0"),
        ({"resolution": -4}, "`resolution` must be an integer >= 1 or left out, got -4"),
        ({"data": "nowhere"}, "`data` must be an existing folder or file, got 'nowhere'"),
    ]:
        with pytest.raises(ValueError, match=message):
            InspectConfig(**{"repo": MODEL, "data": data, "output_dir": str(tmp_path), **kwargs})
    with pytest.raises(ValueError, match="`quantities` must be without 'flow_map' above 256 values, here 784"):
        inspect_model(InspectConfig(MODEL, data, str(tmp_path), "flow_map", num_images=2))
    few = {"data": data, "num_images": 2, "num_sigmas": 2, "num_draws": 2}
    for changes, message in (
        ({"repo": str(tmp_path / "none")}, "`repo` must be a Hub repo or a folder of a pipeline, got"),
        ({"device": "gpu7"}, "`device` must be one that torch finds here, got 'gpu7'"),
        ({"resolution": 30}, "`resolution` must be a multiple of 4: the networks halve it that often, got 30"),
        ({"output_dir": f"{data}/out"}, "`output_dir` must be a folder that can be written, got"),
    ):
        with pytest.raises(ValueError, match=message):
            inspect_model(InspectConfig(**{"repo": MODEL, "output_dir": str(tmp_path), **few, **changes}))
    with pytest.raises(SystemExit, match="error: `num_draws` must be 3 as in the results in"):
        main([word if word != "3" or words[i - 1] != "--num_draws" else "5" for i, word in enumerate(words)])


def test_a_text_pipeline_is_inspected_under_a_prompt(tmp_path):
    build("StableDiffusionPipeline").save_pretrained(tmp_path / "pipe")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels)
    arguments = {"num_images": 2, "num_sigmas": 2, "num_draws": 2, "resolution": 32, "quantities": "dsm"}
    out = str(tmp_path / "out")
    config = InspectConfig(str(tmp_path / "pipe"), str(tmp_path / "images.npz"), out, prompt="a cat", **arguments)
    found = inspect_model(config).figures
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "pipe")
    field = ScoreField.from_pipeline(pipe, ["a cat"], height=32, width=32)
    x = field.model.encode_images(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1)
    generator = torch.Generator().manual_seed(mix(0, 0))
    again = local_dimension(field, x[:1], sigmas=found["stein"]["sigmas"], num_draws=2, generator=generator)
    assert again.curve[0].tolist() == pytest.approx(found["dimension"]["dsm"]["images"][0], rel=1e-3)
    with pytest.raises(ValueError, match="`prompt` must be given for StableDiffusionPipeline, got None"):
        inspect_model(InspectConfig(str(tmp_path / "pipe"), str(tmp_path / "images.npz"), out + "2", **arguments))


def train(tmp_path, name, callbacks=()):
    """A run of seconds; returns its losses."""
    changes = {"max_train_steps": 4, "num_validation_images": 0}
    config = make_config(write_data(tmp_path / "data"), tmp_path / name, **changes)
    Trainer(config, ImmiscibleRecipe(config), callbacks).train()
    return [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]


def test_callback_logs_the_residual_and_disturbs_nothing(tmp_path):
    callback = SteinResidualCallback(every=2, num_images=8, num_sigmas=3)
    with_callback = train(tmp_path, "with", [callback])
    lines = [json.loads(line) for line in (tmp_path / "with" / "stein_residual.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert len(lines[0]["residual"]) == len(lines[0]["sigmas"]) == 3
    assert lines[1]["residual"] == callback.residual.value.tolist()
    assert lines[0]["residual"] != lines[1]["residual"]
    # What the finished model gives by the function.
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "with")
    images = np.load(tmp_path / "data" / "data.npz")["images"][:8]
    x = torch.from_numpy(images).float()[:, None] / 127.5 - 1
    generator = torch.Generator().manual_seed(mix(0, 0x57E1))
    again = stein_residual(ScoreField.from_pipeline(pipe), x, lines[1]["sigmas"], generator=generator)
    assert again.value.tolist() == pytest.approx(lines[1]["residual"], rel=1e-3, abs=1e-3)
    assert with_callback == train(tmp_path, "without")
    # A run that was killed in the middle of a line, and goes on from an earlier step.
    with (tmp_path / "with" / "stein_residual.jsonl").open("a") as file:
        file.write(json.dumps(lines[1])[:30])
    goes_on = SimpleNamespace(
        config=SimpleNamespace(output_dir=tmp_path / "with"),
        accelerator=SimpleNamespace(is_main_process=True),
        recipe=SimpleNamespace(data=SimpleNamespace(get=lambda *_: {"pixel_values": None})),
        exported_pipeline=nullcontext,
        step=3,
    )
    callback.on_start(goes_on)
    kept = (tmp_path / "with" / "stein_residual.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in kept] == lines[:1]
    with pytest.raises(ValueError, match="`num_images` must be an integer >= 2, got 1"):
        SteinResidualCallback(num_images=1)


def test_callback_refuses_what_is_no_denoiser_of_images_before_the_first_step():
    class Views:
        def get(self, index, generator):
            return {"observations": torch.zeros(2, 4)}

    run = SimpleNamespace(recipe=SimpleNamespace(data=Views()), exported_pipeline=lambda: nullcontext())
    with pytest.raises(ValueError, match="`callbacks` must be without SteinResidualCallback for SimpleNamespace"):
        SteinResidualCallback().on_start(run)


def test_other_pipelines_are_refused_by_name(tmp_path):
    """A network that reads more than an image, such as those of signals seen through a forward model."""
    wide = UNet2DModel(
        sample_size=8, in_channels=6, out_channels=1, block_out_channels=(8,), norm_num_groups=1, layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    ImageGenerationPipeline(wide, DDIMScheduler()).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match="`repo` must be a pipeline whose network denoises .* ImageGeneration"):
        inspect_model(InspectConfig(str(tmp_path / "wide"), str(tmp_path)))


def test_damaged_results(run):
    """Records that a full disk cut are measured again; settings that are none are refused."""
    folder, words, _ = run
    records = [folder / "images" / f"00000{i}.json" for i in range(2)]
    whole = [record.read_text() for record in records]
    for record, damaged in zip(records, (whole[0][:40], "{}"), strict=True):
        record.write_text(damaged)
    main(words)
    assert [json.loads(record.read_text()) for record in records] == [json.loads(text) for text in whole]
    settings = folder / "settings.json"
    kept = settings.read_text()
    for damaged in (kept[:20], "[]"):
        settings.write_text(damaged)
        with pytest.raises(SystemExit, match=r"error: `output_dir` must be another folder: the settings.json"):
            main(words)
    settings.write_text(kept)
    assert not list(folder.rglob("*.tmp"))
