"""Frames between real images by Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from .condition import Condition
from .text import TextInterpolationPipeline

__all__ = ["StableDiffusionNoiseDiffusionPipeline"]


class StableDiffusionNoiseDiffusionPipeline(TextInterpolationPipeline, StableDiffusionPipeline):
    """Makes frames between two real images, or along a path of them, with Stable Diffusion as it is.

    It is made and loaded like `StableDiffusionPipeline`, from the same repos and components, with LoRA and textual
    inversion; its call interpolates. The scheduler must be a `DDIMScheduler`. For the method see
    `NoiseDiffusionPipeline`.

    Reference:
        Zheng et al., arXiv 2403.08840. The authors' code inverts without and denoises with guidance, one image and
        one branch at a time; here both branches of all frames are one batch.

    Example:
        See `pipelines/noise_diffusion_sd` for one with the weights of the Hub.
    """

    __module__ = "diffusers_ext"

    _callback_tensor_inputs = StableDiffusionPipeline._callback_tensor_inputs

    def _encode_text(
        self,
        prompts: list[str] | None,
        negative_prompt: str | None,
        embeds: Condition,
        guided: bool,
    ) -> tuple[Condition, Condition | None]:
        pooled = [name for name in embeds if "pooled" in name]
        if pooled:
            raise ValueError(f"`{pooled[0]}` must be left out: only Stable Diffusion XL takes them.")
        if self.clip_skip is not None and not hasattr(self.text_encoder, "text_model"):
            raise ValueError(
                f"`clip_skip` must be left out, got {self.clip_skip!r}: this Diffusers looks for the text encoder's "
                "`text_model`, which this Transformers does not have any more."
            )
        device = self._execution_device
        encode: Any = self.encode_prompt
        told, _ = encode(
            prompts,
            device,
            1,
            False,
            prompt_embeds=embeds.get("prompt_embeds"),
            lora_scale=self._text_lora_scale,
            clip_skip=self.clip_skip,
        )
        if not guided:
            return {"encoder_hidden_states": told}, None
        null = embeds.get("negative_prompt_embeds")
        if null is None:
            # Once for all images. As in Diffusers, `clip_skip` does not apply to it.
            _, null = encode(
                None,
                device,
                1,
                True,
                negative_prompt=negative_prompt,
                prompt_embeds=told[:1],
                lora_scale=self._text_lora_scale,
            )
        return {"encoder_hidden_states": told}, {"encoder_hidden_states": null.to(told)}

    def _finish(self, images: torch.Tensor, output_type: str) -> tuple[Any, list[bool] | None]:
        checked, flagged = self.run_safety_checker(images, self._execution_device, self.unet.dtype)
        # The checker blacks out what it flags; that is no longer in [-1, 1].
        denormalize = None if flagged is None else [not found for found in flagged]
        return self.image_processor.postprocess(checked, output_type, denormalize), flagged
