"""Does DomainStudio adapt to ten images without collapsing onto them? From MNIST's digits to those of another scanner.

    python -m benchmarks.domain_studio.experiment     # 45 minutes on one core, after benchmarks.small_models

The source is a DDPM of MNIST digits at 16x16. The target domain is the UCI digits that ship with scikit-learn, thick
and large ones from other writers and another scanner; each seed draws ten of them. Plain fine-tuning, DomainStudio,
DomainStudio without one of its terms, and with the authors' weights, start alike and see the same batches. After 150,
300 and 600 updates, on 400 samples: Frechet distance to 900 held-out target digits in the features of a classifier of
them, mean distance of samples with the same nearest training image (intra-cluster), and mean distance to the nearest
training image. The weights were chosen on the first seed.

Training resumes where it was interrupted, and what is finished is not done again (runs/domain_studio). The result is
benchmarks/results/domain_studio.json with a picture beside it.
"""

import json
import statistics
import time

import numpy as np
import torch
from diffusers import DDIMScheduler
from PIL import Image
from sklearn.datasets import load_digits

from benchmarks import small_models
from benchmarks.harness import figure, spread, write_result
from benchmarks.small_models import ROOT, SEEDS, SIZE
from diffusers_ext import (
    DomainStudioConfig,
    DomainStudioRecipe,
    ImageGenerationPipeline,
    extract_features,
    frechet_distance,
    intra_cluster_distance,
)

RUNS = ROOT / "runs" / "domain_studio"
STEPS, COUNT, SAMPLING = [150, 300, 600], 400, 20
# Where noise rules, the source's guess of the clean image is noise too: pairs are compared up to t = 400 only.
CHOSEN = {"pair_weight": 4.0, "hf_pair_weight": 20.0, "hf_mse_weight": 1.0, "max_pair_timestep": 400}
VARIANTS = {
    "plain": {"pair_weight": 0.0, "hf_pair_weight": 0.0, "hf_mse_weight": 0.0},
    "DomainStudio": CHOSEN,
    "without pairs": {**CHOSEN, "pair_weight": 0.0},
    "without hf pairs": {**CHOSEN, "hf_pair_weight": 0.0},
    "without hf mse": {**CHOSEN, "hf_mse_weight": 0.0},
    "authors' weights": {},
}
FIGURES = {
    "frechet_distance": "FD",
    "intra_cluster": "intra-cluster",
    "to_nearest": "to the nearest training image",
    "intra_cluster_pixels": "intra-cluster, pixels",
}


def write_data():
    """Writes the target domain: train.npz for the classifier, held_out.npz to judge by, and ten images a seed."""
    if (RUNS / "held_out.npz").is_file():
        return
    digits = load_digits()
    pixels = (digits.images * 255 / 16).round().astype(np.uint8)
    resized = [np.asarray(Image.fromarray(p).resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for p in pixels]
    order = np.random.default_rng(0).permutation(len(resized))
    images, labels = np.stack(resized)[order], digits.target[order]
    RUNS.mkdir(parents=True, exist_ok=True)
    for seed in SEEDS:
        ten = np.random.default_rng(seed + 1).permutation(897)[:10]
        np.savez_compressed(RUNS / f"ten-{seed}.npz", images=images[:897][ten])
    for name, rows in (("train", slice(897)), ("held_out", slice(897, None))):
        np.savez_compressed(RUNS / f"{name}.tmp.npz", images=images[rows], labels=labels[rows])
        (RUNS / f"{name}.tmp.npz").replace(RUNS / f"{name}.npz")


def adapted(seed, variant, steps):
    """Returns `(count, 1, height, width)` samples in [-1, 1] after a number of updates, drawn once."""
    folder = RUNS / f"seed-{seed}" / key(variant)
    path = folder / f"samples-{steps}.npz"
    if not path.is_file():
        config = DomainStudioConfig(
            **VARIANTS[variant],
            pretrained_model_name_or_path=str(small_models.base("digits", seed)),
            train_data_dir=str(RUNS / f"ten-{seed}.npz"),
            output_dir=str(folder),
            resolution=SIZE,
            channels=1,
            train_batch_size=10,
            max_train_steps=steps,
            learning_rate=5e-4,
            ema_decay=0.95,
            checkpointing_steps=150,
            checkpoints_total_limit=1,
            resume_from_checkpoint="latest",
            logging_steps=50,
            num_validation_images=0,
            seed=seed,
        )
        small_models.train(DomainStudioRecipe, config)
        images = draw(folder)
        np.savez_compressed(path.with_suffix(".tmp.npz"), images=images)
        path.with_suffix(".tmp.npz").replace(path)
    with np.load(path) as file:
        return torch.tensor(file["images"]).permute(0, 3, 1, 2) * 2 - 1


def draw(folder):
    pipeline = ImageGenerationPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    # Without clipping, so small a model lets some images blow up.
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=True)
    noise = torch.randn(COUNT, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(1234))
    call = {"num_inference_steps": SAMPLING, "output_type": "np"}
    return np.concatenate([pipeline(latents=part, **call).images for part in noise.split(100)])


