"""Speech enhancement at 8 kHz, trained from scratch on a CPU: three seeds, three test sets.

    python -m benchmarks.sgmse.experiment --packages runs/sgmse/packages     # twenty minutes a seed on a core

A small network that predicts clean speech is trained on prompts in three languages with coloured noise and music
(sets.py has the data). It is tested on held-out prompts with noise, on them with held-out music, and on unseen
speakers: noisy, after a classical Wiener filter, and enhanced by one call of the network, by 5 ancestral transitions,
and on the noise by the authors' predictor and corrector with 30 steps, 60 calls. Training is in bfloat16, which takes
half the time where the processor has matrix units for it. The run goes on where it was stopped.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import figure, spread, write_result
from benchmarks.sgmse.sets import RATE, make_test_sets, packages_folder, wiener, write_training
from diffusers_ext import (
    SGMSEConfig,
    SGMSERecipe,
    SpeechEnhancementPipeline,
    Trainer,
    estoi,
    pesq_score,
    si_sdr,
)

STEPS = 4000
UNET = {
    "block_out_channels": [32, 48, 64],
    "layers_per_block": 1,
    "add_attention": False,
    "down_block_types": ["SkipDownBlock2D"] * 3,
    "up_block_types": ["SkipUpBlock2D"] * 3,
    "frequency_patch": 8,
    "residual": 0.2,
}
METHODS = {
    "noisy": "noisy",
    "wiener": "Wiener filter",
    "one_call": "one call",
    "ancestral_5": "5 transitions",
    "pc_30": "predictor and corrector, 60 calls",
}
MEASURES = {"si_sdr": "SI-SDR, dB", "estoi": "ESTOI", "pesq": "PESQ"}
# Written before the run. A figure is a mean over sentences of `ancestral_5` minus that of the other; `pc_30` and
# `one_call` are other ways back of the same network.
GOALS = {
    "noise_si_sdr_over_noisy": ">= 3",
    "noise_si_sdr_over_pc_30": ">= 2",
    "noise_estoi_over_noisy": ">= 0.02",
    "noise_estoi_over_wiener": ">= 0",
    "noise_estoi_over_one_call": ">= 0",
    "noise_pesq_over_noisy": ">= 0.2",
    "noise_pesq_over_pc_30": ">= 0",
    "music_si_sdr_over_noisy": ">= 0.7",
    "music_estoi_over_wiener": ">= 0.01",
    "unseen_pesq_over_noisy": ">= 0.2",
}
OPEN = ["noise_si_sdr_over_wiener", "noise_pesq_over_wiener", "noise_si_sdr_over_one_call"]
OPEN += ["music_estoi_over_noisy", "music_pesq_over_noisy", "unseen_si_sdr_over_noisy", "unseen_estoi_over_noisy"]
OPEN += ["unseen_estoi_over_wiener"]
SAYS = {
    r"(\w+)_si_sdr_over_noisy": "Set \\1: 5 transitions gain {} dB of SI-SDR over the recording.",
    r"(\w+)_estoi_over_noisy": "Set \\1: they gain {} of ESTOI.",
    r"(\w+)_pesq_over_noisy": "Set \\1: they gain {} of PESQ.",
    r"(\w+)_si_sdr_over_wiener": "Set \\1: they are {} dB of SI-SDR ahead of the Wiener filter.",
    r"(\w+)_estoi_over_wiener": "Set \\1: they are {} of ESTOI ahead of the Wiener filter.",
    r"(\w+)_pesq_over_wiener": "Set \\1: they are {} of PESQ ahead of the Wiener filter.",
    r"(\w+)_si_sdr_over_one_call": "Set \\1: they are {} dB of SI-SDR ahead of one call.",
    r"(\w+)_estoi_over_one_call": "Set \\1: they are {} of ESTOI ahead of one call.",
    r"(\w+)_si_sdr_over_pc_30": "Set \\1: they are {} dB of SI-SDR ahead of 60 calls of predictor and corrector.",
    r"(\w+)_pesq_over_pc_30": "Set \\1: they are {} of PESQ ahead of 60 calls of predictor and corrector.",
}


def trained(output, data, steps, seed, unet=UNET, **changes):
    """Trains, or goes on training, and returns the pipeline."""
    if not (output / "model_index.json").is_file():
        output.mkdir(parents=True, exist_ok=True)
        (output / "unet.json").write_text(json.dumps(unet))
        values = dict(
            train_data_dir=str(data / "speech"), noise_dir=str(data / "noise"), output_dir=str(output),
            high_pass=100.0, snr_min=-5.0, snr_max=15.0, sample_rate=RATE, n_fft=254, hop_length=64, num_frames=64,
            unet_config=str(output / "unet.json"), prediction_type="sample", algorithm="transitions",
            train_batch_size=6, max_train_steps=steps, learning_rate=2e-3, lr_scheduler="cosine",
            lr_warmup_steps=min(100, steps // 10), ema_decay=0.995, seed=seed, checkpointing_steps=1000,
            checkpoints_total_limit=1, num_validation_images=0, logging_steps=100, mixed_precision="bf16",
            resume_from_checkpoint="latest",
        )  # fmt: skip
        config = SGMSEConfig(**{**values, **changes})
        Trainer(config, SGMSERecipe(config)).train()
    return SpeechEnhancementPipeline.from_pretrained(output)


def way(pipeline, seed, steps, **options):
    """Returns a function of lists of noisy waves: the network's way back by a scheduler of these options."""
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **options)
    sound = {name: pipeline.config[name] for name in ("sample_rate", "n_fft", "hop_length", "exponent", "factor")}
    made = SpeechEnhancementPipeline(pipeline.unet, scheduler, **sound)
    made.set_progress_bar_config(disable=True)
    return lambda waves: (
        made(waves, RATE, num_inference_steps=steps, generator=torch.Generator().manual_seed(seed)).audios
    )


