"""The recipe of text-to-image pipelines: any that Diffusers loads, trained through its own call.

The pipeline's `__call__` is the only definition of how its network is called (`PipelineDenoiser`); here stand the
data, the noise, the loss and what is saved. Methods that change one part inherit this and override it.
"""

from __future__ import annotations

import inspect
import json
import logging
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from diffusers_ext.data.sources import load_images
from diffusers_ext.generation.prompts import Conditions
from diffusers_ext.hub.card import RepoCard
from diffusers_ext.hub.repo import has_lora_format, save_lora_repo, save_repo

from .config import require
from .images import image_dataset
from .lora import add_lora, check_loads_again
from .noise import NoiseStrategy, offset_noise
from .objectives import Objective
from .pipeline_schedule import is_flow, pipeline_objective, pipeline_timesteps
from .prior import class_images
from .recipe import Context, Modules, Recipe, Sample, StepOutput
from .text_arguments import TextToImageConfig
from .text_cache import PromptRecordings, cached_latents, quiet, say_about_length
from .text_data import CaptionedImages, make_buckets
from .text_model import SizedDenoiser, TextPipeline
from .timesteps import Timesteps

__all__ = ["Prediction", "TextToImageRecipe"]

logger = logging.getLogger(__name__)

ConfigT = TypeVar("ConfigT", bound=TextToImageConfig)
Size = tuple[int, int]
# Sample ids of class images, apart from those of the images themselves.
CLASS_IDS = 2**48
COUPLED = (
    "Noise is assigned over samples of different prompts, which hides the prompt in the noise: expect weak prompts "
    "without guidance and good images with it, or assign within captions by noise_options '{\"within_labels\": true}'."
)
SNIPPET = """from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{base}"){loading}
image = pipeline({prompt}).images[0]
image.save("sample.png")"""


@dataclass
class Prediction:
    """What the network says of noisy samples, images of the class behind the others.

    Attributes:
        output: `(batch, ...)`, in the scheduler's space, with gradient.
        noisy: the network's input.
        target: what the output should be.
        t: `(batch,)` timesteps of the objective.
    """

    output: torch.Tensor
    noisy: torch.Tensor
    target: torch.Tensor
    t: torch.Tensor


