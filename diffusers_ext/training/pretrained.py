"""Loading the image denoiser that a method starts from."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)

from diffusers_ext.generation.latents import latent_factor
from diffusers_ext.generation.stepping import current_config, set_timesteps

from .config import require
from .objectives import EDM

__all__ = [
    "EDM_KINDS",
    "Denoiser",
    "check_image_size",
    "check_inference_steps",
    "check_schedule",
    "converted",
    "edm_objective",
    "load_denoiser",
    "loaded",
]

EDM_KINDS = (EDMEulerScheduler, EDMDPMSolverMultistepScheduler)


def edm_objective(scheduler: Any) -> EDM:
    """Returns what a network with one of `EDM_KINDS` learns."""
    return EDM(scheduler.config["sigma_data"], -1 if scheduler.config["prediction_type"] == "v_prediction" else 1)


@dataclass
class Denoiser:
    """An image denoiser without text.

    Attributes:
        unet: its `UNet2DModel`.
        scheduler: its scheduler.
        vae: its VAE, or `None` in pixel space.
        image_scale: what images or latents are multiplied by before they are diffused.
        null_class_label: the label that stands for "no class", if there is one.
        tuned_timesteps: the timesteps that the network is good at, where these are not all.
    """

    unet: Any
    scheduler: Any
    vae: Any = None
    image_scale: float = 1.0
    null_class_label: int | None = None
    tuned_timesteps: list[int] | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes that it distinguishes, the null label included; 0 without classes."""
        return self.unet.config.num_class_embeds or 0


def check_image_size(unet: Any, vae: Any, resolution: int, channels: int) -> None:
    """Checks that a model generates images of a size.

    Args:
        unet: its network.
        vae: its VAE, or `None` in pixel space.
        resolution: height and width of the images.
        channels: their channels.

    Raises:
        ValueError: it generates others; the message names `resolution`, `channels`, or the model's argument.
    """
    factor, size = latent_factor(vae), unet.config.sample_size
    size = [size, size] if isinstance(size, int) else list(size or [])
    if len(set(size)) != 1:
        raise ValueError(
            "`pretrained_model_name_or_path` must be a model of square images whose config says their size, got "
            f"`sample_size` {unet.config.sample_size!r}."
        )
    accepted = f"{factor * size[0]}, the size of the model's images"
    require(resolution == factor * size[0], "resolution", resolution, accepted)
    expected = (unet if vae is None else vae).config.in_channels
    require(channels == expected, "channels", channels, f"{expected}, as the model takes")


def check_schedule(scheduler: Any, name: str, flow: bool = True, edm: bool = False) -> None:
    """Checks that a scheduler tells how its model was trained, in a way that this package trains.

    Args:
        scheduler: the model's.
        name: the model's, for the message.
        flow: whether flow matching is accepted.
        edm: whether EDM's preconditioning is accepted.

    Raises:
        ValueError: it does not; the message names `pretrained_model_name_or_path`.
    """
    if (flow and isinstance(scheduler, FlowMatchEulerDiscreteScheduler)) or (edm and isinstance(scheduler, EDM_KINDS)):
        return
    kind = scheduler.config.get("prediction_type") if hasattr(scheduler, "alphas_cumprod") else None
    kinds = ("epsilon", "sample", "v_prediction")
    # What is predicted of pure noise, the noise itself, says nothing about the image.
    blind = kind == "epsilon" and (
        scheduler.config.get("rescale_betas_zero_snr") or scheduler.alphas_cumprod.min() == 0
    )
    if kind not in kinds or blind:
        choice = " or a FlowMatchEulerDiscreteScheduler" if flow else ""
        choice += " or one of EDM" if edm else ""
        found = f"prediction_type {kind!r}" + (" on a schedule that ends at zero SNR" if blind else "")
        raise ValueError(
            "`pretrained_model_name_or_path` must have a scheduler with a variance-preserving schedule of betas and "
            f"`prediction_type` in {list(kinds)} (not epsilon where it ends at zero SNR){choice}, got {name!r} with "
            f"{type(scheduler).__name__} and {found}."
        )


def check_inference_steps(scheduler: Any, argument: str, steps: int) -> None:
    """Checks that a scheduler makes a number of steps, so that this does not show after training only.

    Raises:
        ValueError: it does not; the message names the argument.
    """
    try:
        set_timesteps(copy.deepcopy(scheduler), steps, "cpu")
    except Exception as error:  # schedulers raise many kinds
        raise ValueError(
            f"`{argument}` must be a number of steps that {type(scheduler).__name__} takes as it is configured, got "
            f"{steps!r}: {error}"
        ) from error


