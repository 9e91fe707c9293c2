"""Denoising two photographs with a network that saw no clean image, against those that did and classical methods.

    python -m benchmarks.noise2score.experiment     # an hour on one core

The left parts of the two photographs of scikit-learn, grey, get one noisy copy each, of which the network learns the
score; the right parts are denoised. The same small network learns from two noisy copies (Noise2Noise) and from the
clean photographs (supervised). BM3D (where its package is installed), non-local means and total variation know the
noise; for Poisson and Gamma noise they work on the Anscombe transform and on the logarithm. Values are cut to [0, 1]
before PSNR and SSIM are taken, those of the noisy images too.

Every training and every comparison is kept in runs/noise2score, so that a stopped run goes on; `--levels` makes a part
of it, and the result is written once all is there.
"""

import argparse
import contextlib
import json
import math
import os
import statistics
import time
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from PIL import Image
from scipy.special import digamma, polygamma
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from skimage.restoration import denoise_nl_means, denoise_tv_chambolle

from benchmarks.harness import RESULTS, figure, kept, write_result
from benchmarks.noise2score.photos import LEVELS, PHOTOS, photographs, seeded, train
from diffusers_ext import (
    AdditiveGaussianNoise,
    GammaNoise,
    Noise2ScoreConvNet,
    PoissonNoise,
    estimate_noise_parameter,
    posterior_mean,
)

RUNS = RESULTS.parents[1] / "runs" / "noise2score"
SEEDS = [0, 1, 2]
# Where a blind search looks: the authors' ranges.
BLIND = {"gaussian": (6 / 255, 55 / 255), "poisson": (0.005, 0.1), "gamma": (40.5, 120.0)}
METHODS = {
    "noisy": "noisy input",
    "tv": "total variation",
    "nlm": "non-local means",
    "bm3d": "BM3D",
    "supervised": "supervised",
    "noise2noise": "Noise2Noise",
    "noise2score": "Noise2Score",
    "noise2score_mode": "Noise2Score, mode",
    "noise2score_blind": "Noise2Score, blind",
}
TITLES = {
    "gaussian_25": "Gaussian 25",
    "gaussian_50": "Gaussian 50",
    "poisson_0.01": "Poisson .01",
    "poisson_0.05": "Poisson .05",
    "gamma_100": "Gamma 100",
    "gamma_50": "Gamma 50",
}
# Written before the first run. The paper is within 0.1 dB of Noise2Noise for Poisson noise; a small network of one
# noisy copy of two photographs is not expected to be.
GOALS = {
    "behind_noise2noise_gaussian_25": "<= 0.5",
    "behind_noise2noise_gamma_100": "<= 0.5",
    "behind_noise2noise_poisson_0.01": "<= 1.5",
    "blind_costs_gaussian_25": "<= 0.4",
    "blind_costs_gaussian_50": "<= 0.4",
}
SAYS = {
    "behind_noise2noise_gaussian_25": (
        "Gaussian noise of 25/255: lead of Noise2Noise, which had two noisy copies, over Noise2Score, which had one: "
        "{:.2f} dB."
    ),
    "behind_noise2noise_gamma_100": "Gamma noise of shape 100: Noise2Noise leads by {:.2f} dB.",
    "behind_noise2noise_poisson_0.01": (
        "Poisson noise of scale 0.01: Noise2Noise leads by {:.2f} dB; in the paper, with a large network, by 0.1 dB."
    ),
    "behind_noise2noise_gaussian_50": "Gaussian noise of 50/255: Noise2Noise leads by {:.2f} dB.",
    "behind_noise2noise_gamma_50": "Gamma noise of shape 50: Noise2Noise leads by {:.2f} dB.",
    "behind_noise2noise_poisson_0.05": "Poisson noise of scale 0.05: Noise2Noise leads by {:.2f} dB.",
    "blind_costs_gaussian_(25|50)": r"Not to know the level of Gaussian noise, \1/255, costs {:.2f} dB.",
    "blind_costs_gamma_(100|50)": r"Not to know the shape of Gamma noise, \1, costs {:.2f} dB.",
    "blind_costs_poisson_(0.01|0.05)": r"Not to know the scale of Poisson noise, \1, costs {:.2f} dB.",
}


