"""Checkpoints of the original implementation as quantized Diffusers models."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping
from typing import Any

import torch

from .adaround import hard_integers
from .config import QDiffConfig
from .grids import quantization_grid, quantize
from .layers import QuantLayer, quantized_layer
from .quantizer import QDiffQuantizer, convertible, mark_quantized, replace_module, splits_for

__all__ = ["convert_qdiffusion_checkpoint"]

# Names of the DDIM repository's networks and their places in a `UNet2DModel`; {n} counts levels from the end.
DDIM = [
    (r"temb\.dense\.0", "time_embedding.linear_1"),
    (r"temb\.dense\.1", "time_embedding.linear_2"),
    (r"down\.(\d+)\.block\.(\d+)", r"down_blocks.\1.resnets.\2"),
    (r"down\.(\d+)\.attn\.(\d+)", r"down_blocks.\1.attentions.\2"),
    (r"down\.(\d+)\.downsample\.conv", r"down_blocks.\1.downsamplers.0.conv"),
    (r"mid\.block_1", "mid_block.resnets.0"),
    (r"mid\.block_2", "mid_block.resnets.1"),
    (r"mid\.attn_1", "mid_block.attentions.0"),
    (r"up\.(\d+)\.block\.(\d+)", r"up_blocks.{n}.resnets.\2"),
    (r"up\.(\d+)\.attn\.(\d+)", r"up_blocks.{n}.attentions.\2"),
    (r"up\.(\d+)\.upsample\.conv", "up_blocks.{n}.upsamplers.0.conv"),
    (r"norm_out", "conv_norm_out"),
]
ENDS = {
    "resnets": {"temb_proj": "time_emb_proj", "nin_shortcut": "conv_shortcut"},
    "attentions": {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"},
}
QUANTIZERS = (("weight_quantizer", "act_quantizer"), ("weight_quantizer_0", "act_quantizer_0"))


def convert_qdiffusion_checkpoint(checkpoint: str | os.PathLike, model: Any, config: QDiffConfig) -> Any:
    """Reads a checkpoint of the Q-Diffusion repository into a quantized copy of a Diffusers model.

    The file is a pickle, which is loaded with `weights_only=True`: it cannot run code. Weights of up to 4 bits keep
    the integers that were learned, but in channels whose grid does not hold 0, which are rounded anew; those of more
    bits are put on the nearest symmetric grid, which is the one that integer kernels take. Grids of attention's
    factors are left out.

    Args:
        checkpoint: the `ckpt.pth` of `sample_diffusion_ddim.py` or of `sample_diffusion_ldm.py` for a model without
            conditions (for a `UNet2DModel`), or that of a latent or Stable Diffusion model with spatial transformers
            (for a `UNet2DConditionModel`).
        model: of the same architecture; its weights are not used, and it stays as it is.
        config: the bits that the checkpoint was made with, `act_symmetric` included.

    Returns:
        The quantized model.

    Raises:
        ValueError: the file is no such checkpoint, or not of this architecture.

    Example:
        >>> unet = convert_qdiffusion_checkpoint("ckpt.pth", unet, QDiffConfig(4, act_bits=8))  # doctest: +SKIP
        >>> unet.save_pretrained("unet-w4a8")  # doctest: +SKIP
    """
    try:
        state: dict[str, torch.Tensor] = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # the loader raises many kinds
        raise ValueError(
            f"`checkpoint` must be a file of tensors that loads with `weights_only=True`, got {str(checkpoint)!r}: "
            f"{error}"
        ) from error
    state = _split_qkv({name.removeprefix("model."): value for name, value in state.items()}, model)
    learned = {
        name.removesuffix(".weight_quantizer.alpha") for name in state if name.endswith("weight_quantizer.alpha")
    }
    if not learned:
        raise ValueError(f"`checkpoint` must hold weight quantizers with `alpha`, got none in {str(checkpoint)!r}.")
    plain = {name: value for name, value in state.items() if "quantizer" not in name}
    names = _names(plain, model)
    made, splits = copy.deepcopy(model), splits_for(model, config)
    wanted = dict(made.state_dict())
    missing = sorted(set(wanted) - set(names))
    if missing:
        raise ValueError(f"`model` must have the checkpoint's architecture: {missing[0]!r} is not in the file.")
    with torch.no_grad():
        for name, value in wanted.items():
            value.copy_(plain[names[name]].reshape(value.shape))
    layers = convertible(made, config.modules_to_not_convert)
    for name, layer in layers.items():
        source = names[f"{name}.weight"].removesuffix(".weight")
        if source not in learned:
            raise ValueError(f"`checkpoint` must hold a quantizer for {source!r}, got none.")
        quantized = quantized_layer(layer, config, splits.get(name, 0))
        _fill(quantized, layer, state, source, config)
        replace_module(made, name, quantized)
    mark_quantized(made, QDiffQuantizer(copy.deepcopy(config), pre_quantized=True))
    return made.eval()


def _fill(
    quantized: QuantLayer, layer: Any, state: Mapping[str, torch.Tensor], source: str, config: QDiffConfig
) -> None:
    """Brings one layer's quantizers into a quantized layer."""
    split = f"{source}.weight_quantizer_0.alpha" in state
    if split != bool(quantized.split):
        raise ValueError(f"`split_shortcuts` must be {split}, as in the checkpoint ({source}), got {not split}.")
    integers, rounded = torch.empty_like(layer.weight), torch.empty_like(layer.weight)
    scales, zeros = [], []
    for (part, grid), (weights, inputs) in zip(quantized.parts(), QUANTIZERS, strict=False):
        alpha, step, zero = (state[f"{source}.{weights}.{key}"] for key in ("alpha", "delta", "zero_point"))
        weight = layer.weight.detach()[:, part]
        step, zero = quantized.column(step.flatten().clone()), quantized.column(zero.flatten().clone())
        integers[:, part] = hard_integers(weight, step, zero, alpha.reshape(weight.shape), config.weight_bits)
        rounded[:, part] = (integers[:, part] - zero) * step
        if config.packed:
            bits, outside = config.weight_bits, ((zero < 0) | (zero >= 2**config.weight_bits)).flatten()
            if outside.any():
                own = quantization_grid(rounded[outside][:, part], bits, config.scale_method, per_channel=True)
                step[outside], zero[outside] = (quantized.column(value) for value in own)
                integers[outside, part] = quantize(rounded[outside][:, part], step[outside], zero[outside], bits)
            quantized.set_grid(grid, step.flatten(), zero.flatten())
        if config.act_bits is not None:
            if f"{source}.{inputs}.delta" not in state:
                raise ValueError(f"`act_bits` must be None for a checkpoint of weights alone ({source}), got 8.")
            scales.append(state[f"{source}.{inputs}.delta"].float().reshape(()))
            zero = state.get(f"{source}.{inputs}.zero_point", torch.zeros(()))
            zeros.append(torch.tensor(128.0) if config.act_symmetric else zero.float().reshape(()).clamp(0, 255))
    if config.packed:
        quantized.set_integers(integers)
    else:
        quantized.round_to_nearest(rounded)
    if scales:
        quantized.act_scale, quantized.act_zero_point = torch.stack(scales), torch.stack(zeros).to(torch.uint8)


