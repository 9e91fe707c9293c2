"""Raw denoisers trained with learned and with Gaussian noise: three seeds, two laws.

    python -m benchmarks.pnnp.denoiser     # twenty minutes on one core

As a user goes: dark frames of a simulated camera are taken apart and its noise is learned (the mild law's as in
benchmarks.pnnp.proxy), then small denoisers are trained on parts of two photographs and tried on others that the true
camera took, at ISO 1600. The mild law is a sensor as they are, whose light's own noise is most of it at these
exposures; the heavy one has 3 % of outliers (excess kurtosis 33). The photographs are synthetic raw images: no package
ships real ones.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.harness import RESULTS, figure, spread, write_result
from benchmarks.pnnp.photos import BLACK, SIZE, WHITE, photographs, psnr, write_clean
from benchmarks.pnnp.proxy import trained
from diffusers_ext import (
    CameraTruth,
    PNNPConfig,
    PNNPRecipe,
    RawDenoisePipeline,
    SensorNoisePipeline,
    Trainer,
    develop,
    simulate_raw,
)

ISO = 1600
# Law -> ratio, loss, steps and the decay of the average.
LAWS = {
    "mild": ((50, 100), "l1", 350, 0.9),
    "heavy": ((200, 300), "l2", 700, 0.98),
}
KINDS = ("proxy", "gaussian", "true")
ROWS = {"input": "noisy", "proxy": "learned noise", "gaussian": "Gaussian noise", "true": "the true noise of pixels",
        "unshaded": "learned noise, dark shading left in"}  # fmt: skip
# Written before the run.
GOALS = {
    "mild_gaussian_over_proxy": "<= 0.2",
    "mild_proxy_over_input": ">= 1",
    "mild_shading": ">= 0.3",
    # Settled on another seed, 7, with 900 steps: squares, and averaged weights; learned noise was 0.37 dB behind
    # there. Seeds differ by about 1 dB, more than noise of another law is likely to change.
    "heavy_gaussian_over_proxy": "<= 0",
}
SAYS = {
    r"(mild|heavy)_gaussian_over_proxy": "Law \\1: Gaussian noise in training leads learned noise by {:.2f} dB.",
    r"(mild|heavy)_true_over_gaussian": "Law \\1: true noise of pixels leads Gaussian noise by {:.2f} dB.",
    r"(mild|heavy)_proxy_over_input": "Law \\1: it gains {:.2f} dB over the noisy images.",
    r"(mild|heavy)_shading": "Law \\1: to take dark shading off gains {:.2f} dB.",
}


def learned(law, seed, folder):
    """Returns where the camera's noise is, learned from its dark frames; the mild law's is the other experiment's."""
    place = folder.parent / "proxy" if law == "mild" else folder / "heavy"
    place = place / f"seed-{seed}"
    trained(CameraTruth(*SIZE, law=law, seed=seed), seed, place)
    return place / "noise"


class TrueNoise(PNNPRecipe):
    """Draws the noise of pixels from the camera's own law; rows, columns and offset are still the measured ones."""

    def __init__(self, config, truth):
        super().__init__(config)
        self.truth = truth

    def noise(self):
        synthesizer, dark = super().noise()
        synthesizer.proxy = self
        return synthesizer, dark

    def sample(self, shape, iso, generator):
        rng = np.random.default_rng(torch.randint(2**62, (), generator=generator).item())
        planes = [self.truth.pixel_noise(tuple(shape[1:]), one, rng) for one in iso.tolist()]
        return torch.from_numpy(np.stack(planes)).float()


def denoiser(law, kind, seed, folder):
    """Trains, or goes on training, and returns the pipeline."""
    ratio, loss, steps, decay = LAWS[law]
    noise, output = learned(law, seed, folder), folder / f"{law}-{seed}" / kind
    truth = CameraTruth(*SIZE, law=law, seed=seed)
    if not (output / "model_index.json").is_file():
        (folder / "unet.json").write_text(json.dumps({"base_channels": 8}))
        config = PNNPConfig(
            train_data_dir=str(folder / "clean"), noise_model=str(noise), output_dir=str(output), resolution=64,
            pixel_noise="gaussian" if kind == "gaussian" else "proxy", iso=f"{ISO},{ISO}",
            ratio=",".join(map(str, ratio)), loss=loss, unet_config=str(folder / "unet.json"), max_train_steps=steps,
            learning_rate=1e-3, ema_decay=decay, seed=seed, augment_noise=False, num_validation_images=0,
            logging_steps=50, checkpointing_steps=250, checkpoints_total_limit=1, resume_from_checkpoint="latest",
        )  # fmt: skip
        Trainer(config, TrueNoise(config, truth) if kind == "true" else PNNPRecipe(config)).train()
    pipeline = RawDenoisePipeline.from_pretrained(output)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run(law, seed, folder):
    """Returns `{method: PSNR}`, kept in a file; the noise of the tests is another than that of training."""
    path = folder / f"{law}-{seed}.json"
    if path.is_file():
        return json.loads(path.read_text())
    truth, rng = CameraTruth(*SIZE, law=law, seed=seed), np.random.default_rng([seed, 77])
    scenes = [(clean, float(rng.uniform(*LAWS[law][0]))) for clean in photographs()[1] for _ in range(2)]
    shots = [(simulate_raw(truth, clean * (WHITE - BLACK) / ratio, ISO, rng), clean, ratio) for clean, ratio in scenes]

    def mean(denoise):
        return statistics.mean(
            psnr((denoise(raw, ratio) - BLACK) / (WHITE - BLACK), clean) for raw, clean, ratio in shots
        )

    found = {}
    for kind in KINDS:
        pipeline = denoiser(law, kind, seed, folder)
        found[kind] = mean(lambda raw, ratio, p=pipeline: p(raw, ISO, ratio).images[0])
        if kind == "proxy":
            shading = pipeline.dark.dark_shading(ISO).numpy()
            found["input"] = mean(lambda raw, ratio, s=shading + BLACK: (raw.astype(np.float32) - s) * ratio + BLACK)
            pipeline.dark = None
            found["unshaded"] = mean(lambda raw, ratio, p=pipeline: p(raw, ISO, ratio).images[0])
        print(law, seed, found, flush=True)
    path.write_text(json.dumps(found))
    return found


