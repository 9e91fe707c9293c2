"""The space in which generated and real images are compared: one or several feature extractors, joined."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

__all__ = ["FeatureSpace"]

FLOOR = 0.1  # smallest deviation that is divided by, in units of the space's root mean square


class FeatureSpace:
    """Joins features of several extractors and, once it is fitted, standardises them.

    Every extractor counts alike, however many features it has: its block is scaled by `sqrt(D / (K D_k))`, with D
    features in all, D_k of its own, and K extractors.

    Args:
        extractors: functions from images `(batch, channels, height, width)` in `[-1, 1]` to `(batch, features)`.

    Example:
        >>> import torch
        >>> from diffusers_ext import FeatureSpace
        >>> space = FeatureSpace([lambda x: x.flatten(1), lambda x: x.mean((1, 2, 3))[:, None]])
        >>> images = torch.randn(50, 1, 2, 2, generator=torch.Generator().manual_seed(0))
        >>> space.fit(space(images))
        >>> space(images).std(0)[0] / space(images).std(0)[-1]  # four pixels against one mean
        tensor(0.5000)
    """

    def __init__(self, extractors: Sequence[Callable[[torch.Tensor], torch.Tensor]]) -> None:
        if callable(extractors) or len(extractors) == 0 or not all(map(callable, extractors)):
            raise ValueError(f"`features` must be a list of at least one function, got {extractors!r}.")
        self.extractors = list(extractors)
        self.widths: list[int] = []
        self._mean = self._scale = None

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Returns `(batch, features)`.

        Raises:
            ValueError: an extractor gives another shape.
        """
        parts = [extractor(images) for extractor in self.extractors]
        for part in parts:
            fits = isinstance(part, torch.Tensor) and part.ndim == 2 and len(part) == len(images) and part.shape[1] > 0
            if not fits:
                found = tuple(part.shape) if isinstance(part, torch.Tensor) else type(part).__name__
                raise ValueError(
                    f"`features` must give ({len(images)}, features) of {len(images)} images, got {found}."
                )
        self.widths = [part.shape[1] for part in parts]
        return self.standardised(torch.cat(parts, 1))

    def check(self, images: torch.Tensor) -> list[list[float]]:
        """Tries every extractor on real images.

        Args:
            images: `(batch >= 1, channels, height, width)` in `[-1, 1]`.

        Returns:
            For every extractor, its number of features and a random projection of each image's, to five digits: enough
            to tell it from another.

        Raises:
            ValueError: one gives another shape, numbers that are not finite, no gradient, or features of an image that
                depend on the batch or on chance.
        """
        found = []
        for i, extractor in enumerate(self.extractors):
            space = FeatureSpace([extractor])
            with torch.enable_grad():
                tracked = images.detach().requires_grad_()
                features = space(tracked)
            if not torch.isfinite(features).all():
                raise ValueError(f"`features` must be finite, got NaN or infinity from extractor {i} for real images.")
            if (
                not features.requires_grad
                or torch.autograd.grad(features.sum(), tracked, allow_unused=True)[0] is None
            ):
                raise ValueError(f"`features` must be differentiable, got no gradient through extractor {i}.")
            features = features.detach()
            with torch.no_grad():
                apart = (space(images[:1]) - features[:1]).abs().max()
            if not apart <= 1e-3 * features.abs().max():
                raise ValueError(
                    "`features` must give an image the same features alone, in a batch and every time, got a "
                    f"difference of {float(apart):.3g} from extractor {i}; put its network into evaluation mode."
                )
            direction = torch.randn(features.shape[1], generator=torch.Generator().manual_seed(0)).double()
            projected = (features.cpu().double() @ direction).tolist()
            found.append([features.shape[1], *(float(f"{value:.5g}") for value in projected)])
        self.widths = [int(values[0]) for values in found]
        return found

    def fit(self, features: torch.Tensor) -> None:
        """Standardises from now on by mean and deviation of real features.

        Args:
            features: `(samples >= 2, features)` as the space gave them before. A feature whose deviation is less than
                a tenth of the root mean square of its extractor's is divided by that instead: it would be all noise.
        """
        total, scales = sum(self.widths), []
        for part in features.double().split(self.widths, 1):
            deviation = part.std(0)
            floor = FLOOR * deviation.square().mean().sqrt()
            weight = (total / (len(self.widths) * part.shape[1])) ** 0.5
            # A space without any deviation tells nothing.
            scales.append(torch.where(floor > 0, weight / deviation.clamp(min=floor.clamp(min=1e-30)), 0.0))
        self._mean, self._scale = features.double().mean(0), torch.cat(scales)

    def standardised(self, features: torch.Tensor) -> torch.Tensor:
        """Returns features as they are compared: as they are, until the space is fitted."""
        if self._mean is None or self._scale is None:
            return features
        mean, scale = self._mean.to(features.device), self._scale.to(features.device)
        return ((features.double() - mean) * scale).to(features.dtype)
