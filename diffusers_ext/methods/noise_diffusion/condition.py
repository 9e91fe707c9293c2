"""What a text-to-image network is told in one stage of a call, and how callbacks see and change it."""

from __future__ import annotations

from typing import Any

import torch

from .base import Network

__all__ = ["Condition", "TextNetwork"]

Condition = dict[str, torch.Tensor]
"""What a network is told, by name: `(batch, ...)` tensors."""


class TextNetwork(Network):
    """The network with text and guidance; both branches of the guidance run as one batch.

    To callbacks it shows what Diffusers' own pipelines show: the rows of both branches, the unguided first, where
    guidance is on. They may return as many, or those of one branch alone.

    Args:
        pipeline: gives the guidance scale of every step, and calls the network.
        told: what it is told of every sample.
        null: what it is told of nothing, one row or as many; `None` where that is not known.
    """

    def __init__(self, pipeline: Any, told: Condition, null: Condition | None) -> None:
        self.pipeline, self.told, self.null = pipeline, told, null
        self._joined: Condition | None = None

    def __call__(self, states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Returns the network's output, guided where the present step is."""
        states = states.to(self.pipeline.unet.dtype)
        if not self.pipeline.do_classifier_free_guidance:
            return self.pipeline._call_unet(states, timestep, self.told)
        output = self.pipeline._call_unet(torch.cat([states, states]), timestep, self._both())
        without, told = output.float().chunk(2)
        return without + self.pipeline.guidance_scale * (told - without)

    def _both(self) -> Condition:
        if self.null is None:
            raise ValueError(
                f"`guidance_scale` was set to {self.pipeline.guidance_scale} by a callback, but the call was begun "
                "without guidance and without a negative prompt that could be encoded."
            )
        if self._joined is None:
            self._joined = {k: torch.cat([self.null[k].expand_as(v), v]) for k, v in self.told.items()}
        return self._joined

    def offered(self) -> dict[str, torch.Tensor | None]:
        """Returns the rows of the present step by the names of Diffusers' pipelines."""
        rows = self._both() if self.pipeline.do_classifier_free_guidance else self.told
        tensors = {name: rows[key] for name, key in self.pipeline._callback_names.items()}
        text = "encoder_hidden_states"
        null = None if self.null is None else self.null[text].expand_as(self.told[text])
        return {**tensors, "negative_prompt_embeds": null}

    def take(self, changed: dict[str, torch.Tensor | None]) -> None:
        """Uses what a callback returned from now on.

        Raises:
            ValueError: a tensor has neither the rows of one branch nor those of both.
        """
        before = [self._joined, self.told]  # guidance may have been switched since they were shown
        for name, key in self.pipeline._callback_names.items():
            value = changed.get(name)
            if value is not None and not any(rows is not None and value is rows[key] for rows in before):
                self._replace(name, key, value)
        null = changed.get("negative_prompt_embeds")
        if null is not None and self.null is not None:
            key = "encoder_hidden_states"
            self.null = {**self.null, key: null.expand_as(self.told[key])}
            self._joined = None

    def _replace(self, name: str, key: str, value: torch.Tensor) -> None:
        count = len(self.told[key])
        if len(value) == 2 * count:
            if self.null is not None:
                self.null = {**self.null, key: value[:count]}
            value = value[count:]
        elif len(value) == 1 < count:
            # Diffusers' callbacks that cut guidance off return the last row alone: every sample then keeps its own.
            value = self.told[key] if torch.equal(value, self.told[key][-1:]) else value.expand_as(self.told[key])
        elif len(value) != count:
            raise ValueError(
                f"`{name}` that a callback returns must have {count} or {2 * count} rows, got {tuple(value.shape)}."
            )
        self.told = {**self.told, key: value}
        self._joined = None
