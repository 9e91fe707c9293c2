"""Does pairing noise with data save training steps? Plain noise against assignment, KNN and sign flip.

    python -m benchmarks.immiscible.experiment --data digits8 --objective flow        # minutes
    python -m benchmarks.immiscible.experiment --data digits28 --objective epsilon    # under an hour on two cores

Every (strategy, seed) is one training run by the engine in one single-threaded process; two run at a time. A run that
was interrupted resumes, a finished one is not repeated (delete its folder under runs/immiscible to do so). The result
is benchmarks/results/immiscible_<data>_<objective>.json and a plot beside it.
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
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.unets.unet_2d import UNet2DOutput

from diffusers_ext import Callback, ImmiscibleConfig, ImmiscibleRecipe, Trainer, frechet_distance

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = {
    "gaussian": {"noise": "gaussian"},
    "assignment": {"noise": "assignment"},
    "knn4": {"noise": "knn", "k": 4},
    "signflip": {"noise": "signflip"},
}
SETTINGS = {
    # steps, evaluate every, batch size, learning rate, images per evaluation
    "digits8": {"steps": 2400, "every": 200, "batch": 256, "lr": 1e-3, "images": 5000, "size": 8},
    "digits28": {"steps": 800, "every": 100, "batch": 64, "lr": 1e-3, "images": 1000, "size": 28},
}
NFES = {"flow": [2, 4, 8, 32], "epsilon": [5, 10, 20, 50]}
TRACKED = {"flow": 4, "epsilon": 5}  # the number of function evaluations followed over training
SEEDS = [0, 1, 2]


class ResidualMLP(ModelMixin, ConfigMixin):
    """A residual MLP of about 0.22 M weights on flattened 8x8 images, called like a UNet."""

    @register_to_config
    def __init__(self, sample_size=8, in_channels=1, width=176, depth=3, block_out_channels=(176,)):
        super().__init__()
        pixels = in_channels * sample_size**2
        self.enter = torch.nn.Linear(pixels + 64, width)
        self.blocks = torch.nn.ModuleList(
            torch.nn.Sequential(
                torch.nn.LayerNorm(width),
                torch.nn.Linear(width, width),
                torch.nn.SiLU(),
                torch.nn.Linear(width, width),
            )
            for _ in range(depth)
        )
        self.leave = torch.nn.Linear(width, pixels)

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        timestep = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        hidden = self.enter(torch.cat([sample.flatten(1), get_timestep_embedding(timestep, 64)], dim=1))
        for block in self.blocks:
            hidden = hidden + block(hidden)
        out = self.leave(hidden).view_as(sample)
        return UNet2DOutput(out) if return_dict else (out,)


class MLPRecipe(ImmiscibleRecipe):
    def _new_unet(self, vae):
        self.null_class_label = None
        return ResidualMLP()


class Evaluate(Callback):
    """Frechet distance of samples to the reference, at one NFE during training and at all of them at the end."""

    def __init__(self, data, objective, reference, features, path):
        self.settings, self.reference, self.features, self.path = SETTINGS[data], reference, features, path
        self.tracked, self.nfes = TRACKED[objective], NFES[objective]
        self.curve = json.loads(path.read_text()) if path.is_file() else {}

    def on_step_end(self, trainer):
        if trainer.step % self.settings["every"]:
            return
        start = time.perf_counter()
        last = trainer.step == trainer.total_steps
        with trainer.exported_pipeline() as pipeline:
            pipeline.set_progress_bar_config(disable=True)
            self.curve[str(trainer.step)] = {
                str(nfe): self.distance(pipeline, nfe) for nfe in (self.nfes if last else [self.tracked])
            }
        partial = self.path.with_suffix(".tmp")
        partial.write_text(json.dumps(self.curve))
        partial.replace(self.path)
        trainer.pause(time.perf_counter() - start)

    def distance(self, pipeline, nfe):
        generator = torch.Generator().manual_seed(1234)
        features, left = [], self.settings["images"]
        while left:
            n = min(left, 250)
            images = pipeline(n, num_inference_steps=nfe, generator=generator, output_type="pt").images
            features.append(self.features(images * 2 - 1))
            left -= n
        return frechet_distance(torch.cat(features), self.reference)


def training_file(data):
    return ROOT / "runs" / "data" / ("digits8.npz" if data == "digits8" else "digits4k.npz")


def write_data(data):
    """Writes the training images where they are missing; every worker reads the file."""
    path = training_file(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        return
    if data == "digits8":
        from sklearn.datasets import load_digits

        digits = load_digits()
        np.savez(path, images=(digits.images / 16).astype(np.float32), labels=digits.target)
    else:
        raise SystemExit(f"{path} is missing; make it with: python -m diffusers_ext.data.make_digits")


def reference_features(data, path):
    """Returns the reference's features, the feature function, and the distance between two halves of real images."""
    from diffusers_ext import load_images

    if data == "digits8":
        source = load_images(train_data_dir=str(path), resolution=8, channels=1)
        return _stack(source).flatten(1), lambda images: images.flatten(1)
    from diffusers_ext import ImageClassifierFeatures
    from diffusers_ext.data.digits import CLASSIFIER, DIGITS

    classifier = ImageClassifierFeatures.from_pretrained(CLASSIFIER).eval()
    source = load_images(train_data_dir=str(DIGITS), resolution=28, channels=1)
    with torch.no_grad():
        return classifier.features(_stack(source)), torch.no_grad()(classifier.features)