def plot(folder, path):
    """Law heavy, first seed: a test image developed, and how often noise of a pixel occurs, in logarithms."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    truth, rng, ratio = CameraTruth(*SIZE, law="heavy", seed=0), np.random.default_rng([0, 78]), 200.0
    clean = photographs()[1][1]
    raw = simulate_raw(truth, clean * (WHITE - BLACK) / ratio, ISO, rng)
    panels = {"clean": clean, "noisy": (raw.astype(float) - BLACK) * ratio / (WHITE - BLACK)}
    for kind in ("gaussian", "proxy"):
        pipeline = denoiser("heavy", kind, 0, folder)
        panels[ROWS[kind]] = (pipeline(raw, ISO, ratio).images[0] - BLACK) / (WHITE - BLACK)
    figure_, axes = plt.subplots(1, 5, figsize=(13, 2.2), constrained_layout=True)
    for axis, (title, image) in zip(axes, panels.items(), strict=False):
        axis.imshow(develop(torch.from_numpy(np.ascontiguousarray(image)).float()))
        axis.set(xticks=[], yticks=[], title=title if title == "clean" else f"{title}, {psnr(image, clean):.1f} dB")
    noise = SensorNoisePipeline.from_pretrained(learned("heavy", 0, folder))
    generator = torch.Generator().manual_seed(0)
    edges = np.linspace(-60, 60, 61)
    for title, values in {
        "true": truth.pixel_noise((10**6,), ISO, rng),
        "learned": noise.proxy.sample((1, 10**6), ISO, generator)[0].numpy(),
        "Gaussian": noise.dark.statistic("pixel_std", ISO) * rng.standard_normal(10**6),
    }.items():
        counts = np.histogram(values, edges, density=True)[0]
        style = {"fill": True, "color": "lightgrey"} if title == "true" else {}
        axes[4].stairs(counts + 1e-9, edges, label=title, **style)
    axes[4].set(yscale="log", ylim=(1e-7, 0.3), title="noise of pixels, DN")
    axes[4].legend(fontsize=7)
    for axis in axes[:4]:
        axis.title.set_fontsize(9)
    figure_.savefig(path, dpi=75)
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/pnnp/denoiser"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--laws", nargs="+", default=list(LAWS), choices=list(LAWS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start, folder = time.perf_counter(), arguments.output_dir
    write_clean(folder / "clean")
    results = {law: [run(law, seed, folder) for seed in arguments.seeds] for law in arguments.laws}
    if set(results) != set(LAWS):
        print("the result is written once all laws are there")
        return
    figures = {}
    for law, seeds in results.items():
        differences = {
            f"{law}_gaussian_over_proxy": ("gaussian", "proxy"),
            f"{law}_true_over_gaussian": ("true", "gaussian"),
            f"{law}_proxy_over_input": ("proxy", "input"),
            f"{law}_shading": ("proxy", "unshaded"),
        }
        for key, (one, other) in differences.items():
            values = [found[one] - found[other] for found in seeds]
            figures[key] = figure(statistics.mean(values), "dB", GOALS.get(key), spread(values))
        for method in seeds[0]:
            values = [found[method] for found in seeds]
            figures[f"{law}_{method}"] = figure(statistics.mean(values), "dB", spread=spread(values))
    table = {"of": "PSNR, dB", "rows": ROWS, "columns": {law: f"law {law}" for law in results}}
    command = "python -m benchmarks.pnnp.denoiser"
    write_result("pnnp/denoiser", command, figures, arguments.seeds, time.perf_counter() - start, table, SAYS)
    plot(folder, RESULTS / "pnnp" / "denoiser.png")


if __name__ == "__main__":
    main()
