"""Foreign patches on digits, and real tumours, found by what a denoiser does not bring back.

    python -m benchmarks.score_frameworks.anomalies     # after benchmarks.score_frameworks.brain_models

On each of 100 held-out digits a patch of 9x9 pixels, drawn at random with ink in it, is that of another digit. Maps
are smoothed alike; the autoencoder (benchmarks.score_frameworks.autoencoder) has the denoiser's size. Of tumours the
training set (benchmarks.score_frameworks.brains) has none; patient 2 is unseen, of patient 1 other slices were seen,
which favours the map.
"""

import os
import statistics
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from PIL import Image

from benchmarks.harness import RESULTS, chosen_seeds, figure, kept_by_seed, write_result
from benchmarks.score_frameworks.autoencoder import autoencoder, training_digits
from benchmarks.score_frameworks.brain_models import RUNS, SEEDS, brain_model
from diffusers_ext import AnomalyDetectionPipeline, asset_path, auroc, average_precision, best_dice
from diffusers_ext.methods.score_frameworks.pipeline_anomaly import smoothed

COUNT, PATCH, COMPONENTS = 100, 9, 24
METHODS = {
    "pca": "24 principal components",
    "autoencoder": "autoencoder of 24 numbers",
    "map": "mean of 4 reconstructions",
    "nearest": "nearest training image",
}
TUMOURS = {"intensity": "intensity", "tumour_map": "map of the difference"}
GOALS = {"map_over_pca": ">= 1.4"}  # written before the run
SAYS = {
    "map_over_pca": (
        "Foreign patches: the map's average precision is {:.2f} times that of the distance to 24 principal components."
    ),
    "map_over_autoencoder": "It is {:.2f} times that of the distance to an autoencoder of the network's size.",
    "nearest_over_map": "The nearest training image's is {:.2f} times the map's.",
    "intensity_over_map": "Real tumours: plain intensity has {:.2f} times the map's average precision.",
}


def patched(seed):
    """Returns digits `(n, 1, 28, 28)` in [0, 1] with foreign patches, and where these are."""
    file = np.load(asset_path("digits") / "digits.npz")
    draw = np.random.default_rng(seed)
    rows = draw.permutation(len(file["images"]))[:COUNT]
    images, labels = file["images"][rows].astype(np.float32) / 255, file["labels"][rows]
    truth = np.zeros(images.shape, bool)
    for i in range(COUNT):
        while True:
            j = int(draw.integers(len(file["images"])))
            y, x = draw.integers(4, 24 - PATCH, 2)
            patch = file["images"][j, y : y + PATCH, x : x + PATCH] / 255
            if file["labels"][j] != labels[i] and patch.mean() > 0.2:
                break
        images[i, y : y + PATCH, x : x + PATCH] = patch
        truth[i, y : y + PATCH, x : x + PATCH] = True
    return torch.from_numpy(images)[:, None], truth


def digits_of(seed):
    """Returns the smoothed maps of a seed by method, with truth and images."""
    images, truth = patched(seed)
    train, flat = training_digits().flatten(1), images.flatten(1)
    mean = train.mean(0)
    basis = torch.linalg.svd(train - mean, full_matrices=False).Vh[:COMPONENTS]
    other = {
        "pca": mean + (flat - mean) @ basis.T @ basis,
        "nearest": train[torch.cdist(flat, train).argmin(1)],
    }
    with torch.no_grad():
        other["autoencoder"] = autoencoder(seed)(images).flatten(1)
    maps = {name: smoothed((flat - x).abs().view_as(images), 1.0) for name, x in other.items()}
    pipeline = AnomalyDetectionPipeline.from_pretrained(asset_path("digits-epsilon"))
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    output = pipeline(
        images, strength=0.4, num_inference_steps=25, num_samples=4, generator=generator, output_type="pt"
    )
    maps["map"] = output.anomaly_map
    return images, truth, output.reconstruction, maps


def tumours_of(seed):
    """Returns where the tumours of the slices that have some are, and maps by method."""
    file = np.load(asset_path("brains") / "brains.npz")
    some = file["tumours"].any((1, 2))
    images = torch.from_numpy(file["images"][some].astype(np.float32) / 255)[:, None]
    pipeline = AnomalyDetectionPipeline.from_pretrained(brain_model(seed))
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    output = pipeline(
        images, strength=0.15, num_inference_steps=15, score="bright", generator=generator, output_type="pt"
    )
    return file["tumours"][some], {"intensity": smoothed(images, 1.0), "tumour_map": output.anomaly_map}


def scores(truth, maps):
    found = {}
    for name, values in maps.items():
        for kind, metric in (("auroc", auroc), ("ap", average_precision), ("dice", best_dice)):
            found[f"{kind}_{name}"] = metric(truth, values[:, 0])
    return found


def measure(seed):
    start = time.perf_counter()
    images, truth, reconstruction, maps = digits_of(seed)
    found = scores(truth, maps)
    found |= scores(*tumours_of(seed))
    if seed == SEEDS[0]:
        rows = [torch.cat(list(part[:8, 0]), 1) for part in (images, reconstruction, 2 * maps["map"])]
        rows.append(torch.cat(list(torch.from_numpy(truth[:8]).float()), 1))
        pixels = (torch.cat(rows).clamp(0, 1) * 255).byte().numpy()
        image = Image.fromarray(pixels)
        path = RESULTS / "score_frameworks" / "anomalies.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.resize((3 * image.width, 3 * image.height), Image.Resampling.NEAREST).save(path)
    return found | {"seconds": time.perf_counter() - start}


def main():
    chosen = chosen_seeds("Finds foreign patches and tumours.", SEEDS)
    seeds = kept_by_seed(lambda seed: RUNS / f"anomalies-{seed}.json", measure, chosen, SEEDS)
    if seeds is None:
        return

    def ratio(first, second, goal=None):
        values = [s[f"ap_{first}"] / s[f"ap_{second}"] for s in seeds]
        return figure(statistics.mean(values), "ratio", goal, statistics.stdev(values))

    figures = {
        "map_over_pca": ratio("map", "pca", GOALS["map_over_pca"]),
        "map_over_autoencoder": ratio("map", "autoencoder"),
        "nearest_over_map": ratio("nearest", "map"),
        "intensity_over_map": ratio("intensity", "tumour_map"),
    }
    for name in (key for key in seeds[0] if key != "seconds"):
        values = [s[name] for s in seeds]
        figures[name] = figure(statistics.mean(values), "", None, statistics.stdev(values))
    rows = {**METHODS, **{name: f"tumours: {title}" for name, title in TUMOURS.items()}}
    write_result(
        "score_frameworks/anomalies",
        "python -m benchmarks.score_frameworks.anomalies",
        figures,
        SEEDS,
        sum(s["seconds"] for s in seeds),
        {"of": "by pixel", "rows": rows, "columns": {"auroc": "AUROC", "ap": "AP", "dice": "best Dice"}},
        says=SAYS,
    )


if __name__ == "__main__":
    main()
