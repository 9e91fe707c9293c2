"""Loads repos in the format in which the paper's authors published their modules.

Their `model_index.json` names classes of a package that cannot be installed any more. The text encoders and tokenizers
are not in the repo: each one's `config.json` says in `_name_or_path` and `subfolder` which other repo has it. That is
followed to weights and vocabularies only, never to code.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils import cached_file

from diffusers_ext.hub.loading import check_weights, variant_hint

from .unet import OMSUNet2DConditionModel

__all__ = ["HUB_OPTIONS", "is_published_format", "load_published"]

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")

# What a component of theirs holds: one model, or the two of SDXL.
SINGLE: dict[str, dict[str, Any]] = {
    "oms_text_encoder": {"text_encoder": CLIPTextModel},
    "oms_tokenizer": {"tokenizer": CLIPTokenizer},
}
DUAL: dict[str, dict[str, Any]] = {
    "oms_text_encoder": {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection},
    "oms_tokenizer": {"tokenizer": CLIPTokenizer, "tokenizer_2": CLIPTokenizer},
}


def is_published_format(index: dict[str, Any]) -> bool:
    """Whether a `model_index.json` is one of theirs."""
    return (index.get("oms_module") or [None, None])[1] == "UNet2DConditionWoCTModel"


def load_published(
    repo: str,
    index: dict[str, Any],
    given: dict[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    use_safetensors: bool = True,
    **hub: Any,
) -> dict[str, Any]:
    """Loads the components of a published repo.

    Args:
        repo: Hub repo or folder.
        index: its `model_index.json`.
        given: components by name that the caller brings along; `None` leaves one out.
        dtype: of the weights.
        variant: such as `"fp16"`; a component that has no such files is loaded without.
        use_safetensors: refuse pickled weights.
        **hub: `cache_dir`, `force_download`, `local_files_only`, `revision` and `token`.

    Returns:
        Components by the names of `OMSPipeline`'s arguments.

    Raises:
        OSError: a component cannot be loaded; the message says where it was looked for.
        ValueError: an argument is unknown.
    """
    for name in hub:
        if name not in HUB_OPTIONS:
            raise ValueError(f"`{name}` must be left out for a repo in the format of the published modules.")
    weights = {"dtype": dtype, "use_safetensors": use_safetensors}
    found, plan = dict(given), []  # (argument, component, loader, repo, folder, options)
    if "oms_module" not in found:
        loader = OMSUNet2DConditionModel.from_pretrained
        plan.append(("oms_module", "oms_module", loader, repo, "oms_module", {**weights, **hub}))
    for name in SINGLE:
        recorded = (index.get(name) or [None, None])[1]
        if recorded is None or name in found:
            continue
        config = _read_config(repo, name, hub)
        dual = "SDXL" in recorded or "SDXL" in str(config.get("_class_name"))
        for inner, cls in (DUAL if dual else SINGLE)[name].items():
            options = {**weights, **hub} if "encoder" in name else hub
            place, folder = repo, f"{name}/{inner}" if dual else name
            if "_name_or_path" in config and (dual or "subfolder" in config):
                place, folder = config["_name_or_path"], inner if dual else config["subfolder"]
                options = {key: value for key, value in options.items() if key != "revision"}  # that of this repo
            loader = cls.from_pretrained if "encoder" in name else _load_tokenizer
            plan.append((f"oms_{inner}", name, loader, place, folder, options))
    for _, name, _, place, folder, _ in plan if use_safetensors else []:
        _check(name, place, folder, variant)
    return found | {argument: _load(*component, variant=variant) for argument, *component in plan}


def _read_config(repo: str, name: str, hub: dict[str, Any]) -> dict[str, Any]:
    path = Path(repo) / name / "config.json"
    if not Path(repo).is_dir():
        try:
            path = Path(hf_hub_download(repo, f"{name}/config.json", **hub))
        except EntryNotFoundError:
            return {}
    return json.loads(path.read_text()) if path.is_file() else {}


def _load_tokenizer(place: str, subfolder: str, **hub: Any) -> CLIPTokenizer:
    """Loads a tokenizer that is there; `CLIPTokenizer.from_pretrained` alone makes up one without words otherwise."""
    search: dict[str, Any] = {**hub, "subfolder": subfolder, "_raise_exceptions_for_missing_entries": False}
    if not any(cached_file(place, file, **search) for file in ("tokenizer.json", "vocab.json")):
        raise OSError("it has neither tokenizer.json nor vocab.json.")
    return CLIPTokenizer.from_pretrained(place, subfolder=subfolder, **hub)


def _check(name: str, place: str, folder: str, variant: str | None) -> None:
    """Refuses a folder with pickled weights before anything is read; of a repo, its loader does."""
    try:
        if (Path(place) / folder).is_dir():
            check_weights(Path(place) / folder, variant)
    except OSError as error:
        raise OSError(f"`{name}` could not be loaded; pass it as an argument, or None to use the base pipeline's. "
                      f"Cause: {error}") from error  # fmt: skip


def _load(
    name: str, loader: Callable[..., Any], place: str, folder: str, options: dict[str, Any], variant: str | None
) -> Any:
    """Loads a component in its variant, or without where it has none."""
    failures = []
    for extra in [{"variant": variant}] * (variant is not None and "dtype" in options) + [{}]:
        try:
            return loader(place, subfolder=folder, **options, **extra)
        except (OSError, ValueError) as error:
            failures.append(str(error))
    hint = f" It {hint}" if (hint := variant_hint(place, folder, **options)) else ""
    raise OSError(
        f"`{name}` could not be loaded from {folder!r} of {place!r}; pass it as an argument, or None to use the base "
        f"pipeline's.{hint} Cause: {failures[-1]}"
    )
