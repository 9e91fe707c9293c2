"""Enhancement of whole folders, file by file: what is finished stays, and a restart does the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from tqdm.auto import tqdm

from diffusers_ext.data.audio import SUFFIXES, audio_files, audio_info, write_audio
from diffusers_ext.generation.processes import process_state
from diffusers_ext.rng import mix
from diffusers_ext.training.config import check_types, described, require
from diffusers_ext.training.results import check_settings

from .pipeline import SpeechEnhancementPipeline

__all__ = ["EnhanceConfig", "enhance_files"]

FILES = 62  # first word of the seeds


@dataclass
class EnhanceConfig:
    """Arguments of `diffusers-ext enhance`.

    Raises:
        ValueError: an argument is outside its range.
    """

    files: Sequence[str] = described("Sound files, and folders of which all are taken.", (), group="data")
    model: str = described("Repo or folder of a SpeechEnhancementPipeline.", "", group="model")
    output_dir: str = described(
        "Folder of the results, which have the names, formats and rates of the files.", "", group="saving and logging"
    )
    num_inference_steps: int = described("Steps of the scheduler.", 30)
    chunk_seconds: float = described("Longest window.", 10.0)
    overlap_seconds: float = described("Time over which windows fade into each other.", 1.0)
    batch_size: int = described("Windows at a time.", 8)
    seed: int = described("Each file has its own random numbers from it and its name.", 0)

    def __post_init__(self) -> None:
        check_types(self)
        require(len(self.files) > 0, "files", list(self.files), "at least one file or folder")
        for name in ("num_inference_steps", "batch_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "an integer >= 1")
        require(self.seed >= 0, "seed", self.seed, "an integer >= 0")
        require(0 <= self.overlap_seconds < self.chunk_seconds, "overlap_seconds", self.overlap_seconds,
                f"a number in [0, chunk_seconds), {self.chunk_seconds}")  # fmt: skip

    def sources(self) -> dict[Path, Path]:
        """Returns the files by the names of their results.

        Raises:
            ValueError: a file is missing, of an unknown kind, or two would have one result.
        """
        found: dict[Path, Path] = {}
        results = Path(self.output_dir).resolve()
        for name in self.files:
            place = Path(name)
            inside = audio_files(place) if place.is_dir() else [place]
            if place.resolve() in results.parents:  # the results lie within, and are no recordings
                inside = [path for path in inside if results not in path.resolve().parents]
            require(place.is_dir() or place.is_file(), "files", name, "files or folders that exist")
            require(len(inside) > 0, "files", name, f"a folder with sound files, {list(SUFFIXES)}")
            for path in inside:
                require(path.suffix.lower() in SUFFIXES, "files", str(path), f"of one of the kinds {list(SUFFIXES)}")
                result = Path(self.output_dir) / (path.relative_to(place) if place.is_dir() else path.name)
                other = found.setdefault(result, path)
                require(other == path, "files", str(path), f"of different names, as {str(other)!r} has that one")
                require(
                    result.resolve() != path.resolve(), "output_dir", self.output_dir, "another folder than theirs"
                )
        return found


def enhance_files(config: EnhanceConfig) -> list[Path]:
    """Enhances files, or those that are missing; see `EnhanceConfig`.

    A result depends on the file, its name and the settings alone: on any number of processes, and however often it was
    stopped, it is the same. Start processes with `torchrun`.

    Returns:
        The results, in all.

    Raises:
        ValueError: a file cannot be read, or the folder holds results of other settings.
    """
    sources = config.sources()
    state = process_state()
    names = ("model", "num_inference_steps", "chunk_seconds", "overlap_seconds", "seed")
    settings = {name: getattr(config, name) for name in names}
    check_settings(Path(config.output_dir), settings, write=state.is_main_process)
    pipeline: Any = _load(config.model).to(state.device)
    pipeline.set_progress_bar_config(disable=True)
    # Shared by their places in the whole list: what is missing changes while others work.
    mine = list(sources.items())[state.process_index :: state.num_processes]
    mine = [(result, path) for result, path in mine if not result.is_file()]
    failed: list[str] = []
    with tqdm(total=len(mine), desc="enhancing", unit="file", disable=not state.is_main_process) as bar:
        for result, path in mine:
            try:
                _enhance(pipeline, config, result, path)
            except ValueError as error:  # the others are worth doing
                failed.append(str(error))
            bar.update()
    state.wait_for_everyone()
    if failed:
        raise ValueError(f"{len(failed)} of {len(mine)} files could not be enhanced: " + " ".join(failed))
    return list(sources)


def _enhance(pipeline: Any, config: EnhanceConfig, result: Path, path: Path) -> None:
    name = result.relative_to(config.output_dir).as_posix()
    info = audio_info(path, "files")
    found = pipeline(
        path,
        num_inference_steps=config.num_inference_steps,
        chunk_seconds=config.chunk_seconds,
        overlap_seconds=config.overlap_seconds,
        batch_size=config.batch_size,
        generator=torch.Generator().manual_seed(mix(config.seed, FILES, crc32(name.encode()))),
    )
    write_audio(result, found.audios[0], found.sample_rate, info.subtype)


def _load(model: str) -> SpeechEnhancementPipeline:
    try:
        return SpeechEnhancementPipeline.from_pretrained(model)
    except Exception as error:  # the libraries raise many kinds
        raise ValueError(
            f"`model` must be the repo or folder of a SpeechEnhancementPipeline, got {model!r}: {error}"
        ) from error
