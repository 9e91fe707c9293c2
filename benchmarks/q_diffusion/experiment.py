"""How much of a model is lost in 8 and 4 bits? The shipped models of 16x16 digits and of colour photographs.

    python -m benchmarks.q_diffusion.experiment     # 40 minutes on one core

Each model is calibrated on 128 of its own samples at 10 of 20 timesteps and quantized in several ways. Measured
against the model in fp32: the error of its prediction on states of other samples, relative to the prediction's mean
square; and Frechet and kernel distances of 300 samples to real images. Beside them, in the same run, what else users
of Diffusers have, where it is installed (`pip install --no-deps torchao optimum-quanto sdnq`). Sizes are those of the
memory after calls.

What is finished is not done again (runs/q_diffusion). The result is benchmarks/results/q_diffusion/experiment.json
with a picture beside it.
"""

import copy
import statistics
import time

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline

from benchmarks.harness import RESULTS, figure, kept, spread, write_result
from diffusers_ext import (
    ImageClassifierFeatures,
    QDiffConfig,
    asset_path,
    collect_calibration,
    extract_features,
    frechet_distance,
    kernel_distance,
    load_images,
    quantize_model,
)
from diffusers_ext.methods.q_diffusion.layers import QuantLayer
from diffusers_ext.methods.q_diffusion.quantizer import shortcut_splits
from diffusers_ext.methods.q_diffusion.reconstruct import Settings, calibrated

RUNS = RESULTS.parents[1] / "runs" / "q_diffusion"
MODELS = {"digits": "digits16-base", "photos": "photos-base"}
SEEDS, STEPS, TIMESTEPS, SAMPLES = [0, 1, 2], 20, 10, 128
ITERS, ACT_ITERS, COUNT = 200, 80, 300
W4A8 = {"weight_bits": 4, "act_bits": 8}
# What is quantized how: configuration, updates of the rounding and of the steps, and the states it is calibrated on.
WAYS = {
    "w8": ({"weight_bits": 8}, 0, 0, "many"),
    "w8a8": ({"weight_bits": 8, "act_bits": 8}, 0, ACT_ITERS, "many"),
    "w4_max": ({"weight_bits": 4, "scale_method": "max", "split_shortcuts": False}, 0, 0, "many"),
    "w4_mse": ({"weight_bits": 4}, 0, 0, "many"),
    "w4a8": (W4A8, ITERS, ACT_ITERS, "many"),
    "w4a8_unsplit": ({**W4A8, "split_shortcuts": False}, ITERS, ACT_ITERS, "many"),
    "w4a8_nearest": (W4A8, 0, 0, "many"),
    "w4a8_nearest_unsplit": ({**W4A8, "split_shortcuts": False}, 0, 0, "many"),
    "w4_one_timestep": ({"weight_bits": 4}, ITERS, 0, "one"),
    "w4_few_states": ({"weight_bits": 4}, ITERS, 0, "few"),
}
TITLES = {
    "fp32": "fp32",
    "w8": "8 bits, nearest",
    "w8a8": "8 bits, activations too",
    "w4_max": "4 bits, nearest, whole range",
    "w4_mse": "4 bits, nearest",
    "w4": "4 bits, learned rounding",
    "w4a8": "4 bits, learned, 8-bit activations",
    "w4a8_unsplit": "the same without split shortcuts",
    "w4_one_timestep": "4 bits, learned on one timestep",
    "w4_few_states": "4 bits, learned on as few states of 10 timesteps",
}
DRAWN = ["fp32", "w8", "w8a8", "w4_max", "w4_mse", "w4", "w4a8"]


def pipeline_of(name):
    pipeline = DiffusionPipeline.from_pretrained(asset_path(MODELS[name]))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def states(name, pipeline, seed, count):
    """Returns states of samples; those of other seeds are other samples."""
    classes = {"class_labels": list(range(8))} if name == "photos" else {}
    return collect_calibration(
        pipeline, count, TIMESTEPS, batch_size=32, seed=seed, num_inference_steps=STEPS, **classes
    )


