"""Frames between real images by Stable Diffusion XL."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline

from .condition import Condition
from .text import TextInterpolationPipeline

__all__ = ["StableDiffusionXLNoiseDiffusionPipeline"]


class StableDiffusionXLNoiseDiffusionPipeline(TextInterpolationPipeline, StableDiffusionXLPipeline):
    """Makes frames between two real images, or along a path of them, with Stable Diffusion XL as it is.

    It is made and loaded like `StableDiffusionXLPipeline`; its call interpolates, with every prompt for both text
    encoders. The network is told that the images are whole and of the size they have. The scheduler must be a
    `DDIMScheduler`. For the method see `NoiseDiffusionPipeline`.

    Reference:
        Zheng et al., arXiv 2403.08840.

    Example:
        See `pipelines/noise_diffusion_sdxl` for one with the weights of the Hub.
    """

    __module__ = "diffusers_ext"

    _callback_tensor_inputs = StableDiffusionXLPipeline._callback_tensor_inputs
    _callback_names = {
        "prompt_embeds": "encoder_hidden_states",
        "add_text_embeds": "text_embeds",
        "add_time_ids": "time_ids",
    }

    def _encode_text(
        self,
        prompts: list[str] | None,
        negative_prompt: str | None,
        embeds: Condition,
        guided: bool,
    ) -> tuple[Condition, Condition | None]:
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            pooled = name.replace("prompt", "pooled_prompt")
            if (name in embeds) != (pooled in embeds):
                raise ValueError(f"`{name}` and `{pooled}` must be given together or not at all.")
        device = self._execution_device
        encode: Any = self.encode_prompt
        told, _, pooled_told, _ = encode(
            prompts,
            device=device,
            do_classifier_free_guidance=False,
            prompt_embeds=embeds.get("prompt_embeds"),
            pooled_prompt_embeds=embeds.get("pooled_prompt_embeds"),
            lora_scale=self._text_lora_scale,
            clip_skip=self.clip_skip,
        )
        condition = {"encoder_hidden_states": told, "text_embeds": pooled_told}
        if not guided:
            return condition, None
        if "negative_prompt_embeds" in embeds:
            null, pooled_null = embeds["negative_prompt_embeds"], embeds["negative_pooled_prompt_embeds"]
        else:
            _, null, _, pooled_null = encode(
                None,
                device=device,
                do_classifier_free_guidance=True,
                negative_prompt=negative_prompt,
                prompt_embeds=told[:1],
                pooled_prompt_embeds=pooled_told[:1],
                lora_scale=self._text_lora_scale,
            )
        return condition, {"encoder_hidden_states": null.to(told), "text_embeds": pooled_null.to(told)}

    def _complete(self, condition: Condition, pixels: torch.Tensor) -> Condition:
        size = tuple(pixels.shape[2:])
        pooled = condition["text_embeds"]
        ids = self._get_add_time_ids(size, (0, 0), size, pooled.dtype, pooled.shape[-1])
        return {**condition, "time_ids": ids.to(pooled.device).expand(len(pooled), -1)}

    def _finish(self, images: torch.Tensor, output_type: str) -> tuple[Any, list[bool] | None]:
        if self.watermark is not None:
            images = self.watermark.apply_watermark(images)
        return super()._finish(images, output_type)
