"""How fast is the adaptation, and what do fewer calls of the network cost in accuracy?

    python -m benchmarks.sda.speed     # minutes on one core; needs the shipped models alone

Against a straight re-implementation of DDA's order of work: one image at a time, the filter's resizing made anew at
every step and differentiated by autograd through the network, fifty ancestral steps. Accuracies are those of
source(x) + tuned(A(x)) on held-out digits under impulse noise of severity 3, of which the choice of settings knew
nothing. Where the data set grows, cost an image must not: every image is on its own.
"""

import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from diffusers import DiffusionPipeline

from benchmarks.harness import RESULTS, figure, interleaved, write_result
from diffusers_ext import AlignConfig, LowPass, align, corrupt
from diffusers_ext.data.assets import ASSETS
from diffusers_ext.data.digits import DIGITS
from diffusers_ext.methods.sda.align import _Schedule

COUNT, TIMED, CURVE = 100, 4, (2, 4, 6, 10, 20)
GUIDANCE = 12.0  # in all, spread over the steps; the shipped settings are 2 for each of 6
PROCESS = "import sys; from diffusers_ext.cli import main; main(sys.argv[1:])"


def straight(unet, scheduler, images, steps, config):
    """DDA's order of work, image by image, with autograd through filter and network."""
    schedule, start, results = _Schedule(scheduler, steps), config.calls, []
    for x in images.split(1):
        generator = torch.Generator().manual_seed(0)
        a = schedule.abar[start]
        z = math.sqrt(a) * x + math.sqrt(1 - a) * torch.randn(x.shape, generator=generator)
        for i in range(start - 1, -1, -1):
            with torch.enable_grad():
                z = z.detach().requires_grad_()
                output = unet(z, schedule.timesteps[i]).sample
                x0 = schedule.estimate(i, z, output).clamp(-1, 1)
                low_pass = LowPass(x.shape[2], config.factor)
                norm = torch.linalg.vector_norm(low_pass(x) - low_pass(x0))
                gradient = torch.autograd.grad(norm, z)[0]
            with torch.no_grad():
                z_next = schedule.mean(i, z, x0, "ddpm")
                if i:
                    z_next = z_next + schedule.sigma(i, None) * torch.randn(x.shape, generator=generator)
                z = z_next - config.guidance_weight * gradient
        results.append(z.detach().clamp(-1, 1))
    return torch.cat(results)


def seeded(count):
    return [torch.Generator().manual_seed(i) for i in range(count)]


def two_processes(repeats=3):
    """Time of `diffusers-ext align` on one process over that on two, without what one image costs: the start."""
    seconds = {(count, world): [] for count in (100, 1000) for world in (1, 2)}
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "commands.py"
        script.write_text(PROCESS)
        data = np.load(DIGITS)
        for count in (100, 1000):
            np.savez(Path(folder) / f"{count}.npz", images=data["images"][:count], labels=data["labels"][:count])
        for i in range(repeats):
            for count, world in seconds:
                command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={world}", str(script)]
                command += ["align", "--train_data_dir", f"{folder}/{count}.npz", "--output_dir"]
                command += [f"{folder}/{count}-{world}-{i}", "--num_steps", "20", "--sampler", "ddim", "--factor", "2"]
                command += ["--pretrained_model_name_or_path", str(ASSETS / "digits-sda"), "--batch_size", "50"]
                start = time.perf_counter()
                subprocess.run(
                    command, env={**os.environ, "ACCELERATE_USE_CPU": "true"}, check=True, capture_output=True
                )
                seconds[count, world].append(time.perf_counter() - start)
    middle = {key: statistics.median(values) for key, values in seconds.items()}
    return (middle[1000, 1] - middle[100, 1]) / (middle[1000, 2] - middle[100, 2])


def curve(pipeline, images, pixels, labels):
    """Accuracies of the ensemble against calls, of the fast and of the full gradient."""
    found = {}
    for calls in CURVE:
        for name, options in {
            "detached": {"sampler": "ddim", "detach_unet": True, "guidance_weight": GUIDANCE / calls},
            "full": {"sampler": "ddpm", "detach_unet": False, "guidance_weight": GUIDANCE / calls},
        }.items():
            config = {"num_steps": round(calls / 0.6), "strength": 0.6, "factor": 2, **options}
            output = pipeline(pixels, alignment=config, generator=seeded(len(images)))
            found[name, calls] = 100 * float((output.label_ids.numpy() == labels).mean())
    return found


