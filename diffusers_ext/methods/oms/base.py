"""What One More Step must know of the pipeline it is put in front of."""

from __future__ import annotations

import contextlib
import copy
import difflib
import inspect
import math
from collections.abc import Iterable
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps

from diffusers_ext.generation.seam import Call, Reached, copied, pipeline_class, scheduler_class
from diffusers_ext.generation.stepping import check_generator
from diffusers_ext.generation.stock_call import guides

from .step import StartLevel, check_scheduler, start_level

__all__ = [
    "batch_size",
    "bind",
    "call_from",
    "check_base",
    "classes",
    "first_level",
    "is_text",
    "latent_shape",
    "network",
]

# What Diffusers' pipelines still take among their `**kwargs`.
LEGACY = ("callback", "callback_steps")


def network(base: Any) -> Any:
    """Returns the base's network, `None` where there is none."""
    unet = getattr(base, "unet", None)
    return getattr(base, "transformer", None) if unet is None else unet


def classes(config: Any, null: int | None = None) -> tuple[int | None, int | None]:
    """Returns how many labels a network without text tells apart, and the null label.

    Args:
        config: of the network.
        null: what the base says of the null label.
    """
    count = config.get("num_embeds_ada_norm")
    if count is not None:  # the transformer keeps the null label behind the classes
        return count + 1, count
    return config.get("num_class_embeds"), null


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
    if "latents" not in accepted and "class_labels" not in accepted:
        raise ValueError(
            f"`sd_pipeline` must take `latents`, got {name}. Pixel models do so in "
            "`ImageGenerationPipeline.from_pipe(pipeline)`."
        )
    if getattr(base, "scheduler", None) is None or network(base) is None:
        raise ValueError(f"`sd_pipeline` must have a `unet` (or a `transformer`) and a `scheduler`, got {name}.")
    check_scheduler(base.scheduler)
    if "latents" not in accepted and not math.isclose(float(base.scheduler.init_noise_sigma), 1.0, rel_tol=1e-4):
        raise ValueError(
            f"`scheduler` must be one that begins with noise of variance 1 (DDIM, DPM++, UniPC ...) in {name}, which "
            f"does not scale it, got {type(base.scheduler).__name__}."
        )


def bind(base: DiffusionPipeline, arguments: dict[str, Any], own: Iterable[str]) -> dict[str, Any]:
    """Returns the arguments of the base's call, its defaults filled in.

    Args:
        base: the pipeline.
        arguments: what it is to be called with.
        own: further names to suggest.

    Raises:
        ValueError: the base does not know one of them.
    """
    parameters = inspect.signature(base.__call__).parameters  # type: ignore[attr-defined]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if takes_any and type(base).__module__.startswith("diffusers."):  # which would drop an unknown one without a word
        parameters, takes_any = {**parameters, **dict.fromkeys(LEGACY)}, False
    for name in arguments:
        if name not in parameters and not takes_any:
            near = difflib.get_close_matches(name, {*parameters, *own} - {name}, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"`{name}` must be an argument of {type(base).__name__} or of OMSPipeline{hint}")
    for name, value in arguments.items():
        if guides(name) and not (value is None or (isinstance(value, int | float) and math.isfinite(value))):
            raise ValueError(f"`{name}` must be a finite number, got {value!r}.")
    latents = arguments.get("latents")
    if not isinstance(latents, torch.Tensor | None):
        raise ValueError(f"`latents` must be a tensor or left out, got {type(latents).__name__}.")
    defaults = {name: p.default for name, p in parameters.items() if p is not None and p.default is not p.empty}
    return {**defaults, **arguments}


def is_text(value: Any) -> bool:
    """Whether a value is a text or a list of texts."""
    return isinstance(value, str) or (isinstance(value, list | tuple) and all(isinstance(v, str) for v in value))


def batch_size(arguments: dict[str, Any]) -> tuple[int, int]:
    """Returns the number of prompts (or labels) of a bound call, and the images of each.

    Raises:
        ValueError: there are no prompts.
    """
    prompt = arguments.get("prompt")
    if prompt is not None and not is_text(prompt):
        raise ValueError(f"`prompt` must be a text or a list of texts, got {prompt!r}.")
    if isinstance(prompt, str):
        prompt = [prompt]
    given = prompt if prompt is not None else arguments.get("prompt_embeds")
    if given is not None:
        if len(given) == 0:
            name = "prompt_embeds" if prompt is None else "prompt"
            raise ValueError(f"`{name}` must hold at least one prompt, got none.")
        per_prompt = arguments.get("num_images_per_prompt", 1)
        if per_prompt is not None and not (isinstance(per_prompt, int) and per_prompt >= 1):
            raise ValueError(f"`num_images_per_prompt` must be an integer >= 1, got {per_prompt!r}.")
        return len(given), per_prompt or 1
    labels, latents = arguments.get("class_labels"), arguments.get("latents")
    if arguments.get("batch_size") is None:
        given = latents if labels is None else labels
        return (len(given) if getattr(given, "ndim", 1) and hasattr(given, "__len__") else 1), 1  # type: ignore[arg-type]
    return arguments["batch_size"], 1


