"""Arguments that every training script takes, checked before anything heavy is loaded."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeGuard, Union, get_args, get_origin, get_type_hints

from accelerate.tracking import get_available_trackers
from huggingface_hub import get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .optimizers import OptimizerName, check_optimizer

__all__ = [
    "GROUPS",
    "TrainConfig",
    "check_hub_id",
    "check_types",
    "described",
    "is_number",
    "is_range",
    "is_whole",
    "require",
]

# The parts of a help text, in their order.
GROUPS = ("data", "model", "method", "optimisation", "saving and logging", "sharing")

LRSchedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]


def require(condition: bool, name: str, value: Any, accepted: str) -> None:
    """Raises a `ValueError` that names the argument, its value and what is accepted, unless `condition` holds."""
    if not condition:
        raise ValueError(f"`{name}` must be {accepted}, got {value!r}.")


def is_whole(value: Any, least: int = 1) -> bool:
    """Whether a value is an integer of at least so much; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_range(value: Any) -> bool:
    """Whether a value is a list or tuple of two finite numbers, the first below the second."""
    pair = isinstance(value, list | tuple) and len(value) == 2 and all(map(is_number, value))
    return pair and value[0] < value[1]


def described(text: str, default: Any = None, group: str = "method") -> Any:
    """Makes a dataclass field whose help text argparse shows.

    Args:
        text: what the argument does.
        default: its default.
        group: where it stands in the help, one of `GROUPS`. A class that declares the field anew changes nothing here.
    """
    return field(default=default, metadata={"help": text, "group": group})


_optimisation = partial(described, group="optimisation")
_saving = partial(described, group="saving and logging")
_sharing = partial(described, group="sharing")


def check_types(config: Any) -> None:
    """Checks every field of a dataclass instance against its annotation; numbers are finite, texts not empty.

    Raises:
        ValueError: a value is of another type, or none of the choices of a `Literal`.
    """
    accepted = {int: "an integer", float: "a finite number", str: "a text that is not empty", bool: "True or False"}
    for name, hint in get_type_hints(type(config)).items():
        value: Any = getattr(config, name)
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        kind = kinds[0]
        if value is None and type(None) in kinds:
            continue
        if get_origin(kind) is Literal:
            choices = list(get_args(kind))
            require(type(value) in map(type, choices) and value in choices, name, value, f"one of {choices}")
        elif kind is float:
            require(is_number(value), name, value, accepted[kind])
        elif kind in accepted:
            require(type(value) is kind and str(value).strip() != "", name, value, accepted[kind])


def check_hub_id(name: str | None) -> None:
    """Checks the repo that a result is pushed to.

    Raises:
        ValueError: it is left out or no name of a repo.
    """
    try:
        validate_repo_id(name or "")
    except HFValidationError as error:
        raise ValueError(
            f"`hub_model_id` must be given with `push_to_hub`, as 'organisation/name', got {name!r}: {error}"
        ) from error


