"""Does tuning through the sampler with MMD-DDM make few steps good? Digits and photographs of 16x16 pixels.

    python -m benchmarks.mmd_ddm.experiment     # an hour on one core, after benchmarks/small_models.py

A DDPM of each is tuned for 5 and, apart, for 10 steps of DDIM, on the cubic kernel of pixels joined with the features
of a classifier. Compared with the untuned model on the same grid ("leading", which is DDIM's better one here) from the
same noise, and also with the untuned model where DDIM clips its estimates of the image. Measured on 400 samples
against held-out images: Frechet distance in the features tuned on, in those of another classifier that nothing was
tuned on, and in pixels.

Training resumes where it was interrupted, and what is finished is not done again (runs/mmd_ddm). The result is
benchmarks/results/mmd_ddm.json with a picture beside it.
"""

import json
import statistics
import time

import numpy as np
import torch
from diffusers import DDIMScheduler

from benchmarks import small_models
from benchmarks.harness import figure, spread, write_result
from benchmarks.small_models import CHANNELS, ROOT, SEEDS, SIZE
from diffusers_ext import (
    ImageGenerationPipeline,
    MMDDDMConfig,
    MMDDDMRecipe,
    extract_features,
    frechet_distance,
)

RUNS = ROOT / "runs" / "mmd_ddm"
UPDATES = 120
CURVE, COUNT = [3, 5, 10, 20, 50], 400
MODELS = ["untuned", "untuned clipped", "tuned for 5", "tuned for 10"]
SPACES = {"fd_tuning": "FD, tuned on", "fd_held_out": "FD, held out", "fd_pixels": "FD, pixels"}


def tuned(name, seed, steps):
    """Returns the folder of a model tuned for a number of steps."""
    folder = RUNS / name / f"seed-{seed}" / f"steps-{steps}"
    config = MMDDDMConfig(
        pretrained_model_name_or_path=str(small_models.base(name, seed)),
        train_data_dir=str(small_models.RUNS / name / "train.npz"),
        output_dir=str(folder),
        resolution=SIZE,
        channels=CHANNELS[name],
        num_inference_steps=steps,
        features=f"pixels,classifier:{small_models.RUNS / name / 'classifier-tuning'}",
        train_batch_size=64,
        chain_checkpointing="none",
        max_train_steps=UPDATES,
        learning_rate=5e-5,
        ema_decay=0.98,
        checkpointing_steps=20,
        checkpoints_total_limit=1,
        resume_from_checkpoint="latest",
        logging_steps=5,
        seed=seed,
    )
    if not (folder / "model_index.json").is_file():
        small_models.train(MMDDDMRecipe, config)
    return folder


