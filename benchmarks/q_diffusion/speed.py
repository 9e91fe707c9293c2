"""What quantized networks cost: file, memory, time of a call, and of calibration.

    python -m benchmarks.q_diffusion.speed     # ten minutes on one core

Times are of settings run in turn on one thread; memory is of processes of their own. The processor decides which
integer kernels are right: its name, instruction sets, and what each layer was computed by stand in the result. Goals
of another kind of processor are not run.
"""

import copy
import multiprocessing
import os
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel, UNet2DModel

from benchmarks.harness import figure, interleaved, small_unet, write_result
from diffusers_ext import ImageGenerationPipeline, QDiffConfig, collect_calibration, quantize_model
from diffusers_ext.methods.q_diffusion.calibration import Calibration, fingerprint
from diffusers_ext.methods.q_diffusion.kernels import cpu_name, select_kernel
from diffusers_ext.methods.q_diffusion.layers import QuantLayer
from diffusers_ext.methods.q_diffusion.quantizer import convertible
from diffusers_ext.methods.q_diffusion.reconstruct import Settings, _Run
from diffusers_ext.methods.q_diffusion.units import find_units

# Channels -> pixels a side, batches, and repeats: what a core can run.
SIZES = {64: (16, (1, 8, 64), 5), 128: (16, (1, 8), 5), 320: (8, (1, 8), 9)}
BITS = {"w8a8": (8, 8), "w7a8": (7, 8), "w4a8": (4, 8), "w4": (4, None)}
# Stable Diffusion 1.5's network.
LARGE = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": 8,
}
DEPTH = 20


def network(channels):
    """Returns a network whose every convolution has so many channels, or twice as many."""
    return small_unet(SIZES[channels][0], 4, (channels, channels), groups=32).eval()


def quantized(model):
    """Returns the model in all ways, ranges of activations found on a few states."""
    pipeline = ImageGenerationPipeline(model, DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    states = collect_calibration(pipeline, 4, 2, batch_size=4, num_inference_steps=2)
    found = {}
    for name, (bits, act_bits) in BITS.items():
        config = QDiffConfig(bits, act_bits, scale_method="max")
        found[name] = quantize_model(model, states, config, iters=0, act_iters=0)
    return found


def computing(model, way):
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, QuantLayer):
            layer.compute = way
    return model


def kernels(model, x):
    """Returns how many layers chose each kernel for an input."""
    chosen = Counter()

    def count(module, args):
        chosen[module.kernel(args[0])] += 1

    handles = [m.register_forward_pre_hook(count) for m in model.modules() if isinstance(m, QuantLayer)]
    with torch.no_grad():
        model(x, 500)
    for handle in handles:
        handle.remove()
    return chosen


def times(figures):
    vnni = "avx512_vnni" in cpu_name()
    for channels, (size, batches, repeats) in SIZES.items():
        model = network(channels)
        ways = {"fp32": model, "bf16": copy.deepcopy(model).bfloat16(), **quantized(model)}
        ways["w8a8_int8"], ways["w8a8_dequantize"] = (computing(ways["w8a8"], w) for w in ("int8", "dequantize"))
        if not vnni:
            del ways["w8a8_int8"]  # refused: its kernel is wrong there
        for batch in batches:
            x = torch.randn(batch, 4, size, size, generator=torch.Generator().manual_seed(0))
            chosen = {name: kernels(ways[name], x) for name in BITS}

            @torch.no_grad()
            def call(name, x=x, ways=ways):
                ways[name](x.bfloat16() if name == "bf16" else x, 500)

            found = interleaved({name: lambda name=name: call(name) for name in ways}, repeats)
            place = f"{channels}_channels_batch_{batch}"
            goals = {"w8a8": "<= 0.75"} if vnni else {"w7a8": "<= 0.9", "w4a8": "<= 0.9", "w8a8": "<= 1.4"}
            goals["w4"] = "<= 1.4"
            for name in (name for name in ways if name != "fp32"):
                goal = goals.get(name) if batch >= 8 else None
                figures[f"time_{name}_{place}"] = figure(found[name] / found["fp32"], "of fp32", goal)
            figures[f"seconds_fp32_{place}"] = figure(found["fp32"], "s")
            better = min(found[n] for n in ("w8a8_int8", "w8a8_dequantize") if n in found)
            figures[f"auto_over_better_{place}"] = figure(
                found["w8a8"] / better, "ratio", "<= 1.15" if batch >= 8 else None
            )
            for name, counts in chosen.items():
                share = counts["int8"] / max(sum(counts.values()), 1)
                figures[f"int8_layers_{name}_{place}"] = figure(share, "of layers")
            print(place, {name: round(seconds / found["fp32"], 3) for name, seconds in found.items()}, flush=True)


