"""Trains on digits of which most are noisy, and asks what a noisy digit is worth.

Digits of 8x8 pixels (scikit-learn's, 1,397 for training) in [-1, 1], noise of level 0.3, a residual network of fully
connected layers, EDM. Distances are Frechet distances in pixel space of 4,000 samples to all 1,797 digits; "truncated"
samples stop at the level of the noise and are the posterior mean there. So that memorising can be told, the distance
that n repeated real digits have stands beside them.

python -m benchmarks.ambient.experiment
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from sklearn.datasets import load_digits
from torch import nn

from benchmarks.harness import figure, spread, write_result
from diffusers_ext import EDM, AmbientTask, FrozenNoise, StepRNG, edm_levels, frechet_distance, heun_step
from diffusers_ext.training.timesteps import LogNormalLevels

RUNS = Path("runs/ambient-digits")
SEEDS = (0, 1, 2)
TRAIN, SIGMA, BATCH, STEPS, SAMPLES = 1397, 0.3, 128, 3000, 4000
SHARES = (0, 2, 5, 10, 25, 100)  # per cent of the digits that are clean, the others noisy
CLEAN = (70, 140, 349, 700)  # clean digits alone; all of them are the mix of 100 %
GOALS = ("mix_10", "clean_140", "naive_10", "mix_0")
CURVE = (*(f"mix_{s}" for s in SHARES if s not in (0, 10)), *(f"clean_{n}" for n in CLEAN if n != 140))
REPEATED = (28, 70, 140, 349, 700, 1397)

SAYS = {
    "mix_over_clean": "With the noisy digits beside them, 10 % clean digits give {} times the Frechet distance that "
    "they give alone.",
    "truncated_mix_over_clean": "Truncated at the noise's level it is {} times that distance.",
    "truncated_mix_fd": "Truncated samples of the mix have a distance of {}; its 140 clean digits, repeated, would "
    "have about 0.85.",
    "naive_over_mix": "Training on the same mix as if all were clean gives {} times the mix's distance.",
    "mix_over_noisy": "10 % clean digits among the noisy ones give {} times the distance of noisy ones alone.",
    r"price_(\d+)": r"Where \1 % of the digits are clean, one more clean digit is worth {} noisy ones.",
    "near_mix_10": "{:.0%} of the mix's samples are nearer to one of its 140 clean digits than half of unseen real "
    "ones are.",
    "near_clean_140": "Of samples of a model of the 140 clean digits alone it is {:.0%}.",
}


class Network(nn.Module):
    """Two residual blocks of fully connected layers, told the noise level."""

    def __init__(self, size=64, width=256, blocks=2):
        super().__init__()
        self.enter, self.leave = nn.Linear(size, width), nn.Linear(width, size)
        self.level = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(blocks)
        )
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, x, t):
        angles = t[:, None] * torch.exp(torch.linspace(0, math.log(64), 16))
        h, level = self.enter(x), self.level(torch.cat([angles.sin(), angles.cos()], 1))
        for block in self.blocks:
            h = h + block(h + level)
        return self.leave(h)


def digits(seed):
    """Returns the training digits `(1397, 64)` in [-1, 1] in an order of the seed's, and all of them."""
    images: Any = load_digits()
    every = torch.from_numpy(images.data / 8 - 1).float()
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(every))[:TRAIN])
    return every[order], every


def train(y, sigma_n, seed, steps=STEPS):
    """Trains a network on digits of known levels; returns it with its averaged weights, and the task."""
    torch.manual_seed(seed)
    network, task = Network(), AmbientTask(EDM(), LogNormalLevels(-1.2 + math.log(2), 1.2))
    average = EMAModel(network.parameters(), decay=0.999)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    rng, order = StepRNG(seed), np.random.default_rng(seed)
    for step in range(steps):
        rng.begin(step)
        rows = torch.from_numpy(order.choice(len(y), BATCH, replace=len(y) < BATCH))
        t, weight = task.draw(sigma_n[rows], rng)
        made = task.make(y[rows], sigma_n[rows], rng.randn_like(y[rows]), t, weight)
        loss = task.loss(network(made.noisy, task.objective.model_timesteps(made.t)), made)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.step(network.parameters())
    average.copy_to(network.parameters())
    return network.eval(), task


@torch.no_grad()
def sample(network, task, seed, stop=None, count=SAMPLES):
    """Draws digits by 30 steps of Heun's method."""

    def denoise(x, sigma):
        predict = lambda noisy, t: network(noisy, task.objective.model_timesteps(t))  # noqa: E731
        return task.denoised(predict, x, torch.full((len(x),), sigma))

    levels = edm_levels(30, stop_at_sigma=stop).tolist()
    x = levels[0] * torch.randn(count, 64, generator=torch.Generator().manual_seed(seed + 1000))
    for sigma, following in zip(levels, levels[1:], strict=False):
        x = heun_step(denoise, x, sigma, following)
    return x if stop is None else denoise(x, stop)


def nearest(samples, images):
    """Returns the distance of each sample to the nearest of some images."""
    return torch.cdist(samples, images).min(1).values


