"""Frames between real images by any text-to-image pipeline, through its own call."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from diffusers.image_processor import VaeImageProcessor

from diffusers_ext.generation.denoiser import PipelineDenoiser
from diffusers_ext.generation.prompts import Conditions
from diffusers_ext.generation.stock_call import guides

from .base import Interpolation, Network, NoiseDiffusionPipelineOutput
from .images import gathered
from .inversion import Model
from .levels import any_levels, check_steps
from .mix import PerFrame
from .text import texts_per_image

__all__ = ["PipelineNoiseDiffusion"]


class PipelineNoiseDiffusion(Interpolation):
    r"""Makes frames between real images, or along a path of them, with any text-to-image pipeline as it is.

    The network is called as the pipeline's own call does it (see `PipelineDenoiser`), and all happens in its latents:
    inversion, NoiseDiffusion's mix and the way back. Where the pipeline is one of flow matching, its states are
    \((1-s)\,x + s\,n\): \(1-s\) and s take the places of \(\sqrt{\bar\alpha}\) and \(\sqrt{1-\bar\alpha}\), Euler's
    steps those of DDIM, and `boundary` counts in \(\sqrt{(1-s)^2+s^2}\), the standard deviation of states of normal
    data. The grid is then that of the pipeline itself, shifted for the size where it shifts. Other schedulers with
    `alphas_cumprod` (Euler, DPM-Solver, PNDM) lend their alphas to DDIM.

    Args:
        pipe: a text-to-image pipeline with an autoencoder, or one that takes class labels. It is not changed.

    Raises:
        ValueError: the pipeline has neither text nor labels, or starts from an image.

    Reference:
        Zheng et al., arXiv 2403.08840; for flow matching the same equation with the scales of its states.

    Example:
        >>> from diffusers_ext import PipelineNoiseDiffusion
        >>> frames = PipelineNoiseDiffusion(pipe)(cat, dog, "a cat", "a dog").images  # doctest: +SKIP
    """

    __module__ = "diffusers_ext"

    def __init__(self, pipe: Any) -> None:
        PipelineDenoiser(pipe)  # refuses what cannot be called
        self.pipe = pipe
        self.image_processor = VaeImageProcessor()

    def progress_bar(self, iterable: Any = None, total: int | None = None) -> Any:
        """Returns the pipeline's progress bar, as `pipe.set_progress_bar_config` has made it."""
        return self.pipe.progress_bar(iterable, total)

    @torch.no_grad()
    def __call__(
        self,
        image_0: Any,
        image_1: Any = None,
        prompt: str | int | list[Any] | None = None,
        prompt_1: str | int | list[Any] | None = None,
        num_frames: int = 5,
        weights: PerFrame | None = None,
        method: Literal["noise_diffusion", "slerp", "lerp", "noise"] = "noise_diffusion",
        num_inference_steps: int = 50,
        strength: float = 0.7,
        gamma: PerFrame = 0.0,
        injection: PerFrame = 1.2,
        mu: PerFrame | None = None,
        nu: PerFrame | None = None,
        boundary: PerFrame | None = 2.0,
        fixed_point_iterations: int = 0,
        guide_inversion: bool = False,
        frame_batch_size: int | None = None,
        diagnostics: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 - as in Diffusers, never changed
        **call: Any,
    ) -> NoiseDiffusionPipelineOutput | tuple:
        """Makes frames between images; what is not said here is as in `NoiseDiffusionPipeline`.

        Args:
            image_0: the first image, the first images of several pairs, or a path. Its height and width are those of
                the frames, and must be ones that the pipeline draws.
            image_1: the second image, or as many as `image_0`; left out for a path.
            prompt: what `image_0` shows: one text (or class label), or one per image of `image_0`. By default the
                empty text.
            prompt_1: what `image_1` shows, likewise; by default `prompt`. A frame is told what lies between: of the
                encoded texts, or where they have unequal lengths or masks, of the network's outputs, at two calls for
                one.
            num_frames: N, frames of each pair.
            weights: the frames' places instead, in `[0, 1]`.
            method: `"noise_diffusion"`, `"slerp"`, `"lerp"` or `"noise"`.
            num_inference_steps: S, steps from pure noise to an image.
            strength: share of them that is used.
            gamma: share of fresh noise.
            injection: how much of the images is put back in.
            mu: weight of the first image instead, together with `nu`.
            nu: weight of the second image.
            boundary: clips the states; `None` does not.
            fixed_point_iterations: further calls of the network per inversion step.
            guide_inversion: guide the inversion as the frames are; off, the ends of a guided path are not reproduced.
                On for a scale that is an input of the network (Flux).
            frame_batch_size: frames denoised and decoded at a time, by default all.
            diagnostics: look at the states, see `NoiseDiffusionPipelineOutput`. Where latents are packed to tokens,
                `correlation` is that of tokens and channels.
            generator: draws the shared noise; one, or one per pair.
            output_type: `"pil"`, `"np"`, `"pt"`, or `"latent"` for latents of the pipeline's loop, fp32.
            return_dict: return `NoiseDiffusionPipelineOutput` instead of a tuple of its entries.
            callback_on_step_end: called as `(self, step, timestep, {"latents": ...})` after every step, those of the
                inversion first; the latents that it returns are used. `self._interrupt = True` stops.
            callback_on_step_end_tensor_inputs: names passed to it.
            **call: further arguments of the pipeline's own call, such as `guidance_scale`, `true_cfg_scale`,
                `negative_prompt` or `max_sequence_length`. Guidance is off unless it is given.

        Returns:
            `NoiseDiffusionPipelineOutput` with the frames of the first pair first.

        Raises:
            ValueError: an argument is wrong or contradicts another, the pipeline does not draw this size, or its
                schedule is none of flow matching or `alphas_cumprod`; raised before the network is called.
        """
        pixels, first, second = self._read_pairs(image_0, image_1, 3, 1)
        count = len(pixels)
        if image_1 is not None:
            prompts = texts_per_image("prompt", prompt, count // 2, str | int)
            prompts += prompts if prompt_1 is None else texts_per_image("prompt_1", prompt_1, count // 2, str | int)
        elif prompt_1 is not None:
            raise ValueError("`prompt_1` must be left out on a path: `prompt` is one text, or one per image.")
        else:
            prompts = texts_per_image("prompt", prompt, count, str | int)
        draws = 1 if image_1 is None else len(first)
        names = self._check_call(
            generator, draws, output_type, callback_on_step_end, callback_on_step_end_tensor_inputs
        )
        taken = [name for name in ("height", "width") if name in call]
        if taken:
            raise ValueError(f"`{taken[0]}` must be left out: it is that of the images, got {call[taken[0]]!r}.")
        check_steps(num_inference_steps, strength, self.pipe.scheduler.config.get("num_train_timesteps", 1000))
        known = inspect.signature(type(self.pipe).__call__).parameters
        own = {"height": pixels.shape[2], "width": pixels.shape[3], "num_inference_steps": num_inference_steps}
        own = {name: value for name, value in own.items() if name in known}
        denoiser = inverting = PipelineDenoiser(self.pipe, **own, **call)
        unguided = {name: value for name, value in call.items() if not guides(name)}
        if not guide_inversion and len(unguided) < len(call):
            inverting = PipelineDenoiser(self.pipe, **own, **unguided)
        numbers = {"gamma": gamma, "injection": injection, "mu": mu, "nu": nu, "boundary": boundary}
        levels = any_levels(denoiser.scheduler, num_inference_steps, strength, denoiser.schedule_arguments())
        mixing = self._check_mixing(
            num_frames, weights, method, levels, numbers, False, fixed_point_iterations, frame_batch_size
        )

        clean = denoiser.encode_images(pixels)
        conditions = denoiser.encode_prompts(prompts)
        of_inversion = conditions if inverting is denoiser else inverting.encode_prompts(prompts)
        rows = [(pair, w) for pair in range(len(first)) for w in mixing.weights.tolist()]
        of_frames = _Between(
            denoiser,
            conditions[[first[pair] for pair, _ in rows]],
            conditions[[second[pair] for pair, _ in rows]],
            [w for _, w in rows],
        )
        found = {} if diagnostics else None
        parts = self._make_frames(
            clean,
            (first, second),
            mixing,
            Network(inverting.bind(of_inversion)),
            lambda part: Network(of_frames.bind(part)),
            generator,
            callback_on_step_end,
            names,
            found,
        )
        images, flagged = self._finished(parts, denoiser, len(rows), output_type, frame_batch_size)
        self.pipe.maybe_free_model_hooks()
        return self._output(images, first, second, mixing, found or {}, return_dict, flagged)

    def _finished(
        self,
        parts: Iterable[torch.Tensor],
        denoiser: PipelineDenoiser,
        count: int,
        output_type: str,
        frame_batch_size: int | None,
    ) -> tuple[Any, list[bool] | None]:
        """Decodes frames and brings them into the form asked for, part by part."""
        latents = gathered(parts, count)
        if output_type == "latent":
            return latents, None
        flagged: list[bool] = []

        def postprocessed(part: torch.Tensor) -> Any:
            images, denormalize = denoiser.decode(part), None
            if getattr(self.pipe, "safety_checker", None) is not None:
                images, found = self.pipe.run_safety_checker(images, denoiser.device, denoiser.dtype)
                flagged.extend(found)
                denormalize = [not flag for flag in found]  # it blacks out what it flags
            return self.image_processor.postprocess(images, output_type, denormalize)

        images = gathered(map(postprocessed, latents.split(frame_batch_size or count)), count)
        return images, flagged or None


class _Between:
    """The denoiser under what lies between two batches of conditions."""

    def __init__(self, denoiser: PipelineDenoiser, one: Conditions, other: Conditions, weights: list[float]) -> None:
        self.denoiser, self.one, self.other, self.weights = denoiser, one, other, torch.tensor(weights)
        self.mixed: Conditions | None = None
        with contextlib.suppress(ValueError):  # nothing lies between: outputs are mixed
            self.mixed = one.interpolated(other, weights)

    def bind(self, part: slice) -> Model:
        """Returns a part of the batch as a function (x, t) -> output."""
        if self.mixed is not None:
            return self.denoiser.bind(self.mixed[part])
        one, other = self.denoiser.bind(self.one[part]), self.denoiser.bind(self.other[part])

        def outputs(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            weights = self.weights[part].to(x.device).view(-1, *[1] * (x.ndim - 1))
            return torch.lerp(one(x, t), other(x, t), weights)

        return outputs
