"""What all pipelines that interpolate share: the checks, one inversion, the mix, one denoising."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.outputs import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from diffusers_ext.generation.latents import decoded, encoded, full_precision
from diffusers_ext.hub.loading import SafePipeline

from .diagnostics import NoiseDiagnostics, noise_diagnostics
from .images import read_images
from .inversion import Model, NoiseLevels, ddim_decode, ddim_invert, expected_inverted_std, noise_levels
from .mix import PerFrame, lerp, noise_diffusion_mix, slerp

__all__ = ["METHODS", "InterpolationPipeline", "NoiseDiffusionPipelineOutput"]

METHODS = ("noise_diffusion", "slerp", "lerp", "noise")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class NoiseDiffusionPipelineOutput(BaseOutput):
    """Frames between images.

    Attributes:
        images: all frames, those of the first pair first: a list of PIL images, an array `(frames, height, width,
            channels)` or a tensor `(frames, channels, height, width)`.
        weights: the weight of each frame; on a path the number of the pair is added.
        diagnostics: figures of the inverted states (`"inverted"`, one sample per image; absent for the method
            `"noise"`) and of the mixed states (`"frames"`).
        nsfw_content_detected: what the safety checker says of each frame, `None` without one.
    """

    images: Any
    weights: list[float]
    diagnostics: dict[str, NoiseDiagnostics]
    nsfw_content_detected: list[bool] | None = None


@dataclass(frozen=True)
class Mixing:
    """The checked arguments of a call that say how frames are made."""

    weights: torch.Tensor
    levels: NoiseLevels
    method: str
    numbers: dict[str, Any]
    alpha_cumprod: float
    fixed_point_iterations: int
    frame_batch_size: int | None


class InterpolationPipeline(SafePipeline):
    """Base of the pipelines; one of them says how images become states, and what its network is told."""

    # Diffusers annotates `config` as a dict.
    unet: Any
    scheduler: Any
    image_processor: Any

    _callback_tensor_inputs = ["latents"]
    _num_timesteps = 0

    @property
    def num_timesteps(self) -> int:
        """Steps of the present call, those of the inversion first."""
        return self._num_timesteps

    # ------------------------------------------------------------------ what a pipeline provides

    @property
    def _autoencoder(self) -> Any:
        return self.vae

    # ------------------------------------------------------------------ checks

    def _check_mixing(
        self,
        num_frames: int,
        weights: PerFrame | None,
        method: str,
        num_inference_steps: int,
        strength: float,
        numbers: dict[str, Any],
        legacy_timestep: bool,
        fixed_point_iterations: int,
        frame_batch_size: int | None,
    ) -> Mixing:
        if method not in METHODS:
            raise ValueError(f"`method` must be one of {list(METHODS)}, got {method!r}.")
        for name, value, least in (
            ("num_frames", num_frames, 1),
            ("fixed_point_iterations", fixed_point_iterations, 0),
            ("frame_batch_size", 1 if frame_batch_size is None else frame_batch_size, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"`{name}` must be an integer >= {least}, got {value!r}.")
        levels = noise_levels(self.scheduler, num_inference_steps, strength)
        if weights is None:
            weights = torch.linspace(0, 1, num_frames + 2, dtype=torch.float64)[1:-1]
        try:
            number = torch.as_tensor(weights, dtype=torch.float64).reshape(-1)
        except (TypeError, ValueError) as error:
            raise ValueError(f"`weights` must be numbers in [0, 1], got {weights!r}.") from error
        if len(number) == 0:
            raise ValueError("`weights` must hold at least one number, got none.")
        # The checks are those of the mix itself: one number stands for a batch.
        one = torch.zeros(1, 1)
        frames = len(noise_diffusion_mix(one, one, one, one, number, 0.0, 1.0, noise=one, **numbers))
        if frames > len(number):
            raise ValueError(
                f"`weights` must be as many as the numbers that are given per frame, got {len(number)} and {frames}."
            )
        alpha_cumprod = levels.next_alpha_cumprod if legacy_timestep else levels.alphas_cumprod[-1]
        return Mixing(number, levels, method, numbers, alpha_cumprod, fixed_point_iterations, frame_batch_size)

    def _read_pairs(
        self, image_0: Any, image_1: Any, channels: int, divisor: int
    ) -> tuple[torch.Tensor, list[int], list[int]]:
        """Returns all images in `[-1, 1]`, and the indices of the first and of the second image of every pair."""
        pixels = read_images(image_0, "image_0", channels, divisor)
        count = len(pixels)
        if image_1 is None:
            if count < 2:
                raise ValueError("`image_1` must be given where `image_0` is a single image.")
            return pixels, list(range(count - 1)), list(range(1, count))
        others = read_images(image_1, "image_1", channels, divisor)
        if len(others) != count:
            raise ValueError(f"`image_1` must hold {count} images as `image_0`, got {len(others)}.")
        if others.shape != pixels.shape:
            raise ValueError(
                f"`image_1` must have the size of `image_0`, got (height, width) {tuple(others.shape[2:])} and "
                f"{tuple(pixels.shape[2:])}."
            )
        return torch.cat([pixels, others]), list(range(count)), list(range(count, 2 * count))

    def _check_call(
        self,
        generator: torch.Generator | list[torch.Generator] | None,
        count: int,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> None:
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {list(OUTPUT_TYPES)}, got {output_type!r}.")
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(
                f"`generator` must be one generator or a list of {count}, one per noise that is drawn, got a list of "
                f"{len(generator)}."
            )
        if any(name not in self._callback_tensor_inputs for name in callback_on_step_end_tensor_inputs):
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be a subset of {self._callback_tensor_inputs}, got "
                f"{callback_on_step_end_tensor_inputs}."
            )

    # ------------------------------------------------------------------ the work

    def _make_frames(
        self,
        clean: torch.Tensor,
        pairs: tuple[list[int], list[int]],
        mixing: Mixing,
        invert_model: Model,
        frame_model: Callable[[slice], Model],
        generator: torch.Generator | list[torch.Generator] | None,
        callback: Callable[[Any, int, Any, dict], dict] | None,
    ) -> tuple[torch.Tensor, dict[str, NoiseDiagnostics]]:
        """Inverts, mixes and denoises.

        Args:
            clean: `(images, ...)` in the space that is diffused.
            pairs: indices of the first and second images.
            mixing: how frames are made.
            invert_model: the network as the inversion asks it, for all images at once.
            frame_model: returns the network for a part of the frames.
            generator: draws the noise that frames share.
            callback: `callback_on_step_end` of the call.

        Returns:
            Frames `(pairs * N, ...)`, those of a pair together, and the diagnostics.
        """
        first, second = pairs
        inverts = mixing.method != "noise"
        count, frames = len(mixing.levels.timesteps), len(mixing.weights) * len(first)
        size = mixing.frame_batch_size or frames
        parts = [slice(start, min(start + size, frames)) for start in range(0, frames, size)]
        self._num_timesteps = count * (inverts + len(parts))
        step_of_call, diagnostics = 0, {}
        with self.progress_bar(total=self._num_timesteps) as progress_bar:  # pyright: ignore

            def stepped(step: int, t: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
                nonlocal step_of_call
                if callback is not None:
                    latents = callback(self, step_of_call, t, {"latents": latents}).get("latents", latents)
                step_of_call += 1
                progress_bar.update()
                return latents

            states = clean
            if inverts:
                states = ddim_invert(invert_model, clean, mixing.levels, mixing.fixed_point_iterations, stepped)
                inflation = expected_inverted_std(mixing.levels)
                diagnostics["inverted"] = noise_diagnostics(states, inflation=inflation)
            mixed = self._mix(states, clean, first, second, mixing, generator)
            diagnostics["frames"] = noise_diagnostics(mixed)
            done = [ddim_decode(frame_model(part), mixed[part], mixing.levels, stepped) for part in parts]
        return torch.cat(done), diagnostics

    def _mix(
        self,
        states: torch.Tensor,
        clean: torch.Tensor,
        first: list[int],
        second: list[int],
        mixing: Mixing,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        """Returns the mixed states `(pairs * N, ...)`."""
        image_scale, noise_scale = mixing.alpha_cumprod**0.5, (1 - mixing.alpha_cumprod) ** 0.5

        def draw() -> torch.Tensor:
            # A path has one noise, so that its pieces meet; unrelated pairs have one each.
            count = 1 if _is_path(first, second) else len(first)
            noise = randn_tensor((count, *clean.shape[1:]), generator, clean.device, clean.dtype)
            return noise.expand(len(first), *clean.shape[1:])

        if mixing.method == "noise_diffusion":
            fresh = bool((torch.as_tensor(mixing.numbers["gamma"]) > 0).any())
            mixed = noise_diffusion_mix(
                states[first], states[second], clean[first], clean[second], mixing.weights, image_scale, noise_scale,
                noise=draw() if fresh else None, **mixing.numbers,
            )  # fmt: skip
        elif mixing.method == "noise":
            noise = noise_scale * draw()
            mixed = slerp(image_scale * clean[first] + noise, image_scale * clean[second] + noise, mixing.weights)
        else:
            mixed = (slerp if mixing.method == "slerp" else lerp)(states[first], states[second], mixing.weights)
        return by_pair(mixed)

    def _encode(self, pixels: torch.Tensor, sample_posterior: bool = False, generator: Any = None) -> torch.Tensor:
        """Brings images in `[-1, 1]` into the space that is diffused, in fp32."""
        pixels = pixels.to(self._execution_device)
        if self._autoencoder is None:
            return pixels
        with full_precision(self._autoencoder):
            return encoded(self._autoencoder, pixels, sample_posterior, generator)

    def _decode(self, latents: torch.Tensor, frame_batch_size: int | None) -> torch.Tensor:
        """Brings frames back to images in about `[-1, 1]`, fp32."""
        if self._autoencoder is None:
            return latents
        with full_precision(self._autoencoder):
            parts = latents.split(frame_batch_size or len(latents))
            return torch.cat([decoded(self._autoencoder, part).float() for part in parts])

    def _output(
        self,
        images: Any,
        first: list[int],
        second: list[int],
        mixing: Mixing,
        diagnostics: dict[str, NoiseDiagnostics],
        return_dict: bool,
        flagged: list[bool] | None = None,
    ) -> NoiseDiffusionPipelineOutput | tuple:
        offsets = first if _is_path(first, second) else [0] * len(first)
        weights = [offset + w for offset in offsets for w in mixing.weights.tolist()]
        output = NoiseDiffusionPipelineOutput(images, weights, diagnostics, flagged)
        return output if return_dict else output.to_tuple()


def by_pair(frames: torch.Tensor) -> torch.Tensor:
    """Turns `(N, pairs, ...)` into `(pairs * N, ...)`."""
    return frames.transpose(0, 1).flatten(0, 1)


def _is_path(first: list[int], second: list[int]) -> bool:
    return second == [i + 1 for i in first]
