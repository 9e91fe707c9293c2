"""Images of a class, drawn by a model before it is adapted, that keep it from forgetting the class."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from diffusers_ext.data.folder import image_files
from diffusers_ext.rng import mix

__all__ = ["class_images"]

CLASS_IMAGE = 7


def class_images(
    pipeline: Any, prompt: str, folder: str | os.PathLike, count: int, batch_size: int, seed: int, **call: Any
) -> None:
    """Generates images of a class until a folder holds enough; an interrupted start goes on where it stopped.

    Args:
        pipeline: a text-to-image pipeline.
        prompt: the class.
        folder: where the images are; other files in it do not count.
        count: how many there must be.
        batch_size: images at a time.
        seed: image `i` depends on it and on `i` alone.
        **call: further arguments of the pipeline's call.

    Raises:
        ValueError: the folder's images were generated for another class.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    note = target / "class_prompt.txt"
    if note.is_file() and note.read_text(encoding="utf-8") != prompt:
        found = note.read_text(encoding="utf-8")
        accepted = f"a folder without images of another class than {prompt!r}"
        raise ValueError(f"`class_data_dir` must be {accepted}, got {str(folder)!r} with images of {found!r}.")
    present = len(image_files(target))
    missing = [i for i in range(count) if not (target / f"{i:05d}.png").is_file()][: max(0, count - present)]
    if missing:
        note.write_text(prompt, encoding="utf-8")
    pipeline.set_progress_bar_config(disable=True)
    # A safety checker would put black images among them.
    checked = getattr(pipeline, "safety_checker", None)
    if checked is not None:
        pipeline.safety_checker = None
    steps = min(20, pipeline.scheduler.config.num_train_timesteps)
    with tqdm(total=len(missing), desc="class images", unit="image", disable=not missing) as bar:
        for start in range(0, len(missing), batch_size):
            part = missing[start : start + batch_size]
            generators = [torch.Generator().manual_seed(mix(seed, CLASS_IMAGE, i)) for i in part]
            images = pipeline([prompt] * len(part), num_inference_steps=steps, generator=generators, **call).images
            for i, image in zip(part, images, strict=True):
                partial = target / f"{i:05d}.tmp"
                image.save(partial, format="PNG")
                os.replace(partial, target / f"{i:05d}.png")
                bar.update()
    if checked is not None:  # by plain assignment the pipeline would be saved without it
        pipeline.register_modules(safety_checker=checked)