def _stack(source):
    return torch.stack([source[i]["pixel_values"] for i in range(len(source))])


def train_one(data, objective, variant, seed):
    torch.set_num_threads(1)
    settings = SETTINGS[data]
    file = training_file(data)
    folder = ROOT / "runs" / "immiscible" / f"{data}-{objective}" / f"{variant}-{seed}"
    curve = folder / "curve.json"
    folder.mkdir(parents=True, exist_ok=True)
    if curve.is_file() and str(settings["steps"]) in json.loads(curve.read_text()):
        return json.loads(curve.read_text())
    reference, features = reference_features(data, file)
    config = ImmiscibleConfig(
        train_data_dir=str(file),
        output_dir=str(folder),
        resolution=settings["size"],
        channels=1,
        unet_config=str(ROOT / "training" / "configs" / "unet_28.json"),
        prediction_type=objective,
        train_batch_size=settings["batch"],
        max_train_steps=settings["steps"],
        learning_rate=settings["lr"],
        lr_warmup_steps=0,
        ema_decay=0.999 if data == "digits8" else 0.995,
        checkpointing_steps=settings["every"],
        checkpoints_total_limit=1,
        resume_from_checkpoint="latest",
        num_validation_images=0,
        logging_steps=100,
        seed=seed,
        **VARIANTS[variant],
    )
    recipe = (MLPRecipe if data == "digits8" else ImmiscibleRecipe)(config)
    evaluate = Evaluate(data, objective, reference, features, curve)
    Trainer(config, recipe, [evaluate]).train()
    return evaluate.curve


def steps_to_keep(curve, nfe, target):
    """First evaluated step from which on the distance stays at or below `target`, or None.

    Staying counts, because a net that has hardly learned can pass a few-step distance for a moment.
    """
    kept = None
    for step in sorted(curve, key=int, reverse=True):
        if curve[step][nfe] > target:
            break
        kept = int(step)
    return kept


def summarise(curves, data, objective):
    """Figures over seeds: final distances, and steps to reach and keep plain noise's final one, seed by seed."""
    steps, nfe = str(SETTINGS[data]["steps"]), str(TRACKED[objective])
    goals = {}
    if (data, objective) == ("digits8", "flow"):
        goals = {f"fd_ratio_nfe{nfe}_assignment": "<= 0.6", "speedup_assignment": ">= 4"}
    figures = {}

    def add(name, values, unit):
        figures[name] = {
            "value": round(statistics.mean(values), 4),
            "spread": round(statistics.stdev(values), 4) if len(values) > 1 else 0.0,
            "unit": unit,
        }
        if name in goals:
            figures[name]["goal"] = goals[name]

    for variant, by_seed in curves.items():
        for n in by_seed[0][steps]:
            add(f"fd_nfe{n}_{variant}", [curve[steps][n] for curve in by_seed], "Frechet distance")
        if variant == "gaussian":
            plain = [curve[steps][nfe] for curve in by_seed]
            first = [min(int(s) for s in curve if curve[s][nfe] <= p) for curve, p in zip(by_seed, plain, strict=True)]
            add("first_step_at_or_below_final_gaussian", first, "steps")
            continue
        add(f"fd_ratio_nfe{nfe}_{variant}", [c[steps][nfe] / p for c, p in zip(by_seed, plain, strict=True)], "ratio")
        reached = [steps_to_keep(curve, nfe, p) for curve, p in zip(by_seed, plain, strict=True)]
        # A seed that never gets there counts as no gain at all: the ratio of the whole run to infinity.
        add(f"speedup_{variant}", [int(steps) / r if r else 0.0 for r in reached], "times fewer steps")
    return figures


