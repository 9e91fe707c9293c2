"""A camera's noise learned from simulated dark frames whose law is known: three seeds.

    python -m benchmarks.pnnp.proxy     # eight minutes on one core

24 frames each at ISO 400, 800 and 1600 of a sensor whose pixels have noise that no candidate contains: K (2.2 normal +
a one-sided tail on 3 % of values) + 0.8 normal, rounded; with dark shading, rows and columns. Compared are the learned
noise, a Gaussian of the deviation found, Tukey-lambda distributions fitted to the residuals by their quantiles, and
the network trained and read by the conventions of the authors' code: dark frames made smooth by noise of rounding on
their side alone, and correction factors that are extrapolated from the next higher stops, of which those without
frames were never trained. The figure is KL(true | model) of rounded noise, in bins of one DN.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import minimize_scalar

from benchmarks.harness import figure, spread, write_result
from diffusers_ext import (
    CameraTruth,
    DistributionLoss,
    PNNPNoiseConfig,
    PNNPNoiseRecipe,
    SensorNoisePipeline,
    SensorNoiseProxy,
    Trainer,
    noise_divergence,
    simulate_dark_frames,
)
from diffusers_ext.methods.pnnp.noise_recipe import gaussian_start
from diffusers_ext.methods.pnnp.proxy import ISO_STOPS

ISOS, UNSEEN = (400, 800, 1600), 1130
FRAMES, STEPS, DRAWS = 24, 600, 10**6
MODELS = {"proxy": "learned", "original": "authors' conventions", "gaussian": "Gaussian", "tukey": "Tukey-lambda"}
# Written before the run.
GOALS = {
    "over_gaussian_800": "<= 0.5",
    "over_gaussian_1600": "<= 0.5",
    "over_tukey_800": "<= 0.7",
    "over_tukey_1600": "<= 0.7",
    **{f"std_error_{iso}": "<= 0.02" for iso in (*ISOS, UNSEEN)},
}
SAYS = {
    r"over_gaussian_(\d+)": "ISO \\1: the learned noise is {} times as far from the truth as a Gaussian (divergence).",
    r"over_tukey_(\d+)": "ISO \\1: it is {} times as far as a Tukey-lambda distribution.",
    r"over_original_(\d+)": "ISO \\1: it is {} times as far as one trained and read by the authors' conventions.",
    r"std_error_1130": "ISO 1130, of which there were no frames: its deviation is wrong by {:.2%} at most.",
    r"std_error_(\d+)": "ISO \\1: its deviation is wrong by {:.2%} at most.",
    r"original_std_error_1130": "By the authors' conventions it is wrong by {:.1%} at ISO 1130.",
}


def write_frames(truth, seed, folder):
    for iso, frames in simulate_dark_frames(truth, ISOS, FRAMES, seed).items():
        place = folder / str(iso)
        place.mkdir(parents=True, exist_ok=True)
        for i, frame in enumerate(frames):
            np.save(place / f"{i:02d}.npy", frame)


def trained(truth, seed, folder):
    """Learns the noise as a user does, from frames on the disk."""
    output = folder / "noise"
    if not (output / "model_index.json").is_file():
        write_frames(truth, seed, folder / "darks")
        config = PNNPNoiseConfig(
            dark_frames_dir=str(folder / "darks"), camera="sony_a7s2", output_dir=str(output), max_train_steps=STEPS,
            seed=seed, num_validation_images=0, logging_steps=100, checkpointing_steps=200, checkpoints_total_limit=1,
            resume_from_checkpoint="latest",
        )  # fmt: skip
        Trainer(config, PNNPNoiseRecipe(config)).train()
    return SensorNoisePipeline.from_pretrained(output)


def original(dark, seed):
    """Trains the same network, from the same start, by the authors' conventions as far as they are known."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    proxy, loss = SensorNoiseProxy(), DistributionLoss()
    proxy.start_at(*gaussian_start(dark, proxy.config.iso_to_gain))
    optimizer = torch.optim.Adam(proxy.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS, 2e-4)
    for step in range(STEPS):
        which = step % len(ISOS)
        places = torch.randint(dark.residuals.shape[1], (16384,), generator=generator)
        real = dark.residuals[which][places] + torch.rand(16384, generator=generator) - 0.5
        z = torch.randn(2, 1, 16384, generator=generator)
        optimizer.zero_grad()
        loss(proxy(z[0], z[1], ISOS[which])[0], real, generator).backward()
        optimizer.step()
        schedule.step()
    return proxy


