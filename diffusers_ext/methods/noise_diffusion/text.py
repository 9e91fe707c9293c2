"""What the text-to-image pipelines that interpolate share: their call, and guidance in one forward."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch

from diffusers_ext.hub.adapters import check_text_encoder_lora

from .base import InterpolationPipeline, NoiseDiffusionPipelineOutput, by_pair, pieces
from .condition import Condition, TextNetwork
from .levels import noise_levels
from .mix import PerFrame, interpolate_embeddings

__all__ = ["TextInterpolationPipeline", "texts_per_image"]


class TextInterpolationPipeline(InterpolationPipeline):
    """Base of the Stable Diffusion pipelines that interpolate."""

    vae: Any

    # What Diffusers' properties read; a call sets them, and a callback may change them while it runs.
    _guidance_scale = 1.0
    _begun_with = 1.0  # the scale that the present stage began with
    _guidance_rescale = 0.0
    _clip_skip: int | None = None
    _cross_attention_kwargs: dict[str, Any] | None = None
    _denoising_end: float | None = None

    _callback_names = {"prompt_embeds": "encoder_hidden_states"}
    """The names of what the network is told, as callbacks know them."""

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the present step is guided.

        A scale of the call leads away from the negative prompt wherever it is not 1; one that a callback has set does
        above 1, as in Diffusers, and below it turns guidance off.
        """
        scale = self._guidance_scale
        return scale != 1.0 if scale == self._begun_with else scale > 1.0

    def load_lora_weights(self, pretrained_model_name_or_path_or_dict: Any, *args: Any, **kwargs: Any) -> None:
        """Loads LoRA weights as the stock pipeline does.

        Raises:
            ValueError: some are a text encoder's, and the installed peft is too old for them.
        """
        check_text_encoder_lora(self, pretrained_model_name_or_path_or_dict, **kwargs)
        super().load_lora_weights(pretrained_model_name_or_path_or_dict, *args, **kwargs)  # type: ignore[misc]

    def _begin(self, scale: float) -> None:
        self._guidance_scale = self._begun_with = scale

    def _encode_text(
        self,
        prompts: list[str] | None,
        negative_prompt: str | None,
        embeds: Condition,
        guided: bool,
    ) -> tuple[Condition, Condition | None]:
        """Returns what the network is told of every image, and of nothing (one sample) where it is guided."""
        raise NotImplementedError

    def _call_unet(self, sample: torch.Tensor, timestep: torch.Tensor, condition: Condition) -> torch.Tensor:
        added: dict[str, Any] = {k: v for k, v in condition.items() if k in ("text_embeds", "time_ids")}
        images = [value for name, value in condition.items() if name.startswith("image_embeds")]
        if images:
            added["image_embeds"] = images
        return self.unet(
            sample,
            timestep,
            encoder_hidden_states=condition["encoder_hidden_states"],
            added_cond_kwargs=added or None,
            cross_attention_kwargs=self.cross_attention_kwargs,
            return_dict=False,
        )[0]

    @property
    def _text_lora_scale(self) -> float | None:
        return (self.cross_attention_kwargs or {}).get("scale")

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
            return texts_per_image("prompt", prompt, count), given
        first = texts_per_image("prompt", prompt, count // 2)
        return first + (first if prompt_1 is None else texts_per_image("prompt_1", prompt_1, count // 2)), given

    def _check_image_prompt(self, image: Any, embeds: Any, guided: bool) -> None:
        adapted = getattr(self.unet.config, "encoder_hid_dim_type", None) == "ip_image_proj"
        if image is not None and embeds is not None:
            raise ValueError("`ip_adapter_image` must be left out where `ip_adapter_image_embeds` are given.")
        name, value = ("ip_adapter_image", image) if embeds is None else ("ip_adapter_image_embeds", embeds)
        if (value is not None) != adapted:
            raise ValueError(
                f"`{name}` must be given: an IP-Adapter is loaded."
                if adapted
                else f"`{name}` must be left out: no IP-Adapter is loaded (`load_ip_adapter`)."
            )
        if not adapted:
            return
        count = len(self.unet.encoder_hid_proj.image_projection_layers)
        found = len(value) if isinstance(value, list) else 1
        if found != count:
            raise ValueError(f"`{name}` must be a list of {count}, one for each IP-Adapter, got {found}.")
        rows = 1 + guided
        if embeds is not None and not all(
            isinstance(e, torch.Tensor) and e.ndim in (3, 4) and len(e) == rows for e in embeds
        ):
            raise ValueError(
                f"`{name}` must hold tensors of shape ({rows}, images, ...){', negative first' * guided}."
            )

    def _encode_image_prompt(self, image: Any, embeds: Any, guided: bool) -> tuple[Condition, Condition | None]:
        """Returns what the network is told by image prompts, one row each, and without them."""
        if image is None and embeds is None:
            return {}, {}
        both = guided or embeds is None
        prepare: Any = self.prepare_ip_adapter_image_embeds  # pyright: ignore[reportAttributeAccessIssue]
        found = [e.to(self.unet.dtype) for e in prepare(image, embeds, self._execution_device, 1, both)]
        told = {f"image_embeds_{i}": e[-1:] for i, e in enumerate(found)}
        return told, {f"image_embeds_{i}": e[:1] for i, e in enumerate(found)} if both else None

    def _of_frames(
        self, network: TextNetwork, pairs: tuple[list[int], list[int]], weights: torch.Tensor, part: slice, mode: Any
    ) -> TextNetwork:
        """Returns the network for a part of the frames, which is told what lies between their images."""
        parts: dict[str, list[torch.Tensor]] = {name: [] for name in network.told}
        for of_pairs, frames in pieces(part, len(weights)):
            one, other = (indices[of_pairs] for indices in pairs)
            for name, value in network.told.items():
                between = interpolate_embeddings(value[one], value[other], weights[frames], mode)
                parts[name].append(by_pair(between))
        null = network.null and {name: value[:1] for name, value in network.null.items()}
        return TextNetwork(self, {name: torch.cat(values) for name, values in parts.items()}, null)

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
        diagnostics: bool = True,
        sample_posterior: bool = False,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
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
            diagnostics: look at the states, see `NoiseDiffusionPipelineOutput`.
            sample_posterior: draw the latents of the images from the VAE's posterior instead of taking its mean.
            prompt_embeds: `(1 or images, tokens, width)` instead of prompts, the images of `image_0` first.
            negative_prompt_embeds: `(1, tokens, width)` instead of `negative_prompt`.
            pooled_prompt_embeds: `(1 or images, width)`, for Stable Diffusion XL, with `prompt_embeds`.
            negative_pooled_prompt_embeds: `(1, width)`, likewise.
            ip_adapter_image: image prompt, for a pipeline with an IP-Adapter (or a list, one for each): the same for
                all images and frames.
            ip_adapter_image_embeds: instead of it a list of `(1, images, ...)`, one for each IP-Adapter; `(2,
                images, ...)` with the negative first where the inversion or the frames are guided.
            clip_skip: layers of the text encoder left out at its end.
            cross_attention_kwargs: for the attention processors, such as `{"scale": 0.5}` for LoRA.
            generator: draws the posterior and the shared noise; one, or one per pair (then `sample_posterior` must be
                off).
            output_type: `"pil"`, `"np"`, `"pt"`, or `"latent"` for the frames' scaled latents, fp32.
            return_dict: return `NoiseDiffusionPipelineOutput` instead of a tuple of its entries.
            callback_on_step_end: called as `(pipeline, step, timestep, tensors)` after every step, those of the
                inversion first; with `frame_batch_size` every part counts its steps from the end of the inversion.
                What it returns is used: latents at once, what the network is told from then on in this part (of the
                inversion: in all frames, too). `pipeline._guidance_scale` set by it counts from the next step on; set
                in the inversion, it holds for all frames. `pipeline._interrupt = True` stops: what is not denoised by
                then is returned as it is. Diffusers' callbacks, such as `SDCFGCutoffCallback`, work.
            callback_on_step_end_tensor_inputs: names passed to it, those of Diffusers' own pipeline.

        Returns:
            `NoiseDiffusionPipelineOutput` with the frames of the first pair first.

        Raises:
            ValueError: an argument is wrong or contradicts another; raised before any network is called.
        """
        numbers = {"gamma": gamma, "injection": injection, "mu": mu, "nu": nu, "boundary": boundary}
        mixing = self._check_mixing(
            num_frames, weights, method, noise_levels(self.scheduler, num_inference_steps, strength), numbers,
            legacy_timestep, fixed_point_iterations, frame_batch_size,
        )  # fmt: skip
        for name, scale in (
            ("guidance_scale", guidance_scale),
            ("inversion_guidance_scale", inversion_guidance_scale),
        ):
            if not (isinstance(scale, int | float) and 0 <= scale < math.inf):
                raise ValueError(f"`{name}` must be a number >= 0, got {scale!r}.")
        layers = min(
            e.config.num_hidden_layers for e in (self.text_encoder, getattr(self, "text_encoder_2", None)) if e
        )
        if clip_skip is not None and not (isinstance(clip_skip, int) and 0 <= clip_skip < layers):
            raise ValueError(f"`clip_skip` must be an integer in 0..{layers - 1} or left out, got {clip_skip!r}.")
        if not isinstance(cross_attention_kwargs, dict | None):
            raise ValueError(f"`cross_attention_kwargs` must be a dict or left out, got {cross_attention_kwargs!r}.")
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
        names = self._check_call(
            generator, draws, output_type, callback_on_step_end, callback_on_step_end_tensor_inputs
        )
        guided = guidance_scale != 1.0 or inversion_guidance_scale != 1.0
        self._check_image_prompt(ip_adapter_image, ip_adapter_image_embeds, guided)
        embeds = {
            "prompt_embeds": prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds,
            "pooled_prompt_embeds": pooled_prompt_embeds,
            "negative_pooled_prompt_embeds": negative_pooled_prompt_embeds,
        }
        prompts, given = self._check_text(
            prompt, prompt_1, negative_prompt, embeds, len(pixels), is_path=image_1 is None
        )

        self._begin(inversion_guidance_scale)
        self._clip_skip, self._cross_attention_kwargs = clip_skip, cross_attention_kwargs
        # A callback may turn guidance on.
        known = self.text_encoder is not None or "negative_prompt_embeds" in given
        told, null = self._encode_text(
            prompts, negative_prompt, given, guided or (callback_on_step_end is not None and known)
        )
        image_told, image_null = self._encode_image_prompt(ip_adapter_image, ip_adapter_image_embeds, guided)
        told = {**told, **{name: value.expand(len(pixels), *value.shape[1:]) for name, value in image_told.items()}}
        null = None if null is None or image_null is None else self._complete({**null, **image_null}, pixels)
        invert_network = TextNetwork(self, self._complete(told, pixels), null)
        kept: list[float] = []  # the guidance at the end of the inversion: what a callback has set there stays

        def frame_network(part: slice) -> TextNetwork:
            kept[:] = kept or [self._guidance_scale]
            if kept[0] == inversion_guidance_scale:
                self._begin(guidance_scale)
            else:
                self._guidance_scale, self._begun_with = kept[0], math.nan
            return self._of_frames(invert_network, (first, second), mixing.weights, part, prompt_interpolation)

        clean = self._encode(pixels, sample_posterior, generator)
        found = {} if diagnostics else None
        parts = self._make_frames(
            clean,
            (first, second),
            mixing,
            invert_network,
            frame_network,
            generator,
            callback_on_step_end,
            names,
            found,
        )
        count = len(mixing.weights) * len(first)
        images, flagged = self._images(parts, count, output_type, frame_batch_size)
        self.maybe_free_model_hooks()
        return self._output(images, first, second, mixing, found or {}, return_dict, flagged)

    def _complete(self, condition: Condition, pixels: torch.Tensor) -> Condition:
        """Adds what the network is told of the images beside text."""
        return condition


def texts_per_image(name: str, value: Any, count: int, kinds: Any = str) -> list[Any]:
    """Returns one text per image, or one of other `kinds`."""
    texts = [""] * count if value is None else [value] * count if isinstance(value, kinds) else value
    if not isinstance(texts, list) or len(texts) != count or not all(isinstance(text, kinds) for text in texts):
        raise ValueError(f"`{name}` must be one text or {count}, one per image, got {value!r}.")
    return texts
