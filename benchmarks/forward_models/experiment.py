"""Digits that were only ever seen from the side: does diffusion with forward models draw them from one noisy view?

    python -m benchmarks.forward_models.experiment     # an hour on one core

Flatland (flatland.py): a row of 12 pixels with noise of 0.3 is the context, and up to four further rows are sampled,
each with those before it in its context. Compared with regression, which gives the mean digit, and with diffusion
without the novel observation in its loss. What can be had at best is known here: the posterior over the training
digits themselves ("ideal"), and the same sampler with the exact mean of that posterior for its network ("exact").

Goals were taken from trials with one seed of an earlier version. A first run of 2,500 steps missed those of variance;
its figures are on the method's page. Training resumes where it was interrupted, and what is finished is not done again
(runs/forward_models/flatland). The result is benchmarks/results/forward_models/experiment.json with a picture and an
animation beside it.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import math
import statistics
import time

import numpy as np
import torch
from PIL import Image

from benchmarks.forward_models import posterior
from benchmarks.forward_models.flatland import CAMERAS, FURTHER_NOISE, NOISE, angles, camera, digits, views
from benchmarks.forward_models.ship import FOLDER
from benchmarks.forward_models.training import RUNS, SEEDS, drawn, trained, write_observations
from benchmarks.harness import RESULTS, figure, kept, spread, write_result
from diffusers_ext import ForwardModelPipeline

SCALE, SAMPLES, MOST = 4.0, 8, 4
NETWORK = {"angle_harmonics": 4}
SHARED = {
    "signal_shape": "1,8,8", "signal_range": "0,1", "max_context_views": MOST, "max_given_views": 1,
    "observation_noise": NOISE, "context_noise": FURTHER_NOISE, "observation_scale": SCALE, "max_train_steps": 8000,
}  # fmt: skip
NETWORKS = {"diffusion": {}, "no novel view": {"novel_weight": 0.0}, "regression": {"regression": True}}
GOALS = {
    "exact_variance_1": ">= 0.85",
    "exact_energy_1": "<= 0.05",
    "variance_1": ">= 0.25",
    "variance_4": ">= 0.45",
    "energy_1_over_regression": "<= 0.4",
    "energy_4_over_regression": "<= 0.2",
    "energy_growth": "< 1",
    "no_novel_energy_1_over_with": ">= 1.5",
    "context_rmse": "<= 0.33",
    "context_rmse_over_noise": ">= 0.8",
    "mean_of_8_rmse_over_regression": "<= 1.12",
}
UNITS = {"context_rmse": "brightness"}
SAYS = {
    "exact_variance_1": "One sampled view, exact network: {:.2f} of the variance that the context leaves.",
    "exact_energy_1": "One sampled view, exact network: energy distance {} to held-out digits.",
    "variance_1": "One sampled view: signals of one context have {:.2f} of the variance that the context leaves.",
    "variance_4": "Four sampled views: {:.2f} of the variance that the context leaves.",
    r"energy_(\d)_over_regression": (
        r"Energy distance to held-out digits after \1 sampled view(s): {:.2f} times that of regression's mean digits."
    ),
    r"shipped_variance_(\d)": (
        r"The shipped model, of width 156 instead of 256, after \1 sampled view(s): {:.2f} of the variance."
    ),
    "energy_growth": "Every further sampled view brings digits nearer: at most {:.2f} times the distance before it.",
    "no_novel_energy_1_over_with": "Without the novel view in the loss the energy distance is {:.1f} times as large.",
    "context_rmse": "Samples agree with the view that they were drawn from to {:.3f}, whose noise is 0.3.",
    "context_rmse_over_noise": "Which is {:.2f} of that noise: they do not copy it.",
    "mean_of_8_rmse_over_regression": (
        "The mean of 8 samples is off by {:.2f} times what regression is off (from an exact posterior: 1.06)."
    ),
}


def contexts(seed):
    """Returns the held-out digits, the generator, the noisy views, which they are, and which are to be sampled."""
    held_out = digits()[1]
    generator = torch.Generator().manual_seed(100 + seed)
    n = len(held_out)
    which = torch.randint(CAMERAS, (n, 1), generator=generator)
    seen = views(held_out)[torch.arange(n)[:, None], which]
    seen = seen + NOISE * torch.randn(seen.shape, generator=generator)
    others = torch.stack([torch.randperm(CAMERAS - 1, generator=generator)[:MOST] + 1 for _ in range(n)])
    return held_out, generator, seen, which, (which + others) % CAMERAS


def network(name, seed):
    write_observations(RUNS / "flatland" / "observations.npz", views(digits()[0]), angles(len(digits()[0])))
    return trained("flatland", name.replace(" ", "-"), seed, camera(), NETWORK, **{**SHARED, **NETWORKS[name]})


def at(which):
    return angles(len(which)).gather(1, which)


def samples(name, seed):
    """Returns the signals of a network, `(views, contexts, samples, 1, 8, 8)`."""
    _, generator, seen, which, targets = contexts(seed)
    targets = targets[:, :1] if name == "no novel view" else targets
    count = 1 if name == "regression" else SAMPLES
    return drawn(network(name, seed), (seen, at(which)), at(targets), count, generator)


def bounds(seed):
    """Measures the posterior over the training digits, and the sampler with its exact mean."""
    held_out, generator, seen, which, targets = contexts(seed)
    known = digits()[0]
    candidates = views(known)
    likelihood = posterior.log_likelihood(candidates, seen, which, NOISE)
    best = posterior.ideal(known, likelihood, SAMPLES, generator)

    def observe(signals, view):
        return camera()(signals, at(view[:, None]))

    arguments = (known, candidates, likelihood, targets, observe, SCALE, FURTHER_NOISE, generator)
    runs = [posterior.exact(*arguments) for _ in range(4)]
    exact = torch.stack(runs, 2)
    return {
        "ideal_energy": posterior.energy(best, held_out),
        "ideal_variance": posterior.variance(best),
        "effective_number": posterior.effective_number(likelihood),
        "exact_energy": [posterior.energy(part, held_out) for part in exact],
        "exact_variance": [posterior.variance(part) for part in exact],
    }


def rmse(a, b):
    return (a - b).square().mean().sqrt().item()


def measure(seed):
    """Returns all that is measured with a seed's networks."""
    held_out, _, seen, which, _ = contexts(seed)
    found = kept(RUNS / "flatland" / f"seed-{seed}" / "bounds.json", lambda: bounds(seed))
    for name in NETWORKS:
        signals = samples(name, seed)
        found[f"{name}/energy"] = [posterior.energy(part, held_out) for part in signals]
        if name == "regression":
            found["regression/rmse"] = rmse(signals[-1].mean(1), held_out)
            continue
        found[f"{name}/variance"] = [posterior.variance(part) for part in signals]
        found[f"{name}/rmse of the mean"] = rmse(signals[-1].mean(1), held_out)
        again = camera()(signals[-1].flatten(0, 1), at(which)[:, 0].repeat_interleave(SAMPLES)).unflatten(
            0, (-1, SAMPLES)
        )
        found[f"{name}/context rmse"] = rmse(again, seen.expand(-1, SAMPLES, -1, -1))
    return found


