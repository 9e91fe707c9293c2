"""Feature extractors for the distances: any function from images to `(batch, features)` will do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

__all__ = ["ImageClassifierFeatures", "extract_features", "inception_features"]


class ImageClassifierFeatures(ModelMixin, ConfigMixin):
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
        config = self.config
        expected = (config.in_channels, config.sample_size, config.sample_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(f"`images` must have the shape (batch, {expected}), got {tuple(images.shape)}.")
        return self.body(images)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns `(batch, num_classes)` logits; `images` as in `features`."""
        return self.head(self.features(images))


@torch.no_grad()
def extract_features(
    images: torch.Tensor, features: Callable[[torch.Tensor], torch.Tensor], batch_size: int = 256
) -> torch.Tensor:
    """Computes features batch by batch.

    Args:
        images: `(samples, channels, height, width)` in `[-1, 1]`.
        features: function from such images to `(batch, features)`.
        batch_size: images at a time.

    Returns:
        `(samples, features)` on the CPU.

    Raises:
        ValueError: there are no images.
    """
    if len(images) == 0:
        raise ValueError("`images` must hold at least one image, got none.")
    return torch.cat([features(batch).cpu() for batch in images.split(batch_size)])


def inception_features(device: torch.device | str = "cpu") -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns the Inception-v3 features of FID and KID, by torch-fidelity.

    Args:
        device: where it runs.

    Returns:
        A function from `(batch, 1 or 3, height, width)` images in `[-1, 1]` to `(batch, 2048)` features; images are
        quantised to 8 bits and resized to 299x299 as the original FID code does.

    Raises:
        ImportError: torch-fidelity is not installed. It downloads its weights when it is used first.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import (  # pyright: ignore[reportMissingImports]
            FeatureExtractorInceptionV3,
        )
    except ImportError as error:
        raise ImportError("Inception features need torch-fidelity: pip install diffusers-ext[metrics]") from error
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(device).eval()

    @torch.no_grad()
    def features(images: torch.Tensor) -> torch.Tensor:
        pixels = ((images.to(device) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return network(pixels.expand(-1, 3, -1, -1))[0]

    return features
