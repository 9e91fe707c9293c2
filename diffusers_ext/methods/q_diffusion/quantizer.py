"""The quantizer that Diffusers' loader works with."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from safetensors import safe_open
from torch import nn

from .attention import QDiffAttnProcessor, use_quantized_attention
from .config import QDiffConfig
from .layers import QUANTIZED_KINDS, QuantLayer, check_compute, quantized_layer

__all__ = ["QDiffQuantizer", "convertible", "mark_quantized", "replace_module", "shortcut_splits"]

logger = logging.getLogger(__name__)


def convertible(model: nn.Module, excluded: Sequence[str] | None) -> dict[str, nn.Module]:
    """Returns the layers that are quantized, by name, in the order of the model.

    Args:
        model: any model.
        excluded: `modules_to_not_convert`.

    Raises:
        ValueError: a name in `excluded` fits no module, or nothing is left.
    """
    names = [name for name, _ in model.named_modules() if name]
    for wanted in excluded or []:
        if not any(f".{wanted}." in f".{name}." for name in names):
            raise ValueError(
                f"`modules_to_not_convert` must name modules of {type(model).__name__}, such as {names[0]!r}, got "
                f"{wanted!r}."
            )
    found = {
        name: module
        for name, module in model.named_modules()
        # Subclasses read their weights themselves.
        if type(module) in QUANTIZED_KINDS and not any(f".{e}." in f".{name}." for e in excluded or [])
    }
    if not found:
        raise ValueError(
            f"`model` must have Conv2d or Linear layers to quantize, {type(model).__name__} has none left."
        )
    return found


def shortcut_splits(model: nn.Module) -> dict[str, int]:
    """Returns, by name of the shortcut, how many of its input channels come from below; the rest are the skip's.

    These are the 1x1 convolutions that resnets of a UNet's way up have beside the concatenation of their inputs.
    """
    ups, widths = (
        getattr(model, "up_blocks", None),
        getattr(getattr(model, "config", None), "block_out_channels", None),
    )
    if ups is None or not widths:
        return {}
    found, below = {}, widths[-1]
    for i, block in enumerate(ups):
        for j, resnet in enumerate(getattr(block, "resnets", [])):
            shortcut = getattr(resnet, "conv_shortcut", None)
            if isinstance(shortcut, nn.Conv2d) and 0 < below < shortcut.in_channels:
                found[f"up_blocks.{i}.resnets.{j}.conv_shortcut"] = below
            below = resnet.out_channels
    return found


def splits_for(model: nn.Module, config: QDiffConfig) -> dict[str, int]:
    """Returns the splits that a configuration asks for; says so where there is nothing to split."""
    found = shortcut_splits(model) if config.split_shortcuts else {}
    if config.split_shortcuts and not found:
        logger.warning("`split_shortcuts` changes nothing: %s has no shortcuts over skips.", type(model).__name__)
    return found


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module in the place of that name."""
    parent, _, last = name.rpartition(".")
    model.get_submodule(parent)._modules[last] = module


def mark_quantized(model: Any, quantizer: QDiffQuantizer) -> None:
    """Tells a model what the loader tells one that it has quantized, so that it saves and prints itself so."""
    config = quantizer.quantization_config
    model.is_quantized, model.quantization_method = True, config.quant_method
    model.hf_quantizer = quantizer
    model.register_to_config(quantization_config=config)


