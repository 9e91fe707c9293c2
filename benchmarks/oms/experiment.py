"""Is brightness tied to the mean, and which remedy frees it? Plain sampling against three remedies on photographs.

    python -m benchmarks.oms.experiment     # under an hour on two cores

A class-conditional model of 32x32 patches of photographs is trained on Stable Diffusion's noise schedule; its classes
are four levels of brightness, each warm or cold. From it, untouched, start: fine-tuning with offset noise, fine-tuning
to v-prediction with zero terminal SNR, and a One More Step module. The module also serves a second base, trained apart
with other layers. Measured on 512 samples, classes as frequent as in the data: Wasserstein-1 distance of mean
brightness and of warmth (red minus blue) to held-out patches, Frechet distance of 8x8 thumbnails, and how far the
classes move the brightness.

Every training run resumes where it was interrupted and is not repeated when it is finished (runs/oms). The result is
benchmarks/results/oms.json with two pictures beside it.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from scipy.stats import wasserstein_distance

from benchmarks.harness import figure, write_result
from benchmarks.photographs import cut_patches
from diffusers_ext import (
    DenoisingConfig,
    DenoisingRecipe,
    OMSConfig,
    OMSPipeline,
    OMSRecipe,
    Trainer,
    frechet_distance,
)

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "runs" / "oms"
SIZE, SEEDS, COUNT, STEPS, CLASSES = 32, [0, 1, 2], 512, 25, 8
BASE = {"down_block_types": ["DownBlock2D"] * 3, "up_block_types": ["UpBlock2D"] * 3, "norm_num_groups": 8}
FIRST = {**BASE, "block_out_channels": [8, 16, 32], "layers_per_block": 1}
SECOND = {**BASE, "block_out_channels": [16, 16, 24], "layers_per_block": 1}
MODULE = {**BASE, "block_out_channels": [8, 16, 16], "layers_per_block": 1}
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
TABLE = {
    "of": "sampling",
    "rows": {
        "real_halves": "real halves",
        "plain": "plain",
        "offset_noise": "offset noise",
        "zero_snr": "zero SNR",
        "oms": "One More Step",
        "plain_second_base": "plain, second base",
        "oms_second_base": "One More Step, second base",
    },
    "columns": {
        "brightness_w1": "brightness (W1)",
        "warmth_w1": "warmth (W1)",
        "frechet_distance": "FD",
        "class_reach": "reach of the classes",
    },
}
VARIANTS = ["plain", "offset noise", "zero SNR", "OMS", "plain, second base", "OMS, second base"]


def write_data():
    """Cuts 6,000 patches for training and 1,500 for reference out of photographs that ship with packages."""
    train, held_out = RUNS / "train.npz", RUNS / "held_out.npz"
    if train.is_file() and held_out.is_file():
        return
    import skimage.data
    from sklearn.datasets import load_sample_images

    photos = [
        skimage.data.astronaut(),
        skimage.data.coffee(),
        skimage.data.chelsea(),
        skimage.data.rocket(),
        skimage.data.retina(),
        skimage.data.hubble_deep_field(),
        skimage.data.immunohistochemistry(),
        *load_sample_images().images,
    ]
    patches = cut_patches(photos, 7500, SIZE, np.random.default_rng(0))
    brightness = patches.mean((1, 2, 3))
    level = np.searchsorted(np.quantile(brightness, [0.25, 0.5, 0.75]), brightness)
    warmth = patches[..., 0].mean((1, 2)) - patches[..., 2].mean((1, 2))
    labels = (2 * level + (warmth > np.median(warmth))).astype(np.int64)
    RUNS.mkdir(parents=True, exist_ok=True)
    for path, part in ((held_out, slice(6000, None)), (train, slice(6000))):
        np.savez_compressed(path.with_suffix(".tmp.npz"), images=patches[part], labels=labels[part])
        path.with_suffix(".tmp.npz").replace(path)


def train_once(recipe, config):
    """Trains, or does nothing where the finished pipeline is there."""
    folder = Path(config.output_dir)
    if not (folder / "model_index.json").is_file():
        Trainer(config, recipe(config)).train()
    return folder


def common(folder, seed, steps):
    return {
        "train_data_dir": str(RUNS / "train.npz"),
        "output_dir": str(folder),
        "resolution": SIZE,
        "center_crop": True,
        "train_batch_size": 64,
        "max_train_steps": steps,
        "learning_rate": 1e-3,
        "ema_decay": 0.99,
        "checkpointing_steps": 200,
        "checkpoints_total_limit": 1,
        "resume_from_checkpoint": "latest",
        "num_validation_images": 16,
        "logging_steps": 50,
        "seed": seed,
    }


def config_file(name, arguments):
    path = RUNS / f"{name}.json"
    partial = RUNS / f"{name}-{os.getpid()}.tmp"
    partial.write_text(json.dumps(arguments))
    partial.replace(path)
    return str(path)


def run_seed(seed):
    torch.set_num_threads(1)
    folder = RUNS / f"seed-{seed}"
    classes = {"class_conditional": True}

    def base(name, unet):
        config = DenoisingConfig(
            **common(folder / name, seed, 1000), **SCHEDULE, **classes, unet_config=config_file(name, unet)
        )
        return train_once(DenoisingRecipe, config)

    first, second = base("first", FIRST), base("second", SECOND)
    tuned = {}
    for name, changes in {
        "offset noise": {"noise_offset": 0.1},
        "zero SNR": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    }.items():
        config = DenoisingConfig(
            **common(folder / name.replace(" ", "-"), seed, 500),
            **classes,
            **changes,
            pretrained_model_name_or_path=str(first),
        )
        tuned[name] = train_once(DenoisingRecipe, config)
    config = OMSConfig(
        **common(folder / "oms", seed, 400),
        pretrained_model_name_or_path=str(first),
        module_config=config_file("module", MODULE),
    )
    module = train_once(OMSRecipe, config)
    pipelines = {"plain": first, "plain, second base": second, **tuned}
    return {name: measure(name, pipelines, first, second, module, folder) for name in VARIANTS}


def measure(name, pipelines, first, second, module, folder):
    """Draws the samples of a variant, once, and returns its figures."""
    from diffusers import DiffusionPipeline

    path = folder / f"{name.replace(' ', '-').replace(',', '')}.npz"
    held_out = np.load(RUNS / "held_out.npz")
    if not path.is_file():
        if name.startswith("OMS"):
            base = DiffusionPipeline.from_pretrained(second if "second" in name else first)
            pipeline = OMSPipeline.from_pretrained(module, base=base)
        else:
            pipeline = DiffusionPipeline.from_pretrained(pipelines[name])
        pipeline.set_progress_bar_config(disable=True)
        labels = np.resize(held_out["labels"], COUNT)
        generator = torch.Generator().manual_seed(1234)
        images = [
            pipeline(
                class_labels=torch.tensor(part),
                num_inference_steps=STEPS,
                generator=generator,
                output_type="np",
            ).images
            for part in np.array_split(labels, 4)
        ]
        np.savez_compressed(path.with_suffix(".tmp.npz"), images=np.concatenate(images), labels=labels)
        path.with_suffix(".tmp.npz").replace(path)
    samples = np.load(path)
    return compare(samples["images"], samples["labels"], held_out["images"] / 255, held_out["labels"])


def brightness(images):
    return images.mean((1, 2, 3))


def warmth(images):
    return images[..., 0].mean((1, 2)) - images[..., 2].mean((1, 2))


def thumbnails(images):
    pixels = torch.tensor(images).permute(0, 3, 1, 2).float()
    return torch.nn.functional.avg_pool2d(pixels, SIZE // 8).flatten(1)


def compare(images, labels, real, real_labels):
    """Figures of samples against real images, both `(n, height, width, 3)` in [0, 1]."""
    light, real_light = brightness(images), brightness(real)
    reach, real_reach = (
        b[k >= CLASSES - 2].mean() - b[k < 2].mean() for b, k in ((light, labels), (real_light, real_labels))
    )
    right = np.array([real_light[real_labels == k].mean() for k in range(CLASSES)])
    return {
        "brightness_w1": wasserstein_distance(light, real_light),
        "warmth_w1": wasserstein_distance(warmth(images), warmth(real)),
        "frechet_distance": frechet_distance(thumbnails(images), thumbnails(real)),
        "class_reach": reach / real_reach,
        "within_0.05_of_class": float((np.abs(light - right[labels]) < 0.05).mean()),
    }


def floor():
    """Figures of one half of the real images against the other: what cannot be beaten."""
    held_out = np.load(RUNS / "held_out.npz")
    images, labels = held_out["images"] / 255, held_out["labels"]
    return compare(images[:COUNT], labels[:COUNT], images[COUNT:], labels[COUNT:])


def summarise(by_seed):
    figures = {}
    keys = {name: name.replace(",", "").replace(" ", "_").lower() for name in VARIANTS}
    for measured in by_seed[0]["plain"]:
        figures[f"{measured}_real_halves"] = figure(floor()[measured], "distance" if "w1" in measured else "")
        for name in VARIANTS:
            values = [seed[name][measured] for seed in by_seed]
            figures[f"{measured}_{keys[name]}"] = figure(statistics.mean(values), "", spread=statistics.stdev(values))
    for name, plain, goals in (
        ("OMS", "plain", (">= 3", "<= 1")),
        ("OMS, second base", "plain, second base", (None, None)),
        ("offset noise", "plain", (None, None)),
        ("zero SNR", "plain", (None, None)),
    ):
        nearer = [seed[plain]["brightness_w1"] / seed[name]["brightness_w1"] for seed in by_seed]
        worse = [seed[name]["frechet_distance"] / seed[plain]["frechet_distance"] for seed in by_seed]
        for key, values, goal in (("brightness_nearer", nearer, goals[0]), ("frechet_ratio", worse, goals[1])):
            figures[f"{key}_{keys[name]}"] = figure(statistics.mean(values), "ratio", goal, statistics.stdev(values))
    return figures


def plot(path):
    """Histograms of brightness, and samples of the first seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    held_out = np.load(RUNS / "held_out.npz")
    figure_, axes = plt.subplots(2, 4, figsize=(11, 5.6), constrained_layout=True, height_ratios=(1, 2))
    for column, name in zip(axes.T, VARIANTS[:4], strict=True):
        samples = np.load(RUNS / "seed-0" / f"{name.replace(' ', '-')}.npz")
        bins = np.linspace(0, 1, 30)
        column[0].hist(brightness(held_out["images"] / 255), bins, density=True, alpha=0.4, label="photographs")
        column[0].hist(brightness(samples["images"]), bins, density=True, histtype="step", label="samples")
        column[0].set(title=name, xlabel="mean brightness", yticks=[])
        rows = [samples["images"][samples["labels"] == k][:6] for k in range(CLASSES)]
        column[1].imshow(np.concatenate([np.concatenate(list(row), 1) for row in rows]))
        column[1].axis("off")
    axes[0, 0].legend(fontsize=7)
    axes[1, 0].set_title("one row a class, dark to bright", fontsize=8)
    figure_.savefig(path, dpi=80)