def resident(kind="VmRSS"):
    """Returns the MiB of this process in memory, with what is there of files that are mapped, as fp32 weights are."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) / 1024


def held(arguments):
    """Returns the MiB that a network adds to a process once it is loaded and called."""
    folder, x = arguments
    torch.set_num_threads(1)
    small_unet(8, 4, (32,), groups=32)(torch.zeros(1, 4, 8, 8), 1)  # what the libraries allocate once
    before = resident()
    model = UNet2DModel.from_pretrained(folder)
    with torch.no_grad():
        model(x, 500)
    return resident() - before


def peak(arguments):
    """Returns the largest MiB that loading adds to a process, watched by a thread, and the MiB of the network.

    The first are with pages of the file that are mapped, and without: the system drops them when memory is short.
    """
    import threading

    folder, bits = arguments
    torch.set_num_threads(1)
    import diffusers_ext  # noqa: F401

    done, before = threading.Event(), {kind: resident(kind) for kind in ("VmRSS", "RssAnon")}
    most = dict(before)

    def look():
        for kind in most:
            most[kind] = max(most[kind], resident(kind))

    def watch():
        while not done.wait(0.01):
            look()

    thread = threading.Thread(target=watch)
    thread.start()
    config = None if bits is None else QDiffConfig(bits, scale_method="max")
    model = UNet2DConditionModel.from_pretrained(folder, quantization_config=config)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.sum()  # what is mapped is read when it is used
    done.set()
    thread.join()
    look()
    return most["VmRSS"] - before["VmRSS"], most["RssAnon"] - before["RssAnon"], model.get_memory_footprint() / 2**20


def memory(figures, folder):
    model = network(128)
    model.save_pretrained(folder / "fp32")
    ways = quantized(model)
    ways["w8"] = quantize_as(model, 8)
    for name, made in ways.items():
        made.save_pretrained(folder / name)
    size = {n: (folder / n / "diffusion_pytorch_model.safetensors").stat().st_size for n in ("fp32", *ways)}
    for name in ways:
        goal = "<= 0.16" if BITS.get(name, (8,))[0] == 4 else "<= 0.28"
        figures[f"file_{name}"] = figure(size[name] / size["fp32"], "of fp32", goal)
    x = torch.zeros(1, 4, 16, 16)
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "32768"  # so that the process's size is what is in use
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        found = dict(zip(size, pool.map(held, [(folder / n, x) for n in size], chunksize=1), strict=True))
        for name in size:
            figures[f"resident_{name}"] = figure(found[name], "MiB")
        with torch.device("meta"):
            large = UNet2DConditionModel(**LARGE)
        large = large.to_empty(device="cpu")
        for p in large.parameters():
            torch.nn.init.normal_(p, std=0.02) if p.numel() < 2**16 else p.data.copy_(_tiled(p))
        large.save_pretrained(folder / "large")  # in one file
        del large
        peaks = pool.map(peak, [(folder / "large", bits) for bits in (None, 4)], chunksize=1)
    (whole, _, full), (mapped, own, small) = peaks
    figures["large_peak_mapped_4_bits_over_fp32"] = figure(mapped / whole, "ratio", "<= 0.5")
    figures["large_peak_4_bits_over_fp32"] = figure(own / whole, "ratio", "<= 0.5")
    figures["large_peak_fp32"] = figure(whole, "MiB")
    figures["large_held_4_bits_over_fp32"] = figure(small / full, "ratio")


def _tiled(parameter):
    """Returns random values quickly: a strip of normal numbers, repeated."""
    strip = torch.randn(2**16) * 0.02
    return strip.repeat(-(-parameter.numel() // len(strip)))[: parameter.numel()].view(parameter.shape)


def quantize_as(model, bits):
    pipeline = ImageGenerationPipeline(model, DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    states = collect_calibration(pipeline, 2, 2, batch_size=2, num_inference_steps=2)
    return quantize_model(model, states, QDiffConfig(bits, scale_method="max"), iters=0)


def chain(depth):
    """Returns a network of about so many blocks and states for it."""
    torch.manual_seed(0)
    layers = max(1, (depth - 2) // 4)
    model = UNet2DModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(32, 32), layers_per_block=layers,
        norm_num_groups=8, add_attention=False, down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    ).eval()  # fmt: skip
    calls = [{"sample": torch.randn(32, 4, 16, 16), "timestep": torch.tensor(t)} for t in (10, 500)]
    return model, Calibration(calls, fingerprint(model))


def carried(model, states):
    """Seconds and blocks of passing all blocks as here: everything is carried from one to the next."""
    run = _Run(model, states, QDiffConfig(8, scale_method="max"), Settings(iters=0), {}, None)
    units = find_units(model, run.probes(), list(convertible(model, None)), "block")
    start = time.perf_counter()

    class Bar:
        def update(self, n): ...
        def set_postfix_str(self, *a, **k): ...

    run.take(units, "weights", Bar())
    return time.perf_counter() - start, units


def recomputed(model, states, units):
    """Seconds of the original's order: two forward passes from the input up to each block."""
    arguments, start = states.arguments(), time.perf_counter()

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    for unit in units:
        handle = model.get_submodule(unit.name).register_forward_hook(stop)
        for _ in range(2):
            try:
                with torch.no_grad():
                    model(**arguments)
            except Stop:
                pass
        handle.remove()
    return time.perf_counter() - start


