"""Prompts and images as a text-to-image pipeline encodes them, once: in memory or in files."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.utils import logging as diffusers_logging
from torch import nn

from diffusers_ext.data.cache import TensorCache, fingerprint
from diffusers_ext.generation.denoiser import PipelineDenoiser
from diffusers_ext.generation.prompts import Conditions

from .text_model import SizedDenoiser

__all__ = ["PromptRecordings", "cached_latents", "quiet", "say_about_length"]

logger = logging.getLogger(__name__)

REMEMBERED = 256  # prompts whose recordings stay in memory


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps Diffusers from warning of each prompt anew."""
    before = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(before)


def say_about_length(pipe: Any, prompts: Sequence[str]) -> None:
    """Counts prompts that a text encoder would cut, in one line of the log for each of the pipeline's tokenizers."""
    for name, tokenizer in pipe.components.items():
        limit = getattr(tokenizer, "model_max_length", 0)
        if not name.startswith("tokenizer") or not 0 < limit < 10**5:
            continue
        lengths = [len(ids) for ids in tokenizer(list(prompts), verbose=False)["input_ids"]]
        long = sum(length > limit for length in lengths)
        if long:
            logger.warning(
                "%d of %d captions are longer than the %d tokens of %s, the longest has %d: the rest is cut where "
                "that encoder reads them.",
                *(long, len(lengths), limit, name, max(lengths)),
            )


class PromptRecordings:
    """What a denoiser is conditioned on, by prompt: encoded when it is asked for, or all beforehand.

    Args:
        denoiser: of any size; recordings fit all.
        prompts: all that will be asked for.

    Attributes:
        number: the number of each prompt.
    """

    def __init__(self, denoiser: PipelineDenoiser, prompts: Sequence[str]) -> None:
        self.denoiser = denoiser
        self.number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        self._masked = denoiser.encode_prompts([next(iter(prompts))]).masked
        self._files: TensorCache | None = None
        self._remembered: dict[str, Conditions] = {}

    def cache(
        self, folder: str, identity: dict[str, Any], encoders: Mapping[str, nn.Module], accelerator: Accelerator
    ) -> None:
        """Encodes all prompts into files; the encoders are not needed from then on.

        Args:
            folder: where the files are.
            identity: what they depend on beside prompts and encoders.
            encoders: the pipeline's text encoders by name.
            accelerator: divides the work among its processes.
        """
        prompts = list(self.number)
        marks = {name: fingerprint(encoder) for name, encoder in encoders.items()}
        self._files = TensorCache(folder, "prompts", {**identity, **marks, "prompts": prompts}, len(prompts))
        self._files.compute(
            lambda rows: self.denoiser.encode_prompts([prompts[i] for i in rows]).to_tensors(), accelerator
        )

    def __call__(self, prompts: Sequence[str]) -> Conditions:
        """Returns what a batch of prompts is conditioned on."""
        for prompt in dict.fromkeys(prompts):
            if prompt in self._remembered:
                continue
            if len(self._remembered) >= REMEMBERED:
                self._remembered.pop(next(key for key in self._remembered if key not in prompts))
            if self._files is None:
                with quiet():
                    found = self.denoiser.encode_prompts([prompt])
            else:
                found = Conditions.from_tensors([prompt], [self._files[self.number[prompt]]], self._masked)
            self._remembered[prompt] = found
        return self.denoiser.join([self._remembered[prompt] for prompt in prompts])


def cached_latents(
    images: Any,
    folder: str,
    kind: str,
    *,
    denoiser: SizedDenoiser,
    vae: nn.Module,
    batch: int,
    accelerator: Accelerator,
    refuse_others: bool,
) -> TensorCache:
    """Encodes all images of a data set into files, their centres where they are cropped.

    Args:
        images: a map-style data set of `load_images`' kind.
        folder: where the files are.
        kind: what the files are called.
        denoiser: encodes.
        vae: the autoencoder that it encodes with.
        batch: images at a time.
        accelerator: divides the work among its processes.
        refuse_others: latents of other images, sizes or autoencoders must not be in the folder.

    Returns:
        For each image its `latents`, in fp32.

    Raises:
        ValueError: there are others.
    """
    sizes = images.sizes or [(images.resolution, images.resolution)] * len(images)
    identity = {
        "pipeline": type(denoiser.at().pipe).__name__,
        "autoencoder": fingerprint(vae),
        "data": images.fingerprint,
        "sizes": [list(size) for size in sorted(set(sizes))],
    }
    cache = TensorCache(folder, kind, identity, len(images))
    images.center_crop = True
    differences = cache.differences() if refuse_others else []
    if differences:
        raise ValueError(
            f"`cache_dir` must hold latents of this model, data and size, or none, got {folder!r} with those of "
            f"another {', '.join(differences)}."
        )
    device = next(vae.parameters()).device

    def encode(rows: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        found: dict[int, torch.Tensor] = {}
        for size in sorted({sizes[i] for i in rows}):
            members = [i for i in rows if sizes[i] == size]
            for part in (members[first : first + batch] for first in range(0, len(members), batch)):
                pixels = torch.stack([images.get(i)["pixel_values"] for i in part]).to(device)
                found |= dict(zip(part, denoiser.at(size).encode_images(pixels).cpu(), strict=True))
        return [{"latents": found[i]} for i in rows]

    cache.compute(encode, accelerator)
    return cache
