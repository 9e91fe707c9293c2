"""The page's functions without a browser: what they draw is what the pipelines draw."""

import importlib
import re
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import diffusers_ext
from diffusers_ext import NoiseDiffusionPipeline, OMSPipeline, cli, corrupt
from diffusers_ext.data.assets import ASSETS
from diffusers_ext.data.digits import DIGITS
from tests.methods.oms import tiny

gr = pytest.importorskip("gradio", reason="needs Gradio: pip install 'diffusers-ext[app]'")
from diffusers_ext.app import (  # noqa: E402
    app,
    few_steps,
    noise_diffusion,
    one_more_step,
    parts,
    sda,
    speech_enhancement,
)

FOLDER = Path(app.__file__).parent


def example(name):
    return Image.open(parts.EXAMPLES / f"{name}.png")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def numbers(text):
    return [float(number) for number in re.findall(r"\d+\.\d+", text)]


# ------------------------------------------------------------------ the tabs


def test_one_more_step_draws_what_the_pipeline_draws():
    plain, corrected, said, table = one_more_step.draw(6, 3, 4, 5)
    pipeline = OMSPipeline.from_pretrained(ASSETS / "photos-oms", base=parts.load("photos-base"))
    for grid, added in ((plain, False), (corrected, True)):
        images = pipeline(class_labels=[6] * 3, num_inference_steps=4, generator=seeded(5), oms=added).images
        assert grid.size == (8 * 32, 32)
        assert np.array_equal(np.asarray(grid)[:, :96], np.concatenate([np.asarray(i) for i in images], 1))
        assert np.asarray(grid)[:, 96:].max() == 0
    real, without, with_step = numbers(said.split(":")[1])
    assert real == pytest.approx(one_more_step.photographs(6).mean(), abs=0.005)
    assert without == pytest.approx(np.asarray(plain)[:, :96].mean() / 255, abs=0.01)
    assert abs(with_step - real) < abs(without - real)
    counted = table.groupby("of")["images, %"].sum()
    assert counted.to_dict() == pytest.approx({"photographs": 100, "without": 100, "with One More Step": 100})


def test_histogram_counts_each_image_in_its_bin():
    table = one_more_step.histogram_table({"some": np.array([0.01, 0.02, 0.51, 1.0])})
    filled = table[table["images, %"] > 0]
    assert filled["mean brightness"].tolist() == pytest.approx([0.025, 0.525, 0.975])
    assert filled["images, %"].tolist() == [50, 25, 25]


def test_one_more_step_takes_prompts_where_its_base_does(tmp_path):
    base = tiny.stable_diffusion()
    base.save_pretrained(tmp_path / "base")
    OMSPipeline(tiny.module()).save_pretrained(tmp_path / "module")
    folders = {"base": str(tmp_path / "base"), "module": str(tmp_path / "module")}
    with gr.Blocks() as blocks:
        one_more_step.tab(**folders)
    labels = [getattr(block, "label", None) for block in blocks.blocks.values()]
    assert "Prompt" in labels
    assert "Class" not in labels
    _, corrected, said, table = one_more_step.draw("ab", 2, 2, 0, **folders)
    base.set_progress_bar_config(disable=True)
    images = OMSPipeline(tiny.module(), base)(
        "ab", num_images_per_prompt=2, num_inference_steps=2, generator=seeded(0)
    ).images
    side = images[0].width
    assert np.array_equal(np.asarray(corrected)[:, : 2 * side], np.concatenate([np.asarray(i) for i in images], 1))
    assert len(numbers(said)) == 2  # no photographs to compare with
    assert set(table["of"]) == {"without", "with One More Step"}


def rows(table):
    """The first figure of each row."""
    cells = [line.strip("| ").split(" | ") for line in table.splitlines()]
    return {row[0]: row[1] for row in cells[2:]}


def test_noise_diffusion_makes_the_frames_of_the_pipeline(monkeypatch):
    monkeypatch.setattr(noise_diffusion, "STEPS", 12)
    first, second = example("digit-4-noisy"), example("digit-6-noisy")
    strip, images, slider, middle, table = noise_diffusion.make(first, second, "slerp", 3, 0.5, 0)
    pipeline = NoiseDiffusionPipeline.from_pretrained(ASSETS / "digits-epsilon")
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(first, second, 3, method="slerp", num_inference_steps=12, strength=0.5)
    assert [np.asarray(i).tolist() for i in images[1:-1]] == [np.asarray(i).tolist() for i in expected.images]
    assert np.array_equal(np.asarray(strip)[..., 0], np.concatenate([np.asarray(i) for i in images], 1))
    assert np.array_equal(images[0], first)
    assert np.array_equal(images[-1], second)
    assert (slider.maximum, slider.value) == (4, 2)
    assert middle is images[2] is noise_diffusion.show(images, 2)
    assert noise_diffusion.show([], 0) is None
    ratio = expected.diagnostics["inverted"].norm_ratio
    mixed = expected.diagnostics["frames"].pooled["norm_ratio"]
    assert rows(table) == {
        "noise, as expected": "1.000",
        "first image, inverted": f"{ratio[0]:.3f}",
        "second image, inverted": f"{ratio[1]:.3f}",
        "frames, mixed": f"{mixed:.3f}",
    }