def compare(images, ten, held_out, features):
    a, b, c = (extract_features(part, features) for part in (images, ten, held_out))
    return {
        "frechet_distance": frechet_distance(a, c),
        "intra_cluster": intra_cluster_distance(a, b),
        "to_nearest": torch.cdist(a, b).min(1).values.mean().item(),
        "intra_cluster_pixels": intra_cluster_distance(images.flatten(1), ten.flatten(1)),
    }


def measure(seed):
    """Returns the figures of a seed by variant and updates."""
    path = RUNS / f"seed-{seed}" / "measured.json"
    if not path.is_file():
        features = small_models.classifier("uci", "held_out", RUNS).features
        held_out, _ = small_models.tensors(RUNS / "held_out.npz")
        ten = torch.tensor(np.load(RUNS / f"ten-{seed}.npz")["images"])[:, None].float() / 127.5 - 1
        source = torch.tensor(draw(small_models.base("digits", seed))).permute(0, 3, 1, 2) * 2 - 1
        found = {"source": compare(source, ten, held_out, features)}
        found["real"] = compare(held_out[:COUNT], ten, held_out[COUNT:], features)
        for variant in VARIANTS:
            for steps in STEPS:
                images = adapted(seed, variant, steps)
                found[f"{variant} {steps}"] = compare(images, ten, held_out, features)
        path.write_text(json.dumps(found))
    return json.loads(path.read_text())


def key(text):
    return text.replace(" ", "_").replace("'", "").lower()


def lowest(measured, variant):
    return min(measured[f"{variant} {steps}"]["frechet_distance"] for steps in STEPS)


def summarise(by_seed):
    figures = {}
    for steps in STEPS:
        last = steps == STEPS[-1]
        for name, goal in (("intra_cluster", ">= 1.15"), ("frechet_distance", "<= 1"), ("to_nearest", None)):
            ratios = [m[f"DomainStudio {steps}"][name] / m[f"plain {steps}"][name] for m in by_seed]
            figures[f"domain_studio_over_plain_{name}_{steps}"] = figure(
                statistics.mean(ratios), "ratio", goal if last else None, spread(ratios)
            )
    ratios = [lowest(m, "DomainStudio") / lowest(m, "plain") for m in by_seed]
    figures["domain_studio_over_plain_frechet_distance_best_updates"] = figure(
        statistics.mean(ratios), "ratio", spread=spread(ratios)
    )
    for row in by_seed[0]:
        for name in FIGURES:
            values = [m[row][name] for m in by_seed]
            figures[f"{name}_{key(row)}"] = figure(statistics.mean(values), "", spread=spread(values))
    return figures


def plot(path):
    """The ten images, and samples of the first seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ten = np.load(RUNS / "ten-0.npz")["images"] / 255
    source = draw(small_models.base("digits", 0))[:40, :, :, 0]
    panels = {"source": source, "the ten images": ten}
    for variant in ("plain", "DomainStudio"):
        panels[f"{variant}, {STEPS[-1]} updates"] = adapted(0, variant, STEPS[-1])[:40, 0].numpy() / 2 + 0.5
    figure_, axes = plt.subplots(1, len(panels), figsize=(12, 4.2), constrained_layout=True)
    for axis, (title, images) in zip(axes, panels.items(), strict=True):
        rows = [np.concatenate(list(images[i : i + 5]), 1) for i in range(0, len(images), 5)]
        axis.imshow(np.concatenate(rows), cmap="gray")
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    figure_.savefig(path, dpi=75)


# What each figure says, for docs/results.md: names as patterns, values for the braces.
SAYS = {
    "domain_studio_over_plain_intra_cluster_600": (
        "After 600 updates on ten images, samples are {} times as diverse as after plain fine-tuning."
    ),
    "domain_studio_over_plain_frechet_distance_600": (
        "Their Frechet distance to held-out images of the target is then {} of that of plain fine-tuning."
    ),
    "domain_studio_over_plain_frechet_distance_best_updates": (
        "Each at its own best number of updates, the distance is {} of that of plain fine-tuning."
    ),
}


def main():
    torch.set_num_threads(1)
    write_data()
    start, by_seed = time.perf_counter(), []
    for seed in SEEDS:
        by_seed.append(measure(seed))
        print(f"seed {seed} done after {time.perf_counter() - start:.0f} s", flush=True)
        report(by_seed, SEEDS[: seed + 1], time.perf_counter() - start)


def report(by_seed, seeds, seconds):
    """Writes what there is after so many seeds."""
    rows = {key(row): row for row in by_seed[0]}
    rows |= {key(f"{v} {s}"): f"{v}, {s} updates" for v in VARIANTS for s in STEPS}
    rows |= {"source": "source, not adapted", "real": "real digits of the target"}
    table = {"of": "model", "rows": rows, "columns": FIGURES}
    plot(ROOT / "benchmarks" / "results" / "domain_studio" / "experiment.png")
    command = "python -m benchmarks.domain_studio.experiment"
    write_result("domain_studio/experiment", command, summarise(by_seed), seeds, seconds, table, says=SAYS)


if __name__ == "__main__":
    main()
