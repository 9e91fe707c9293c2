r"""Training a One More Step module: the conditional mean image, learned as the v-prediction at pure noise.

At \(\bar\alpha_S = 0\) the v-target \(\sqrt{\bar\alpha_S} n - \sqrt{1 - \bar\alpha_S} x_0\) is \(-x_0\), so the loss
is \(\lVert \psi(n, c) + x_0 \rVert^2\) with noise that has nothing to do with \(x_0\); its minimiser is
\(-E[x_0 | c]\).
Of the base pipeline only the VAE, the text encoders and the scheduler are loaded, never its network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from diffusers_ext.data.precomputed import PrecomputedDataset
from diffusers_ext.generation.latents import decoded, latent_factor, latent_moments, scaled_latents
from diffusers_ext.generation.text import Encoders, encode, find_encoders
from diffusers_ext.hub.card import RepoCard
from diffusers_ext.hub.loading import checked_folder
from diffusers_ext.training.config import described, require
from diffusers_ext.training.images import ImageConfig, image_dataset
from diffusers_ext.training.networks import make_network
from diffusers_ext.training.recipe import Context, Modules, Recipe, Sample, StepOutput

from .base import classes
from .pipeline import OMSPipeline
from .step import check_scheduler
from .unet import OMSUNet2DConditionModel, OMSUNet2DModel

__all__ = ["OMSConfig", "OMSRecipe"]

SNIPPET = """import diffusers_ext  # pip install diffusers-ext
from diffusers import DiffusionPipeline
from diffusers_ext import OMSPipeline

