"""What schedulers and pipelines cost beside the network's calls.

    python -m benchmarks.score_frameworks.speed     # three minutes on a core

Ratios of two things that are measured in turn, in seconds of the processor, of which other work on the machine takes
little; the network is the shipped one of digits, 0.28 M weights at 28x28. Simplex noise, which training draws
anew in every step, is measured beside a step of a network of 0.8 M weights at 64x64.
"""

import statistics
import time

import torch
from diffusers import DiffusionPipeline

from benchmarks.harness import figure, interleaved, small_unet, write_result
from diffusers_ext import (
    AnnealedLangevinScheduler,
    FourierSampling,
    ReconstructionPipeline,
    ScoreSDEScheduler,
    SimplexNoise,
    StepRNG,
    asset_path,
    solve_probability_flow,
)

BATCH, STEPS, REPEATS = 16, 5, 7

# Written before the run.
GOALS = {
    "scheduler": "<= 1.02",
    "batch_over_single": "<= 1",
    "proximal_over_pigdm": "<= 0.6",
    "simplex_over_training_step": "<= 0.15",
}

SAYS = {
    "scheduler_vp": "Sampling a VP process with corrector takes {:.3f} times the time of its network calls.",
    "scheduler_ve": "A VE process with ancestral steps takes {:.3f} times.",
    "scheduler_subvp": "A sub-VP process with Euler-Maruyama's takes {:.3f} times.",
    "scheduler_langevin": "Annealed Langevin dynamics takes {:.3f} times.",
    "batch_over_single": "An image in a batch of 16 takes {:.2f} times as long as alone.",
    "flow_batch_over_single": (
        "With adaptive steps, each image its own, it takes {:.2f} times: images that are done leave the batch."
    ),
    "proximal_over_pigdm": (
        "A proximal step of reconstruction takes {:.2f} times as long as a step of PiGDM, which goes back through the "
        "network."
    ),
    "simplex_over_training_step": (
        "Drawing simplex noise takes {:.1%} of the time of a training step of a network of 0.8 M weights at 64x64."
    ),
}

SCHEDULERS = {
    "vp": (ScoreSDEScheduler, {}),
    "ve": (ScoreSDEScheduler, {"sde": "ve", "predictor": "ancestral", "corrector_steps": 0}),
    "subvp": (ScoreSDEScheduler, {"sde": "subvp", "predictor": "euler_maruyama", "corrector_steps": 0}),
    "langevin": (AnnealedLangevinScheduler, {}),
}


def schedulers(pipe):
    """Returns how much longer a step is with a scheduler than its network call alone, both timed in one loop."""
    unet, figures = pipe.unet, {}
    x = torch.randn(BATCH, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    for name, (kind, settings) in SCHEDULERS.items():
        scheduler = kind.from_config(pipe.scheduler.config, **settings)
        own, calls = [], []
        for _ in range(REPEATS):
            scheduler.set_timesteps(STEPS)
            y, generator = x * scheduler.init_noise_sigma, torch.Generator().manual_seed(0)
            for t in scheduler.timesteps:
                times = [time.process_time()]
                scaled = scheduler.scale_model_input(y, t)
                times.append(time.process_time())
                output = unet(scaled, t, return_dict=False)[0]
                times.append(time.process_time())
                y = scheduler.step(output, t, y, generator=generator, return_dict=False)[0]
                times.append(time.process_time())
                own.append(times[1] - times[0] + times[3] - times[2])
                calls.append(times[2] - times[1])
        taken = 1 + statistics.median(own) / statistics.median(calls)
        figures[f"scheduler_{name}"] = figure(taken, "ratio", GOALS["scheduler"])
    return figures


def batches(pipe):
    """Returns what an image takes in a batch over what it takes alone, with fixed and with adaptive steps."""
    scheduler = ScoreSDEScheduler.from_config(pipe.scheduler.config, **SCHEDULERS["ve"][1])
    pipe.scheduler = scheduler

    def drawn(count):
        for start in range(0, BATCH, count):
            generators = [torch.Generator().manual_seed(i) for i in range(start, start + count)]
            pipe(count, num_inference_steps=STEPS, generator=generators, output_type="latent")

    noise = torch.randn(BATCH, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma

    def solved(count):
        for part in noise.split(count):
            solve_probability_flow(pipe.unet, scheduler, part, rtol=0.1, atol=0.1)

    ways = {
        "batch": lambda: drawn(BATCH),
        "single": lambda: drawn(1),
        "flow batch": lambda: solved(BATCH),
        "flow single": lambda: solved(1),
    }
    times = interleaved(ways, 3, time.process_time)
    return {
        "batch_over_single": figure(times["batch"] / times["single"], "ratio", GOALS["batch_over_single"]),
        "flow_batch_over_single": figure(times["flow batch"] / times["flow single"], "ratio"),
    }


def reconstructions(pipe):
    """Returns what a step of reconstruction takes without over one with derivatives of the network."""
    pipeline = ReconstructionPipeline(pipe.unet, pipe.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    operator = FourierSampling(torch.arange(28) % 2 == 0)
    kspace = operator.forward(torch.rand(BATCH // 4, 1, 28, 28, generator=torch.Generator().manual_seed(0)))

    def rebuilt(method):
        generator = torch.Generator().manual_seed(0)
        pipeline(kspace, operator, 0.01, method, STEPS, generator=generator, output_type="pt")

    ways = {method: lambda method=method: rebuilt(method) for method in ("proximal", "pigdm")}
    times = interleaved(ways, REPEATS, time.process_time)
    return {"proximal_over_pigdm": figure(times["proximal"] / times["pigdm"], "ratio", GOALS["proximal_over_pigdm"])}


def simplex():
    """Returns what a batch of simplex noise takes over a training step that draws none."""
    model, rng, noise = small_unet(64, 1, (28, 56, 56), 4), StepRNG(), SimplexNoise()
    optimizer = torch.optim.AdamW(model.parameters())
    x0, target = torch.randn(2, BATCH, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    timesteps = torch.arange(BATCH)

    def step():
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x0, timesteps, return_dict=False)[0], target).backward()
        optimizer.step()

    times = interleaved({"noise": lambda: noise(x0, rng=rng), "step": step}, REPEATS, time.process_time)
    share = times["noise"] / times["step"]
    return {"simplex_over_training_step": figure(share, "share", GOALS["simplex_over_training_step"])}


def main():
    torch.set_num_threads(1)
    start = time.perf_counter()
    pipe = DiffusionPipeline.from_pretrained(asset_path("digits-epsilon"))
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        figures = {**reconstructions(pipe), **schedulers(pipe), **batches(pipe)}
    figures |= simplex()
    command = "python -m benchmarks.score_frameworks.speed"
    write_result("score_frameworks/speed", command, figures, [0], time.perf_counter() - start, says=SAYS)


if __name__ == "__main__":
    main()
