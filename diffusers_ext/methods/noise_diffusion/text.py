"""What the text-to-image pipelines that interpolate share: their call, and guidance in one forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from .base import InterpolationPipeline, NoiseDiffusionPipelineOutput, by_pair
from .inversion import Model
from .mix import PerFrame, interpolate_embeddings

__all__ = ["Condition", "TextInterpolationPipeline"]

Condition = dict[str, torch.Tensor]
"""What a network is told, by name: `(batch, ...)` tensors."""


class TextInterpolationPipeline(InterpolationPipeline):
    """Base of the Stable Diffusion pipelines that interpolate."""

    vae: Any

    def _encode_text(
        self,
        prompts: list[str] | None,
        negative_prompt: str | None,
        embeds: Condition,
        guided: bool,
        clip_skip: int | None,
    ) -> tuple[Condition, Condition | None]:
        """Returns what the network is told of every image, and of nothing (one sample) where it is guided."""
        raise NotImplementedError

    def _call_unet(
        self, sample: torch.Tensor, timestep: torch.Tensor, condition: Condition, cross_attention_kwargs: Any
    ) -> torch.Tensor:
        raise NotImplementedError

    def _check_text(
        self, prompt: Any, prompt_1: Any, negative_prompt: Any, embeds: dict[str, Any], count: int, is_path: bool
    ) -> tuple[list[str] | None, Condition]:
        """Returns a prompt for every image, `None` where embeddings are given, and the embeddings."""
        given = {name: value for name, value in embeds.items() if value is not None}
        if negative_prompt is not None and not isinstance(negative_prompt, str):
            raise ValueError(f"`negative_prompt` must be one text, got {negative_prompt!r}.")
        if negative_prompt is not None and "negative_prompt_embeds" in given:
            raise ValueError("`negative_prompt` must be left out where `negative_prompt_embeds` are given.")
        for name, value in given.items():
            expected = (1,) if name.startswith("negative") else (1, count)
            if not isinstance(value, torch.Tensor) or len(value) not in expected:
                size = " or ".join(str(n) for n in sorted(set(expected)))
                found = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
                raise ValueError(f"`{name}` must be a tensor whose first dimension is {size}, got {found}.")
            if not name.startswith("negative"):
                given[name] = value.expand(count, *value.shape[1:])
        for name in ("prompt_embeds", "pooled_prompt_embeds"):
            shapes = [tuple(given[n].shape[1:]) for n in (name, f"negative_{name}") if n in given]
            if len(set(shapes)) > 1:
                raise ValueError(f"`negative_{name}` must have the shape (1, {shapes[0]}), got (1, {shapes[1]}).")
        if "prompt_embeds" in given:
            if prompt is not None or prompt_1 is not None:
                raise ValueError("`prompt` and `prompt_1` must be left out where `prompt_embeds` are given.")
            return None, given
        if is_path:
            if prompt_1 is not None:
                raise ValueError("`prompt_1` must be left out on a path: `prompt` is one text, or one per image.")
            return _texts("prompt", prompt, count), given
        first = _texts("prompt", prompt, count // 2)
        return first + (first if prompt_1 is None else _texts("prompt_1", prompt_1, count // 2)), given

    def _guided(
        self, condition: Condition, null: Condition | None, scale: float, cross_attention_kwargs: Any
    ) -> Model:
        """Returns the network as a function of state and timestep; with guidance both branches run as one batch."""
        if scale == 1.0 or null is None:
            return lambda states, t: self._call_unet(states.to(self.unet.dtype), t, condition, cross_attention_kwargs)
        both = {name: torch.cat([null[name].expand_as(value), value]) for name, value in condition.items()}

        def model(states: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            states = states.to(self.unet.dtype)
            output = self._call_unet(torch.cat([states, states]), t, both, cross_attention_kwargs)
            without, told = output.float().chunk(2)
            return without + scale * (told - without)

        return model

    @torch.no_grad()
    def __call__(
        self,
        image_0: Any,
        image_1: Any = None,
        prompt: str | list[str] | None = None,
        prompt_1: str | list[str] | None = None,
        negative_prompt: str | None = None,
        num_frames: int = 5,
        weights: PerFrame | None = None,
        method: Literal["noise_diffusion", "slerp", "lerp", "noise"] = "noise_diffusion",
        num_inference_steps: int = 200,
        strength: float = 0.7,
        guidance_scale: float = 10.0,
        inversion_guidance_scale: float = 1.0,
        prompt_interpolation: Literal["lerp", "slerp"] = "lerp",
        gamma: PerFrame = 0.0,
        injection: PerFrame = 1.2,
        mu: PerFrame | None = None,
        nu: PerFrame | None = None,
        boundary: PerFrame | None = 2.0,
        legacy_timestep: bool = False,
        fixed_point_iterations: int = 0,
        frame_batch_size: int | None = None,
        sample_posterior: bool = False,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        clip_skip: int | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 - as in Diffusers, never changed
    ) -> NoiseDiffusionPipelineOutput | tuple:
        """Makes frames between images; what is not said here is as in `NoiseDiffusionPipeline`.

        Args:
            image_0: the first image, the first images of several pairs, or a path.
            image_1: the second image, or as many as `image_0`; left out for a path.
            prompt: what `image_0` shows: one text, or one per image of `image_0`. By default the empty text.
            prompt_1: what `image_1` shows, likewise; by default `prompt`.
            negative_prompt: what guidance leads away from, by default the empty text.
            num_frames: N, frames of each pair.
            weights: the frames' places instead, in `[0, 1]`.
            method: `"noise_diffusion"`, `"slerp"`, `"lerp"` or `"noise"`.
            num_inference_steps: S, steps from pure noise to an image.
            strength: share of them that is used.
            guidance_scale: classifier-free guidance of the frames; 1 turns it off.
            inversion_guidance_scale: that of the inversion; where it differs from `guidance_scale`, the ends of the
                path are not reproduced.
            prompt_interpolation: how the embeddings of the prompts are mixed for each frame.
            gamma: share of fresh noise.
            injection: how much of the images is put back in.
            mu: weight of the first image instead, together with `nu`.
            nu: weight of the second image.
            boundary: clips the states; `None` does not.
            legacy_timestep: put images back in at the level one step higher, as the authors' code does.
            fixed_point_iterations: further calls of the network per inversion step.
            frame_batch_size: frames denoised and decoded at a time, by default all.
            sample_posterior: draw the latents of the images from the VAE's posterior instead of taking its mean.
            prompt_embeds: `(1 or images, tokens, width)` instead of prompts, the images of `image_0` first.
            negative_prompt_embeds: `(1, tokens, width)` instead of `negative_prompt`.
            pooled_prompt_embeds: `(1 or images, width)`, for Stable Diffusion XL, with `prompt_embeds`.
            negative_pooled_prompt_embeds: `(1, width)`, likewise.
            clip_skip: layers of the text encoder left out at its end.
            cross_attention_kwargs: for the attention processors, such as `{"scale": 0.5}` for LoRA.
            generator: draws the posterior and the shared noise; one, or one per pair (then `sample_posterior` must be
                off).
            output_type: `"pil"`, `"np"`, `"pt"`, or `"latent"` for the frames' scaled latents, fp32.
            return_dict: return `NoiseDiffusionPipelineOutput` instead of a tuple of its entries.
            callback_on_step_end: called as `(pipeline, step, timestep, {"latents": ...})` after every step.
            callback_on_step_end_tensor_inputs: names passed to it.

        Returns:
            `NoiseDiffusionPipelineOutput` with the frames of the first pair first.

        Raises:
            ValueError: an argument is wrong or contradicts another; raised before any network is called.
        """
        numbers = {"gamma": gamma, "injection": injection, "mu": mu, "nu": nu, "boundary": boundary}
        mixing = self._check_mixing(
            num_frames, weights, method, num_inference_steps, strength, numbers, legacy_timestep,
            fixed_point_iterations, frame_batch_size,
        )  # fmt: skip
        for name, scale in (
            ("guidance_scale", guidance_scale),
            ("inversion_guidance_scale", inversion_guidance_scale),
        ):
            if not (isinstance(scale, int | float) and scale >= 0):
                raise ValueError(f"`{name}` must be a number >= 0, got {scale!r}.")
        if prompt_interpolation not in ("lerp", "slerp"):
            raise ValueError(f"`prompt_interpolation` must be 'lerp' or 'slerp', got {prompt_interpolation!r}.")
        if sample_posterior and isinstance(generator, list):
            raise ValueError("`generator` must be one generator where `sample_posterior` is on, got a list.")
        if self.unet.config.in_channels != self.vae.config.latent_channels:
            raise ValueError(
                f"`unet` must take the {self.vae.config.latent_channels} channels of the VAE's latents, got one that "
                f"takes {self.unet.config.in_channels}."
            )
        pixels, first, second = self._read_pairs(image_0, image_1, self.vae.config.in_channels, self.vae_scale_factor)
        draws = 1 if image_1 is None else len(first)
        self._check_call(generator, draws, output_type, callback_on_step_end_tensor_inputs)
        embeds = {
            "prompt_embeds": prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds,
            "pooled_prompt_embeds": pooled_prompt_embeds,
            "negative_pooled_prompt_embeds": negative_pooled_prompt_embeds,
        }
        prompts, given = self._check_text(
            prompt, prompt_1, negative_prompt, embeds, len(pixels), is_path=image_1 is None
        )

        guided = guidance_scale != 1.0 or inversion_guidance_scale != 1.0
        condition, null = self._encode_text(prompts, negative_prompt, given, guided, clip_skip)
        condition = self._complete(condition, pixels)
        null = None if null is None else self._complete(null, pixels)
        of_frames = {
            name: by_pair(interpolate_embeddings(v[first], v[second], mixing.weights, prompt_interpolation))
            for name, v in condition.items()
        }

        def frame_model(part: slice) -> Model:
            told = {name: value[part] for name, value in of_frames.items()}
            return self._guided(told, null, guidance_scale, cross_attention_kwargs)

        clean = self._encode(pixels, sample_posterior, generator)
        invert_model = self._guided(condition, null, inversion_guidance_scale, cross_attention_kwargs)
        frames, diagnostics = self._make_frames(
            clean, (first, second), mixing, invert_model, frame_model, generator, callback_on_step_end
        )
        images, flagged = frames, None
        if output_type != "latent":
            images, flagged = self._finish(self._decode(frames, frame_batch_size), output_type)
        self.maybe_free_model_hooks()
        return self._output(images, first, second, mixing, diagnostics, return_dict, flagged)

    def _complete(self, condition: Condition, pixels: torch.Tensor) -> Condition:
        """Adds what the network is told of the images beside text."""
        return condition

    def _finish(self, images: torch.Tensor, output_type: str) -> tuple[Any, list[bool] | None]:
        """Checks decoded frames and brings them into the form asked for."""
        return self.image_processor.postprocess(images, output_type=output_type), None


def _texts(name: str, value: Any, count: int) -> list[str]:
    """Returns one text per image."""
    texts = [value or ""] * count if value is None or isinstance(value, str) else value
    if not isinstance(texts, list) or len(texts) != count or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"`{name}` must be one text or {count}, one per image, got {value!r}.")
    return texts
