"""What all that interpolates shares: the checks, one inversion, the mix, one denoising."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.utils.outputs import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from diffusers_ext.generation.latents import decoded, encoded, full_precision
from diffusers_ext.generation.stepping import callback_names, check_generator
from diffusers_ext.hub.loading import SafePipeline

from .diagnostics import NoiseDiagnostics, noise_diagnostics
from .images import gathered, read_images
from .inversion import Model, ddim_decode, ddim_invert, expected_inverted_std
from .levels import Levels
from .mix import PerFrame, lerp, noise_diffusion_mix, slerp

__all__ = ["METHODS", "Interpolation", "InterpolationPipeline", "NoiseDiffusionPipelineOutput"]

METHODS = ("noise_diffusion", "slerp", "lerp", "noise")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
DIAGNOSED = 16  # of more states that many, evenly spread, are looked at


@dataclass
class NoiseDiffusionPipelineOutput(BaseOutput):
    """Frames between images.

    Attributes:
        images: all frames, those of the first pair first: a list of PIL images, an array `(frames, height, width,
            channels)` or a tensor `(frames, channels, height, width)`.
        weights: the weight of each frame; on a path the number of the pair is added.
        diagnostics: figures of the inverted states (`"inverted"`, one sample per image; absent for the method
            `"noise"`) and of the mixed states (`"frames"`); of more than 16, those of 16 that are evenly spread, whose
            numbers are their `samples`. Empty where they were switched off.
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
    levels: Levels
    method: str
    numbers: dict[str, Any]
    scales: tuple[float, float]  # of image and noise where images are put back in
    fixed_point_iterations: int
    frame_batch_size: int | None


