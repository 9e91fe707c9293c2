"""Training the score of noisy images by AR-DAE, without a clean image, through the engine."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline, UNet2DModel
from PIL import Image

from diffusers_ext.data.sources import load_images
from diffusers_ext.hub.card import RepoCard
from diffusers_ext.training.config import described, require
from diffusers_ext.training.images import ExactImageArguments, ImageConfig, image_dataset
from diffusers_ext.training.networks import make_network, sized_unet
from diffusers_ext.training.recipe import Context, Modules, Recipe, StepOutput

from .ar_dae import annealed_smoothing, ar_dae_loss, estimate_noise_std
from .images import as_output
from .networks import Noise2ScoreConvNet, Noise2ScoreUNet
from .noises import AdditiveGaussianNoise, ExponentialNoise, GammaNoise, NoiseModel, PoissonGaussianNoise, PoissonNoise
from .pipeline import Noise2ScorePipeline
from .tweedie import posterior_mean

__all__ = ["Noise2ScoreConfig", "Noise2ScoreRecipe"]

NETWORKS = {"unet": Noise2ScoreUNet, "conv": Noise2ScoreConvNet, "unet2d": UNet2DModel}
SHARE = 0.3  # of the noise's deviation: more smoothing blurs the score, less makes its target noisier

SNIPPET = """import diffusers_ext  # pip install diffusers-ext
from diffusers import DiffusionPipeline
from PIL import Image