def one(name, seed):
    """Trains and measures one model; returns its figures."""
    kind, number = name.rsplit("_", 1)
    x, every = digits(seed)
    count = int(number) if kind == "clean" else round(TRAIN * int(number) / 100)
    levels = np.where(np.arange(TRAIN) < count, 0.0, SIGMA)
    y, sigma_n = FrozenNoise(levels, seed=seed)(x, torch.arange(TRAIN))
    if kind == "clean":
        y, sigma_n = y[:count], sigma_n[:count]
    if kind == "naive":
        sigma_n = torch.zeros(TRAIN)
    network, task = train(y, sigma_n, seed)
    full, truncated = sample(network, task, seed), sample(network, task, seed, stop=SIGMA)
    held_out = every[~(torch.cdist(every, x) < 1e-6).any(1)]
    typical = nearest(held_out, x[:count]).median() if count else torch.tensor(0.0)
    return {
        "full": frechet_distance(full, every),
        "truncated": frechet_distance(truncated, every),
        # Half of the real digits that nothing was trained on are nearer than this to a clean training digit.
        "near": float((nearest(full, x[:count]) < typical).float().mean()) if count else 0.0,
    }


def repeated(count, seed, draws=4):
    """Returns the distance that real digits have of which there are `count`, each repeated."""
    _, every = digits(seed)
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        few = every[torch.from_numpy(rng.permutation(len(every))[:count])]
        found.append(frechet_distance(few.repeat(-(-SAMPLES // count), 1)[:SAMPLES], every))
    return float(np.mean(found))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--runs", type=Path, default=RUNS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.runs.mkdir(parents=True, exist_ok=True)
    found, seconds = {}, 0.0
    for name in (*GOALS, *CURVE):
        for seed in args.seeds:
            path = args.runs / f"{name}-{seed}.json"
            if not path.is_file():
                start = time.perf_counter()
                result = one(name, seed)
                result["seconds"] = time.perf_counter() - start
                partial = path.with_suffix(".tmp")
                partial.write_text(json.dumps(result))
                partial.replace(path)
                print(f"seed {seed}, {name}: {result}", flush=True)
            found[name, seed] = json.loads(path.read_text())
            seconds += found[name, seed]["seconds"]
        if tuple(args.seeds) == SEEDS and name in (GOALS[-1], CURVE[-1]):
            report(found, seconds)  # of the goals first, then with the curve


def price(found, share, seed):
    """Returns how many noisy digits a clean one is worth, by the number of clean ones that give the same distance."""
    sizes = np.array([*CLEAN, TRAIN], float)
    distances = np.array([found[f"clean_{n}", seed]["full"] for n in CLEAN] + [found["mix_100", seed]["full"]])
    falling = np.minimum.accumulate(distances)  # chance may turn neighbours round
    wanted, clean = found[f"mix_{share}", seed]["full"], round(TRAIN * share / 100)
    equal = math.exp(np.interp(-math.log(wanted), -np.log(falling), np.log(sizes)))
    return (TRAIN - clean) / max(equal - clean, 1)


def report(found, seconds):
    figures = {}

    def record(name, values, unit="ratio", goal=None):
        figures[name] = figure(np.mean(values), unit, goal, spread(list(values)))

    def over(a, b, kind="full"):
        top = np.mean([found[a, seed][kind] for seed in SEEDS])
        low = [found[b, seed]["full"] for seed in SEEDS]
        ratios = [found[a, seed][kind] / value for seed, value in zip(SEEDS, low, strict=True)]
        return top / np.mean(low), spread(ratios)

    def ratio(name, a, b, goal, kind="full"):
        value, deviation = over(a, b, kind)
        figures[name] = figure(value, "ratio", goal, deviation)

    ratio("mix_over_clean", "mix_10", "clean_140", "<= 0.7")
    ratio("truncated_mix_over_clean", "mix_10", "clean_140", "<= 0.5", "truncated")
    record("truncated_mix_fd", [found["mix_10", seed]["truncated"] for seed in SEEDS], "distance", "< 0.78")
    ratio("naive_over_mix", "naive_10", "mix_10", ">= 2")
    ratio("mix_over_noisy", "mix_10", "mix_0", "< 1")
    for share in SHARES[:-1] if (CURVE[-1], SEEDS[-1]) in found else ():
        record(f"price_{share}", [price(found, share, seed) for seed in SEEDS])
    for name in dict.fromkeys(name for name, _ in found):
        for kind in ("full", "truncated", "near"):
            unit = "part" if kind == "near" else "distance"
            record(f"{kind}_{name}", [found[name, seed][kind] for seed in SEEDS], unit)
    for count in REPEATED:
        record(f"full_repeated_{count}", [repeated(count, seed) for seed in SEEDS], "distance")
    rows = {f"mix_{s}": f"{s} % clean, the others noisy" for s in SHARES}
    rows |= {"naive_10": "10 % clean, all taken as clean"}
    rows |= {f"clean_{n}": f"{n} clean ones alone" for n in CLEAN}
    rows |= {f"repeated_{n}": f"{n} real digits, repeated" for n in REPEATED}
    columns = {"full": "FD", "truncated": "FD, truncated", "near": "nearer to a clean one than half of real ones"}
    rows = {row: title for row, title in rows.items() if any(f"{column}_{row}" in figures for column in columns)}
    table = {"of": "digits", "rows": rows, "columns": columns}
    write_result(
        "ambient/experiment", "python -m benchmarks.ambient.experiment", figures, [*SEEDS], seconds, table, SAYS
    )


if __name__ == "__main__":
    main()
