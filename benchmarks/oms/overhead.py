"""What One More Step adds to the time of an image, in calls of the base's UNet, on one thread.

    python -m benchmarks.oms.overhead

The module should cost what its arithmetic says: one call of a net of known size. `overhead` is the time between
calling the pipeline and its calling the base, over the time of one step of the base in the same call; the
floating-point operations of both nets are counted. A call is stopped after its first steps, so that module and steps
are measured in turn, in the thread's own processor time; each figure is the median of such pairs, its spread their
standard deviation. What the pipeline does beside calling the module is told apart by the time within the module.
"""

import contextlib
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
BATCH, PAIRS, TIMED_STEPS = 8, 16, 3


class Stopped(Exception):
    """A call has made the steps that are timed."""


class TimedPipeline(ImageGenerationPipeline):
    """Notes when it is called and when each step ends, and stops after a few."""

    @functools.wraps(ImageGenerationPipeline.__call__)
    def __call__(self, *args, **kwargs):
        self.called, self.ends = time.process_time(), []

        def note(pipeline, step, timestep, tensors):
            self.ends.append(time.process_time())
            if len(self.ends) == TIMED_STEPS:
                raise Stopped
            return tensors

        return super().__call__(*args, **kwargs, callback_on_step_end=note)


def flops(network, *inputs):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*inputs)
    return counter.get_total_flops()


def one_pair(pipeline, steps):
    """Returns the seconds before the base is called, of them those in the module, and of one of the base's steps."""
    base, within = pipeline.sd_pipeline, []
    hooks = [
        register(lambda *_: within.append(time.process_time()))
        for register in (pipeline.oms_module.register_forward_pre_hook, pipeline.oms_module.register_forward_hook)
    ]
    begin = time.process_time()
    with contextlib.suppress(Stopped):
        pipeline(batch_size=BATCH, num_inference_steps=steps, output_type="latent")
    for hook in hooks:
        hook.remove()
    step = statistics.median(b - a for a, b in zip(base.ends, base.ends[1:], strict=False))
    return base.called - begin, within[1] - within[0], step


# What each figure says, for docs/results.md: names as patterns, values for the braces.
SAYS = {
    r"overhead_over_flops_(\d+)_steps": (
        r"In front of \1 sampling steps, the module takes {} times the time that its share of the arithmetic allows: "
        "a net of half the width has a quarter of the arithmetic, but half of the normalisation and activation."
    ),
    r"overhead_over_module_call_(\d+)_steps": (
        r"All that One More Step does in front of \1 sampling steps takes {:.3f} times the module's own call."
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
    pairs = {steps: [] for steps in (4, 20, 50)}
    one_pair(pipeline, 4)  # the first is slower
    for _ in range(PAIRS):
        for steps, found in pairs.items():
            found.append(one_pair(pipeline, steps))
    figures = {"flops_module_over_unet": figure(ratio, "ratio")}

    def record(name, values, goal=None):
        figures[name] = figure(statistics.median(values), "ratio", goal, statistics.stdev(values))

    for steps, found in pairs.items():
        record(f"overhead_in_unet_calls_{steps}_steps", [before / step for before, _, step in found])
        record(f"overhead_over_flops_{steps}_steps", [before / step / ratio for before, _, step in found], "<= 1.1")
        record(f"overhead_over_module_call_{steps}_steps", [before / within for before, within, _ in found])
    write_result(
        "oms/overhead", "python -m benchmarks.oms.overhead", figures, [0], time.perf_counter() - start, says=SAYS
    )


if __name__ == "__main__":
    main()
