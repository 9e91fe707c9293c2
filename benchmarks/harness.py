"""What all benchmarks share: interleaved timing and one format for results."""

import argparse
import json
import platform
import re
import statistics
import time
from pathlib import Path

import accelerate
import diffusers
import torch
from diffusers import UNet2DModel

RESULTS = Path(__file__).resolve().parent / "results"


def interleaved(functions, repeats, clock=time.perf_counter):
    """Times functions in turn, so that a slow moment of the machine hits all of them; returns median seconds."""
    times = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(repeats):
        for name, function in functions.items():
            start = clock()
            function()
            times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def figure(value, unit, goal=None, spread=None):
    """Returns one entry of a result's `figures`."""
    entry = {"value": round(float(value), 6), "unit": unit}
    if spread is not None:
        entry["spread"] = round(float(spread), 6)
    if goal is not None:
        entry["goal"] = goal
    return entry


def described(figures, says):
    """Returns the figures with a sentence each where `says` has one.

    Args:
        figures: entries by name.
        says: sentences by patterns of whole names; groups of the pattern stand as `\\1`, the value as `{}` or, with a
            format of its own, as `{:.1%}`.
    """
    found = {}
    for name, entry in figures.items():
        bare = {key: value for key, value in entry.items() if key != "says"}
        match = next((m for pattern in says if (m := re.fullmatch(pattern, name))), None)
        found[name] = {**bare, "says": match.expand(says[match.re.pattern])} if match else bare
    return found


def spread(values):
    """Returns the standard deviation over seeds, `None` of a single one."""
    return statistics.stdev(values) if len(values) > 1 else None


def kept(path, make):
    """Returns what a JSON file holds, after making it where it is missing; a file is whole or not there."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".tmp")
        partial.write_text(json.dumps(make(), indent=1))
        partial.replace(path)
    return json.loads(path.read_text())


def chosen_seeds(description, seeds):
    """Returns the seeds that the command line asks for, by default all, and takes one thread."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seeds", nargs="*", type=int, default=seeds)
    torch.set_num_threads(1)
    return parser.parse_args().seeds


def kept_by_seed(path_of, measure, chosen, seeds):
    """Measures the chosen seeds, each once; returns what all have, or None while one is missing."""
    for seed in chosen:
        print(f"seed {seed}: {kept(path_of(seed), lambda seed=seed: measure(seed))}", flush=True)
    files = [path_of(seed) for seed in seeds]
    return [json.loads(file.read_text()) for file in files] if all(file.is_file() for file in files) else None


def made_portable(folder):
    """Takes out of a model's folder where it stood when it was made, which is nobody's business; returns its MiB."""
    root = f"{RESULTS.parents[1]}/"
    for path in [*folder.rglob("*.json"), folder / "README.md"]:
        text = path.read_text().replace(root, "")
        entries = json.loads(text) if path.suffix == ".json" else None
        if isinstance(entries, dict) and entries.pop("_name_or_path", None) is not None:
            text = json.dumps(entries, indent=2) + "\n"
        path.write_text(text)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


def small_unet(size, channels, blocks, groups):
    """Returns a network without attention for images of `size`, random weights that are always the same."""
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=blocks,
        layers_per_block=1,
        norm_num_groups=groups,
        down_block_types=("DownBlock2D",) * len(blocks),
        up_block_types=("UpBlock2D",) * len(blocks),
        add_attention=False,
    )


def write_result(name, command, figures, seeds, seconds, table=None, says=None):
    """Writes benchmarks/results/{name}.json, such as "oms/overhead", and prints the figures.

    `table`: see report.py; `says`: see `described`.
    """
    result = {
        "name": name,
        "command": command,
        "seeds": seeds,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "accelerate": accelerate.__version__,
        },
        "seconds": round(seconds),
        "figures": described(figures, says or {}),
    }
    if table is not None:
        result["table"] = table
    partial = RESULTS / f"{name}.json.tmp"
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(RESULTS / f"{name}.json")
    for key, entry in figures.items():
        spread = f" +- {entry['spread']}" if "spread" in entry else ""
        print(f"{key}: {entry['value']}{spread} {entry['unit']} {entry.get('goal', '')}")
