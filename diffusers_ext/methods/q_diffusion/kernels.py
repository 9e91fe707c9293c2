"""Integer kernels of the CPU, and whether they are right and faster than floating-point ones at a shape.

That an operator exists says nothing: on processors with AVX2 alone those of oneDNN run and saturate in 16 bits, which
makes results with 8-bit weights wrong. So each is checked against exact integers at extreme values, then timed.
"""

from __future__ import annotations

import functools
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.constants import HF_HOME

from .packing import pack_int4, unpack_int4

__all__ = [
    "ConvShape",
    "channels_first",
    "cpu_name",
    "exact_kernel",
    "int8_conv2d",
    "int8_linear",
    "kernel_is_exact",
    "pack_conv2d",
    "pack_linear",
    "rounded_activations",
    "select_kernel",
    "to_uint8",
]

TOLERANCE, REPEATS, LARGEST = 1e-4, 9, 16  # LARGEST: pixels a side of what is compared with exact integers
MANTISSA = 2**23
Shape = tuple[Any, ...]
ConvShape = tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]  # stride, padding, dilation, groups


def _shifted(x: torch.Tensor, step: float, zero: int) -> torch.Tensor:
    """Returns integers of activations, 0..255, plus 2^23, at which floats are integers: the sum rounds by itself."""
    shift = torch.tensor(float(MANTISSA + zero), device=x.device)
    return torch.add(shift, x, alpha=1 / step).clamp_(MANTISSA, MANTISSA + 255)


def to_uint8(x: torch.Tensor, step: float, zero: int) -> torch.Tensor:
    """Returns the integers of fp32 activations, rounded to nearest, with few passes over memory."""
    return _shifted(x, step, zero).view(torch.int32).to(torch.uint8)  # they are the lowest bits


def rounded_activations(x: torch.Tensor, step: float, zero: int) -> torch.Tensor:
    """Returns fp32 activations as they come back from the integers of `to_uint8`."""
    return _shifted(x, step, zero).sub_(MANTISSA + zero).mul_(step)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """Returns images with channels last in memory: what `contiguous` does, several times as fast."""
    if not x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = x.shape
    return _transposed(x, channels).view(batch, height, width, channels).permute(0, 3, 1, 2)


def channels_first(x: torch.Tensor) -> torch.Tensor:
    """Undoes `channels_last`."""
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return x.contiguous()
    batch, channels, height, width = x.shape
    return _transposed(x.permute(0, 2, 3, 1), height * width).view(x.shape)


def _transposed(x: torch.Tensor, rows: int) -> torch.Tensor:
    """Transposes, in each entry of a contiguous batch, a matrix of so many rows, by the one operator that is fast."""
    size = x[0].numel()
    pixels = x.as_strided((len(x), size, 1, 1), (size, 1, size, size))  # a picture of one pixel, channels last
    return F.channel_shuffle(pixels, rows).as_strided((len(x), size), (size, 1))


def pack_conv2d(
    weight: torch.Tensor, scale: torch.Tensor, step: float, zero: int, options: ConvShape, size: Sequence[int]
) -> torch.Tensor:
    """Brings the weight of a convolution into the order in which the kernel reads it.

    Args:
        weight: `(out, in, kernel, kernel)` int8.
        scale: `(out,)` fp32.
        step: of the activations.
        zero: of the activations.
        options: stride, padding, dilation and groups.
        size: of the input; others work with the same weight.
    """
    return torch.ops.onednn.qconv_prepack(weight, scale, step, zero, *_window(options), list(size))


