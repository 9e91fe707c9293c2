"""What frames between two images cost: batched against one by one, against the original's order of work, and by steps.

    python -m benchmarks.noise_diffusion.speed     # some minutes on a core

A latent text-to-image pipeline of Stable Diffusion's parts with small networks and random weights. "One by one" is one
call of the pipeline per frame. The original's order of work is one image and one branch of the guidance at a time, at
its settings: 200 steps, strength 0.7, five frames, guidance in denoising only; its forwards are counted, and its time
is taken at fewer steps. The fixed-point correction is measured on the shipped model of digits. Many frames are 8,192
of 32x32 pixels in parts of 64, by a network so small that nearly nothing hides what is not the network. Every other
figure but counts and memory is a ratio of two things timed in turn, or of a part and the whole of one call.
"""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

from benchmarks.harness import figure, interleaved, small_unet, write_result
from diffusers_ext import (
    NoiseDiffusionPipeline,
    StableDiffusionNoiseDiffusionPipeline,
    ddim_decode,
    ddim_invert,
    noise_diagnostics,
    noise_diffusion_mix,
    noise_levels,
)

ASSETS = Path(__file__).resolve().parents[2] / "diffusers_ext" / "assets"
SIZE, TOKENS, WIDTH = 16, 16, 32  # of latents, of text, of embeddings
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def make():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=SIZE, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=WIDTH,
        attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(16, 16), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=8,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4,
    )  # fmt: skip
    scheduler = DDIMScheduler(**SCHEDULE, steps_offset=1, set_alpha_to_one=False, clip_sample=False)
    pipeline = StableDiffusionNoiseDiffusionPipeline(
        vae.eval(), None, None, unet.eval(), scheduler, None, None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


PIPELINE = make()
SMALL = NoiseDiffusionPipeline(small_unet(32, 3, (8, 16), 4), DDIMScheduler())
SMALL.set_progress_bar_config(disable=True)
A, B = torch.rand(2, 3, 2 * SIZE, 2 * SIZE)
TEXT = {"prompt_embeds": torch.randn(1, TOKENS, WIDTH), "negative_prompt_embeds": torch.randn(1, TOKENS, WIDTH)}


def frames(count, steps=10, **options):
    return PIPELINE(A, B, num_frames=count, num_inference_steps=steps, **TEXT, output_type="latent", **options)


def one_by_one(count, steps=10):
    for i in range(count):
        frames(1, steps, weights=[(i + 1) / (count + 1)])


@torch.no_grad()
def original(count, steps, network):
    """The order of work of the authors' scripts: each image, each frame, each branch alone."""
    levels = noise_levels(PIPELINE.scheduler, steps, 0.7)
    clean = [PIPELINE.vae.encode(x[None] * 2 - 1).latent_dist.mean * 0.18215 for x in (A, B)]
    states = [ddim_invert(lambda x, t: network(x, t, TEXT["prompt_embeds"]), x, levels) for x in clean]
    root = levels.next_alpha_cumprod

    def guided(x, t):
        told, null = (network(x, t, TEXT[name]) for name in ("prompt_embeds", "negative_prompt_embeds"))
        return null + 10 * (told - null)

    for i in range(count):
        mixed = noise_diffusion_mix(*states, *clean, (i + 1) / (count + 1), root**0.5, (1 - root) ** 0.5)[0]
        ddim_decode(guided, mixed, levels)


def network(x, t, text):
    return PIPELINE.unet(x, t, encoder_hidden_states=text, return_dict=False)[0]


def count_forwards(function):
    """Returns how often the network is called while `function` runs; it answers at once."""
    calls, forward = 0, PIPELINE.unet.forward

    def counted(sample, *args, **kwargs):
        nonlocal calls
        calls += 1
        return (torch.zeros_like(sample),)

    PIPELINE.unet.forward = counted
    function()
    PIPELINE.unet.forward = forward
    return calls


def overhead():
    """Returns the time of mixing and diagnostics, and of a whole call, of Stable Diffusion's sizes."""
    shape, levels = (1, 4, 64, 64), noise_levels(PIPELINE.scheduler, 50, 0.7)
    z_0, z_1, x_0, x_1 = torch.randn(4, *shape)
    weights = torch.linspace(0, 1, 7)[1:-1]

    def mix():
        mixed = noise_diffusion_mix(z_0, z_1, x_0, x_1, weights, 0.3, 0.95)
        noise_diagnostics(torch.cat([z_0, z_1]))
        noise_diagnostics(mixed.flatten(0, 1))

    unet = PIPELINE.unet
    state, text = torch.randn(10, *shape[1:]), TEXT["prompt_embeds"].expand(10, -1, -1)

    @torch.no_grad()
    def step():
        unet(state, 1, encoder_hidden_states=text)

    times = interleaved({"mix": mix, "step": step}, 3)
    # Inversion steps have two samples, denoising steps ten.
    return times["mix"] / (times["step"] * len(levels.timesteps) * 1.2)


@torch.no_grad()
def fixed_points(choices):
    """Returns the errors of encoding and decoding 16 real digits by the shipped model, and the times of encoding."""
    pipeline = NoiseDiffusionPipeline.from_pretrained(ASSETS / "digits-epsilon")
    levels = noise_levels(pipeline.scheduler, 200, 0.7)
    images = torch.tensor(np.load(ASSETS / "digits" / "digits.npz")["images"][:16, None]) / 127.5 - 1

    def model(x, t):
        return pipeline.unet(x, t, return_dict=False)[0]

    errors, few = {}, noise_levels(pipeline.scheduler, 20, 0.7)
    for n in choices:
        states = ddim_invert(model, images, levels, n)
        errors[n] = (ddim_decode(model, states, levels) - images).square().mean().sqrt().item()
    return errors, interleaved({n: lambda n=n: ddim_invert(model, images[:4], few, n) for n in choices}, 7)


def peak_memory(count, batched):
    """Returns how many MiB beyond what it holds before a fresh process needs to make frames (Linux)."""
    return growth(f"{'frames' if batched else 'one_by_one'}({count}, 4)")


def growth(call):
    """Returns by how many MiB a fresh process grows at most during a call of this module (Linux)."""
    code = f"import benchmarks.noise_diffusion.speed as b; b.report_peak(lambda: b.{call})"
    # Large blocks go back to the system at once, so that the process size says what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return float(run.stdout.split()[-1])


def report_peak(function):
    """Prints the growth of the process while `function` runs."""
    torch.set_num_threads(1)
    frames(1, 4)
    many(1)

    def status(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = status("VmRSS:")
    function()
    print(status("VmHWM:") - before)


# What each figure says, for docs/results.md: names as patterns, values for the braces.
SAYS = {
    r"one_by_one_over_batched_n(\d+)": r"\1 frames in one batch are {} times as fast as one by one.",
    r"time_k(\d+)_over_k(\d+)_over_2": r"Twice the network calls (\1 for \2) take {} times twice the time.",
    "original_over_our_forwards": (
        "The authors' code calls the network {} times as often for five frames at 200 steps."
    ),
    "original_over_our_time": "The authors' code takes {} times as long for the same five frames and steps.",
    "mixing_and_diagnostics_share": "Mixing the states and measuring them takes {:.3%} of the call.",
    r"diagnostics_share_n(\d+)": r"The diagnostics take {:.2%} of a call that makes \1 frames of 32x32.",
    "peak_memory_over_result_n8192": "Making 8,192 frames of 32x32 takes {} times the memory of the frames.",
    "memory_beside_result_n8192_over_n2048": "Beside the frames, 8,192 of them take {} times the memory of 2,048.",
    r"error_over_that_with_(\d+)_iterations": (
        r"\1 fixed-point iterations make the error of inverting and decoding {} times smaller."
    ),
    r"inversion_time_with_(\d+)_iterations": r"With \1 fixed-point iterations the inversion takes {} times as long.",
}


def many(count, **options):
    """Makes many small frames of pixels in parts of 64."""
    a, b = torch.rand(2, 3, 32, 32)
    options = {"num_inference_steps": 4, "frame_batch_size": 64, "output_type": "np", **options}
    return SMALL(a, b, num_frames=count, **options)


def diagnostics_share(count):
    """Returns the part of a call that the diagnostics take, the median of several calls."""
    from diffusers_ext.methods.noise_diffusion import base

    spent, plain = [], base.noise_diagnostics

    def timed(*args, **kwargs):
        start = time.perf_counter()
        found = plain(*args, **kwargs)
        spent.append(time.perf_counter() - start)
        return found

    shares, base.noise_diagnostics = [], timed
    for _ in range(3 if count > 1000 else 15):
        spent.clear()
        start = time.perf_counter()
        many(count, num_inference_steps=20)  # a tenth of the default
        shares.append(sum(spent) / (time.perf_counter() - start))
    base.noise_diagnostics = plain
    return statistics.median(shares)


def main():
    torch.set_num_threads(1)
    start, figures = time.perf_counter(), {}
    for count in (1, 4, 16):
        times = interleaved({"batched": lambda n=count: frames(n), "single": lambda n=count: one_by_one(n)}, 11)
        goal = ">= 1.5" if count == 16 else None
        figures[f"one_by_one_over_batched_n{count}"] = figure(times["single"] / times["batched"], "ratio", goal)
        figures[f"extra_peak_memory_batched_n{count}"] = figure(peak_memory(count, True), "MiB")
        figures[f"extra_peak_memory_one_by_one_n{count}"] = figure(peak_memory(count, False), "MiB")
    times = interleaved({steps: lambda s=steps: frames(4, s) for steps in (10, 20, 40)}, 5)
    # Twice the steps, twice the time: what is not in the steps would make it less.
    figures["time_k28_over_k14_over_2"] = figure(times[40] / times[20] / 2, "ratio", "<= 1.1")
    figures["time_k14_over_k7_over_2"] = figure(times[20] / times[10] / 2, "ratio", "<= 1.1")
    theirs = count_forwards(lambda: original(5, 200, network))
    ours = count_forwards(lambda: frames(5, 200))
    figures["original_forwards"], figures["our_forwards"] = figure(theirs, "calls"), figure(ours, "calls")
    figures["original_over_our_forwards"] = figure(theirs / ours, "ratio", ">= 4")
    times = interleaved({"original": lambda: original(5, 10, network), "ours": lambda: frames(5)}, 5)
    figures["original_over_our_time"] = figure(times["original"] / times["ours"], "ratio", ">= 1.5")
    figures["mixing_and_diagnostics_share"] = figure(overhead(), "ratio", "<= 0.01")
    for count in (1, 16, 64, 2048):
        figures[f"diagnostics_share_n{count}"] = figure(diagnostics_share(count), "ratio", "<= 0.02")
    peaks = {count: growth(f"many({count})") for count in (2048, 8192)}
    results = {count: count * 3 * 32 * 32 * 4 / 2**20 for count in peaks}
    figures["peak_memory_over_result_n8192"] = figure(peaks[8192] / results[8192], "ratio", "<= 3")
    beside = {count: peaks[count] - results[count] for count in peaks}
    figures["memory_beside_result_n2048"] = figure(beside[2048], "MiB")
    figures["memory_beside_result_n8192_over_n2048"] = figure(beside[8192] / beside[2048], "ratio", "<= 1.2")
    errors, seconds = fixed_points((0, 2, 4, 8))
    figures["encode_decode_error"] = figure(errors[0], "rmse")
    for n, goal in ((2, None), (4, ">= 10"), (8, None)):
        figures[f"error_over_that_with_{n}_iterations"] = figure(errors[0] / errors[n], "ratio", goal)
        figures[f"inversion_time_with_{n}_iterations"] = figure(seconds[n] / seconds[0], "ratio")
    command = "python -m benchmarks.noise_diffusion.speed"
    write_result("noise_diffusion/speed", command, figures, [0], time.perf_counter() - start, says=SAYS)


if __name__ == "__main__":
    main()