def plot(found, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(figsize=(5, 3.4), constrained_layout=True)
    for name, label in (("detached", "DDIM, network left out of the gradient"), ("full", "DDPM, full gradient")):
        axes.plot(CURVE, [found[name, c] for c in CURVE], "o-", label=label)
    axes.set(xlabel="calls of the network", ylabel="accuracy, %", xscale="log", xticks=CURVE)
    axes.set_xticks(CURVE, [str(c) for c in CURVE])
    axes.minorticks_off()
    axes.legend(fontsize=8)
    plt.savefig(path, dpi=90)


# What each figure says, for docs/results.md: names as patterns, values for the braces.
SAYS = {
    "sda_speed_over_straight_same_steps": (
        "Adaptation with the same number of steps is {} times as fast as the authors' way, image by image."
    ),
    "sda_speed_over_straight": (
        "With the shipped settings (6 network calls) it is {} times as fast as the authors' 100 steps, image by image."
    ),
    "sda_accuracy_over_straight": "The shipped settings make {} points more right than those 100 steps.",
    "sda_cost_an_image_3_times_the_data": "In a set of three times the size an image costs {} times as much.",
    "sda_two_processes_over_one": "Two processes align a set {} times as fast as one.",
}


def main():
    torch.set_num_threads(1)
    began = time.perf_counter()
    pipeline = DiffusionPipeline.from_pretrained(ASSETS / "digits-sda")
    pipeline.set_progress_bar_config(disable=True)
    data = np.load(DIGITS)
    clean, labels = data["images"][-COUNT:], data["labels"][-COUNT:]
    pixels = [corrupt(image, "impulse_noise", 3, i) for i, image in enumerate(clean)]
    images = torch.from_numpy(np.stack(pixels))[:, None] / 127.5 - 1
    unet, scheduler = pipeline.unet, pipeline.scheduler
    authors = AlignConfig(num_steps=100, strength=0.5, guidance_weight=GUIDANCE / 50, factor=2)
    shipped = AlignConfig(**pipeline.config["alignment"])

    seconds = interleaved(
        {
            "straight": lambda: straight(unet, scheduler, images[:TIMED], 100, authors),
            "same": lambda: align(unet, scheduler, images[: 8 * TIMED], authors, generator=seeded(8 * TIMED)),
            "shipped": lambda: align(unet, scheduler, images[: 8 * TIMED], shipped, generator=seeded(8 * TIMED)),
            "shipped x3": lambda: [
                align(unet, scheduler, images[: 8 * TIMED], shipped, generator=seeded(8 * TIMED)) for _ in range(3)
            ],
        },
        repeats=3,
    )
    one = seconds["straight"] / TIMED
    each = {name: value / (8 * TIMED) for name, value in seconds.items()}
    with torch.no_grad():
        source = pipeline.classifier(images)
        reference = straight(unet, scheduler, images, 100, authors)
        slow = 100 * float(((source + pipeline.adapted_classifier(reference)).argmax(1).numpy() == labels).mean())
    found = curve(pipeline, images, pixels, labels)
    plot(found, RESULTS / "sda" / "speed.png")
    figures = {
        "sda_speed_over_straight_same_steps": figure(one / each["same"], "ratio", ">= 1"),
        "sda_speed_over_straight": figure(one / each["shipped"], "ratio", ">= 3"),
        "sda_accuracy_over_straight": figure(found["detached", 6] - slow, "points", ">= 0"),
        "sda_cost_an_image_3_times_the_data": figure(each["shipped x3"] / 3 / each["shipped"], "ratio", "<= 1.1"),
        "sda_accuracy_source": figure(100 * float((source.argmax(1).numpy() == labels).mean()), "%"),
        **{f"sda_accuracy_{name}_{calls}_calls": figure(value, "%") for (name, calls), value in found.items()},
        "sda_two_processes_over_one": figure(two_processes(), "ratio", ">= 1.6"),
    }
    write_result("sda/speed", "python -m benchmarks.sda.speed", figures, [0], time.perf_counter() - began, says=SAYS)


if __name__ == "__main__":
    main()