def quantized(name, pipeline, seed, way):
    options, iters, act_iters, which = WAYS[way]
    many = states(name, pipeline, seed, SAMPLES)
    calibration = {
        "many": lambda: many,
        "one": lambda: many.at([many.timesteps[len(many.timesteps) // 2]]),
        "few": lambda: states(name, pipeline, seed, SAMPLES // TIMESTEPS),
    }[which]()
    folder = RUNS / name / f"seed-{seed}" / way
    if which == "one":  # which the public function refuses, with the reason that this measures
        return calibrated(pipeline.unet, calibration, QDiffConfig(**options), Settings(iters, seed=seed), folder)
    return quantize_model(
        pipeline.unet,
        calibration,
        QDiffConfig(**options),
        iters=iters,
        act_iters=act_iters,
        seed=seed,
        output_dir=folder,
    )


def without_activations(model):
    """Returns a quantized model that leaves activations as they are."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, QuantLayer):
            module.act_scale = module.act_zero_point = None
    return model


@torch.no_grad()
def error(model, arguments, wanted):
    return ((model(**arguments).sample - wanted).square().mean() / wanted.square().mean()).item()


def once(name, seed, what, find):
    """Returns what `find` measured of a model and a seed, which is measured once."""
    return kept(RUNS / name / f"seed-{seed}" / f"{what}.json", lambda: find(name, seed))


@torch.no_grad()
def loss_over_fp32(name, seed):
    """Returns by how much weights of 8 bits change the denoising loss on real images."""
    pipeline = pipeline_of(name)
    generator = torch.Generator().manual_seed(seed)
    x0, labels = real(name, pipeline.unet.config.sample_size), {}
    if name == "photos":
        with np.load(asset_path(name) / f"{name}.npz") as file:
            labels = {"class_labels": torch.from_numpy(file["labels"]).long()}
    t = torch.randint(pipeline.scheduler.config.num_train_timesteps, (len(x0),), generator=generator)
    noise = torch.randn(x0.shape, generator=generator)
    noisy = pipeline.scheduler.add_noise(x0, noise, t)
    found = []
    for model in (quantized(name, pipeline, seed, "w8"), pipeline.unet):
        found.append(F.mse_loss(model(noisy, t, **labels).sample, noise).item())
    return found[0] / found[1]


@torch.no_grad()
def shortcut_error(original, model, arguments, names):
    """Returns the error of the layers over concatenations, each given what it is given in the original."""
    found, total = 0.0, 0.0

    def compare(name):
        def hook(module, args, output):
            nonlocal found, total
            found += (model.get_submodule(name)(args[0]) - output).square().sum().item()
            total += output.square().sum().item()

        return hook

    handles = [original.get_submodule(n).register_forward_hook(compare(n)) for n in names]
    original(**arguments)
    for handle in handles:
        handle.remove()
    return found / total


def nearest_shortcuts(name, seed):
    """Returns `shortcut_error` of weights rounded to nearest, with grids of activations, split and not."""
    pipeline, found = pipeline_of(name), {}
    held_out = states(name, pipeline, 100 + seed, 32).arguments()
    for way in ("w4a8_nearest", "w4a8_nearest_unsplit"):
        model = quantized(name, pipeline, seed, way)
        found[way] = shortcut_error(pipeline.unet, model, held_out, shortcut_splits(model))
    return found


def draw(name, pipeline, unet):
    """Returns `(COUNT, channels, size, size)` samples in [-1, 1], always from the same noise."""
    pipeline = copy.copy(pipeline)
    pipeline.unet = unet
    channels, size = unet.config.in_channels, unet.config.sample_size
    noise = torch.randn(COUNT, channels, size, size, generator=torch.Generator().manual_seed(1234))
    images = []
    for i, part in enumerate(noise.split(100)):
        classes = {"class_labels": [(100 * i + j) % 8 for j in range(len(part))]} if name == "photos" else {}
        images.append(pipeline(latents=part, num_inference_steps=STEPS, output_type="pt", **classes).images)
    return torch.cat(images) * 2 - 1


def features_of(name):
    if name == "photos":  # the colours of 16 parts
        return lambda images: F.adaptive_avg_pool2d(images, 4).flatten(1)
    classifier = ImageClassifierFeatures.from_pretrained(asset_path("digits-classifier")).eval()
    return lambda images: classifier.features(F.interpolate(images, (28, 28), mode="bilinear", align_corners=False))


def real(name, resolution=16):
    path = asset_path(name) / f"{name}.npz"
    data = load_images(train_data_dir=str(path), resolution=resolution, channels=1 if name == "digits" else 3)
    return torch.stack([data[i]["pixel_values"] for i in range(min(len(data), 1000))])


def stored_bytes(value):
    """Returns the bytes of tensors, those that make up subclasses too."""
    if hasattr(value, "__tensor_flatten__"):
        return sum(stored_bytes(getattr(value, part)) for part in value.__tensor_flatten__()[0])
    return value.numel() * value.element_size()


def size(model):
    tensors = [*model.parameters(), *model.buffers()]
    return sum(stored_bytes(t.data if isinstance(t, torch.nn.Parameter) else t) for t in tensors)


def peers(unet):
    """Returns what else is installed: by name a function that gives a quantized copy."""

    def torchao(bits):
        def make():
            from torchao.quantization import IntxWeightOnlyConfig, quantize_
            from torchao.quantization.granularity import PerAxis

            model = copy.deepcopy(unet)
            dtype = torch.int4 if bits == 4 else torch.int8
            quantize_(model, IntxWeightOnlyConfig(weight_dtype=dtype, granularity=PerAxis(0)))
            return model

        return make

    def quanto(bits):
        def make():
            from optimum.quanto import freeze, qint4, qint8, quantize

            model = copy.deepcopy(unet)
            quantize(model, weights=qint4 if bits == 4 else qint8)
            freeze(model)
            return model

        return make

    def sdnq(bits):
        def make():
            from sdnq import sdnq_post_load_quant

            options = {"weights_dtype": "uint4" if bits == 4 else "int8", "quant_conv": True}
            options |= {"minimum_allowed_numel": 1, "minimum_allowed_channel_size": 1}
            return sdnq_post_load_quant(copy.deepcopy(unet), **options)

        return make

    makers = {"torchao": torchao, "quanto": quanto, "sdnq": sdnq}
    return {f"{name}_{bits}": make(bits) for name, make in makers.items() for bits in (8, 4)}


def measure(name, seed):
    """Returns the figures of one model and seed."""
    pipeline = pipeline_of(name)
    unet = pipeline.unet
    held_out = states(name, pipeline, 100 + seed, 32).arguments()
    with torch.no_grad():
        wanted = unet(**held_out).sample
    features = features_of(name)
    reference = extract_features(real(name), features)
    models = {"fp32": unet, **{way: quantized(name, pipeline, seed, way) for way in WAYS if "nearest" not in way}}
    models["w4"] = without_activations(models["w4a8"])
    split = [n for n, m in models["w4a8"].named_modules() if getattr(m, "split", 0)]
    found = {"shortcuts": {w: shortcut_error(unet, models[w], held_out, split) for w in ("w4a8", "w4a8_unsplit")}}
    found["error"] = {way: error(model, held_out, wanted) for way, model in models.items() if way != "fp32"}
    found["bytes"] = {way: size(model) for way, model in models.items()}
    found["fd"], found["kd"], pictures = {}, {}, {}
    for way in DRAWN:
        images = draw(name, pipeline, models[way])
        pictures[way] = images[:36].numpy()
        own = extract_features(images, features)
        found["fd"][way], found["kd"][way] = frechet_distance(own, reference), kernel_distance(own, reference)
    for peer, make in peers(unet).items() if seed == SEEDS[0] else ():
        try:
            model = make()
            found["error"][peer], found["bytes"][peer] = error(model, held_out, wanted), size(model)
        except Exception as problem:  # a package that is missing, or that does not take such a model here
            print(f"{peer} left out: {type(problem).__name__}: {str(problem)[:200]}", flush=True)
    np.savez_compressed(RUNS / name / f"seed-{seed}" / "measured.npz", **pictures)
    return found


def mean_figure(values, unit, goal=None):
    return figure(statistics.mean(values), unit, goal, spread(values))


def summarise(name, by_seed):
    def ratios(kind, a, b):
        return [m[kind][a] / m[kind][b] for m in by_seed]

    figures = {
        f"adaround_over_nearest_{name}": mean_figure(ratios("error", "w4", "w4_mse"), "ratio", "<= 0.6"),
        f"loss_w8_over_fp32_{name}": mean_figure([m["loss"] for m in by_seed], "ratio", "<= 1.1"),
        f"fd_w8_over_fp32_{name}": mean_figure(ratios("fd", "w8", "fp32"), "ratio"),
        f"nearest_split_over_unsplit_{name}": mean_figure(
            ratios("nearest_shortcuts", "w4a8_nearest", "w4a8_nearest_unsplit"), "ratio", "<= 0.5"
        ),
        f"split_over_unsplit_{name}": mean_figure(ratios("shortcuts", "w4a8", "w4a8_unsplit"), "ratio"),
        f"one_over_many_timesteps_{name}": mean_figure(ratios("error", "w4_one_timestep", "w4_few_states"), "ratio"),
        f"fd_w4a8_over_fp32_{name}": mean_figure(ratios("fd", "w4a8", "fp32"), "ratio"),
        f"fd_w4_max_over_fp32_{name}": mean_figure(ratios("fd", "w4_max", "fp32"), "ratio"),
    }
    first = by_seed[0]
    for peer in (p for p in first["error"] if p.endswith("_4") and p not in TITLES):
        # A goal where it stores as little; others keep convolutions in fp32, or their integers in whole bytes.
        goal = "<= 1" if first["bytes"][peer] <= 1.1 * first["bytes"]["w4"] else None
        figures[f"error_over_{peer}_{name}"] = figure(first["error"]["w4"] / first["error"][peer], "ratio", goal)
        figures[f"bytes_over_{peer}_{name}"] = figure(first["bytes"]["w4"] / first["bytes"][peer], "ratio")
    for way in first["bytes"]:
        seeds = [m for m in by_seed if way in m["bytes"]]
        for kind, unit in (("error", "relative"), ("fd", "distance"), ("kd", "distance")):
            values = [m[kind][way] for m in seeds if way in m[kind]]
            if values:
                figures[f"{kind}_{way}_{name}"] = mean_figure(values, unit)
        figures[f"size_{way}_{name}"] = figure(seeds[0]["bytes"][way] / first["bytes"]["fp32"], "of fp32")
    return figures


def plot(names, path):
    """Samples of the first seed: what a user sees."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = ["fp32", "w8a8", "w4a8", "w4_max"]
    figure_, axes = plt.subplots(len(names), len(shown), figsize=(10, 5.4), constrained_layout=True, squeeze=False)
    for row, name in zip(axes, names, strict=True):
        with np.load(RUNS / name / f"seed-{SEEDS[0]}" / "measured.npz") as file:
            for axis, way in zip(row, shown, strict=True):
                images = np.clip(file[way] / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1)
                rows = [np.concatenate(list(images[i : i + 6]), 1) for i in range(0, 36, 6)]
                axis.imshow(np.concatenate(rows).squeeze(), cmap="gray")
                axis.set_title(TITLES[way], fontsize=9)
                axis.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure_.savefig(path, dpi=80)


# What each figure says, for docs/results.md: names as patterns, values for the braces.
SAYS = {
    r"adaround_over_nearest_(\w+)": (
        r"Learned rounding leaves {} times the error of rounding to nearest, in 4 bits (\1)."
    ),
    r"loss_w8_over_fp32_(\w+)": r"Weights in 8 bits: {} times the denoising loss of fp32 on real images (\1).",
    r"fd_w8_over_fp32_(\w+)": r"Weights in 8 bits: {} times the Frechet distance of fp32 (\1).",
    r"nearest_split_over_unsplit_(\w+)": (
        r"Rounded to nearest, split shortcuts make {} times the error of unsplit ones in the layers over "
        r"concatenations (\1)."
    ),
    r"split_over_unsplit_(\w+)": (
        r"With rounding learned for whole blocks, split shortcuts make {} times the error of unsplit ones in these "
        r"layers (\1)."
    ),
    r"one_over_many_timesteps_(\w+)": (
        r"Calibrated on one timestep the error is {} times that of as many states of ten timesteps (\1)."
    ),
    r"fd_w4a8_over_fp32_(\w+)": r"4-bit weights, 8-bit activations: {} times the Frechet distance of fp32 (\1).",
    r"fd_w4_max_over_fp32_(\w+)": r"4 bits by the whole range and to nearest: {} times it (\1).",
    r"error_over_torchao_4_(\w+)": r"Error in 4 bits, over that of torchao (\1): {}.",
    r"error_over_quanto_4_(\w+)": r"Error in 4 bits, over that of optimum-quanto (\1): {}.",
    r"error_over_sdnq_4_(\w+)": r"Error in 4 bits, over that of SDNQ (\1): {}.",
}


def main():
    torch.set_num_threads(1)
    start, measured = time.perf_counter(), {name: [] for name in MODELS}
    for seed in SEEDS:
        for name, found in measured.items():
            parts = {"loss": loss_over_fp32, "nearest_shortcuts": nearest_shortcuts}
            own = once(name, seed, "measured", measure)
            found.append({**own, **{what: once(name, seed, what, find) for what, find in parts.items()}})
            print(f"{name}, seed {seed} done after {time.perf_counter() - start:.0f} s", flush=True)
        report(measured, SEEDS[: seed + 1], time.perf_counter() - start)


def report(measured, seeds, seconds):
    """Writes what there is after so many seeds."""
    figures = {}
    for name, found in measured.items():
        figures |= summarise(name, found)
    ways = list(dict.fromkeys(way for found in measured.values() for way in found[0]["bytes"]))
    table = {
        "of": "weights, model",
        "rows": {
            f"{way}_{name}": f"{TITLES.get(way, way.replace('_', ', ') + ' bits')}, {name}"
            for name in measured
            for way in ways
        },
        "columns": {"error": "error", "fd": "Frechet", "kd": "kernel", "size": "memory after calls, of fp32"},
    }
    (RESULTS / "q_diffusion").mkdir(exist_ok=True)
    plot(list(measured), RESULTS / "q_diffusion" / "experiment.png")
    write_result(
        "q_diffusion/experiment",
        "python -m benchmarks.q_diffusion.experiment",
        figures,
        seeds,
        seconds,
        table,
        says=SAYS,
    )


if __name__ == "__main__":
    main()