class Network:
    """The network as one stage of a call asks it, and what the stage shows to callbacks beside the latents."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def __call__(self, states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.model(states, timestep)

    def offered(self) -> dict[str, torch.Tensor | None]:
        """Returns tensors by the names that callbacks know."""
        return {}

    def take(self, changed: dict[str, torch.Tensor | None]) -> None:
        """Uses what a callback returned from now on."""


class Interpolation:
    """The call of all that interpolates, piece by piece."""

    _callback_tensor_inputs = ["latents"]
    _num_timesteps = 0
    _interrupt = False

    @property
    def num_timesteps(self) -> int:
        """Steps that a frame of the present call takes, those of the inversion first."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has stopped the present call, by `pipeline._interrupt = True`."""
        return self._interrupt

    # ------------------------------------------------------------------ checks

    def _check_mixing(
        self,
        num_frames: int,
        weights: PerFrame | None,
        method: str,
        levels: Levels,
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
        if numbers["boundary"] is not None:  # in standard deviations of the states
            numbers = {**numbers, "boundary": levels.std * torch.as_tensor(numbers["boundary"], dtype=torch.float64)}
        scales = levels.scales(legacy_timestep)
        return Mixing(number, levels, method, numbers, scales, fixed_point_iterations, frame_batch_size)

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
        callback: Any,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> list[str]:
        """Checks what all calls share; returns the names of the tensors that the callback is given."""
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {list(OUTPUT_TYPES)}, got {output_type!r}.")
        check_generator(generator, count)
        return callback_names(callback, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)

    # ------------------------------------------------------------------ the work

    def _make_frames(
        self,
        clean: torch.Tensor,
        pairs: tuple[list[int], list[int]],
        mixing: Mixing,
        invert_network: Network,
        frame_network: Callable[[slice], Network],
        generator: torch.Generator | list[torch.Generator] | None,
        callback: Callable[[Any, int, Any, dict], dict] | None,
        names: list[str],
        diagnostics: dict[str, NoiseDiagnostics] | None,
    ) -> Iterator[torch.Tensor]:
        """Inverts, mixes and denoises, part by part.

        Args:
            clean: `(images, ...)` in the space that is diffused.
            pairs: indices of the first and second images.
            mixing: how frames are made.
            invert_network: the network as the inversion asks it, for all images at once.
            frame_network: returns the network for a part of the frames; called when its turn has come.
            generator: draws the noise that frames share.
            callback: `callback_on_step_end` of the call. Every part counts its steps from the end of the inversion.
            names: of the tensors that it is given.
            diagnostics: is filled, unless it is left out.

        Yields:
            Parts of the frames `(pairs * N, ...)`, those of a pair together.
        """
        first, second = pairs
        inverts, std = mixing.method != "noise", mixing.levels.std
        count, frames = len(mixing.levels.timesteps), len(mixing.weights) * len(first)
        size = mixing.frame_batch_size or frames
        parts = [slice(start, min(start + size, frames)) for start in range(0, frames, size)]
        self._num_timesteps, self._interrupt = count * (inverts + 1), False
        with self.progress_bar(total=count * (inverts + len(parts))) as progress_bar:  # pyright: ignore

            def stepped(network: Network, start: int) -> Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]:
                def after(step: int, t: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
                    if callback is not None:
                        offered = {"latents": latents, **network.offered()}
                        changed = callback(self, start + step, t, {name: offered[name] for name in names})
                        latents = changed.get("latents", latents)
                        network.take({name: value for name, value in changed.items() if name != "latents"})
                    progress_bar.update()
                    return latents

                return after

            states = clean
            if inverts:
                states = ddim_invert(
                    invert_network, clean, mixing.levels, mixing.fixed_point_iterations, stepped(invert_network, 0),
                    lambda: self.interrupt,
                )  # fmt: skip
                if diagnostics is not None:
                    samples, inflation = _spread(len(states)), expected_inverted_std(mixing.levels) / std
                    found = noise_diagnostics(states[samples], std, inflation)
                    diagnostics["inverted"] = replace(found, samples=tuple(samples))
            noise = self._shared_noise(clean, first, second, mixing, generator)
            samples, looked_at = _spread(frames), []
            for part in parts:
                mixed = self._mix(states, clean, noise, first, second, mixing, part)
                if diagnostics is not None:
                    looked_at += [mixed[i - part.start].cpu() for i in samples if part.start <= i < part.stop]
                network = frame_network(part)
                after = stepped(network, count * inverts)
                yield ddim_decode(network, mixed, mixing.levels, after, lambda: self.interrupt)
            if diagnostics is not None:
                found = noise_diagnostics(torch.stack(looked_at), std)
                diagnostics["frames"] = replace(found, samples=tuple(samples))

    @staticmethod
    def _shared_noise(
        clean: torch.Tensor,
        first: list[int],
        second: list[int],
        mixing: Mixing,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor | None:
        """Draws the noise of each pair, `None` where none is added."""
        fresh = bool((torch.as_tensor(mixing.numbers["gamma"]) > 0).any())
        if mixing.method != "noise" and not (mixing.method == "noise_diffusion" and fresh):
            return None
        # A path has one noise, so that its pieces meet; unrelated pairs have one each.
        count = 1 if _is_path(first, second) else len(first)
        noise = randn_tensor((count, *clean.shape[1:]), generator, clean.device, clean.dtype)
        return noise.expand(len(first), *clean.shape[1:])

    @staticmethod
    def _mix(
        states: torch.Tensor,
        clean: torch.Tensor,
        noise: torch.Tensor | None,
        first: list[int],
        second: list[int],
        mixing: Mixing,
        part: slice,
    ) -> torch.Tensor:
        """Returns a part of the mixed states `(pairs * N, ...)`."""
        image_scale, noise_scale = mixing.scales
        found = []
        for pairs, frames in pieces(part, len(mixing.weights)):
            one, other, weights = first[pairs], second[pairs], mixing.weights[frames]
            of_pairs = None if noise is None else noise[pairs]
            if mixing.method == "noise_diffusion":
                numbers = {name: _of_frames(value, frames) for name, value in mixing.numbers.items()}
                mixed = noise_diffusion_mix(
                    states[one], states[other], clean[one], clean[other], weights, image_scale, noise_scale,
                    noise=of_pairs, **numbers,
                )  # fmt: skip
            elif mixing.method == "noise":
                assert of_pairs is not None
                added = noise_scale * of_pairs
                mixed = slerp(image_scale * clean[one] + added, image_scale * clean[other] + added, weights)
            else:
                mixed = (slerp if mixing.method == "slerp" else lerp)(states[one], states[other], weights)
            found.append(by_pair(mixed))
        return torch.cat(found)

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


class InterpolationPipeline(Interpolation, SafePipeline):
    """Base of the pipelines; one of them says how images become states, and what its network is told."""

    # Diffusers annotates `config` as a dict.
    unet: Any
    scheduler: Any
    image_processor: Any

    @property
    def _autoencoder(self) -> Any:
        return self.vae

    def _encode(self, pixels: torch.Tensor, sample_posterior: bool = False, generator: Any = None) -> torch.Tensor:
        """Brings images in `[-1, 1]` into the space that is diffused, in fp32."""
        pixels = pixels.to(self._execution_device)
        if self._autoencoder is None:
            return pixels
        with full_precision(self._autoencoder):
            return encoded(self._autoencoder, pixels, sample_posterior, generator)

    def _finish(self, images: torch.Tensor, output_type: str) -> tuple[Any, list[bool] | None]:
        """Checks frames in about `[-1, 1]` and brings them into the form asked for."""
        return self.image_processor.postprocess(images, output_type=output_type), None

    def _images(
        self, parts: Iterable[torch.Tensor], count: int, output_type: str, frame_batch_size: int | None
    ) -> tuple[Any, list[bool] | None]:
        """Decodes frames and brings them into the form asked for, part by part."""
        flagged: list[bool] = []

        def finished(parts: Iterable[torch.Tensor]) -> Iterator[Any]:
            for part in parts:
                images, found = self._finish(part, output_type)
                flagged.extend(found or [])
                yield images

        if output_type == "latent":
            return gathered(parts, count), None
        autoencoder = self._autoencoder
        if autoencoder is None:
            return gathered(finished(parts), count), None
        # All frames are denoised before any is decoded: a network that is offloaded goes and comes once.
        latents = gathered(parts, count)
        with full_precision(autoencoder):
            decoding = (decoded(autoencoder, part).float() for part in latents.split(frame_batch_size or count))
            images = gathered(finished(decoding), count)
        return images, flagged or None


def by_pair(frames: torch.Tensor) -> torch.Tensor:
    """Turns `(N, pairs, ...)` into `(pairs * N, ...)`."""
    return frames.transpose(0, 1).flatten(0, 1)


def pieces(part: slice, count: int) -> Iterator[tuple[slice, slice]]:
    """Cuts a part of `(pairs * count)` frames into blocks of pairs and frames."""
    start = part.start
    while start < part.stop:
        pair, frame = divmod(start, count)
        whole = (part.stop - start) // count
        if frame == 0 and whole:
            yield slice(pair, pair + whole), slice(0, count)
            start += whole * count
        else:
            stop = min(count, frame + part.stop - start)
            yield slice(pair, pair + 1), slice(frame, stop)
            start += stop - frame


def _of_frames(value: PerFrame | None, frames: slice) -> Any:
    """Returns the numbers of some frames; one number is that of all."""
    numbers = None if value is None else torch.as_tensor(value, dtype=torch.float64)
    return numbers[frames] if numbers is not None and numbers.numel() > 1 else value


def _spread(count: int) -> list[int]:
    """Returns at most `DIAGNOSED` of so many numbers, evenly spread from the first to the last."""
    shown = min(count, DIAGNOSED)
    return [round(i * (count - 1) / max(shown - 1, 1)) for i in range(shown)]


def _is_path(first: list[int], second: list[int]) -> bool:
    return second == [i + 1 for i in first]
