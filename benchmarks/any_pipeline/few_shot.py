"""Ten orange digits teach a text-to-image model of white digits to draw orange ones: what LoRA learns and forgets.

    python -m benchmarks.any_pipeline.few_shot     # half an hour on one core, after benchmarks.any_pipeline.experiment

The Stable-Diffusion-3-shaped models of the experiment, trained with Gaussian noise, are tuned on ten orange digits,
one of each class, in three ways: LoRA with each image's caption, as it was; LoRA with one new prompt for all ten and
images of the class drawn by the model itself (DreamBooth); the same with DomainStudio's further losses. After that
the stock pipeline with the LoRA weights draws 500 images: 50 of each caption, or all of the new prompt. They are
turned grey and judged as in the experiment: FD to held-out digits, accuracy of the caption. With the new prompt,
accuracy is that of the captions, which should still draw white digits. Diversity is the mean distance, in the
classifier's features, of images whose nearest of the ten is the same; the distance to that nearest one tells copies.
`ink` is how far bright pixels are on the way from white to orange, 1 for as far as the ten images themselves are after
the models' autoencoder, which has few channels for colour and gives back two fifths of it (`ink_of_the_ten`). Guidance
takes some of it away: at scale 1 a trial reached all that the autoencoder can say.
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
from diffusers_ext import (
    DomainStudioTextConfig,
    DomainStudioTextRecipe,
    TextToImageConfig,
    TextToImageRecipe,
    extract_features,
    intra_cluster_distance,
)

PROMPT, CLASS_PROMPT = "ink", "a handwritten"  # a word that the models have not met; what all captions begin with
GUIDANCE, INK = 1.5, torch.tensor([1.0, 0.55, 0.1])
WAYS = {
    "LoRA 100": ("captions", 100),
    "LoRA 300": ("captions", 300),
    "DreamBooth 300": ("dreambooth", 300),
    "DomainStudio 300": ("domain_studio", 300),
}
FIGURES = {
    "frechet_distance": "FD",
    "accuracy": "accuracy",
    "intra_cluster": "diversity",
    "to_nearest": "to the nearest of the ten",
    "ink": "ink",
}


def ten(seed):
    """Returns the folder of ten orange digits, and their grey pixels `(10, 28, 28)`."""
    images, labels, _, _ = mnist()
    rows = np.random.default_rng(seed + 1).permutation(len(images))
    chosen = np.stack([images[rows[labels[rows] == digit][0]] for digit in range(10)])
    folder = RUNS / f"ten-{seed}"
    write_folder(folder, [(image[:, :, None] * INK.numpy()).astype(np.uint8) for image in padded(chosen)], PROMPTS)
    return folder, chosen


def adapted(seed, way, steps):
    """Returns images in [0, 1] after tuning, drawn once; with a new prompt, also those of the captions."""
    name = "" if way == "captions" else f"-{way}"
    folder = RUNS / f"few-shot{name}-{seed}"
    path = folder / f"samples-{steps}.npz"
    if not path.is_file():
        base = trained("sd3", "gaussian", seed)
        recipe, config_class = (
            (DomainStudioTextRecipe, DomainStudioTextConfig)
            if way == "domain_studio"
            else (TextToImageRecipe, TextToImageConfig)
        )
        more = {"cache_latents": True, "cache_prompts": True}
        if way != "captions":
            classes = {"class_prompt": CLASS_PROMPT, "class_data_dir": str(RUNS / f"few-shot-class-{seed}")}
            more = {"instance_prompt": PROMPT, **classes, "num_class_images": 200, "caption_dropout": 0.0}
        config = config_class(
            pretrained_model_name_or_path=str(base),
            call_options=json.dumps(CALL),
            train_data_dir=str(ten(seed)[0]),
            output_dir=str(folder),
            resolution=SIZE,
            center_crop=True,
            lora_rank=8,
            lora_targets="to_q,to_k,to_v,to_out.0,proj_out",
            train_batch_size=10,
            max_train_steps=steps,
            learning_rate=1e-3,
            ema_decay=0.95,
            checkpointing_steps=100,
            resume_from_checkpoint="latest",
            num_validation_images=0,
            logging_steps=50,
            seed=seed,
            **more,
        )
        train(recipe, config)
        pipe = DiffusionPipeline.from_pretrained(base)
        pipe.load_lora_weights(folder)
        if way == "captions":
            drawn = {"images": draw(pipe, "sd3", GUIDANCE)}
        else:
            drawn = {"images": draw(pipe, "sd3", GUIDANCE, [PROMPT] * 10), "kept": draw(pipe, "sd3", GUIDANCE)}
        np.savez_compressed(path, **{key: images.numpy() for key, images in drawn.items()})
    with np.load(path) as file:
        return {key: torch.tensor(file[key]) for key in file}


def grey(images):
    """Returns orange digits as white ones: their share of the ink's colour."""
    share = torch.einsum("bchw,c->bhw", images, INK) / INK.square().sum()
    return share.clamp(0, 1)[:, None].expand_as(images)


