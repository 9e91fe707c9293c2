"""Images with captions as text-to-image training reads them: of several sizes, beside images of a class, encoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from diffusers_ext.data.buckets import bucket_sizes, nearest_bucket
from diffusers_ext.data.cache import TensorCache

__all__ = ["CaptionedImages", "make_buckets"]

Size = tuple[int, int]


class CaptionedImages:
    """Images with their captions, each beside an image of the class where there are such.

    Args:
        images: a map-style data set of `load_images`' kind.
        captions: one for each image.
        classes: images of the class, for prior preservation.

    Attributes:
        sizes: `(height, width)` of each image.
        buckets: indices of the images of each size, where there are several.
        prompts: the captions, each once.
        latents: the latents of the images, once they are computed.
        class_latents: those of the images of the class.
    """

    streaming = False
    latents: TensorCache | None = None
    class_latents: TensorCache | None = None

    def __init__(self, images: Any, captions: Sequence[str], classes: Any = None) -> None:
        self.images, self.classes, self.captions = images, classes, list(captions)
        self.prompts = list(dict.fromkeys(captions))
        self.buckets: list[list[int]] | None = None

    def use_buckets(self, sizes: Sequence[Size]) -> None:
        """Gives images sizes of their own."""
        self.images.sizes = list(sizes)
        members: dict[Size, list[int]] = {}
        for index, size in enumerate(sizes):
            members.setdefault(size, []).append(index)
        self.buckets = list(members.values())

    @property
    def sizes(self) -> list[Size]:
        """`(height, width)` of the images, each once."""
        square = (self.images.resolution, self.images.resolution)
        return [square] if self.images.sizes is None else sorted(set(self.images.sizes))

    def size(self, index: int) -> Size:
        """Returns `(height, width)` of an image as it is trained."""
        return self.sizes[0] if self.images.sizes is None else self.images.sizes[index]

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.images)

    def get(self, index: int, generator: torch.Generator | None = None) -> dict[str, Any]:
        """Returns one sample.

        Args:
            index: in `0..len-1`.
            generator: source of the random crop and flip and of the choice of a class image.

        Returns:
            `latents`, or `pixel_values` `(3, height, width)` in `[-1, 1]`; the same of a class image with `class_` in
            front; `caption`; and `size`, a text such as "512x768", the height first.
        """
        height, width = self.size(index)
        item: dict[str, Any] = {"caption": self.captions[index], "size": f"{height}x{width}"}
        item |= _sample(self.images, self.latents, index, generator, "")
        if self.classes is not None:
            other = int(torch.randint(len(self.classes), (1,), generator=generator))
            item |= _sample(self.classes, self.class_latents, other, generator, "class_")
        return item


def _sample(
    images: Any, latents: TensorCache | None, index: int, generator: torch.Generator | None, prefix: str
) -> dict[str, torch.Tensor]:
    if latents is not None:
        return {f"{prefix}latents": latents[index]["latents"]}
    return {f"{prefix}pixel_values": images.get(index, generator)["pixel_values"]}


def make_buckets(images: Any, resolution: int, multiple: int) -> list[Size]:
    """Finds the size of each image.

    Args:
        images: a map-style data set of `load_images`' kind.
        resolution: see `bucket_sizes`.
        multiple: see `bucket_sizes`.

    Raises:
        ValueError: images are smaller than the size whose shape is nearest to theirs; they are named.
    """
    sizes = bucket_sizes(resolution, multiple)
    chosen, small = [], []
    for index in range(len(images)):
        original = images.original_size(index)
        size = nearest_bucket(original, sizes)
        chosen.append(size)
        if original[0] < size[0] or original[1] < size[1]:
            small.append(f"{images.name(index)} ({original[1]}x{original[0]} for {size[1]}x{size[0]})")
    if small:
        more = f" and {len(small) - 5} more" if len(small) > 5 else ""
        raise ValueError(
            f"`resolution` must leave no image smaller than its bucket, got {resolution} with {', '.join(small[:5])}"
            f"{more}: take them out, or lower the resolution."
        )
    return chosen
