"""The recipe of image denoisers: pixel or latent space, with or without classes, any prediction type.

Methods that change one part of this inherit it and override that part.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from PIL import Image

from diffusers_ext.generation.latents import latent_factor, latent_moments, scaled_latents
from diffusers_ext.generation.pipeline import ImageGenerationPipeline
from diffusers_ext.hub.card import RepoCard

from .config import described, require
from .conservativity import predict_with_asymmetry
from .images import image_dataset
from .networks import make_network, sized_unet
from .noise import NoiseConfig, NoiseStrategy, offset_noise
from .objectives import EpsX0V, FlowMatching, Objective
from .pretrained import EDM_KINDS, check_inference_steps, converted, edm_objective, load_denoiser, loaded
from .recipe import Context, Modules, Recipe, Sample, StepOutput
from .timesteps import LogitNormalTimesteps, LogNormalLevels, Timesteps, UniformTimesteps

__all__ = ["DenoisingConfig", "DenoisingRecipe"]

FRAMEWORKS = {  # as a card says it
    "ddpm": "",
    "ncsn": " at NCSN's geometric levels",
    "vp": " at the times of a VP process",
    "ve": " at the times of a VE process",
    "subvp": " at the times of a sub-VP process",
}


@dataclass
class DenoisingConfig(NoiseConfig):
    """Arguments of image denoisers beside the engine's.

    Raises:
        ValueError: an argument is outside its range, or two contradict each other.
    """

    pretrained_model_name_or_path: str | None = described(
        "Pipeline to fine-tune, a Hub repo or a folder.", group="model"
    )
    unet_config: str | None = described(
        "JSON file of `UNet2DModel` arguments for training from scratch, or the name of a shipped one (unet_28); by "
        "default sized by the resolution.",
        group="model",
    )
    vae: str | None = described("`AutoencoderKL` repo or folder: train in its latent space.", group="model")
    class_conditional: bool = described("Train on class labels.", False)
    label_dropout: float = described("Probability of training a sample without its label, for guidance.", 0.1)
    prediction_type: Literal["epsilon", "v_prediction", "sample", "flow", "edm"] | None = described(
        "What the network predicts, edm: the clean sample, preconditioned; by default epsilon, or what the pretrained "
        "model predicts."
    )
    num_train_timesteps: int = described("Length of the noise schedule.", 1000)
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = described("Noise schedule.", "linear")
    beta_start: float = described("Its first beta (Stable Diffusion: 0.00085).", 0.0001)
    beta_end: float = described("Its last beta (Stable Diffusion: 0.012).", 0.02)
    rescale_betas_zero_snr: bool = described("Rescale the schedule to end in pure noise; needs v_prediction.", False)
    framework: Literal["ddpm", "ncsn", "vp", "ve", "subvp"] = described(
        "Noise levels that are learned, with epsilon, sample or v_prediction: the schedule's timesteps (ddpm), NCSN's "
        "geometric levels, or the times of a VP, VE or sub-VP process; the network is told fractions of a timestep.",
        "ddpm",
    )
    sigma_min: float | None = described("ncsn, ve: smallest level; by default 0.01, or the schedule's if larger.")
    sigma_max: float | None = described("ncsn, ve: largest level; by default the schedule's.")
    timestep_sampling: Literal["uniform", "logit_normal"] = described("Noise levels of flow matching.", "uniform")
    sigma_data: float = described("edm from scratch: standard deviation of the data.", 0.5)
    p_mean: float = described("edm: mean of the logarithm of the noise levels.", -1.2)
    p_std: float = described("edm: its standard deviation.", 1.2)
    snr_gamma: float | None = described("Min-SNR weighting with this bound (5 is usual); by default none.")
    conservativity_weight: float = described("Weight of a penalty on asymmetric Jacobians; 0 leaves it out.", 0.0)
    validation_inference_steps: int = described("Sampling steps of validation pictures.", 50)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pretrained_model_name_or_path is not None and self.unet_config is not None:
            raise ValueError("`unet_config` must be left out with `pretrained_model_name_or_path`: it brings its own.")
        if self.pretrained_model_name_or_path is not None and self.vae is not None:
            raise ValueError("`vae` must be left out with `pretrained_model_name_or_path`: it brings its own.")
        for name in ("num_train_timesteps", "validation_inference_steps"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "an integer >= 1")
        require(0 <= self.label_dropout < 1, "label_dropout", self.label_dropout, "a number in [0, 1)")
        weight = self.conservativity_weight
        require(weight >= 0, "conservativity_weight", weight, "a number >= 0")
        require(self.snr_gamma is None or self.snr_gamma > 0, "snr_gamma", self.snr_gamma, "a number > 0")
        require(0 < self.beta_start < 1, "beta_start", self.beta_start, "a number between 0 and 1")
        accepted = f"a number below 1 and not below `beta_start`, {self.beta_start}"
        require(self.beta_start <= self.beta_end < 1, "beta_end", self.beta_end, accepted)
        if self.rescale_betas_zero_snr:
            accepted = "'v_prediction' or 'sample' with `rescale_betas_zero_snr`: pure noise says nothing of its noise"
            require(
                self.prediction_type in ("v_prediction", "sample"), "prediction_type", self.prediction_type, accepted
            )
        self._check_framework()
        for name in ("sigma_data", "p_std"):
            require(getattr(self, name) > 0, name, getattr(self, name), "a number > 0")
        if self.prediction_type in ("flow", "edm") and self.snr_gamma is not None:
            kind = self.prediction_type
            raise ValueError(
                f"`snr_gamma` must be left out with `prediction_type={kind!r}`: it has no such weighting."
            )
        if self.timestep_sampling != "uniform" and self.prediction_type not in ("flow", None):
            raise ValueError(
                "`timestep_sampling` must be 'uniform' unless `prediction_type` is 'flow', got "
                f"{self.timestep_sampling!r} and {self.prediction_type!r}."
            )

    def _check_framework(self) -> None:
        framework, kinds = self.framework, (None, "epsilon", "sample", "v_prediction")
        if framework != "ddpm":
            accepted = f"'epsilon', 'sample' or 'v_prediction' with `framework={framework!r}`"
            require(self.prediction_type in kinds, "prediction_type", self.prediction_type, accepted)
            accepted = f"False with `framework={framework!r}`: its levels are finite"
            require(not self.rescale_betas_zero_snr, "rescale_betas_zero_snr", True, accepted)
        for name in ("sigma_min", "sigma_max"):
            value = getattr(self, name)
            accepted = "left out unless `framework` is 'ncsn' or 've', and then a number > 0"
            require(value is None or (framework in ("ncsn", "ve") and value > 0), name, value, accepted)


ConfigT = TypeVar("ConfigT", bound=DenoisingConfig)


class DenoisingRecipe(Recipe[ConfigT], Generic[ConfigT]):
    """Trains a `UNet2DModel` from scratch, or the UNet of a Diffusers pipeline, and saves `ImageGenerationPipeline`.

    Attributes:
        noise: the noise strategy.
        timesteps: how timesteps are drawn.
        objective: inputs, targets and loss.
        image_scale: what images (or latents) are multiplied by before they are diffused.
    """

    Config = DenoisingConfig
    image_scale: float = 1.0
    noise: NoiseStrategy
    timesteps: Timesteps
    objective: Objective

    def dataset(self, ctx: Context[ConfigT]) -> Any:
        """Loads the images; see `load_images`."""
        config = self.config
        data = image_dataset(config, verify=ctx.accelerator.is_main_process)
        if config.class_conditional and not data.num_classes:
            raise ValueError(
                f"`label_column` must name a column of class labels for `class_conditional`, got "
                f"{config.label_column!r}; the data has {data.column_names}."
            )
        self.data = data
        return data

    # -- modules ---------------------------------------------------------------------------------------------------

    def setup(self, ctx: Context[ConfigT]) -> Modules:
        """Makes the modules from scratch or takes them from the pretrained pipeline."""
        config = self.config
        if config.pretrained_model_name_or_path is not None:
            unet, scheduler, vae = self._pretrained(config.pretrained_model_name_or_path)
        else:
            vae = loaded("vae", AutoencoderKL, config.vae) if config.vae else None
            unet, scheduler = self._new_unet(vae), self._new_scheduler()
        self._check_size(unet, vae)
        self.noise = config.make_noise()
        schedule: Any = scheduler.config
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            self.objective = FlowMatching(schedule.num_train_timesteps)
            logit_normal = config.timestep_sampling == "logit_normal"
            self.timesteps = LogitNormalTimesteps() if logit_normal else UniformTimesteps(None)
        elif isinstance(scheduler, EDM_KINDS):
            self.objective = edm_objective(scheduler)
            self.timesteps = LogNormalLevels(config.p_mean, config.p_std)
        else:
            length = schedule.num_train_timesteps
            weighting = "none" if config.snr_gamma is None else "min_snr"
            self.objective = EpsX0V(scheduler, weighting, config.snr_gamma or 5.0)
            self.timesteps = UniformTimesteps(length)
            if config.framework != "ddpm":
                self.timesteps = self._framework_timesteps(scheduler, unet)
        if config.num_validation_images:
            check_inference_steps(scheduler, "validation_inference_steps", config.validation_inference_steps)
        return Modules(unet, scheduler, {} if vae is None else {"vae": vae})

    def _framework_timesteps(self, scheduler: Any, unet: Any) -> Timesteps:
        kind = importlib.import_module("diffusers_ext").FrameworkTimesteps
        size = unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        config = self.config
        return kind(
            config.framework,
            scheduler.alphas_cumprod,
            dimension=unet.config.in_channels * height * width,
            sigma_min=config.sigma_min,
            sigma_max=config.sigma_max,
        )

    def _pretrained(self, name: str) -> tuple[Any, Any, Any]:
        denoiser = load_denoiser(name, edm=True)
        unet, scheduler = denoiser.unet, denoiser.scheduler
        flow, edm = isinstance(scheduler, FlowMatchEulerDiscreteScheduler), isinstance(scheduler, EDM_KINDS)
        accepted = f"'ddpm' for {name!r}, which has no schedule of betas"
        require(self.config.framework == "ddpm" or not (flow or edm), "framework", self.config.framework, accepted)
        found = "flow" if flow else "edm" if edm else scheduler.config.prediction_type
        asked, rescaled = self.config.prediction_type, self.config.rescale_betas_zero_snr
        if not rescaled:  # which is another objective on purpose
            accepted = f"{found!r}, as {name!r} was trained, or left out"
            require(asked in (None, found), "prediction_type", asked, accepted)
        elif flow or edm:
            kind = "flow matching" if flow else "EDM"
            raise ValueError(f"`rescale_betas_zero_snr` must be False for {name!r}: {kind} has no betas.")
        scale = denoiser.image_scale
        require(self.image_scale in (1.0, scale), "image_scale", self.image_scale, f"{scale}, as {name!r} was trained")
        self.image_scale = scale
        self.null_class_label = denoiser.null_class_label
        classes = bool(denoiser.num_classes)
        conditional = self.config.class_conditional
        require(classes == conditional, "class_conditional", conditional, f"{classes} as in {name!r}")
        if rescaled:
            changed = {"prediction_type": asked, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
            scheduler = converted(DDIMScheduler, scheduler, **changed, clip_sample=False)
        elif not flow and not edm and not isinstance(scheduler, DDIMScheduler):
            scheduler = converted(DDIMScheduler, scheduler)
        return unet, scheduler, denoiser.vae

    def _new_unet(self, vae: Any) -> UNet2DModel:
        config = self.config
        channels, size = config.channels, config.resolution
        if vae is not None:
            channels, size = vae.config.latent_channels, size // latent_factor(vae)
        fixed: dict[str, Any] = {"in_channels": channels, "out_channels": channels, "sample_size": size}
        self.null_class_label = self.data.num_classes if config.class_conditional else None
        if self.null_class_label is not None:
            fixed["num_class_embeds"] = self.null_class_label + 1
        self.size_advice = "--unet_config chooses another network"
        return make_network(UNet2DModel, "unet_config", config.unet_config, fixed, default=sized_unet(size))

    def _new_scheduler(self) -> Any:
        config = self.config
        if config.prediction_type == "flow":
            return FlowMatchEulerDiscreteScheduler(num_train_timesteps=config.num_train_timesteps)
        if config.prediction_type == "edm":
            return EDMEulerScheduler(sigma_data=config.sigma_data)
        return DDIMScheduler(
            num_train_timesteps=config.num_train_timesteps,
            beta_schedule=config.beta_schedule,
            beta_start=config.beta_start,
            beta_end=config.beta_end,
            rescale_betas_zero_snr=config.rescale_betas_zero_snr,
            prediction_type=config.prediction_type or "epsilon",
            # DDIM would clip its estimate of the sample but not the noise that goes with it: worse with every step.
            clip_sample=False,
            # Other spacings start sampling below the noise level that the first latents have.
            timestep_spacing="trailing",
        )

    def _check_size(self, unet: Any, vae: Any) -> None:
        factor = latent_factor(vae) * 2 ** (len(unet.config.block_out_channels) - 1)
        resolution = self.config.resolution
        require(
            resolution % factor == 0,
            "resolution",
            resolution,
            f"a multiple of {factor}: the networks halve it that often",
        )
        channels = vae.config.in_channels if vae is not None else unet.config.in_channels
        require(self.config.channels == channels, "channels", self.config.channels, f"{channels}, as the model takes")

    # -- training --------------------------------------------------------------------------------------------------

    def encode(self, batch: dict[str, Any], ctx: Context[ConfigT]) -> Sample:
        """Brings a batch into the space that is diffused.

        Args:
            batch: `pixel_values` `(batch, channels, height, width)` in `[-1, 1]`, and `label` `(batch,)`.
            ctx: the run.

        Returns:
            Scaled pixels or latents, and the labels, some dropped, as the network's argument.
        """
        x0 = batch["pixel_values"]
        vae = ctx.modules.frozen.get("vae")
        if vae is not None:
            mean, std = latent_moments(vae, x0, ctx.weight_dtype)
            x0 = scaled_latents(vae, mean + std * ctx.rng.randn_like(mean, ctx.ids, stream="latents"))
        x0 = x0 * self.image_scale if self.image_scale != 1.0 else x0
        if not self.config.class_conditional:
            return Sample(x0, labels=batch.get("label"))
        labels = batch["label"]
        given = labels
        if self.null_class_label is not None and self.config.label_dropout:
            drop = ctx.rng.rand(len(labels), ctx.ids, stream="labels", device=labels.device)
            given = torch.where(drop < self.config.label_dropout, self.null_class_label, labels)
        return Sample(x0, {"class_labels": given}, labels)

    def draw_noise(self, sample: Sample, ctx: Context[ConfigT]) -> torch.Tensor:
        """Draws the noise of a batch: the strategy's, then the offset on top."""
        noise = self.noise(sample.x0, rng=ctx.rng, ids=ctx.ids, labels=sample.labels, accelerator=ctx.accelerator)
        return offset_noise(noise, self.config.noise_offset, ctx.rng, ctx.ids) if self.config.noise_offset else noise

    def training_step(self, batch: dict[str, Any], ctx: Context[ConfigT]) -> StepOutput:
        """Noises, predicts and compares."""
        with torch.no_grad():
            sample = self.encode(batch, ctx)
            noise = self.draw_noise(sample, ctx)
            t = self.timesteps(len(noise), ctx.rng, ctx.ids, noise.device)
            noisy, target = self.objective.make(sample.x0, noise, t)

        def predict(x: torch.Tensor) -> torch.Tensor:
            return ctx.model(x, self.objective.model_timesteps(t), **sample.cond, return_dict=False)[0]

        logs = self.noise_logs(sample, noise)
        weight = self.config.conservativity_weight
        if not weight:
            return StepOutput(self.objective.loss(predict(noisy), target, t), logs)
        probes = ctx.rng.randn_like(torch.stack([noisy, noisy], 1), ctx.ids, stream="probes")
        prediction, asymmetry = predict_with_asymmetry(predict, noisy, probes)
        loss = self.objective.loss(prediction, target, t) + weight * asymmetry
        return StepOutput(loss, {**logs, "asymmetry": asymmetry.detach()})

    def noise_logs(self, sample: Sample, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns what to log about the noise of a batch, as scalars; here nothing."""
        return {}

    # -- results ---------------------------------------------------------------------------------------------------

    def pipeline(self, modules: Modules) -> ImageGenerationPipeline:
        """Returns an `ImageGenerationPipeline` of the modules."""
        return ImageGenerationPipeline(
            modules.trainable,
            modules.scheduler,
            modules.frozen.get("vae"),
            image_scale=self.image_scale,
            null_class_label=self.null_class_label,
        )

    def validate(self, pipeline: DiffusionPipeline, generator: torch.Generator) -> list[Image.Image]:
        """Draws pictures; of a class-conditional model, the classes in turn."""
        n = self.config.num_validation_images
        what: dict[str, Any] = {"batch_size": n}
        if self.config.class_conditional:
            what = {"class_labels": [i % self.data.num_classes for i in range(n)]}
        steps = self.config.validation_inference_steps
        return pipeline(**what, num_inference_steps=steps, generator=generator).images  # type: ignore[operator]

    def card(self) -> RepoCard:
        """Returns the card of a denoiser."""
        config = self.config
        objective = self.objective
        names = {"epsilon": "the noise", "v_prediction": "v", "sample": "the clean image"}
        kind = "the flow's velocity" if isinstance(objective, FlowMatching) else "EDM's preconditioned image"
        kind = names[objective.prediction_type] if isinstance(objective, EpsX0V) else kind
        return RepoCard(
            method="Image flow matching" if isinstance(objective, FlowMatching) else "Image diffusion",
            description=f"Generates images of {config.resolution}x{config.resolution} pixels. Its UNet predicts "
            f"{kind} and was trained with {config.noise} noise{FRAMEWORKS[config.framework]}.",
            data=self.data.description,
            tags=["diffusers-ext", "unconditional-image-generation"],
            base_model=config.pretrained_model_name_or_path,
        )
