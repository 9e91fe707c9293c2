"""Reads the checkpoints that the authors of SGMSE+ published, without running any code that they hold."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from typing import Any

import torch

from diffusers_ext.training.config import require

from .scheduler_ouve import OUVEScheduler
from .scheduler_sbve import SBVEScheduler
from .unet import SGMSEUNet2DModel, published_blocks

__all__ = ["load_published"]

BACKBONES = ("ncsnpp", "ncsnpp_48k", "ncsnpp_v2")
# Names of a residual block's and an attention block's parts: theirs, ours.
RESNET = {
    "GroupNorm_0": "norm1",
    "Conv_0": "conv1",
    "Dense_0": "time_emb_proj",
    "GroupNorm_1": "norm2",
    "Conv_1": "conv2",
    "Conv_2": "conv_shortcut",
}
ATTENTION = {"GroupNorm_0": "group_norm", "NIN_0": "to_q", "NIN_1": "to_k", "NIN_2": "to_v", "NIN_3": "to_out.0"}


class _Stub:
    """Stands for the one class that the checkpoints name, that of their data."""


def load_published(path: str | os.PathLike, ema: bool = True) -> dict[str, Any]:
    """Loads a Lightning checkpoint of `sp-uhh/sgmse`; the file is unpickled as weights and plain values only.

    Args:
        path: of the `.ckpt` file.
        ema: take the averaged weights, with which the authors enhance.

    Returns:
        Arguments of `SpeechEnhancementPipeline`: network, scheduler and representation.

    Raises:
        ValueError: it is no such checkpoint, or of a kind that has no counterpart here; the message says what it has.
    """
    checkpoint = _read(path)
    parameters = checkpoint["hyper_parameters"]
    backbone = parameters.get("backbone", "ncsnpp")
    require(backbone in BACKBONES, "backbone", backbone, f"one of {list(BACKBONES)}")
    for name, only in (("transform_type", "exponent"), ("window", "hann"), ("centered", True), ("normalize", "noisy")):
        require(parameters.get(name, only) == only, name, parameters.get(name), repr(only))
    weights = _weights(checkpoint, ema)
    unet, sign = _network(backbone, parameters)
    scheduler, flipped = _scheduler(backbone, parameters)
    _fill(unet, weights, -sign if flipped else sign)
    wide = backbone == "ncsnpp_48k"
    return {
        "unet": unet.eval(),
        "scheduler": scheduler,
        # As the authors enhance: `sr` is 16000 in checkpoints of 48 kHz too, where nobody set it.
        "sample_rate": 48000 if wide else int(parameters.get("sr", 16000)),
        "n_fft": parameters.get("n_fft", 1534 if wide else 510),
        "hop_length": parameters.get("hop_length", 384 if wide else 128),
        "exponent": parameters.get("spec_abs_exponent", 0.667 if wide else 0.5),
        "factor": parameters.get("spec_factor", 0.065 if wide else 0.15),
        "frame_padding": "zero" if backbone == "ncsnpp" else "reflection",
    }


def _read(path: str | os.PathLike) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals([(_Stub, "sgmse.data_module.SpecsDataModule")]):  # type: ignore[list-item]
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"`path` must be a checkpoint that holds weights and plain values only, got {str(path)!r}: {error}"
        ) from error
    parts = isinstance(checkpoint, dict) and {"state_dict", "hyper_parameters"} <= set(checkpoint)
    require(parts, "path", str(path), "a Lightning checkpoint with 'state_dict' and 'hyper_parameters'")
    return checkpoint


def _weights(checkpoint: dict[str, Any], ema: bool) -> dict[str, torch.Tensor]:
    """Returns the tensors of the network by their names, averaged ones if asked for."""
    kept = {name: value for name, value in checkpoint["state_dict"].items() if not name.startswith("pesq_loss.")}
    foreign = [name for name in kept if not name.startswith("dnn.")]
    require(not foreign, "state_dict", foreign[:3], "tensors of the network, 'dnn.*'")
    weights = {name.removeprefix("dnn."): value for name, value in kept.items()}
    if not ema:
        return weights
    averaged = (checkpoint.get("ema") or {}).get("shadow_params") or []
    require(len(averaged) > 0, "ema", ema, "False for a checkpoint without averaged weights")
    shapes = [tuple(value.shape) for value in weights.values()]
    require(
        [tuple(value.shape) for value in averaged] == shapes,
        "shadow_params",
        f"{len(averaged)} tensors",
        f"the {len(shapes)} tensors of 'state_dict' in their order",
    )
    return dict(zip(weights, averaged, strict=True))


def _network(backbone: str, parameters: dict[str, Any]) -> tuple[SGMSEUNet2DModel, int]:
    """Makes the network and says by which sign its last layer is multiplied."""
    wide = backbone == "ncsnpp_48k"
    multiples = tuple(parameters.get("ch_mult", (1, 1, 2, 2, 2, 2, 2)))
    size, places = parameters.get("image_size", 256), parameters.get("attn_resolutions", () if wide else (16,))
    attention = [level for level in range(len(multiples)) if size // 2**level in tuple(places)]
    divide = None
    if backbone == "ncsnpp_v2":
        divide = "after" if parameters.get("network_scaling") == "1/t" else None
    elif parameters.get("scale_by_sigma", True):
        divide = "after" if wide else "before"
    pyramids, none = ("output_skip", "input_skip"), ("none", "none")
    usual = none if wide else pyramids
    pyramid = (parameters.get("progressive", usual[0]), parameters.get("progressive_input", usual[1]))
    require(pyramid in (pyramids, none), "progressive", pyramid, f"{pyramids} or {none}")
    unet = SGMSEUNet2DModel(
        **published_blocks(len(multiples), attention),
        block_out_channels=tuple(parameters.get("nf", 128) * multiple for multiple in multiples),
        layers_per_block=parameters.get("num_res_blocks", 2),
        dropout=parameters.get("dropout", 0.0),
        skip_pyramid=pyramid == pyramids,
        divide_by_time=divide,
    )
    return unet, 1 if backbone == "ncsnpp_v2" else -1  # score = -network, but not in the third paper


def _scheduler(backbone: str, parameters: dict[str, Any]) -> tuple[OUVEScheduler | SBVEScheduler, bool]:
    """Makes the scheduler and says whether its prediction is minus the authors'."""
    kind = parameters.get("sde", "ouve")
    require(kind in ("ouve", "sbve"), "sde", kind, "'ouve' or 'sbve'")
    prediction, flipped = _prediction(parameters) if backbone == "ncsnpp_v2" else ("score", False)
    sampler = parameters.get("sampler_type", "ode" if kind == "sbve" else "pc")
    if kind == "sbve":
        require(prediction == "sample", "loss_type", parameters.get("loss_type"), "'data_prediction' with sde 'sbve'")
        return SBVEScheduler(k=parameters.get("k", 2.6), c=parameters.get("c", 0.4), algorithm=sampler), flipped
    wide = backbone == "ncsnpp_48k"
    scheduler = OUVEScheduler(
        theta=parameters.get("theta", 2.0 if wide else 1.5),
        sigma_min=parameters.get("sigma_min", 0.1 if wide else 0.05),
        sigma_max=parameters.get("sigma_max", 1.0 if wide else 0.5),
        sampling_eps=parameters.get("t_eps", 0.03),
        prediction_type=prediction,
        algorithm="heun" if sampler == "ode" else "pc",
    )
    return scheduler, flipped