def test_method_without_inversion_has_no_figures_of_it():
    *_, table = noise_diffusion.make(example("digit-4"), example("digit-6"), "noise", 1, 0.2, 0)
    assert list(rows(table)) == ["noise, as expected", "frames, mixed"]


def test_sda_reads_a_corrupted_digit_after_adaptation():
    image = example("digit-0")
    corrupted, adapted, before, after = sda.classify(image, "impulse_noise", 4, 0)
    assert max(before, key=before.get) == "8"  # wrong
    assert max(after, key=after.get) == "0"
    assert sum(after.values()) == pytest.approx(1, abs=1e-5)
    pixels = corrupt(np.asarray(image), "impulse_noise", 4, seed=0)
    assert np.array_equal(corrupted, pixels)
    output = parts.load("digits-sda")(pixels, generator=seeded(0))
    assert np.array_equal(adapted, output.images[0])
    assert list(after.values()) == output.probabilities[0].tolist()
    clean, _, before, _ = sda.classify(image, "none", 1, 0)
    assert np.array_equal(clean, image)
    assert max(before, key=before.get) == "0"


def test_few_steps_draws_what_the_pipelines_draw_and_shows_its_progress(monkeypatch):
    monkeypatch.setattr(few_steps, "COUNT", 48)
    seen = []
    before, after, said = few_steps.draw(5, 3, lambda place, desc: seen.append((place, desc)))
    tuned = parts.load("digits16-5-steps")
    images = tuned(48, num_inference_steps=5, generator=seeded(3)).images
    assert np.array_equal(np.asarray(after)[:16, :, 0], np.concatenate([np.asarray(i) for i in images[:12]], 1))
    assert before.size == after.size == (12 * 16, 4 * 16)
    first, second = numbers(said)
    assert second < first
    assert seen[0] == (0, "Loading the models")
    assert seen[1:] == [((i, 5), f"Drawing {title} tuning") for title in ("before", "after") for i in range(1, 6)]


