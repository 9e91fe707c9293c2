"""LoRA weights of text encoders: there Transformers asks for a newer peft than Diffusers does for networks."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from packaging.version import Version

__all__ = ["check_text_encoder_lora"]


def check_text_encoder_lora(pipeline: Any, weights: Any, **options: Any) -> None:
    """Refuses LoRA weights of a text encoder before any are loaded, where Transformers would after the network's.

    Args:
        pipeline: that is to load them.
        weights: what `load_lora_weights` is given: a Hub repo, a folder or file, or a dict of tensors.
        **options: its further arguments.

    Raises:
        ValueError: there are some, and the installed peft is too old for them.
    """
    from transformers.integrations.peft import MIN_PEFT_VERSION

    if find_spec("peft") is None or Version(version("peft")) >= Version(MIN_PEFT_VERSION):
        return
    found = pipeline.lora_state_dict(dict(weights) if isinstance(weights, dict) else weights, **options)
    state = found[0] if isinstance(found, tuple) else found
    encoders = sorted({key.split(".")[0] for key in state if key.startswith("text_encoder")})
    if encoders:
        raise ValueError(
            f"`pretrained_model_name_or_path_or_dict` must be LoRA weights of the network alone, or peft be at least "
            f"{MIN_PEFT_VERSION}, as this Transformers wants for adapters of text encoders, got some of {encoders} "
            f"and peft {version('peft')}: pip install -U peft."
        )
