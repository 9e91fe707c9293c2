"""What our pipelines and models add to `from_pretrained`."""

from __future__ import annotations

import os
from typing import Any

from diffusers import DiffusionPipeline
from typing_extensions import Self

__all__ = ["SafeLoadingMixin"]


class SafeLoadingMixin:
    """Loads safetensors only, unless the caller asks otherwise: pickled weights can run code."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, **kwargs: Any) -> Self:
        """Loads as Diffusers does, with `use_safetensors=True` by default.

        Raises:
            OSError: the repo has no safetensors weights; the message names the remedy.
        """
        kwargs.setdefault("use_safetensors", True)
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]
        except OSError as error:
            if kwargs["use_safetensors"] and ("safetensors" in str(error)):
                raise OSError(
                    f"{pretrained_model_name_or_path} holds no safetensors weights, and pickled ones are refused "
                    "because they can run code. Convert them (load with `use_safetensors=False` where you trust "
                    "the source, then `save_pretrained`), or pass `use_safetensors=False`. Cause: " + str(error)
                ) from error
            raise


class SafePipeline(SafeLoadingMixin, DiffusionPipeline):
    """Base of this package's pipelines."""