def shipped(seed):
    """Measures the model that ships, which is narrower, on a seed's contexts."""
    held_out, generator, seen, which, targets = contexts(seed)
    pipeline = ForwardModelPipeline.from_pretrained(FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    signals = drawn(pipeline, (seen, at(which)), at(targets), SAMPLES, generator)
    return {
        "energy": [posterior.energy(part, held_out) for part in signals],
        "variance": [posterior.variance(part) for part in signals],
    }


def values(m):
    """Returns the figures of one seed."""
    own, regressed, left = m["diffusion/energy"], m["regression/energy"][0], m["ideal_variance"]
    found = {
        "ideal_energy": m["ideal_energy"],
        "effective_number_of_digits": m["effective_number"],
        "energy_1_over_regression": own[0] / regressed,
        "energy_4_over_regression": own[3] / regressed,
        "energy_growth": max(later / before for before, later in zip(own, own[1:], strict=False)),
        "no_novel_energy_1_over_with": m["no novel view/energy"][0] / own[0],
        "energy_regression": regressed,
        "energy_1_no_novel": m["no novel view/energy"][0],
        "variance_1_no_novel": m["no novel view/variance"][0] / left,
        "context_rmse": m["diffusion/context rmse"],
        "context_rmse_over_noise": m["diffusion/context rmse"] / NOISE,
        "mean_of_8_rmse_over_regression": m["diffusion/rmse of the mean"] / m["regression/rmse"],
    }
    for i in range(MOST):
        found[f"energy_{i + 1}"] = own[i]
        found[f"variance_{i + 1}"] = m["diffusion/variance"][i] / left
        found[f"shipped_energy_{i + 1}"] = m["shipped"]["energy"][i]
        found[f"shipped_variance_{i + 1}"] = m["shipped"]["variance"][i] / left
        found[f"exact_energy_{i + 1}"] = m["exact_energy"][i]
        found[f"exact_variance_{i + 1}"] = m["exact_variance"][i] / left
    return found


def unit(name):
    if "over" in name or "variance" in name or name == "energy_growth":
        return "ratio"
    return UNITS.get(name, "digits" if name.startswith("effective") else "distance")


def report(measured, seconds):
    """Writes what there is after so many seeds."""
    each = [values(m) for m in measured]
    figures = {
        name: figure(
            statistics.mean(v[name] for v in each), unit(name), GOALS.get(name), spread([v[name] for v in each])
        )
        for name in each[0]
    }
    table = {
        "of": "sampled views",
        "rows": {str(i + 1): str(i + 1) for i in range(MOST)},
        "columns": {
            "energy": "energy distance",
            "variance": "variance, of what the context leaves",
            "shipped_energy": "energy distance, shipped model",
            "shipped_variance": "variance, shipped model",
            "exact_energy": "energy distance, exact network",
            "exact_variance": "variance, exact network",
        },
    }
    write_result(
        "forward_models/experiment", "python -m benchmarks.forward_models.experiment", figures, SEEDS[: len(each)],
        seconds, table, says=SAYS,
    )  # fmt: skip


def picture(path, rows=7):
    """Contexts, held-out digits, samples of them, and what the baselines make of them; the first seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    held_out, _, seen, which, _ = contexts(0)
    signals, mean, plain = samples("diffusion", 0), samples("regression", 0)[0], samples("no novel view", 0)[0]
    columns = [("held out", held_out), ("regression", mean[:, 0]), ("1 view,\nno novel view", plain[:, 0])]
    for view, sample in ((1, 0), (4, 0), (4, 1), (4, 2), (4, 3)):
        columns.append((f"{view} view{'s' * (view > 1)}", signals[view - 1][:, sample]))
    figure_, axes = plt.subplots(rows, len(columns) + 1, figsize=(1.15 * (len(columns) + 1), 1.15 * rows + 0.5))
    for i, row in enumerate(axes):
        row[0].imshow(seen[i, 0].numpy(), cmap="gray", vmin=-1, vmax=1, aspect=6)
        row[0].set_ylabel(f"{45 * int(which[i])} degrees", fontsize=7)
        for axis, (_, images) in zip(row[1:], columns, strict=True):
            axis.imshow(images[i, 0].numpy(), cmap="gray", vmin=0, vmax=1)
    for axis, title in zip(axes[0], ["context: a\nnoisy row", *(title for title, _ in columns)], strict=True):
        axis.set_title(title, fontsize=8)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure_.tight_layout(pad=0.3)
    figure_.savefig(path, dpi=80)
    plt.close(figure_)


def animation(path, frames=36, scenes=3):
    """A camera on its way around scenes that were drawn from a single view each; what it sees is below."""
    held_out, _, seen, which, _ = contexts(0)
    signals = torch.cat([held_out[:scenes], samples("diffusion", 0)[-1][:scenes, 0]])
    found = []
    for frame in range(frames):
        turn = torch.full((len(signals),), 2 * math.pi * frame / frames)
        rows = camera()(signals, turn)
        tiles = []
        for signal, row, angle in zip(signals, rows, turn.tolist(), strict=True):
            tile = np.zeros((150, 110), np.uint8)
            digit = Image.fromarray((signal[0].numpy() * 255).astype(np.uint8)).resize(
                (64, 64), Image.Resampling.NEAREST
            )
            tile[23:87, 23:87] = np.asarray(digit)
            x, y = 55 + 48 * math.sin(angle), 55 - 48 * math.cos(angle)  # at angle 0 above, looking down
            tile[int(y) - 3 : int(y) + 4, int(x) - 3 : int(x) + 4] = 255
            shown = Image.fromarray(((row.numpy() + 1) * 127.5).astype(np.uint8)).resize(
                (96, 24), Image.Resampling.NEAREST
            )
            tile[120:144, 7:103] = np.asarray(shown)
            tiles.append(tile)
        top, bottom = np.concatenate(tiles[:scenes], 1), np.concatenate(tiles[scenes:], 1)
        found.append(Image.fromarray(np.concatenate([top, np.full((4, top.shape[1]), 90, np.uint8), bottom])))
    found[0].save(path, save_all=True, append_images=found[1:], duration=100, loop=0, optimize=True)


def main():
    torch.set_num_threads(1)
    start, measured = time.process_time(), []
    for seed in SEEDS:
        folder = RUNS / "flatland" / f"seed-{seed}"
        found = kept(folder / "measured.json", lambda seed=seed: measure(seed))
        measured.append({**found, "shipped": kept(folder / "shipped.json", lambda seed=seed: shipped(seed))})
        print(f"seed {seed} after {time.process_time() - start:.0f} s of the processor", flush=True)
        report(measured, time.process_time() - start)
        if seed == 0:
            picture(RESULTS / "forward_models" / "experiment.png")
            animation(RESULTS / "forward_models" / "scene.gif")


if __name__ == "__main__":
    main()