def samples(name, seed, model):
    """Returns, by number of steps, `(count, channels, height, width)` samples of a model in [-1, 1], drawn once."""
    path = RUNS / name / f"seed-{seed}" / f"{model.replace(' ', '-')}.npz"
    if not path.is_file():
        untuned = model.startswith("untuned")
        folder = small_models.base(name, seed) if untuned else tuned(name, seed, int(model.split()[-1]))
        pipeline = ImageGenerationPipeline.from_pretrained(folder)
        pipeline.register_to_config(tuned_timesteps=None)  # others are on purpose here
        pipeline.scheduler = DDIMScheduler.from_config(
            pipeline.scheduler.config, timestep_spacing="leading", clip_sample=model == "untuned clipped"
        )
        pipeline.set_progress_bar_config(disable=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = torch.randn(COUNT, CHANNELS[name], SIZE, SIZE, generator=torch.Generator().manual_seed(1234))
        drawn = {
            f"steps_{steps}": np.concatenate(
                [
                    pipeline(latents=part, num_inference_steps=steps, output_type="np").images
                    for part in noise.split(100)
                ]
            )
            for steps in CURVE
        }
        np.savez_compressed(path.with_suffix(".tmp.npz"), **drawn)
        path.with_suffix(".tmp.npz").replace(path)
    with np.load(path) as file:
        return {steps: torch.tensor(file[f"steps_{steps}"]).permute(0, 3, 1, 2) * 2 - 1 for steps in CURVE}


def spaces(name):
    """Returns the functions that images are measured with."""
    return {
        "fd_tuning": small_models.classifier(name, "tuning").features,
        "fd_held_out": small_models.classifier(name, "held_out").features,
        "fd_pixels": lambda images: images.flatten(1),
    }


def measure(name, seed):
    """Returns the distances of one seed's models, by model, steps and space."""
    path = RUNS / name / f"seed-{seed}" / "measured.json"
    if not path.is_file():
        held_out, _ = small_models.tensors(small_models.RUNS / name / "held_out.npz")
        found = {}
        for space, features in spaces(name).items():
            real = extract_features(held_out, features)
            for model in MODELS:
                for steps, images in samples(name, seed, model).items():
                    distance = frechet_distance(extract_features(images, features), real)
                    found[f"{space}/{model}/{steps}"] = distance
        path.write_text(json.dumps(found))
    return json.loads(path.read_text())


def key(text):
    return text.replace(" ", "_")


def summarise(name, by_seed):
    figures = {}
    for steps in (5, 10):
        for space, goal in (("fd_held_out", "<= 0.5"), ("fd_tuning", "<= 0.5"), ("fd_pixels", "<= 1")):
            for baseline, least in (("untuned", goal), ("untuned clipped", None)):
                ratios = [m[f"{space}/tuned for {steps}/{steps}"] / m[f"{space}/{baseline}/{steps}"] for m in by_seed]
                against = "_to_clipped" if baseline.endswith("clipped") else ""
                figures[f"{space}_ratio{against}_steps{steps}_{name}"] = figure(
                    statistics.mean(ratios), "ratio", least, spread(ratios)
                )
    for model in MODELS:
        for steps in CURVE:
            for space in SPACES:
                values = [m[f"{space}/{model}/{steps}"] for m in by_seed]
                figures[f"{space}_{steps}_{key(model)}_{name}"] = figure(
                    statistics.mean(values), "distance", spread=spread(values)
                )
    return figures


def plot(measured, path):
    """Distance against steps, and samples of the first seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure_, axes = plt.subplots(2, 5, figsize=(15.5, 6.2), constrained_layout=True)
    for row, (name, by_seed) in zip(axes, measured.items(), strict=True):
        for model in MODELS:
            means = [statistics.mean(m[f"fd_held_out/{model}/{s}"] for m in by_seed) for s in CURVE]
            row[0].plot(CURVE, means, marker="o", label=model)
        row[0].set(xscale="log", yscale="log", xlabel="steps", ylabel="FD, held-out features", title=name)
        row[0].set_xticks(CURVE, CURVE)
        row[0].minorticks_off()
        row[0].legend(fontsize=8)
        for axis, model, steps in zip(row[1:], MODELS, (5, 5, 5, 10), strict=True):
            images = samples(name, 0, model)[steps][:64].permute(0, 2, 3, 1).clamp(-1, 1) / 2 + 0.5
            rows = [np.concatenate(list(part.numpy()), 1) for part in images.split(8)]
            axis.imshow(np.concatenate(rows).squeeze(), cmap="gray")
            axis.set_title(f"{model}, {steps} steps", fontsize=9)
            axis.axis("off")
    figure_.savefig(path, dpi=75)


# What each figure says, for docs/results.md: names as patterns, values for the braces.
SAYS = {
    r"fd_held_out_ratio_steps(\d+)_(\w+)": (
        r"Tuned \2 in \1 steps: {} times the Frechet distance of untuned ones, by a classifier that nothing was "
        "tuned on."
    ),
    r"fd_tuning_ratio_steps(\d+)_(\w+)": (
        r"Tuned \2 in \1 steps: {} times the distance of untuned ones, by the features that were tuned on."
    ),
    r"fd_pixels_ratio_steps(\d+)_(\w+)": r"Tuned \2 in \1 steps: {} times the distance of untuned ones, by pixels.",
}


def main():
    torch.set_num_threads(1)
    start = time.perf_counter()
    measured = {name: [] for name in CHANNELS}
    for seed in SEEDS:
        for name, found in measured.items():
            small_models.classifier(name, "tuning")
            found.append(measure(name, seed))
            print(f"{name}, seed {seed} done after {time.perf_counter() - start:.0f} s", flush=True)
        report(measured, SEEDS[: seed + 1], time.perf_counter() - start)


def report(measured, seeds, seconds):
    """Writes what there is after so many seeds."""
    figures = {}
    for name, found in measured.items():
        figures |= summarise(name, found)
    table = {
        "of": "model, steps, data",
        "rows": {
            f"{steps}_{key(model)}_{name}": f"{model}, {steps} steps, {name}"
            for name in CHANNELS
            for steps in CURVE
            for model in MODELS
        },
        "columns": SPACES,
    }
    plot(measured, ROOT / "benchmarks" / "results" / "mmd_ddm" / "experiment.png")
    write_result(
        "mmd_ddm/experiment", "python -m benchmarks.mmd_ddm.experiment", figures, seeds, seconds, table, says=SAYS
    )


if __name__ == "__main__":
    main()
