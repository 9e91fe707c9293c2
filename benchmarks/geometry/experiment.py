"""What do six estimators of local dimension say of trained networks, and does a gauge move what it must not? Digits.

    python -m benchmarks.geometry.experiment [--seeds 0]     # half an hour a seed on two free cores

scikit-learn's digits, 8x8 pixels in [-1, 1], projected on their first 8 principal components: the dimension is 8, of
64 values. A residual MLP and a UNet learn to predict the noise. Measured on held-out digits: all estimators by noise
level and the Stein residual; then samples, log-likelihoods and estimators of the MLP with a gauge on top. Two more
MLPs learn a mixture of classes of 4 and of 12 dimensions, and whole digits. The shipped model of 28x28 digits is
asked for a plateau.

Each stage is kept under runs/geometry and not done again; training goes on from its last checkpoint. The result is
benchmarks/results/geometry/experiment.json with two pictures beside it.
"""

import argparse
import re
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DModel
from safetensors.torch import load_file, save_file
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.neighbors import NearestNeighbors
from torch import nn

from benchmarks.harness import RESULTS, figure, kept, spread, write_result
from diffusers_ext import (
    ScoreField,
    exact_jacobian,
    find_plateau,
    frechet_distance,
    gauge_transform,
    load_images,
    local_dimension,
    log_likelihood,
    probability_flow,
    stein_residual,
)
from diffusers_ext.data.assets import ASSETS
from diffusers_ext.data.digits import DIGITS

ROOT = Path(__file__).resolve().parent.parent.parent
RUNS, PICTURES = ROOT / "runs" / "geometry", RESULTS / "geometry"
SEEDS = (0, 1, 2)
NETWORKS = {"mlp": (6000, 256), "unet": (2500, 64)}  # steps and batch
SIGMAS = (0.0101, 0.03, 0.08, 0.13, 0.18, 0.26)
TRUSTED = (0.13, 0.18, 0.26)  # levels at which the goals are asked for
TRAIN, PROBED = 1500, 24
C, KAPPA = 0.25, 0.9

# Written before the runs.
GOALS = {
    r"nb_error_(mlp|unet)": "<= 0.7",
    r"dsm_error_(mlp|unet)": "<= 1.2",
    r"flipd_error_mlp": "<= 1.5",
    r"plateau_error_(mlp|unet)": "<= 0.5",
    r"residual_low_(mlp|unet)": "> 0.1",
    r"residual_high_(mlp|unet)": "<= 0.1",
    r"gauge_frechet_over_halves": "<= 1",
    r"gauge_log_p_shift": "< 1.5",
    r"gauge_trace_shift": "< 0.05",
    r"local_flipd_identity": "< 0.001",
    r"mixed_auc": ">= 0.95",
    r"uncut_spearman": ">= 0.6",
    r"shipped_plateaus": "<= 0",
    r"shipped_mean_plateau": "<= 0",
}

SAYS = {
    r"nb_error_(\w+)": "{:.2f} is the largest error of the normal bundle at sigma 0.13 to 0.26; 8 is true (\\1).",
    r"dsm_error_(\w+)": "{:.2f} is the largest error of the denoising loss at sigma 0.13 to 0.26 (\\1).",
    r"flipd_error_(\w+)": "{:.2f} is the largest error of FLIPD at sigma 0.13 to 0.26 (\\1).",
    r"plateau_error_(\w+)": "{:.2f} off is the plateau of the mean curve of the denoising loss (\\1).",
    r"residual_low_(\w+)": "At sigma 0.01 and 0.03 the Stein residual is at least {:.2f} of the loss: no score (\\1).",
    r"residual_high_(\w+)": "At sigma 0.08 the Stein residual is {:.2f} of the loss (\\1).",
    "gauge_frechet_over_halves": "Samples with a gauge on top are {:.2f} times as far from digits as digits are.",
    "gauge_log_p_shift": "The gauge moves log-likelihoods by {:.2f} nats, of 64 values.",
    "gauge_trace_shift": "The gauge moves the dimension by the trace by {:.3f}.",
    "local_flipd_identity": "A local gauge moves FLIPD by what its formula says, but for {:.1e}.",
    "mixed_auc": "Classes of 12 dimensions have a larger dimension than those of 4 with probability {:.3f}.",
    "uncut_spearman": "Mean dimensions of the classes of whole digits rank as nearest neighbours do: {:.2f}.",
    "uncut_spearman_held_out": "Of held-out digits, which the network of 1,500 digits knows less well, it is {:.2f}.",
    "shipped_plateaus": "Of eight 28x28 digits, the shipped model's curve has a plateau for {:.0f}.",
    "shipped_mean_plateau": "Their mean curve has {:.0f} plateaus.",
}


