"""What happens around the training loop: progress, logs, trackers and validation pictures."""

from __future__ import annotations

import json
import os
import time
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers.utils import make_image_grid
from PIL import Image
from tqdm.auto import tqdm

from diffusers_ext.rng import mix

__all__ = ["Callback", "MetricsLog", "ProgressBar", "Run", "Trackers", "Validation", "cut_log", "image_grid"]

VALIDATION = 5


class Run(Protocol):
    """What a callback may use of the `Trainer`."""

    step: int
    total_steps: int
    config: Any
    recipe: Any
    accelerator: Any
    callbacks: list[Callback]

    def pause(self, seconds: float) -> None:
        """Takes time that was not spent on training out of the speed shown."""

    def exported_pipeline(self) -> AbstractContextManager[Any]:
        """Gives the pipeline with the weights that would be saved now; `None` on all but the main process."""
        ...


class Callback:
    """Hooks of the training loop; every process calls them, at the same points.

    All take the `Trainer`, of which they may use what `Run` lists.
    """

    def on_start(self, trainer: Run) -> None:
        """Before the first update, after a checkpoint was loaded."""

    def on_step_end(self, trainer: Run) -> None:
        """After every update."""

    def on_log(self, trainer: Run, logs: dict[str, float]) -> None:
        """Every `logging_steps` updates, with means since the last call."""

    def on_validate(self, trainer: Run, images: list[Image.Image]) -> None:
        """After validation pictures were drawn; `images` is empty on all but the main process."""

    def on_figures(self, trainer: Run, figures: dict[str, float]) -> None:
        """After the recipe measured the pipeline; `figures` is empty on all but the main process."""

    def on_save(self, trainer: Run, checkpoint: Path) -> None:
        """After a checkpoint was written."""

    def on_end(self, trainer: Run) -> None:
        """At the end, also when a signal stopped the run."""


def draw_pictures(trainer: Run, pipeline: Any, stream: int) -> list[Image.Image]:
    """Draws the recipe's pictures; what goes wrong is a warning, since pictures are no reason to lose a run."""
    generator = torch.Generator().manual_seed(mix(trainer.config.seed, stream))
    try:
        return trainer.recipe.validate(pipeline, generator)
    except Exception as error:  # a full device, a scheduler's own kinds
        warnings.warn(f"no pictures at step {trainer.step}: {type(error).__name__}: {error}", stacklevel=2)
        return []


def measure(trainer: Run, pipeline: Any, stream: int) -> dict[str, float]:
    """Takes the recipe's figures; what goes wrong is a warning, since figures are no reason to lose a run."""
    generator = torch.Generator().manual_seed(mix(trainer.config.seed, stream))
    try:
        return trainer.recipe.figures(pipeline, generator)
    except Exception as error:  # whatever a measure runs into
        warnings.warn(f"no figures at step {trainer.step}: {type(error).__name__}: {error}", stacklevel=2)
        return {}