def _prediction(parameters: dict[str, Any]) -> tuple[Any, bool]:
    """Reads what a network of the third paper predicts from its loss and scalings (2409.10753, eq. 7)."""
    loss = parameters.get("loss_type", "score_matching")
    scalings = {name: parameters.get(name, plain) for name, plain in (("c_in", "1"), ("c_out", "1"), ("c_skip", "0"))}
    network = parameters.get("network_scaling")
    if loss == "denoiser":  # has no outer scalings
        scalings |= {"c_out": "1", "c_skip": "0"}
    outer = scalings["c_out"]
    if network == "1/sigma" and outer == "sigma":
        network, outer = None, "1"
    plain = scalings["c_in"] == "1" and scalings["c_skip"] == "0" and outer == "1" and network in (None, "1/t")
    predicted = {"score_matching": "score", "denoiser": "mean", "data_prediction": "sample"}
    if loss in predicted and plain:
        return predicted[loss], False
    once = (network, outer) in (("1/sigma", "1"), (None, "1/sigma"))
    if loss == "score_matching" and once and scalings["c_in"] == "1" and scalings["c_skip"] == "0":
        return "epsilon", True  # score = network / sigma = -epsilon / sigma
    raise ValueError(
        f"`loss_type` must be one of {list(predicted)} without EDM's scalings, got {loss!r} with "
        f"network_scaling={parameters.get('network_scaling')!r} and {scalings}."
    )


