"""What One More Step adds to the time of an image, in calls of the base's UNet, on one thread.

    python -m benchmarks.oms.overhead

The module should cost what its arithmetic says: one call of a net of known size. `overhead` is the time between
calling the pipeline and its calling the base, over the time of one step of the base's UNet in the same run; the
floating-point operations of both nets are counted.
"""

import functools
import statistics
import time

import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import figure, write_result
from diffusers_ext import ImageGenerationPipeline, OMSPipeline, OMSUNet2DModel

LAYOUT = {
    "sample_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "down_block_types": ("DownBlock2D",) * 3,
    "up_block_types": ("UpBlock2D",) * 3,
}
BATCH, REPEATS = 8, 4


class TimedPipeline(ImageGenerationPipeline):
    """Notes when it is called, and how long each step takes."""

    @functools.wraps(ImageGenerationPipeline.__call__)
    def __call__(self, *args, **kwargs):
        self.called, self.ends = time.perf_counter(), []

        def note(pipeline, step, timestep, tensors):
            self.ends.append(time.perf_counter())
            return tensors

        return super().__call__(*args, **kwargs, callback_on_step_end=note)


def flops(network, *inputs):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*inputs)
    return counter.get_total_flops()


# What each figure says, for docs/results.md: names as patterns, values for the braces.
SAYS = {
    r"overhead_over_flops_(\d+)_steps": (
        r"In front of \1 sampling steps, the module takes {} times the time that its share of the arithmetic allows."
    ),
    r"overhead_in_unet_calls_(\d+)_steps": (
        r"In front of \1 sampling steps, a module of a quarter of the arithmetic costs {} calls of the base's "
        "network."
    ),
}


def main():
    torch.set_num_threads(1)
    start = time.perf_counter()
    torch.manual_seed(0)
    unet = UNet2DModel(block_out_channels=(160, 320, 320), **LAYOUT).eval()
    module = OMSUNet2DModel(block_out_channels=(80, 160, 160), **LAYOUT).eval()
    x = torch.randn(BATCH, 4, 32, 32)
    ratio = flops(module, x) / flops(unet, x, 10)
    base = TimedPipeline(unet, DDIMScheduler(clip_sample=False, timestep_spacing="trailing"))
    pipeline = OMSPipeline(module, base)
    pipeline.set_progress_bar_config(disable=True)
    figures = {"flops_module_over_unet": figure(ratio, "ratio")}
    for steps in (4, 20, 50):
        overheads = []
        for _ in range(REPEATS):
            begin = time.perf_counter()
            pipeline(batch_size=BATCH, num_inference_steps=steps, output_type="latent")
            step = statistics.median(b - a for a, b in zip(base.ends, base.ends[1:], strict=False))
            overheads.append((base.called - begin) / step)
        overhead = statistics.median(overheads[1:])
        figures[f"overhead_in_unet_calls_{steps}_steps"] = figure(overhead, "ratio")
        figures[f"overhead_over_flops_{steps}_steps"] = figure(overhead / ratio, "ratio", "<= 1.1")
    write_result(
        "oms/overhead", "python -m benchmarks.oms.overhead", figures, [0], time.perf_counter() - start, says=SAYS
    )


if __name__ == "__main__":
    main()
