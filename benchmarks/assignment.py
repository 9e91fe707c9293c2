"""Assignment of noise to data: ours against two other orders of work, on one thread.

    python benchmarks/assignment.py

`original` computes half-precision distances by broadcast differences of vectors scaled by 0.1, then solves on them in
float64, as the published code does; `cdist` takes torch.cdist and solves on plain distances. All solve with scipy.
The share of a training step is taken of the step of `training/configs/unet_28.json` at batch 64 on this CPU.
"""

import time

import numpy as np
import torch
from harness import figure, interleaved, write_result
from scipy.optimize import linear_sum_assignment

from diffusers_ext import assignment_permutation

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


def training_step_seconds():
    import json
    from pathlib import Path

    from diffusers import UNet2DModel

    config = json.loads((Path(__file__).parent.parent / "training" / "configs" / "unet_28.json").read_text())
    unet = UNet2DModel(sample_size=28, in_channels=1, out_channels=1, **config)
    x, t = torch.randn(64, 1, 28, 28), torch.randint(1000, (64,))

    def step():
        unet(x, t).sample.square().mean().backward()

    noise = torch.randn(64, 784)
    flat = x.flatten(1)
    times = interleaved({"step": step, "assignment": lambda: assignment_permutation(flat, noise)}, 7)
    return times["assignment"] / times["step"]


def main():
    torch.set_num_threads(1)
    start, figures = time.perf_counter(), {}
    for batch, repeats in ((256, 9), (1024, 3), (4096, 1)):
        torch.manual_seed(batch)
        x, noise = 0.5 * torch.randn(batch, DIMENSION), torch.randn(batch, DIMENSION)
        calls = {
            "ours": lambda x=x, noise=noise: assignment_permutation(x, noise),
            "cdist": lambda x=x, noise=noise: cdist(x, noise),
        }
        if batch < 4096:
            calls["original"] = lambda x=x, noise=noise: original(x, noise)
        times = interleaved(calls, repeats)
        if batch == 4096:
            # Too long to repeat in full: the distances of 128 rows stand for those of 4,096, the solver runs once.
            begin = time.perf_counter()
            for part in (0.1 * x[:128]).half().split(8):
                (part[:, None] - (0.1 * noise).half()[None]).norm(dim=2)
            distances = (time.perf_counter() - begin) * batch / 128
            begin = time.perf_counter()
            linear_sum_assignment(torch.cdist(x, noise).numpy().astype(np.float64))
            times["original"] = distances + time.perf_counter() - begin
        goal = {256: ">= 10"}.get(batch)
        figures[f"original_over_ours_b{batch}"] = figure(times["original"] / times["ours"], "ratio", goal)
        figures[f"cdist_over_ours_b{batch}"] = figure(times["cdist"] / times["ours"], "ratio", ">= 1.5")
        figures[f"ours_b{batch}"] = figure(times["ours"], "seconds")
    figures["share_of_cpu_training_step_b64"] = figure(training_step_seconds(), "ratio")
    write_result("assignment", "python benchmarks/assignment.py", figures, [0], time.perf_counter() - start)


if __name__ == "__main__":
    main()
