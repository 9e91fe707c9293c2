"""Does noise that is paired with the data help a text-to-image model? Captioned digits, two shapes of network.

    python -m benchmarks.any_pipeline.experiment     # 40 minutes on one quiet core, seed by seed

Tiny models shaped like Stable Diffusion 3 (flow matching; three seeds) and PixArt (noise prediction; one seed) learn
MNIST's digits from captions such as "a handwritten three" with the recipe `text_to_image`: with Gaussian noise, with
noise assigned over the batch, and assigned among images of one caption only. The stock pipeline then draws 50 images
of each caption in 20 steps at seven guidance scales; 1.75, 2.25 and 2.5 were added when the first four had been seen,
because the best scale of each noise lies between them. Accuracy is how many of them a classifier reads as their
caption, FD their Frechet distance to 1,000 held-out digits in the features of that classifier.

Training resumes where it was interrupted, and what is finished is not done again (runs/any_pipeline). The result is
benchmarks/results/any_pipeline/experiment.json with a picture beside it.
"""

import json
import statistics
import time

import numpy as np
import torch
from diffusers import DiffusionPipeline

from benchmarks.any_pipeline.digits import CALL, PROMPTS, ROOT, RUNS, SIZE, captioned, mnist, untrained
from benchmarks.harness import figure, spread, write_result
from benchmarks.small_models import train
from diffusers_ext import (
    ImageClassifierFeatures,
    TextToImageConfig,
    TextToImageRecipe,
    extract_features,
    frechet_distance,
)

SEEDS = {"sd3": [0, 1, 2], "pixart": [0]}
NOISES = {
    "gaussian": {"noise": "gaussian"},
    "batch": {"noise": "assignment"},
    "captions": {"noise": "assignment", "noise_options": '{"within_labels": true}'},
}
UPDATES = {"sd3": 1000, "pixart": 4000}  # of 1,000, the noise predictor reads few captions yet
PER_PROMPT, SAMPLING = 50, 20
GUIDANCE = [1.0, 1.5, 1.75, 2.0, 2.25, 2.5, 3.0]
READABLE = 0.97  # the accuracy that a guidance scale must reach to be chosen


def trained(shape, noise, seed):
    """Returns the folder of a model, trained once."""
    folder = RUNS / f"{shape}-{noise}-{seed}"
    config = TextToImageConfig(
        **NOISES[noise],
        pipeline_config=str(untrained(shape, seed)),
        call_options=json.dumps(CALL),
        train_data_dir=str(captioned()),
        output_dir=str(folder),
        resolution=SIZE,
        cache_latents=True,
        cache_prompts=True,
        cache_dir=str(RUNS / f"cache-{shape}"),
        train_batch_size=64,
        max_train_steps=UPDATES[shape],
        learning_rate=2e-3,
        lr_scheduler="cosine",
        lr_warmup_steps=50,
        ema_decay=0.99,
        checkpointing_steps=250,
        checkpoints_total_limit=1,
        resume_from_checkpoint="latest",
        logging_steps=50,
        num_validation_images=0,
        seed=seed,
    )
    if not (folder / "model_index.json").is_file():
        train(TextToImageRecipe, config)
    return folder


def draw(pipe, shape, guidance, prompts=PROMPTS, count=PER_PROMPT):
    """Returns `(len(prompts) * count, 3, 32, 32)` images in [0, 1], those of one prompt next to each other."""
    pipe.set_progress_bar_config(disable=True)
    generator, images = torch.Generator().manual_seed(1234), []
    call = {"height": SIZE, "width": SIZE, "num_inference_steps": SAMPLING, "output_type": "pt", **CALL}
    if shape == "pixart":
        call |= {"use_resolution_binning": False, "clean_caption": False}
    for prompt in prompts:
        images.append(pipe([prompt] * count, guidance_scale=guidance, generator=generator, **call).images)
    return torch.cat(images)


def classifier():
    return ImageClassifierFeatures.from_pretrained(ROOT / "diffusers_ext" / "assets" / "digits-classifier").eval()


def as_digits(images):
    """Turns drawn images into the grey 28x28 pixels in [-1, 1] that the classifier reads."""
    return images.mean(1, keepdim=True)[:, :, 2:-2, 2:-2] * 2 - 1


@torch.no_grad()
def compare(images, labels, judge, reference):
    digits = as_digits(images)
    return {
        "accuracy": (judge(digits).argmax(1) == labels).float().mean().item(),
        "frechet_distance": frechet_distance(extract_features(digits, judge.features), reference),
    }


def held_out():
    _, _, images, labels = mnist()
    return torch.tensor(images)[:, None].float() / 127.5 - 1, torch.tensor(labels)


def measure(shape, seed):
    """Returns the figures of a seed by noise and guidance."""
    judge = classifier()
    reference = extract_features(held_out()[0], judge.features)
    labels = torch.arange(10).repeat_interleave(PER_PROMPT)
    found = {}
    for noise in NOISES:
        path = RUNS / f"{shape}-{noise}-{seed}" / "measured.json"
        rows = json.loads(path.read_text()) if path.is_file() else {}
        missing = [g for g in GUIDANCE if f"{g:g}" not in rows]
        if missing:
            pipe = DiffusionPipeline.from_pretrained(trained(shape, noise, seed))
            rows |= {f"{g:g}": compare(draw(pipe, shape, g), labels, judge, reference) for g in missing}
            path.write_text(json.dumps(rows))
        print(shape, noise, seed, {g: [round(v, 3) for v in row.values()] for g, row in rows.items()}, flush=True)
        found |= {f"{noise} {g}": row for g, row in rows.items()}
    return found