def latent_shape(base: Any, arguments: dict[str, Any], batch_size: int) -> tuple[int, ...]:
    """Returns the shape of the latents that a bound call would draw.

    Raises:
        ValueError: the `latents` of the call have another one, or there are not as many generators.
    """
    if getattr(base, "unet", None) is None:
        shape = (batch_size, *_entered_shape(base, arguments)[1:])
        given, generator = arguments.get("latents"), arguments.get("generator")
        if given is not None and tuple(given.shape) != shape:
            raise ValueError(f"`latents` must have the shape {shape}, got {tuple(given.shape)}.")
        check_generator(generator, batch_size)
        return shape
    size, factor = base.unet.config.sample_size or 0, getattr(base, "vae_scale_factor", 1)
    pixels = [factor * edge for edge in ((size, size) if isinstance(size, int) else size)]
    given = [arguments.get("height"), arguments.get("width")]
    image = arguments.get("image")
    if getattr(base, "controlnet", None) is not None and image is not None:  # which takes its size from the image
        while isinstance(image, list | tuple):
            image = image[0]
        given = list(base.control_image_processor.preprocess(image, *given).shape[2:])
    for i, name in enumerate(("height", "width")):
        edge = pixels[i] if given[i] is None else given[i]
        if not isinstance(edge, int) or edge < 0 or edge % factor:
            raise ValueError(f"`{name}` must be a multiple of {factor}, got {edge!r}.")
        pixels[i] = edge
    shape = (batch_size, base.unet.config.in_channels, pixels[0] // factor, pixels[1] // factor)
    latents, generator = arguments.get("latents"), arguments.get("generator")
    if latents is not None:  # which may have another size than the default
        shape = (*shape[:2], *latents.shape[2:]) if given == [None, None] else shape
        if tuple(latents.shape) != shape:
            raise ValueError(f"`latents` must have the shape {shape}, got {tuple(latents.shape)}.")
    check_generator(generator, batch_size)
    return shape


def _entered_shape(base: Any, arguments: dict[str, Any]) -> tuple[int, ...]:
    """Returns the shape of the latents that a transformer's own call makes: which sizes it takes, it alone knows."""
    device, cls = base._execution_device, type(base)
    known = inspect.signature(cls.__call__).parameters
    call = Call(device, torch.zeros(1, dtype=torch.long), stop="enter")
    schedulers = scheduler_class(type(base.scheduler), takes_latents="latents" not in known)
    scheduler = copied(base.scheduler, schedulers, _seam=call)
    trial = copied(base, pipeline_class(cls), scheduler=scheduler, _seam=call, _progress_bar_config={"disable": True})
    # Noise that is drawn for nothing must not move the caller's generator.
    own = {"generator": torch.Generator(device).manual_seed(0), "latents": None}
    with contextlib.suppress(Reached), torch.no_grad():
        inspect.unwrap(cls.__call__)(trial, **{**arguments, **{k: v for k, v in own.items() if k in known}})
    if call.latents is None:
        raise ValueError(f"`sd_pipeline` must make its latents by `prepare_latents`, got {cls.__name__}.")
    return tuple(call.latents.shape)


def call_from(base: Any, latents: torch.Tensor, arguments: dict[str, Any]) -> Any:
    """Calls the base so that it starts from some latents, also where its call takes none (DiT).

    Such a loop hands its first latents to `scale_model_input` as they were drawn: there ours take their place.
    """
    if "latents" in inspect.signature(base.__call__).parameters:
        return base(**{**arguments, "latents": latents})
    scheduler: Any = copy.copy(base.scheduler)
    scale, waiting = scheduler.scale_model_input, [latents]

    def first(sample: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if waiting:
            start = waiting.pop().to(sample)
            sample = torch.cat([start, start]) if len(sample) == 2 * len(start) else start  # both halves of guidance
        return scale(sample, *args, **kwargs)

    scheduler.scale_model_input = first
    output = copied(base, type(base), scheduler=scheduler)(**arguments)
    if waiting:
        raise ValueError(f"`sd_pipeline` must take `latents` or call `scale_model_input`, got {type(base).__name__}.")
    return output


def first_level(base: Any, arguments: dict[str, Any]) -> StartLevel:
    """Returns where the base's scheduler will begin in a bound call; the scheduler itself is left as it is."""
    options = {
        name: arguments[name]
        for name in ("timesteps", "sigmas", "original_inference_steps")
        if arguments.get(name) is not None
    }
    steps = arguments.get("num_inference_steps")
    if steps is None and not options:
        steps = getattr(base, "default_inference_steps", None)
    if not (isinstance(steps, int) and steps >= 1 or "timesteps" in options or "sigmas" in options):
        raise ValueError(f"`num_inference_steps` must be an integer >= 1, got {steps!r}.")
    scheduler = copy.deepcopy(base.scheduler)
    retrieve_timesteps(scheduler, steps, "cpu", **options)
    return start_level(scheduler)
