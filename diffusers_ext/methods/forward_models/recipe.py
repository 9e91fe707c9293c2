"""Training a diffusion model of signals from observations of them, through the engine."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DModel
from PIL import Image

import diffusers_ext
from diffusers_ext.hub.card import RepoCard
from diffusers_ext.training.config import require
from diffusers_ext.training.images import image_dataset
from diffusers_ext.training.networks import make_network, sized_unet
from diffusers_ext.training.objectives import EpsX0V
from diffusers_ext.training.recipe import Context, Modules, Recipe, StepOutput
from diffusers_ext.training.timesteps import UniformTimesteps

from .arguments import ForwardModelConfig
from .data import ObservationDataset, SimulatedObservations
from .denoiser import input_channels, lift_views, lifted_input
from .networks import ObservationMLP
from .objective import batch_and_views, forward_model_loss
from .pictures import pictures
from .pipeline import ForwardModelPipeline
from .protocol import ForwardModel, Parameters, check_differentiable, map_parameters

__all__ = ["ForwardModelRecipe"]

SNIPPET = """import diffusers_ext  # pip install diffusers-ext
from diffusers import DiffusionPipeline

LOAD
# yours: observations (batch, views, ...) and the parameters of each of them
signals = pipeline(observations, parameters, num_samples=4, eta=1.0).signals"""
LOAD = 'pipeline = DiffusionPipeline.from_pretrained("{repo_id}")'
LOAD_OWN = """# KIND: the forward model's class, which the author of this repo wrote
forward_model = KIND.from_pretrained("{repo_id}", subfolder="forward_model")
pipeline = DiffusionPipeline.from_pretrained("{repo_id}", forward_model=forward_model)"""


class ForwardModelRecipe(Recipe[ForwardModelConfig]):
    """Diffusion with forward models (2306.11719): a model of signals that were never observed directly.

    Each sample's observations are dealt out anew in every step: some are the context, one or more are noised and
    denoised, and one that the network is not shown is compared too.

    Args:
        config: the arguments.
        forward_model: an own one, instead of that which `config.forward_model` names.

    Example:
        >>> from diffusers_ext import CropForwardModel, ForwardModelConfig, ForwardModelRecipe, Trainer
        >>> config = ForwardModelConfig(train_data_dir="crops.npz", signal_shape="1,32,32", max_train_steps=10_000)
        >>> recipe = ForwardModelRecipe(config, CropForwardModel(size=16, sample_size=32))
        >>> Trainer(config, recipe).train()  # doctest: +SKIP
    """

    Config = ForwardModelConfig
    sample_name = "signals"
    data: Any

    def __init__(self, config: ForwardModelConfig, forward_model: ForwardModel | None = None) -> None:
        super().__init__(config)
        if (forward_model is None) == (config.forward_model is None):
            raise ValueError(
                "`forward_model` must be given once, by name or folder, or one of your own as "
                f"`ForwardModelRecipe(config, forward_model)`, got {config.forward_model!r} and "
                f"{type(forward_model).__name__}."
            )
        accepted = "a ForwardModel, or left out"
        good = isinstance(forward_model, ForwardModel | None)
        require(good, "forward_model", type(forward_model).__name__, accepted)
        self.forward_model = self._named() if forward_model is None else forward_model
        self.signal_shape, self.signal_range = config.shape(), config.range()

    def _named(self) -> Any:
        """Loads or makes the forward model that the arguments name."""
        config, name = self.config, str(self.config.forward_model)
        folder = Path(name)
        if (folder / "config.json").is_file():
            require(config.forward_model_config is None, "forward_model_config", config.forward_model_config,
                    "left out with a saved forward model")  # fmt: skip
            name = json.loads((folder / "config.json").read_text()).get("_class_name", "")
            accepted = "of this package, or handed over in Python, `ForwardModelRecipe(config, forward_model)`"
            require(name in diffusers_ext.__all__, "forward_model", f"{folder} with {name}", accepted)
        kind = getattr(diffusers_ext, name, None) if name in diffusers_ext.__all__ else None
        accepted = "the folder of a saved forward model, or a shipped one such as 'CropForwardModel'"
        good = isinstance(kind, type) and issubclass(kind, ForwardModel) and kind is not ForwardModel
        require(good, "forward_model", config.forward_model, accepted)
        if folder.is_dir():
            return kind.from_pretrained(folder)  # type: ignore[union-attr]
        return make_network(kind, "forward_model_config", config.forward_model_config, {}, {})  # type: ignore[arg-type]

    def dataset(self, ctx: Context[ForwardModelConfig]) -> Any:
        """Loads the observations, or the images of which they are made."""
        config = self.config
        if config.simulated_views is not None:
            images = image_dataset(config, verify=ctx.accelerator.is_main_process)
            views, ends = config.simulated_views, self.signal_range or (-1.0, 1.0)
            # Workers read the data, beside the copy that is trained with.
            own = copy.deepcopy(self.forward_model).cpu()
            self.data = SimulatedObservations(images, own, views, ends, config.seed)
        else:
            source, name = config.train_data_dir or config.dataset_name, config.dataset_config_name
            there = config.train_data_dir is None or Path(config.train_data_dir).exists()
            require(there, "train_data_dir", config.train_data_dir, "an existing file or folder")
            self.data = ObservationDataset(str(source), name, max_samples=config.max_train_samples)
            parameters = map_parameters(lambda value: value.flatten(0, 1), self.data.parameters)
            self.forward_model.check_parameters(parameters)
        self._check_data()
        return self.data

    def _check_data(self) -> None:
        config, item = self.config, self.data[0]
        views, needed = len(item["observations"]), config.views_needed
        if views < needed:
            raise ValueError(
                f"`train_data_dir` must hold at least {needed} observations of each signal, got {views}: "
                f"{config.max_context_views} for the context, {config.num_targets} to be noised and "
                f"{int(config.novel_weight > 0)} that is not shown (`max_context_views`, `num_targets`, "
                "`novel_weight`)."
            )
        self.observation_shape = tuple(item["observations"].shape[1:])
        seen = self.forward_model.observation_shape(self.signal_shape, item["parameters"])
        name = type(self.forward_model).__name__
        accepted = f"of shape (n, views, {', '.join(map(str, seen))}), what {name} sees of signals {self.signal_shape}"
        require(self.observation_shape == seen, "observations", self.observation_shape, accepted)

    def setup(self, ctx: Context[ForwardModelConfig]) -> Modules:
        """Makes the network, and makes sure that signals can be learned through the forward model."""
        config = self.config
        parameters = self.data[0]["parameters"]
        self.forward_model.requires_grad_(False).eval().to(ctx.accelerator.device)
        generator = torch.Generator().manual_seed(0)
        ends = self.signal_range or (-1.0, 1.0)
        check_differentiable(self.forward_model, self.signal_shape, parameters, ends, generator)
        scheduler = DDIMScheduler(
            num_train_timesteps=config.num_train_timesteps,
            beta_schedule="squaredcos_cap_v2",
            prediction_type="sample",
            clip_sample=False,
            timestep_spacing="trailing",
        )
        self.objective = EpsX0V(scheduler)
        self.timesteps = UniformTimesteps(config.num_train_timesteps)
        self.size_advice = "--unet_config chooses another network"
        return Modules(self._network(parameters), scheduler)

    def _network(self, parameters: Parameters) -> Any:
        config, shape = self.config, self.signal_shape
        if config.network == "mlp":
            fixed: dict[str, Any] = {
                "signal_shape": shape,
                "observation_shape": self.observation_shape,
                "signal_range": self.signal_range,
            }
            parts = [parameters] if isinstance(parameters, torch.Tensor) else parameters.values()
            default = {"parameter_size": sum(part[0].numel() for part in parts)}
            return make_network(ObservationMLP, "unet_config", config.unet_config, fixed, default)
        require(len(shape) == 3, "network", config.network, f"'mlp' for signals that are no images, of shape {shape}")
        channels = input_channels(shape, self.forward_model, parameters)
        fixed = {"in_channels": channels, "out_channels": shape[0], "sample_size": shape[1:]}
        unet = make_network(UNet2DModel, "unet_config", config.unet_config, fixed, sized_unet(max(shape[1:])))
        factor = 2 ** (len(unet.config["block_out_channels"]) - 1)
        fits = all(size % factor == 0 for size in shape[1:])
        require(fits, "signal_shape", shape, f"of multiples of {factor}: the network halves them that often")
        return unet

    # -- training --------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], ctx: Context[ForwardModelConfig]) -> StepOutput:
        """Deals out the observations, noises the targets, and compares what is seen of the network's signals."""
        config, network = self.config, ctx.modules.trainable
        contexts, targets, count = config.max_context_views, config.num_targets, int(config.novel_weight > 0)
        with torch.no_grad():
            some, noised, novel = self._dealt(batch, (contexts, targets, count), ctx)
            b, device = len(noised[0]), noised[0].device
            t = self.timesteps(b, ctx.rng, ctx.ids, device)
            noise = ctx.rng.randn_like(noised[0], ctx.ids)
            noisy, _ = self.objective.make(config.observation_scale * noised[0], noise, t)
            weights = torch.ones(b, targets, device=device)
            if config.regression:
                t = torch.full_like(t, config.num_train_timesteps - 1)
                shown = torch.zeros_like(weights)
            else:
                if targets > 1:
                    weights = _first(ctx.rng.randint(targets, b, ctx.ids, "labels", device) + 1, targets)
                shown = weights
            lifted = lift_views(network, self.forward_model, noisy, noised[1], shown)
            inputs = lifted_input(lifted, self._context(some, network, ctx) if contexts else None)
        signal = ctx.model(inputs, t, return_dict=False)[0]
        loss = forward_model_loss(
            signal, self.forward_model, *noised, *(novel if count else (None, None)),
            novel_weight=config.novel_weight, target_weights=weights if targets > 1 else None,
        )  # fmt: skip
        return StepOutput(loss)

    def _dealt(
        self, batch: dict[str, Any], counts: tuple[int, ...], ctx: Context[ForwardModelConfig]
    ) -> list[tuple[torch.Tensor, Any]]:
        """Returns groups of different observations of each sample, with their parameters."""
        seen, parameters = batch["observations"], batch["parameters"]
        keys = ctx.rng.randn_like(seen.flatten(2)[:, :, 0], ctx.ids, stream="augmentation")
        order = keys.argsort(1)
        rows, start, groups = torch.arange(len(seen), device=seen.device)[:, None], 0, []
        for count in counts:
            chosen = order[:, start : start + count]
            picked = map_parameters(lambda value, chosen=chosen: value[rows, chosen], parameters)
            groups.append((seen[rows, chosen], picked))
            start += count
        return groups

    def _context(self, views: tuple[torch.Tensor, Any], network: Any, ctx: Context[ForwardModelConfig]) -> Any:
        """Lifts a context of 1 to `max_context_views` views, or of none where it is dropped."""
        config, seen = self.config, views[0]
        b, count, device = *seen.shape[:2], seen.device
        number = ctx.rng.randint(count, b, ctx.ids, "labels", device) + 1
        most = number.clamp(max=config.max_given_views or count)
        given = (ctx.rng.rand(b, ctx.ids, "labels", device) * most).long() + 1
        kept = ctx.rng.rand(b, ctx.ids, "labels", device) >= config.context_dropout
        weights, sampled = _first(number * kept, count), 1 - _first(given, count)
        if config.observation_noise or config.context_noise:
            std = torch.where(sampled > 0, config.context_noise, config.observation_noise)
            std = std.view(b, count, *[1] * (seen.ndim - 2))
            seen = seen + std * ctx.rng.randn_like(seen, ctx.ids, stream="latents")
        return lift_views(network, self.forward_model, seen, views[1], weights, sampled)

    # -- results ---------------------------------------------------------------------------------------------------

    def pipeline(self, modules: Modules) -> ForwardModelPipeline:
        """Returns the pipeline of the modules."""
        config = self.config
        return ForwardModelPipeline(
            modules.trainable,
            modules.scheduler,
            self.forward_model,
            signal_range=self.signal_range,
            observation_scale=config.observation_scale,
            context_noise=config.context_noise,
            null_context=config.max_context_views > 0 and config.context_dropout > 0,
            regression=config.regression,
            max_context_views=config.max_context_views,
            num_targets=config.num_targets,
        )

    def validate(self, pipeline: DiffusionPipeline, generator: torch.Generator) -> list[Image.Image]:
        """Draws a signal from one observation of each of the first samples."""
        items = [self.data[i % len(self.data)] for i in range(self.config.num_validation_images)]
        seen = torch.stack([item["observations"] for item in items])
        parameters = map_parameters(lambda *values: torch.stack(values), *(item["parameters"] for item in items))
        context: Any = (None, None)
        if self.config.max_context_views:
            noise = torch.randn(seen[:, :1].shape, generator=generator)
            context = (
                seen[:, :1] + self.config.observation_noise * noise,
                map_parameters(lambda value: value[:, :1], parameters),
            )
        views = min(max(self.config.max_context_views, 1), batch_and_views(parameters)[1])  # the last joins no context
        targets = map_parameters(lambda value: value[:, -views:], parameters)
        steps = self.config.validation_inference_steps
        call: Any = pipeline
        result = call(*context, targets, num_inference_steps=steps, eta=1.0, generator=generator)
        return pictures(result.signals, result.observations[:, 0], self.signal_range)

    def card(self) -> RepoCard:
        """Returns the card."""
        name = type(self.forward_model).__name__
        load = LOAD if type(self.forward_model).__module__ == "diffusers_ext" else LOAD_OWN.replace("KIND", name)
        what = "the mean signal" if self.config.regression else "signals"
        return RepoCard(
            method="Diffusion with forward models",
            description=f"Draws {what} of shape {self.signal_shape} that agree with observations of them by {name}; "
            "in training only such observations were seen.",
            data=f"{self.data.description}.",
            tags=["diffusers-ext", "inverse-problems"],
            paper="https://arxiv.org/abs/2306.11719",
            snippet=SNIPPET.replace("LOAD", load),
        )


def _first(number: torch.Tensor, count: int) -> torch.Tensor:
    """Returns `(batch, count)`, 1 in the first so many places of each row."""
    return (torch.arange(count, device=number.device) < number[:, None]).float()
