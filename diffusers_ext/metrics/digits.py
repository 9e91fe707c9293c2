"""How far drawn digits of 16x16 pixels are from the shipped ones."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F

from diffusers_ext.data.digits import CLASSIFIER, DIGITS
from diffusers_ext.data.sources import load_images

from .features import ImageClassifierFeatures, extract_features
from .frechet import GaussianStatistics, frechet_distance

__all__ = ["distance_to_digits", "small_digits"]


@functools.cache
def small_digits() -> torch.Tensor:
    """Returns the shipped digits as the models' data were, `(1000, 1, 16, 16)` in [-1, 1]."""
    data: Any = load_images(train_data_dir=str(DIGITS), resolution=16, channels=1)
    return torch.stack([data[i]["pixel_values"] for i in range(len(data))])


def distance_to_digits(images: torch.Tensor) -> float:
    """Computes the Frechet distance of images `(batch, 1, 16, 16)` in [-1, 1] to the shipped digits."""
    return frechet_distance(_features(images), _real())


@functools.cache
def _real() -> GaussianStatistics:
    return GaussianStatistics.from_features(_features(small_digits()))


def _features(images: torch.Tensor) -> torch.Tensor:
    """Returns the features of a classifier of larger digits, which nothing was tuned on."""
    larger = F.interpolate(images, (28, 28), mode="bilinear", align_corners=False)
    return extract_features(larger, _classifier().features)


@functools.cache
def _classifier() -> Any:
    return ImageClassifierFeatures.from_pretrained(CLASSIFIER).eval()
