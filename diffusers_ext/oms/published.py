"""Loads repos in the format in which the paper's authors published their modules.

Their `model_index.json` names classes of a package that cannot be installed any more, and each component's
`config.json` says in `_name_or_path` and `subfolder` where its weights really are, which may be another repo. That is
followed to repos only, never to code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from .unet import OMSUNet2DConditionModel

__all__ = ["is_published_format", "load_published"]

# What stands in their index for one encoder, and for the two of SDXL as one component.
SINGLE = {"oms_text_encoder": CLIPTextModel, "oms_tokenizer": CLIPTokenizer}
DUAL = {
    "oms_text_encoder": {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection},
    "oms_tokenizer": {"tokenizer": CLIPTokenizer, "tokenizer_2": CLIPTokenizer},
}
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")


def is_published_format(index: dict[str, Any]) -> bool:
    """Whether a `model_index.json` is one of theirs."""
    return (index.get("oms_module") or [None, None])[1] == "UNet2DConditionWoCTModel"


def load_published(
    repo: str | os.PathLike, index: dict[str, Any], given: dict[str, Any], **options: Any
) -> dict[str, Any]:
    """Loads the components of a published repo.

    Args:
        repo: Hub repo or folder.
        index: its `model_index.json`.
        given: components by name that the caller brings along; `None` leaves one out.
        **options: `dtype`, `variant`, `use_safetensors` and the Hub's own, as `from_pretrained` takes them.

    Returns:
        Components by the names of `OMSPipeline`'s arguments.

    Raises:
        OSError: a component is neither in the repo nor where its configuration says; the message names both.
    """
    hub = {name: options[name] for name in HUB_OPTIONS if name in options}
    found = dict(given)
    if "oms_module" not in found:
        place = _places(repo, "oms_module", hub)
        found["oms_module"] = _load("oms_module", OMSUNet2DConditionModel.from_pretrained, place, options)
    for name, single in SINGLE.items():
        recorded = (index.get(name) or [None, None])[1]
        if recorded is None or name in found:
            continue
        if not recorded.startswith("SDXL"):
            found[name] = _load(name, single.from_pretrained, _places(repo, name, hub), options)
            continue
        for inner, cls in DUAL[name].items():
            found[f"oms_{inner}"] = _load(name, cls.from_pretrained, _places(repo, name, hub, inner), options)
    return found


def _places(repo: str | os.PathLike, name: str, hub: dict[str, Any], inner: str = "") -> list[tuple[Any, str]]:
    """Returns where a component may be, as repos and subfolders: the repo's own folder, then what its config names."""
    if Path(repo).is_dir():
        path = Path(repo) / name / "config.json"
    else:
        path = Path(hf_hub_download(str(repo), f"{name}/config.json", **hub))
    places: list[tuple[Any, str]] = [(repo, f"{name}/{inner}" if inner else name)]
    config = json.loads(path.read_text()) if path.is_file() else {}
    elsewhere, folder = config.get("_name_or_path"), inner or config.get("subfolder")
    return [*places, (elsewhere, folder)] if elsewhere and folder else places


def _load(name: str, loader: Callable[..., Any], places: list[tuple[Any, str]], options: dict[str, Any]) -> Any:
    failures = []
    for i, (place, folder) in enumerate(places):
        known = ("cache_dir", "force_download", "local_files_only", "token", "dtype", "use_safetensors")
        arguments = {k: v for k, v in options.items() if k in known or (k == "revision" and i == 0)}
        if "okenizer" in name:
            arguments = {k: v for k, v in arguments.items() if k not in ("dtype", "use_safetensors")}
        # The module may come in a variant, and an encoder from elsewhere without it.
        for variant in dict.fromkeys([options.get("variant"), None]):
            extra = {} if variant is None or "okenizer" in name else {"variant": variant}
            try:
                return loader(place, subfolder=folder, **arguments, **extra)
            except (OSError, ValueError) as error:
                failures.append(f"{place}/{folder}: {error}")
    raise OSError(
        f"`{name}` could not be loaded; pass it as an argument, or None to use the base pipeline's. Tried: "
        + "; ".join(dict.fromkeys(failures))
    )