def calibration(figures):
    found = {}
    for depth in (10, DEPTH):
        model, states = chain(depth)
        seconds, units = carried(model, states)
        blocks = sum(type(model.get_submodule(u.name)).__name__ == "ResnetBlock2D" for u in units)
        found[depth] = (seconds, recomputed(model, states, units), blocks)
    (few, _, few_blocks), (many, other, blocks) = found[10], found[DEPTH]
    figures["calibration_blocks"] = figure(blocks, "blocks")
    figures["calibration_recomputed_over_carried"] = figure(other / many, "ratio", ">= 5")
    figures["calibration_growth_over_depth"] = figure(many / few / (blocks / few_blocks), "ratio", "<= 1.2")


# What each figure says, for docs/results.md: names as patterns, values for the braces.
SAYS = {
    r"time_w8a8_(\d+)_channels_batch_(\d+)": (
        r"A call in 8 bits, activations too, takes {} times as long as in fp32 (\1 channels, batch \2)."
    ),
    r"time_w4_(\d+)_channels_batch_(\d+)": (
        r"With weights in 4 bits alone it takes {} times as long (\1 channels, batch \2)."
    ),
    r"time_w7a8_(\d+)_channels_batch_(\d+)": r"In 7 bits, activations in 8: {} times (\1 channels, batch \2).",
    r"time_w4a8_(\d+)_channels_batch_(\d+)": r"In 4 bits, activations in 8: {} times (\1 channels, batch \2).",
    r"auto_over_better_(\d+)_channels_batch_(\d+)": (
        r"What is chosen takes {} times as long as the better of integers and floats (\1 channels, batch \2)."
    ),
    r"file_(\w+)": r"A file of \1 has {} of the bytes of fp32.",
    "large_peak_4_bits_over_fp32": (
        "A network of Stable Diffusion 1.5's size, quantized to 4 bits while it loads, takes {} of the memory of fp32 "
        "at most, pages of the file that the system can drop left out."
    ),
    "large_peak_mapped_4_bits_over_fp32": "With those pages it takes {} of it.",
    "calibration_recomputed_over_carried": (
        "Two passes from the input for each block, the original's order, would take {} times as long as carrying "
        "states through 20 blocks."
    ),
    "calibration_growth_over_depth": "Twice the blocks take twice the time, times {}.",
}


def main():
    torch.set_num_threads(1)
    start, figures = time.perf_counter(), {}
    calibration(figures)
    times(figures)
    with tempfile.TemporaryDirectory() as folder:
        memory(figures, Path(folder))
    exact = {b: select_kernel("linear", ((64, 64), (1024, 64)), b) for b in (64, 128)}
    machine = f"{cpu_name()}, 1 thread; kernels of a 64x64 layer at 7 and 8 bits: {', '.join(exact.values())}"
    table = {"of": "processor", "rows": {"cpu": machine}, "columns": {"seconds_fp32_64_channels_batch_8": "fp32, s"}}
    table["cells"] = {"cpu": {name: f"{figures[name]['value']:.3g}" for name in table["columns"]}}
    write_result(
        "q_diffusion/speed",
        "python -m benchmarks.q_diffusion.speed",
        figures,
        [0],
        time.perf_counter() - start,
        table,
        says=SAYS,
    )


if __name__ == "__main__":
    main()
