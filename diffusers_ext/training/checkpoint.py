"""Checkpoints that are either whole or absent, written by all processes together."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn

__all__ = [
    "CheckpointError",
    "DamagedCheckpointError",
    "find_checkpoint",
    "load_checkpoint",
    "save_checkpoint",
    "save_only_trained",
    "set_aside",
    "whole_checkpoints",
]

MANIFEST = "manifest.json"
STATE = "engine_state.pt"
TRAINED = "trained.safetensors"
# Arguments that may change at a resume without any effect on the weights.
UNRELATED = {
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "checkpointing_steps"),
    *("checkpoints_total_limit", "logging_steps"),
    *("validation_steps", "num_validation_images", "validation_inference_steps", "report_to"),
    *("tracker_project_name", "push_to_hub", "hub_model_id", "hub_private_repo", "dataloader_num_workers"),
}


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; earlier ones are whole."""


class DamagedCheckpointError(ValueError):
    """A checkpoint cannot be read."""


def versions() -> dict[str, str]:
    """Returns the versions that a result depends on."""
    return {"torch": torch.__version__, "diffusers": diffusers.__version__, "accelerate": accelerate.__version__}


def _signature(model: nn.Module) -> dict[str, list[int]]:
    return {name.removeprefix("module."): list(p.shape) for name, p in model.named_parameters()}


def step_of(checkpoint: Path) -> int:
    """Returns the number of updates in the name of a checkpoint's folder, -1 for another name."""
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdigit() and checkpoint.name != number else -1


def whole_checkpoints(directory: Path) -> list[Path]:
    """Returns the checkpoints in a folder that were finished, by their steps."""
    found = [p for p in directory.glob("checkpoint-*") if step_of(p) >= 0 and (p / MANIFEST).is_file()]
    return sorted(found, key=step_of)


def remove_checkpoint(path: Path) -> None:
    """Deletes a checkpoint, which at no moment is there in part."""
    partial = path.with_suffix(".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    path.rename(partial)
    shutil.rmtree(partial)


def remove_partial(directory: Path) -> None:
    """Deletes what killed processes left of checkpoints: temporary folders, and those without a manifest."""
    for path in directory.glob("checkpoint-*"):
        if path.suffix == ".tmp" or (step_of(path) >= 0 and not (path / MANIFEST).is_file()):
            shutil.rmtree(path)


def set_aside(path: Path) -> None:
    """Renames a damaged checkpoint, so that it is not taken for one again."""
    aside = path.with_suffix(".damaged")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)


def save_checkpoint(
    accelerator: Accelerator,
    directory: str | os.PathLike,
    *,
    step: int,
    samples_seen: int,
    model: nn.Module,
    state: dict[str, Any],
    config: dict[str, Any],
    total_limit: int | None = None,
) -> Path:
    """Writes `checkpoint-{step}`: every process saves into a temporary folder, which is renamed when all are done.

    Args:
        accelerator: its models and optimizers are saved by `save_state`.
        directory: folder that holds the checkpoints.
        step: updates made.
        samples_seen: samples consumed by all processes: the position in the data.
        model: the prepared model, whose parameter shapes the manifest records.
        state: tensors and plain types to keep beside it.
        config: the run's arguments, for the record.
        total_limit: older checkpoints than the newest so many are deleted afterwards.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: a process could not write (a full disk, say); the temporary folder is removed.
    """
    directory = Path(directory)
    final = directory / f"checkpoint-{step}"
    partial = directory / f"checkpoint-{step}.tmp"
    failure: BaseException | None = None
    try:
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial))
        if accelerator.is_main_process:
            torch.save(state, partial / STATE)
            manifest = {
                "step": step,
                "samples_seen": samples_seen,
                "world": accelerator.num_processes,
                "parameters": _signature(model),
                "config": config,
                "versions": versions(),
            }
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
    except Exception as error:  # whatever the writing library raises, all processes must hear of it
        failure = error
    if _failed_anywhere(accelerator, failure):
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        kept = whole_checkpoints(directory)
        raise CheckpointError(
            f"could not write {final}: {failure or 'another process failed'}. "
            + (f"The newest whole checkpoint is {kept[-1]}." if kept else "There is no earlier checkpoint.")
        ) from failure
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in whole_checkpoints(directory)[:-total_limit] if total_limit else []:
            remove_checkpoint(old)
    accelerator.wait_for_everyone()
    return final