def network(method, level, seed, clean):
    """Returns a trained network, trained once."""
    folder = RUNS / f"{level}-{seed}" / method
    if not (folder / "config.json").is_file():
        start = time.perf_counter()
        partial = folder.with_name(f"{method}.tmp")
        train(method, LEVELS[level], clean, seed).save_pretrained(partial)
        partial.rename(folder)
        print(f"{level}, seed {seed}, {method}: {time.perf_counter() - start:.0f} s", flush=True)
    return Noise2ScoreConvNet.from_pretrained(folder).eval()


def stabilised(noise, y):
    """Brings noisy values to noise of one deviation; returns them, the deviation, and the way back."""
    if isinstance(noise, AdditiveGaussianNoise):
        return y, noise.sigma, lambda x: x
    if isinstance(noise, PoissonNoise):  # Anscombe, and its inverse without bias for many counts
        z = noise.scale
        return 2 * np.sqrt(y / z + 3 / 8), 1.0, lambda x: z * ((np.maximum(x, 0) / 2) ** 2 - 1 / 8)
    bias, std = digamma(noise.shape) - math.log(noise.shape), math.sqrt(polygamma(1, noise.shape))
    return np.log(np.maximum(y, 1e-3)) - bias, std, np.exp


def bm3d(image, std):
    import bm3d as package

    return package.bm3d(image, std)


def classical(noise, y):
    """Returns one noisy image `(height, width)` denoised by methods that learn nothing."""
    values, std, back = stabilised(noise, y.astype(np.float64))
    found = {
        "tv": denoise_tv_chambolle(values, weight=std),
        "nlm": denoise_nl_means(values, patch_size=5, patch_distance=6, h=0.6 * std, sigma=std, fast_mode=True),
    }
    low, high = values.min(), values.max()  # BM3D wants values of about [0, 1]
    with contextlib.suppress(ImportError):
        found["bm3d"] = low + (high - low) * bm3d((values - low) / (high - low), std / (high - low))
    return {name: back(image) for name, image in found.items()}


@torch.no_grad()
def denoised(level, seed, clean, y):
    """Returns the images of the networks, `(n, 1, height, width)`, by method."""
    noise, found = LEVELS[level], {"noisy": y}
    for method in ("supervised", "noise2noise"):
        found[method] = y + network(method, level, seed, clean)(y).sample
    net = network("noise2score", level, seed, clean)
    smoothing = net.config.smoothing

    def score(v):
        return net(v).sample

    found["noise2score"] = posterior_mean(y, score, noise, smoothing)
    if isinstance(noise, PoissonNoise):
        found["noise2score_mode"] = posterior_mean(y, score, PoissonNoise(noise.scale, "mode"), smoothing)
    return found


@torch.no_grad()
def denoised_blindly(level, seed, clean, y):
    """Returns the images of Noise2Score without the parameter, and the parameters that it found."""
    net, family = network("noise2score", level, seed, clean), level.split("_")[0]
    smoothing = net.config.smoothing

    def score(v):
        return net(v).sample

    kind = {"gaussian": AdditiveGaussianNoise, "poisson": PoissonNoise, "gamma": GammaNoise}[family]
    parameters, blind = [], []
    for image in y:
        estimate = estimate_noise_parameter(image[None], score, family, BLIND[family], smoothing)
        parameters.append(estimate.parameter)
        blind.append(posterior_mean(image[None], score, kind(estimate.parameter), smoothing))
    return torch.cat(blind), parameters


def compare(level, seed):
    """Returns PSNR and SSIM of every method and photograph at one level, with one seed."""
    start = time.perf_counter()
    clean, test = photographs()
    y = LEVELS[level].corrupt(test, seeded(seed, 4))
    images = denoised(level, seed, clean, y)
    images["noise2score_blind"], parameters = denoised_blindly(level, seed, clean, y)
    rows = [classical(LEVELS[level], image[0].numpy()) for image in y]
    images |= {name: torch.from_numpy(np.stack([row[name] for row in rows]))[:, None] for name in rows[0]}
    measured = {f"blind_parameter_{photo}": p for photo, p in zip(PHOTOS, parameters, strict=True)}
    for name, batch in images.items():
        for photo, truth, image in zip(PHOTOS, test, batch, strict=True):
            x, t = image[0].double().clamp(0, 1).numpy(), truth[0].double().numpy()
            measured[f"psnr_{photo}_{name}"] = float(peak_signal_noise_ratio(t, x, data_range=1))
            measured[f"ssim_{photo}_{name}"] = float(structural_similarity(t, x, data_range=1))
    return measured | {"seconds": time.perf_counter() - start}


