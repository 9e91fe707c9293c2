"""Feature extractors for the distances: any function from images to `(batch, features)` will do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from diffusers_ext.hub.loading import SafeLoadingMixin

__all__ = ["ImageClassifierFeatures", "clip_features", "extract_features", "feature_extractor", "inception_features"]


class ImageClassifierFeatures(SafeLoadingMixin, ModelMixin, ConfigMixin):
    """A small convolutional classifier whose last hidden layer serves as features.

    Args:
        sample_size: height and width of the images.
        in_channels: channels of the images.
        num_classes: number of classes.
        block_out_channels: channels of the convolution blocks; each halves the size.
        feature_dim: number of features.
        dropout: probability of dropping a feature while it is trained.

    Example:
        >>> import torch
        >>> from diffusers_ext import ImageClassifierFeatures
        >>> model = ImageClassifierFeatures(sample_size=8, block_out_channels=(4,), feature_dim=6).eval()
        >>> images = torch.zeros(2, 1, 8, 8)
        >>> model.features(images).shape, model(images).shape
        (torch.Size([2, 6]), torch.Size([2, 10]))
    """

    __module__ = "diffusers_ext"

    @register_to_config
    def __init__(
        self,
        sample_size: int = 28,
        in_channels: int = 1,
        num_classes: int = 10,
        block_out_channels: tuple[int, ...] = (16, 32),
        feature_dim: int = 64,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels, size = in_channels, sample_size
        for width in block_out_channels:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
            channels, size = width, size // 2
        layers += [nn.Flatten(), nn.Linear(channels * size * size, feature_dim), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(feature_dim, num_classes))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Computes the features.

        Args:
            images: `(batch, in_channels, sample_size, sample_size)` in `[-1, 1]`; nothing is resized.

        Returns:
            `(batch, feature_dim)`.

        Raises:
            ValueError: the images have another shape.
        """
        size = self.config["sample_size"]
        expected = (self.config["in_channels"], size, size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(f"`images` must have the shape (batch, {expected}), got {tuple(images.shape)}.")
        return self.body(images)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns `(batch, num_classes)` logits; `images` as in `features`."""
        return self.head(self.features(images))


@torch.no_grad()
def extract_features(
    images: torch.Tensor | Iterable[torch.Tensor],
    features: Callable[[torch.Tensor], torch.Tensor],
    batch_size: int = 256,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Computes features batch by batch.

    Args:
        images: `(samples, channels, height, width)` in `[-1, 1]`, or an iterable over batches of that shape.
        features: function from such images to `(batch, features)`. A network must be in evaluation mode.
        batch_size: images at a time; the batches of an iterable are taken as they are.
        device: where the images are brought before `features` sees them, by default they stay where they are.

    Returns:
        `(samples, features)` on the CPU.

    Raises:
        ValueError: there are no images, a batch has another shape, or `batch_size` is less than 1.

    Example:
        >>> import torch
        >>> from diffusers_ext import extract_features
        >>> images = torch.zeros(5, 1, 4, 4)
        >>> extract_features(images, lambda batch: batch.flatten(1), batch_size=2).shape
        torch.Size([5, 16])
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be an integer >= 1, got {batch_size!r}.")
    found = []
    for batch in images.split(batch_size) if isinstance(images, torch.Tensor) else images:
        if batch.ndim != 4:
            raise ValueError(
                f"`images` must have the shape (batch, channels, height, width), got {tuple(batch.shape)}."
            )
        if len(batch):
            found.append(features(batch.to(device)).cpu())
    if not found:
        raise ValueError("`images` must hold at least one image, got none.")
    return torch.cat(found)


def inception_features(
    device: torch.device | str | None = None, differentiable: bool = False
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns the Inception-v3 features of FID and KID, by torch-fidelity.

    Args:
        device: where it runs, by default on the CPU.
        differentiable: keep gradients; images are then not quantised to 8 bits.

    Returns:
        A function from `(batch, 1 or 3, height, width)` images in `[-1, 1]` to `(batch, 2048)` features; images are
        quantised to 8 bits and resized to 299x299 as the original FID code does. It raises a `ValueError` for images
        of another shape.

    Raises:
        ImportError: torch-fidelity is not installed. It downloads its weights when it is used first.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import (  # pyright: ignore[reportMissingImports]
            FeatureExtractorInceptionV3,
        )
        from torch_fidelity.interpolate_compat_tensorflow import (  # pyright: ignore[reportMissingImports]
            interpolate_bilinear_2d_like_tensorflow1x,
        )
    except ImportError as error:
        raise ImportError("Inception features need torch-fidelity: pip install diffusers-ext[metrics]") from error
    device = "cpu" if device is None else device
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(device).eval()

    def features(images: torch.Tensor) -> torch.Tensor:
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                f"`images` must have the shape (batch, 1 or 3, height, width), got {tuple(images.shape)}."
            )
        pixels = ((images.to(device) + 1) * 127.5).expand(-1, 3, -1, -1)
        if not differentiable:
            with torch.no_grad():
                return network(pixels.round().clamp(0, 255).to(torch.uint8))[0]
        # The network's own forward takes bytes only; these are its steps.
        size = network.INPUT_IMAGE_SIZE
        x = (interpolate_bilinear_2d_like_tensorflow1x(pixels, size=(size, size), align_corners=False) - 128) / 128
        for name, layer in network.named_children():
            if name == "fc":
                break
            x = layer(x)
        return x.flatten(1)

    return features


def clip_features(name: str, device: torch.device | str | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns the image embedding of a CLIP model, not normalised, with gradients.

    Args:
        name: a Hub repo or folder that `transformers.CLIPVisionModelWithProjection` loads, such as
            `"openai/clip-vit-base-patch32"`.
        device: where it runs, by default on the CPU.

    Returns:
        A function from `(batch, 1 or 3, height, width)` images in `[-1, 1]` to `(batch, projection_dim)` features;
        images are resized bicubically to the model's size.
    """
    from transformers import CLIPVisionModelWithProjection
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    device = "cpu" if device is None else device
    network: Any = CLIPVisionModelWithProjection.from_pretrained(name, use_safetensors=True)
    network = network.requires_grad_(False).eval().to(device)
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    size = network.config.image_size

    def features(images: torch.Tensor) -> torch.Tensor:
        pixels = (images.to(device).expand(-1, 3, -1, -1) + 1) / 2
        pixels = F.interpolate(pixels, (size, size), mode="bicubic", align_corners=False, antialias=True)
        return network((pixels - mean) / std).image_embeds

    return features


def feature_extractor(name: str, device: torch.device | str | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns the differentiable features of a name.

    Args:
        name: `"pixels"`, `"inception"`, `"clip:REPO"`, or `"classifier:REPO"`, an `ImageClassifierFeatures`.
        device: where they are computed, by default on the CPU.

    Returns:
        A function from `(batch, channels, height, width)` images in `[-1, 1]` to `(batch, features)`.

    Raises:
        ValueError: the name is unknown, or its model cannot be loaded.

    Example:
        >>> import torch
        >>> from diffusers_ext import feature_extractor
        >>> feature_extractor("pixels")(torch.zeros(2, 1, 4, 4)).shape
        torch.Size([2, 16])
    """
    kind, _, repo = name.partition(":")
    if name == "pixels":
        return lambda images: images.flatten(1)
    try:
        if name == "inception":
            return inception_features(device, differentiable=True)
        if kind == "clip" and repo:
            return clip_features(repo, device)
        if kind == "classifier" and repo:
            network: Any = ImageClassifierFeatures.from_pretrained(repo).requires_grad_(False).eval()
            return network.to("cpu" if device is None else device).features
    except (ImportError, OSError, ValueError) as error:
        raise ValueError(f"`features` must name a model that loads, got {name!r}: {error}") from error
    raise ValueError(f"`features` must be 'pixels', 'inception', 'clip:REPO' or 'classifier:REPO', got {name!r}.")