def best(measured, noise):
    """Returns the lowest FD over the guidance scales at which captions are read, or of all if they are nowhere."""
    rows = [measured[f"{noise} {g:g}"] for g in GUIDANCE]
    readable = [row for row in rows if row["accuracy"] >= READABLE]
    return min(row["frechet_distance"] for row in readable or rows)


def summarise(by_shape):
    """Goals are those of Stable Diffusion 3's shape; PixArt's is one seed for the record."""
    figures = {}
    for shape, by_seed in by_shape.items():
        goals = {"batch": "<= 0.85", "captions": "<= 1"} if shape == "sd3" else {}
        for noise in ("batch", "captions"):
            ratios = [best(m, noise) / best(m, "gaussian") for m in by_seed]
            name = f"{shape}_{noise}_over_gaussian_frechet_distance_best_guidance"
            figures[name] = figure(statistics.mean(ratios), "ratio", goals.get(noise), spread(ratios))
        losses = [m["gaussian 1"]["accuracy"] - m["captions 1"]["accuracy"] for m in by_seed]
        goal = "<= 0.02" if shape == "sd3" else None
        figures[f"{shape}_gaussian_minus_captions_accuracy_no_guidance"] = figure(
            statistics.mean(losses), "difference", goal, spread(losses)
        )
        if shape == "sd3":
            reached = [max(m[f"batch {g:g}"]["accuracy"] for g in GUIDANCE) for m in by_seed]
            figures["sd3_batch_highest_accuracy"] = figure(
                statistics.mean(reached), "fraction", f">= {READABLE}", spread(reached)
            )
        for row in by_seed[0]:
            for name in ("accuracy", "frechet_distance"):
                values = [m[row][name] for m in by_seed]
                key = f"{name}_{shape}_{row.replace(' ', '_').replace('.', '_')}"
                figures[key] = figure(statistics.mean(values), "", spread=spread(values))
    return figures


# What each figure says, for docs/results.md: names as patterns, values for the braces.
SAYS = {
    "(sd3|pixart)_batch_over_gaussian_frechet_distance_best_guidance": (
        "Noise assigned over the batch gives the model of shape \\1 {:.2f} times plain noise's distance to real "
        "digits, each at its best guidance."
    ),
    "(sd3|pixart)_captions_over_gaussian_frechet_distance_best_guidance": (
        "Assigned among images of one caption it gives {:.2f} times plain noise's distance (\\1)."
    ),
    "(sd3|pixart)_gaussian_minus_captions_accuracy_no_guidance": (
        "Without guidance, plain noise has {:.1%} more images read as their caption than assignment among images of "
        "one caption (\\1; a negative number means fewer)."
    ),
    "sd3_batch_highest_accuracy": (
        "With noise assigned over the batch, guidance brings back the caption: {:.1%} of the images are read as it at "
        "the best scale."
    ),
}


def plot(path, by_shape):
    """Accuracy and FD over guidance, and what the first seed of each shape draws."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure_, axes = plt.subplots(
        len(by_shape), 5, figsize=(13, 2.9 * len(by_shape)), squeeze=False, layout="constrained"
    )
    for row, (shape, by_seed) in zip(axes, by_shape.items(), strict=True):
        for noise in NOISES:
            for axis, name in zip(row, ("frechet_distance", "accuracy"), strict=False):
                means = [statistics.mean(m[f"{noise} {g:g}"][name] for m in by_seed) for g in GUIDANCE]
                axis.plot(GUIDANCE, means, marker="o", label=noise)
                axis.set(xlabel="guidance", title=f"{shape}: {'FD' if 'distance' in name else 'accuracy'}")
        row[0].legend(fontsize=7)
        for axis, noise in zip(row[2:], NOISES, strict=True):
            best_scale = min(GUIDANCE, key=lambda g: by_seed[0][f"{noise} {g:g}"]["frechet_distance"])  # noqa: B023
            pipe = DiffusionPipeline.from_pretrained(trained(shape, noise, 0))
            images = draw(pipe, shape, best_scale, count=8)[:, 0].numpy().reshape(10, 8, SIZE, SIZE)
            axis.imshow(
                np.concatenate([np.concatenate(list(line), 1) for line in images.transpose(1, 0, 2, 3)]), "gray"
            )
            axis.set_title(f"{noise}, guidance {best_scale:g}", fontsize=9)
            axis.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure_.savefig(path, dpi=75)


def report(by_shape, seconds):
    """Writes what there is so far."""
    rows = {
        f"{s}_{n}_{g:g}".replace(".", "_"): f"{s}, {n}, guidance {g:g}"
        for s in by_shape
        for n in NOISES
        for g in GUIDANCE
    }
    columns = {"accuracy": "accuracy", "frechet_distance": "FD"}
    plot(ROOT / "benchmarks" / "results" / "any_pipeline" / "experiment.png", by_shape)
    command = "python -m benchmarks.any_pipeline.experiment"
    seeds = list(range(len(by_shape["sd3"])))
    table = {"of": "model", "rows": rows, "columns": columns}
    write_result("any_pipeline/experiment", command, summarise(by_shape), seeds, seconds, table, says=SAYS)


def main():
    torch.set_num_threads(1)
    start, by_shape = time.perf_counter(), {}
    order = [(shape, seed) for shape in SEEDS for seed in SEEDS[shape]]
    for shape, seed in order:
        by_shape.setdefault(shape, []).append(measure(shape, seed))
        report(by_shape, time.perf_counter() - start)


if __name__ == "__main__":
    main()
