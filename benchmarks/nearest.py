"""KNN noise: the exact sampler against making all candidates, and against plain noise, on one thread.

python benchmarks/nearest.py
"""

import time

import torch
from harness import figure, interleaved, write_result

from diffusers_ext import knn_sample, knn_select

DIMENSION, BATCH = 3072, 128


def main():
    torch.set_num_threads(1)
    start, figures, fast = time.perf_counter(), {}, {}
    x = 0.5 * torch.randn(BATCH, DIMENSION, generator=torch.Generator().manual_seed(0))
    for k in (2, 4, 8, 16, 64):
        times = interleaved(
            {
                "fast": lambda k=k: knn_sample(x, k),
                "candidates": lambda k=k: knn_select(x, torch.randn(BATCH, k, DIMENSION)),
                "plain": lambda: torch.randn(BATCH, DIMENSION),
                # The smallest k again, in the same minute: its ratio shows how flat the cost is.
                "fast2": lambda: knn_sample(x, 2),
            },
            15,
        )
        fast[k] = times["fast"] / times["fast2"]
        goal = ">= 5" if k == 8 else None
        figures[f"candidates_over_fast_k{k}"] = figure(times["candidates"] / times["fast"], "ratio", goal)
        figures[f"fast_over_plain_k{k}"] = figure(times["fast"] / times["plain"], "ratio", "<= 3")
    for k in (4, 8, 16, 64):
        figures[f"fast_k{k}_over_k2"] = figure(fast[k], "ratio", "<= 1.5" if k <= 16 else None)
    write_result("nearest", "python benchmarks/nearest.py", figures, [0], time.perf_counter() - start)


if __name__ == "__main__":
    main()