def test_speech_enhancement_gives_what_the_pipeline_gives(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    path, seen = parts.EXAMPLES / "speech-noisy.flac", []
    heard, before, after, said = speech_enhancement.enhance(
        str(path), 3, 7, lambda place, desc: seen.append((place, desc))
    )
    pipeline = parts.load("speech-enhancement")
    found = pipeline(path, num_inference_steps=3, generator=seeded(7)).audios[0]
    assert heard[0] == 8000
    np.testing.assert_allclose(heard[1] / 32767, found.clip(-1, 1), atol=1e-3)
    noisy = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
    assert np.array_equal(before, pipeline.spectrogram.image(noisy / noisy.abs().max()))
    assert np.asarray(after).mean() < 0.8 * np.asarray(before).mean()  # the noise is darker
    assert said.endswith("s at 8000 Hz, 1 channel.")
    assert seen == [(0, "Loading the model"), *(((i, 3), "Enhancing") for i in (1, 2, 3))]
    stereo = tmp_path / "stereo.wav"
    soundfile.write(stereo, np.random.default_rng(0).uniform(-1, 1, (4410, 2)), 44100)
    (rate, wave), *_, said = speech_enhancement.enhance(str(stereo), 1, 0, lambda *_, **__: None)
    assert (rate, wave.shape) == (44100, (4410, 2))
    assert said == "stereo.wav: 0.1 s at 44100 Hz, 2 channels."


def test_recordings_that_are_none_get_a_message(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    (tmp_path / "text.wav").write_text("this is no sound")
    soundfile.write(tmp_path / "long.wav", np.zeros(speech_enhancement.LONGEST * 1000 + 2000), 1000)
    messages = {
        None: "Upload or record something first",
        "text.wav": "This file is no sound that can be read",
        "long.wav": "At most 60 seconds, got 62",
    }
    for name, message in messages.items():
        with pytest.raises(gr.Error, match=message):
            speech_enhancement.enhance(name and str(tmp_path / name), 5, 0)


# ------------------------------------------------------------------ uploads and messages


@pytest.mark.parametrize("kind", ["text", "truncated", "huge"])
def test_upload_that_is_no_image_gets_a_message(tmp_path, kind):
    path = tmp_path / "bad.png"
    if kind == "text":
        path.write_text("this is no image")
    elif kind == "truncated":
        data = (parts.EXAMPLES / "digit-4-noisy.png").read_bytes()
        path.write_bytes(data[: len(data) // 2])
    else:
        Image.new("1", (parts.LONGEST + 1, 8)).save(path)
    with pytest.raises(gr.Error, match="got 4097 x 8" if kind == "huge" else "is not an image, or it is damaged"):
        parts.check_upload({"path": str(path)})


def test_image_passes_the_check_of_uploads():
    assert parts.check_upload({"path": str(parts.EXAMPLES / "digit-4.png")}) is None


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "I;16"])
def test_uploads_of_every_mode_give_the_same_digit(mode):
    image = example("digit-4")
    given = Image.fromarray(np.asarray(image).astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    assert given.mode == mode
    assert np.array_equal(parts.as_digit(given, "Image"), image)


def test_middle_square_of_an_upload_is_taken():
    wide = Image.new("L", (84, 28))
    wide.paste(example("digit-4"), (28, 0))
    assert np.array_equal(parts.as_digit(wide, "Image"), example("digit-4"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sda.classify(None, "none", 1, 0), "Upload an image first"),
        (lambda: noise_diffusion.make(example("digit-4"), None, "slerp", 1, 0.5, 0), "Upload an image first"),
        (lambda: sda.classify(Image.new("L", (5, 50)), "none", 1, 0), "At least 14 pixels a side, got 5 x 50"),
        (lambda: few_steps.draw(5, None), "seed must be an integer"),
        (lambda: one_more_step.draw(0, 1, 1, -1), "seed must be an integer"),
    ],
)
def test_wrong_input_gets_a_message(call, message):
    with pytest.raises(gr.Error, match=message):
        call()


def test_errors_of_the_pipelines_are_shown():
    make = parts.shows_errors(noise_diffusion.make)
    with pytest.raises(gr.Error) as found:
        make(example("digit-4"), example("digit-6"), "other", 1, 0.5, 0)
    assert found.value.message.startswith("`method` must be one of ['noise_diffusion'")
    with pytest.raises(gr.Error) as found:
        make(None, None, "slerp", 1, 0.5, 0)
    assert found.value.message == "Upload an image first, or pick an example below."


def test_base_without_module_is_refused():
    with pytest.raises(ValueError, match="`base` and `module` must be given together, got 'x' and None"):
        one_more_step.tab(base="x")


# ------------------------------------------------------------------ the frame, the command and the Space


def tabs_of(blocks):
    return [block.label for block in blocks.blocks.values() if isinstance(block, gr.Tab)]


def test_every_tab_stands_on_the_page_with_its_paper():
    modules = [importlib.import_module(f"diffusers_ext.app.{name}") for name in app.TABS]
    assert tabs_of(app.page()) == [module.TITLE for module in modules]
    assert all("https://arxiv.org/abs/" in module.TEXT for module in modules)


def test_folder_is_a_complete_space(tmp_path):
    from huggingface_hub import SpaceCard
    from packaging.requirements import Requirement
    from packaging.version import Version

    card = SpaceCard.load(FOLDER / "README.md").data
    assert (card.sdk, card.app_file) == ("gradio", "app.py")
    assert Version(card.sdk_version) <= Version(gr.__version__)
    (line,) = (FOLDER / "requirements.txt").read_text().split()
    requirement = Requirement(line)
    assert (requirement.name, requirement.extras) == ("diffusers-ext", {"app"})
    space = tmp_path / "space"
    shutil.copytree(FOLDER, space)
    names = runpy.run_path(str(space / "app.py"))
    assert tabs_of(names["page"]()) == tabs_of(app.page())


def test_examples_are_crops_of_the_assets():
    file = np.load(DIGITS)
    for digit, index in {0: 971, 4: 0, 5: 994, 6: 4}.items():
        assert file["labels"][index] == digit
        assert np.array_equal(example(f"digit-{digit}"), file["images"][index])
    pixels = file["images"][[0, 4]] / 255
    noisy = np.clip(pixels + 0.15 * np.random.default_rng(0).standard_normal(pixels.shape), 0, 1)
    for digit, expected in zip((4, 6), noisy, strict=True):
        assert np.array_equal(example(f"digit-{digit}-noisy"), (expected * 255).round().astype(np.uint8))


def test_command_serves_on_the_loopback_address(monkeypatch):
    calls = []
    monkeypatch.setattr(gr.Blocks, "launch", lambda self, **options: calls.append(options))
    cli.main(["app", "--port", "7123"])
    (options,) = calls
    assert (options["server_name"], options["server_port"]) == ("127.0.0.1", 7123)
    assert not options.get("share")


@pytest.mark.parametrize(
    ("words", "message"),
    [([], "pip install 'diffusers-ext\\[app\\]'"), (["--oms_base", "x"], "must be given together")],
)
def test_command_says_what_is_missing(monkeypatch, words, message):
    if not words:
        monkeypatch.setitem(sys.modules, "gradio", None)
        monkeypatch.delitem(sys.modules, "diffusers_ext.app.app")
        monkeypatch.delattr(diffusers_ext.app, "app")
    with pytest.raises(SystemExit, match=message):
        cli.main(["app", *words])