def _places(unet: SGMSEUNet2DModel) -> Iterator[tuple[str, dict[str, str] | None]]:
    """Yields our name of each of their `all_modules`, and of its parts, in their order."""
    config = unet.config
    levels, layers, pyramid = len(config["block_out_channels"]), config["layers_per_block"], config["skip_pyramid"]
    yield from (("time_proj", {"W": "weight"}), ("time_embedding.linear_1", None), ("time_embedding.linear_2", None))
    yield "conv_in", None
    for level, kind in enumerate(config["down_block_types"]):
        block = f"down_blocks.{level}"
        for layer in range(layers):
            yield f"{block}.resnets.{layer}", RESNET
            if kind.startswith("Attn"):
                yield f"{block}.attentions.{layer}", ATTENTION
        if level < levels - 1:
            yield f"{block}.resnet_down", RESNET
            if pyramid:
                yield f"{block}.skip_conv", {"Conv_0": ""}
    yield from (("mid_block.resnets.0", RESNET), ("mid_block.attentions.0", ATTENTION))
    yield "mid_block.resnets.1", RESNET
    for level, kind in enumerate(config["up_block_types"]):
        block, finest = f"up_blocks.{level}", level == levels - 1
        yield from ((f"{block}.resnets.{layer}", RESNET) for layer in range(layers + 1))
        if kind.startswith("Attn"):
            yield f"{block}.attentions.0", ATTENTION
        if pyramid and not finest:
            yield from ((f"{block}.skip_norm", None), (f"{block}.skip_conv", None))
        if not finest:
            yield f"{block}.resnet_up", RESNET
    yield from (("conv_norm_out", None), ("conv_out", None))


def _fill(unet: SGMSEUNet2DModel, weights: dict[str, torch.Tensor], sign: int) -> None:
    """Copies their tensors into the network.

    Raises:
        ValueError: a tensor is missing, left over or of another shape: the checkpoint is of another backbone.
    """
    places = list(_places(unet))
    found = {}
    for name, value in weights.items():
        first, *rest = name.split(".")
        if first == "output_layer":
            found[name] = sign * value
            continue
        number = int(rest[0]) if first == "all_modules" and rest and rest[0].isdigit() else len(places)
        place, parts = places[number] if number < len(places) else (f"(unknown) {name}", None)
        part, leaf = ".".join(rest[1:-1]), rest[-1]
        if parts is not None and not part:  # the Fourier features have no parts
            leaf = parts.get(leaf, leaf)
        elif parts is not None:
            part = parts.get(part, part)
        if leaf == "W":
            leaf, value = "weight", value.T
        found[".".join(word for word in (place, part, "bias" if leaf == "b" else leaf) if word)] = value
    own = {name: tuple(value.shape) for name, value in unet.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in found.items()}
    wrong = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
    if wrong:
        raise ValueError(
            f"`backbone` must be the one that the checkpoint's tensors are of, got {len(wrong)} that do not fit, the "
            f"first {wrong[0]!r}: {given.get(wrong[0], 'missing')} instead of {own.get(wrong[0], 'none')}."
        )
    unet.load_state_dict(found)