pipeline = DiffusionPipeline.from_pretrained("{repo_id}")
pipeline(Image.open("noisy.tif"), ARGUMENTS).images[0].save("clean.png")"""


@dataclass
class Noise2ScoreConfig(ExactImageArguments, ImageConfig):
    """Arguments of Noise2Score's training.

    The images are noisy as they are, unless `parameter_range` says that they are clean and are to be made noisy.

    Raises:
        ValueError: an argument is outside its range, or two contradict each other.
    """

    noise: Literal["gaussian", "poisson", "poisson_gaussian", "gamma", "exponential"] = described(
        "Family of the images' noise, which says in which units the score is learned.", "gaussian"
    )
    noise_parameter: float | None = described(
        "Its parameter in units in which images lie in [0, 1]: sigma, the value of one count, or the shape; only "
        "Poisson noise needs it in training, the others for pictures."
    )
    read_std: float | None = described("poisson_gaussian: standard deviation of the read noise, for pictures.")
    parameter_range: str | None = described(
        "Two parameters, such as '0.08,0.22': the images are clean, and each batch gets new noise with a parameter "
        "between them (blind training)."
    )
    domain: Literal["log", "linear"] = described("Where gamma and exponential noise are learned.", "log")
    sigma_max: float | None = described(
        "Smoothing at the beginning, in the score's units; by default 1.5 counts for poisson, else 0.3 times the "
        "noise's deviation, which is estimated."
    )
    sigma_min: float | None = described("Smoothing in the end; by default 1 count for poisson, else as `sigma_max`.")
    annealing_samples: int = described("Samples over which the smoothing goes from the one to the other.", 10_000)
    network: Literal["unet", "conv", "unet2d"] = described(
        "The paper's U-Net, a small convolutional network, or a UNet2DModel.", "unet", group="model"
    )
    unet_config: str | None = described("JSON file of the network's arguments.", group="model")
    validation_data_dir: str | None = described(
        "Held-out images, noisy as those for training; by default the first ones of these.", group="data"
    )
    resolution: int = described("Side of the patches that are cut out of the images, which are never resized.", 128)
    random_flip: bool = described("Mirror half of the images.", True)
    train_batch_size: int = described("Samples per process and micro-step.", 8)
    learning_rate: float = described("Peak learning rate.", 2e-4)
    adam_beta1: float = described("beta1 of adamw, adamw8bit and prodigy; the momentum of sgd.", 0.5)
    adam_weight_decay: float = described("Weight decay.", 0.0)
    num_validation_images: int = described("How many images to denoise for the pictures and the held-out loss.", 4)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.sigma_column is None, "sigma_column", self.sigma_column, "left out: all images have one noise")
        require(self.annealing_samples >= 0, "annealing_samples", self.annealing_samples, "an integer >= 0")
        require(not self.streaming, "streaming", self.streaming, "False: the noise is estimated from the images first")
        for name in ("sigma_max", "sigma_min", "read_std"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "a number > 0 or left out")
        if self.sigma_max is not None and self.sigma_min is not None:
            accepted = f"at most `sigma_max`, {self.sigma_max}"
            require(self.sigma_min <= self.sigma_max, "sigma_min", self.sigma_min, accepted)
        if self.parameter_range is not None:
            blind = self.noise in ("gaussian", "poisson", "gamma")
            require(blind, "noise", self.noise, "'gaussian', 'poisson' or 'gamma' with `parameter_range`")
            require(self.noise_parameter is None, "noise_parameter", self.noise_parameter, "left out with a range")
            for end in self.parameters() or ():
                self.make_noise(end)
        elif self.noise == "poisson" or self.noise_parameter is not None:
            self.make_noise(self.noise_parameter)
        self.exact_options()

    def parameters(self) -> tuple[float, float] | None:
        """Returns the two numbers of `parameter_range`.

        Raises:
            ValueError: they are no two rising numbers above 0.
        """
        if self.parameter_range is None:
            return None
        try:
            low, high = (float(word) for word in self.parameter_range.split(","))
        except ValueError:
            low, high = 0.0, 0.0
        accepted = "two numbers above 0 with a comma between them, not falling"
        require(0 < low <= high, "parameter_range", self.parameter_range, accepted)
        return low, high

    def make_noise(self, parameter: float | None) -> NoiseModel:
        """Makes the noise of the family.

        Raises:
            ValueError: the parameter is missing or not one of the family.
        """
        if self.noise == "exponential":
            return ExponentialNoise(self.domain)
        require(parameter is not None, "noise_parameter", parameter, f"given for {self.noise} noise")
        assert parameter is not None
        if self.noise == "poisson_gaussian":
            require(self.read_std is not None, "read_std", None, "given with `noise_parameter` for poisson_gaussian")
            assert self.read_std is not None
            return PoissonGaussianNoise(parameter, self.read_std)
        if self.noise == "gamma":
            return GammaNoise(parameter, self.domain)
        return (PoissonNoise if self.noise == "poisson" else AdditiveGaussianNoise)(parameter)


class Noise2ScoreRecipe(Recipe[Noise2ScoreConfig]):
    """Noise2Score (arXiv 2106.07009): the score of noisy images, learned from them alone; saves a pipeline.

    Each step calls the network once. Validation takes the loss at the last smoothing on held-out noisy images, and
    PSNR only where `parameter_range` says that the images are clean; both are written to `validation.jsonl`.

    Attributes:
        smoothing: at the beginning and in the end.
        noise_model: as the pictures and the units of the score take it.

    Example:
        >>> from diffusers_ext import Noise2ScoreConfig, Noise2ScoreRecipe, Trainer
        >>> config = Noise2ScoreConfig(train_data_dir="noisy", noise="gaussian", channels=1, max_train_steps=10_000)
        >>> Trainer(config, Noise2ScoreRecipe(config)).train()  # doctest: +SKIP
    """

    Config = Noise2ScoreConfig
    smoothing: tuple[float, float]
    noise_model: NoiseModel

    def dataset(self, ctx: Context[Noise2ScoreConfig]) -> Any:
        """Loads the images as they are, and reads off some of them how strong their noise is."""
        config = self.config
        self.data = data = image_dataset(config, verify=ctx.accelerator.is_main_process, **config.exact_options())
        held_out = data
        if config.validation_data_dir is not None:
            held_out = load_images(
                train_data_dir=config.validation_data_dir,
                image_column=config.image_column,
                resolution=config.resolution,
                center_crop=True,
                channels=config.channels,
                **config.exact_options(),
            )
        self.held_out = _unit(_first(held_out, max(config.num_validation_images, 1)))
        self._measure(_unit(_first(data, 16)))
        return data

    def _measure(self, y: torch.Tensor) -> None:
        """Fixes noise, smoothing and scales from some images."""
        config = self.config
        ends = config.parameters()
        self.corrupts = ends is not None
        parameter = config.noise_parameter if ends is None else math.sqrt(ends[0] * ends[1])
        if parameter is not None or config.noise == "exponential":
            self.noise_model = config.make_noise(parameter)
        else:  # the parameter is not known, nor needed for the units
            self.noise_model = (
                GammaNoise(2.0, config.domain) if config.noise == "gamma" else AdditiveGaussianNoise(1.0)
            )
        if ends is not None:
            y = self.noise_model.corrupt(y, torch.Generator().manual_seed(0))
        self.noise_model.check(y, "train_data_dir")
        std = estimate_noise_std(self.noise_model.score_input(y))
        require(std > 0, "train_data_dir", config.train_data_dir or config.dataset_name, "a set of noisy images")
        if parameter is None and config.noise == "gamma":
            self.noise_model = GammaNoise(max(1 / std**2, 1.1), config.domain)
        elif parameter is None and config.noise == "gaussian":
            self.noise_model = AdditiveGaussianNoise(std)
        defaults = (1.5, 1.0) if config.noise == "poisson" else (SHARE * std, SHARE * std)
        start = config.sigma_max or max(defaults[0], config.sigma_min or 0.0)
        self.smoothing = start, config.sigma_min or min(defaults[1], start)
        self.scales = {
            "input_scale": self.noise_model.scale if isinstance(self.noise_model, PoissonNoise) else 1.0,
            "score_scale": 1 / math.hypot(std, self.smoothing[1]),
        }

    def setup(self, ctx: Context[Noise2ScoreConfig]) -> Modules:
        """Makes the network."""
        config, self.ctx = self.config, ctx
        fixed: dict[str, Any] = {"in_channels": config.channels, "out_channels": config.channels}
        default: dict[str, Any] = {}
        if config.network == "unet2d":
            fixed["sample_size"], default = config.resolution, sized_unet(config.resolution)
        else:
            fixed |= {**self.scales, "smoothing": self.smoothing[1]}
        self.size_advice = "--network and --unet_config choose another network"
        kind = NETWORKS[config.network]
        return Modules(make_network(kind, "unet_config", config.unet_config, fixed, default=default), None)

    def training_step(self, batch: dict[str, Any], ctx: Context[Noise2ScoreConfig]) -> StepOutput:
        """The AR-DAE loss of a batch of noisy images."""
        smoothing = annealed_smoothing(ctx.ids[0], *self.smoothing, self.config.annealing_samples)
        with torch.no_grad():
            y, noise = _unit(batch["pixel_values"]), self.noise_model
            ends = self.config.parameters()
            if ends is not None:
                share = float(ctx.rng.rand(1, stream="labels"))
                noise = self.config.make_noise(ends[0] ** (1 - share) * ends[1] ** share)
                y = noise.corrupt(y.clamp_min(0), ctx.rng.generator("latents", y.device))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of values that are 0; the set-up has said so
                v = noise.score_input(y)
            u = ctx.rng.randn_like(v, ctx.ids)
        loss = ar_dae_loss(lambda x: self.score(ctx.model, x, smoothing).float(), v, u, smoothing)
        return StepOutput(loss, {"smoothing": torch.tensor(smoothing, device=loss.device)})

    def score(self, model: Any, v: torch.Tensor, smoothing: float) -> torch.Tensor:
        """Calls the network, whichever it is."""
        if self.config.network == "unet2d":
            return model(v * self.scales["input_scale"], 0, return_dict=False)[0] * self.scales["score_scale"]
        return model(v, smoothing, return_dict=False)[0]

    # -- results ---------------------------------------------------------------------------------------------------

    def pipeline(self, modules: Modules) -> Noise2ScorePipeline:
        """Returns the pipeline of the network."""
        own = {} if self.config.network != "unet2d" else {**self.scales, "smoothing": self.smoothing[1]}
        return Noise2ScorePipeline(modules.trainable, self.config.noise, self.config.domain, **own)

    @torch.no_grad()
    def held_out_figures(self, pipeline: Any, generator: torch.Generator) -> tuple[dict[str, float], list[Any]]:
        """Returns the loss on the held-out images, PSNR if they are clean, and (noisy, denoised) images."""
        clean = y = self.held_out
        if self.corrupts:
            y = self.noise_model.corrupt(clean.clamp_min(0), generator)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an untrained score may not fit the noise
            v, device = self.noise_model.score_input(y), pipeline.device
            u = torch.randn(v.shape, generator=generator)
            last = self.smoothing[1]

            def score(x: torch.Tensor) -> torch.Tensor:
                return self.score(pipeline.unet, x.to(device, pipeline.unet.dtype), last).float().cpu()

            figures = {"score_loss": float(ar_dae_loss(score, v, u, last))}
            known = self.config.noise != "poisson_gaussian" or self.config.noise_parameter is not None
            denoised = posterior_mean(y, score, self.noise_model, last) if known else y
        if self.corrupts:
            error = (denoised.clamp(0, 1) - clean).square().mean((1, 2, 3))
            figures["psnr"] = float((-10 * error.log10()).mean())
        return figures, [y, denoised]

    def validate(self, pipeline: DiffusionPipeline, generator: torch.Generator) -> list[Image.Image]:
        """Writes the held-out figures down, and returns noisy images and below them the denoised ones."""
        figures, (noisy, denoised) = self.held_out_figures(pipeline, generator)
        line = json.dumps({"step": self.ctx.step + 1, **figures})
        with (Path(self.config.output_dir) / "validation.jsonl").open("a") as file:
            file.write(line + "\n")
        self.ctx.accelerator.log({f"validation_{name}": value for name, value in figures.items()}, self.ctx.step + 1)
        return as_output([*noisy, *denoised], "pil")

    def save(self, pipeline: DiffusionPipeline, folder: str, card: RepoCard, sample: Image.Image | None) -> None:
        """Writes the pipeline, with the held-out figures in its card."""
        figures, _ = self.held_out_figures(pipeline, torch.Generator().manual_seed(0))
        names = {"score_loss": "held-out AR-DAE loss", "psnr": "held-out PSNR, dB"}
        card.results |= {names[name]: value for name, value in figures.items()}
        super().save(pipeline, folder, card, sample)

    def card(self) -> RepoCard:
        """Returns the card of a denoiser."""
        config = self.config
        example = {
            "gaussian": "noise_parameter=25 / 255",
            "poisson": f"noise_parameter={config.noise_parameter or 0.01}",
            "poisson_gaussian": "noise_parameter=(0.01, 0.02)",
            "gamma": "noise_parameter=100",
            "exponential": "noise='exponential'",
        }[config.noise]
        learned = f"learned the score of images with noise of {config.parameter_range} that was added to clean ones"
        if not self.corrupts:
            learned = "learned the score of noisy images and has seen no clean one"
        return RepoCard(
            method="Noise2Score",
            description=f"Denoises images with {config.noise.replace('_', '-')} noise in one network call: the "
            f"network {learned}.",
            data=self.data.description,
            tags=["diffusers-ext", "image-denoising"],
            paper="https://arxiv.org/abs/2106.07009",
            snippet=SNIPPET.replace("ARGUMENTS", example),
            pipeline_tag="image-to-image",
        )


def _first(data: Any, count: int) -> torch.Tensor:
    """Returns the first samples of a data set, at places that are always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([data.get(i % len(data), generator)["pixel_values"] for i in range(count)])


def _unit(pixels: torch.Tensor) -> torch.Tensor:
    """Brings pixels from [-1, 1] to the [0, 1] of the formulas; noise may leave both."""
    return (pixels + 1) / 2