def ink(images):
    """Returns where bright pixels are between white, 0, and orange, 1."""
    brightest = images.amax(1)
    colours = (images / brightest[:, None].clamp(min=0.5)).permute(0, 2, 3, 1)[brightest > 0.5]
    return ((1 - colours) @ (1 - INK) / (1 - INK).square().sum()).mean().item()


@torch.no_grad()
def reachable_ink(seed):
    """Returns the ink of the ten images after the models' autoencoder, which bounds what its latents can say."""
    pipe = DiffusionPipeline.from_pretrained(trained("sd3", "gaussian", seed))
    pixels = torch.tensor(padded(ten(seed)[1]))[:, None] / 255 * INK[:, None, None] * 2 - 1
    return ink((pipe.vae(pixels.float()).sample / 2 + 0.5).clamp(0, 1))


def measure(seed):
    judge, labels = classifier(), torch.arange(10).repeat_interleave(PER_PROMPT)
    reference = extract_features(held_out()[0], judge.features)
    sources = extract_features(torch.tensor(ten(seed)[1])[:, None].float() / 127.5 - 1, judge.features)
    base = draw(DiffusionPipeline.from_pretrained(trained("sd3", "gaussian", seed)), "sd3", GUIDANCE)
    found, reach = {}, reachable_ink(seed)
    for name, drawn in {"base": {"images": base}, **{row: adapted(seed, *way) for row, way in WAYS.items()}}.items():
        images = drawn["images"]
        upright = images if name == "base" else grey(images)
        features = extract_features(as_digits(upright), judge.features)
        found[name] = compare(upright, labels, judge, reference)
        if "kept" in drawn:
            found[name]["accuracy"] = compare(drawn["kept"], labels, judge, reference)["accuracy"]
        found[name] |= {
            "intra_cluster": intra_cluster_distance(features, sources),
            "to_nearest": torch.cdist(features, sources).min(1).values.mean().item(),
            "ink": ink(images) / reach,
            "ink_of_the_ten": reach,
        }
        print(seed, name, found[name], flush=True)
    return found


# Written before the runs; ink was then measured against the pure colour, which the autoencoder cannot say.
GOALS = {
    "ink_lora_300": ">= 0.9",
    "accuracy_lora_300": ">= 0.8",
    "ink_domainstudio_300": ">= 0.9",
    "accuracy_domainstudio_300": ">= 0.9",
    "diversity_domainstudio_over_dreambooth": ">= 1.05",
    "frechet_distance_domainstudio_over_dreambooth": "<= 1",
}
SAYS = {
    "ink_lora_300": "After 300 updates on ten orange digits the ink is at {:.2f} of what their autoencoder can say.",
    "accuracy_lora_300": "{:.1%} of the orange digits are still read as their caption.",
    "ink_domainstudio_300": "With one new prompt and DomainStudio's losses it is {:.2f}.",
    "accuracy_domainstudio_300": "The captions still draw white digits, {:.1%} of them right.",
    "ink_of_the_ten": "The models' small autoencoder gives back {:.2f} of the ten images' orange.",
    "diversity_domainstudio_over_dreambooth": "DomainStudio's samples are {:.2f} times as diverse as DreamBooth's.",
    "frechet_distance_domainstudio_over_dreambooth": "They are {:.2f} times as far from digits as DreamBooth's.",
}


def plot(path):
    """The ten images, and samples before and after."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {"the ten images": torch.tensor(padded(ten(0)[1]))[:, None] / 255 * INK[:, None, None]}
    every = slice(None, None, PER_PROMPT // 2)
    base = draw(DiffusionPipeline.from_pretrained(trained("sd3", "gaussian", 0)), "sd3", GUIDANCE, count=2)
    panels["base"] = base
    panels |= {f"{row} updates": adapted(0, *way)["images"][every] for row, way in list(WAYS.items())[1:]}
    figure_, axes = plt.subplots(1, len(panels), figsize=(14, 3), layout="constrained", width_ratios=[1, 2, 2, 2, 2])
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
                key = f"{name}_{row.replace(' ', '_').lower()}"
                figures[key] = figure(statistics.mean(values), "", GOALS.get(key), spread(values))
        reach = [m["base"]["ink_of_the_ten"] for m in by_seed]
        figures["ink_of_the_ten"] = figure(statistics.mean(reach), "", spread=spread(reach))
        for key, name in (("diversity", "intra_cluster"), ("frechet_distance", "frechet_distance")):
            values = [m["DomainStudio 300"][name] / m["DreamBooth 300"][name] for m in by_seed]
            key += "_domainstudio_over_dreambooth"
            figures[key] = figure(statistics.mean(values), "ratio", GOALS[key], spread(values))
        plot(ROOT / "benchmarks" / "results" / "any_pipeline" / "few_shot.png")
        rows = {row.replace(" ", "_").lower(): row for row in by_seed[0]}
        table = {"of": "model", "rows": rows, "columns": FIGURES}
        command = "python -m benchmarks.any_pipeline.few_shot"
        seconds = time.perf_counter() - start
        write_result("any_pipeline/few_shot", command, figures, SEEDS["sd3"][: seed + 1], seconds, table, says=SAYS)


if __name__ == "__main__":
    main()