def plot(curves, data, objective, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    nfe = str(TRACKED[objective])
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
    for variant, by_seed in curves.items():
        steps = sorted(by_seed[0], key=int)
        values = np.array([[curve[s][nfe] for s in steps] for curve in by_seed])
        x = [int(s) for s in steps]
        axes[0].plot(x, values.mean(0), label=variant)
        axes[0].fill_between(x, values.min(0), values.max(0), alpha=0.2)
        final = np.array([[curve[steps[-1]][str(n)] for n in NFES[objective]] for curve in by_seed])
        axes[1].errorbar(NFES[objective], final.mean(0), final.std(0), label=variant, marker="o", capsize=2)
    axes[0].set(xlabel="training steps", ylabel="Frechet distance", title=f"{nfe} sampling steps", yscale="log")
    axes[1].set(xlabel="sampling steps", title="after training", xscale="log", yscale="log")
    axes[1].set_xticks(NFES[objective], NFES[objective])
    axes[1].minorticks_off()
    axes[0].legend()
    figure.suptitle(f"{data}, {objective}: mean of {len(by_seed)} seeds, band min to max")
    figure.savefig(path, dpi=90)


# What each figure says, for docs/results.md: names as patterns, values for the braces.
SAYS = {
    r"fd_ratio_nfe(\d+)_assignment": (
        r"Sampled in \1 steps, a model trained with `assignment` noise has {} times the Frechet distance of one "
        "trained with plain noise."
    ),
    r"fd_ratio_nfe(\d+)_knn4": (
        r"Sampled in \1 steps, a model trained with `knn` noise (k = 4) has {} times the Frechet distance of one "
        "trained with plain noise."
    ),
    r"fd_ratio_nfe(\d+)_signflip": (
        r"Sampled in \1 steps, a model trained with `signflip` noise has {} times the Frechet distance of one "
        "trained with plain noise."
    ),
    "speedup_assignment": (
        "With `assignment` noise, training reaches plain noise's final distance in {} times fewer steps, and "
        "stays there."
    ),
}


def main():
    from benchmarks.harness import write_result

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=sorted(SETTINGS), required=True)
    parser.add_argument("--objective", choices=sorted(NFES), required=True)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    write_data(args.data)
    start = time.perf_counter()
    curves = {variant: [None] * len(SEEDS) for variant in VARIANTS}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, mp_context=context, max_tasks_per_child=1) as pool:
        futures = {
            pool.submit(train_one, args.data, args.objective, variant, seed): (variant, seed)
            for seed in SEEDS
            for variant in VARIANTS
        }
        for done, future in enumerate(as_completed(futures), 1):
            variant, seed = futures[future]
            curves[variant][seed] = future.result()
            seconds = time.perf_counter() - start
            print(f"[{done}/{len(futures)}] {variant} seed {seed}, {seconds:.0f} s", flush=True)
    name = f"immiscible/{args.data}_{args.objective}"
    plot(curves, args.data, args.objective, ROOT / "benchmarks" / "results" / f"{name}.png")
    write_result(
        name,
        command=f"python -m benchmarks.immiscible.experiment --data {args.data} --objective {args.objective}",
        figures=summarise(curves, args.data, args.objective),
        seeds=SEEDS,
        seconds=time.perf_counter() - start,
        says=SAYS,
    )


if __name__ == "__main__":
    main()
