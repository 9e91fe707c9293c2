"""What a classifier makes of images in the diffusion model's range and size."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

__all__ = ["classify", "label_names", "load_classifier"]


def classify(classifier: Callable[..., Any], images: torch.Tensor, image_processor: Any = None) -> torch.Tensor:
    """Returns the logits of images.

    Args:
        classifier: a transformers model for image classification, or any callable from images to logits.
        images: `(batch, channels, height, width)` in [-1, 1].
        image_processor: the transformers image processor of the classifier; images are then resized to its size
            (antialiased), grey ones spread over three channels, and normalised by its mean and deviation. Without one
            the classifier gets them as they are.

    Returns:
        `(batch, classes)` in fp32.

    Raises:
        ValueError: the classifier wants another number of channels, or does not return logits.
    """
    wanted = getattr(getattr(classifier, "config", None), "num_channels", None)
    if image_processor is not None:
        images = _processed(images, image_processor, wanted or 3)
    elif wanted is not None and wanted != images.shape[1]:
        raise ValueError(
            f"`classifier` must take {images.shape[1]} channels like the diffusion model, got one for {wanted}; with "
            "its `image_processor` grey images are spread over three."
        )
    dtype = getattr(classifier, "dtype", None)
    if isinstance(dtype, torch.dtype):
        inputs = images.to(dtype)
    else:  # a plain module gets images where its weights are, a function as they are
        weights = next(classifier.parameters(), images) if isinstance(classifier, torch.nn.Module) else images
        inputs = images.to(weights.device, weights.dtype)
    output = classifier(inputs)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or len(logits) != len(images):
        raise ValueError(
            f"`classifier` must return logits (batch, classes) for {len(images)} images, got "
            f"{tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__}."
        )
    return logits.float().to(images.device)


def _processed(images: torch.Tensor, processor: Any, channels: int) -> torch.Tensor:
    size = processor.size
    edge = size.get("shortest_edge")
    target = (edge, edge) if edge else (size["height"], size["width"])
    if images.shape[1] == 1 and channels == 3:
        images = images.expand(-1, 3, -1, -1)
    elif images.shape[1] != channels:
        raise ValueError(f"`classifier` must take {images.shape[1]} channels or 3, got one for {channels}.")
    if tuple(images.shape[2:]) != target:
        images = F.interpolate(images, target, mode="bicubic", antialias=True).clamp(-1, 1)
    images = (images + 1) / 2
    if not getattr(processor, "do_normalize", True):
        return images
    mean, std = (
        torch.tensor(values, device=images.device).reshape(1, -1, 1, 1)
        for values in (processor.image_mean, processor.image_std)
    )
    return (images - mean) / std


def label_names(classifier: Any, classes: int) -> list[str]:
    """Returns the names of a classifier's labels, numbers where it has none."""
    names = getattr(getattr(classifier, "config", None), "id2label", None)
    return [str(names.get(i, i)) if names else str(i) for i in range(classes)]


def load_classifier(name: str) -> tuple[Any, Any]:
    """Loads a classifier and, where there is one, its image processor.

    Args:
        name: folder or Hub repo of a transformers model for image classification, or of an `ImageClassifierFeatures`.

    Raises:
        ValueError: there is no such model.
    """
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    from diffusers_ext.metrics.features import ImageClassifierFeatures

    config = Path(name) / "config.json"
    own = config.is_file() and json.loads(config.read_text()).get("_class_name") == "ImageClassifierFeatures"
    try:
        if own:
            return ImageClassifierFeatures.from_pretrained(name).eval(), None
        model: Any = AutoModelForImageClassification.from_pretrained(name, use_safetensors=True)
    except Exception as error:  # the libraries raise many kinds
        raise ValueError(
            f"`classifier` must be a Hub repo or a folder with an image classifier, got {name!r}: {error}"
        ) from error
    try:
        processor: Any = AutoImageProcessor.from_pretrained(name)
    except Exception as error:
        raise ValueError(f"`classifier` must come with its preprocessor_config.json, got {name!r}: {error}") from error
    return model.eval(), processor
