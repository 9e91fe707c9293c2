"""The command line, and the demo as a user runs it."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import wavfile

import diffusers_ext

from . import processes

PICTURES = Path(diffusers_ext.__file__).parent.parent / "docs" / "pictures"
DEMO = "import sys; from diffusers_ext.cli import main; main(sys.argv[1:])"


def command(*words):
    run = processes.run([sys.executable, "-c", DEMO, *words], timeout=900)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_info_names_versions_and_public_names():
    text = command("info")
    assert f"diffusers-ext {diffusers_ext.__version__}" in text
    assert "ImageGenerationPipeline" in text


def test_demo_loads_draws_measures_finetunes_and_reloads(tmp_path):
    (tmp_path / "digits-finetuned").mkdir()
    (tmp_path / "digits-finetuned" / "model_index.json").write_text("{}")  # as an earlier demo leaves one
    text = command("demo", "--output_dir", str(tmp_path))
    trained, untrained = map(float, re.search(r"real digits: ([\d.]+); of an untrained net: ([\d.]+)", text).groups())
    assert trained * 5 < untrained
    # The second process found the pipeline class and the fine-tuned weights, and drew something like digits.
    mean = float(re.search(r"ImageGenerationPipeline drew \(4, 1, 28, 28\), mean ([\d.]+)", text)[1])
    assert 0.05 < mean < 0.3
    plain, with_step = map(float, re.search(r"photographs: plain ([\d.]+), one more step ([\d.]+)", text).groups())
    assert with_step * 3 < plain
    assert (tmp_path / "one_more_step.png").is_file()
    ratios = dict(re.findall(r"norm ratio of the frames' states, (\w+): ([\d.]+)", text))
    assert abs(float(ratios["noise_diffusion"]) - 1) < abs(float(ratios["slerp"]) - 1) < 0.3
    assert (tmp_path / "noise_diffusion.png").is_file()
    before, after = map(float, re.search(r"in 5 steps: before ([\d.]+), after ([\d.]+)", text).groups())
    assert after * 2 < before
    assert (tmp_path / "mmd_ddm.png").is_file()
    found = re.search(r"noisy ([\d.]+) dB, denoised ([\d.]+) dB; .*with that ([\d.]+) dB", text)
    noisy, denoised, blind = map(float, found.groups())
    assert denoised > noisy + 3
    assert abs(blind - denoised) < 0.4
    assert (tmp_path / "noise2score.png").is_file()
    found = re.search(r"noisy ([\d.]+) dB, denoised raw ([\d.]+) dB; learned noise is ([\d.]+) times", text)
    noisy, denoised, nearness = map(float, found.groups())
    assert denoised > noisy + 1
    assert nearness < 0.5
    assert (tmp_path / "pnnp.png").is_file()
    assert float(re.search(r"above the others in the map with probability ([\d.]+)", text)[1]) > 0.8
    assert float(re.search(r"lines of k-space: ([\d.]+) dB nearer", text)[1]) > 1
    assert (tmp_path / "score_frameworks.png").is_file()
    naive, known = map(float, re.search(r"taken for clean ([\d.]+), noise known ([\d.]+)", text).groups())
    assert known * 1.5 < naive
    assert (tmp_path / "ambient.png").is_file()
    found = re.search(r"agree with the row to ([\d.]+), and vary by ([\d.]+) .*, by ([\d.]+) with one", text)
    agree, four, one = map(float, found.groups())
    assert agree < 0.25
    assert four > one > 0.05
    assert (tmp_path / "forward_models.png").is_file()
    distances = [float(d) for d in re.findall(r"Frechet distance to real digits ([\d.]+)$", text, re.M)]
    whole, nearest_8, nearest_4, learned_4 = distances
    assert nearest_8 < 1.2 * whole
    assert learned_4 < 0.7 * nearest_4
    assert (tmp_path / "q_diffusion.png").is_file()
    source, adapted = map(float, re.search(r"right: source ([\d.]+), adapted ([\d.]+)", text).groups())
    assert adapted > source + 0.15
    assert (tmp_path / "sda.png").is_file()
    noisy, enhanced = map(float, re.search(r"SI-SDR: noisy (-?[\d.]+) dB, after 1 call ([\d.]+) dB", text).groups())
    assert enhanced > noisy + 1
    for name in ("noisy", "enhanced"):
        assert wavfile.read(tmp_path / f"speech-{name}.wav")[1].std() > 300
    picture = np.asarray(Image.open(tmp_path / "image_generation.png").convert("L"))
    real, samples, noise = (part[28:].std() for part in np.array_split(picture, 3, axis=1))
    assert min(real, samples, noise) > 10  # none of the three panels is blank
    assert (tmp_path / "digits-finetuned" / "model_index.json").is_file()
    # The pictures of the documentation are those that the demo draws today.
    for path in tmp_path.glob("*.json"):
        shown = json.loads((PICTURES / path.name).read_text())
        assert json.loads(path.read_text()) == pytest.approx(
            shown, rel=0.05, abs=0.06 if path.stem == "sda" else 0.005
        )


def test_assets_are_small_and_safe():
    assets = Path(diffusers_ext.__file__).parent / "assets"
    files = [path for path in assets.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md", ".npz", ".png", ".py", ".flac"}
    for folder in assets.iterdir():
        assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 3 * 2**20
        assert (folder / "README.md").is_file()
