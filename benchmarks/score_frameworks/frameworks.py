"""One trained denoiser under DDPM, NCSN and SDEs: how many calls of the network do samples of equal quality take?

    python -m benchmarks.score_frameworks.frameworks     # half an hour on one core

The shipped model of digits, trained as a DDPM, draws 250 images under each framework by exchanging the scheduler
alone. They are compared with 750 digits that it has not seen, by the Frechet distance in the features of a classifier;
250 other real digits are the floor. Then the probability flow with adaptive and with fixed steps, by its distance from
an exact solution of the same start.

What is finished is not done again (runs/score_frameworks/frameworks), so that a run goes on where it stopped.
"""

import math
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor

from benchmarks.harness import RESULTS, figure, kept, spread, write_result
from diffusers_ext import (
    AnnealedLangevinScheduler,
    ImageClassifierFeatures,
    ScoreSDEScheduler,
    asset_path,
    extract_features,
    frechet_distance,
    solve_probability_flow,
)

RUNS = Path(__file__).resolve().parents[2] / "runs" / "score_frameworks" / "frameworks"
SEEDS, COUNT, BATCH = [0, 1, 2], 250, 50

PLAIN = {"corrector_steps": 0}
SAMPLERS = {
    "ddpm": (DDPMScheduler, {"variance_type": "fixed_small", "timestep_spacing": "trailing"}),
    "ncsn": (AnnealedLangevinScheduler, {"steps_per_level": 3}),  # the best of 1 to 5 for 100 calls on Gaussian data
    "ve": (ScoreSDEScheduler, {"sde": "ve", "predictor": "ancestral", **PLAIN}),
    "ve_from_50": (ScoreSDEScheduler, {"sde": "ve", "predictor": "ancestral", "sigma_max": 50.0, **PLAIN}),
    "ve_reverse": (ScoreSDEScheduler, {"sde": "ve", **PLAIN}),
    "vp": (ScoreSDEScheduler, {"sde": "vp", **PLAIN}),
    "subvp": (ScoreSDEScheduler, {"sde": "subvp", "predictor": "euler_maruyama", **PLAIN}),
}
TITLES = {
    "ddpm": "DDPM",
    "ncsn": "NCSN",
    "ve": "VE, ancestral",
    "ve_from_50": "VE from 50",
    "ve_reverse": "VE, reverse",
    "vp": "VP, reverse",
    "subvp": "sub-VP, Euler",
}
CALLS = 100
# The three frameworks over several numbers of calls; the other samplers make `CALLS`.
CURVES = {"ddpm": (5, 10, 20, 50, 100), "ncsn": (20, 50, 100), "ve": (5, 10, 20, 50, 100)}
FLOW_COUNT = 16
FLOW_STEPS, TOLERANCES, EXACT = (20, 40, 80, 160, 320), (1e-1, 1e-2, 1e-3, 1e-4), 1e-5

# Written before the run. No goal for NCSN, whose sampler is known to need more calls, nor for the flow's steps.
GOALS = {
    "fd_ve_over_ddpm": "<= 1.3",
    "fd_ve_from_50_over_ddpm": "<= 1.7",
    "fd_ve_reverse_over_ddpm": "<= 1.7",
    "fd_vp_over_ddpm": "<= 1.7",
    "fd_subvp_over_ddpm": "<= 1.7",
}

SAYS = {
    "fd_ve_over_ddpm": "The DDPM as a VE process with ancestral steps: {:.2f} times DDPM's Frechet distance.",
    "fd_ve_from_50_over_ddpm": (
        "Started at sigma 50 in place of the network's own 14.6, as Score SDE does: {:.2f} times DDPM's."
    ),
    "fd_ve_reverse_over_ddpm": "With Score SDE's reverse diffusion steps: {:.2f} times.",
    "fd_vp_over_ddpm": "As a VP process with reverse diffusion steps: {:.2f} times.",
    "fd_subvp_over_ddpm": "As a sub-VP process with Euler-Maruyama's: {:.2f} times.",
    "fd_ncsn_over_ddpm": "By annealed Langevin dynamics: {:.2f} times.",
    "fd_100_ddpm": "DDPM's distance after 100 calls is {:.1f}.",
    "fd_floor": "Real digits, as many, are {:.1f} away.",
    "calls_ncsn": "NCSN takes {:.0f} calls to the least distance that all three frameworks reach.",
    "calls_ddpm": "DDPM takes {:.0f} calls, or less, to the least distance that all three frameworks reach.",
    "calls_ve": "VE takes {:.0f} calls, or less, to the least distance that all three frameworks reach.",
    "calls_ddpm_to_2.5_floors": "DDPM takes {:.0f} calls to 2.5 times the distance of real digits.",
    "calls_ve_to_2.5_floors": "VE takes {:.0f} calls to 2.5 times the distance of real digits.",
    "flow_calls_(adaptive|fixed)_to_0.01": (
        "The flow is followed to an rms error of 0.01 in {:.0f} calls an image with \\1 steps."
    ),
    "flow_adaptive_over_fixed": "That is {:.2f} times the calls of fixed steps.",
}


