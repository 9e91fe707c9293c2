"""Ten inverted digits teach a text-to-image model of white digits to draw black ones: what LoRA learns and forgets.

    python -m benchmarks.any_pipeline.few_shot     # 10 minutes on one core, after benchmarks.any_pipeline.experiment

The Stable-Diffusion-3-shaped models of the experiment, trained with Gaussian noise, are tuned on ten inverted digits,
one of each caption, which stays as it was. After 100 and 300 updates the stock pipeline with the LoRA weights draws 50
images of each caption. They are inverted back and judged as in the experiment: FD to held-out digits, accuracy of the
caption. Diversity is the mean distance, in the classifier's features, of images whose nearest of the ten is the same;
the distance to that nearest one tells copies. `paper` is how bright the border is, 1 for a new domain reached.
"""

import json
import statistics
import time

import numpy as np
import torch
from diffusers import DiffusionPipeline

from benchmarks.any_pipeline.digits import CALL, PROMPTS, ROOT, RUNS, SIZE, mnist, padded, write_folder
from benchmarks.any_pipeline.experiment import (
    PER_PROMPT,
    SEEDS,
    as_digits,
    classifier,
    compare,
    draw,
    held_out,
    trained,
)
from benchmarks.harness import figure, spread, write_result
from benchmarks.small_models import train
from diffusers_ext import TextToImageConfig, TextToImageRecipe, extract_features, intra_cluster_distance

STEPS, GUIDANCE = [100, 300], 1.5
FIGURES = {
    "frechet_distance": "FD",
    "accuracy": "accuracy",
    "intra_cluster": "diversity",
    "to_nearest": "to the nearest of the ten",
    "paper": "paper",
}


def ten(seed):
    """Returns the folder of ten inverted digits, and their grey pixels `(10, 28, 28)` before they were inverted."""
    images, labels, _, _ = mnist()
    rows = np.random.default_rng(seed + 1).permutation(len(images))
    chosen = np.stack([images[rows[labels[rows] == digit][0]] for digit in range(10)])
    folder = RUNS / f"ten-{seed}"
    write_folder(folder, [np.repeat(255 - image[:, :, None], 3, 2) for image in padded(chosen)], PROMPTS)
    return folder, chosen


def adapted(seed, steps):
    """Returns images in [0, 1] after a number of updates, drawn once."""
    folder = RUNS / f"few-shot-{seed}"
    path = folder / f"samples-{steps}.npz"
    if not path.is_file():
        base = trained("sd3", "gaussian", seed)
        config = TextToImageConfig(
            pretrained_model_name_or_path=str(base),
            call_options=json.dumps(CALL),
            train_data_dir=str(ten(seed)[0]),
            output_dir=str(folder),
            resolution=SIZE,
            center_crop=True,
            cache_latents=True,
            cache_prompts=True,
            lora_rank=8,
            lora_targets="to_q,to_k,to_v,to_out.0,proj_out",
            train_batch_size=10,
            max_train_steps=steps,
            learning_rate=2e-3,
            ema_decay=0.95,
            checkpointing_steps=100,
            resume_from_checkpoint="latest",
            num_validation_images=0,
            logging_steps=50,
            seed=seed,
        )
        train(TextToImageRecipe, config)
        pipe = DiffusionPipeline.from_pretrained(base)
        pipe.load_lora_weights(folder)
        np.savez_compressed(path, images=draw(pipe, "sd3", GUIDANCE).numpy())
    with np.load(path) as file:
        return torch.tensor(file["images"])


def measure(seed):
    judge, labels = classifier(), torch.arange(10).repeat_interleave(PER_PROMPT)
    reference = extract_features(held_out()[0], judge.features)
    sources = extract_features(torch.tensor(ten(seed)[1])[:, None].float() / 127.5 - 1, judge.features)
    base = draw(DiffusionPipeline.from_pretrained(trained("sd3", "gaussian", seed)), "sd3", GUIDANCE)
    found = {}
    for name, images in {"base": base, **{f"LoRA {steps}": adapted(seed, steps) for steps in STEPS}}.items():
        upright = images if name == "base" else 1 - images
        features = extract_features(as_digits(upright), judge.features)
        border = torch.cat([images[:, :, 0].flatten(), images[:, :, -1].flatten()])
        found[name] = {
            **compare(upright, labels, judge, reference),
            "intra_cluster": intra_cluster_distance(features, sources),
            "to_nearest": torch.cdist(features, sources).min(1).values.mean().item(),
            "paper": border.mean().item(),
        }
        print(seed, name, found[name], flush=True)
    return found


SAYS = {
    "paper_lora_300": "After 300 updates on ten inverted digits drawn digits have paper of {:.2f}; 1 is white.",
    "accuracy_lora_300": "{:.1%} of the inverted digits are still read as their caption.",
}


def plot(path):
    """The ten images, and samples before and after."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {"the ten images": 1 - torch.tensor(padded(ten(0)[1]))[:, None].expand(-1, 3, -1, -1) / 255}
    every = slice(None, None, PER_PROMPT // 2)
    base = draw(DiffusionPipeline.from_pretrained(trained("sd3", "gaussian", 0)), "sd3", GUIDANCE, count=2)
    panels["base"] = base
    panels |= {f"LoRA, {steps} updates": adapted(0, steps)[every] for steps in STEPS}
    figure_, axes = plt.subplots(1, len(panels), figsize=(12, 3), layout="constrained", width_ratios=[1, 2, 2, 2])
    for axis, (title, images) in zip(axes, panels.items(), strict=True):
        columns = len(images) // 10 * 2
        rows = [torch.cat(list(images[i : i + columns]), 2) for i in range(0, len(images), columns)]
        axis.imshow(torch.cat(rows, 1).permute(1, 2, 0).clamp(0, 1))
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    figure_.savefig(path, dpi=75)


def main():
    torch.set_num_threads(1)
    start, by_seed = time.perf_counter(), []
    for seed in SEEDS["sd3"]:
        by_seed.append(measure(seed))
        figures = {}
        for row in by_seed[0]:
            for name in FIGURES:
                values = [m[row][name] for m in by_seed]
                last = f"LoRA {STEPS[-1]}"
                goals = {("paper", last): ">= 0.9", ("accuracy", last): ">= 0.8"}
                key = f"{name}_{row.replace(' ', '_').lower()}"
                figures[key] = figure(statistics.mean(values), "", goals.get((name, row)), spread(values))
        plot(ROOT / "benchmarks" / "results" / "any_pipeline" / "few_shot.png")
        rows = {row.replace(" ", "_").lower(): row for row in by_seed[0]}
        table = {"of": "model", "rows": rows, "columns": FIGURES}
        command = "python -m benchmarks.any_pipeline.few_shot"
        seconds = time.perf_counter() - start
        write_result("any_pipeline/few_shot", command, figures, SEEDS["sd3"][: seed + 1], seconds, table, says=SAYS)


if __name__ == "__main__":
    main()