def loaded(argument: str, kind: Any, name: str, **options: Any) -> Any:
    """Loads from the Hub or a folder, in fp32 if `options` do not say otherwise; a failure names the argument."""
    try:
        return kind.from_pretrained(name, use_safetensors=True, **{"dtype": torch.float32, **options})
    except Exception as error:  # the libraries raise many kinds
        raise ValueError(
            f"`{argument}` must be a Hub repo or a folder that `{kind.__name__}` loads, got {name!r}: {error}"
        ) from error


def converted(kind: Any, scheduler: Any, **changes: Any) -> Any:
    """Returns a scheduler of another class with the same noise schedule.

    Args:
        kind: the class.
        scheduler: the scheduler to follow.
        **changes: entries of its config to change.
    """
    config = current_config(scheduler)
    try:
        return kind.from_config(config, **changes)
    except NotImplementedError:  # the class has no name for this schedule, but takes its betas
        betas = {"beta_schedule": "linear", "trained_betas": scheduler.betas.tolist()}
        return kind.from_config({**config, **betas}, **changes)


def _refuse_text(name: str) -> None:
    """Refuses a text-to-image pipeline before its weights are read."""
    try:
        index: Any = DiffusionPipeline.load_config(name)
    except Exception:  # noqa: BLE001 - what is wrong is said where it is loaded
        return
    encoders = sorted(key for key in index if key.startswith("text_encoder") and index[key][0] is not None)
    if encoders:
        raise ValueError(
            f"`pretrained_model_name_or_path` must be a model of images without text, got {name!r}, a "
            f"{index.get('_class_name')} with {encoders}: the methods for such pipelines are `text_to_image` and "
            "`domain_studio_text`."
        )


def load_denoiser(name: str, learned_variance: bool = False, edm: bool = False) -> Denoiser:
    """Loads the parts of a pipeline with a `UNet2DModel`, of this package or of Diffusers.

    Args:
        name: Hub repo or folder.
        learned_variance: accept a network of pixels whose output has the variance behind the prediction.
        edm: accept EDM's preconditioning.

    Raises:
        ValueError: it cannot be loaded, or is of another kind; the message names `pretrained_model_name_or_path`.
    """
    _refuse_text(name)
    pipeline = loaded("pretrained_model_name_or_path", DiffusionPipeline, name)
    unet: Any = getattr(pipeline, "unet", None)
    if not isinstance(unet, UNet2DModel):
        raise ValueError(
            f"`pretrained_model_name_or_path` must be a pipeline with a `UNet2DModel`, got {name!r} with "
            f"{type(unet).__name__}."
        )
    vae, used = getattr(pipeline, "vae", None), ("unet", "scheduler", "vae")
    others = sorted(key for key, part in pipeline.components.items() if part is not None and key not in used)
    if others or not isinstance(vae, AutoencoderKL | None):
        found = f"{others} beside them" if others else f"a {type(vae).__name__}"
        raise ValueError(
            "`pretrained_model_name_or_path` must consist of a `unet`, a `scheduler` and perhaps an `AutoencoderKL` "
            f"as `vae`, got {name!r} with {found}."
        )
    scale = pipeline.config.get("image_scale", 1.0)
    inputs, outputs = unet.config["in_channels"], unet.config["out_channels"]
    schedule: Any = pipeline.scheduler  # type: ignore[attr-defined]
    # A range is what Diffusers' samplers make of it, unless the scheduler says that the output is the variance itself.
    discrete = hasattr(schedule, "alphas_cumprod") and schedule.config.get("variance_type") != "learned"
    both = learned_variance and discrete and vae is None and scale == 1 and outputs == 2 * inputs
    if unet.config["class_embed_type"] is not None or not (outputs == inputs or both):
        raise ValueError(
            "`pretrained_model_name_or_path` must be a model whose labels, if any, are classes and that does not "
            "learn its variance (or, for DomainStudio, a range of it, of pixels that are not scaled), got "
            f"{name!r} with `class_embed_type` {unet.config['class_embed_type']!r} and "
            f"{outputs} output channels for {inputs}."
        )
    check_schedule(schedule, name, edm=edm)
    settings = pipeline.config
    return Denoiser(unet, schedule, vae, scale, settings.get("null_class_label"), settings.get("tuned_timesteps"))
