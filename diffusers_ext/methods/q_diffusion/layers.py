"""Layers whose weights are stored in 4 or 8 bits."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.compiler import is_compiling

from .config import QDiffConfig
from .grids import ScaleMethod, fake_quantize, quantization_grid, quantize
from .kernels import (
    ConvShape,
    channels_first,
    exact_kernel,
    int8_conv2d,
    int8_linear,
    pack_conv2d,
    pack_linear,
    rounded_activations,
    select_kernel,
    to_uint8,
)
from .packing import pack_int4, unpack_int4

__all__ = ["QUANTIZED_KINDS", "QuantConv2d", "QuantLayer", "QuantLinear", "check_compute", "quantized_layer"]

QUANTIZED_KINDS = (nn.Conv2d, nn.Linear)
ACT_BITS = 8


def _inexact(bits: int) -> ValueError:
    return ValueError(
        f"`compute` must be 'auto' or 'dequantize' on this machine for `weight_bits={bits}`, got 'int8': its integer "
        "kernels do not compute exactly. With `weight_bits=7` or 4 they may."
    )


def check_compute(config: QDiffConfig) -> None:
    """Tries the integer kernels, where a configuration asks for them, on a small layer.

    Raises:
        ValueError: they are wrong on this machine for so many bits.
    """
    bits = config.weight_bits
    largest = 2**bits - 1 if config.packed else 2 ** (bits - 1)
    if config.compute == "int8" and not exact_kernel("linear", ((32, 64), (16, 64)), largest):
        raise _inexact(bits)


def _is_plain(x: torch.Tensor) -> bool:
    """Returns whether integers on the CPU may be used: they have no gradient, and compilers do not see through."""
    return x.device.type == "cpu" and not (torch.is_grad_enabled() and x.requires_grad) and not is_compiling()


class QuantLayer(nn.Module):
    """What `QuantConv2d` and `QuantLinear` share: storage, and the choice between integers and floats.

    Attributes:
        qweight: `(out, ceil(n / 2))` uint8, two integers a byte, the first in the low half, up to 4 bits; the shape of
            the weight, int8, above.
        weight_scale: steps in fp32, `(out,)`, or `(out, 2)` for the two parts of a split weight.
        weight_zero_point: uint8 of the same shape, up to 4 bits; weights of more bits have none.
        act_scale: steps of the input in fp32, `(1,)` or `(2,)`, where activations are quantized.
        act_zero_point: uint8 of the same shape.
    """

    op: str
    method: ScaleMethod
    bias: nn.Parameter | None
    qweight: torch.Tensor
    weight_scale: torch.Tensor
    weight_zero_point: torch.Tensor | None
    act_scale: torch.Tensor | None
    act_zero_point: torch.Tensor | None

    def _store(self, layer: nn.Module, config: QDiffConfig, split: int) -> None:
        """Takes over what a layer is like, and makes room for its integers on its device."""
        nn.Module.__init__(self)
        own = {
            k: v for k, v in layer.__dict__.items() if not k.startswith("_") or k == "_reversed_padding_repeated_twice"
        }
        self.__dict__.update(own)
        weight: Any = layer.weight
        bias: Any = layer.bias
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        shape, device = tuple(weight.shape), weight.device
        self.weight_shape, self.split, self.bits = shape, split, config.weight_bits
        self.packed, self.method, self.compute = config.packed, config.scale_method, config.compute
        grids, parts = ((shape[0], 2), 2) if split else ((shape[0],), 1)
        stored = (shape[0], -(-math.prod(shape[1:]) // 2)) if self.packed else self.weight_shape
        integer = torch.uint8 if self.packed else torch.int8
        self.register_buffer("qweight", torch.zeros(stored, dtype=integer, device=device))
        self.register_buffer("weight_scale", torch.ones(grids, device=device))
        zeros = torch.zeros(grids, dtype=torch.uint8, device=device) if self.packed else None
        self.register_buffer("weight_zero_point", zeros)
        active = config.act_bits is not None
        self.register_buffer("act_scale", torch.ones(parts, device=device) if active else None)
        zeros = torch.zeros(parts, dtype=torch.uint8, device=device) if active else None
        self.register_buffer("act_zero_point", zeros)

    @property
    def weight(self) -> Any:
        """One NaN, expanded: tells shape, dtype and device; nothing can be merged into it. See `dequantize`.

        Loaders of LoRA weights put a layer of zeros in the place of one whose weight is smaller than theirs.
        """
        loading = self._parameters.get("weight")
        if loading is not None:
            return loading
        dtype = torch.float32 if self.bias is None else self.bias.dtype
        return torch.full((), math.nan, dtype=dtype, device=self.qweight.device).expand(self.weight_shape)

    @property
    def max_abs_weight(self) -> int:
        """The largest integer `|q - z|` that these bits allow."""
        return 2**self.bits - 1 if self.packed else 2 ** (self.bits - 1)

    def parts(self) -> list[tuple[slice, Any]]:
        """The slices of the input's channels that have a grid each, with what selects the grid."""
        if not self.split:
            return [(slice(None), ...)]
        return [(slice(self.split), (..., 0)), (slice(self.split, None), (..., 1))]

    @torch.no_grad()
    def round_to_nearest(self, weight: torch.Tensor) -> None:
        """Fills in the integers of a weight, each rounded to the nearest."""
        weight = weight.float()
        integers = torch.empty_like(weight)
        for part, grid in self.parts():
            step, zero = quantization_grid(weight[:, part], self.bits, self.method, not self.packed, True)
            integers[:, part] = quantize(weight[:, part], self.column(step), self.column(zero), self.bits)
            self.set_grid(grid, step, zero)
        self.set_integers(integers)

    def column(self, values: torch.Tensor) -> torch.Tensor:
        """Returns one value for each output channel in a shape that broadcasts to the weight."""
        return values.view(-1, *[1] * (len(self.weight_shape) - 1))

    def grids(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the steps and zero points as `quantization_grid` gives them."""
        half = torch.full_like(self.weight_scale, 2 ** (self.bits - 1))
        return self.weight_scale, half if self.weight_zero_point is None else self.weight_zero_point.float()

    def set_grid(self, grid: Any, step: torch.Tensor, zero: torch.Tensor) -> None:
        """Stores the grid of a part of the weight; `zero` is that of `quantization_grid`."""
        self.weight_scale[grid] = step.to(self.weight_scale)
        if self.weight_zero_point is not None:
            self.weight_zero_point[grid] = zero.to(self.weight_zero_point)

    def set_integers(self, integers: torch.Tensor) -> None:
        """Stores integers q in `0..2^b - 1`, of the shape of the weight."""
        if self.packed:
            self.qweight.copy_(pack_int4(integers))
        else:
            self.qweight.copy_(integers - 2 ** (self.bits - 1))

    def integers(self) -> torch.Tensor:
        """Returns q - z, `(out, in, ...)` int8."""
        if not self.packed:
            return self.qweight
        assert self.weight_zero_point is not None
        q = unpack_int4(self.qweight, math.prod(self.weight_shape[1:])).view(self.weight_shape).view(torch.int8)
        zero = self.weight_zero_point.view(torch.int8)
        for part, grid in self.parts():
            q[:, part].sub_(self.column(zero[grid]))
        return q

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Returns the weight, `(q - z) d`."""
        weight = self.integers().float()
        for part, grid in self.parts():
            weight[:, part].mul_(self.column(self.weight_scale[grid]))
        return weight.to(dtype)

    def kernel(self, x: torch.Tensor) -> str:
        """Returns how this input is computed, `"int8"` or `"dequantize"`.

        Raises:
            ValueError: integers were asked for, and their kernel is wrong on this machine.
        """
        if self.act_scale is None or self.compute == "dequantize" or not _is_plain(x) or not self.has_kernel():
            return "dequantize"
        shape = (self.weight_shape, tuple(x.shape), *self.options())
        if self.compute == "auto":
            return select_kernel(self.op, shape, self.max_abs_weight, self.packed, self.split)
        if not exact_kernel(self.op, shape, self.max_abs_weight):
            raise _inexact(self.bits)
        return "int8"

    def options(self) -> tuple[ConvShape, ...]:
        """Returns what an integer kernel must know beside the sizes."""
        return ()

    def has_kernel(self) -> bool:
        """Returns whether there are integer kernels for such a layer."""
        return True

    def operation(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Computes with floats."""
        raise NotImplementedError

    def integer_operation(self, q: torch.Tensor, *given: Any) -> torch.Tensor:
        """Computes with integers; see `int8_conv2d`."""
        raise NotImplementedError

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Computes as the layer that was quantized."""
        if self.kernel(input) == "int8":
            return self.integer_forward(input)
        return self.operation(self.rounded(input), self.dequantize(input.dtype), self.bias)

    def channels(self, x: torch.Tensor, part: slice) -> torch.Tensor:
        """Returns the channels of an input that a part of the weight sees."""
        return x[..., part] if self.op == "linear" else x[:, part]

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the input as it comes back from its integers; gradients pass as if it had not been rounded."""
        if self.act_scale is None or self.act_zero_point is None:
            return x
        found, grids = [], self.act_grids() if _is_plain(x) else None
        for i, (part, _) in enumerate(self.parts()):
            own = self.channels(x, part).float()
            if grids is not None:
                own = rounded_activations(own, *grids[i])
            else:
                step, zero = self.act_scale[i], self.act_zero_point[i].float()
                own = own + (fake_quantize(own, step, zero, ACT_BITS) - own).detach()
            found.append(own.to(x.dtype))
        return found[0] if len(found) == 1 else torch.cat(found, -1 if self.op == "linear" else 1)

    def act_grids(self) -> list[tuple[float, int]]:
        """Returns step and zero point of each part of the input."""
        assert self.act_scale is not None
        assert self.act_zero_point is not None
        return list(zip(self.act_scale.tolist(), self.act_zero_point.tolist(), strict=True))

    def integer_forward(self, x: torch.Tensor) -> torch.Tensor:
        """Computes with integers, whatever is faster or right."""
        bias = None if self.bias is None else self.bias.float()
        output: torch.Tensor | None = None
        for i, ((part, grid), (step, zero)) in enumerate(zip(self.parts(), self.act_grids(), strict=True)):
            q = to_uint8(self.channels(x, part).float(), step, zero)
            scale = self.weight_scale[grid].contiguous()
            if f"kernel_weight_{i}" not in self._buffers:
                packed = self.pack(self.integers()[:, part].contiguous(), scale, step, zero, q)
                self.register_buffer(f"kernel_weight_{i}", packed, persistent=False)
            own = self.integer_operation(q, step, zero, self._buffers[f"kernel_weight_{i}"], scale, bias)
            output, bias = own if output is None else output.add_(own), None
        assert output is not None
        output = output.to(x.dtype)
        # Kernels leave channels last, in which the normalisation that follows would be slower than the kernel is fast.
        return channels_first(output) if x.ndim == 4 and x.is_contiguous() else output

    def pack(self, weight: torch.Tensor, scale: torch.Tensor, step: float, zero: int, q: torch.Tensor) -> torch.Tensor:
        """Returns an int8 weight in the kernel's order."""
        raise NotImplementedError

    def drop_kernel_weights(self) -> None:
        """Forgets the weights in the kernels' order, which are made anew from the integers when they are needed."""
        for name in [name for name in self._buffers if name.startswith("kernel_weight")]:
            del self._buffers[name]
            self._non_persistent_buffers_set.discard(name)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.drop_kernel_weights()  # their order is one of the CPU
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        self.drop_kernel_weights()  # which cannot be copied
        return dict(self.__dict__)


class QuantConv2d(QuantLayer, nn.Conv2d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A `Conv2d` with weights of 2..8 bits; see `QuantLayer`.

    Args:
        layer: the convolution to be quantized, which stays as it is; on the meta device nothing is computed.
        config: bits, and how the ranges are found.
        split: channels of the input, from the first, that have a grid of their own; 0 for one grid.

    Example:
        >>> import torch
        >>> from diffusers_ext import QDiffConfig, QuantConv2d
        >>> layer = torch.nn.Conv2d(4, 6, 3)
        >>> QuantConv2d(layer, QDiffConfig(weight_bits=4)).qweight.shape
        torch.Size([6, 18])
    """

    op = "conv2d"

    def __new__(cls, layer: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Makes a plain convolution of sizes: peft makes low-rank layers of the type that they stand on."""
        return nn.Conv2d(layer, *args, **kwargs) if isinstance(layer, int) else super().__new__(cls)

    def __init__(self, layer: nn.Conv2d, config: QDiffConfig, split: int = 0) -> None:
        self._store(layer, config, split)
        if layer.weight.device.type != "meta":
            self.round_to_nearest(layer.weight)

    def options(self) -> tuple[ConvShape, ...]:
        """Returns stride, padding, dilation and groups."""
        return ((self.stride, self.padding, self.dilation, self.groups),)  # type: ignore[return-value]

    def has_kernel(self) -> bool:
        """Returns whether the padding is one of zeros, given in numbers."""
        return self.padding_mode == "zeros" and not isinstance(self.padding, str)

    def operation(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Convolves floats."""
        return self._conv_forward(x, weight, bias)

    def pack(self, weight: torch.Tensor, scale: torch.Tensor, step: float, zero: int, q: torch.Tensor) -> torch.Tensor:
        """Returns an int8 weight in the kernel's order."""
        return pack_conv2d(weight, scale, step, zero, *self.options(), q.shape)  # type: ignore[call-arg]

    def integer_operation(self, q: torch.Tensor, *given: Any) -> torch.Tensor:
        """Convolves integers."""
        return int8_conv2d(q, *given, *self.options())  # type: ignore[call-arg]


class QuantLinear(QuantLayer, nn.Linear):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A `Linear` with weights of 2..8 bits; see `QuantConv2d` and `QuantLayer`.

    Args:
        layer: the layer to be quantized.
        config: bits, and how the ranges are found.
        split: as in `QuantConv2d`.

    Example:
        >>> import torch
        >>> from diffusers_ext import QDiffConfig, QuantLinear
        >>> layer = torch.nn.Linear(8, 3)
        >>> quantized = QuantLinear(layer, QDiffConfig(weight_bits=8))
        >>> bool((quantized.dequantize() - layer.weight).abs().max() < 0.01)
        True
    """

    op = "linear"

    def __init__(self, layer: nn.Linear, config: QDiffConfig, split: int = 0) -> None:
        self._store(layer, config, split)
        if layer.weight.device.type != "meta":
            self.round_to_nearest(layer.weight)

    def operation(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Multiplies floats."""
        return F.linear(x, weight, bias)

    def pack(self, weight: torch.Tensor, scale: torch.Tensor, step: float, zero: int, q: torch.Tensor) -> torch.Tensor:
        """Returns an int8 weight in the kernel's order."""
        return pack_linear(weight, math.prod(q.shape[:-1]))

    def integer_operation(self, q: torch.Tensor, *given: Any) -> torch.Tensor:
        """Multiplies integers."""
        return int8_linear(q, *given)


def quantized_layer(layer: nn.Module, config: QDiffConfig, split: int = 0) -> QuantConv2d | QuantLinear:
    """Returns the quantized form of a `Conv2d` or `Linear`, rounded to nearest."""
    return QuantConv2d(layer, config, split) if isinstance(layer, nn.Conv2d) else QuantLinear(layer, config, split)  # type: ignore[arg-type]