base = DiffusionPipeline.from_pretrained("{base}")
pipeline = OMSPipeline.from_pretrained("{repo_id}", base=base)
image = pipeline({call}).images[0]
image.save("sample.png")"""

# The layout of the published base modules, and a small one for pixels.
TEXT_MODULE = {
    "block_out_channels": (160, 320, 640),
    "attention_head_dim": (5, 10, 20),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
PIXEL_MODULE = {
    "block_out_channels": (16, 32, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D",) * 3,
    "up_block_types": ("UpBlock2D",) * 3,
}


@dataclass
class OMSConfig(ImageConfig):
    """Arguments of One More Step beside those of the data and the engine.

    Raises:
        ValueError: an argument is outside its range, or two contradict each other.
    """

    pretrained_model_name_or_path: str | None = described(
        "Base pipeline, a Hub repo or a folder. Its network is not read.", group="model"
    )
    module_config: str | None = described(
        "JSON file of the module's arguments, or the name of a shipped one; by default the published layout.",
        group="model",
    )
    caption_column: str = described("Column of captions, for a base with text.", "text", "data")
    condition_dropout: float = described("Probability of training without text or label, for guidance.", 0.1)
    precompute: bool = described(
        "Compute latents and text once, into the output folder, instead of at every step.", False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pretrained_model_name_or_path is None:
            raise ValueError(
                "`pretrained_model_name_or_path` must be given: the base pipeline, a Hub repo or a folder."
            )
        require(0 <= self.condition_dropout < 1, "condition_dropout", self.condition_dropout, "a number in [0, 1)")
        if self.precompute and (self.streaming or self.random_flip or not self.center_crop):
            raise ValueError(
                "`precompute` must be False with `streaming`, with `random_flip` and without `center_crop`: each "
                "image is computed once."
            )


class OMSRecipe(Recipe[OMSConfig]):
    """One More Step (arXiv 2311.15744): trains the module for a base pipeline, which stays as it is.

    Attributes:
        base: the base pipeline without its network.

    Example:
        >>> from diffusers_ext import OMSConfig, OMSRecipe, Trainer
        >>> config = OMSConfig(
        ...     pretrained_model_name_or_path="my/base", train_data_dir="photos", max_train_steps=1000
        ... )
        >>> Trainer(config, OMSRecipe(config)).train()  # doctest: +SKIP
    """

    Config = OMSConfig
    size_advice = "--module_config chooses another module"
    base: Any
    encoders: Encoders

    # -- data and modules ------------------------------------------------------------------------------------------

    def dataset(self, ctx: Context[OMSConfig]) -> Any:
        """Loads the images, with captions or labels as the base wants them."""
        config = self.config
        self._load_base()
        self.data = image_dataset(
            config, ctx.accelerator.is_main_process, config.caption_column if self.text_width else None
        )
        if self.classes and not self.data.num_classes:
            raise ValueError(
                f"`label_column` must name a column of class labels for this base, got {config.label_column!r}; the "
                f"data has {self.data.column_names}."
            )
        usable = (self.classes or 0) - (self.null_class_label is not None)
        if self.classes and self.data.num_classes > usable:
            raise ValueError(
                f"`label_column` must name a column of at most {usable} classes, as this base knows, got "
                f"{config.label_column!r} with {self.data.num_classes}."
            )
        if not config.precompute:
            return self.data
        names = ("pretrained_model_name_or_path", "resolution", "channels", "max_train_samples", "caption_column")
        identity = {name: getattr(config, name) for name in (*names, "dataset_name", "train_data_dir", "image_column")}
        self.precomputed = PrecomputedDataset(self.data, config.output_dir, identity)
        return self.precomputed

    def _load_base(self) -> None:
        """Loads all of the base but its network, of which only the configuration is read."""
        name = self.config.pretrained_model_name_or_path
        try:
            index: Any = DiffusionPipeline.load_config(str(name))
            kept = ("scheduler", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
            left_out = {k: None for k, v in index.items() if isinstance(v, list) and k not in (*kept, "_class_name")}
            folder = checked_folder(DiffusionPipeline, str(name), **left_out)
            self.base = DiffusionPipeline.from_pretrained(folder, use_safetensors=True, **left_out)
            part = "unet" if "unet" in index else "transformer"
            network: Any = UNet2DConditionModel.load_config(str(name), subfolder=part)
        except Exception as error:  # the libraries raise many kinds
            raise ValueError(
                "`pretrained_model_name_or_path` must be a Hub repo or a folder with a pipeline that has a `unet` or "
                f"a `transformer`, got {name!r}: {error}"
            ) from error
        check_scheduler(self.base.scheduler)
        self.latent_channels = network["in_channels"]
        # Transformers bring text to a width of their own; the module takes it as the encoder gives it.
        encoder = getattr(self.base, "text_encoder", None)
        of_encoder = None if encoder is None else encoder.config.hidden_size
        self.text_width = network.get("cross_attention_dim") if part == "unet" else of_encoder
        labels = classes(network, self.base.config.get("null_class_label"))
        self.classes, self.null_class_label = labels if self.text_width is None else (None, None)
        self.vae = getattr(self.base, "vae", None)
        self.image_scale = self.base.config.get("image_scale", 1.0)
        self.encoders = find_encoders([], self.base, self.text_width) if self.text_width else []

    def setup(self, ctx: Context[OMSConfig]) -> Modules:
        """Makes the module, for the space and the conditions of the base."""
        config, factor = self.config, latent_factor(self.vae)
        require(config.resolution % factor == 0, "resolution", config.resolution, f"a multiple of {factor}")
        channels = self.latent_channels if self.vae is None else self.vae.config.in_channels
        require(config.channels == channels, "channels", config.channels, f"{channels}, as the base takes")
        module = self._new_module(config.resolution // factor)
        frozen = {} if self.vae is None else {"vae": self.vae}
        frozen |= {f"text_encoder_{i}": encoder for i, (_, encoder) in enumerate(self.encoders)}
        if config.precompute:
            for part in frozen.values():
                part.requires_grad_(False).eval().to(ctx.accelerator.device, ctx.weight_dtype)
            self.precomputed.compute(lambda items: self._moments(items, ctx), ctx.accelerator, config.train_batch_size)
            if self.text_width:
                self.null_text = encode([""], self.encoders, ctx.accelerator.device)
            for encoder in [encoder for _, encoder in self.encoders]:
                encoder.to("cpu")
            frozen = {} if self.vae is None else {"vae": self.vae}
        return Modules(module, self.base.scheduler, frozen)

    def _new_module(self, size: int) -> Any:
        channels, kind, default = self.latent_channels, OMSUNet2DModel, PIXEL_MODULE
        fixed = {"in_channels": channels, "out_channels": channels, "sample_size": size}
        if self.text_width:
            kind, default = OMSUNet2DConditionModel, TEXT_MODULE
            fixed["cross_attention_dim"] = self.text_width
        elif self.classes:
            fixed["num_class_embeds"] = self.classes
        return make_network(kind, "module_config", self.config.module_config, fixed, default)

    # -- training --------------------------------------------------------------------------------------------------

    def _moments(self, items: list[dict[str, Any]], ctx: Context[OMSConfig]) -> dict[str, torch.Tensor]:
        """Computes what training needs of some images: the posterior of their latents (or pixels), text, labels."""
        pixels = torch.stack([item["pixel_values"] for item in items]).to(ctx.accelerator.device)
        found = {"pixel_values": pixels}
        if self.vae is not None:
            mean, std = latent_moments(self.vae, pixels, ctx.weight_dtype)
            found = {"latent_mean": mean, "latent_std": std}
        if self.text_width:
            found["text"] = encode([item["caption"] for item in items], self.encoders, ctx.accelerator.device)
        if self.classes:
            found["label"] = torch.tensor([item["label"] for item in items])
        return found

    def encode(self, batch: dict[str, Any], ctx: Context[OMSConfig]) -> Sample:
        """Brings a batch into the base's space and drops some of its conditions.

        Args:
            batch: `pixel_values` `(batch, channels, height, width)` in `[-1, 1]` with `caption` or `label`, or what
                was precomputed of them.
            ctx: the run.
        """
        if self.vae is None:
            x0 = batch["pixel_values"] * self.image_scale
        else:
            if "latent_mean" in batch:
                mean, std = batch["latent_mean"], batch["latent_std"]
            else:
                mean, std = latent_moments(self.vae, batch["pixel_values"], ctx.weight_dtype)
            x0 = scaled_latents(self.vae, mean + std * ctx.rng.randn_like(mean, ctx.ids, stream="latents"))
        drop = ctx.rng.rand(len(x0), ctx.ids, stream="labels", device=x0.device) < self.config.condition_dropout
        if self.text_width:
            if "text" in batch:
                text = torch.where(drop[:, None, None], self.null_text.to(batch["text"]), batch["text"])
            else:
                kept = ["" if d else c for c, d in zip(batch["caption"], drop.tolist(), strict=True)]
                text = encode(kept, self.encoders, x0.device)
            return Sample(x0, {"encoder_hidden_states": text.float()})
        if not self.classes:
            return Sample(x0)
        labels = batch["label"]
        given = labels if self.null_class_label is None else torch.where(drop, self.null_class_label, labels)
        return Sample(x0, {"class_labels": given}, labels)

    def training_step(self, batch: dict[str, Any], ctx: Context[OMSConfig]) -> StepOutput:
        """Compares the prediction at pure noise with minus the image."""
        with torch.no_grad():
            sample = self.encode(batch, ctx)
            noise = ctx.rng.randn_like(sample.x0, ctx.ids)
        prediction = ctx.model(noise, **sample.cond, return_dict=False)[0]
        return StepOutput(F.mse_loss(prediction.float(), -sample.x0.float()))

    # -- results ---------------------------------------------------------------------------------------------------

    def pipeline(self, modules: Modules) -> OMSPipeline:
        """Returns the module as an `OMSPipeline` without its base, which stays a repo of its own."""
        scaling = None if self.vae is None else self.vae.config.scaling_factor
        return OMSPipeline(
            modules.trainable,  # type: ignore[arg-type]
            vae_scaling_factor=scaling,
            vae_id=None if self.vae is None else self.config.pretrained_model_name_or_path,
            image_scale=self.image_scale if self.vae is None else None,
        )

    @torch.no_grad()
    def validate(self, pipeline: DiffusionPipeline, generator: torch.Generator) -> list[Image.Image]:
        """Draws the mean images that the module has learned, of the first images' captions or of the classes."""
        module: Any = pipeline.oms_module  # type: ignore[attr-defined]
        device, n = module.device, self.config.num_validation_images
        size = module.config.sample_size
        noise = torch.randn((n, module.config.in_channels, size, size), generator=generator).to(device)
        condition: dict[str, Any] = {}
        if self.classes:
            condition["class_labels"] = torch.arange(n, device=device) % self.data.num_classes
        if self.text_width:
            captions = [""] * n if self.config.streaming else [self.data.get(i)["caption"] for i in range(n)]
            for _, encoder in self.encoders:
                encoder.to(device)
            condition["encoder_hidden_states"] = encode(captions, self.encoders, device).to(module.dtype)
        images = -module(noise.to(module.dtype), **condition, return_dict=False)[0].float()
        images = images / self.image_scale if self.vae is None else decoded(self.vae, images).float()
        return VaeImageProcessor(vae_scale_factor=1).postprocess(images, output_type="pil")  # type: ignore[return-value]

    def card(self) -> RepoCard:
        """Returns the card of the module."""
        name = str(self.config.pretrained_model_name_or_path)
        call = 'prompt="a photo"' if self.text_width else "class_labels=[0]" if self.classes else ""
        return RepoCard(
            method="One More Step",
            description="Maps pure noise to the noise level at which the schedule of its base pipeline really begins, "
            "so that brightness and colour of the samples are no longer tied to the mean.",
            data=self.data.description,
            tags=["diffusers-ext", "one-more-step"],
            base_model=name,
            paper="https://arxiv.org/abs/2311.15744",
            snippet=SNIPPET.replace("{base}", name).replace("{call}", call),
            notes=["The picture shows the mean images that the module has learned, not samples."],
        )
