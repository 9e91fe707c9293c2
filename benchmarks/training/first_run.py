"""What a newcomer's first run costs: 48 images, 3 steps of batch 8, at 16 pixels, with every default.

    python -m benchmarks.training.first_run

Counted from the command on, the start of Python and its libraries and the pictures at the end included.
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.harness import figure, spread, write_result
from diffusers_ext.data.digits import DIGITS

RUNS = 3
SAYS = {
    "first_step": "A first run on 48 images of 16 pixels, with every default, shows its first step after {} seconds.",
    "whole_run": "Three steps, the saving and the pictures of the card included, it ends after {} seconds.",
    "written": "It leaves {} MB on disk.",
    "processor": "Of processor time it takes {} seconds, which hangs less on what else the machine does.",
}


def processor_seconds():
    """Of the processes that have ended."""
    found = resource.getrusage(resource.RUSAGE_CHILDREN)
    return found.ru_utime + found.ru_stime


def first_run():
    """Returns seconds to the first step and to the end, the bytes written, and seconds of processor time."""
    with tempfile.TemporaryDirectory() as folder:
        photos, out = Path(folder) / "photos", Path(folder) / "out"
        photos.mkdir()
        for index, image in enumerate(np.load(DIGITS)["images"][:48]):
            Image.fromarray(image).convert("RGB").save(photos / f"{index}.png")
        words = ["immiscible", "--train_data_dir", photos, "--output_dir", out, "--resolution", "16"]
        words += ["--train_batch_size", "8", "--max_train_steps", "3"]
        start, first, used = time.perf_counter(), None, processor_seconds()
        command = [sys.executable, "-m", "diffusers_ext.train", *map(str, words)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, bufsize=1)
        assert process.stderr is not None
        shown = ""
        while character := process.stderr.read(1):
            shown += character
            if first is None and "1/3 [" in shown:
                first = time.perf_counter() - start
        assert process.wait() == 0, shown
        assert first is not None
        written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        return first, time.perf_counter() - start, written, processor_seconds() - used


def main():
    start = time.perf_counter()
    columns = list(zip(*(first_run() for _ in range(RUNS)), strict=True))
    goals = {
        "first_step": ("seconds", "<= 30"),
        "whole_run": ("seconds", "<= 60"),
        "written": ("MB", "< 200"),
        "processor": ("seconds", None),  # what a busy machine leaves as it is
    }
    figures = {}
    for (name, (unit, goal)), values in zip(goals.items(), columns, strict=True):
        values = [value / 1e6 if unit == "MB" else value for value in values]
        figures[name] = figure(sorted(values)[RUNS // 2], unit, goal, spread(values))
    seconds = time.perf_counter() - start
    command = "python -m benchmarks.training.first_run"
    write_result("training/first_run", command, figures, [0] * RUNS, seconds, says=SAYS)


if __name__ == "__main__":
    main()