@torch.no_grad()
def original_noise(proxy, iso, generator):
    """Noise with the factor that the authors' code reads: a straight line through the stops from `iso` upwards."""
    above = next(i for i, stop in enumerate(ISO_STOPS) if stop >= iso)
    low, high = ISO_STOPS[above], ISO_STOPS[above + 1]
    at = proxy.scaler[above : above + 2].exp()
    factor = ((iso - low) * at[1] + (high - iso) * at[0]) / (high - low)
    gain = (proxy.ISO2K[0] * iso + proxy.ISO2K[1]) * factor
    z = torch.randn(2, DRAWS, generator=generator)
    return gain * proxy.evaluate("nn_pre", z[0]) + proxy.evaluate("nn_fol", z[1])


def tukey(residuals, generator):
    """Noise of the Tukey-lambda distribution whose quantiles are most like the residuals' (highest correlation)."""
    values = residuals.double().sort().values.numpy()
    p = (np.arange(len(values)) + 0.5) / len(values)

    def quantiles(shape, p):
        return np.log(p / (1 - p)) if abs(shape) < 1e-6 else (p**shape - (1 - p) ** shape) / shape

    found = minimize_scalar(
        lambda s: -np.corrcoef(quantiles(s, p), values)[0, 1], bounds=(-0.4, 0.4), method="bounded"
    )
    # Rounding is in the residuals, and comes again to what is drawn.
    scale = np.sqrt((values.var() - 1 / 12) / quantiles(found.x, p).var())
    u = torch.rand(DRAWS, generator=generator, dtype=torch.float64).clamp(1e-12, 1 - 1e-12).numpy()
    return torch.from_numpy(scale * quantiles(found.x, u))


def run_seed(seed, folder):
    """Returns the figures of a seed; they are kept in a file."""
    path = folder / f"seed-{seed}.json"
    if path.is_file():
        return json.loads(path.read_text())
    truth = CameraTruth(seed=seed)
    pipeline = trained(truth, seed, folder / f"seed-{seed}")
    dark, generator = pipeline.dark, torch.Generator().manual_seed(seed + 100)
    theirs, rng, found = original(dark, seed), np.random.default_rng([seed, 9]), {}
    for iso in (*ISOS, UNSEEN):
        true = torch.from_numpy(truth.pixel_noise((DRAWS,), iso, rng))
        models = {
            "proxy": pipeline.proxy.sample((1, DRAWS), iso, generator)[0],
            "original": original_noise(theirs, iso, generator),
            "gaussian": torch.randn(DRAWS, generator=generator) * dark.statistic("pixel_std", iso),
        }
        if iso in ISOS:
            models["tukey"] = tukey(dark.residuals[ISOS.index(iso)], generator)
        for name, noise in models.items():
            found[f"{name}_{iso}"] = noise_divergence(true, noise)
            found[f"{name}_std_{iso}"] = float(noise.double().std()) / truth.pixel_std(iso)
    print(seed, json.dumps(found, indent=1), flush=True)
    path.write_text(json.dumps(found))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/pnnp/proxy"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start, folder = time.perf_counter(), arguments.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    seeds = [run_seed(seed, folder) for seed in arguments.seeds]
    figures = {}
    for iso in ISOS:
        for other in ("gaussian", "tukey", "original"):
            values = [found[f"proxy_{iso}"] / found[f"{other}_{iso}"] for found in seeds]
            key = f"over_{other}_{iso}"
            figures[key] = figure(statistics.mean(values), "ratio", GOALS.get(key), spread(values))
    for iso in (*ISOS, UNSEEN):
        worst = max(abs(found[f"proxy_std_{iso}"] - 1) for found in seeds)
        figures[f"std_error_{iso}"] = figure(worst, "share", GOALS[f"std_error_{iso}"])
    worst = max(abs(found[f"original_std_{UNSEEN}"] - 1) for found in seeds)
    figures[f"original_std_error_{UNSEEN}"] = figure(worst, "share")
    for key in seeds[0]:
        values = [found[key] for found in seeds]
        figures[key] = figure(statistics.mean(values), "KL" if "std" not in key else "ratio", spread=spread(values))
    columns = {name: title for name, title in MODELS.items()}
    table = {"of": "KL(true, model)", "rows": {f"{iso}": f"ISO {iso}" for iso in (*ISOS, UNSEEN)}, "columns": columns}
    command = "python -m benchmarks.pnnp.proxy"
    write_result("pnnp/proxy", command, figures, arguments.seeds, time.perf_counter() - start, table, SAYS)


if __name__ == "__main__":
    main()
