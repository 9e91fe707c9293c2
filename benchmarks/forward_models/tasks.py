"""Three more tasks in which signals are never seen: tomography, motion, and inversion of a generator.

    python -m benchmarks.forward_models.tasks     # twenty minutes on one core

* ct: 8x8 digits of which parallel projections at 12 angles are known; the context are 4 angles with noise of 0.5.
* motion: the signal is a flow of 3x3 points, 1.5 pixels in one of four directions with a wobble of 0.3; the context is
  the frame before, the observation the frame after.
* inversion: the signal are the 8 latents of a generator of digits; the context is half of its image, noise 1.

Each is compared with regression. Contexts leave freedom in all of them: else nothing is to be drawn, and all methods
are alike. Goals were taken from trials with one seed of an earlier version. Everything is made once and kept in
runs/forward_models; training resumes. The result is benchmarks/results/forward_models/tasks.json with a picture.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import math
import statistics
import time

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import nn

from benchmarks.forward_models import posterior
from benchmarks.forward_models.flatland import digits
from benchmarks.forward_models.training import RUNS, SEEDS, drawn, trained, write_observations
from benchmarks.harness import RESULTS, figure, kept, spread, write_result
from diffusers_ext import (
    CropForwardModel,
    ForwardModelRecipe,
    GeneratorForwardModel,
    ProjectionForwardModel,
    StepOutput,
    WarpForwardModel,
    forward_model_loss,
    lift_views,
    lifted_input,
    observe,
)

SAMPLES = 4
GOALS = {
    "ct_energy_1_over_regression": "<= 0.6",
    "ct_energy_4_over_regression": "<= 0.25",
    "motion_energy_over_regression": "<= 0.1",
    "inversion_energy_over_regression": "<= 0.3",
}
SAYS = {
    r"ct_energy_(\d)_over_regression": (
        r"Digits from 4 noisy projections, \1 sampled view(s): {:.2f} times the energy distance of regression."
    ),
    "motion_energy_over_regression": "Frames moved by sampled flows: {:.3f} times the energy distance of regression.",
    "inversion_energy_over_regression": (
        "Latents of a generator from half of a noisy image: {:.2f} times the energy distance of regression."
    ),
}


def rows_of(n):
    return torch.arange(n)[:, None]


# -- tomography ----------------------------------------------------------------------------------------------------

ANGLES, GIVEN, NOISE, FURTHER_NOISE = 12, 4, 0.5, 0.02
HARMONICS = 6
SCANNER = ProjectionForwardModel(num_bins=12, extent=1.1, num_angles=ANGLES)


def turned(n):
    return (torch.arange(ANGLES) * (math.pi / ANGLES)).expand(n, -1)


def ct_context(seed):
    """Returns the held-out digits, the generator, 4 noisy projections each, their angles and those to be sampled."""
    held_out = digits()[1]
    generator = torch.Generator().manual_seed(200 + seed)
    order = torch.stack([torch.randperm(ANGLES, generator=generator) for _ in held_out])
    seen = observe(held_out, SCANNER, turned(len(held_out)).gather(1, order[:, :GIVEN]))
    seen = seen + NOISE * torch.randn(seen.shape, generator=generator)
    return held_out, generator, seen, order[:, :GIVEN], order[:, GIVEN : 2 * GIVEN]


def ct_samples(name, seed):
    known = digits()[0]
    write_observations(
        RUNS / "ct" / "observations.npz", observe(known, SCANNER, turned(len(known))), turned(len(known))
    )
    pipeline = trained(
        "ct", name, seed, SCANNER, {"angle_harmonics": HARMONICS}, signal_shape="1,8,8", signal_range="0,1",
        max_context_views=2 * GIVEN - 1, max_given_views=GIVEN, observation_noise=NOISE, context_noise=FURTHER_NOISE,
        max_train_steps=1500, regression=name == "regression",
    )  # fmt: skip
    held_out, generator, seen, given, targets = ct_context(seed)
    angles = turned(len(held_out))
    count = 1 if name == "regression" else SAMPLES
    return drawn(pipeline, (seen, angles.gather(1, given)), angles.gather(1, targets), count, generator)


def ct(seed):
    held_out, generator, seen, given, _ = ct_context(seed)
    known = digits()[0]
    likelihood = posterior.log_likelihood(observe(known, SCANNER, turned(len(known))), seen, given, NOISE)
    best = posterior.ideal(known, likelihood, SAMPLES, generator)
    signals, mean = ct_samples("diffusion", seed), ct_samples("regression", seed)[0]
    found = {"ideal_energy": posterior.energy(best, held_out), "regression_energy": posterior.energy(mean, held_out)}
    for i, part in enumerate(signals, 1):
        found[f"energy_{i}"] = posterior.energy(part, held_out)
        found[f"energy_{i}_over_regression"] = found[f"energy_{i}"] / found["regression_energy"]
        found[f"variance_{i}"] = posterior.variance(part) / posterior.variance(best)
    return found


# -- motion --------------------------------------------------------------------------------------------------------

WARP = WarpForwardModel()
DIRECTIONS = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])


def flows(n, generator):
    """Draws `(n, 2, 3, 3)` flows."""
    main = 1.5 * DIRECTIONS[torch.randint(4, (n,), generator=generator)]
    return main[:, :, None, None] + 0.3 * torch.randn(n, 2, 3, 3, generator=generator)


class MotionRegression(ForwardModelRecipe):
    """The frame before is a parameter of the observation, not a context: regression sees it, and no frame after."""

    def training_step(self, batch, ctx):
        network, seen, frames = ctx.modules.trainable, batch["observations"], batch["parameters"]
        t = torch.full((len(seen),), self.config.num_train_timesteps - 1, device=seen.device)
        inputs = lifted_input(lift_views(network, self.forward_model, torch.zeros_like(seen), frames))
        signal = ctx.model(inputs, t, return_dict=False)[0]
        return StepOutput(forward_model_loss(signal, self.forward_model, seen, frames))


def motion_samples(name, seed):
    """Returns the frames before, those after, and flows `(frames, samples, 2, 3, 3)`."""
    known, held_out = digits()
    generator = torch.Generator().manual_seed(300)
    known = known.repeat_interleave(3, 0)
    after = WARP(flows(len(known), generator), known)
    write_observations(RUNS / "motion" / "observations.npz", after[:, None], known[:, None])
    recipe = MotionRegression if name == "regression" else ForwardModelRecipe
    pipeline = trained(
        "motion", name, seed, WARP, {"parameter_size": 64}, recipe, signal_shape="2,3,3", max_context_views=0,
        novel_weight=0.0, max_train_steps=2000,
    )  # fmt: skip
    generator.manual_seed(300 + 1 + seed)
    after = WARP(flows(len(held_out), generator), held_out)
    if name == "regression":
        with torch.no_grad():
            lifted = lift_views(pipeline.unet, WARP, torch.zeros_like(after)[:, None], held_out[:, None])
            return held_out, after, pipeline.unet(lifted_input(lifted), 999).sample[:, None]
    return held_out, after, drawn(pipeline, (None, None), held_out[:, None], SAMPLES, generator)[0]


def moved(frames, found):
    count = found.shape[1]
    return WARP(found.flatten(0, 1), frames.repeat_interleave(count, 0)).unflatten(0, (-1, count))


def motion(seed):
    frames, after, own = motion_samples("diffusion", seed)
    mean = motion_samples("regression", seed)[2]
    generator = torch.Generator().manual_seed(400 + seed)
    best = torch.stack([flows(len(frames), generator) for _ in range(SAMPLES)], 1)
    main = own.mean((-1, -2)) @ DIRECTIONS.T  # along each direction
    found = {
        "ideal_energy": posterior.energy(moved(frames, best), after),
        "regression_energy": posterior.energy(moved(frames, mean), after),
        "energy": posterior.energy(moved(frames, own), after),
        "variance": posterior.variance(moved(frames, own)) / posterior.variance(moved(frames, best)),
        "rarest_direction": torch.bincount(main.argmax(-1).flatten(), minlength=4).min().item() / main[..., 0].numel(),
        "length_of_flow": main.max(-1).values.mean().item(),
    }
    return {**found, "energy_over_regression": found["energy"] / found["regression_energy"]}


# -- inversion -----------------------------------------------------------------------------------------------------

LATENTS, TOPS, HALF_NOISE = 8, 5, 1.0


class Decoder(ModelMixin, ConfigMixin):
    """A generator of digits, the decoder of a small variational autoencoder."""

    @register_to_config
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(LATENTS, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 64), nn.Sigmoid()
        )

    def forward(self, latents):
        return self.layers(latents).view(-1, 1, 8, 8)


def generator_model():
    """Returns the forward model of a generator that is trained once: half of its image, from a row on."""
    folder = RUNS / "inversion" / "decoder"
    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        decoder, encoder = Decoder(), nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 2 * LATENTS))
        optimizer = torch.optim.AdamW([*decoder.parameters(), *encoder.parameters()], 2e-3)
        images = digits()[0]
        for _ in range(3000):
            batch = images[torch.randint(len(images), (128,))]
            mean, log_std = encoder(batch.flatten(1)).chunk(2, 1)
            again = decoder(mean + log_std.exp() * torch.randn_like(mean))
            divergence = ((mean**2 + (2 * log_std).exp() - 1) / 2 - log_std).sum(1).mean()
            loss = F.mse_loss(again, batch, reduction="sum") / len(batch) / 0.1 + divergence
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        decoder.save_pretrained(folder)
    return GeneratorForwardModel(Decoder.from_pretrained(folder), CropForwardModel((4, 8), 8))


def corners(n):
    tops = torch.arange(TOPS)
    return torch.stack([tops, torch.zeros_like(tops)], 1).expand(n, -1, -1)


def inversion_context(seed):
    """Returns the model, held-out latents, the generator of noise, noisy halves, which they are, and the others."""
    model = generator_model()
    generator = torch.Generator().manual_seed(500 + seed)
    latents = torch.randn(400, LATENTS, generator=generator)
    given = (TOPS - 1) * torch.randint(2, (400, 1), generator=generator)  # the upper or the lower half
    seen = observe(latents, model, corners(400)[rows_of(400), given])
    seen = seen + HALF_NOISE * torch.randn(seen.shape, generator=generator)
    return model, latents, generator, seen, given, TOPS - 1 - given


def inversion_data():
    """Returns latents to train with."""
    return torch.randn(4000, LATENTS, generator=torch.Generator().manual_seed(500 - 1))


def inversion_samples(name, seed):
    model, _, generator, seen, given, targets = inversion_context(seed)
    known = inversion_data()
    path = RUNS / "inversion" / "observations.npz"
    write_observations(path, observe(known, model, corners(len(known))), corners(len(known)).float())
    pipeline = trained(
        "inversion", name, seed, model, {"parameter_size": 2}, signal_shape=str(LATENTS), max_context_views=1,
        observation_noise=HALF_NOISE, context_noise=FURTHER_NOISE,
        max_train_steps=2000, regression=name == "regression",
    )  # fmt: skip
    where = corners(400)
    at = [where[rows_of(400), part].float() for part in (given, targets)]
    return drawn(pipeline, (seen, at[0]), at[1], 1 if name == "regression" else SAMPLES, generator)[0]


def inversion(seed):
    model, latents, generator, seen, given, _ = inversion_context(seed)
    known = inversion_data()
    candidates = observe(known, model, corners(len(known)))
    likelihood = posterior.log_likelihood(candidates, seen, given, HALF_NOISE)
    best = posterior.ideal(known, likelihood, SAMPLES, generator)
    own, mean = inversion_samples("diffusion", seed), inversion_samples("regression", seed)
    found = {
        "ideal_energy": posterior.energy(best, latents),
        "regression_energy": posterior.energy(mean, latents),
        "energy": posterior.energy(own, latents),
        "variance": posterior.variance(own) / posterior.variance(best),
    }
    images = [posterior.energy(generated(model, part), model.generate(latents)) for part in (own, mean)]
    return {
        **found,
        "energy_over_regression": found["energy"] / found["regression_energy"],
        "images_energy_over_regression": images[0] / images[1],
    }


def generated(model, latents):
    return model.generate(latents.flatten(0, 1)).unflatten(0, latents.shape[:2])


# -- results -------------------------------------------------------------------------------------------------------

TASKS = {"ct": ct, "motion": motion, "inversion": inversion}


def picture(path, rows=3):
    """What is known, what is true, what regression says, and samples; the first seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    held_out, _, seen, _, _ = ct_context(0)
    shown = {"ct": (seen[:, :, 0], held_out, ct_samples("regression", 0)[0], ct_samples("diffusion", 0)[-1])}
    frames, after, flow = motion_samples("diffusion", 0)
    mean = motion_samples("regression", 0)[2]
    shown["motion"] = (frames[:, 0], after, moved(frames, mean), moved(frames, flow))
    model, latents, _, halves, _, _ = inversion_context(0)
    made = [generated(model, inversion_samples(name, 0)) for name in ("regression", "diffusion")]
    shown["inversion"] = (halves[:, 0, 0], model.generate(latents), *made)
    figure_, axes = plt.subplots(3 * rows, 3 + SAMPLES, figsize=(1.1 * (3 + SAMPLES), 1.1 * 3 * rows + 0.4))
    for block, (task, (known, true, mean, own)) in enumerate(shown.items()):
        for i in range(rows):
            line = axes[block * rows + i]
            line[0].imshow(known[i].detach().numpy(), cmap="gray")
            line[0].set_ylabel(task if i == rows // 2 else "")
            for axis, image in zip(line[1:], [true[i], mean[i, 0], *own[i]], strict=True):
                axis.imshow(image[0].detach().numpy(), cmap="gray", vmin=0, vmax=1)
    for axis, title in zip(axes[0], ["context", "true", "regression", *["sample"] * SAMPLES], strict=True):
        axis.set_title(title, fontsize=8)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure_.tight_layout(pad=0.3)
    figure_.savefig(path, dpi=80)
    plt.close(figure_)


def report(measured, seconds):
    """Writes what there is after so many seeds."""
    figures = {}
    for task, each in measured.items():
        for name in each[0]:
            values = [found[name] for found in each]
            unit = "ratio" if "over" in name or "variance" in name else "distance"
            unit = {"rarest_direction": "share", "length_of_flow": "pixels"}.get(name, unit)
            key = f"{task}_{name}"
            figures[key] = figure(statistics.mean(values), unit, GOALS.get(key), spread(values))
    seeds = SEEDS[: len(next(iter(measured.values())))]
    command = "python -m benchmarks.forward_models.tasks"
    write_result("forward_models/tasks", command, figures, seeds, seconds, says=SAYS)


def main():
    torch.set_num_threads(1)
    start, measured = time.process_time(), {task: [] for task in TASKS}
    for seed in SEEDS:
        for task, measure in TASKS.items():
            path = RUNS / task / f"seed-{seed}" / "measured.json"
            measured[task].append(kept(path, lambda measure=measure, seed=seed: measure(seed)))
            print(f"{task}, seed {seed} after {time.process_time() - start:.0f} s of the processor", flush=True)
        report(measured, time.process_time() - start)
        if seed == 0:
            picture(RESULTS / "forward_models" / "tasks.png")


if __name__ == "__main__":
    main()