def _split_qkv(state: Mapping[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    """Takes query, key and value apart, which latent diffusion's own attention makes by one layer, head by head."""
    head, found = getattr(model.config, "attention_head_dim", None), {}
    for name, value in state.items():
        before, one, last = name.partition(".qkv.")
        if not one:
            found[name] = value
            continue
        heads = len(value) // 3 // head if head and value.ndim else 1
        for i, part in enumerate("qkv"):
            own = value if "act_quantizer" in last else value.unflatten(0, (heads, 3, -1))[:, i].flatten(0, 1)
            found[f"{before}.{part}.{last}"] = own
    return found


def _names(plain: dict[str, torch.Tensor], model: Any) -> dict[str, str]:
    """Returns, by name in the Diffusers model, the name in the checkpoint."""
    if any(name.startswith("input_blocks.") for name in plain):
        from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

        given = {f"model.diffusion_model.{name}": value for name, value in plain.items()}
        by_tensor = {id(value): name for name, value in plain.items()}
        renamed = convert_ldm_unet_checkpoint(given, dict(model.config))
        names = {name: by_tensor[id(value)] for name, value in renamed.items() if id(value) in by_tensor}
        if any("transformer_blocks" in name for name in names):
            return names
        return {_attention_name(name): source for name, source in names.items()}
    levels = len(model.config.block_out_channels)
    return {_ddim_name(name, levels): name for name in plain}


def _attention_name(name: str) -> str:
    """Returns the place of a layer of attention, under its old name, in an `Attention`."""
    layer, _, last = name.rpartition(".")
    above, _, own = layer.rpartition(".")
    return f"{above}.{ENDS['attentions'].get(own, own)}.{last}" if ".attentions." in name else name


def _ddim_name(name: str, levels: int) -> str:
    for pattern, place in DDIM:
        match = re.match(rf"{pattern}(?=\.)", name)
        if match is None:
            continue
        if "{n}" in place:
            place = place.replace("{n}", str(levels - 1 - int(match[1])))
        begin, end = match.expand(place), name[match.end() + 1 :]
        kind = next((kind for kind in ENDS if f".{kind}." in begin), None)
        layer, _, last = end.rpartition(".")
        layer = ENDS[kind].get(layer, layer) if kind else layer
        return ".".join(word for word in (begin, layer, last) if word)
    return name