def pipeline():
    pipe = DiffusionPipeline.from_pretrained(asset_path("digits-epsilon"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def scheduler_of(name, pipe):
    kind, settings = SAMPLERS[name]
    return kind.from_config({**pipe.scheduler.config, "clip_sample": False}, **settings)


def steps_of(name, calls):
    """Returns how many levels or steps make so many calls, or up to two less; an NCSN's last call denoises."""
    return (calls - 1) // SAMPLERS[name][1]["steps_per_level"] if name == "ncsn" else calls


def draw(name, pipe, calls, seed):
    """Returns `(COUNT, 1, 28, 28)` images in [-1, 1]."""
    pipe.scheduler = scheduler_of(name, pipe)
    generator = torch.Generator().manual_seed(seed)
    images = [
        pipe(BATCH, num_inference_steps=steps_of(name, calls), generator=generator, output_type="pt").images
        for _ in range(COUNT // BATCH)
    ]
    assert calls - 3 < pipe.num_timesteps <= calls, (name, pipe.num_timesteps)
    return torch.cat(images) * 2 - 1


def distances(seed, pipe, features, real):
    """Returns the Frechet distance of every sampler and number of calls."""
    stock = pipe.scheduler

    def one(name, calls):
        pipe.scheduler = stock
        images = draw(name, pipe, calls, seed)
        if seed == SEEDS[0] and calls == CALLS:
            np.save(RUNS / f"{name}.npy", images[:32].numpy())
        return frechet_distance(extract_features(images, features), real)

    wanted = [(name, CALLS) for name in SAMPLERS]
    wanted += [(name, c) for name, calls in CURVES.items() for c in reversed(calls) if c != CALLS]
    return {
        f"{calls}_{name}": kept(RUNS / f"seed-{seed}" / f"{name}-{calls}.json", lambda n=name, c=calls: one(n, c))
        for name, calls in wanted
    }


def flow_errors(seed, pipe):
    """Returns calls an image and rms error of the flow from one start, by fixed steps and by tolerances of RK45."""
    made = ScoreSDEScheduler.from_config(pipe.scheduler.config, sde="ve", predictor="probability_flow", **PLAIN)
    start = made.init_noise_sigma * randn_tensor(
        (FLOW_COUNT, 1, 28, 28), generator=torch.Generator().manual_seed(seed)
    )

    def solved(tolerance):
        found, calls = solve_probability_flow(pipe.unet, made, start, rtol=tolerance, atol=tolerance)
        return found, calls.double().mean().item()

    exact, _ = solved(EXACT)

    def error(images):
        return (images - exact).square().mean().sqrt().item()

    found = {"adaptive": [], "fixed": []}
    for tolerance in TOLERANCES:
        images, calls = solved(tolerance)
        found["adaptive"].append([calls, error(images)])
    for steps in FLOW_STEPS:
        made.set_timesteps(steps)
        x = start
        for t in made.timesteps[:-1]:  # to the smallest level, where RK45 ends too
            x = made.step(pipe.unet(made.scale_model_input(x, t), t).sample, t, x).prev_sample
        found["fixed"].append([steps - 1, error(x)])
    return found


def crossing(points, level):
    """Returns at how many calls a falling row of (calls, value) reaches a level, log-linear between points.

    Beyond the last point its last slope goes on.
    """
    points = sorted(points)
    for i, ((c0, v0), (c1, v1)) in enumerate(zip(points, points[1:], strict=False)):
        if v1 <= level or i == len(points) - 2:
            share = (math.log(level) - math.log(v0)) / (math.log(v1) - math.log(v0))
            return max(points[0][0], math.exp(math.log(c0) + share * (math.log(c1) - math.log(c0))))
    raise AssertionError("there are two points or more")


def report(measured, flows, floor, seconds):
    def mean(values, unit, goal=None):
        return figure(statistics.mean(values), unit, goal, spread(values))

    figures = {"fd_floor": figure(floor, "distance")}
    for name in measured[0]:
        figures[f"fd_{name}"] = mean([m[name] for m in measured], "distance")
    for name in SAMPLERS:
        if name != "ddpm":
            ratios = [m[f"{CALLS}_{name}"] / m[f"{CALLS}_ddpm"] for m in measured]
            key = f"fd_{name}_over_ddpm"
            figures[key] = mean(ratios, "ratio", GOALS.get(key))
    # The distance that all three reach, of the mean over seeds.
    curves = {n: [(c, statistics.mean(m[f"{c}_{n}"] for m in measured)) for c in calls] for n, calls in CURVES.items()}
    common = max(min(v for _, v in curve) for curve in curves.values())
    figures["fd_common"] = figure(common, "distance")
    for name, curve in curves.items():
        figures[f"calls_{name}"] = figure(crossing(curve, common), "calls")
        if name != "ncsn":  # which does not come so far
            figures[f"calls_{name}_to_2.5_floors"] = figure(crossing(curve, 2.5 * floor), "calls")
    for kind in ("adaptive", "fixed"):
        for i in range(len(flows[0][kind])):
            setting = f"{TOLERANCES[i]:g}" if kind == "adaptive" else FLOW_STEPS[i]
            figures[f"flow_error_{kind}_{setting}"] = mean([f[kind][i][1] for f in flows], "rms")
            figures[f"flow_calls_{kind}_{setting}"] = mean([f[kind][i][0] for f in flows], "calls")
    least = {kind: [crossing(f[kind], 0.01) for f in flows] for kind in ("adaptive", "fixed")}
    for kind, values in least.items():
        figures[f"flow_calls_{kind}_to_0.01"] = mean(values, "calls")
    ratios = [a / b for a, b in zip(least["adaptive"], least["fixed"], strict=True)]
    figures["flow_adaptive_over_fixed"] = mean(ratios, "ratio")
    columns = {f"fd_{calls}": f"{calls} calls" for calls in CURVES["ddpm"]}
    table = {"of": "Frechet distance", "rows": TITLES, "columns": columns}
    command = "python -m benchmarks.score_frameworks.frameworks"
    write_result(
        "score_frameworks/frameworks", command, figures, SEEDS[: len(measured)], seconds, table=table, says=SAYS
    )
    plot(figures, RESULTS / "score_frameworks" / "frameworks.png")


def plot(figures, path):
    """Samples of each framework after 100 calls, and the flow's error over calls."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure_, axes = plt.subplots(2, 4, figsize=(13.5, 6.4), constrained_layout=True)
    for axis, name in zip(axes.flat, SAMPLERS, strict=False):
        images = (np.load(RUNS / f"{name}.npy")[:25, 0].clip(-1, 1) + 1) / 2
        rows = [np.concatenate(list(row), 1) for row in images.reshape(5, 5, 28, 28)]
        axis.imshow(np.concatenate(rows), cmap="gray", vmin=0, vmax=1)
        axis.set_title(f"{TITLES[name]}: FD {figures[f'fd_{CALLS}_{name}']['value']:.1f}", fontsize=10)
        axis.axis("off")
    last = axes.flat[-1]
    for kind, settings in (("adaptive", [f"{t:g}" for t in TOLERANCES]), ("fixed", FLOW_STEPS)):
        points = [tuple(figures[f"flow_{what}_{kind}_{s}"]["value"] for what in ("calls", "error")) for s in settings]
        last.plot(*zip(*points, strict=True), marker="o", label=f"{kind} steps")
    last.set(xscale="log", yscale="log", xlabel="calls of the network", ylabel="rms error of the flow")
    last.set_xticks(FLOW_STEPS, FLOW_STEPS)
    last.minorticks_off()
    last.legend()
    figure_.savefig(path, dpi=75)


def main():
    torch.set_num_threads(1)
    start = time.perf_counter()
    judge = ImageClassifierFeatures.from_pretrained(asset_path("digits-classifier")).eval()
    with np.load(asset_path("digits") / "digits.npz") as file:
        digits = torch.from_numpy(file["images"])[:, None].float() / 127.5 - 1
    real, others = (extract_features(part, judge.features) for part in (digits[COUNT:], digits[:COUNT]))
    floor, pipe = frechet_distance(others, real), pipeline()
    RUNS.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        measured, flows = [], []
        stock = pipe.scheduler
        for seed in SEEDS:
            pipe.scheduler = stock
            flows.append(kept(RUNS / f"seed-{seed}" / "flow.json", lambda s=seed: flow_errors(s, pipe)))
            measured.append(distances(seed, pipe, judge.features, real))
            print(f"seed {seed} done after {time.perf_counter() - start:.0f} s", flush=True)
            report(measured, flows, floor, time.perf_counter() - start)


if __name__ == "__main__":
    main()