class ResidualMLP(nn.Module):
    """1.4 M weights: (x, t) -> noise. Without normalisation, whose derivative is far from that of a score."""

    def __init__(self, dim=64, width=384, blocks=4):
        super().__init__()
        self.into, self.out = nn.Linear(dim, width), nn.Linear(width, dim)
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(blocks)
        )
        self.register_buffer("frequencies", torch.exp(torch.linspace(0, np.log(1000), 32)) / 1000)

    def forward(self, x, timestep):
        angles = timestep[:, None].to(x) * self.frequencies
        time = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        h = self.into(x.flatten(1))
        for block in self.blocks:
            h = h + block(h + time)
        return self.out(h).view_as(x)


def network(kind):
    if kind == "mlp":
        return ResidualMLP()
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(24, 48),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def digits(seed):
    """Returns images `(1797, 64)` in [-1, 1] and labels, shuffled; the first 1,500 are trained on."""
    data, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(data))
    return torch.tensor(data[order] / 8 - 1, dtype=torch.float32), torch.tensor(labels[order])


def projected(x, train, k):
    """Projects on the first k principal components of the training rows; returns also mean and all components."""
    mean = train.mean(0)
    axes = torch.linalg.svd((train - mean).double(), full_matrices=True)[2].float()
    return mean + (x - mean) @ axes[:k].T @ axes[:k], mean, axes


def cut(name, seed):
    """Returns a data set's rows, its labels, its mean and principal axes."""
    x, labels = digits(seed)
    if name == "plane":
        return *projected(x, x[:TRAIN], 8)[:1], labels, *projected(x, x[:TRAIN], 8)[1:]
    if name == "mixed":
        train = torch.arange(len(x)) < TRAIN
        for part, k in ((labels < 5, 4), (labels >= 5, 12)):
            x[part] = projected(x[part], x[part & train], k)[0]
    return x, labels, x[:TRAIN].mean(0), None