def pack_linear(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """Brings the weight of a linear layer, `(out, in)` int8, into the kernel's order; see `pack_conv2d`."""
    return torch.ops.onednn.qlinear_prepack(weight, [rows, weight.shape[1]])


def int8_conv2d(
    q: torch.Tensor,
    step: float,
    zero: int,
    packed: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    options: ConvShape,
) -> torch.Tensor:
    """Convolves integers; the padding stands for the number 0.

    Args:
        q: `(batch, in, height, width)` uint8.
        step: of the activations.
        zero: of the activations.
        packed: see `pack_conv2d`.
        scale: `(out,)` fp32.
        bias: `(out,)` fp32.
        options: stride, padding, dilation and groups.

    Returns:
        `(batch, out, height, width)` fp32.
    """
    none = _no_zero_points(len(scale))
    post = (1.0, 0, torch.float32, "none", [], "")
    return torch.ops.onednn.qconv2d_pointwise(
        channels_last(q), step, zero, packed, scale, none, bias, *_window(options), *post
    )


def int8_linear(
    q: torch.Tensor, step: float, zero: int, packed: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Multiplies integers, `(..., in)` uint8, by a weight of `pack_linear`; see `int8_conv2d`."""
    rows, none = q.reshape(-1, q.shape[-1]), _no_zero_points(len(scale))
    post = (1.0, 0, torch.float32, "none", [], "")
    output = torch.ops.onednn.qlinear_pointwise(rows, step, zero, packed, scale, none, bias, *post)
    return output.reshape(*q.shape[:-1], len(scale))


@functools.cache
def _no_zero_points(channels: int) -> torch.Tensor:
    return torch.zeros(channels, dtype=torch.int64)


def _window(options: ConvShape) -> list[Any]:
    stride, padding, dilation, groups = options
    return [list(stride), list(padding), list(dilation), groups]


def _call(op: str, q: torch.Tensor, zero: int, weight: torch.Tensor, options: Any) -> torch.Tensor:
    scale = torch.ones(len(weight))
    if op == "linear":
        return int8_linear(q, 1.0, zero, pack_linear(weight, len(q)), scale, None)
    packed = pack_conv2d(weight, scale, 1.0, zero, options, q.shape)
    return int8_conv2d(q, 1.0, zero, packed, scale, None, options)


def _exact(op: str, q: torch.Tensor, zero: int, weight: torch.Tensor, options: Any) -> torch.Tensor:
    """Returns the same in float64, in which sums of such integers are exact."""
    x, weight = q.double() - zero, weight.double()
    return F.linear(x, weight) if op == "linear" else F.conv2d(x, weight, None, *options)


def kernel_is_exact(op: str, shape: Shape, max_abs_weight: int) -> bool:
    """Compares an integer kernel with exact integers: weights and activations at their extremes, and random ones.

    Args:
        op: `"conv2d"` or `"linear"`.
        shape: of the weight, of the input, and for `"conv2d"` a `ConvShape`.
        max_abs_weight: the largest integer that a weight has.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(size: Any, low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high + 1, tuple(size), generator=generator)

    options = shape[2] if op == "conv2d" else None
    size = [1, shape[1][1], *(min(n, LARGEST) for n in shape[1][2:])] if op == "conv2d" else [16, shape[1][-1]]
    low, high = max(-max_abs_weight, -128), min(max_abs_weight, 127)  # a signed byte reaches one further below 0
    sign = torch.where(draw(shape[0], 0, 1) == 1, high, low)
    upper, ends = torch.full(size, 255), draw(size, 0, 1) * 255
    cases = [
        (torch.full(shape[0], high), upper, 0),
        (torch.full(shape[0], low), upper, 0),
        (torch.full(shape[0], low), torch.zeros_like(upper), 128),
        (sign, ends, 0),
        (sign, ends, 128),
        (draw(shape[0], low, high), draw(size, 0, 255), 128),
    ]
    try:
        for weight, q, zero in cases:
            given = (op, q.to(torch.uint8), zero, weight.to(torch.int8), options)
            wanted = _exact(*given)
            if not (_call(*given).double() - wanted).abs().max() <= TOLERANCE * wanted.abs().max():
                return False
    except (RuntimeError, AttributeError, NotImplementedError):  # this build or processor does not have it
        return False
    return True


@functools.cache
def cpu_name() -> str:
    """Returns the processor's name and what its integer kernels depend on."""
    found = "cpu"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    units = [name for name in ("avx2", "avx512_vnni", "amx_int8") if capabilities.get(name)]
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "")
    return " ".join([found, *units, limit]).strip()


@functools.cache
def exact_kernel(op: str, shape: Shape, max_abs_weight: int) -> bool:
    """Returns whether the integer kernel is right for a weight, which is found out once; see `kernel_is_exact`."""
    question = ("exact", op, shape[0], shape[2:], max_abs_weight)
    return _answer(question, lambda: "yes" if kernel_is_exact(op, shape, max_abs_weight) else "no") == "yes"


def select_kernel(op: str, shape: Shape, max_abs_weight: int, packed: bool = False, split: int = 0) -> str:
    """Says how a layer is computed best at a shape: `"int8"` if that is right and faster, else `"dequantize"`.

    The answer is kept in this process and on disk (`diffusers_ext/kernels.json` in `HF_HOME`), by processor, number of
    threads and version of torch: a second process computes alike.

    Args:
        op: `"conv2d"` or `"linear"`.
        shape: sizes of the weight and of the input, and for `"conv2d"` stride, padding, dilation and groups. Batches
            up to the next power of two share an answer.
        max_abs_weight: the largest integer `|q - z|` that weights can have.
        packed: weights are stored two in a byte.
        split: channels of the input, from the first, that have a grid of their own; 0 for one grid.

    Raises:
        ValueError: `op` is none of these.

    Example:
        >>> from diffusers_ext import select_kernel
        >>> select_kernel("linear", ((8, 8), (4, 8)), 127) in ("int8", "dequantize")
        True
    """
    if op not in ("conv2d", "linear"):
        raise ValueError(f"`op` must be one of ['conv2d', 'linear'], got {op!r}.")
    return _selected(op, shape, max_abs_weight, packed, split, torch.get_num_threads())


@functools.cache  # each layer asks in each call
def _selected(op: str, shape: Shape, max_abs_weight: int, packed: bool, split: int, threads: int) -> str:
    batch = shape[1][0] if op == "conv2d" else math.prod(shape[1][:-1])
    inner = tuple(shape[1][1:]) if op == "conv2d" else (shape[1][-1],)
    shape = (tuple(shape[0]), (1 << max(batch - 1, 0).bit_length(), *inner), *shape[2:])

    def fastest() -> str:
        times = _times(op, shape, max_abs_weight, packed, split) if exact_kernel(op, shape, max_abs_weight) else {}
        return min(times, key=times.__getitem__, default="dequantize")

    return _answer((op, shape, max_abs_weight, packed, split), fastest)


def _times(op: str, shape: Shape, max_abs_weight: int, packed: bool, split: int) -> dict[str, float]:
    """Times both ways in turn and returns the least seconds of each: what other work on the machine disturbs least."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape[1], generator=generator)
    weight = torch.randint(-max_abs_weight // 2, max_abs_weight // 2 + 1, shape[0], generator=generator)
    stored = pack_int4(weight.clamp(0, 15)) if packed else weight.to(torch.int8)
    scale, length = torch.rand(len(weight), generator=generator), weight[0].numel()
    column = scale.view(-1, *[1] * (weight.ndim - 1))
    step, zero, conv = 0.02, 128, op == "conv2d"
    parts = [slice(split), slice(split, None)] if split else [slice(None)]

    def unpacked() -> torch.Tensor:
        return unpack_int4(stored, length).view(shape[0]) if packed else stored

    def inputs() -> list[torch.Tensor]:
        return [x[:, part] if conv else x[..., part] for part in parts]

    def prepared(own: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
        if conv:
            return pack_conv2d(of.contiguous(), scale, step, zero, shape[2], own.shape)
        return pack_linear(of.contiguous(), math.prod(own.shape[:-1]))

    given = unpacked().to(torch.int8)
    ready = [prepared(own, given[:, part]) for own, part in zip(inputs(), parts, strict=True)]

    def integers() -> torch.Tensor:
        found = []
        for own, packed_weight in zip(inputs(), ready, strict=True):
            same = (to_uint8(own, step, zero), step, zero, packed_weight, scale, None)
            found.append(int8_conv2d(*same, shape[2]) if conv else int8_linear(*same))
        output = found[0] if len(found) == 1 else found[0].add_(found[1])
        return channels_first(output) if conv else output

    def floats() -> torch.Tensor:
        rounded = [rounded_activations(own, step, zero) for own in inputs()]
        joined = rounded[0] if len(rounded) == 1 else torch.cat(rounded, 1 if conv else -1)
        made = unpacked().to(x.dtype).mul_(column)
        return F.conv2d(joined, made, None, *shape[2]) if conv else F.linear(joined, made)

    times: dict[str, list[float]] = {"int8": [], "dequantize": []}
    with torch.no_grad():
        for repeat in range(REPEATS + 1):
            for name, function in (("int8", integers), ("dequantize", floats)):
                start = time.perf_counter()
                function()
                if repeat:  # the first warms up
                    times[name].append(time.perf_counter() - start)
    return {name: min(values) for name, values in times.items()}


def _answer(question: tuple[Any, ...], find: Callable[[], str]) -> str:
    """Returns the answer that is on disk, else finds it out and puts it there; what other processes wrote stays."""
    machine, asked = json.dumps([cpu_name(), torch.get_num_threads(), torch.__version__]), json.dumps(question)
    known = _read().get(machine, {})
    if asked in known:
        return known[asked]
    answer, everything = find(), _read()
    everything.setdefault(machine, {})[asked] = answer
    partial = _file().with_suffix(f".{os.getpid()}.tmp")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(everything, indent=1))
        os.replace(partial, _file())
    except OSError:  # a home that cannot be written: each process finds out for itself
        pass
    return answer


def _read() -> dict[str, dict[str, str]]:
    try:
        return dict(json.loads(_file().read_text()))
    except (OSError, ValueError):
        return {}


def _file() -> Path:
    return Path(HF_HOME) / "diffusers_ext" / "kernels.json"
