"""Complete Hub repos: written whole, then pushed."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from PIL import Image
from safetensors.torch import save_file

from .card import RepoCard, default_snippet, fill_in_repo_id

__all__ = ["has_lora_format", "pipeline_code", "push_repo", "save_lora_repo", "save_repo", "write_lora"]

IGNORED = ["checkpoint-*", "checkpoint-*/**", "*.tmp", "*.tmp/**", "logs/**", "samples/**", "cache/**"]
IGNORED += ["precomputed-*/**"]  # an older place

CODE = '''"""Loads {name} from the package `diffusers-ext`."""

# Diffusers runs every local pipeline.py in one module, where the classes of an earlier one would be in the way.
for stale in [name for name, value in globals().items() if isinstance(value, type)]:
    del globals()[stale]

try:
    from diffusers_ext import {name}
except ImportError as error:
    raise ImportError("this pipeline needs the package diffusers-ext: pip install diffusers-ext") from error

__all__ = ["{name}"]
'''


def pipeline_code(name: str) -> str:
    """Returns the `pipeline.py` that re-exports a pipeline class of this package."""
    return CODE.format(name=name)


def save_repo(
    pipeline: DiffusionPipeline,
    save_directory: str | os.PathLike,
    *,
    card: RepoCard | None = None,
    sample: Image.Image | None = None,
    self_contained: bool = False,
    variant: str | None = None,
) -> Path:
    """Writes a pipeline as a complete Hub repo.

    Weights are safetensors. Everything is written to a temporary folder first and moved in when it is whole, so that
    a failure to write leaves an earlier content as it was; other files in the folder stay. A process that is killed
    while the files are moved may leave some old and some new ones; saving again mends that.

    Args:
        pipeline: any Diffusers pipeline. One of this package gets a `pipeline.py`, so that
            `custom_pipeline=` works on the repo.
        save_directory: the folder.
        card: contents of README.md, `training_arguments.json` and `results.json`.
        sample: picture for the card, saved as `sample.png`.
        self_contained: name that `pipeline.py` in `model_index.json`, so that
            `DiffusionPipeline.from_pretrained(repo, trust_remote_code=True)` works without importing this package
            first. Such a repo then always asks for `trust_remote_code`.
        variant: such as `"fp16"`, as in `save_pretrained`.

    Returns:
        The folder.

    Raises:
        ValueError: `self_contained` with a pipeline that is not of this package.
    """
    name, own = type(pipeline).__name__, type(pipeline).__module__ == "diffusers_ext"
    if self_contained and not own:
        raise ValueError(f"`self_contained` must be False for a pipeline of another package, got {name}.")
    with _written_whole(save_directory) as folder:
        pipeline.save_pretrained(folder, safe_serialization=True, variant=variant)
        if own:
            (folder / "pipeline.py").write_text(pipeline_code(name))
        if self_contained:
            index = folder / "model_index.json"
            entries = json.loads(index.read_text())
            entries["_class_name"] = ["pipeline", name]
            index.write_text(json.dumps(entries, indent=2) + "\n")
        if card is not None and card.snippet is None:
            conditional = getattr(getattr(pipeline, "unet", None), "class_embedding", None) is not None
            call = "class_labels=0" if conditional else ""
            card = replace(card, snippet=default_snippet(own, self_contained, call))
        _describe(folder, str(save_directory), card, sample)
    return Path(save_directory)


def save_lora_repo(
    pipeline: Any,
    save_directory: str | os.PathLike,
    *,
    network: str = "unet",
    card: RepoCard | None = None,
    sample: Image.Image | None = None,
) -> Path:
    """Writes the LoRA layers of a pipeline's network as a Hub repo that `load_lora_weights` reads.

    Of a pipeline without that method (PixArt) they are written as peft does, and
    `peft.PeftModel.from_pretrained(pipeline.transformer, repo)` puts them into the network.

    Args:
        pipeline: a pipeline whose network has a peft adapter.
        save_directory: the folder; see `save_repo`.
        network: the component with the adapter, `"unet"` or `"transformer"`.
        card: contents of README.md, `training_arguments.json` and `results.json`; it should bring a snippet.
        sample: picture for the card.

    Returns:
        The folder.
    """
    with _written_whole(save_directory) as folder:
        write_lora(pipeline, network, folder)
        _describe(folder, str(save_directory), card, sample)
    return Path(save_directory)


def has_lora_format(pipeline: Any, network: str) -> bool:
    """Returns whether a pipeline has a format of its own for the LoRA layers of a component."""
    save = getattr(type(pipeline), "save_lora_weights", None)
    return save is not None and f"{network}_lora_layers" in inspect.signature(save).parameters


def write_lora(pipeline: Any, network: str, folder: Path) -> None:
    """Writes the LoRA layers of a component into a folder, in fp32; see `save_lora_repo`."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    module = getattr(pipeline, network)
    layers = get_peft_model_state_dict(module)
    own = has_lora_format(pipeline, network)
    if own and network == "unet":
        layers = convert_state_dict_to_diffusers(layers)
    layers = {name: value.detach().float().cpu().contiguous() for name, value in layers.items()}
    config = module.peft_config["default"]
    if own:
        save = type(pipeline).save_lora_weights
        # Alpha and DoRA are not in the layers.
        options = {f"{network}_lora_layers": layers, f"{network}_lora_adapter_metadata": config.to_dict()}
        taken = {k: v for k, v in options.items() if k in inspect.signature(save).parameters}
        save(folder, **taken, safe_serialization=True)
    else:
        save_file({f"base_model.model.{k}": v for k, v in layers.items()}, folder / "adapter_model.safetensors")
        config.save_pretrained(folder)


