"""One More Step in front of any Diffusers pipeline."""

from __future__ import annotations

import inspect
import math
import os
from typing import Any, Literal

import torch
from diffusers import AutoencoderTiny, DiffusionPipeline
from diffusers.configuration_utils import FrozenDict
from diffusers.utils.torch_utils import randn_tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import Self

from diffusers_ext.generation.text import encode, find_encoders
from diffusers_ext.hub.adapters import check_text_encoder_lora
from diffusers_ext.hub.loading import SafePipeline

from . import base as bases
from .published import HUB_OPTIONS, is_published_format, load_published
from .step import start_latents
from .unet import OMSUNet2DConditionModel, OMSUNet2DModel

__all__ = ["OMSPipeline"]

PARTS = ("oms_module", "sd_pipeline", "oms_text_encoder", "oms_tokenizer", "oms_text_encoder_2", "oms_tokenizer_2")
SETTINGS = ("vae_scaling_factor", "vae_id", "image_scale")
# What Diffusers keeps on every pipeline, and so on this one too.
STATE = ("_internal_dict", "_all_hooks", "_offload_device", "_offload_gpu_id", "_progress_bar_config", "hf_device_map")
OWN = {*PARTS, *SETTINGS, *STATE, "quantization_config"}


class OMSPipeline(SafePipeline):
    """Puts the step that the noise schedule forgot in front of a pipeline.

    Schedules leave a trace of the image at their last step, but sampling starts from pure noise; so brightness and
    colour stay near the mean. This pipeline computes the missing step with a small network of its own and hands the
    result to the base pipeline as `latents`. The base is not changed; LoRA, ControlNet and any scheduler of a
    variance-preserving schedule pass through.

    What this pipeline does not have itself is the base's, to read and to set: `pipeline.scheduler = ...`,
    `pipeline.unet`, `pipeline.load_lora_weights(...)`, `pipeline.enable_vae_slicing()`. Where it is moved, offloaded
    or sliced, the base goes with it, and `components` and `config` tell of both, so that `from_pipe` of a stock
    pipeline takes the base out again.

    Args:
        oms_module: network of the step, `OMSUNet2DConditionModel` for text and `OMSUNet2DModel` for pixel models;
            with `None`, calls must say `oms=False`.
        sd_pipeline: the base pipeline of a variance-preserving schedule, with a UNet or a transformer (PixArt,
            Hunyuan-DiT); it starts from noise and takes `latents`, or `class_labels` as DiT.
        oms_text_encoder: text encoder of the module; by default the base's are used.
        oms_tokenizer: its tokenizer.
        oms_text_encoder_2: second encoder, joined to the first as in SDXL.
        oms_tokenizer_2: its tokenizer.
        vae_scaling_factor: scaling factor of the VAE whose latents the module was trained on; checked against the
            base's. `None` leaves it unchecked.
        vae_id: name of that VAE, for the record.
        image_scale: what the images were multiplied by in training, for pixel bases that do so.

    Raises:
        ValueError: base and module do not fit; the message says what would.

    Reference:
        Hu et al., "One More Step: A Versatile Plug-and-Play Module for Rectifying Diffusion Schedule Flaws and
        Enhancing Low-Frequency Controls", arXiv 2311.15744. The authors' code scales the noise of the step by the
        variance instead of its root (`oms_legacy_variance=True`) and gives Euler-like schedulers the image part at the
        wrong scale; we do neither.

    Example:
        >>> import torch
        >>> from diffusers import DDIMScheduler, UNet2DModel
        >>> from diffusers_ext import ImageGenerationPipeline, OMSPipeline, OMSUNet2DModel
        >>> config = dict(
        ...     sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=2,
        ...     down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        ... )
        >>> base = ImageGenerationPipeline(UNet2DModel(**config), DDIMScheduler())
        >>> pipeline = OMSPipeline(OMSUNet2DModel(**config), base)
        >>> for part in (base, pipeline):
        ...     part.set_progress_bar_config(disable=True)
        >>> pipeline(batch_size=2, num_inference_steps=2).images[0].size
        (8, 8)
    """

    __module__ = "diffusers_ext"

    _optional_components = list(PARTS[1:])

    # Diffusers annotates `config` as a dict.
    oms_module: Any
    sd_pipeline: Any

    def __init__(
        self,
        oms_module: OMSUNet2DConditionModel | OMSUNet2DModel | None,
        sd_pipeline: DiffusionPipeline | None = None,
        oms_text_encoder: PreTrainedModel | None = None,
        oms_tokenizer: PreTrainedTokenizerBase | None = None,
        oms_text_encoder_2: PreTrainedModel | None = None,
        oms_tokenizer_2: PreTrainedTokenizerBase | None = None,
        vae_scaling_factor: float | None = None,
        vae_id: str | None = None,
        image_scale: float | None = None,
    ) -> None:
        super().__init__()
        super().set_progress_bar_config(desc="one more step")
        self.register_to_config(vae_scaling_factor=vae_scaling_factor, vae_id=vae_id, image_scale=image_scale)
        if sd_pipeline is not None:
            self._check_base(oms_module, sd_pipeline)
        self.register_modules(
            oms_module=oms_module,
            sd_pipeline=sd_pipeline,
            oms_text_encoder=oms_text_encoder,
            oms_tokenizer=oms_tokenizer,
            oms_text_encoder_2=oms_text_encoder_2,
            oms_tokenizer_2=oms_tokenizer_2,
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        base: DiffusionPipeline | None = None,
        **kwargs: Any,
    ) -> Self:
        """Loads a module and puts it in front of `base`, or a whole pipeline where the repo holds its base too.

        Args:
            pretrained_model_name_or_path: Hub repo or folder, of this package or in the format of the published
                modules (`h1t/oms_b_openclip_15_21`, `h1t/oms_b_openclip_xl`, `h1t/oms_l_mixclip_xl`).
            base: the base pipeline.
            **kwargs: as for `DiffusionPipeline.from_pretrained`; components given by name are not loaded, and
                `oms_text_encoder=None` takes the base's text encoder.

        Raises:
            OSError: weights are missing, or not safetensors.
            ValueError: module and base do not fit.
        """
        repo = str(pretrained_model_name_or_path)
        index: Any = cls.load_config(repo, **{name: kwargs[name] for name in HUB_OPTIONS if name in kwargs})
        if is_published_format(index):
            modules, settings = cls._get_signature_keys(cls)
            given = {name: kwargs.pop(name) for name in modules if name in kwargs}
            recorded = {name: kwargs.pop(name) for name in settings if name in kwargs}
            base = given.pop("sd_pipeline", base)
            return cls(sd_pipeline=base, **load_published(repo, index, given, **kwargs), **recorded)
        if base is not None:
            kwargs["sd_pipeline"] = base
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def __getattr__(self, name: str) -> Any:
        base = None if name in OWN else self.__dict__.get("sd_pipeline")
        return super().__getattr__(name) if base is None else getattr(base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        base = self.__dict__.get("sd_pipeline")
        own = name in OWN or name in self.__dict__ or hasattr(type(self), name)
        if own or base is None or not hasattr(base, name):
            super().__setattr__(name, value)
        else:
            setattr(base, name, value)

    @property
    def components(self) -> dict[str, Any]:
        """The parts of the added step, and those of the base pipeline."""
        own = {name: getattr(self, name) for name in PARTS}
        return {**getattr(self.sd_pipeline, "components", {}), **own}

    @property
    def config(self) -> Any:
        """The settings of the added step, and those of the base pipeline where it leaves them open."""
        own, base = super().config, self.__dict__.get("sd_pipeline")
        if base is None:
            return own
        parts = base.components
        settings = {k: v for k, v in base.config.items() if k not in parts and not k.startswith("_")}
        return FrozenDict({**settings, **{k: v for k, v in own.items() if v is not None or k not in settings}})

    @classmethod
    def _check_timesteps(cls, config: Any, name: str) -> None:
        """Takes every network: the base keeps to its timesteps."""

    def _check_base(self, oms_module: Any, base: Any) -> None:
        """Raises `ValueError` unless the base takes latents of the module's space."""
        if isinstance(base, OMSPipeline):
            raise ValueError("`sd_pipeline` must be a pipeline without the added step, got OMSPipeline.")
        bases.check_base(base)
        if oms_module is None:
            return
        config = getattr(oms_module, "config", None)
        if not hasattr(config, "in_channels"):
            raise ValueError(
                "`oms_module` must be an OMSUNet2DConditionModel, an OMSUNet2DModel or left out, got "
                f"{type(oms_module).__name__}."
            )
        channels, wanted = bases.network(base).config.in_channels, oms_module.config.in_channels
        if channels != wanted:
            raise ValueError(f"`sd_pipeline` must have latents of {wanted} channels as the module, got {channels}.")
        vae = getattr(base, "vae", None)
        factor = None if vae is None else vae.config.scaling_factor
        trained, vae_id = self.config["vae_scaling_factor"], self.config["vae_id"]
        # Tiny autoencoders decode the scaled latents of another VAE; their own factor says nothing.
        if trained not in (None, factor) and not isinstance(vae, AutoencoderTiny):
            raise ValueError(
                f"`sd_pipeline` must have a VAE with the scaling factor {trained} that the module was trained on"
                f"{f' ({vae_id})' if vae_id else ''}, got {factor}."
            )
        scale = base.config.get("image_scale", 1.0)
        if self.config["image_scale"] not in (None, scale):
            raise ValueError(
                f"`sd_pipeline` must have the `image_scale` {self.config['image_scale']} of the module, got {scale}."
            )

    def check_inputs(self, guidance_scale: float, step: str, text: dict[str, Any], labels: Any) -> None:
        """Checks the arguments of a call that are the added step's own.

        Raises:
            ValueError: an argument is wrong or contradicts another; the message names it.
        """
        if not (isinstance(guidance_scale, int | float) and 0 <= guidance_scale < math.inf):
            raise ValueError(f"`oms_guidance_scale` must be a number >= 0, got {guidance_scale!r}.")
        if step not in ("ddpm", "ddim"):
            raise ValueError(f"`oms_step` must be 'ddpm' or 'ddim', got {step!r}.")
        given = [name for name, value in text.items() if value is not None]
        for name in given:
            if name.endswith("_embeds"):
                good, accepted = isinstance(text[name], torch.Tensor), "a tensor (prompts, tokens, width)"
            else:
                good, accepted = bases.is_text(text[name]), "a text or a list of texts"
            if not good:
                raise ValueError(f"`{name}` must be {accepted}, got {text[name]!r}.")
        if self._takes_text:
            if labels is not None:
                raise ValueError("`oms_class_labels` must be left out: the module takes text.")
            for name in ("oms_prompt", "oms_negative_prompt"):
                if name in given and f"{name}_embeds" in given:
                    raise ValueError(f"`{name}` must be left out where `{name}_embeds` is given.")
        elif given:
            raise ValueError(f"`{given[0]}` must be left out: the module takes no text.")

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        oms_prompt: str | list[str] | None = None,
        oms_negative_prompt: str | list[str] | None = None,
        oms_guidance_scale: float = 1.0,
        oms_prompt_embeds: torch.Tensor | None = None,
        oms_negative_prompt_embeds: torch.Tensor | None = None,
        oms_class_labels: int | list[int] | torch.Tensor | None = None,
        oms_step: Literal["ddpm", "ddim"] = "ddpm",
        oms_legacy_variance: bool = False,
        oms: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Computes the first step, then calls the base pipeline.

        Random numbers are drawn in the order: pure noise, the noise of the step, then the base's own.

        Args:
            prompt: what the base pipeline draws.
            oms_prompt: what the added step is told, which moves brightness, colour and layout; by default `prompt`.
            oms_negative_prompt: what its guidance leads away from, by default the empty text.
            oms_guidance_scale: its guidance, 1 turns that off.
            oms_prompt_embeds: `(prompts, tokens, cross_attention_dim)` instead of `oms_prompt`.
            oms_negative_prompt_embeds: the same instead of `oms_negative_prompt`.
            oms_class_labels: for modules with classes; by default the `class_labels` of the base.
            oms_step: `"ddpm"` adds fresh noise, `"ddim"` goes on from the first.
            oms_legacy_variance: scale that noise as the authors' code does.
            oms: `False` calls the base pipeline alone.
            generator: one generator, or one per image.
            **kwargs: everything else goes to the base pipeline as it is; `latents` are the pure noise.

        Returns:
            What the base pipeline returns.

        Raises:
            ValueError: an argument is wrong, contradicts another, or is unknown to the base.
        """
        passed = {**kwargs, "generator": generator}
        if prompt is not None:
            passed["prompt"] = prompt
        base = self.sd_pipeline
        if base is None:
            raise ValueError(
                "`sd_pipeline` must be given: load with `OMSPipeline.from_pretrained(repo, base=pipeline)`."
            )
        arguments = bases.bind(base, passed, inspect.signature(self.__call__).parameters)
        if not oms:
            return self._call_base(passed)
        if self.oms_module is None:
            raise ValueError("`oms` must be False: the pipeline was made without `oms_module`.")
        self._check_base(self.oms_module, base)  # again, for its scheduler may have been exchanged
        text = {
            "oms_prompt": oms_prompt,
            "oms_negative_prompt": oms_negative_prompt,
            "oms_prompt_embeds": oms_prompt_embeds,
            "oms_negative_prompt_embeds": oms_negative_prompt_embeds,
        }
        self.check_inputs(oms_guidance_scale, oms_step, text, oms_class_labels)
        count, per_prompt = bases.batch_size(arguments)
        shape = bases.latent_shape(base, arguments, count * per_prompt)
        guided = oms_guidance_scale != 1.0
        # Asked once: Diffusers walks through all networks for each of these.
        device, dtype, own = (
            base._execution_device,
            bases.network(base).dtype,
            (self._execution_device, self.oms_module.dtype),
        )
        if self._takes_text:
            text["oms_prompt"] = prompt if oms_prompt is None else oms_prompt
            text["oms_negative_prompt"] = oms_negative_prompt or ""
            condition = {"encoder_hidden_states": self._text(text, count, per_prompt, guided, own)}
        else:
            labels = arguments.get("class_labels") if oms_class_labels is None else oms_class_labels
            condition = {"class_labels": self._labels(labels, shape[0], guided, own[0])}
        level = bases.first_level(base, arguments)

        def draw() -> torch.Tensor:
            return randn_tensor(shape, generator=generator, device=device, dtype=dtype)

        noise = arguments.get("latents")
        noise = draw() if noise is None else noise.to(device)
        with self.progress_bar(total=1) as progress_bar:  # pyright: ignore[reportCallIssue]
            x0_hat = -self._predict(noise.to(*own), condition, oms_guidance_scale).to(device)
            fresh = draw() if oms_step == "ddpm" else noise
            start = start_latents(x0_hat, fresh, level, oms_legacy_variance)
            progress_bar.update()
        self.maybe_free_model_hooks()
        return self._call_base(passed, start)

    def _call_base(self, passed: dict[str, Any], start: torch.Tensor | None = None) -> Any:
        output = self.sd_pipeline(**passed) if start is None else bases.call_from(self.sd_pipeline, start, passed)
        self.maybe_free_model_hooks()
        return output

    @property
    def _takes_text(self) -> bool:
        network = getattr(self.oms_module, "_orig_mod", self.oms_module)  # `torch.compile` wraps it
        return isinstance(network, OMSUNet2DConditionModel)

    def _predict(self, sample: torch.Tensor, condition: dict[str, Any], guidance_scale: float) -> torch.Tensor:
        """Returns the v-prediction at pure noise; with guidance both branches run as one batch."""
        if guidance_scale == 1.0:
            return self.oms_module(sample, **condition, return_dict=False)[0]
        both = self.oms_module(torch.cat([sample, sample]), **condition, return_dict=False)[0]
        null, conditional = both.float().chunk(2)
        return null + guidance_scale * (conditional - null)

    def _text(
        self, text: dict[str, Any], count: int, per_prompt: int, guided: bool, own: tuple[torch.device, torch.dtype]
    ) -> torch.Tensor:
        """Returns the text of every image, that of the null branch first where there is guidance."""
        width, found = self.oms_module.config.cross_attention_dim, []
        for name in ["oms_negative_prompt", "oms_prompt"] if guided else ["oms_prompt"]:
            words, embeds = text[name], text[f"{name}_embeds"]
            if embeds is None and words is None:
                raise ValueError(f"`{name}` or `{name}_embeds` must be given where the base gets `prompt_embeds`.")
            if embeds is None:
                words = [words] * count if isinstance(words, str) else list(words)
                if len(words) != count:
                    raise ValueError(f"`{name}` must be one text or {count}, as many as prompts, got {len(words)}.")
                embeds = self._encode(words)
            elif embeds.ndim != 3 or len(embeds) not in (1, count) or embeds.shape[2] != width:
                raise ValueError(
                    f"`{name}_embeds` must have the shape ({count}, tokens, {width}), got {tuple(embeds.shape)}."
                )
            embeds = embeds.to(*own)
            found.append(embeds.expand(count, -1, -1).repeat_interleave(per_prompt, dim=0))
        lengths = [embeds.shape[1] for embeds in found]
        if len(set(lengths)) > 1:
            raise ValueError(f"`oms_negative_prompt_embeds` must have {lengths[1]} tokens, got {lengths[0]}.")
        return torch.cat(found)

    def _encode(self, texts: list[str]) -> torch.Tensor:
        own = [(self.oms_tokenizer, self.oms_text_encoder), (self.oms_tokenizer_2, self.oms_text_encoder_2)]
        own = [(tokenizer, encoder) for tokenizer, encoder in own if encoder is not None]
        encoders = find_encoders(own, self.sd_pipeline, self.oms_module.config.cross_attention_dim)
        return encode(texts, encoders, (self if own else self.sd_pipeline)._execution_device)

    def _labels(self, labels: Any, count: int, guided: bool, device: torch.device) -> torch.Tensor | None:
        """Returns the label of every image, the null label first where there is guidance."""
        classes = self.oms_module.config.num_class_embeds
        if classes is None:
            if guided:
                raise ValueError("`oms_guidance_scale` must be 1 for a module without classes or text.")
            return None
        if labels is None:
            raise ValueError("`oms_class_labels` must be given: the module has classes.")
        labels = torch.as_tensor([labels] if isinstance(labels, int) else labels, device=device)
        if labels.ndim != 1 or len(labels) not in (1, count) or not 0 <= labels.min() <= labels.max() < classes:
            raise ValueError(
                f"`oms_class_labels` must be 1 or {count} labels in 0..{classes - 1}, got {labels.tolist()}."
            )
        labels = labels.expand(count)
        if not guided:
            return labels
        base = self.sd_pipeline
        null = bases.classes(bases.network(base).config, base.config.get("null_class_label"))[1]
        if null is None:
            raise ValueError("`oms_guidance_scale` must be 1 for a base without a null label.")
        return torch.cat([torch.full_like(labels, null), labels])

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Moves the module and the base pipeline, as `DiffusionPipeline.to` does."""
        if self.sd_pipeline is not None:
            self.sd_pipeline.to(*args, **kwargs)
        return super().to(*args, **kwargs)

    @property
    def model_cpu_offload_seq(self) -> str:  # type: ignore[override]
        """The order in which the parts are called: those of the step, then the base's."""
        of_base = getattr(self.sd_pipeline, "model_cpu_offload_seq", None)
        return "oms_text_encoder->oms_text_encoder_2->oms_module" + (f"->{of_base}" if of_base else "")

    @property
    def _exclude_from_cpu_offload(self) -> list[str]:  # type: ignore[override]
        return getattr(self.sd_pipeline, "_exclude_from_cpu_offload", [])

    def load_lora_weights(self, pretrained_model_name_or_path_or_dict: Any, *args: Any, **kwargs: Any) -> None:
        """Loads LoRA weights into the base pipeline, as its own method does.

        Raises:
            ValueError: some are a text encoder's, and the installed peft is too old for them.
        """
        check_text_encoder_lora(self.sd_pipeline, pretrained_model_name_or_path_or_dict, **kwargs)
        self.sd_pipeline.load_lora_weights(pretrained_model_name_or_path_or_dict, *args, **kwargs)

    def remove_all_hooks(self) -> None:
        """Removes the hooks of offloading from the module and the base pipeline."""
        super().remove_all_hooks()
        if self.sd_pipeline is not None:
            self.sd_pipeline.remove_all_hooks()

    def set_attention_slice(self, slice_size: Any) -> None:
        """Slices the attention of the module and of the base pipeline, as `enable_attention_slicing` does."""
        super().set_attention_slice(slice_size)
        if self.sd_pipeline is not None:
            self.sd_pipeline.set_attention_slice(slice_size)

    def set_use_memory_efficient_attention_xformers(self, valid: bool, attention_op: Any = None) -> None:
        """Sets the attention of the module and of the base pipeline."""
        super().set_use_memory_efficient_attention_xformers(valid, attention_op)
        if self.sd_pipeline is not None:
            self.sd_pipeline.set_use_memory_efficient_attention_xformers(valid, attention_op)

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Configures the bar of the added step, and that of the base pipeline."""
        super().set_progress_bar_config(**{"desc": "one more step", **kwargs})
        if self.sd_pipeline is not None:
            self.sd_pipeline.set_progress_bar_config(**kwargs)