def of_seeds(values, unit, goal=None):
    return figure(statistics.mean(values), unit, goal, statistics.stdev(values))


def summarise(results):
    """Returns the figures of all levels; `results` are lists over seeds by level."""
    figures, psnr = {}, {}
    for level, seeds in results.items():
        for name in METHODS:
            if f"psnr_{PHOTOS[0]}_{name}" in seeds[0]:
                psnr[level, name] = [statistics.mean(s[f"psnr_{photo}_{name}"] for photo in PHOTOS) for s in seeds]

    def loss(level, first, second):
        return [a - b for a, b in zip(psnr[level, first], psnr[level, second], strict=True)]

    for level in results:
        for key, first, second in (
            (f"behind_noise2noise_{level}", "noise2noise", "noise2score"),
            (f"behind_supervised_{level}", "supervised", "noise2score"),
            (f"blind_costs_{level}", "noise2score", "noise2score_blind"),
        ):
            figures[key] = of_seeds(loss(level, first, second), "dB", GOALS.get(key))
    for (level, name), values in psnr.items():
        figures[f"{level}_{name}"] = of_seeds(values, "dB")
    for level, seeds in results.items():
        for key in (key for key in seeds[0] if key != "seconds"):
            figures[f"{level}_{key}"] = of_seeds([s[key] for s in seeds], "dB" if key.startswith("psnr") else "")
    return figures


def plot(path):
    """A crop of the first photograph at three levels: clean, noisy, supervised, Noise2Noise, Noise2Score."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    clean, test = photographs()
    shown = {"noisy": "noisy", **{k: METHODS[k] for k in ("supervised", "noise2noise", "noise2score")}}
    levels = ["gaussian_25", "poisson_0.01", "gamma_50"]
    figure_, axes = plt.subplots(3, 5, figsize=(9.5, 5.6), constrained_layout=True)
    for i, (row, level) in enumerate(zip(axes, levels, strict=True)):
        y = LEVELS[level].corrupt(test, seeded(0, 4))
        images = {"clean": test} | denoised(level, 0, clean, y)
        for axis, name in zip(row, ["clean", *shown], strict=True):
            crop = images[name][0, 0, 100:228, 60:200].clamp(0, 1)
            axis.imshow(crop, cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[], title="" if i else shown.get(name, "clean"))
        row[0].set_ylabel(TITLES[level])
    figure_.savefig(path, dpi=75)
    Image.open(path).convert("L").quantize(32).save(path, optimize=True)  # noise takes much room otherwise


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", nargs="*", choices=list(LEVELS), default=list(LEVELS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".* values are 0")  # some pixels of the photographs are
    start = time.perf_counter()
    for seed in SEEDS:
        for level in args.levels:
            kept(RUNS / f"{level}-{seed}.json", lambda level=level, seed=seed: compare(level, seed))
            print(f"{level}, seed {seed} done after {time.perf_counter() - start:.0f} s", flush=True)
    if any(not (RUNS / f"{level}-{seed}.json").is_file() for level in LEVELS for seed in SEEDS):
        print("the result is written once all levels are there")
        return
    results = {level: [json.loads((RUNS / f"{level}-{seed}.json").read_text()) for seed in SEEDS] for level in LEVELS}
    figures = summarise(results)
    rows = {k: v for k, v in METHODS.items() if f"gaussian_25_{k}" in figures or f"poisson_0.01_{k}" in figures}
    write_result(
        "noise2score/experiment",
        "python -m benchmarks.noise2score.experiment",
        figures,
        SEEDS,
        sum(seed["seconds"] for seeds in results.values() for seed in seeds),
        {"of": "PSNR in dB, mean of the two photographs", "rows": rows, "columns": TITLES},
        says=SAYS,
    )
    plot(RESULTS / "noise2score" / "experiment.png")


if __name__ == "__main__":
    main()