# What each figure says, for docs/results.md: names as patterns, values for the braces.
SAYS = {
    "brightness_nearer_oms": (
        "With One More Step, the distribution of brightness is {} times nearer to that of photographs than without."
    ),
    "frechet_ratio_oms": "Its Frechet distance is {} times that of plain sampling.",
    "brightness_nearer_oms_second_base": (
        "The same module in front of a base that it was not trained for: {} times nearer."
    ),
    "brightness_nearer_offset_noise": "A base trained with offset noise instead: {} times nearer.",
    "brightness_nearer_zero_snr": "A base trained with zero terminal SNR instead: {} times nearer.",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    write_data()
    start, by_seed = time.perf_counter(), {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, mp_context=context, max_tasks_per_child=1) as pool:
        futures = {pool.submit(run_seed, seed): seed for seed in SEEDS}
        for future in as_completed(futures):
            by_seed[futures[future]] = future.result()
            print(f"seed {futures[future]} done after {time.perf_counter() - start:.0f} s", flush=True)
    plot(ROOT / "benchmarks" / "results" / "oms" / "experiment.png")
    results = [by_seed[seed] for seed in SEEDS]
    write_result(
        "oms/experiment",
        "python -m benchmarks.oms.experiment",
        summarise(results),
        SEEDS,
        time.perf_counter() - start,
        TABLE,
        says=SAYS,
    )


if __name__ == "__main__":
    main()
