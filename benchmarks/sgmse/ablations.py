"""What the network predicts, the bridge, and rooms instead of noise: short trainings, one seed each.

    python -m benchmarks.sgmse.ablations --packages runs/sgmse/packages     # about forty minutes on a core

Network, data and test are those of the experiment, with less than half of its training. The kinds of prediction and
the bridge are tested on held-out prompts with noise; what is trained on rooms, on held-out prompts in rooms that it
has not seen. The run goes on where it was stopped.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from benchmarks.harness import figure, write_result
from benchmarks.sgmse.experiment import MEASURES, UNET, measured, trained, way
from benchmarks.sgmse.sets import RATE, held_out, loaded, make_test_sets, packages_folder, write_training
from diffusers_ext import MixedSpeech
from diffusers_ext.data.audio import write_audio

STEPS = 1700
PLAIN = {**UNET, "residual": None}  # where the output is no clean speech, nothing is added to it
WAYS = {
    "one_call": {"steps": 1, "algorithm": "transitions"},
    "transitions_5": {"steps": 5, "algorithm": "transitions"},
    "pc_30": {"steps": 30, "algorithm": "pc"},
}
BRIDGE = {
    "one_call": {"steps": 1, "algorithm": "ode"},
    "ode_5": {"steps": 5, "algorithm": "ode"},
    "sde_5": {"steps": 5, "algorithm": "sde"},
}
# What a training changes, and the ways back that are tested.
VARIANTS = {
    "sample": ({}, WAYS),
    "epsilon": ({"unet": PLAIN, "prediction_type": "epsilon"}, WAYS),
    "bridge": ({"process": "sbve", "algorithm": None}, BRIDGE),
    "rooms": ({"noise_dir": None, "reverberation": True}, {k: WAYS[k] for k in ("one_call", "transitions_5")}),
    "score": ({"unet": {**PLAIN, "divide_by_time": "before"}, "prediction_type": "score"}, WAYS),
}
TITLES = {
    "noisy": "as recorded",
    "one_call": "1 call",
    "transitions_5": "5 transitions",
    "pc_30": "predictor and corrector, 60 calls",
    "ode_5": "5 steps of the ODE",
    "sde_5": "5 steps of the SDE",
}
# Written before the run.
GOALS = {f"rooms_{measure}_gain": ">= 0" for measure in MEASURES}
SAYS = {
    r"(sample|epsilon|score)_one_call_si_sdr_gain": "Predicting the \\1, one call gains {} dB of SI-SDR.",
    r"(sample|epsilon|score)_transitions_5_si_sdr_gain": "Predicting the \\1, 5 transitions gain {} dB of SI-SDR.",
    r"(sample|epsilon|score)_pc_30_si_sdr_gain": "Predicting the \\1, 60 calls gain {} dB of SI-SDR.",
    r"bridge_one_call_si_sdr_gain": "The bridge gains {} dB of SI-SDR in one call.",
    r"bridge_ode_5_si_sdr_gain": "The bridge gains {} dB of SI-SDR in 5 steps of its ODE.",
    r"bridge_sde_5_si_sdr_gain": "The bridge gains {} dB of SI-SDR in 5 steps of its SDE.",
    r"rooms_si_sdr_gain": "In rooms, 5 transitions gain {} dB of SI-SDR.",
    r"rooms_estoi_gain": "In rooms, they gain {} of ESTOI.",
    r"rooms_pesq_gain": "In rooms, they gain {} of PESQ.",
}


def make_rooms(packages, folder, sentences):
    """Returns pairs of held-out prompts, three seconds each, and the same in rooms."""
    if not (folder / "done").is_file():
        for number, path in enumerate(held_out(packages)):
            wave = loaded(path)
            if len(wave) > 2 * RATE:
                write_audio(folder / f"{number:04d}.flac", wave, RATE)
        (folder / "done").write_text("")
    data = MixedSpeech(folder, None, RATE, 3 * RATE, reverberation_time=(0.2, 1.0), high_pass=100)
    items = [data.get(index, torch.Generator().manual_seed(index)) for index in range(sentences)]
    return [(item["clean"].numpy(), item["noisy"].numpy()) for item in items]


def run(name, folder, data, pairs, steps):
    """Returns `{way: {measure: mean}}` of one training; it is kept in a file."""
    path = folder / f"{name}.json"
    if not path.is_file():
        changes, ways = VARIANTS[name]
        pipeline = trained(folder / name, data, steps, 0, **changes)
        found = {"noisy": measured(lambda waves: waves, pairs)}
        for title, options in ways.items():
            found[title] = measured(way(pipeline, 0, **options), pairs)
            print(name, title, found[title], flush=True)
        path.write_text(json.dumps(found))
    return json.loads(path.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", default="runs/sgmse/packages")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/sgmse/ablations"))
    parser.add_argument("--data_dir", type=Path, default=Path("runs/sgmse/experiment/data"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--sentences", type=int, default=12)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start, folder = time.perf_counter(), arguments.output_dir
    packages = packages_folder(arguments.packages)
    write_training(packages, arguments.data_dir)
    noise = make_test_sets(packages, arguments.sentences)["noise"]
    rooms = make_rooms(packages, folder / "held-out", arguments.sentences)
    figures, rows = {}, {}
    for name in VARIANTS:
        pairs = rooms if name == "rooms" else noise
        found = run(name, folder, arguments.data_dir, pairs, arguments.steps)
        for title, means in found.items():
            rows[f"{name}_{title}"] = f"{name}: {TITLES[title]}"
            for measure, value in means.items():
                figures[f"{measure}_{name}_{title}"] = figure(value, "dB" if measure == "si_sdr" else "score")
        for title in list(found)[1:] if name != "rooms" else ():
            gain = found[title]["si_sdr"] - found["noisy"]["si_sdr"]
            figures[f"{name}_{title}_si_sdr_gain"] = figure(gain, "difference")
        for measure in MEASURES if name == "rooms" else ():
            gain = found["transitions_5"][measure] - found["noisy"][measure]
            figures[f"rooms_{measure}_gain"] = figure(gain, "difference", GOALS[f"rooms_{measure}_gain"])
    table = {"of": "training and way back", "rows": rows, "columns": MEASURES}
    command = "python -m benchmarks.sgmse.ablations"
    write_result("sgmse/ablations", command, figures, [0], time.perf_counter() - start, table, SAYS)


if __name__ == "__main__":
    main()