def find_checkpoint(directory: str | os.PathLike, resume_from: str) -> list[Path]:
    """Resolves `--resume_from_checkpoint`.

    Args:
        directory: the run's folder.
        resume_from: `"latest"` or a path.

    Returns:
        The folders to try, newest first; none for `"latest"` where there is none yet, so that one command both starts
        and resumes.

    Raises:
        ValueError: the path is no whole checkpoint.
    """
    if resume_from == "latest":
        return whole_checkpoints(Path(directory))[::-1]
    path = Path(resume_from)
    # A temporary folder may have a manifest, yet lack what another process was still writing.
    if not (path / MANIFEST).is_file() or path.suffix == ".tmp":
        available = [str(p) for p in whole_checkpoints(Path(directory))]
        raise ValueError(
            f"`resume_from_checkpoint` must be 'latest' or a finished folder with a {MANIFEST}, got {resume_from!r}; "
            f"whole checkpoints here: {available}."
        )
    return [path]


def load_checkpoint(
    accelerator: Accelerator, path: Path, *, model: nn.Module, config: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Loads model and optimizer in place.

    Args:
        accelerator: as it was prepared before `save_checkpoint`.
        path: the checkpoint's folder.
        model: the prepared model, to be compared with the manifest.
        config: the run's arguments, to be compared with those of the checkpoint.

    Returns:
        The manifest and the saved `state`.

    Raises:
        DamagedCheckpointError: it cannot be read, by one of the processes at least.
        ValueError: the checkpoint belongs to another model.
    """
    failure: Exception | None = None
    manifest, state = {}, {}
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        state = torch.load(path / STATE, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        failure = error
    _raise_damaged(accelerator, path, failure)
    expected, found = _signature(model), manifest["parameters"]
    if expected != found:
        differing = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
        raise ValueError(
            f"`resume_from_checkpoint` must be a checkpoint of this model, got {str(path)!r}: {len(differing)} "
            f"parameters differ, first {differing[0]!r} with shape {found.get(differing[0])} in the checkpoint and "
            f"{expected.get(differing[0])} here."
        )
    # The length of a run matters to a decaying learning rate only.
    constant = str(config.get("lr_scheduler")).startswith("constant")
    unrelated = UNRELATED | ({"max_train_steps", "num_train_epochs"} if constant else set())
    changed = [
        f"{name} ({manifest['config'][name]!r} -> {config[name]!r})"
        for name in config
        if name not in unrelated and name in manifest["config"] and manifest["config"][name] != config[name]
    ]
    if manifest["world"] != accelerator.num_processes:
        changed.append(f"number of processes ({manifest['world']} -> {accelerator.num_processes})")
    if changed and accelerator.is_main_process:
        warnings.warn(
            f"resuming {path} with other settings, so the run goes on but not to identical numbers: "
            + ", ".join(changed),
            stacklevel=2,
        )
    try:
        accelerator.load_state(str(path))
    except Exception as error:
        failure = error
    _raise_damaged(accelerator, path, failure)
    return manifest, state


def _failed_anywhere(accelerator: Accelerator, failure: BaseException | None) -> bool:
    """Tells all processes whether one of them failed."""
    failed: Any = accelerator.reduce(torch.tensor([float(failure is not None)], device=accelerator.device), "sum")
    return bool(failed.item())


def _raise_damaged(accelerator: Accelerator, path: Path, failure: Exception | None) -> None:
    if _failed_anywhere(accelerator, failure):
        reason = f"{type(failure).__name__}: {failure}" if failure is not None else "another process failed"
        raise DamagedCheckpointError(
            f"`resume_from_checkpoint` must be a whole checkpoint, got {str(path)!r}: {reason.splitlines()[0]}"
        ) from failure


def save_only_trained(accelerator: Accelerator, trainable: nn.Module) -> None:
    """Lets checkpoints hold the parameters that are trained, and not the frozen network around them.

    Args:
        accelerator: the run's, which does not shard the network.
        trainable: the module, before it is prepared.
    """
    names = [name for name, p in trainable.named_parameters() if p.requires_grad]

    def save(models: list[Any], weights: list[Any], folder: str) -> None:
        if accelerator.is_main_process:
            state = accelerator.unwrap_model(models[0]).state_dict()
            save_file({name: state[name].detach().cpu().contiguous() for name in names}, Path(folder) / TRAINED)
        weights.clear()

    def load(models: list[Any], folder: str) -> None:
        module = accelerator.unwrap_model(models.pop())
        saved = load_file(Path(folder) / TRAINED)
        parameters = dict(module.named_parameters())
        with torch.no_grad():
            for name in names:
                parameters[name].copy_(saved[name])

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
