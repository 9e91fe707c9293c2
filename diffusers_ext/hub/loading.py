"""What our pipelines and models add to `from_pretrained`: weights are safetensors, in every folder of a repo."""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import HfApi
from typing_extensions import Self

__all__ = ["SafeLoadingMixin", "SafePipeline", "check_weights", "checked_folder", "variant_hint"]

# The files that the loaders of Diffusers, transformers and PEFT read.
PICKLED = re.compile(r"((diffusion_)?pytorch_model|adapter_model)\b.*\.bin")
SAFE = re.compile(r"((diffusion_pytorch_)?model|adapter_model)\b.*\.safetensors")

REFUSED = (
    "holds no safetensors weights, and pickled ones are refused because they can run code. Convert them (load with "
    "`use_safetensors=False` where you trust the source, then `save_pretrained`), or pass `use_safetensors=False` "
    "(`None` takes either format)."
)


def _variants(files: Iterable[str]) -> set[str]:
    """Returns the variants of the safetensors weights among file names, "" for those of none."""
    weights = [re.sub(r"-\d{5}-of-\d{5}", "", file.removesuffix(".safetensors")) for file in files if SAFE.match(file)]
    return {name.partition(".")[2] for name in weights}


def _hint(variants: set[str]) -> str:
    names = " or ".join(f'variant="{name}"' for name in sorted(variants))
    return f"has weights of a variant only: pass {names}."


def check_weights(folder: Path, variant: str | None = None, given: Container[str] = ()) -> None:
    """Checks that a folder's weights are safetensors, before any of it is read.

    Args:
        folder: of a network, or of a pipeline, whose components are checked, pipelines within it too.
        variant: that will be asked for; a folder without it is loaded without one, as Diffusers does.
        given: components of the pipeline that are not loaded.

    Raises:
        OSError: there are pickled weights only, or those of other variants only; the message names the remedy.
    """
    if (folder / "model_index.json").is_file():
        for name, entry in json.loads((folder / "model_index.json").read_text()).items():
            component = isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)
            if component and not name.startswith("_") and name not in given and (folder / name).is_dir():
                check_weights(folder / name, variant)
        return
    files = [path.name for path in folder.iterdir()]
    variants = _variants(files)
    pickled = [file for file in files if PICKLED.fullmatch(file)]
    if pickled and not variants:
        raise OSError(f"{folder} {REFUSED} Found: {', '.join(pickled)}.")
    if variants and not variants & {"", variant}:
        raise OSError(f"{folder} {_hint(variants)}" + (f" Got variant={variant!r}." if variant else ""))


def variant_hint(place: str, subfolder: str | None = None, **hub: Any) -> str:
    """Returns what is to be said of a folder or repo all of whose weights are of a variant; else nothing."""
    try:
        if os.path.isdir(place):
            files = [path.name for path in (Path(place) / (subfolder or "")).iterdir()]
        else:
            names = HfApi(token=hub.get("token")).list_repo_files(place, revision=hub.get("revision"))
            files = [Path(name).name for name in names if subfolder is None or name.startswith(f"{subfolder}/")]
    except Exception:  # the hint is worth no error of its own
        return ""
    variants = _variants(files)
    return _hint(variants) if variants and "" not in variants else ""


def checked_folder(kind: Any, name: str | os.PathLike, **kwargs: Any) -> str | os.PathLike:
    """Returns the folder of a pipeline, downloaded if need be, all of whose weights are safetensors.

    Args:
        kind: the class that will load it.
        name: Hub repo or folder.
        **kwargs: what `from_pretrained` will be given.

    Raises:
        OSError: it has pickled weights, or those of other variants only; the message names the remedy.
    """
    folder = name
    if not os.path.isdir(name):
        if str(name).count("/") > 1:
            return name  # no repo either, as the loader will say
        try:
            folder = kind.download(name, **{**kwargs, "use_safetensors": True})
        except OSError as error:
            if "safetensors" not in str(error):
                raise
            hint = variant_hint(str(name), **kwargs)
            raise OSError(f"{name} {hint or REFUSED} Cause: {error}") from error
    if (Path(folder) / "model_index.json").is_file():
        check_weights(Path(folder), kwargs.get("variant"), kwargs)
    return folder


class SafeLoadingMixin:
    """Loads safetensors only, unless the caller asks otherwise: pickled weights can run code."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, **kwargs: Any) -> Self:
        """Loads as Diffusers does, with `use_safetensors=True` by default.

        Raises:
            OSError: the repo has no safetensors weights; the message names the remedy.
        """
        if kwargs.setdefault("use_safetensors", True):
            folder = Path(str(pretrained_model_name_or_path)) / (kwargs.get("subfolder") or "")
            if folder.is_dir():
                check_weights(folder, kwargs.get("variant"))
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]
        except OSError as error:
            if kwargs["use_safetensors"] and "safetensors" in str(error):
                hint = variant_hint(str(pretrained_model_name_or_path), **kwargs)
                raise OSError(f"{pretrained_model_name_or_path} {hint or REFUSED} Cause: {error}") from error
            raise


class SafePipeline(DiffusionPipeline):
    """Base of this package's pipelines: weights of every component are safetensors, nested pipelines' too."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, **kwargs: Any) -> Self:
        """Loads as Diffusers does, with `use_safetensors=True` by default; all is checked before anything is read.

        Raises:
            OSError: a component has no safetensors weights; the message names it and the remedy.
        """
        name: Any = pretrained_model_name_or_path
        if not kwargs.setdefault("use_safetensors", True):
            return super().from_pretrained(name, **kwargs)
        folder = checked_folder(cls, name, **kwargs)
        if (Path(folder) / "model_index.json").is_file():
            cls._check_timesteps(cls.load_config(folder), str(name))
        pipeline = super().from_pretrained(folder, **kwargs)
        pipeline.register_to_config(_name_or_path=name)
        return pipeline

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """Makes a pipeline of another's parts, as Diffusers does.

        Raises:
            ValueError: the other's network is good at some timesteps only, which this pipeline would leave.
        """
        cls._check_timesteps(pipeline.config, type(pipeline).__name__)
        # Diffusers casts to fp32 unless told otherwise, which quantized networks refuse; scales are in fp32 anyway.
        asked = any(kwargs.get(name) is not None for name in ("dtype", "torch_dtype"))
        parts = [] if asked else [m for m in pipeline.components.values() if getattr(m, "is_quantized", False)]
        for part in parts:
            part.is_quantized = False
        try:
            return super().from_pipe(pipeline, **kwargs)
        finally:
            for part in parts:
                part.is_quantized = True

    @classmethod
    def _check_timesteps(cls, config: Any, name: str) -> None:
        """Refuses a network that was tuned for a few timesteps where nothing would keep to them."""
        tuned = config.get("tuned_timesteps")
        if tuned and "tuned_timesteps" not in inspect.signature(cls.__init__).parameters:
            raise ValueError(
                f"{cls.__name__} must have a network that is good at every timestep, got {name!r}, tuned for "
                f"{list(tuned)} only: take the model that it was tuned from."
            )