@contextlib.contextmanager
def _written_whole(directory: str | os.PathLike) -> Iterator[Path]:
    """Gives a folder whose content is moved to `directory` in the end."""
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    # Within the target, so that it is the same file system; the upload ignores it.
    with tempfile.TemporaryDirectory(prefix=".save-", suffix=".tmp", dir=target) as partial:
        yield Path(partial)
        for entry in sorted(Path(partial).iterdir()):
            _replace(entry, target / entry.name)


def _describe(folder: Path, repo_id: str, card: RepoCard | None, sample: Image.Image | None) -> None:
    if sample is not None:
        sample.save(folder / "sample.png")
    if card is not None:
        text = card.model_card(repo_id, "sample.png" if sample is not None else None)
        (folder / "README.md").write_text(str(text), encoding="utf-8")
        for file, values in (("training_arguments.json", card.arguments), ("results.json", card.results)):
            (folder / file).write_text(json.dumps(values, indent=2, default=str) + "\n", encoding="utf-8")


def _replace(source: Path, destination: Path) -> None:
    """Moves a file or folder over another, which is gone only when the new one is in its place."""
    old = destination.with_name(f".{destination.name}-old.tmp")
    shutil.rmtree(old, ignore_errors=True)
    if destination.is_dir():
        destination.rename(old)
        try:
            source.rename(destination)
        except BaseException:
            old.rename(destination)
            raise
        shutil.rmtree(old)
    else:
        os.replace(source, destination)


def push_repo(
    save_directory: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Uploads a folder that `save_repo` wrote, in one commit, with the token of the login.

    Checkpoints, logs and validation pictures stay here.

    Args:
        save_directory: the folder.
        repo_id: `"organisation/name"` or `"name"`; created if it does not exist.
        private: make it private when it is created.
        revision: branch to commit to.
        commit_message: by default "Upload with diffusers_ext".

    Returns:
        The commit's URL.

    Raises:
        ValueError: `repo_id` is not a repo name, or the folder holds no pipeline.
        RuntimeError: the upload failed; the folder is whole, and the message says how to try again.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"`repo_id` must be 'organisation/name', got {repo_id!r}: {error}") from error
    folder = Path(save_directory)
    files = ["model_index.json", "pytorch_lora_weights.safetensors", "adapter_model.safetensors"]
    if not any((folder / name).is_file() for name in files):
        raise ValueError(
            "`save_directory` must be a folder with model_index.json or pytorch_lora_weights.safetensors (or peft's "
            f"adapter_model.safetensors), got {str(save_directory)!r}."
        )
    api: Any = HfApi()
    try:
        _fill_in_repo_id(folder, repo_id)
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message or "Upload with diffusers_ext",
            ignore_patterns=list(IGNORED),  # the Hub client appends its own
        )
    except Exception as error:  # the Hub client raises many kinds; all mean the same to the caller
        options = ["--revision", revision] if revision else []
        options += ["--private"] if private else []
        options += [word for pattern in IGNORED for word in ("--exclude", pattern)]
        command = shlex.join(["hf", "upload", repo_id, str(folder), ".", *options])
        raise RuntimeError(
            f"the upload to {repo_id!r} failed: {error}. The folder {folder} is whole. To try again: {command}"
        ) from error
    return str(commit.commit_url)


def _fill_in_repo_id(folder: Path, repo_id: str) -> None:
    """Lets the card's snippet load the repo instead of the folder."""
    card = folder / "README.md"
    if card.is_file():
        before = card.read_text(encoding="utf-8")
        after = fill_in_repo_id(before, folder, repo_id)
        if after != before:
            partial = card.with_name("README.md.tmp")
            partial.write_text(after, encoding="utf-8")
            os.replace(partial, card)
