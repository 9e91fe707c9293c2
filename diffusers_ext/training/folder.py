"""The folder of a run: one run at a time, and none over another's checkpoints without being told."""

from __future__ import annotations

import contextlib
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from .checkpoint import remove_checkpoint, remove_partial, step_of, whole_checkpoints

__all__ = ["claimed_folder"]

# Seconds; a data worker of a killed run, which inherited its lock, notices that within five.
PATIENCE = 6.0


@contextlib.contextmanager
def claimed_folder(output_dir: str, resume: Path | None, latest: bool, overwrite: bool) -> Iterator[None]:
    """Holds a run's folder, in which nothing is left of other runs.

    The operating system gives the lock back when the process ends, however it ends.

    Args:
        output_dir: the folder, which exists.
        resume: the checkpoint that the run goes on from.
        latest: the run goes on from the newest one, whatever that is.
        overwrite: delete what another run left.

    Raises:
        ValueError: another run is writing into the folder, or has left checkpoints or a finished pipeline in it.
    """
    folder = Path(output_dir)
    lock = FileLock(folder / ".lock.tmp")  # by this name it is not uploaded
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout as error:
        raise ValueError(
            f"`output_dir` must be a folder into which no other run is writing, got {output_dir!r}."
        ) from error
    except NotImplementedError:
        warnings.warn(
            f"{output_dir!r} lies on a file system without locks: let no other run write there", stacklevel=2
        )
    try:
        remove_partial(folder)
        if not latest:
            _clear(folder, resume, overwrite)
        yield
    finally:
        lock.release()


def _clear(folder: Path, resume: Path | None, overwrite: bool) -> None:
    """Deletes what a run that starts at `resume` would mix with its own, if it may."""
    ours = resume is not None and resume.resolve().parent == folder.resolve()
    start = step_of(resume) if resume is not None and ours else -1
    # Checkpoints that this run has yet to reach: `latest` would take them, and the limit delete new ones first.
    stale = [path for path in whole_checkpoints(folder) if step_of(path) > start]
    finished = [] if ours else [p for p in ("model_index.json", "training_arguments.json") if (folder / p).is_file()]
    if not stale and not finished:
        return
    if not overwrite:
        found = ", ".join([path.name for path in stale] or finished)
        raise ValueError(
            f"`output_dir` must be a folder without another run's results, got {str(folder)!r} with {found}: go on "
            "with --resume_from_checkpoint latest, or delete them with --overwrite_output_dir."
        )
    for path in stale:
        remove_checkpoint(path)
    if not ours:
        for name in ("samples", "logs"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in ("metrics.jsonl", "model_index.json", "training_arguments.json"):
            (folder / name).unlink(missing_ok=True)
