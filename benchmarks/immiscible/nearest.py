"""KNN noise: the exact sampler against making all candidates, and against plain noise, on one thread.

    python -m benchmarks.immiscible.nearest

Figures are of 128 samples unless their name gives another batch.
"""

import time

import torch

from benchmarks.harness import figure, interleaved, write_result
from diffusers_ext import knn_sample, knn_select

DIMENSION, BATCH = 3072, 128


def compared(batch, k):
    x = 0.5 * torch.randn(batch, DIMENSION, generator=torch.Generator().manual_seed(0))
    calls = {
        "fast": lambda: knn_sample(x, k),
        "candidates": lambda: knn_select(x, torch.randn(batch, k, DIMENSION)),
        "plain": lambda: torch.randn(batch, DIMENSION),
    }
    times = interleaved(calls, 31)
    # Each after the other only: what ran before, and filled the caches, moves such short times.
    flat = interleaved({"k": calls["fast"], "2": lambda: knn_sample(x, 2)}, 61)
    return {**times, "fast_over_k2": flat["k"] / flat["2"]}


# What each figure says, for docs/results.md: names as patterns, values for the braces.
SAYS = {
    r"fast_over_plain_k(\d+)": r"Drawing the nearest of \1 normals takes {} times as long as drawing one normal.",
    r"fast_k(\d+)_over_k2": r"Drawing the nearest of \1 takes {} times as long as the nearest of 2.",
    r"candidates_over_fast_k8_b(\d+)": (
        r"At batch \1, drawing the nearest of 8 is {} times as fast as drawing 8 and choosing."
    ),
    "candidates_over_fast_k8": "At batch 128, drawing the nearest of 8 is {} times as fast as drawing 8 and choosing.",
}


def main():
    torch.set_num_threads(1)
    start, figures = time.perf_counter(), {}
    for k in (2, 4, 8, 16, 64):
        times = compared(BATCH, k)
        goal = ">= 5" if k == 8 else None
        figures[f"candidates_over_fast_k{k}"] = figure(times["candidates"] / times["fast"], "ratio", goal)
        figures[f"fast_over_plain_k{k}"] = figure(times["fast"] / times["plain"], "ratio", "<= 3")
        if k > 2:
            figures[f"fast_k{k}_over_k2"] = figure(times["fast_over_k2"], "ratio", "<= 1.2")
    for batch in (64, 256):
        times = compared(batch, 8)
        figures[f"candidates_over_fast_k8_b{batch}"] = figure(times["candidates"] / times["fast"], "ratio", ">= 5")
    write_result(
        "immiscible/nearest",
        "python -m benchmarks.immiscible.nearest",
        figures,
        [0],
        time.perf_counter() - start,
        says=SAYS,
    )


if __name__ == "__main__":
    main()
