"""Optimizers by name, from the packages that keep them."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any, Literal

import torch

__all__ = ["OptimizerName", "check_optimizer", "make_optimizer", "optimizer_floats"]

OptimizerName = Literal["adamw", "adamw8bit", "prodigy", "sgd", "adafactor"]
# Packages that are not installed with this one.
PACKAGES = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}
# Numbers of 32 bits that each keeps per weight, about.
FLOATS = {"adamw": 2.0, "adamw8bit": 0.5, "prodigy": 4.0, "sgd": 1.0, "adafactor": 0.1}


def check_optimizer(name: str) -> None:
    """Finds out whether an optimizer's package is there.

    Raises:
        ValueError: it is not installed; the message says how to get it.
    """
    package = PACKAGES.get(name)
    if package is not None and find_spec(package) is None:
        raise ValueError(f"`optimizer` must be an installed one (pip install {package}), got {name!r}.")


def optimizer_floats(name: str) -> float:
    """Returns how many 32-bit numbers an optimizer keeps for each weight, about."""
    return FLOATS[name]


def make_optimizer(parameters: Iterable[torch.nn.Parameter], config: Any) -> torch.optim.Optimizer:
    """Makes the optimizer that a `TrainConfig` names, with its learning rate, betas, epsilon and weight decay."""
    rate, decay = config.learning_rate, config.adam_weight_decay
    adam = {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=rate, momentum=config.adam_beta1, weight_decay=decay)
    if config.optimizer == "adafactor":
        from transformers import Adafactor

        # With a rate from outside, as the schedule gives it.
        return Adafactor(parameters, lr=rate, weight_decay=decay, scale_parameter=False, relative_step=False)
    if config.optimizer == "adamw8bit":
        bitsandbytes: Any = importlib.import_module("bitsandbytes.optim")  # an optional package
        return bitsandbytes.AdamW8bit(parameters, lr=rate, weight_decay=decay, **adam)
    if config.optimizer == "prodigy":
        from prodigyopt import Prodigy

        if rate < 0.1:
            warnings.warn(
                f"prodigy estimates the rate and multiplies it by `learning_rate`, usually 1, got {rate}", stacklevel=2
            )
        # As its authors set it for diffusion models.
        options = {"decouple": True, "use_bias_correction": True, "safeguard_warmup": True}
        return Prodigy(parameters, lr=rate, weight_decay=decay, **adam, **options)
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, **adam)