class QDiffQuantizer(DiffusersQuantizer):
    """Loads models quantized by `quantize_model`, or rounds the weights of others to nearest while they load.

    Diffusers makes it from a `QDiffConfig`, once `diffusers_ext` is imported.

    Example:
        >>> from diffusers import UNet2DModel
        >>> from diffusers_ext import QDiffConfig
        >>> UNet2DModel.from_pretrained(repo, quantization_config=QDiffConfig(weight_bits=8))  # doctest: +SKIP
    """

    quantization_config: QDiffConfig
    _files: Mapping[str, str] = MappingProxyType({})  # by name of a value, the file that holds it

    @property
    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Quantized models are saved as they are."""
        return True

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Integers have no gradient; layers on top, such as LoRA, have."""
        return False

    @property
    def is_compileable(self) -> bool:
        """`torch.compile` sees weights dequantized."""
        return True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuses what needs calibration, before anything is read.

        Raises:
            ValueError: activations in 8 bits for a model that is quantized while it loads, or integers are asked for
                on a machine where their kernels are wrong.
        """
        config = self.quantization_config
        if not self.pre_quantized and config.act_bits is not None:
            raise ValueError(
                f"`act_bits` must be None for a model that is quantized while it loads, got {config.act_bits}: ranges "
                "of activations need calibration, see `quantize_model`."
            )
        check_compute(config)

    def adjust_target_dtype(self, torch_dtype: torch.dtype) -> Any:
        """Returns the size of a weight, from which device maps are made."""
        from accelerate.utils.modeling import CustomDtype

        return CustomDtype.INT4 if self.quantization_config.packed else torch.int8

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        splits = splits_for(model, config)
        for name, layer in convertible(model, config.modules_to_not_convert).items():
            quantized = quantized_layer(layer, config, splits.get(name, 0))
            if not self.pre_quantized:  # room for what is read from the file, until it is rounded
                quantized._parameters["weight"] = nn.Parameter(layer.weight.detach(), requires_grad=False)  # type: ignore[union-attr,operator]
            replace_module(model, name, quantized)
        if config.quantize_attention:
            use_quantized_attention(model, config)
        model.config.quantization_config = config

    def _place(self, model: nn.Module, param_name: str) -> tuple[nn.Module, str]:
        owner, _, name = param_name.rpartition(".")
        return model.get_submodule(owner), name

    def check_if_quantized_param(
        self, model: Any, param_value: torch.Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """Returns whether a value is one of ours: integers, their scales, or a weight to be rounded."""
        owner, name = self._place(model, param_name)
        return isinstance(owner, QuantLayer | QDiffAttnProcessor) and name != "bias"

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Notes which file holds which value; changes nothing."""
        self._files = {}
        for path in (path for path in checkpoint_files or [] if str(path).endswith(".safetensors")):
            with safe_open(path, framework="pt") as file:
                self._files |= dict.fromkeys(file.keys(), path)
        return loaded_keys

    def _value(self, name: str, state_dict: dict[str, Any]) -> torch.Tensor:
        """Returns a value as the file has it.

        The loader's file is mapped until all of it is loaded, and what was read of it stays in memory. Read by itself,
        a value goes as soon as it is rounded.
        """
        if name not in self._files:
            return state_dict[name]
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)

    def create_quantized_param(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        model: Any,
        param_value: torch.Tensor,
        param_name: str,
        target_device: torch.device,
        state_dict: dict[str, Any],
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Stores a value of the file, which the loader's own copy may have rounded to the model's dtype."""
        owner, name = self._place(model, param_name)
        value = self._value(param_name, state_dict).to(target_device)
        if name == "weight":
            assert isinstance(owner, QuantLayer)
            for key, buffer in owner._buffers.items():
                if buffer is not None:
                    owner._buffers[key] = torch.zeros_like(buffer, device=value.device)
            owner.round_to_nearest(value)
            del owner._parameters["weight"]
        else:
            owner._buffers[name] = value

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        """Leaves out what is made while the model loads."""
        if self.pre_quantized:
            return missing_keys
        own = {f"{name}.{key}" for name, m in model.named_modules() if isinstance(m, QuantLayer) for key in m._buffers}
        return [key for key in missing_keys if key not in own]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, module in model.named_modules():
            if isinstance(module, QuantLayer | QDiffAttnProcessor):
                tensors = [*module._parameters.values(), *module._buffers.values()]
                # Those that were taken to a file by the device map have a hook instead.
                empty = any(t is not None and t.device.type == "meta" for t in tensors)
                if empty and not hasattr(module, "_hf_hook"):
                    raise ValueError(f"the file must hold the weights of {name!r}, some of them are not there.")
        return model

    def _dequantize(self, model: Any) -> Any:
        """Puts floating-point layers in the place of the quantized ones; their values are the rounded ones."""
        for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, QuantLayer)]:
            replace_module(model, name, float_layer(layer))
        for module in model.modules():
            if isinstance(getattr(module, "processor", None), QDiffAttnProcessor):
                module.set_processor(module.processor.plain())
        model.register_to_config(quantization_config=None)
        model._internal_dict = type(model.config)(
            {k: v for k, v in model.config.items() if k != "quantization_config"}
        )
        return model


def float_layer(layer: QuantLayer) -> nn.Module:
    """Returns the `Conv2d` or `Linear` of the rounded weights, in the dtype of its bias."""
    kind = nn.Conv2d if layer.op == "conv2d" else nn.Linear
    made = kind.__new__(kind)
    nn.Module.__init__(made)
    own = {k: v for k, v in layer.__dict__.items() if not k.startswith("_") or k == "_reversed_padding_repeated_twice"}
    for name in ("weight_shape", "split", "bits", "packed", "method", "compute"):
        own.pop(name)
    made.__dict__.update(own)
    made.weight = nn.Parameter(layer.dequantize(layer.weight.dtype), requires_grad=False)
    made.register_parameter("bias", layer.bias)
    return made
