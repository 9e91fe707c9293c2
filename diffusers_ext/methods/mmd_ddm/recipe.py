"""Training through the sampler: a pretrained denoiser becomes good at a fixed small number of steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import diffusers
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image

from diffusers_ext.data.precomputed import PrecomputedDataset
from diffusers_ext.generation.latents import decoded
from diffusers_ext.generation.pipeline import ImageGenerationPipeline
from diffusers_ext.generation.stepping import set_timesteps
from diffusers_ext.hub.card import RepoCard
from diffusers_ext.metrics.features import feature_extractor
from diffusers_ext.metrics.kernel import mmd2
from diffusers_ext.training.config import described, require
from diffusers_ext.training.images import ImageConfig, image_dataset
from diffusers_ext.training.pretrained import Denoiser, check_image_size, converted, load_denoiser
from diffusers_ext.training.recipe import Context, Modules, Recipe, StepOutput

from .chain import clamped, differentiable_sample
from .checks import check_chain
from .features import FeatureSpace
from .replay import gathered, replayed_loss

__all__ = ["MMDDDMConfig", "MMDDDMRecipe"]


@dataclass
class MMDDDMConfig(ImageConfig):
    """Arguments of MMD-DDM beside those of the data and the engine.

    Raises:
        ValueError: an argument is outside its range, or two contradict each other.
    """

    pretrained_model_name_or_path: str | None = described("Denoiser to tune, a Hub repo or a folder.", group="model")
    num_inference_steps: int = described("The number of sampling steps to tune for.", 5)
    scheduler: str | None = described(
        "Diffusers class of the sampler to tune for; by default DDIMScheduler, or the model's own for flow matching."
    )
    timestep_spacing: Literal["leading", "linspace", "trailing"] = described("Grid of the timesteps.", "leading")
    features: str = described(
        "Where images are compared: pixels, inception, clip:REPO, classifier:REPO, or several, separated by commas.",
        "inception",
    )
    standardise_features: bool | None = described("Standardise by the real features; by default for several spaces.")
    kernel: Literal["polynomial", "rbf", "rational_quadratic"] = described("Kernel of the distance.", "polynomial")
    degree: int = described("Degree of the polynomial kernel; 1 is linear.", 3)
    gamma: float | None = described("Scale of the polynomial and the rbf kernel; by default 1 / number of features.")
    clamp: Literal["hard", "ste"] = described("Pixels beyond the range get no gradient, or theirs as it is.", "hard")
    chain_checkpointing: Literal["step", "none"] = described("Recompute each network call, or keep them all.", "step")
    micro_batch_size: int | None = described(
        "Generate so many images at a time, twice, with the exact gradient of the whole batch."
    )
    chain_dropout: bool = described("Leave the network's dropout on while tuning, as the authors did.", False)
    center_crop: bool = described("Crop the centre; real features are then computed once.", True)
    train_batch_size: int = described("Generated, and real, images an update.", 64)
    learning_rate: float = described("Peak learning rate.", 5e-6)
    adam_weight_decay: float = described("Weight decay.", 0.0)
    max_grad_norm: float = described("Gradients are clipped to this norm.", 0.5)
    ema_decay: float = described("Largest decay of the average.", 0.99)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pretrained_model_name_or_path is None:
            raise ValueError("`pretrained_model_name_or_path` must be given: the denoiser to tune.")
        size, micro = self.train_batch_size, self.micro_batch_size
        require(size >= 2, "train_batch_size", size, "an integer >= 2: the distance compares pairs")
        require(micro is None or 1 <= micro <= size, "micro_batch_size", micro, f"in 1..{size} or left out")
        if self.chain_dropout and micro is not None:
            raise ValueError("`chain_dropout` must be False with `micro_batch_size`: images are generated twice.")
        if self.streaming:
            raise ValueError("`streaming` must be False: real features are read by index.")
        require(self.num_inference_steps >= 1, "num_inference_steps", self.num_inference_steps, "an integer >= 1")
        require(self.degree >= 1, "degree", self.degree, "an integer >= 1")
        require(self.gamma is None or self.gamma > 0, "gamma", self.gamma, "a number > 0")
        kernel = self.kernel
        require(
            self.degree == 3 or kernel == "polynomial", "degree", self.degree, f"left out with the {kernel} kernel"
        )
        unused = self.gamma is not None and kernel == "rational_quadratic"
        require(not unused, "gamma", self.gamma, f"left out with the {kernel} kernel")

    def make_scheduler(self, pretrained: Any) -> Any:
        """Makes the scheduler to tune for, with the noise schedule of the pretrained model's.

        Raises:
            ValueError: it is unknown, does not fit, is stochastic or not differentiable.
        """
        own, name = isinstance(pretrained, FlowMatchEulerDiscreteScheduler), self.scheduler
        if own:
            kind = type(pretrained)
            require(
                name in (None, kind.__name__), "scheduler", name, f"{kind.__name__}, as the model has, or left out"
            )
        else:
            kind = getattr(diffusers, name or "DDIMScheduler", None)
            known = inspect.isclass(kind) and hasattr(kind, "set_timesteps")
            require(known, "scheduler", name, "the class of a Diffusers scheduler, such as DDIMScheduler")
        # Clipping would stop gradients; the chain ends in the image itself.
        changed = {"timestep_spacing": self.timestep_spacing, "clip_sample": False, "thresholding": False}
        changed |= {"steps_offset": 0, "set_alpha_to_one": True}
        accepted = inspect.signature(kind.__init__).parameters  # type: ignore[misc]
        changed = {} if own else {key: value for key, value in changed.items() if key in accepted}
        try:
            scheduler = converted(kind, pretrained, **changed)  # type: ignore[arg-type]
        except Exception as error:  # whatever a scheduler of another kind of model runs into
            raise ValueError(
                f"`scheduler` must be a class that takes the model's schedule of betas, got {name!r}: {error}"
            ) from error
        require(own or hasattr(scheduler, "alphas_cumprod"), "scheduler", name, "a class with a schedule of betas")
        check_chain(scheduler, self.num_inference_steps)
        return scheduler


class MMDDDMRecipe(Recipe[MMDDDMConfig]):
    """MMD-DDM (arXiv 2301.07969): minimises the squared MMD between generated and real images, through the sampler.

    Every update generates a batch with `num_inference_steps` steps and compares it with as many real images; with
    several processes their batches count as one. Real features are computed once where nothing augments the images.

    Args:
        config: the arguments.
        features: functions from images `(batch, channels, height, width)` in `[-1, 1]` to `(batch, features)`, instead
            of those that `config.features` names; with gradients, and on the run's device.

    Example:
        >>> from diffusers_ext import MMDDDMConfig, MMDDDMRecipe, Trainer
        >>> config = MMDDDMConfig(
        ...     pretrained_model_name_or_path="my/ddpm", train_data_dir="photos", max_train_steps=1000
        ... )
        >>> Trainer(config, MMDDDMRecipe(config)).train()  # doctest: +SKIP
    """

    Config = MMDDDMConfig
    denoiser: Denoiser
    space: FeatureSpace

    def __init__(
        self, config: MMDDDMConfig, features: Sequence[Callable[[torch.Tensor], torch.Tensor]] | None = None
    ) -> None:
        super().__init__(config)
        self._given = features

    # -- data and modules ------------------------------------------------------------------------------------------

    def dataset(self, ctx: Context[MMDDDMConfig]) -> Any:
        """Loads the model, the images and the extractors, and tries all of them."""
        config, device = self.config, ctx.accelerator.device
        # Recomputed calls would start the gradient exchange of `DistributedDataParallel` anew amid a backward pass.
        require(
            ctx.accelerator.num_processes == 1 or config.chain_checkpointing == "none",
            "chain_checkpointing",
            config.chain_checkpointing,
            "'none' with several processes; `micro_batch_size` and `gradient_checkpointing` save memory there",
        )
        self.denoiser = denoiser = load_denoiser(str(config.pretrained_model_name_or_path))
        check_image_size(denoiser.unet, denoiser.vae, config.resolution, config.channels)
        self.scheduler = config.make_scheduler(denoiser.scheduler)
        self.data = data = image_dataset(config, ctx.accelerator.is_main_process)
        if denoiser.num_classes:
            # Labels from the null label on are not the data's.
            classes = denoiser.num_classes if denoiser.null_class_label is None else denoiser.null_class_label
            accepted = f"a column of class labels, at most the model's {classes}; the data has {data.column_names}"
            accepted += f" and {data.num_classes} classes" if data.num_classes else ""
            require(1 <= data.num_classes <= classes, "label_column", config.label_column, accepted)
        names = [name.strip() for name in config.features.split(",")]
        given = self._given if self._given is not None else [feature_extractor(name, device) for name in names]
        self.space = FeatureSpace(given)
        some = range(0, len(data), -(-len(data) // 8))
        images = [data.get(i, torch.Generator().manual_seed(i))["pixel_values"] for i in some]
        probe = self.space.check(torch.stack(images).to(device))
        standardise = config.standardise_features
        self.standardise = len(self.space.extractors) > 1 if standardise is None else standardise
        cached = config.center_crop and not config.random_flip
        self.real = None
        if cached or self.standardise:
            # Features of some images stand for the extractors, which may be any functions.
            identity = {key: getattr(config, key) for key in ("resolution", "channels", "center_crop", "random_flip")}
            self.real = PrecomputedDataset(data, config.output_dir, identity | {"features": probe})
        return self.real if cached else data

    @torch.no_grad()
    def _real(self, items: list[dict[str, Any]], device: torch.device) -> dict[str, torch.Tensor]:
        """Computes the features of real images, before they are standardised."""
        found = {"features": self.space(torch.stack([item["pixel_values"] for item in items]).to(device))}
        if self.denoiser.num_classes:
            found["label"] = torch.tensor([item["label"] for item in items])
        return found

    def setup(self, ctx: Context[MMDDDMConfig]) -> Modules:
        """Computes the real features and hands over the modules that `dataset` has loaded."""
        if self.real is not None:
            device, batch = ctx.accelerator.device, self.config.train_batch_size
            self.real.compute(lambda items: self._real(items, device), ctx.accelerator, batch)
            if not torch.isfinite(self.real.column("features")).all():
                raise ValueError("`features` must be finite, got NaN or infinity for some of the real images.")
            if self.standardise:
                self.space.fit(self.real.column("features"))
        vae = self.denoiser.vae
        return Modules(self.denoiser.unet, self.scheduler, {} if vae is None else {"vae": vae})

    # -- training --------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], ctx: Context[MMDDDMConfig]) -> StepOutput:
        """Generates a batch and compares it with the real one."""
        config, unet = self.config, ctx.modules.trainable.config
        if "features" in batch:
            real = self.space.standardised(batch["features"])
        else:
            with torch.no_grad():
                real = self.space(batch["pixel_values"])
        size = unet.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = torch.empty(len(real), unet.in_channels, height, width, device=real.device)
        noise = ctx.rng.randn_like(shape, ctx.ids)
        labels = batch["label"] if self.denoiser.num_classes else None
        ctx.model.train(config.chain_dropout)

        def generate(part: slice) -> torch.Tensor:
            return self.generate(ctx, noise[part], None if labels is None else labels[part])

        real = gathered(real, ctx.accelerator)

        def loss(generated: torch.Tensor) -> torch.Tensor:
            generated = gathered(generated, ctx.accelerator)
            if not torch.isfinite(generated).all():
                raise FloatingPointError(
                    f"the features of generated images are not finite at step {ctx.step}; checkpoints up to here are "
                    f"in {config.output_dir}. A lower `learning_rate` or `max_grad_norm` may help."
                )
            value = mmd2(generated, real, config.kernel, **self._kernel_options()).float()
            # Each process has the gradient of its own images, and the engine averages where a sum is due.
            others = ctx.accelerator.num_processes - 1
            return value + others * (value - value.detach()) if others else value

        micro = config.micro_batch_size
        if micro is None or micro >= len(noise):
            return StepOutput(loss(generate(slice(None))))
        return StepOutput(replayed_loss(generate, len(noise), micro, loss, ctx.accelerator.backward))

    def generate(self, ctx: Context[MMDDDMConfig], noise: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """Returns the features of the images that grow from some noise."""
        config, denoiser = self.config, self.denoiser
        condition = {} if labels is None else {"class_labels": labels}
        steps, mode = config.num_inference_steps, config.chain_checkpointing
        sample = differentiable_sample(
            ctx.model, self.scheduler, noise, steps, checkpointing=mode, model_kwargs=condition
        )
        images = sample / denoiser.image_scale
        images = images if denoiser.vae is None else decoded(denoiser.vae, images).float()
        return self.space(clamped(images, config.clamp))

    def _kernel_options(self) -> dict[str, Any]:
        config = self.config
        options = {"polynomial": {"degree": config.degree, "gamma": config.gamma}, "rbf": {"gamma": config.gamma}}
        return options.get(config.kernel, {})

    # -- results ---------------------------------------------------------------------------------------------------

    def pipeline(self, modules: Modules) -> ImageGenerationPipeline:
        """Returns a pipeline that remembers the timesteps it was tuned for."""
        return ImageGenerationPipeline(
            modules.trainable,
            modules.scheduler,
            modules.frozen.get("vae"),
            image_scale=self.denoiser.image_scale,
            null_class_label=self.denoiser.null_class_label,
            tuned_timesteps=set_timesteps(self.scheduler, self.config.num_inference_steps, "cpu").tolist(),
        )

    def validate(self, pipeline: DiffusionPipeline, generator: torch.Generator) -> list[Image.Image]:
        """Draws pictures with the tuned number of steps; of a class-conditional model, the classes in turn."""
        n = self.config.num_validation_images
        what: dict[str, Any] = {"batch_size": n}
        if self.denoiser.num_classes:
            what = {"class_labels": [i % self.data.num_classes for i in range(n)]}
        return pipeline(**what, generator=generator).images  # type: ignore[operator]

    def card(self) -> RepoCard:
        """Returns the card, which says what the weights are good at."""
        config = self.config
        space = "features of the caller's own" if self._given else f"features `{config.features}`"
        kernel = "cubic polynomial kernel" if config.degree == 3 else f"polynomial kernel of degree {config.degree}"
        kernel = kernel if config.kernel == "polynomial" else f"{config.kernel.replace('_', ' ')} kernel"
        steps, scheduler = config.num_inference_steps, type(self.scheduler).__name__
        return RepoCard(
            method="MMD-DDM",
            description=f"Generates images of {config.resolution}x{config.resolution} pixels in {steps} steps. Its "
            f"UNet was tuned through the {scheduler} to minimise the squared maximum mean discrepancy ({kernel}, "
            f"{space}).",
            data=self.data.description,
            tags=["diffusers-ext", "unconditional-image-generation", "mmd-ddm"],
            base_model=config.pretrained_model_name_or_path,
            paper="https://arxiv.org/abs/2301.07969",
            notes=[
                f"Good at `num_inference_steps={steps}` with the scheduler as it is saved, only; the pipeline takes "
                "that by default and warns about others."
            ],
        )
