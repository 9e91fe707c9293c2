"""Assignment of noise to data: ours against two other orders of work, on one thread.

    python -m benchmarks.immiscible.assignment

`original` computes half-precision distances by broadcast differences of vectors scaled by 0.1, then solves on them in
float64, as the published code does; `cdist` takes torch.cdist and solves on plain distances; `unshifted` solves on the
inner products as they are. All solve with scipy. Samples are normals of 3,072 dimensions, and for `digits` images.
The share of a training step is taken of the step of `training/configs/unet_28.json` at batch 64 on this CPU.
"""

import json
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DModel
from scipy.optimize import linear_sum_assignment

from benchmarks.harness import figure, interleaved, write_result
from diffusers_ext import assignment_permutation, load_images
from diffusers_ext.data.digits import DIGITS

DIMENSION = 3072


def original(x, noise):
    rows = []
    x, noise = (0.1 * x).half(), (0.1 * noise).half()
    block = max(1, 2**27 // (len(noise) * DIMENSION))  # as many rows at a time as fit in 256 MiB
    for part in x.split(block):
        rows.append((part[:, None] - noise[None]).norm(dim=2))
    return linear_sum_assignment(torch.cat(rows).numpy().astype(np.float64))[1]


def cdist(x, noise):
    return linear_sum_assignment(torch.cdist(x, noise).numpy())[1]


def unshifted(x, noise):
    return linear_sum_assignment((x @ noise.T).numpy(), maximize=True)[1]


def unshifted_over_ours(x, noise, repeats):
    # Apart from the others: what ran before, and filled the caches, moves such close times.
    times = interleaved(
        {"ours": lambda: assignment_permutation(x, noise), "other": lambda: unshifted(x, noise)}, repeats
    )
    return times["other"] / times["ours"]


def share_of_training_step():
    config = json.loads((Path(__file__).parents[2] / "training" / "configs" / "unet_28.json").read_text())
    unet = UNet2DModel(sample_size=28, in_channels=1, out_channels=1, **config)
    x, t = torch.randn(64, 1, 28, 28), torch.randint(1000, (64,))

    def step():
        unet(x, t).sample.square().mean().backward()

    noise = torch.randn(64, 784)
    flat = x.flatten(1)
    times = interleaved({"step": step, "assignment": lambda: assignment_permutation(flat, noise)}, 7)
    return times["assignment"] / times["step"]


# What each figure says, for docs/results.md: names as patterns, values for the braces.
SAYS = {
    r"original_over_ours_b(\d+)": r"Pairing a batch of \1 is {} times as fast as by the authors' code.",
    r"cdist_over_ours_b(\d+)": r"Pairing a batch of \1 is {} times as fast as by `torch.cdist` and SciPy.",
    "unshifted_over_ours_digits_b1000": (
        "Centring the costs first makes the assignment of 1,000 digits {} times as fast."
    ),
    "share_of_cpu_training_step_b64": (
        "The assignment takes {:.2%} of a small net's training step on a CPU at batch 64."
    ),
}


def main():
    torch.set_num_threads(1)
    start, figures = time.perf_counter(), {}
    for batch, repeats in ((256, 21), (1024, 5), (4096, 1)):
        torch.manual_seed(batch)
        x, noise = 0.5 * torch.randn(batch, DIMENSION), torch.randn(batch, DIMENSION)
        calls = {"ours": assignment_permutation, "cdist": cdist}
        if batch < 4096:
            calls["original"] = original
        times = interleaved({name: partial(call, x, noise) for name, call in calls.items()}, repeats)
        if batch == 4096:  # takes minutes: once, without a first call to warm up
            begin = time.perf_counter()
            original(x, noise)
            times["original"] = time.perf_counter() - begin
        goal = {256: ">= 10"}.get(batch)
        figures[f"original_over_ours_b{batch}"] = figure(times["original"] / times["ours"], "ratio", goal)
        figures[f"cdist_over_ours_b{batch}"] = figure(times["cdist"] / times["ours"], "ratio", ">= 1.5")
        figures[f"unshifted_over_ours_b{batch}"] = figure(unshifted_over_ours(x, noise, repeats), "ratio")
        figures[f"ours_b{batch}"] = figure(times["ours"], "seconds")
    data = load_images(train_data_dir=str(DIGITS), resolution=28, channels=1)
    x = torch.stack([data[i]["pixel_values"] for i in range(1000)]).flatten(1)
    figures["unshifted_over_ours_digits_b1000"] = figure(unshifted_over_ours(x, torch.randn_like(x), 5), "ratio")
    figures["share_of_cpu_training_step_b64"] = figure(share_of_training_step(), "ratio")
    write_result(
        "immiscible/assignment",
        "python -m benchmarks.immiscible.assignment",
        figures,
        [0],
        time.perf_counter() - start,
        says=SAYS,
    )


if __name__ == "__main__":
    main()
