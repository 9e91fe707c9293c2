"""How DomainStudio handles Stable Diffusion: two prompts, and a LoRA or the whole network to train."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel

from diffusers_ext.generation.text import encode
from diffusers_ext.training.pretrained import check_schedule, converted, loaded
from diffusers_ext.training.recipe import Context, Modules

__all__ = ["TextModel"]

LORA_TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]


class TextModel:
    """A Stable Diffusion pipeline; the source is a frozen copy of its UNet, or the UNet with its LoRA turned off.

    Args:
        name: Hub repo or folder.
        prompts: the prompts of the images to adapt to (`instance`) and of their class (`class`).
        rank: rank of the LoRA layers; `None` trains the whole UNet.

    Attributes:
        pipe: the pipeline.

    See `UnconditionalModel` for the other attributes.

    Raises:
        ValueError: it cannot be loaded or is no Stable Diffusion with one text encoder, or peft is missing.
    """

    image_scale, learned_variance = 1.0, False

    def __init__(self, name: str, prompts: dict[str, str], rank: int | None) -> None:
        self.pipe: Any = loaded("pretrained_model_name_or_path", DiffusionPipeline, name)
        components = self.pipe.components
        unet, encoder = components.get("unet"), components.get("text_encoder")
        plain = type(self.pipe) is StableDiffusionPipeline and isinstance(unet, UNet2DConditionModel)
        unused = ("addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim_type")
        if not plain or any(unet.config[name] for name in unused) or encoder is None or components["vae"] is None:
            raise ValueError(
                "`pretrained_model_name_or_path` must be a StableDiffusionPipeline with one text encoder, whose "
                f"network takes nothing else, got {name!r}, a {type(self.pipe).__name__}."
            )
        self.unet, self.vae, self.rank, self.prompts = unet, self.pipe.vae, rank, prompts
        if unet.config["out_channels"] != unet.config["in_channels"]:
            raise ValueError(
                "`pretrained_model_name_or_path` must be a model that takes noisy latents and nothing else and does "
                f"not learn its variance, got {name!r} with {unet.config['in_channels']} input and "
                f"{unet.config['out_channels']} output channels."
            )
        self.scheduler = self.pipe.scheduler
        check_schedule(self.scheduler, name, flow=False)
        self.training_scheduler: Any = converted(DDPMScheduler, self.scheduler)
        self.frozen: dict[str, Any] = {"vae": self.vae, "text_encoder": encoder}
        self._text: dict[str, torch.Tensor] = {}
        if rank is not None:
            self._add_lora(rank)

    def _add_lora(self, rank: int) -> None:
        from peft import LoraConfig

        self.unet.requires_grad_(False)
        self.unet.add_adapter(
            LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=LORA_TARGETS)
        )

    def add_source(self) -> None:
        """Keeps a copy of the network as it is now; with LoRA none is needed."""
        if self.rank is None:
            self.frozen["source"] = copy.deepcopy(self.unet)

    def condition(self, who: Literal["instance", "class"], count: int) -> dict[str, Any]:
        """Returns the embedding of a prompt, `count` times, as the network's argument."""
        if who not in self._text:
            encoders = [(self.pipe.tokenizer, self.pipe.text_encoder)]
            self._text[who] = encode([self.prompts[who]], encoders, self.pipe.text_encoder.device)
        return {"encoder_hidden_states": self._text[who].expand(count, -1, -1)}

    def source(self, ctx: Context[Any], noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Returns the source's prediction for the prompt of the class, without gradient."""
        text = self.condition("class", len(noisy))["encoder_hidden_states"]
        lora = self.rank is not None
        unet: Any = ctx.accelerator.unwrap_model(ctx.model) if lora else ctx.modules.frozen["source"]
        was_training = unet.training
        if lora:
            unet.eval().disable_adapters()
        with torch.no_grad():
            prediction = unet(noisy.to(unet.dtype), t, encoder_hidden_states=text.to(unet.dtype), return_dict=False)[0]
        if lora:
            unet.enable_adapters()
            unet.train(was_training)
        return prediction.float()

    def pipeline(self, modules: Modules) -> DiffusionPipeline:
        """Returns the pipeline with the adapted network."""
        self.pipe.register_modules(unet=modules.trainable)
        return self.pipe
