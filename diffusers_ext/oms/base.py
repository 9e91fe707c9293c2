"""What One More Step must know of the pipeline it is put in front of."""

from __future__ import annotations

import copy
import difflib
import inspect
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps

from .step import StartLevel, check_scheduler, start_level

__all__ = ["batch_size", "bind", "check_base", "first_level", "latent_shape"]


def check_base(base: Any) -> None:
    """Checks that a pipeline can start from given latents at the end of a variance-preserving schedule.

    Raises:
        ValueError: it cannot; the message says what would fit.
    """
    if not isinstance(base, DiffusionPipeline):
        raise ValueError(f"`sd_pipeline` must be a DiffusionPipeline, got {type(base).__name__}.")
    name, accepted = type(base).__name__, inspect.signature(base.__call__).parameters
    if "strength" in accepted:
        raise ValueError(
            f"`sd_pipeline` must start from noise, got {name}, which starts from an image below the last timestep."
        )
    if "latents" not in accepted:
        raise ValueError(
            f"`sd_pipeline` must take `latents`, got {name}. Pixel models do so in "
            "`ImageGenerationPipeline.from_pipe(pipeline)`."
        )
    if getattr(base, "scheduler", None) is None or getattr(base, "unet", None) is None:
        raise ValueError(f"`sd_pipeline` must have a `unet` and a `scheduler`, got {name}.")
    check_scheduler(base.scheduler)


def bind(base: DiffusionPipeline, arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of the base's call, its defaults filled in.

    Raises:
        ValueError: the base does not know one of them.
    """
    parameters = inspect.signature(base.__call__).parameters  # type: ignore[attr-defined]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in arguments:
        if name not in parameters and not open_ended:
            near = difflib.get_close_matches(name, parameters, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"`{name}` must be an argument of {type(base).__name__} or begin with `oms`{hint}")
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    return {**defaults, **arguments}


def batch_size(arguments: dict[str, Any]) -> tuple[int, int]:
    """Returns the number of prompts (or labels) of a bound call, and the images of each."""
    per_prompt = arguments.get("num_images_per_prompt") or 1
    prompt, embeds = arguments.get("prompt"), arguments.get("prompt_embeds")
    labels, latents = arguments.get("class_labels"), arguments.get("latents")
    if isinstance(prompt, str):
        return 1, per_prompt
    if prompt is not None or embeds is not None:
        return len(prompt if prompt is not None else embeds), per_prompt  # type: ignore[arg-type]
    if arguments.get("batch_size"):
        return arguments["batch_size"], 1
    if hasattr(labels, "__len__"):
        return len(labels), 1  # type: ignore[arg-type]
    return (1 if latents is None else len(latents)), 1


def latent_shape(base: Any, arguments: dict[str, Any]) -> tuple[int, int, int]:
    """Returns `(channels, height, width)` of the latents that a bound call would draw."""
    if arguments.get("latents") is not None:
        return tuple(arguments["latents"].shape[1:])
    size = base.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    factor = getattr(base, "vae_scale_factor", 1)
    pixels = [height * factor, width * factor]
    image = arguments.get("image")
    if getattr(base, "controlnet", None) is not None and image is not None:  # which takes its size from the image
        while isinstance(image, list | tuple):
            image = image[0]
        pixels = list(base.control_image_processor.get_default_height_width(image))
    for i, name in enumerate(("height", "width")):
        given = arguments.get(name)
        if given is not None:
            pixels[i] = given
            if given % factor:
                raise ValueError(f"`{name}` must be a multiple of {factor}, got {given!r}.")
    return base.unet.config.in_channels, pixels[0] // factor, pixels[1] // factor


def first_level(base: Any, arguments: dict[str, Any]) -> StartLevel:
    """Returns where the base's scheduler will begin in a bound call; the scheduler itself is left as it is."""
    scheduler = copy.deepcopy(base.scheduler)
    options = {
        name: arguments[name]
        for name in ("timesteps", "sigmas", "original_inference_steps")
        if arguments.get(name) is not None
    }
    retrieve_timesteps(scheduler, arguments["num_inference_steps"], "cpu", **options)
    return start_level(scheduler)
