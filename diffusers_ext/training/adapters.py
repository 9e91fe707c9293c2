"""What LoRA layers need of the installed packages, found out before any work."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec

from packaging.version import Version

__all__ = ["require_peft"]


def require_peft(argument: str, text_encoder: bool = False) -> None:
    """Finds out whether peft is there, and new enough for what gets adapters.

    Args:
        argument: the argument that asks for them, for the message.
        text_encoder: text encoders get some too; there Transformers asks for a newer peft than Diffusers.

    Raises:
        ValueError: it is not.
    """
    if find_spec("peft") is None:
        raise ValueError(f"`{argument}` must be left out without peft: pip install diffusers-ext[lora]")
    if not text_encoder:
        return
    from transformers.integrations.peft import MIN_PEFT_VERSION

    found = version("peft")
    if Version(found) < Version(MIN_PEFT_VERSION):
        raise ValueError(
            f"`{argument}` must be left out, or peft be at least {MIN_PEFT_VERSION}, as this Transformers wants for "
            f"adapters of text encoders, got peft {found}: pip install -U peft"
        )