def image_grid(images: list[Image.Image], columns: int | None = None) -> Image.Image:
    """Arranges images in rows, by default as near to a square as can be; the last row may be incomplete."""
    columns = columns or max(1, round(len(images) ** 0.5))
    rows = -(-len(images) // columns)
    blank = Image.new(images[0].mode, images[0].size)
    return make_image_grid(images + [blank] * (rows * columns - len(images)), rows=rows, cols=columns)


class ProgressBar(Callback):
    """A bar with loss, learning rate, samples per second and time left, on the main process."""

    def on_start(self, trainer: Run) -> None:
        self.bar = tqdm(
            total=trainer.total_steps,
            initial=trainer.step,
            desc="training",
            unit="step",
            disable=not trainer.accelerator.is_main_process,
        )

    def on_step_end(self, trainer: Run) -> None:
        self.bar.update()

    def on_log(self, trainer: Run, logs: dict[str, float]) -> None:
        self.bar.set_postfix_str(
            f"loss {logs['loss']:.4f}, lr {logs['lr']:.2e}, "
            f"{logs['samples_per_second']:.0f} {trainer.recipe.sample_name}/s",
            refresh=False,
        )

    def on_end(self, trainer: Run) -> None:
        self.bar.close()


def cut_log(path: Path, step: int) -> None:
    """Keeps of a file of JSON objects, one a line, the whole ones up to a step, which a resumed run goes on from."""
    lines = path.read_text().splitlines() if path.is_file() else []
    whole = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    partial = path.with_suffix(".tmp")
    partial.write_text("".join(line + "\n" for line in whole))
    os.replace(partial, path)


class MetricsLog(Callback):
    """`metrics.jsonl` in the run's folder, one object per log; a resumed run cuts what lies after its checkpoint."""

    def on_start(self, trainer: Run) -> None:
        self.path = Path(trainer.config.output_dir) / "metrics.jsonl"
        if not trainer.accelerator.is_main_process:
            return
        cut_log(self.path, trainer.step)

    def on_log(self, trainer: Run, logs: dict[str, float]) -> None:
        if trainer.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": trainer.step, **logs}) + "\n")

    def on_figures(self, trainer: Run, figures: dict[str, float]) -> None:
        if figures:
            self.on_log(trainer, figures)


class Trackers(Callback):
    """The trackers of `--report_to`, through accelerate."""

    def on_start(self, trainer: Run) -> None:
        # Trackers' hyperparameter tables take scalars only.
        flat = {k: v if isinstance(v, int | float | str) else str(v) for k, v in trainer.config.to_dict().items()}
        trainer.accelerator.init_trackers(trainer.config.tracker_project_name, config=flat)

    def on_log(self, trainer: Run, logs: dict[str, float]) -> None:
        trainer.accelerator.log(logs, step=trainer.step)

    def on_figures(self, trainer: Run, figures: dict[str, float]) -> None:
        if figures:
            self.on_log(trainer, figures)

    def on_validate(self, trainer: Run, images: list[Image.Image]) -> None:
        import numpy as np

        if not images:
            return
        arrays = np.stack([np.asarray(image.convert("RGB")) for image in images])
        for tracker in trainer.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_images("validation", arrays, trainer.step, dataformats="NHWC")
            elif tracker.name in ("wandb", "trackio"):
                module = __import__(tracker.name)
                tracker.log({"validation": [module.Image(a) for a in arrays]}, step=trainer.step)

    def on_end(self, trainer: Run) -> None:
        trainer.accelerator.end_training()


class Validation(Callback):
    """Sample pictures every `validation_steps` updates, in `samples/`.

    They have a generator of their own, and every training step seeds the global ones: training does not notice.
    """

    def on_step_end(self, trainer: Run) -> None:
        every = trainer.config.validation_steps
        if every and trainer.step % every == 0:
            images, figures = self.draw(trainer)
            for callback in trainer.callbacks:
                callback.on_validate(trainer, images)
                callback.on_figures(trainer, figures)

    def draw(self, trainer: Run) -> tuple[list[Image.Image], dict[str, float]]:
        """Draws and saves the pictures of this step, and measures; returns both on the main process."""
        images: list[Image.Image] = []
        figures: dict[str, float] = {}
        with trainer.exported_pipeline() as pipeline:
            if pipeline is not None:
                start = time.perf_counter()
                pipeline.set_progress_bar_config(disable=True)
                images = draw_pictures(trainer, pipeline, VALIDATION)
                if images:
                    folder = Path(trainer.config.output_dir) / "samples"
                    folder.mkdir(exist_ok=True)
                    image_grid(images).save(folder / f"step-{trainer.step:07d}.png")
                figures = measure(trainer, pipeline, VALIDATION)
                trainer.pause(time.perf_counter() - start)
        return images, figures


def default_callbacks(config: Any) -> list[Callback]:
    """Returns the callbacks that every run has."""
    callbacks: list[Callback] = [ProgressBar(), MetricsLog()]
    if config.trackers:
        callbacks.append(Trackers())
    return [*callbacks, Validation()]