def trained(data, kind, seed):
    """Returns a network's average weights after training; goes on from the last checkpoint."""
    steps, batch = NETWORKS[kind]
    folder = RUNS / f"seed-{seed}"
    done, partial = folder / f"{data}-{kind}.safetensors", folder / f"{data}-{kind}.pt"
    torch.manual_seed(seed)
    model, average = network(kind), network(kind)
    average.requires_grad_(False)
    if done.is_file():
        average.load_state_dict(load_file(done))
        return average.eval()
    folder.mkdir(parents=True, exist_ok=True)
    x = cut(data, seed)[0][:TRAIN].view(-1, 1, 8, 8)
    alphas = DDPMScheduler().alphas_cumprod
    average.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    start = 0
    if partial.is_file():
        state = torch.load(partial, weights_only=True)
        for part, name in ((model, "model"), (average, "average"), (optimizer, "optimizer"), (schedule, "schedule")):
            part.load_state_dict(state[name])
        start = state["step"]
    for step in range(start, steps):
        generator = torch.Generator().manual_seed(1000003 * seed + step)
        x0 = x[torch.randint(len(x), (batch,), generator=generator)]
        t = torch.randint(1000, (batch,), generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        a = alphas[t].view(-1, 1, 1, 1)
        out = model(a.sqrt() * x0 + (1 - a).sqrt() * noise, t)
        loss = nn.functional.mse_loss(out if isinstance(out, torch.Tensor) else out.sample, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        rate = min(0.999, (1 + step) / (10 + step))
        for mean, p in zip(average.parameters(), model.parameters(), strict=True):
            mean.lerp_(p.detach(), 1 - rate)
        if step % 250 == 249:
            print(f"{data} {kind} seed {seed} step {step + 1} loss {loss.item():.4f}", flush=True)
            state = {"model": model, "average": average, "optimizer": optimizer, "schedule": schedule}
            torch.save(
                {"step": step + 1, **{k: v.state_dict() for k, v in state.items()}}, partial.with_suffix(".tmp")
            )
            partial.with_suffix(".tmp").replace(partial)
    save_file(average.state_dict(), done)
    partial.unlink(missing_ok=True)
    return average.eval()


def stage_of(seed, name, make):
    """Returns a stage's figures, made once, and the seconds that it took."""

    def timed():
        start = time.perf_counter()
        return {**make(), "seconds": time.perf_counter() - start}

    return kept(RUNS / f"seed-{seed}" / f"{name}.json", timed)


def generator():
    return torch.Generator().manual_seed(0)


def estimators(kind, seed):
    """All estimators on held-out digits of 8 dimensions, by sigma."""
    field = ScoreField(trained("plane", kind, seed), DDPMScheduler())
    x = cut("plane", seed)[0][TRAIN:].view(-1, 1, 8, 8)
    few = x[:PROBED]
    dsm = local_dimension(field, x, "dsm", SIGMAS, 8, 512, generator())
    found = {"dsm": dsm.curve.mean(0).tolist()}
    for method, draws in (("normal_bundle", 256), ("trace", 32), ("flipd", 32)):
        found[method] = local_dimension(field, few, method, SIGMAS, draws, 256, generator()).curve.mean(0).tolist()
    curve = local_dimension(field, x, "dsm", num_draws=4, batch_size=512, generator=generator())
    flat = find_plateau(curve.sigmas, curve.curve.mean(0), 64, curve.masked)
    residual = local_residual(field, x)
    return {
        **found,
        "residual": residual[0],
        "residual_error": residual[1],
        "sigmas": curve.sigmas.tolist(),
        "curve": curve.curve.mean(0).tolist(),
        "masked": curve.masked.tolist(),
        "plateau": None if flat is None else flat[1],
    }


def local_residual(field, x):
    found = stein_residual(field, x, SIGMAS, 8, 512, generator())
    return found.value.tolist(), found.standard_error.tolist()


def axes_gauge(axes):
    """Section by section: first axes against last ones, an antisymmetric orthogonal matrix in pixel space."""
    half = torch.ones(32)
    return axes.T @ torch.fliplr(torch.diag(torch.cat([half, -half]))) @ axes


def gauges(seed):
    """Samples, log-likelihoods and estimators of the MLP with and without a gauge."""
    field = ScoreField(trained("plane", "mlp", seed), DDPMScheduler())
    x, _, mean, axes = cut("plane", seed)
    x = x.view(-1, 1, 8, 8)
    held, few = x[TRAIN:], x[TRAIN : TRAIN + PROBED]
    Q = axes_gauge(axes)  # noqa: N806
    gauged, sigma = gauge_transform(field, Q, C), 0.08
    levels = field.levels.sigma
    grid = torch.logspace(levels[-1].log10().item(), levels[0].log10().item(), 101).tolist()
    grid[0], grid[-1] = levels[-1].item(), levels[0].item()
    noise = torch.randn(400, 1, 8, 8, generator=generator()) * (grid[0] ** 2 + 1) ** 0.5
    samples = [probability_flow(f, noise, grid) for f in (field, gauged)]
    save_file(
        {"plain": samples[0].contiguous(), "gauged": samples[1].contiguous()},
        RUNS / f"seed-{seed}" / "samples.safetensors",
    )
    flat = [s.flatten(1) for s in samples]
    half = len(held) // 2
    frechet = [frechet_distance(s, x[:TRAIN].flatten(1)) for s in flat]
    halves = frechet_distance(held[:half].flatten(1), held[half:].flatten(1))
    # Exact traces: of eight images, probes alone would move the difference by a nat or two.
    nats = [
        log_likelihood(f, few[:8], sigma, tol=1e-3, trace="exact", batch_size=64).nats.mean().item()
        for f in (field, gauged)
    ]
    a = float(field.at(sigma).a)
    trace = [
        local_dimension(f, few, "trace", sigma, 256, 256, generator()).curve.mean().item() for f in (field, gauged)
    ]
    dsm = [local_dimension(f, held, "dsm", sigma, 8, 512, generator()).curve.mean().item() for f in (field, gauged)]
    n, turned = axes[-1], Q @ axes[-1]
    local = gauge_transform(field, Q, lambda y, s: KAPPA * ((y.flatten(1) - mean) @ n) / s)
    exact = []
    for f in (field, local):
        b = float(f.at(sigma).b)
        jacobian = exact_jacobian(f, a * few[:4], sigma)
        seen = f.eps(a * few[:4], sigma).flatten(1)
        exact.append(64 - b * jacobian.diagonal(dim1=1, dim2=2).sum(1) + seen.square().sum(1))
    seen = field.eps(a * few[:4], sigma).flatten(1)
    wanted = KAPPA**2 * turned.square().sum() - KAPPA * (seen @ turned)
    bundle = [
        local_dimension(f, few[:4], "normal_bundle", sigma, 256, 256, generator()).curve.mean().item()
        for f in (field, local)
    ]
    return {
        "frechet": frechet,
        "halves": halves,
        "nats": nats,
        "trace": trace,
        "dsm": dsm,
        "local_flipd_shift": (exact[1] - exact[0]).mean().item(),
        "local_flipd_identity": (exact[1] - exact[0] - wanted).abs().max().item(),
        "local_bundle": bundle,
    }


def neighbours(x, k=20):
    """Maximum-likelihood dimension by the distances to k neighbours (Levina and Bickel)."""
    distances = NearestNeighbors(n_neighbors=k + 1).fit(x).kneighbors(x)[0][:, 1:]
    logs = np.log(distances[:, -1:] / np.maximum(distances[:, :-1], 1e-12))
    return 1 / logs.mean(1)


def mixed(seed):
    """Classes of 4 and of 12 dimensions, told apart by their dimension."""
    field = ScoreField(trained("mixed", "mlp", seed), DDPMScheduler())
    x, labels, *_ = cut("mixed", seed)
    held = x[TRAIN:].view(-1, 1, 8, 8)
    large = (labels[TRAIN:] >= 5).numpy()
    found = local_dimension(field, held, "dsm", [0.05, 0.1, 0.2, 0.35], 32, 512, generator())

    def auc(values):
        return float(stats.mannwhitneyu(values[large], values[~large]).statistic / (large.sum() * (~large).sum()))

    every = [auc(found.curve[:, k].numpy()) for k in range(4)]
    return {"auc": min(every), "by_sigma": every, "neighbours": auc(neighbours(x.numpy())[TRAIN:])}


def uncut(seed):
    """Whole digits: class means against nearest neighbours; the simplest and the richest images."""
    field = ScoreField(trained("whole", "mlp", seed), DDPMScheduler())
    x, labels, *_ = cut("whole", seed)
    near, found = torch.tensor(neighbours(x.numpy())), {}
    # Of the data that the network learned, as `rank_by_dimension` is used, and of held-out images.
    for part, rows in (("", slice(TRAIN)), ("_held_out", slice(TRAIN, None))):
        of = local_dimension(field, x[rows].view(-1, 1, 8, 8), "dsm", [0.2], 16, 512, generator()).curve[:, 0]
        means, others = ([values[labels[rows] == c].mean().item() for c in range(10)] for values in (of, near[rows]))
        order = of.argsort().tolist()
        found |= {
            f"means{part}": means,
            f"neighbours{part}": others,
            f"spearman{part}": float(stats.spearmanr(means, others).statistic),
            f"lowest{part}": int(np.argmin(means)),
            f"simple{part}": order[:10],
            f"rich{part}": order[-10:],
        }
    return found


def shipped():
    """The curve of the shipped model of 28x28 digits."""
    pipeline = DiffusionPipeline.from_pretrained(ASSETS / "digits-epsilon")
    data = load_images(train_data_dir=str(DIGITS), resolution=28, channels=1)
    x = torch.stack([data[i]["pixel_values"] for i in range(0, 1000, 125)])
    found = local_dimension(ScoreField.from_pipeline(pipeline), x, "dsm", generator=generator())
    return {
        "sigmas": found.sigmas.tolist(),
        "curve": found.curve.mean(0).tolist(),
        "plateaus": sum(value is not None for value in found.value),
        "plateau_of_mean": int(find_plateau(found.sigmas, found.curve.mean(0), 784, found.masked) is not None),
    }


STAGES = {
    "mlp": lambda seed: estimators("mlp", seed),
    "gauges": gauges,
    "unet": lambda seed: estimators("unet", seed),
    "mixed": mixed,
    "uncut": uncut,
}


def figures_of(stages):
    """Returns a seed's figures from its stages."""
    found = {}
    rows = [SIGMAS.index(sigma) for sigma in TRUSTED]
    for kind in NETWORKS:
        if kind not in stages:
            continue
        stage = stages[kind]
        for name, key in (("nb", "normal_bundle"), ("dsm", "dsm"), ("flipd", "flipd")):
            found[f"{name}_error_{kind}"] = max(abs(stage[key][k] - 8) for k in rows)
        if stage["plateau"] is not None:
            found[f"plateau_error_{kind}"] = abs(stage["plateau"] - 8)
        ratios = [abs(r) / d for r, d in zip(stage["residual"], stage["dsm"], strict=True)]
        found[f"residual_low_{kind}"], found[f"residual_high_{kind}"] = min(ratios[:2]), ratios[2]
        for key in ("dsm", "normal_bundle", "flipd", "trace", "residual"):
            found |= {f"{key}_{sigma}_{kind}": stage[key][k] for k, sigma in enumerate(SIGMAS)}
    if "gauges" in stages:
        stage = stages["gauges"]
        found["gauge_frechet_over_halves"] = stage["frechet"][1] / stage["halves"]
        found["plain_frechet_over_halves"] = stage["frechet"][0] / stage["halves"]
        found["gauge_log_p_shift"] = abs(stage["nats"][1] - stage["nats"][0])
        found["gauge_trace_shift"] = abs(stage["trace"][1] - stage["trace"][0])
        found["gauge_dsm"], found["plain_dsm"] = stage["dsm"][1], stage["dsm"][0]
        found["local_flipd_identity"] = stage["local_flipd_identity"]
        found["local_flipd_shift"] = stage["local_flipd_shift"]
        found["local_bundle"], found["plain_bundle"] = stage["local_bundle"][1], stage["local_bundle"][0]
    if "mixed" in stages:
        found["mixed_auc"], found["mixed_auc_neighbours"] = stages["mixed"]["auc"], stages["mixed"]["neighbours"]
    if "uncut" in stages:
        for part in ("", "_held_out"):
            found[f"uncut_spearman{part}"] = stages["uncut"][f"spearman{part}"]
            found[f"uncut_lowest_class{part}"] = stages["uncut"][f"lowest{part}"]
    return found


def draw_curves(stages, of_shipped):
    """Dimension over sigma, with its plateau, and where the network is no score."""
    from matplotlib.figure import Figure

    panel = Figure(figsize=(9, 3.4), constrained_layout=True)
    left, right = panel.subplots(1, 2)
    for kind, colour in (("mlp", "C0"), ("unet", "C1")):
        if kind not in stages:
            continue
        stage = stages[kind]
        left.semilogx(stage["sigmas"], stage["curve"], color=colour, label=f"{kind.upper()}, denoising loss")
        bad = [s for s, m in zip(stage["sigmas"], stage["masked"], strict=True) if m]
        values = [c for c, m in zip(stage["curve"], stage["masked"], strict=True) if m]
        left.semilogx(bad, values, "x", color=colour)
        left.semilogx(SIGMAS, stage["normal_bundle"], "o", mfc="none", color=colour, label=f"{kind.upper()}, bundle")
    left.axhline(8, color="0.6", lw=1)
    left.set(xlabel="noise level sigma", ylabel="local dimension", ylim=(0, 20), title="digits cut to 8 dimensions")
    left.legend(fontsize=8)
    right.semilogx(of_shipped["sigmas"], of_shipped["curve"], color="C2")
    right.set(xlabel="noise level sigma", title="28x28 digits, shipped model")
    panel.savefig(PICTURES / "experiment.png", dpi=80)


def draw_images(seed, stages):
    """Same noise with and without a gauge; the simplest and the richest digits."""
    from matplotlib.figure import Figure

    rows = []
    if "gauges" in stages:
        samples = load_file(RUNS / f"seed-{seed}" / "samples.safetensors")
        rows += [("without gauge", samples["plain"][:10, 0]), ("same noise, gauge", samples["gauged"][:10, 0])]
    if "uncut" in stages:
        x = cut("whole", seed)[0].view(-1, 8, 8)
        rows += [("lowest dimension", x[stages["uncut"]["simple"]]), ("highest dimension", x[stages["uncut"]["rich"]])]
    panel = Figure(figsize=(9, 0.95 * len(rows)), constrained_layout=True)
    axes = panel.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axis, (title, images) in zip(axes, rows, strict=True):
        axis.imshow(
            torch.cat([*torch.nn.functional.pad(images, (0, 1, 0, 0), value=1)], 1), cmap="gray", vmin=-1, vmax=1
        )
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=8)
    panel.savefig(PICTURES / "experiment_images.png", dpi=80)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs, seconds = {}, 0.0
    for seed in args.seeds:
        stages = {name: stage_of(seed, name, lambda name=name, seed=seed: STAGES[name](seed)) for name in args.stages}
        seconds += sum(stage["seconds"] for stage in stages.values())
        runs[seed] = stages
    of_shipped = stage_of("shipped", "curve", shipped)
    per_seed = [figures_of(stages) for stages in runs.values()]
    figures = {}
    for name in per_seed[0]:
        values = [found[name] for found in per_seed if name in found]
        goal = next((g for pattern, g in GOALS.items() if re.fullmatch(pattern, name)), None)
        figures[name] = figure(statistics.mean(values), "", goal, spread(values))
    for name, key in (("shipped_plateaus", "plateaus"), ("shipped_mean_plateau", "plateau_of_mean")):
        figures[name] = figure(of_shipped[key], "curves", GOALS[name])
    PICTURES.mkdir(exist_ok=True)
    first = args.seeds[0]
    draw_curves(runs[first], of_shipped)
    draw_images(first, runs[first])
    command = "python -m benchmarks.geometry.experiment"
    if args.seeds != list(SEEDS):
        command += " --seeds " + " ".join(map(str, args.seeds))
    if args.stages != list(STAGES):
        command += " --stages " + " ".join(args.stages)
    write_result("geometry/experiment", command, figures, args.seeds, seconds, says=SAYS)


if __name__ == "__main__":
    main()
