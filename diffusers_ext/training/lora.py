"""LoRA layers on the network of any pipeline, in the format that the pipeline itself loads."""

from __future__ import annotations

import contextlib
import copy
import difflib
import tempfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from torch import nn

from diffusers_ext.generation.stepping import current_config
from diffusers_ext.hub.repo import has_lora_format, write_lora

__all__ = ["DEFAULT_TARGETS", "adapters_off", "add_lora", "check_loads_again", "require_peft"]

DEFAULT_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def require_peft() -> None:
    """Finds out whether peft is there.

    Raises:
        ValueError: it is not.
    """
    if find_spec("peft") is None:
        raise ValueError("`lora_rank` must be left out without peft: pip install diffusers-ext[lora]")


def add_lora(
    network: Any, rank: int, alpha: float | None = None, targets: Sequence[str] | None = None, dora: bool = False
) -> None:
    """Freezes a network and adds LoRA layers to it, which start as no change at all.

    Args:
        network: a Diffusers model.
        rank: rank of the layers.
        alpha: their scale is `alpha / rank`; by default `rank`.
        targets: names of layers, or ends of their names; by default the projections of attention.
        dora: train the magnitude of each target too (DoRA, arXiv 2402.09353).

    Raises:
        ValueError: peft is missing, a target names no layer (close names are listed), the rank is above theirs, or
            the magnitude of quantized layers is asked for.
    """
    require_peft()
    from peft import LoraConfig, inject_adapter_in_model

    layers = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    chosen = list(targets or DEFAULT_TARGETS)
    missing = [target for target in chosen if not any(_matches(name, target) for name in layers)]
    if targets is None and len(missing) < len(chosen):
        chosen = [target for target in chosen if target not in missing]
    elif missing:
        ends = sorted({end for name in layers for end in _ends(name)})
        close = [name for target in missing for name in difflib.get_close_matches(target, ends, n=3, cutoff=0.4)]
        raise ValueError(
            f"`lora_targets` must name linear or convolution layers of {type(network).__name__}, got {missing}; "
            f"{'close names are' if close else 'it has'} {sorted(set(close or ends))[:12]}."
        )
    # By whole names: an end of a name may also be that of a block, which peft refuses.
    names = [name for name in layers if any(_matches(name, target) for target in chosen)]
    largest = max(min(_sizes(network.get_submodule(name))) for name in names)
    if rank > largest:
        raise ValueError(f"`lora_rank` must be at most {largest}, the full rank of the largest layer, got {rank}.")
    # Layers that hold integers only show a weight without memory of its own.
    if dora and not all(network.get_submodule(name).weight.stride(0) for name in names):
        raise ValueError(
            f"`use_dora` must be False for this {type(network).__name__}, got True: its quantized layers keep no "
            "weight whose magnitude could be trained."
        )
    network.requires_grad_(False)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,  # type: ignore[arg-type]
        init_lora_weights="gaussian",
        target_modules=names,
        use_dora=dora,
    )
    if hasattr(network, "add_adapter"):
        network.add_adapter(config)
    else:
        inject_adapter_in_model(config, network)


def _sizes(layer: Any) -> tuple[int, int]:
    """Returns how many outputs and inputs a layer has; weights of quantized ones have other shapes."""
    linear = isinstance(layer, nn.Linear)
    return (layer.out_features, layer.in_features) if linear else (layer.out_channels, layer.in_channels)


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _ends(name: str) -> list[str]:
    """Returns the last word of a name, with the one before it where the last is a number."""
    words = name.split(".")
    return [".".join(words[-2:])] if words[-1].isdigit() and len(words) > 1 else [words[-1]]


def _adapters(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a network's LoRA parameters, whatever the adapter is called."""
    return {
        ".".join(word for word in name.split(".") if word not in ("default", "default_0")): tuple(p.shape)
        for name, p in network.named_parameters()
        if "lora_" in name
    }


def check_loads_again(pipe: Any, network_name: str, targets: Sequence[str] | None) -> None:
    """Saves the untrained LoRA layers and has the pipeline load them, into a network without memory.

    Args:
        pipe: the pipeline, whose network has LoRA layers.
        network_name: the component that they belong to.
        targets: what they were added to, for the message.

    Raises:
        ValueError: the pipeline's own loader does not find all of them again.
    """
    network = getattr(pipe, network_name)
    with init_empty_weights():
        twin: Any = type(network).from_config(current_config(network))
    before, failure = _adapters(network), ""
    with tempfile.TemporaryDirectory() as folder:
        write_lora(pipe, network_name, Path(folder))
        try:
            if has_lora_format(pipe, network_name):
                other = copy.copy(pipe)
                setattr(other, network_name, twin)
                other.load_lora_weights(folder, low_cpu_mem_usage=True)
            else:
                from peft import PeftModel

                PeftModel.from_pretrained(twin, folder, low_cpu_mem_usage=True)
        except Exception as error:  # the loaders raise many kinds
            failure = f" ({type(error).__name__}: {error})"
    after = _adapters(twin)
    lost = sorted(name for name in before if after.get(name) != before[name])
    if failure or lost or len(after) != len(before):
        names = sorted({name.split(".lora_")[0] for name in lost})
        raise ValueError(
            f"`lora_targets` must be layers that {type(pipe).__name__}.load_lora_weights finds again, got "
            f"{list(targets or DEFAULT_TARGETS)}: {len(names)} layers would be lost, first {names[:3]}{failure}."
        )


@contextlib.contextmanager
def adapters_off(network: Any) -> Iterator[None]:
    """Turns a network into its base for a while: the LoRA layers are off, and so is dropout."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
    was_training, trained = network.training, [(p, p.requires_grad) for p in network.parameters()]
    network.eval()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for p, flag in trained:  # peft lets all layers be trained again
            p.requires_grad_(flag)
        network.train(was_training)
