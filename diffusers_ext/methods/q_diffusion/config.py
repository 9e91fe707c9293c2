"""The configuration of the quantizer, as `from_pretrained(quantization_config=...)` takes it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from enum import Enum
from typing import Any

from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from .grids import ScaleMethod

__all__ = ["COMPUTE", "QDiffConfig", "QDiffMethod"]

COMPUTE = ("auto", "int8", "dequantize")
PACKED_BITS = 4  # up to so many two weights share a byte, with zero points; above, a signed byte holds one


class QDiffMethod(str, Enum):
    """The name under which Diffusers knows this quantizer."""

    QDIFF = "qdiff"


@dataclass(init=False)
class QDiffConfig(QuantizationConfigMixin):
    """How `Conv2d` and `Linear` layers of a Diffusers model are quantized (Q-Diffusion, arXiv 2302.04304).

    Given to `from_pretrained` it rounds weights to nearest while they load; `quantize_model` takes it to learn the
    rounding, and the ranges of activations. Weights have a grid for each output channel: asymmetric up to 4 bits, two
    in a byte; symmetric from 5 to 8, one in a byte, which is what integer kernels take.

    Args:
        weight_bits: 2..8.
        act_bits: 8 for activations in 8 bits, with one static range a layer; `None` leaves them as they are.
        softmax_bits: of attention probabilities, with `quantize_attention`.
        scale_method: `"mse"` looks for the range of least error, `"max"` takes all of it.
        act_symmetric: symmetric grids for activations.
        split_shortcuts: grids of their own for the two inputs of a UNet's shortcuts over concatenations (section 3.3
            of the paper).
        quantize_attention: also quantize query, key, value and probabilities of `Attention` layers; needs `act_bits`.
        modules_to_not_convert: layers left as they are: their names, names of what contains them, or parts of names
            between dots.
        compute: `"int8"` computes with integers, `"dequantize"` with floating-point weights made for each call,
            `"auto"` with the faster of them that is right; integers need `act_bits`.
        quant_method: what Diffusers writes into a saved configuration; ignored.

    Raises:
        ValueError: an argument is none of these.

    Example:
        >>> from diffusers_ext import QDiffConfig
        >>> QDiffConfig(weight_bits=4, act_bits=8).to_dict()["quant_method"]
        'qdiff'
    """

    weight_bits: int = 4
    act_bits: int | None = None
    softmax_bits: int = 8
    scale_method: ScaleMethod = "mse"
    act_symmetric: bool = False
    split_shortcuts: bool = True
    quantize_attention: bool = False
    modules_to_not_convert: list[str] | None = None
    compute: str = "auto"

    # Written out, because the base class has a field of its own, which would come first.
    def __init__(
        self,
        weight_bits: int = 4,
        act_bits: int | None = None,
        softmax_bits: int = 8,
        scale_method: ScaleMethod = "mse",
        act_symmetric: bool = False,
        split_shortcuts: bool = True,
        quantize_attention: bool = False,
        modules_to_not_convert: list[str] | None = None,
        compute: str = "auto",
        quant_method: Any = None,
    ) -> None:
        self.weight_bits, self.act_bits, self.softmax_bits = weight_bits, act_bits, softmax_bits
        self.scale_method, self.act_symmetric, self.split_shortcuts = scale_method, act_symmetric, split_shortcuts
        self.quantize_attention, self.modules_to_not_convert = quantize_attention, modules_to_not_convert
        self.compute = compute
        self.quant_method = QDiffMethod.QDIFF  # pyright: ignore[reportAttributeAccessIssue]
        self._check()

    def _check(self) -> None:
        _require(type(self.weight_bits) is int and 2 <= self.weight_bits <= 8, self, "weight_bits", "an int in 2..8")
        _require(self.act_bits in (None, 8), self, "act_bits", "8 or None")
        _require(type(self.softmax_bits) is int and 2 <= self.softmax_bits <= 16, self, "softmax_bits", "in 2..16")
        _require(self.scale_method in ("max", "mse"), self, "scale_method", "one of ['max', 'mse']")
        _require(self.compute in COMPUTE, self, "compute", f"one of {list(COMPUTE)}")
        for name in ("act_symmetric", "split_shortcuts", "quantize_attention"):
            _require(type(getattr(self, name)) is bool, self, name, "True or False")
        names = self.modules_to_not_convert
        listed = names is None or (isinstance(names, list | tuple) and all(isinstance(n, str) for n in names))
        _require(listed, self, "modules_to_not_convert", "a list of names of modules, or None")
        self.modules_to_not_convert = list(names) if names else None
        if self.act_bits is None:
            integer_only = "other than 'int8' without `act_bits`: integer kernels need activations in 8 bits"
            _require(self.compute != "int8", self, "compute", integer_only)
            _require(not self.quantize_attention, self, "quantize_attention", "False without `act_bits`")

    @property
    def packed(self) -> bool:
        """Whether two weights share a byte."""
        return self.weight_bits <= PACKED_BITS

    def to_dict(self) -> dict[str, Any]:
        """Returns what is saved, plain types only."""
        return {**asdict(self), "quant_method": QDiffMethod.QDIFF.value}

    def to_diff_dict(self) -> dict[str, Any]:
        """Returns what differs from the defaults."""
        defaults = {f.name: f.default for f in fields(self)}
        return {name: value for name, value in self.to_dict().items() if value != defaults.get(name)}


def _require(condition: bool, config: QDiffConfig, name: str, accepted: str) -> None:
    if not condition:
        raise ValueError(f"`{name}` must be {accepted}, got {getattr(config, name)!r}.")
