"""What the engine costs: a step against a bare accelerate loop, and the start of a resume late in a run.

    python -m benchmarks.training.engine

Both train the same UNet on the same 28x28 digits on one thread, without an average of the weights, with checkpoints
and pictures off. Loops take turns in short stretches, so that a slow moment of the machine hits both.
"""

import copy
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDIMScheduler

from benchmarks.harness import figure, write_result
from diffusers_ext import Callback, ImmiscibleConfig, ImmiscibleRecipe, PositionalBatchSampler, Trainer, load_images
from diffusers_ext.data.digits import DIGITS

ROOT = Path(__file__).resolve().parents[2]
BATCH, STRETCH, ROUNDS = 16, 12, 14  # a step of this batch takes 30 to 50 ms


class Stretches(Callback):
    """Runs the other loop after every stretch of ours, and times both; `make_bare(trainer)` returns that loop."""

    def __init__(self, make_bare, clock=time.perf_counter):
        self.make_bare, self.clock, self.ours, self.other = make_bare, clock, [], []

    def on_step_end(self, trainer):
        if trainer.step % STRETCH == 0:
            self.ours.append(self.clock() - self.begin)
            self.other.append(self.bare())
        if trainer.step % STRETCH == 0 or trainer.step == 1:
            self.begin = self.clock()

    def on_start(self, trainer):
        self.bare = self.make_bare(trainer)
        self.begin = self.clock()


def bare_loop(unet):
    """Returns a function that makes `STRETCH` steps of the loop one would write by hand, and returns its seconds."""
    accelerator, scheduler = Accelerator(), DDIMScheduler()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4)
    data = load_images(train_data_dir=str(DIGITS), resolution=28, channels=1)
    loader = torch.utils.data.DataLoader(data, BATCH, shuffle=True, drop_last=True)
    unet, optimizer, loader = accelerator.prepare(unet, optimizer, loader)

    def batches():
        while True:
            yield from loader

    stream = batches()

    def run():
        start = time.perf_counter()
        for _ in range(STRETCH):
            x0 = next(stream)["pixel_values"]
            noise = torch.randn_like(x0)
            t = torch.randint(1000, (len(x0),))
            with accelerator.accumulate(unet):
                loss = F.mse_loss(unet(scheduler.add_noise(x0, noise, t), t, return_dict=False)[0], noise)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(unet.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        return time.perf_counter() - start

    return run


def step_ratio():
    with tempfile.TemporaryDirectory() as folder:
        config = ImmiscibleConfig(
            train_data_dir=str(DIGITS),
            unet_config=str(ROOT / "training" / "configs" / "unet_28.json"),
            output_dir=folder,
            resolution=28,
            channels=1,
            train_batch_size=BATCH,
            max_train_steps=STRETCH * ROUNDS,
            noise="gaussian",
            use_ema=False,
            checkpointing_steps=10**9,
            num_validation_images=0,
        )
        stretches = Stretches(lambda trainer: bare_loop(copy.deepcopy(trainer.ctx.modules.trainable)))
        Trainer(config, ImmiscibleRecipe(config), [stretches]).train()
    # The first stretch warms up. Neighbouring stretches are compared, then the middle of the ratios taken.
    ratios = [a / b for a, b in zip(stretches.ours[1:], stretches.other[1:], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    return statistics.median(ratios), quartiles[2] - quartiles[0], statistics.median(stretches.other) / STRETCH


def resume_seconds(position):
    times = []
    for _ in range(9):
        start = time.perf_counter()
        next(iter(PositionalBatchSampler(60_000, 16, start=position // 16, total=None)))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


# What each figure says, for docs/results.md: names as patterns, values for the braces.
SAYS = {
    "engine_over_bare_loop": (
        "A training step of the engine takes {} times as long as a bare loop with the same network."
    ),
    "resume_position_1e6_samples": "A resume finds its place after a million samples in {} seconds.",
    "resume_1e6_over_1600_samples": "That takes {} times as long as after 1,600 samples.",
}


def main():
    torch.set_num_threads(1)
    start = time.perf_counter()
    ratio, spread, step = step_ratio()
    # Two positions within one epoch's permutation of each other, so that only the distance differs.
    near, far = resume_seconds(16 * 100), resume_seconds(10**6)
    figures = {
        "engine_over_bare_loop": figure(ratio, "ratio", "<= 1.03", spread),
        "bare_step": figure(step, "seconds"),
        "resume_position_1e6_samples": figure(far, "seconds", "< 0.1"),
        "resume_1e6_over_1600_samples": figure(far / near, "ratio", "<= 1.5"),
    }
    write_result(
        "training/engine", "python -m benchmarks.training.engine", figures, [0], time.perf_counter() - start, says=SAYS
    )


if __name__ == "__main__":
    main()