class TextToImageRecipe(Recipe[ConfigT], Generic[ConfigT]):
    """Trains the network of a text-to-image pipeline, or LoRA layers on it, on captioned images.

    The finished folder is what the pipeline's own class loads: a whole pipeline by `from_pretrained`, or LoRA weights
    by `load_lora_weights`.

    Attributes:
        model: the pipeline.
        denoiser: its network, called through the pipeline's own call.
        data: the images.
        noise: the noise strategy; it pairs noise with latents in the space in which the pipeline's loop steps.
        objective: inputs, targets and loss.
        timesteps: for each size, how timesteps are drawn.

    Example:
        >>> from diffusers_ext import TextToImageConfig, TextToImageRecipe, Trainer
        >>> config = TextToImageConfig(
        ...     pretrained_model_name_or_path="my/sdxl", train_data_dir="photos", lora_rank=16, max_train_steps=1000
        ... )
        >>> Trainer(config, TextToImageRecipe(config)).train()  # doctest: +SKIP
    """

    Config = TextToImageConfig
    model: TextPipeline
    denoiser: SizedDenoiser
    data: CaptionedImages
    noise: NoiseStrategy
    objective: Objective
    timesteps: dict[Size, Timesteps]

    # -- data and model --------------------------------------------------------------------------------------------

    def dataset(self, ctx: Context[ConfigT]) -> Any:
        """Loads the images and the pipeline, and gives each image its size."""
        config, main = self.config, ctx.accelerator.is_main_process
        captioned = config.instance_prompt is None
        images = image_dataset(config, main, config.caption_column if captioned else None)
        captions = images.captions() if captioned else [str(config.instance_prompt)] * len(images)
        if not any(caption.strip() for caption in captions):
            raise ValueError(f"`caption_column` must hold captions, got {config.caption_column!r} with none.")
        self.data = CaptionedImages(images, captions)
        self.model = TextPipeline(
            *config.model_argument,
            ctx.weight_dtype,
            torch.float32 if config.lora_rank is None else ctx.weight_dtype,
            from_scratch=config.pipeline_config is not None,
            bits=None if config.quantization is None else int(config.quantization[0]),
        )
        if "prompt" not in inspect.signature(type(self.model.pipe).__call__).parameters:
            raise ValueError(
                f"`{self.model.argument}` must be a text-to-image pipeline, got {type(self.model.pipe).__name__}, "
                "whose call takes no `prompt`: models of images without text are trained by `immiscible`, with "
                "--noise gaussian for plain noise."
            )
        scheduler = self.model.pipe.scheduler
        self.objective = pipeline_objective(scheduler, config.snr_gamma)
        steps, most = config.validation_inference_steps, scheduler.config.num_train_timesteps
        require(steps <= most, "validation_inference_steps", steps, f"at most {most}, the scheduler's timesteps")
        multiple = self._check_resolution()
        if config.aspect_ratio_buckets:
            self.data.use_buckets(make_buckets(images, config.resolution, multiple))
        self.denoiser = SizedDenoiser(self.model.pipe, self.data.sizes, **self._call())
        return self.data

    def _call(self) -> dict[str, Any]:
        """Returns the arguments of the pipeline's call in training."""
        config, call = self.config, self.config.call()
        if config.guidance_scale is not None:
            name = type(self.model.pipe).__name__
            if not getattr(self.model.network.config, "guidance_embeds", False):
                raise ValueError(
                    f"`guidance_scale` must be left out for {name}, got {config.guidance_scale!r}: its network does "
                    "not take the scale as an input (that of sample images is `validation_guidance_scale`)."
                )
            call["guidance_scale"] = config.guidance_scale
        return call

    def _check_resolution(self) -> int:
        """Checks the resolution; returns what sides are multiples of, as far as the configurations tell."""
        pipe, resolution = self.model.pipe, self.config.resolution
        factor = int(getattr(pipe, "vae_scale_factor", 8))
        patch = self.model.network.config.get("patch_size", 1) or 1
        patch = max(patch) if isinstance(patch, list | tuple) else int(patch)
        blocks = self.model.network.config.get("block_out_channels")
        packed = getattr(pipe, "patch_size", None) is None and "pack_latents" in "".join(dir(type(pipe)))
        multiple = factor * max(patch, 2 if packed else 1, 2 ** (len(blocks) - 1) if blocks else 1)
        if resolution % multiple:
            raise ValueError(
                f"`resolution` must be a multiple of {multiple} for {type(pipe).__name__}, got {resolution}; near are "
                f"{resolution // multiple * multiple} and {-(-resolution // multiple) * multiple}."
            )
        return multiple

    # -- set-up ----------------------------------------------------------------------------------------------------

    def setup(self, ctx: Context[ConfigT]) -> Modules:
        """Adds LoRA layers, encodes what is to be encoded before, and tries the network once."""
        config, model = self.config, self.model
        scheduler = model.pipe.scheduler
        self.noise = config.make_noise()
        self.device = ctx.accelerator.device
        self.autocast_dtype = ctx.weight_dtype
        if not is_flow(scheduler):
            pipeline_timesteps(scheduler, config.timestep_sampling)
        if config.lora_rank is not None:
            add_lora(model.network, config.lora_rank, config.lora_alpha, config.targets, config.use_dora)
            if not getattr(model.network, "is_quantized", False):
                check_loads_again(model.pipe, model.network_name, config.targets)
        else:
            model.network.requires_grad_(True)
        for module in model.others().values():
            module.requires_grad_(False).eval().to(self.device)
        if config.quantization is None:
            model.network.to(self.device)
        if config.prior:
            self.data.classes = self._class_images(ctx)
        with quiet():
            self._encode_before(ctx)
        for p in model.network.parameters():
            if p.requires_grad:
                p.data = p.data.float()
        if config.gradient_checkpointing:
            model.network.enable_gradient_checkpointing()
        with quiet():
            self._try_network()
        self._say_about_noise()
        return Modules(self.denoiser, scheduler, only_trained=config.lora_rank is not None)

    def _mu(self, size: Size) -> float | None:
        return self.denoiser.at(size).schedule_arguments().get("mu")

    def _class_images(self, ctx: Context[ConfigT]) -> Any:
        """Draws the images of the class that are missing, and loads all of them."""
        config, main = self.config, ctx.accelerator.is_main_process
        if main:
            side = {"height": config.resolution, "width": config.resolution}
            arguments = (config.num_class_images, config.train_batch_size, config.seed)
            with self._drawing():
                class_images(
                    self.model.pipe,
                    str(config.class_prompt),
                    str(config.class_data_dir),
                    *arguments,
                    **side,
                    **config.call(),
                )
        ctx.accelerator.wait_for_everyone()
        data: Any = load_images(
            train_data_dir=config.class_data_dir,
            resolution=config.resolution,
            center_crop=config.center_crop,
            random_flip=config.random_flip,
        )
        if main:
            data.verify()
        return data

    def _encode_before(self, ctx: Context[ConfigT]) -> None:
        """Encodes prompts and images where asked, and frees the encoders."""
        config, model, accelerator = self.config, self.model, ctx.accelerator
        say_about_length(model.pipe, self.data.prompts)
        extra = [config.class_prompt] if config.class_prompt is not None else []
        self.prompts = PromptRecordings(self.denoiser.at(), ["", *self.data.prompts, *extra])
        with model.one_precision():
            self.denoiser.at().check([self.data.prompts[0]])
        # Each size asks the pipeline once, while its encoders are there.
        scheduler, density = model.pipe.scheduler, config.timestep_sampling
        self.timesteps = {size: pipeline_timesteps(scheduler, density, self._mu(size)) for size in self.data.sizes}
        folder = config.cache_dir or f"{config.output_dir}/cache"
        encoders = {name: module for name, module in model.others().items() if name.startswith("text_encoder")}
        if config.cache_prompts:
            self.prompts.cache(folder, {"call": json.dumps(self._call(), sort_keys=True)}, encoders, accelerator)
            model.release(encoders)
        if config.cache_latents:
            vae = next(name for name in model.others() if name not in encoders)
            cache = partial(
                cached_latents,
                denoiser=self.denoiser,
                vae=getattr(model.pipe, vae),
                batch=config.train_batch_size,
                accelerator=accelerator,
            )
            given = config.cache_dir is not None
            self.data.latents = cache(self.data.images, folder, "latents", refuse_others=given)
            if self.data.classes is not None:
                self.data.class_latents = cache(self.data.classes, folder, "class-latents", refuse_others=given)
            model.release([vae])

    def _try_network(self) -> None:
        """Finds out whether a batch shares its timestep, and freezes parameters that the loss does not reach.

        With several processes a parameter without gradient would spoil the others' from the first update on.
        """
        name, one = type(self.model.pipe).__name__, self.denoiser.at()
        conditions = self.prompts([next((p for p in self.data.prompts if p.strip()), "")])
        self.one_timestep = one.one_timestep
        if self.one_timestep:
            logger.warning("%s takes one timestep a call: all samples of a micro-batch share one.", name)
        trained = {key: p for key, p in one.denoiser.named_parameters() if p.requires_grad}
        unused = one.unused_parameters(conditions)
        for key in unused:
            trained[key].requires_grad_(False)
        if len(unused) == len(trained):
            raise ValueError(f"{name}: no parameter that is to be trained gets a gradient.")
        if unused:
            logger.warning("%d parameters get no gradient and stay as they are, first %s.", len(unused), unused[0])

    @property
    def coupled(self) -> bool:
        """Whether noise is assigned over samples of different prompts."""
        assigned = hasattr(self.noise, "within_labels") and not self.noise.within_labels  # type: ignore[attr-defined]
        return assigned and len(self.data.prompts) > 1

    def _say_about_noise(self) -> None:
        if self.coupled:
            logger.warning("%s", COUPLED)
        packed = len(self.denoiser.at().latents_shape(1)) == 3
        offset = self.config.noise_offset or getattr(self.noise, "offset", 0)
        if packed and offset:
            raise ValueError(
                f"`noise_offset` must be 0 for {type(self.model.pipe).__name__}, got {offset!r}: its latents are "
                "packed and have no channels of pixels."
            )

    # -- training --------------------------------------------------------------------------------------------------

    def encode(self, batch: dict[str, Any], ctx: Context[ConfigT]) -> Sample:
        """Brings a batch into the space in which the pipeline's loop steps.

        Args:
            batch: what `CaptionedImages.get` gives, collated.
            ctx: the run.

        Returns:
            Latents, those of class images behind the others'; what the denoiser is called with; and the captions as
            labels, by number.
        """
        height, width = (int(side) for side in batch["size"][0].split("x"))
        denoiser = self.denoiser.at((height, width))
        prompts = list(batch["caption"])
        drop = ctx.rng.rand(len(prompts), ctx.ids, stream="labels").tolist()
        given = ["" if d < self.config.caption_dropout else p for p, d in zip(prompts, drop, strict=True)]
        parts = []
        for prefix in ("", "class_") if self.data.classes is not None else ("",):
            if f"{prefix}latents" in batch:
                parts.append(batch[f"{prefix}latents"])
            else:
                parts.append(denoiser.encode_images(batch[f"{prefix}pixel_values"]))
        if len(parts) > 1:
            prompts += [str(self.config.class_prompt)] * len(prompts)
            given += [str(self.config.class_prompt)] * len(given)
        x0 = torch.cat(parts)
        labels = torch.tensor([self.prompts.number[prompt] for prompt in prompts], device=x0.device)
        return Sample(x0, {"conditions": self.prompts(given), "size": (height, width)}, labels)

    def draw_noise(self, sample: Sample, ids: list[int], ctx: Context[ConfigT]) -> torch.Tensor:
        """Draws the noise of a batch: the strategy's, then the offset on top."""
        noise = self.noise(sample.x0, rng=ctx.rng, ids=ids, labels=sample.labels, accelerator=ctx.accelerator)
        return offset_noise(noise, self.config.noise_offset, ctx.rng, ids) if self.config.noise_offset else noise

    def training_step(self, batch: dict[str, Any], ctx: Context[ConfigT]) -> StepOutput:
        """Noises, predicts and compares."""
        n = len(batch["caption"])
        with torch.no_grad():
            sample = self.encode(batch, ctx)
        made = self.predict(sample, ctx)
        loss = self.objective.loss(made.output[:n], made.target[:n], made.t[:n])
        logs = {"denoising": loss}
        if len(sample.x0) > n:
            logs["prior"] = self.objective.loss(made.output[n:], made.target[n:], made.t[n:])
            loss = loss + self.config.prior_loss_weight * logs["prior"]
        for name, term in self.further_terms(batch, sample, made, ctx).items():
            loss, logs[name] = loss + term, term
        return StepOutput(loss, logs if len(logs) > 1 else {})

    def predict(self, sample: Sample, ctx: Context[ConfigT], one_timestep: bool = False) -> Prediction:
        """Noises a batch and denoises it.

        Args:
            sample: from `encode`.
            ctx: the run.
            one_timestep: all samples get the same.
        """
        with torch.no_grad():
            both = len(sample.x0)
            ids = list(ctx.ids) if both == len(ctx.ids) else [*ctx.ids, *(CLASS_IDS + i for i in ctx.ids)]
            noise = self.draw_noise(sample, ids, ctx)
            t = self.timesteps[sample.cond["size"]](both, ctx.rng, ids, noise.device)
            t = t[:1].expand(both) if self.one_timestep or one_timestep else t
            noisy, target = self.objective.make(sample.x0, noise, t)
        return Prediction(self.denoise(ctx.model, noisy, t, **sample.cond), noisy, target, t)

    def denoise(
        self, denoiser: Any, noisy: torch.Tensor, t: torch.Tensor, conditions: Conditions, size: Size
    ) -> torch.Tensor:
        """Calls a `SizedDenoiser` at timesteps of the objective."""
        times = self.objective.model_timesteps(t)
        return denoiser(noisy, times[:1] if self.one_timestep else times, conditions=conditions, size=size)

    def further_terms(
        self, batch: dict[str, Any], sample: Sample, made: Prediction, ctx: Context[ConfigT]
    ) -> dict[str, torch.Tensor]:
        """Returns what a method adds to the loss, weighted, by name; here nothing."""
        return {}

    # -- results ---------------------------------------------------------------------------------------------------

    def _drawing(self) -> Any:
        """Lets the stock pipeline run whatever the precisions of its parts."""
        return torch.autocast(self.device.type, self.autocast_dtype, self.autocast_dtype != torch.float32)

    def pipeline(self, modules: Modules) -> DiffusionPipeline:
        """Returns the stock pipeline with the trained network."""
        pipe = self.model.whole(modules.trainable.denoiser)
        for name in self.model.others():
            getattr(pipe, name).to(self.device)
        return pipe

    def validate(self, pipeline: DiffusionPipeline, generator: torch.Generator) -> list[Image.Image]:
        """Draws pictures of the validation prompts in turn by the stock pipeline."""
        config = self.config
        prompts = self._validation_prompts()
        height, width = self.data.sizes[0]
        call: dict[str, Any] = {"height": height, "width": width, **config.call()}
        if "use_resolution_binning" in inspect.signature(type(pipeline).__call__).parameters:
            call.setdefault("use_resolution_binning", False)
        scale = config.validation_guidance_scale
        scale = config.guidance_scale if scale is None else scale
        if scale is not None:
            call["guidance_scale"] = scale
        chosen = [prompts[i % len(prompts)] for i in range(config.num_validation_images)]
        images: list[Image.Image] = []
        with self._drawing():
            for first in range(0, len(chosen), config.train_batch_size):
                part = chosen[first : first + config.train_batch_size]
                steps = config.validation_inference_steps
                drawn: Any = pipeline(prompt=part, num_inference_steps=steps, generator=generator, **call)  # type: ignore[operator]
                images += drawn.images
        return images

    def _validation_prompts(self) -> list[str]:
        given = self.config.validation_prompts()
        return given or [prompt for prompt in self.data.prompts if prompt.strip()]

    def save(self, pipeline: DiffusionPipeline, folder: str, card: RepoCard, sample: Image.Image | None) -> None:
        """Writes the LoRA layers, or the whole pipeline with all but the trained network as it was."""
        if self.config.lora_rank is not None:
            save_lora_repo(pipeline, folder, network=self.model.network_name, card=card, sample=sample)
        else:
            network = getattr(pipeline, self.model.network_name)
            save_repo(self.model.whole(network, original=True), folder, card=card, sample=sample)

    def card(self) -> RepoCard:
        """Returns the card of the trained pipeline or of its LoRA layers."""
        config, name = self.config, self.model.name
        lora = config.lora_rank is not None
        prompt = config.instance_prompt or self._validation_prompts()[0]
        loading = ""
        if lora and has_lora_format(self.model.pipe, self.model.network_name):
            loading = '\npipeline.load_lora_weights("{repo_id}")'
        elif lora:
            loading = f'\nPeftModel.from_pretrained(pipeline.{self.model.network_name}, "{{repo_id}}")  # from peft'
        what = f"LoRA layers of rank {config.lora_rank} for" if lora else "A"
        start = "trained from scratch" if config.pipeline_config is not None else f"tuned from {name}"
        notes = [] if config.instance_prompt is None else [f'Trigger: write "{config.instance_prompt}" in the prompt.']
        if self.coupled:
            notes.append(COUPLED)
        if config.noise != "gaussian":
            notes.append(
                f"Noise was paired with the data in training ({config.noise}): sample with a deterministic sampler."
            )
        return RepoCard(
            method=f"Text-to-image {'LoRA' if lora else 'model'}",
            description=f"{what} {type(self.model.pipe).__name__}, {start} with {config.noise} noise.",
            data=self.data.images.description,
            tags=["diffusers-ext", "text-to-image", *(["lora"] if lora else [])],
            base_model=config.pretrained_model_name_or_path,
            snippet=SNIPPET.replace("{base}", name if lora else "{repo_id}")
            .replace("{loading}", loading)
            .replace("{prompt}", json.dumps(prompt)),
            notes=notes,
            pipeline_tag="text-to-image",
        )
