"""Undersampled scans of a patient whom no model has seen, against zero-filled and total-variation reconstruction.

    python -m benchmarks.score_frameworks.reconstruction     # after benchmarks.score_frameworks.brain_models

Of the 64 columns of k-space of patient 2's 23 slices (assets/brains), 17 are measured: the middle 7, and 5 pairs at
random places with their mirrors, so that completing k-space by symmetry adds nothing. The noise is .01 in units in
which images lie in [0, 1]. Total variation gets its best weight on these very slices, which favours it. Each seed has
its own model, mask and noise, and is kept in runs/score_frameworks.
"""

import os
import statistics
import time
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from skimage.restoration import denoise_tv_chambolle

from benchmarks.harness import RESULTS, chosen_seeds, figure, kept_by_seed, write_result
from benchmarks.score_frameworks.brain_models import RUNS, SEEDS, brain_model
from diffusers_ext import FourierSampling, ReconstructionPipeline, asset_path

NOISE = 0.01
WEIGHTS = [0.001, 0.002, 0.004, 0.008, 0.016]
METHODS = {
    "zero_filled": "zero-filled",
    "tv": "total variation",
    "one": "one sample",
    "mean": "mean of 4",
    "pigdm_one": "one sample, PiGDM",
    "pigdm_mean": "mean of 4, PiGDM",
}
# Written before the first run, for the pipeline's default method.
GOALS = {"mean_over_tv": ">= 1.0", "one_over_tv": ">= 0.0"}
SAYS = {
    "mean_over_tv": "The mean of four reconstructions is {:.2f} dB nearer to the truth than total variation.",
    "one_over_tv": "One reconstruction leads total variation by {:.2f} dB.",
    "pigdm_mean_over_tv": "The mean of four by PiGDM, through the network's gradient, leads it by {:.2f} dB.",
    "pigdm_one_over_tv": "One of these by {:.2f} dB.",
    "error_over_deviation": "The error of the mean is {:.2f} times the deviation that four samples show.",
}


def patient_two():
    """Returns the slices of patient 2, `(23, 1, 64, 64)` in [0, 1]."""
    file = np.load(asset_path("brains") / "brains.npz")
    return torch.from_numpy(file["images"][file["patient"] == 2].astype(np.float32) / 255)[:, None]


def lines(seed):
    """Returns the measured columns: the middle 7 and 5 mirrored pairs."""
    chosen = np.random.default_rng(seed).permutation(np.arange(4, 32))[:5]
    mask = torch.zeros(64)
    for k in [0, 1, 2, 3, *chosen]:
        mask[[int(k), -int(k) % 64]] = 1
    assert mask.sum() == 17
    return mask


def total_variation(operator, kspace, weight, steps=60):
    """Minimises half the squared misfit and a weight times total variation (FISTA)."""
    x = y = operator.adjoint(kspace)
    t = 1.0
    for _ in range(steps):
        moved = y + operator.adjoint(kspace - operator.forward(y))
        new = torch.stack([torch.from_numpy(denoise_tv_chambolle(z[0].numpy(), weight))[None] for z in moved])
        t_new = (1 + (1 + 4 * t * t) ** 0.5) / 2
        x, y, t = new, new + (t - 1) / t_new * (new - x), t_new
    return x


def quality(found, truth):
    """Returns mean PSNR and SSIM over the slices."""
    pairs = [(t[0].double().numpy(), f[0].double().clamp(0, 1).numpy()) for t, f in zip(truth, found, strict=True)]
    psnr = [peak_signal_noise_ratio(t, f, data_range=1) for t, f in pairs]
    return {
        "psnr": float(np.mean(psnr)),
        "ssim": float(np.mean([structural_similarity(t, f, data_range=1) for t, f in pairs])),
    }


def scan(seed, generator):
    """Returns the slices, the operator of a seed's lines, and noisy k-space."""
    truth, operator = patient_two(), FourierSampling(lines(seed))
    clean = operator.forward(truth)
    noise = torch.randn(clean.shape, dtype=clean.dtype, generator=generator)
    return truth, operator, clean + NOISE * noise * operator.mask


def images_of(seed):
    """Returns truth, images by method, and the samples' deviation of a seed."""
    truth, operator, kspace = scan(seed, torch.Generator().manual_seed(seed))
    kspace, _ = operator.complete(kspace, NOISE)  # all methods start from completed k-space
    found = {"zero_filled": operator.adjoint(kspace)}
    trials = [total_variation(operator, kspace, weight) for weight in WEIGHTS]
    found["tv"] = max(trials, key=lambda images: quality(images, truth)["psnr"])
    pipeline = ReconstructionPipeline.from_pretrained(brain_model(seed))
    std = None
    for method, ahead in (("pigdm", "pigdm_"), ("proximal", "")):
        generator = torch.Generator().manual_seed(seed)
        output = pipeline(kspace, operator, NOISE, method, generator=generator, output_type="pt")
        found[f"{ahead}one"], found[f"{ahead}mean"], std = output.samples[:, 0], output.images, output.std
    return truth, found, std


def measure(seed):
    start = time.perf_counter()
    truth, found, std = images_of(seed)
    result = {name: quality(images, truth) for name, images in found.items()}
    result["deviation"] = float(std.square().mean().sqrt())
    result["error"] = float((found["mean"] - truth).square().mean().sqrt())
    if seed == SEEDS[0]:
        picture(truth, found, std)
    return result | {"seconds": time.perf_counter() - start}


def picture(truth, found, std):
    """Three slices: the truth, the methods but PiGDM, and the samples' deviation."""
    columns = [truth, *(found[name] for name in ("zero_filled", "tv", "one", "mean")), (4 * std).clamp(max=1)]
    rows = [torch.cat([column[i, 0] for column in columns], 1) for i in (3, 10, 17)]
    pixels = (torch.cat(rows).clamp(0, 1) * 255).byte().numpy()
    path = RESULTS / "score_frameworks" / "reconstruction.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    image.resize((2 * image.width, 2 * image.height), Image.Resampling.BICUBIC).save(path)


def main():
    chosen = chosen_seeds("Compares reconstructions of undersampled scans.", SEEDS)
    warnings.filterwarnings("ignore", module="skimage")
    seeds = kept_by_seed(lambda seed: RUNS / f"reconstruction-{seed}.json", measure, chosen, SEEDS)
    if seeds is None:
        return

    def of(values, unit, goal=None):
        return figure(statistics.mean(values), unit, goal, statistics.stdev(values))

    figures = {
        f"{name}_over_tv": of([s[name]["psnr"] - s["tv"]["psnr"] for s in seeds], "dB", GOALS.get(f"{name}_over_tv"))
        for name in ("mean", "one", "pigdm_mean", "pigdm_one")
    }
    figures["error_over_deviation"] = of([s["error"] / s["deviation"] for s in seeds], "ratio")
    for name in METHODS:
        for kind, unit in (("psnr", "dB"), ("ssim", "")):
            figures[f"{kind}_{name}"] = of([s[name][kind] for s in seeds], unit)
    write_result(
        "score_frameworks/reconstruction",
        "python -m benchmarks.score_frameworks.reconstruction",
        figures,
        SEEDS,
        sum(s["seconds"] for s in seeds),
        {"of": "23 slices of patient 2", "rows": METHODS, "columns": {"psnr": "PSNR in dB", "ssim": "SSIM"}},
        says=SAYS,
    )


if __name__ == "__main__":
    main()
