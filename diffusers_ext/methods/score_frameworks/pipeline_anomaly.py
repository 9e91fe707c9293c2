"""What does not belong in an image: the difference to what a denoiser of healthy images makes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput

from diffusers_ext.data.reading import read_images
from diffusers_ext.generation.score_levels import as_real
from diffusers_ext.training.config import is_number, is_whole, require

from .base import DenoiserPipeline, as_output
from .noise import SimplexNoise
from .sampling import ddim_step, draw_rows, partial_levels

__all__ = ["AnomalyDetectionPipeline", "AnomalyDetectionPipelineOutput", "call_settings", "smoothed"]

NOISES = ("gaussian", "simplex")
SCORES = ("absolute", "bright", "dark")
# What a threshold holds for, with the defaults of a call.
SETTINGS = {
    "strength": 0.25,
    "num_inference_steps": 25,
    "num_samples": 3,
    "noise": "gaussian",
    "score": "absolute",
    "smoothing": 1.0,
}
TRUNCATE = 4.0  # standard deviations at which the smoothing kernel ends, as in SciPy


@dataclass
class AnomalyDetectionPipelineOutput(BaseOutput):
    """What `AnomalyDetectionPipeline` returns.

    Attributes:
        reconstruction: the mean of each image's reconstructions, of the asked type. Only PIL images are cut to [0, 1].
        anomaly_map: `(batch, 1, height, width)`, in the units of [0, 1] images; 0 where it was not looked.
        mask: `(batch, 1, height, width)`, bool: where the map is above the threshold; `None` without one.
        image_score: `(batch,)`, the largest value of each map.
    """

    reconstruction: Any
    anomaly_map: torch.Tensor
    mask: torch.Tensor | None
    image_score: torch.Tensor


def smoothed(maps: torch.Tensor, std: float) -> torch.Tensor:
    """Returns maps `(batch, 1, height, width)` smoothed by a Gaussian of some pixels, edges repeated; 0 does nothing.

    Raises:
        ValueError: `std` is negative.
    """
    require(is_number(std) and std >= 0, "smoothing", std, "a number >= 0 of pixels")
    if std == 0:
        return maps
    reach = int(TRUNCATE * std + 0.5)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=maps.device, dtype=maps.dtype) / std) ** 2)
    kernel = kernel / kernel.sum()
    maps = F.conv2d(F.pad(maps, (reach, reach, 0, 0), mode="replicate"), kernel.view(1, 1, 1, -1))
    return F.conv2d(F.pad(maps, (0, 0, reach, reach), mode="replicate"), kernel.view(1, 1, -1, 1))


class AnomalyDetectionPipeline(DenoiserPipeline):
    """Finds what does not belong in an image, with a denoiser trained on images in which all belongs.

    An image is brought part of the way to noise and denoised again, several times; what the denoiser has not learned
    does not come back. For research, not for diagnosis.

    Args:
        unet: an unconditional `UNet2DModel` of pixels.
        scheduler: the one that it was trained with, of DDPM's kind, of flow matching or EDM.
        image_scale: what pixels of [-1, 1] were multiplied by in training.
        calibration: what `calibrate` found; kept with the pipeline.

    Example:
        >>> import torch
        >>> from diffusers import DDIMScheduler, UNet2DModel
        >>> from diffusers_ext import AnomalyDetectionPipeline
        >>> unet = UNet2DModel(
        ...     sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=2,
        ...     down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        ... )
        >>> pipeline = AnomalyDetectionPipeline(unet, DDIMScheduler())
        >>> pipeline.set_progress_bar_config(disable=True)
        >>> healthy, new = torch.rand(4, 1, 8, 8), torch.rand(1, 1, 8, 8)
        >>> threshold = pipeline.calibrate(healthy, num_inference_steps=5)
        >>> output = pipeline(new, num_inference_steps=5, threshold="calibrated")
        >>> output.anomaly_map.shape, output.mask.dtype, output.image_score.shape
        (torch.Size([1, 1, 8, 8]), torch.bool, torch.Size([1]))
    """

    __module__ = "diffusers_ext"

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: SchedulerMixin,
        image_scale: float = 1.0,
        calibration: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(unet, scheduler, image_scale)
        kept = calibration is None or isinstance(calibration, dict)
        require(kept, "calibration", calibration, "what `calibrate` keeps, or left out")
        self.register_to_config(calibration=calibration)

    def check_inputs(
        self,
        strength: float,
        num_inference_steps: int,
        num_samples: int,
        noise: str | SimplexNoise,
        score: str,
        smoothing: float,
        threshold: Any,
    ) -> float | None:
        """Checks the arguments of a call but the image, and returns the threshold.

        Raises:
            ValueError: one is wrong; the message names it.
        """
        require(is_number(strength) and 0 < strength <= 1, "strength", strength, "a number in (0, 1]")
        if noise not in NOISES and not isinstance(noise, SimplexNoise):
            raise ValueError(f"`noise` must be one of {list(NOISES)} or a SimplexNoise, got {noise!r}.")
        if score not in SCORES:
            raise ValueError(f"`score` must be one of {list(SCORES)}, got {score!r}.")
        self._check_counts(num_inference_steps, num_samples)
        smoothed(torch.zeros(1, 1, 1, 1), smoothing)
        partial_levels(self._estimator().field, strength, num_inference_steps)
        if threshold is None:
            return None
        if not (isinstance(threshold, str) and threshold == "calibrated"):
            good = is_number(threshold) and threshold >= 0
            require(good, "threshold", threshold, "a number >= 0, 'calibrated' or left out")
            return float(threshold)
        found: Any = self.config["calibration"]
        if found is None:
            raise ValueError("`threshold` must be a number: 'calibrated' needs a call of `calibrate` before.")
        given = {"strength": strength, "num_inference_steps": num_inference_steps, "num_samples": num_samples,
                 "noise": _described(noise), "score": score, "smoothing": smoothing}  # fmt: skip
        for name, value in given.items():
            if found.get(name) != value:
                raise ValueError(
                    f"`{name}` must be {found.get(name)!r}, for which the threshold was calibrated, got {value!r}."
                )
        return float(found["threshold"])

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        strength: float = 0.25,
        num_inference_steps: int = 25,
        num_samples: int = 3,
        noise: Literal["gaussian", "simplex"] | SimplexNoise = "gaussian",
        score: Literal["absolute", "bright", "dark"] = "absolute",
        smoothing: float = 1.0,
        threshold: float | Literal["calibrated"] | None = None,
        mask: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 - as in Diffusers, never changed
    ) -> AnomalyDetectionPipelineOutput | tuple[Any, ...]:
        """Makes anomaly maps.

        Args:
            image: PIL images, arrays `(height, width[, channels])` or with a batch in front, tensors `(channels,
                height, width)` or with a batch in front, or a list of these, all of one size: uint8, uint16, or
                floats in [0, 1].
            strength: share of the noise schedule that is added, in (0, 1]: more removes larger things, and changes
                more of what belongs.
            num_inference_steps: of the way back.
            num_samples: reconstructions of each image, whose mean is compared.
            noise: `"gaussian"`, or `"simplex"` (or a `SimplexNoise` of other sizes) for a network that was trained
                with it.
            score: `"absolute"` difference, or what is `"bright"` or `"dark"` against the reconstruction.
            smoothing: standard deviation in pixels of a Gaussian over the map.
            threshold: of the mask; `"calibrated"` takes that of `calibrate`.
            mask: where to look, 1 there and 0 elsewhere: `(height, width)`, or `(batch, 1, height, width)`.
            generator: one for all, or one for each image; with a list, an image's map does not depend on the others in
                the batch.
            output_type: of `reconstruction`: `"pil"`, `"np"` `(batch, height, width, channels)`, `"pt"` `(batch,
                channels, height, width)`.
            return_dict: return an `AnomalyDetectionPipelineOutput` instead of a tuple.
            callback_on_step_end: called as `(pipeline, step, timestep, {"latents": ...})` after every step with the
                `(batch * num_samples, channels, height, width)` noisy samples; those that it returns are used.
                `pipeline._interrupt = True` ends the call with the last clean estimate.
            callback_on_step_end_tensor_inputs: names passed to it.

        Returns:
            `AnomalyDetectionPipelineOutput`, or its values as a tuple in the same order.

        Raises:
            ValueError: an argument is wrong; the message names it.
        """
        limit = self.check_inputs(strength, num_inference_steps, num_samples, noise, score, smoothing, threshold)
        names = self._check_call(output_type, callback_on_step_end, callback_on_step_end_tensor_inputs)
        images = self._read(image, generator)
        where = _where(mask, images)
        estimator = self._estimator()
        sigmas = partial_levels(estimator.field, strength, num_inference_steps)
        self._num_timesteps = num_inference_steps
        source = SimplexNoise() if noise == "simplex" else noise
        make = source.sample if isinstance(source, SimplexNoise) else None

        clean = self._to_network(images).repeat_interleave(num_samples, 0)

        def draw() -> torch.Tensor:
            return draw_rows(tuple(clean.shape), num_samples, generator, clean, make)

        a, b = estimator.coefficients(sigmas[0])
        x = a * clean + b * draw()
        with self.progress_bar(total=num_inference_steps) as bar:  # pyright: ignore[reportCallIssue]
            for i, sigma in enumerate(sigmas[:-1]):
                estimate = estimator(x, sigma)
                levels = estimator.coefficients(sigma), estimator.coefficients(sigmas[i + 1])
                x = ddim_step(x, estimate, *levels, 1.0, draw)
                if callback_on_step_end is not None:
                    given = {name: x for name in names}
                    x = callback_on_step_end(self, i, estimator.field.at(sigma).t, given).get("latents", x)
                bar.update()
                if self._interrupt:
                    x = estimate
                    break
        reconstruction = self._to_images(x).unflatten(0, (len(images), num_samples)).mean(1)
        difference = images - reconstruction
        parts = {"absolute": difference.abs(), "bright": difference.relu(), "dark": (-difference).relu()}
        maps = smoothed(parts[score].mean(1, keepdim=True), smoothing)
        maps = maps if where is None else maps * where
        self.maybe_free_model_hooks()
        output = AnomalyDetectionPipelineOutput(
            as_output(reconstruction, output_type), maps, None if limit is None else maps > limit, maps.amax((1, 2, 3))
        )
        fields = AnomalyDetectionPipelineOutput.__dataclass_fields__
        return output if return_dict else tuple(getattr(output, name) for name in fields)

    def calibrate(
        self,
        images: Any,
        quantile: float = 0.995,
        mask: torch.Tensor | None = None,
        batch_size: int = 16,
        generator: torch.Generator | None = None,
        **settings: Any,
    ) -> float:
        """Chooses the threshold on healthy images alone, and keeps it with the pipeline.

        Args:
            images: healthy images that the network was not trained on, as in a call.
            quantile: share of their pixels that stays below the threshold.
            mask: where to look, as in a call; only pixels there count.
            batch_size: images at a time.
            generator: as in a call.
            **settings: `strength`, `num_inference_steps`, `num_samples`, `noise`, `score`, `smoothing`; a call with
                `threshold="calibrated"` must have the same.

        Returns:
            The threshold.

        Raises:
            ValueError: an argument is wrong; the message names it.
        """
        require(is_number(quantile) and 0 < quantile < 1, "quantile", quantile, "a number in (0, 1)")
        require(is_whole(batch_size), "batch_size", batch_size, "an integer >= 1")
        whole, described = call_settings(settings)
        read = self._read(images, generator)
        where = _where(mask, read)
        values = []
        for rows in torch.arange(len(read)).split(batch_size):
            part = None if where is None else where[rows.to(where.device)]
            call: Any = {**whole, "mask": part, "generator": generator, "output_type": "pt"}
            found: Any = self(read[rows.to(read.device)], **call)
            maps = found.anomaly_map
            values.append(maps.flatten() if part is None else maps[part])
        # torch's quantile takes 16 million values at most.
        threshold = float(np.quantile(torch.cat(values).double().cpu().numpy(), quantile))
        self.register_to_config(calibration={**described, "quantile": quantile, "threshold": threshold})
        return threshold

    def _read(self, image: Any, generator: Any) -> torch.Tensor:
        images = read_images(image, "image", self.unet.config.in_channels)
        if len({item.shape for item in images}) > 1:
            raise ValueError(f"`image` must hold images of one size, got {sorted({tuple(i.shape) for i in images})}.")
        batch = torch.stack(images).to(self._execution_device)
        self._check_images(tuple(batch.shape), "image", generator)
        return batch


def call_settings(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the settings of a call with the defaults of those that are not given, and the same as plain values.

    Raises:
        ValueError: one has another name.
    """
    for name in given:
        if name not in SETTINGS:
            raise ValueError(f"`settings` must be among {list(SETTINGS)}, got {name!r}.")
    whole = {**SETTINGS, **given}
    return whole, {**whole, "noise": _described(whole["noise"])}


def _described(noise: str | SimplexNoise) -> str:
    if not isinstance(noise, SimplexNoise):
        return noise
    amplitudes = ", ".join(f"{a:.4g}" for a in noise.amplitudes)
    return f"simplex {noise.frequency:g}: {amplitudes}"


def _where(mask: Any, images: torch.Tensor) -> torch.Tensor | None:
    """Returns where to look, `(batch, 1, height, width)`, bool."""
    if mask is None:
        return None
    given = as_real("mask", mask)
    full = (len(images), 1, *images.shape[2:])
    if tuple(given.shape) not in (full, (1, *full[1:]), full[2:]):
        raise ValueError(f"`mask` must have the shape {full[2:]} or {full}, got {tuple(given.shape)}.")
    if not bool(((given == 0) | (given == 1)).all()):
        raise ValueError(f"`mask` must hold 0 and 1 alone, got {given.unique().tolist()[:5]}.")
    where = given.bool().to(images.device).expand(full)
    if not bool(where.any()):
        raise ValueError("`mask` must be 1 somewhere, got 0 everywhere.")
    return where
