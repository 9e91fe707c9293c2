"""Quality against calls of the network, and other enhancers beside it, on the trained seed 0.

    pip install noisereduce pyrnnoise
    python -m benchmarks.sgmse.calls --packages runs/sgmse/packages     # five minutes on a core

Transitions are taken with 1, 2, 5, 10 and 30 calls. Beside them stand the Wiener filter of the experiment, spectral
gating by the package noisereduce, with its defaults and for stationary noise, and RNNoise, which is trained for speech
at 48 kHz and gets the recordings resampled. A sentence of an unseen speaker is kept for listening, and its
spectrograms.
"""

import argparse
import json
import time
from pathlib import Path

import noisereduce
import numpy as np
import torch
from pyrnnoise import rnnoise

from benchmarks.harness import RESULTS, figure, write_result
from benchmarks.sgmse.experiment import MEASURES, measured, way
from benchmarks.sgmse.sets import RATE, make_test_sets, packages_folder, wiener
from diffusers_ext import SpeechEnhancementPipeline
from diffusers_ext.data.audio import resample, write_audio
from diffusers_ext.demo.drawing import titled

CALLS = (1, 2, 5, 10, 30)
LISTEN = 3  # which sentence of the unseen speakers; noise falls with the root of the frequency, 5 dB
SECONDS = 4
SOUNDS = RESULTS.parents[1] / "docs" / "sounds"
SAYS = {
    r"(\w+)_more_calls_si_sdr": "Set \\1: 30 transitions instead of 5 change SI-SDR by {} dB.",
    r"(\w+)_more_calls_pesq": "Set \\1: 30 transitions instead of 5 change PESQ by {}.",
    r"(\w+)_si_sdr_over_spectral_gating": "Set \\1: 5 transitions are {} dB of SI-SDR ahead of spectral gating.",
    r"(\w+)_estoi_over_spectral_gating": "Set \\1: they are {} of ESTOI ahead of spectral gating.",
    r"(\w+)_pesq_over_spectral_gating": "Set \\1: they are {} of PESQ ahead of spectral gating.",
    r"(\w+)_si_sdr_over_rnnoise": "Set \\1: they are {} dB of SI-SDR ahead of RNNoise.",
    r"(\w+)_estoi_over_rnnoise": "Set \\1: they are {} of ESTOI ahead of RNNoise.",
    r"(\w+)_pesq_over_rnnoise": "Set \\1: they are {} of PESQ ahead of RNNoise.",
}
GATED = "spectral_gating"
OTHERS = {
    "noisy": "noisy",
    "wiener": "Wiener filter",
    GATED: "spectral gating",
    "stationary_gating": "spectral gating, stationary",
    "rnnoise": "RNNoise",
}


def by_rnnoise(wave):
    """Enhances at 48 kHz, frame by frame; its output is two frames late."""
    fast, size = resample(wave, RATE, 48000), rnnoise.FRAME_SIZE
    gain = max(1.0, float(np.abs(fast).max()))
    frames = np.pad(fast / gain, (0, 3 * size - len(fast) % size)).reshape(-1, size)
    state = rnnoise.create()
    found = np.concatenate([rnnoise.process_mono_frame(state, frame)[0] for frame in frames])
    rnnoise.destroy(state)
    found = found[2 * size :][: len(fast)].astype(np.float32) / 32768 * gain
    return resample(found, 48000, RATE)[: len(wave)]


def others():
    """Returns the enhancers that are not ours as functions of lists of noisy waves."""

    def gating(stationary):
        return lambda waves: [noisereduce.reduce_noise(y=wave, sr=RATE, stationary=stationary) for wave in waves]

    return {
        "noisy": lambda waves: waves,
        "wiener": lambda waves: [wiener(wave) for wave in waves],
        GATED: gating(False),
        "stationary_gating": gating(True),
        "rnnoise": lambda waves: [by_rnnoise(wave) for wave in waves],
    }


def listen(pipeline, pair):
    """Keeps a sentence as it was spoken, as it was recorded and as it was enhanced, and draws them."""
    clean, noisy = (wave[: SECONDS * RATE] for wave in pair)
    sounds = {"clean": clean, "noisy": noisy, "wiener": wiener(noisy)}
    sounds["1-call"] = way(pipeline, 0, 1, algorithm="transitions")([noisy])[0]
    sounds["5-transitions"] = way(pipeline, 0, 5, algorithm="transitions")([noisy])[0]
    gain = np.abs(noisy).max()
    for name, wave in sounds.items():
        write_audio(SOUNDS / f"sgmse-{name}.flac", 0.9 * wave / gain, RATE, "PCM_16")
    images = {
        name.replace("-", " "): pipeline.spectrogram.image(torch.from_numpy(wave[: 2 * RATE] / gain))
        for name, wave in sounds.items()
    }
    picture = titled(images, scale=1)
    picture.convert("L").quantize(32).save(RESULTS / "sgmse" / "calls.png", optimize=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", default="runs/sgmse/packages")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/sgmse/experiment"))
    parser.add_argument("--sentences", type=int, default=12)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start, folder = time.perf_counter(), arguments.output_dir
    sets = make_test_sets(packages_folder(arguments.packages), arguments.sentences)
    pipeline = SpeechEnhancementPipeline.from_pretrained(folder / "seed-0")
    methods = others() | {f"calls_{n}": way(pipeline, 0, n, algorithm="transitions") for n in CALLS}
    path = folder / "calls.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    for name, pairs in sets.items():
        for method, enhance in methods.items():
            if f"{name}_{method}" not in found:
                found[f"{name}_{method}"] = measured(enhance, pairs)
                path.write_text(json.dumps(found))
                print(name, method, found[f"{name}_{method}"], flush=True)
    figures, rows = {}, {}
    for name in sets:
        ours = found[f"{name}_calls_5"]
        for measure in ("si_sdr", "pesq"):
            gain = found[f"{name}_calls_30"][measure] - ours[measure]
            figures[f"{name}_more_calls_{measure}"] = figure(gain, "difference")
        for other in (GATED, "rnnoise"):
            for measure in MEASURES:
                ahead = ours[measure] - found[f"{name}_{other}"][measure]
                figures[f"{name}_{measure}_over_{other}"] = figure(ahead, "difference")
        for method in methods:
            title = OTHERS.get(method, f"{method.removeprefix('calls_')} transitions")
            rows[f"{name}_{method}"] = f"{name}: {title}"
            for measure, value in found[f"{name}_{method}"].items():
                unit = "dB" if measure == "si_sdr" else "score"
                figures[f"{measure}_{name}_{method}"] = figure(value, unit)
    listen(pipeline, sets["unseen"][LISTEN])
    table = {"of": "test set and method", "rows": rows, "columns": MEASURES}
    command = "python -m benchmarks.sgmse.calls"
    write_result("sgmse/calls", command, figures, [0], time.perf_counter() - start, table, SAYS)


if __name__ == "__main__":
    main()
