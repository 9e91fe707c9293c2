"""Adapting a pretrained model to a domain of about ten images without losing its diversity."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image

from diffusers_ext.data.sources import load_images
from diffusers_ext.generation.latents import decoded, latent_factor, latent_moments, scaled_latents
from diffusers_ext.hub.card import RepoCard
from diffusers_ext.hub.repo import save_lora_repo
from diffusers_ext.training.adapters import require_peft
from diffusers_ext.training.config import described, require
from diffusers_ext.training.images import ImageConfig, image_dataset
from diffusers_ext.training.objectives import EpsX0V, FlowMatching
from diffusers_ext.training.pretrained import check_image_size, check_inference_steps
from diffusers_ext.training.prior import PairedDataset, class_images
from diffusers_ext.training.recipe import Context, Modules, Recipe, StepOutput
from diffusers_ext.training.timesteps import UniformTimesteps

from .losses import DomainStudioLoss
from .text import TextModel
from .unconditional import UnconditionalModel
from .variance import LearnedVariance

__all__ = ["DomainStudioConfig", "DomainStudioRecipe"]

SNIPPET = """from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{base}")
pipeline.load_lora_weights("{repo_id}")
image = pipeline("{prompt}").images[0]
image.save("sample.png")"""


@dataclass
class DomainStudioConfig(ImageConfig):
    """Arguments of DomainStudio beside those of the data and the engine; prompts make it text-to-image.

    Raises:
        ValueError: an argument is outside its range, or two contradict each other.
    """

    pretrained_model_name_or_path: str | None = described("Source model, a Hub repo or a folder.", group="model")
    pair_weight: float | None = described("Weight of the pair loss; by default 4, with text 100.")
    hf_pair_weight: float | None = described("Weight of the pair loss on high frequencies; 4, with text 100.")
    hf_mse_weight: float | None = described("Weight of the squared error of high frequencies; 1, with text 0.1.")
    hf_mse_weighting: Literal["snr", "x0"] = described(
        "'snr' weights that error with min(SNR, 1); 'x0' lets the noisiest timesteps rule, as the authors did.", "snr"
    )
    max_pair_timestep: int | None = described("Leave noisier images out of the pair losses.")
    similarity_space: Literal["pixel", "latent"] = described("Where images of a latent model are compared.", "pixel")
    instance_prompt: str | None = described("Prompt of the images to adapt to; makes it text-to-image.")
    class_prompt: str | None = described("Prompt of their class, which the source is asked with.")
    class_data_dir: str | None = described(
        "Folder of images of the class; what is missing is generated.", group="data"
    )
    num_class_images: int = described("How many of them there must be.", 200)
    prior_loss_weight: float = described("Weight of the loss on images of the class; 0 needs none.", 1.0)
    source: Literal["frozen", "self"] = described(
        "'self' compares with the adapted model's own images of the class, as the authors did, gradient and all: the "
        "anchor drifts.",
        "frozen",
    )
    use_lora: bool = described("Train LoRA layers by peft instead of the whole UNet; needs no copy of it.", False)
    rank: int = described("Rank of the LoRA layers.", 4)
    validation_prompt: str | None = described("Prompt of validation pictures; by default the instance prompt.")
    validation_inference_steps: int = described("Sampling steps of validation pictures.", 50)
    train_batch_size: int = described("Images compared with each other, at least 3.", 8)
    learning_rate: float = described("Peak learning rate; 5e-6 suits a whole Stable Diffusion.", 1e-4)
    adam_weight_decay: float = described("Weight decay; 1e-2 is usual with text.", 0.0)
    ema_decay: float = described("Largest decay of the average.", 0.999)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pretrained_model_name_or_path is None:
            raise ValueError("`pretrained_model_name_or_path` must be given: the source model.")
        if self.text and self.class_prompt is None:
            raise ValueError("`class_prompt` must be given with `instance_prompt`.")
        for name in ("class_prompt", "class_data_dir", "validation_prompt"):
            value = getattr(self, name)
            require(self.text or value is None, name, value, "left out without `instance_prompt`")
        require(self.text or not self.use_lora, "use_lora", self.use_lora, "False without `instance_prompt`")
        if self.use_lora:
            require_peft("use_lora")
        require(self.prior_loss_weight >= 0, "prior_loss_weight", self.prior_loss_weight, "a number >= 0")
        if self.text and self.prior and self.class_data_dir is None:
            raise ValueError("`class_data_dir` must be given with `prior_loss_weight` or `source='self'`.")
        for name in ("train_data_dir", "output_dir"):
            if self.class_data_dir is not None and getattr(self, name) is not None:
                ours, theirs = Path(getattr(self, name)).resolve(), Path(self.class_data_dir).resolve()
                apart = ours not in (theirs, *theirs.parents) and theirs not in ours.parents
                require(apart, "class_data_dir", self.class_data_dir, f"apart from `{name}`, {str(ours)!r}")
        if self.class_data_dir is not None:
            is_file = Path(self.class_data_dir).is_file()
            require(not is_file, "class_data_dir", self.class_data_dir, "a folder, which need not exist yet")
        if self.source == "self":
            require(self.text, "source", self.source, "'frozen' without `instance_prompt`")
        for name in ("num_class_images", "rank", "validation_inference_steps"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "an integer >= 1")
        if self.make_loss().pairs:
            accepted = "an integer >= 3 with a pair loss, which is 0 for two images"
            require(self.train_batch_size >= 3, "train_batch_size", self.train_batch_size, accepted)
        require(not self.streaming, "streaming", self.streaming, "False: the images are few")

    @property
    def text(self) -> bool:
        """Whether the model is text-to-image."""
        return self.instance_prompt is not None

    @property
    def prior(self) -> bool:
        """Whether images of the class are needed."""
        return self.text and (self.prior_loss_weight > 0 or self.source == "self")

    def make_loss(self) -> DomainStudioLoss:
        """Makes the loss that the weights describe.

        Raises:
            ValueError: a weight is negative.
        """
        defaults = (100.0, 100.0, 0.1) if self.text else (4.0, 4.0, 1.0)
        given = (self.pair_weight, self.hf_pair_weight, self.hf_mse_weight)
        pair, hf_pair, hf_mse = (d if value is None else value for value, d in zip(given, defaults, strict=True))
        return DomainStudioLoss(pair, hf_pair, hf_mse, self.hf_mse_weighting, self.max_pair_timestep)


class DomainStudioRecipe(Recipe[DomainStudioConfig]):
    """DomainStudio (arXiv 2306.14153): ties the distances between adapted samples to those of the frozen source.

    The source sees the same noisy images at the same timesteps, with text under the prompt of the class. Its dropout
    is off, that of the network in training on.

    Example:
        >>> from diffusers_ext import DomainStudioConfig, DomainStudioRecipe, Trainer
        >>> config = DomainStudioConfig(
        ...     pretrained_model_name_or_path="my/ddpm", train_data_dir="ten-sketches", max_train_steps=1000
        ... )
        >>> Trainer(config, DomainStudioRecipe(config)).train()  # doctest: +SKIP
    """

    Config = DomainStudioConfig
    model: UnconditionalModel | TextModel

    # -- data and modules ------------------------------------------------------------------------------------------

    def dataset(self, ctx: Context[DomainStudioConfig]) -> Any:
        """Loads the model and the images."""
        config, name = self.config, str(self.config.pretrained_model_name_or_path)
        self.data = data = image_dataset(config, ctx.accelerator.is_main_process)
        require(
            len(data) >= 2, "train_data_dir", config.train_data_dir, f"a folder of at least 2 images, not {len(data)}"
        )
        if config.text:
            prompts = {"instance": str(config.instance_prompt), "class": str(config.class_prompt)}
            self.model = TextModel(name, prompts, config.rank if config.use_lora else None)
        else:
            self.model = UnconditionalModel(name)
        check_image_size(self.model.unet, self.model.vae, config.resolution, config.channels)
        self.pairs = PairedDataset(data) if config.prior else None
        return data if self.pairs is None else self.pairs

    def setup(self, ctx: Context[DomainStudioConfig]) -> Modules:
        """Hands over the network to adapt, with the source and images of the class where a loss needs them."""
        self.losses = self.config.make_loss()
        self._check_model()
        model: Any = self.model
        scheduler = model.training_scheduler
        length, flow = scheduler.config.num_train_timesteps, isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
        self.objective = FlowMatching(length) if flow else EpsX0V(scheduler)
        self.variance = LearnedVariance(scheduler) if model.learned_variance else None
        self.timesteps = UniformTimesteps(None if flow else length)
        if self.pairs is not None:
            self.pairs.classes = self._class_images(ctx)
        if self.losses.pairs and self.config.source == "frozen":
            model.add_source()
        return Modules(model.unet, model.scheduler, model.frozen)

    def _check_model(self) -> None:
        """Checks the arguments that depend on the model."""
        config, model = self.config, self.model
        length, kept = model.training_scheduler.config.num_train_timesteps, config.max_pair_timestep
        accepted = f"in 0..{length - 1}, the model's timesteps, or left out"
        require(kept is None or kept < length, "max_pair_timestep", kept, accepted)
        space = config.similarity_space
        require(space == "pixel" or model.vae is not None, "similarity_space", space, "'pixel' for a model of pixels")
        factor = 1 if space == "pixel" else latent_factor(model.vae)
        high = self.losses.weights["hf_pair_weight"] or self.losses.weights["hf_mse_weight"]
        accepted = "of even images, whose blocks of 2x2 give the high frequencies, or these without weight"
        require(not high or config.resolution // factor % 2 == 0, "resolution", config.resolution, accepted)
        if config.num_validation_images:
            check_inference_steps(model.scheduler, "validation_inference_steps", config.validation_inference_steps)

    def _class_images(self, ctx: Context[DomainStudioConfig]) -> Any:
        """Generates the images of the class that are missing, and loads all of them."""
        config, main = self.config, ctx.accelerator.is_main_process
        if main:
            pipe = self.model.pipe.to(ctx.accelerator.device)  # type: ignore[union-attr]
            arguments = (config.num_class_images, config.train_batch_size, config.seed)
            class_images(pipe, str(config.class_prompt), str(config.class_data_dir), *arguments)
        ctx.accelerator.wait_for_everyone()
        data: Any = load_images(
            train_data_dir=config.class_data_dir,
            resolution=config.resolution,
            center_crop=config.center_crop,
            random_flip=config.random_flip,
            channels=config.channels,
        )
        if main:
            data.verify()
        return data

    # -- training --------------------------------------------------------------------------------------------------

    def encode(self, pixels: torch.Tensor, ctx: Context[DomainStudioConfig]) -> torch.Tensor:
        """Brings images into the space that is diffused."""
        vae = self.model.vae
        if vae is None:
            return pixels * self.model.image_scale
        if vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False):
            vae.float()  # its activations overflow in half precision
        mean, std = latent_moments(vae, pixels, vae.dtype)
        return scaled_latents(vae, mean + std * ctx.rng.randn_like(mean, ctx.ids, stream="latents"))

    def compared(self, sample: torch.Tensor) -> torch.Tensor:
        """Brings clean samples into the space where they are compared: images in [-1, 1], or latents."""
        sample = sample / self.model.image_scale
        if self.model.vae is None or self.config.similarity_space == "latent":
            return sample
        return decoded(self.model.vae, sample).float()

    def training_step(self, batch: dict[str, Any], ctx: Context[DomainStudioConfig]) -> StepOutput:
        """Denoises images of the domain, and of the class, and compares the adapted with the source."""
        config, n = self.config, len(batch["pixel_values"])
        halves: list[Literal["instance", "class"]] = ["instance", "class"] if config.prior else ["instance"]
        with torch.no_grad():
            pixels = [batch["pixel_values"], batch["class_pixel_values"]] if config.prior else [batch["pixel_values"]]
            x0 = [self.encode(part, ctx) for part in pixels]
        noisy, target, t = self._noised(x0, ctx)
        output = self._predict(noisy, t, halves, ctx)
        prediction = output[:, : noisy.shape[1]]
        loss = self.objective.loss(prediction[:n], target[:n], t[:n])
        logs = {"denoising": loss}
        if self.variance is not None:
            estimate = self.objective.predicted_sample(prediction, noisy, t)
            logs["vlb"] = self.variance.bound(x0[0], noisy, t, estimate, output[:, noisy.shape[1] :]).mean()
            loss = loss + logs["vlb"]
        if config.prior and config.prior_loss_weight:
            prior = self.objective.loss(prediction[n:], target[n:], t[n:])
            loss, logs["prior"] = loss + config.prior_loss_weight * prior, prior
        if config.source == "self":
            noisy, target, t = self._noised(x0, ctx, shared=True)
            prediction = self._predict(noisy, t, halves, ctx)
        terms = self._terms(prediction, noisy, t, x0[0], batch["pixel_values"], ctx)
        for value in terms.values():
            loss = loss + value
        return StepOutput(loss, {**logs, **terms} if len(logs) + len(terms) > 1 else {})

    def _noised(
        self, x0: list[torch.Tensor], ctx: Context[DomainStudioConfig], shared: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Noises all halves; `shared` gives all one timestep."""
        with torch.no_grad():
            noise = torch.cat([ctx.rng.randn_like(part, ctx.ids) for part in x0])
            times = [self.timesteps(len(part), ctx.rng, ctx.ids, part.device) for part in x0]
            t = times[0][:1].expand(len(noise)) if shared else torch.cat(times)
            noisy, target = self.objective.make(torch.cat(x0), noise, t)
        return noisy, target, t

    def _predict(
        self,
        noisy: torch.Tensor,
        t: torch.Tensor,
        halves: list[Literal["instance", "class"]],
        ctx: Context[DomainStudioConfig],
    ) -> torch.Tensor:
        conditions = [self.model.condition(who, len(noisy) // len(halves)) for who in halves]
        joined = {key: torch.cat([c[key] for c in conditions]) for key in conditions[0]}
        return ctx.model(noisy, self.objective.model_timesteps(t), **joined, return_dict=False)[0]

    def _terms(
        self,
        prediction: torch.Tensor,
        noisy: torch.Tensor,
        t: torch.Tensor,
        x0: torch.Tensor,
        pixels: torch.Tensor,
        ctx: Context[DomainStudioConfig],
    ) -> dict[str, torch.Tensor]:
        """Computes DomainStudio's own terms for the first half of the batch."""
        n, losses = len(x0), self.losses
        if not any(losses.weights.values()):
            return {}
        adapted = self.compared(self.objective.predicted_sample(prediction[:n], noisy[:n], t[:n]))
        source = None
        if losses.pairs and self.config.source == "self":
            source = self.compared(self.objective.predicted_sample(prediction[n:], noisy[n:], t[n:]))
        elif losses.pairs:
            predicted = self.model.source(ctx, noisy[:n], self.objective.model_timesteps(t[:n]))
            with torch.no_grad():
                source = self.compared(self.objective.predicted_sample(predicted, noisy[:n], t[:n]))
        in_pixels = self.model.vae is None or self.config.similarity_space == "pixel"
        target = pixels if in_pixels else x0
        terms = losses(
            adapted, source, target, snr=self.objective.snr(t[:n]), timesteps=self.objective.model_timesteps(t[:n])
        )
        return dict(terms)

    # -- results ---------------------------------------------------------------------------------------------------

    def pipeline(self, modules: Modules) -> DiffusionPipeline:
        """Returns an `ImageGenerationPipeline`, or the text-to-image pipeline with the adapted network."""
        return self.model.pipeline(modules)

    def validate(self, pipeline: DiffusionPipeline, generator: torch.Generator) -> list[Image.Image]:
        """Draws pictures, with text of the validation prompt."""
        config, n = self.config, self.config.num_validation_images
        prompt = config.validation_prompt or config.instance_prompt
        what: dict[str, Any] = {"prompt": [prompt] * n} if config.text else {"batch_size": n}
        steps = config.validation_inference_steps
        return pipeline(**what, num_inference_steps=steps, generator=generator).images  # type: ignore[operator]

    def save(self, pipeline: DiffusionPipeline, folder: str, card: RepoCard, sample: Image.Image | None) -> None:
        """Writes the whole pipeline, or the LoRA layers."""
        if self.config.use_lora:
            save_lora_repo(pipeline, folder, card=card, sample=sample)
        else:
            super().save(pipeline, folder, card, sample)

    def card(self) -> RepoCard:
        """Returns the card of the adapted model."""
        config, base = self.config, str(self.config.pretrained_model_name_or_path)
        kind = "text-to-image" if config.text else "unconditional-image-generation"
        snippet = None
        if config.text:
            snippet = SNIPPET.replace("{base}", base).replace("{prompt}", str(config.instance_prompt))
            if not config.use_lora:
                snippet = snippet.replace('pipeline.load_lora_weights("{repo_id}")\n', "").replace(base, "{repo_id}")
        return RepoCard(
            method="DomainStudio",
            description=f"Adapted to {len(self.data)} images from {base}, whose diversity it keeps: the distances "
            "between its samples are tied to those between the source's.",
            data=self.data.description,
            tags=["diffusers-ext", kind, "domain-studio", *(["lora"] if config.use_lora else [])],
            base_model=base,
            paper="https://arxiv.org/abs/2306.14153",
            snippet=snippet,
            pipeline_tag=kind,
        )
