"""What a method gives to the engine: its modules, its data, its loss and its pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from PIL import Image

from diffusers_ext.hub.card import RepoCard
from diffusers_ext.hub.repo import save_repo
from diffusers_ext.rng import StepRNG

from .config import TrainConfig

__all__ = ["Context", "Modules", "Recipe", "Sample", "StepOutput"]

ConfigT = TypeVar("ConfigT", bound=TrainConfig)


@dataclass
class Modules:
    """What a run consists of.

    Attributes:
        trainable: the module whose parameters with `requires_grad` are trained, in fp32.
        scheduler: the Diffusers scheduler that training and sampling share.
        frozen: further modules by name; the engine moves them to the device, in the precision of the run.
        only_trained: checkpoints leave out those parameters of `trainable` that are not trained, which `setup` loads
            again.
    """

    trainable: Any
    scheduler: Any
    frozen: dict[str, Any] = field(default_factory=dict)
    only_trained: bool = False


@dataclass
class Sample:
    """A batch in the space that is diffused.

    Attributes:
        x0: `(batch, channels, height, width)` clean samples, scaled.
        cond: further arguments of the network.
        labels: `(batch,)` class labels as the noise strategies want them, or `None`.
    """

    x0: torch.Tensor
    cond: dict[str, Any] = field(default_factory=dict)
    labels: torch.Tensor | None = None


@dataclass
class StepOutput:
    """Result of one micro-step.

    Attributes:
        loss: scalar with gradient.
        logs: scalar tensors to average into the logs; they stay on the device until then.
    """

    loss: torch.Tensor
    logs: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class Context(Generic[ConfigT]):
    """What the engine shows to a recipe while it runs.

    Attributes:
        config: the arguments.
        accelerator: accelerate's handle on devices and processes.
        rng: the random numbers of the present micro-step.
        weight_dtype: precision of frozen modules.
        modules: what `Recipe.setup` returned (set from then on).
        model: `modules.trainable` as prepared by accelerate; call this one for the loss.
        step: updates made so far.
        ids: `(batch,)` global indices of the samples of this micro-step.
    """

    config: ConfigT
    accelerator: Accelerator
    rng: StepRNG
    weight_dtype: torch.dtype
    modules: Any = None
    model: Any = None
    step: int = 0
    ids: Sequence[int] = ()


class Recipe(Generic[ConfigT]):
    """One method's part of training; the engine does the rest.

    Args:
        config: an instance of the class's `Config`.

    Attributes:
        sample_name: what the progress bar calls the samples, in the plural.
        size_advice: how to choose another size of the network, for the line that tells it; `None` where there is no
            choice.
    """

    Config: type[TrainConfig] = TrainConfig
    sample_name: str = "images"
    size_advice: str | None = None

    def __init__(self, config: ConfigT) -> None:
        self.config = config

    def setup(self, ctx: Context[ConfigT]) -> Modules:
        """Makes or loads the modules. The global generators are seeded, alike on every process."""
        raise NotImplementedError

    def dataset(self, ctx: Context[ConfigT]) -> Any:
        """Returns a data set of `diffusers_ext.load_images`' kind, map-style or streaming."""
        raise NotImplementedError

    def training_step(self, batch: dict[str, Any], ctx: Context[ConfigT]) -> StepOutput:
        """Computes the loss of one micro-batch, which is on the device already."""
        raise NotImplementedError

    def pipeline(self, modules: Modules) -> DiffusionPipeline:
        """Returns the pipeline that is validated, saved and pushed; `modules` hold the weights to use."""
        raise NotImplementedError

    def validate(self, pipeline: DiffusionPipeline, generator: torch.Generator) -> list[Image.Image]:
        """Draws `num_validation_images` images; the default calls the pipeline without further arguments."""
        raise NotImplementedError

    def figures(self, pipeline: DiffusionPipeline, generator: torch.Generator) -> dict[str, float]:
        """Measures the pipeline, in validation and at the end, for logs and the model card; by default nothing."""
        return {}

    def card(self) -> RepoCard:
        """Returns the model card's contents, without arguments and results, which the engine fills in."""
        raise NotImplementedError

    def save(self, pipeline: DiffusionPipeline, folder: str, card: RepoCard, sample: Image.Image | None) -> None:
        """Writes the finished repo; by default the whole pipeline."""
        save_repo(pipeline, folder, card=card, sample=sample)

    def state_dict(self) -> dict[str, Any]:
        """Returns what else a checkpoint must keep: tensors and plain types."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` returned."""
