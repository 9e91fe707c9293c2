"""What training on noisy samples costs beside plain training, on one thread.

    python -m benchmarks.ambient.speed     # a minute

A step is that of a small UNet on 128 digits of 8x8 pixels, forward and backward; times are of settings timed in turn.
"""

import argparse
import tempfile
import time

import torch

from benchmarks.harness import figure, interleaved, small_unet, write_result
from diffusers_ext import EDM, AmbientTask, FrozenNoise, StepRNG
from diffusers_ext.methods.ambient.levels import Schedule
from diffusers_ext.rng import SAMPLE, mix
from diffusers_ext.training.timesteps import LogNormalLevels

SIZE, BATCH, COUNT = 8, 128, 1397

SAYS = {
    "ambient_over_plain_step": "A training step on noisy samples takes {} times that of a plain one.",
    "useful_rows_over_clamped": "At level 0.5, {} times as many samples a step teach something as with clamped draws.",
    "wasted_clamped_(.*)": r"Clamped draws waste {:.1%} of the noisy samples of level \1.",
    "consistency_10_over_5_steps": "Consistency in 10 steps costs {} times that in 5; twice the steps are two.",
    "consistency_64_over_32_rows": "Consistency of 64 samples costs {} times that of 32.",
    "memory_map_share": "Frozen noise from its file takes {:.2%} of a step.",
    "generator_share": "Frozen noise that is drawn anew takes {:.1%} of a step.",
    "seeded_share": "A seeded generator for each sample would take {:.0%} of a step.",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=25)
    args = parser.parse_args()
    torch.set_num_threads(1)
    start, figures = time.perf_counter(), {}
    unet, rng = small_unet(SIZE, 1, (16, 32), groups=4), StepRNG(0)
    task = AmbientTask(EDM(), LogNormalLevels())
    x = torch.randn(BATCH, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    own = torch.where(torch.arange(BATCH) % 10 == 0, 0.0, 0.5)

    def predict(noisy, t):
        return unet(noisy, task.objective.model_timesteps(t), return_dict=False)[0]

    def plain():
        rng.begin(0)
        noise = rng.randn_like(x)
        t = task.law(BATCH, rng)
        noisy, target = task.objective.make(x, noise, t)
        task.objective.loss(predict(noisy, t), target, t).backward()

    def ambient():
        rng.begin(0)
        noise = rng.randn_like(x)
        t, weight = task.draw(own, rng)
        made = task.make(x, own, noise, t, weight)
        task.loss(predict(made.noisy, made.t), made).backward()

    def consistency(steps, rows):
        task.consistency_steps = steps
        level = torch.full((rows,), 0.5)
        source = torch.Generator().manual_seed(0)
        task.consistency(predict, x[:rows], level, level, level / 5, source).mean().backward()

    steps = interleaved({"plain": plain, "ambient": ambient}, args.repeats)
    figures["ambient_over_plain_step"] = figure(steps["ambient"] / steps["plain"], "ratio", "<= 1.02")
    for level in (0.05, 0.1, 0.2, 0.5):
        clamped = Schedule(task.objective).sigma(torch.tensor([level]))
        figures[f"wasted_clamped_{level}"] = figure(1 - task.law.exceeded(clamped), "part")
    figures["useful_rows_over_clamped"] = figure(1 / task.law.exceeded(torch.tensor([0.5])), "ratio", ">= 2.9")
    settings = [(5, 32), (5, 64), (10, 32)]
    times = interleaved({s: lambda s=s: consistency(*s) for s in settings}, max(3, args.repeats // 4))
    figures["consistency_10_over_5_steps"] = figure(times[10, 32] / times[5, 32], "ratio", "<= 2.2")
    figures["consistency_64_over_32_rows"] = figure(times[5, 64] / times[5, 32], "ratio", "<= 2.2")

    index, shape = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))[:BATCH], (1, SIZE, SIZE)
    anew, filed = FrozenNoise(0.5), FrozenNoise(0.5)

    def seeded():
        rows = [torch.Generator().manual_seed(mix(0, SAMPLE, 0, int(i))) for i in index]
        return torch.stack([torch.randn(shape, generator=generator) for generator in rows])

    with tempfile.TemporaryDirectory() as folder:
        filed.draw_once(folder, COUNT, shape)
        ways = {
            "memory_map": lambda: filed.noise(index, shape),
            "generator": lambda: anew.noise(index, shape),
            "seeded": seeded,
        }
        drawn = interleaved({**ways, "step": plain}, args.repeats)
    for name in ways:
        goal = "< 0.01" if name == "memory_map" else None
        figures[f"{name}_share"] = figure(drawn[name] / drawn["step"], "ratio", goal)
    seconds = time.perf_counter() - start
    write_result("ambient/speed", "python -m benchmarks.ambient.speed", figures, [0], seconds, says=SAYS)


if __name__ == "__main__":
    main()