def enhancers(pipeline, seed):
    """Returns the methods as functions of lists of noisy waves."""
    return {
        "noisy": lambda waves: waves,
        "wiener": lambda waves: [wiener(wave) for wave in waves],
        "one_call": way(pipeline, seed, 1, algorithm="transitions"),
        "ancestral_5": way(pipeline, seed, 5, algorithm="transitions", eta=1.0),
        "pc_30": way(pipeline, seed, 30, algorithm="pc"),
    }


def measured(enhance, pairs):
    """Returns the means of the measures over pairs of clean and noisy waves."""
    enhanced = enhance([noisy for _, noisy in pairs])
    values = [
        (si_sdr(found, clean), estoi(found, clean, RATE), pesq_score(found, clean, RATE))
        for found, (clean, _) in zip(enhanced, pairs, strict=True)
    ]
    return dict(zip(MEASURES, np.mean(values, axis=0).tolist(), strict=True))


def run_seed(seed, folder, sets, steps):
    """Returns `{set: {method: {measure: mean}}}` of one seed; it is kept in a file."""
    path = folder / f"seed-{seed}.json"
    if path.is_file():
        return json.loads(path.read_text())
    methods, found = enhancers(trained(folder / f"seed-{seed}", folder / "data", steps, seed), seed), {}
    for name, pairs in sets.items():
        found[name] = {}
        for method, enhance in methods.items():
            if method == "pc_30" and name != "noise":
                continue  # twelve times the calls
            found[name][method] = measured(enhance, pairs)
            print(seed, name, method, found[name][method], flush=True)
    path.write_text(json.dumps(found))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", default="runs/sgmse/packages")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/sgmse/experiment"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--sentences", type=int, default=12)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start, folder = time.perf_counter(), arguments.output_dir
    packages = packages_folder(arguments.packages)
    write_training(packages, folder / "data")
    sets = make_test_sets(packages, arguments.sentences)
    seeds = [run_seed(seed, folder, sets, arguments.steps) for seed in arguments.seeds]

    figures = {}
    for key in [*GOALS, *OPEN]:
        (name, rest), other = key.split("_", 1), key.split("_over_")[1]
        measure = rest.split("_over_")[0]
        values = [found[name]["ancestral_5"][measure] - found[name][other][measure] for found in seeds]
        figures[key] = figure(statistics.mean(values), "difference", GOALS.get(key), spread(values))
    for name in sets:
        for method in seeds[0][name]:
            for measure in MEASURES:
                values = [found[name][method][measure] for found in seeds]
                unit = "dB" if measure == "si_sdr" else "score"
                figures[f"{measure}_{name}_{method}"] = figure(statistics.mean(values), unit, spread=spread(values))
    rows = {f"{name}_{method}": f"{name}: {METHODS[method]}" for name in sets for method in seeds[0][name]}
    table = {"of": "test set and method", "rows": rows, "columns": MEASURES}
    command = "python -m benchmarks.sgmse.experiment"
    write_result("sgmse/experiment", command, figures, arguments.seeds, time.perf_counter() - start, table, SAYS)


if __name__ == "__main__":
    main()
