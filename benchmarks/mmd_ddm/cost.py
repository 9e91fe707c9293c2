"""What one MMD-DDM update costs: memory and time by number of steps, with and without checkpointing, on one thread.

    python -m benchmarks.mmd_ddm.cost     # two minutes

Peak memory is what the update allocates beyond what it starts with, each setting in a process of its own; times are
of settings timed in turn. Two passes over small batches must give the gradient of the whole batch.
"""

import multiprocessing
import os
import resource
import time

import torch
from diffusers import DDIMScheduler

from benchmarks.harness import figure, interleaved, small_unet, write_result
from diffusers_ext import differentiable_sample, mmd2, replayed_loss

SIZE, BATCH = 16, 64


def network():
    return small_unet(SIZE, 1, (12, 24, 32), groups=4).eval()


def update(unet, steps, checkpointing, micro=None):
    """Computes the gradient of one update and returns the loss."""
    scheduler = DDIMScheduler(clip_sample=False)
    noise = torch.randn(BATCH, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    real = torch.randn(BATCH, SIZE * SIZE, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)

    def generate(part):
        sample = differentiable_sample(unet, scheduler, noise[part], steps, checkpointing=checkpointing)
        return sample.clamp(-1, 1).flatten(1)

    def loss(features):
        return mmd2(features, real).float()

    unet.zero_grad()
    if micro is None:
        value = loss(generate(slice(None)))
    else:
        value = replayed_loss(generate, BATCH, micro, loss, torch.Tensor.backward)
    value.backward()
    return value.item()


def peak(arguments):
    """Returns by how many MiB the process's largest size grows in an update."""
    torch.set_num_threads(1)
    unet = network()
    update(unet, 1, "none", micro=2)  # whatever the libraries allocate once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    update(unet, *arguments)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def gradient_error():
    unet = network()
    found = []
    for micro in (None, 16):
        update(unet, 5, "step", micro)
        found.append(torch.cat([p.grad.flatten() for p in unet.parameters()]))
    return ((found[0] - found[1]).norm() / found[0].norm()).item()


# What each figure says, for docs/results.md: names as patterns, values for the braces.
SAYS = {
    "memory_20_over_5_steps_checkpointed": "Tuning through 20 sampling steps needs {} times the memory of 5 steps.",
    "memory_20_over_5_steps_kept": "Without recomputing the steps it would be {} times the memory.",
    "time_checkpointed_over_kept": "Recomputing the steps makes an update take {} times as long.",
    "two_pass_gradient_error": "The gradient in micro-batches differs from that of the whole batch by a relative {}.",
    "kernel_share": "The discrepancy itself takes {:.1%} of an update.",
}


def main():
    torch.set_num_threads(1)
    start, figures = time.perf_counter(), {}
    # Tensors are given back to the system at once, so that the process's size is what is in use.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "32768"
    context = multiprocessing.get_context("spawn")
    settings = [(steps, mode) for steps in (5, 20) for mode in ("none", "step")] + [(20, "step", 16)]
    with context.Pool(1, maxtasksperchild=1) as pool:
        memory = dict(zip(settings, pool.map(peak, settings, chunksize=1), strict=True))
    for setting, value in memory.items():
        figures["memory_" + "_".join(map(str, setting))] = figure(value, "MiB")
    growth = memory[20, "step"] / memory[5, "step"]
    figures["memory_20_over_5_steps_checkpointed"] = figure(growth, "ratio", "<= 1.3")
    figures["memory_20_over_5_steps_kept"] = figure(memory[20, "none"] / memory[5, "none"], "ratio")
    unet = network()
    times = interleaved({s: lambda s=s: update(unet, *s) for s in [(5, "none"), (5, "step"), (20, "step")]}, 3)
    figures["time_checkpointed_over_kept"] = figure(times[5, "step"] / times[5, "none"], "ratio", "<= 1.5")
    figures["time_20_over_5_steps"] = figure(times[20, "step"] / times[5, "step"], "ratio")
    figures["two_pass_gradient_error"] = figure(gradient_error(), "relative", "<= 0.0001")
    x, y = torch.randn(2, 128, 2048, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    kernel = interleaved({"kernel": lambda: mmd2(x, y).backward(), "chain": lambda: update(unet, 5, "step")}, 3)
    figures["kernel_share"] = figure(kernel["kernel"] / kernel["chain"], "ratio", "<= 0.02")
    write_result(
        "mmd_ddm/cost", "python -m benchmarks.mmd_ddm.cost", figures, [0], time.perf_counter() - start, says=SAYS
    )


if __name__ == "__main__":
    main()
