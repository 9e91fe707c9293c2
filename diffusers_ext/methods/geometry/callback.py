"""Where a network in training is not yet a score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from diffusers_ext.generation.score_field import ScoreField
from diffusers_ext.rng import mix
from diffusers_ext.training.callbacks import Callback, Run, cut_log
from diffusers_ext.training.config import is_whole, require

from .draws import default_sigmas
from .gauge import SteinResidual, stein_residual
from .space import diffused

__all__ = ["SteinResidualCallback"]

STREAM = 0x57E1  # of random numbers: no other part of a run draws from it


class SteinResidualCallback(Callback):
    r"""Logs the Stein residual by noise level while a denoiser of images trains.

    Where R is within two standard errors of 0 the network may be a score; where |R| is beyond a tenth of the loss it
    is none yet, and neither likelihood nor dimension should be read from it. Measured on the weights that would be
    saved, on the same images and noises every time; training does not notice. Lines go to `stein_residual.jsonl` in
    the run's folder and to the trackers, as `stein/SIGMA` = R over the loss.

    Args:
        every: updates between two measurements.
        num_images: images from the front of the data set.
        num_sigmas: log-spaced levels over the scheduler's.
        num_draws: noises an image and level.
        batch_size: samples in one call.

    Raises:
        ValueError: a number is too small.

    Example:
        >>> from diffusers_ext import SteinResidualCallback
        >>> callback = SteinResidualCallback(every=1000)
        >>> # Trainer(config, recipe, callbacks=[callback]).train()
    """

    def __init__(
        self, every: int = 500, num_images: int = 64, num_sigmas: int = 8, num_draws: int = 1, batch_size: int = 64
    ) -> None:
        least_of = {"every": 1, "num_images": 2, "num_sigmas": 1, "num_draws": 1, "batch_size": 1}
        for (name, least), value in zip(
            least_of.items(), (every, num_images, num_sigmas, num_draws, batch_size), strict=True
        ):
            require(is_whole(value, least), name, value, f"an integer >= {least}")
        self.every, self.num_images, self.num_sigmas = every, num_images, num_sigmas
        self.num_draws, self.batch_size = num_draws, batch_size
        self.residual: SteinResidual | None = None

    def on_start(self, trainer: Run) -> None:
        """Cuts what lies after the checkpoint that the run goes on from.

        Raises:
            ValueError: what is trained is no denoiser of images that takes no text.
        """
        data: Any = getattr(trainer.recipe, "data", None)
        item = data.get(0, torch.Generator()) if hasattr(data, "get") else {}
        with trainer.exported_pipeline() as pipeline:
            text = hasattr(pipeline, "tokenizer")
        if text or "pixel_values" not in item:
            raise ValueError(
                f"`callbacks` must be without SteinResidualCallback for {type(trainer.recipe).__name__}: it measures "
                "denoisers of images that take no text."
            )
        path = Path(trainer.config.output_dir) / "stein_residual.jsonl"
        if trainer.accelerator.is_main_process and path.is_file():
            cut_log(path, trainer.step)

    def on_step_end(self, trainer: Run) -> None:
        """Measures every `every` updates, on the main process."""
        if trainer.step % self.every:
            return
        with trainer.exported_pipeline() as pipeline:
            if pipeline is None:
                return
            data = trainer.recipe.data
            items = [data.get(i, torch.Generator().manual_seed(i)) for i in range(min(self.num_images, len(data)))]
            x = diffused(pipeline, torch.stack([item["pixel_values"] for item in items]))
            arguments: dict[str, Any] = {}
            if getattr(pipeline.unet, "class_embedding", None) is not None:
                arguments = {"class_labels": torch.tensor([item["label"] for item in items], device=x.device)}
            field = ScoreField.from_pipeline(pipeline, **arguments)
            sigmas = default_sigmas(field, self.num_sigmas)
            generator = torch.Generator().manual_seed(mix(trainer.config.seed, STREAM))
            found = self.residual = stein_residual(field, x, sigmas, self.num_draws, self.batch_size, generator)
            line = {
                "step": trainer.step,
                "sigmas": found.sigmas.tolist(),
                "residual": found.value.tolist(),
                "standard_error": found.standard_error.tolist(),
                "loss": found.denoising_error.tolist(),
                "no_score": found.masked.tolist(),
            }
            with (Path(trainer.config.output_dir) / "stein_residual.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
        ratios = (found.value / found.denoising_error).tolist()
        trainer.accelerator.log(
            {f"stein/{sigma:.3g}": ratio for sigma, ratio in zip(sigmas, ratios, strict=True)}, step=trainer.step
        )