@dataclass
class TrainConfig:
    """Arguments of the engine, named as in Diffusers' training scripts.

    Recipes add their own by inheritance. Exactly one of `max_train_steps` and `num_train_epochs` is given; a step
    is an update of the weights, whatever the accumulation and the number of processes.

    Raises:
        ValueError: an argument is outside its range, or two contradict each other.
    """

    output_dir: str = _saving("Folder for checkpoints, samples, logs and the finished pipeline.", "runs/model")
    overwrite_output_dir: bool = _saving(
        "Delete the checkpoints, logs and samples of another run in that folder.", False
    )
    seed: int = _optimisation("Seed of every random number of the run.", 0)
    rng_scope: Literal["step", "sample"] = _optimisation(
        "'sample' ties noise and timestep to the sample's global index, so that processes x batch x accumulation may "
        "be traded against each other; 'step' is faster.",
        "step",
    )
    train_batch_size: int = _optimisation("Samples per process and micro-step.", 16)
    gradient_accumulation_steps: int = _optimisation("Micro-steps per update.", 1)
    max_train_steps: int | None = _optimisation("Updates to make; or give --num_train_epochs.")
    num_train_epochs: int | None = _optimisation("Passes over the data; or give --max_train_steps.")
    optimizer: OptimizerName = _optimisation(
        "adamw8bit needs the package bitsandbytes, prodigy prodigyopt; prodigy wants --learning_rate 1.", "adamw"
    )
    learning_rate: float = _optimisation("Peak learning rate.", 1e-4)
    lr_scheduler: LRSchedule = _optimisation("Course of the learning rate over the updates.", "constant")
    lr_warmup_steps: int = _optimisation("Updates of linear warm-up; 'constant' has none.", 500)
    adam_beta1: float = _optimisation("beta1 of adamw, adamw8bit and prodigy; the momentum of sgd.", 0.9)
    adam_beta2: float = _optimisation("beta2 of adamw, adamw8bit and prodigy.", 0.999)
    adam_weight_decay: float = _optimisation("Weight decay.", 1e-2)
    adam_epsilon: float = _optimisation("epsilon of adamw, adamw8bit and prodigy.", 1e-8)
    max_grad_norm: float = _optimisation("Gradients are clipped to this norm.", 1.0)
    mixed_precision: Literal["no", "fp16", "bf16"] | None = _optimisation(
        "Default: what `accelerate launch` was told."
    )
    gradient_checkpointing: bool = _optimisation("Recompute activations in the backward pass to save memory.", False)
    allow_tf32: bool = _optimisation("Allow TF32 matrix products on Ampere and newer GPUs.", False)
    use_ema: bool = _optimisation("Keep an exponential moving average of the weights, and save that.", True)
    ema_decay: float = _optimisation("Largest decay of the average.", 0.9999)
    use_ema_warmup: bool = _optimisation("Warm the decay up as 1 - (1 + update / inv_gamma) ** -power.", False)
    ema_inv_gamma: float = _optimisation("inv_gamma of the warm-up.", 1.0)
    ema_power: float = _optimisation("power of the warm-up.", 0.75)
    dataloader_num_workers: int = described("Worker processes that read data; results do not depend on it.", 0, "data")
    checkpointing_steps: int = _saving("Save the training state every so many updates.", 500)
    checkpoints_total_limit: int | None = _saving("Keep only the newest so many checkpoints.")
    resume_from_checkpoint: str | None = _saving("'latest' or the path of a checkpoint folder.")
    validation_steps: int | None = _saving("Draw sample images every so many updates.")
    num_validation_images: int = _saving("How many sample images to draw.", 16)
    logging_steps: int = _saving("Log loss and speed every so many updates.", 10)
    report_to: str = _saving("'none', or trackers separated by commas: tensorboard, wandb, trackio.", "none")
    tracker_project_name: str = _saving("Project name for the trackers.", "diffusers-ext")
    push_to_hub: bool = _sharing("Push the finished folder to the Hub.", False)
    hub_model_id: str | None = _sharing("Repo to push to, 'organisation/name'.")
    hub_private_repo: bool = _sharing("Make that repo private when it is created.", False)

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("train_batch_size", "gradient_accumulation_steps", "checkpointing_steps", "logging_steps"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "an integer >= 1")
        require(self.seed < 2**63, "seed", self.seed, "an integer in 0..2**63-1")
        for name in ("seed", "lr_warmup_steps", "dataloader_num_workers", "num_validation_images"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "an integer >= 0")
        for name in ("max_train_steps", "num_train_epochs", "checkpoints_total_limit", "validation_steps"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "an integer >= 1 or left out")
        for name in ("learning_rate", "adam_epsilon", "max_grad_norm", "ema_inv_gamma", "ema_power"):
            value = getattr(self, name)
            require(value > 0, name, value, "a number > 0")
        for name in ("adam_beta1", "adam_beta2", "ema_decay"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "a number in [0, 1)")
        require(self.adam_weight_decay >= 0, "adam_weight_decay", self.adam_weight_decay, "a number >= 0")
        check_optimizer(self.optimizer)
        if (self.max_train_steps is None) == (self.num_train_epochs is None):
            raise ValueError(
                "exactly one of `max_train_steps` and `num_train_epochs` must be given, got "
                f"{self.max_train_steps!r} and {self.num_train_epochs!r}."
            )
        trackers = ("tensorboard", "wandb", "trackio")
        for name in self.trackers:
            require(name in trackers, "report_to", self.report_to, f"'none' or a list from {list(trackers)}")
            installed = [str(tracker) for tracker in get_available_trackers()]
            require(name in installed, "report_to", name, f"an installed package (pip install {name})")
        if self.validation_steps is not None and self.num_validation_images == 0:
            raise ValueError("`num_validation_images` must be an integer >= 1 with `validation_steps`, got 0.")
        if self.overwrite_output_dir and self.resume_from_checkpoint == "latest":
            raise ValueError(
                "`overwrite_output_dir` must be False with `resume_from_checkpoint='latest'`: it deletes it."
            )
        if self.push_to_hub:
            check_hub_id(self.hub_model_id)

    @property
    def trackers(self) -> list[str]:
        """Names in `report_to`."""
        return [] if self.report_to == "none" else [name.strip() for name in self.report_to.split(",")]

    def check_targets(self) -> None:
        """Finds out before training whether its result could be written and pushed.

        Raises:
            ValueError: `output_dir` cannot be written or is the source model's, or there is no login to push with.
        """
        folder = Path(self.output_dir)
        source = getattr(self, "pretrained_model_name_or_path", None)
        if source is not None and folder.exists() and Path(source).resolve() == folder.resolve():
            raise ValueError(f"`output_dir` must be another folder than the source model's, got {self.output_dir!r}.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ValueError(f"`output_dir` must be a folder to write into, got {str(folder)!r}: {error}") from error
        if self.push_to_hub and get_token() is None:
            raise ValueError("`push_to_hub` must be False without a login; log in with `hf auth login`.")

    def check_warmup(self, total_steps: int) -> None:
        """Checks the warm-up against the number of updates, which epochs fix only once the data is known.

        Raises:
            ValueError: the warm-up is longer than the run.
        """
        if self.lr_scheduler != "constant":
            require(
                self.lr_warmup_steps <= total_steps,
                "lr_warmup_steps",
                self.lr_warmup_steps,
                f"at most the number of updates of the run, {total_steps}",
            )

    def to_dict(self) -> dict[str, Any]:
        """Returns the arguments as plain types."""
        return dataclasses.asdict(self)
