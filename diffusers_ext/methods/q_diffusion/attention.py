"""Attention with query, key, value and probabilities in 8 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .config import QDiffConfig
from .grids import fake_quantize

__all__ = ["QDiffAttnProcessor", "attention_layers", "takes_processor", "use_quantized_attention"]

PARTS = ("query", "key", "value", "probabilities")
REPLACED = ("AttnProcessor", "AttnProcessor2_0")


class QDiffAttnProcessor(nn.Module):
    """Attention as `AttnProcessor` computes it, its four factors rounded to static grids.

    Attributes:
        act_scale: steps of query, key, value and probabilities, fp32 `(4,)`; the probabilities' zero point is 0.
        act_zero_point: fp32 `(3,)`, of the first three.
    """

    act_scale: torch.Tensor
    act_zero_point: torch.Tensor

    def __init__(self, softmax_bits: int = 8, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.softmax_bits = softmax_bits
        self.register_buffer("act_scale", torch.ones(4, device=device))
        self.register_buffer("act_zero_point", torch.zeros(3, device=device))

    def plain(self) -> Any:
        """Returns the processor that computes the same without rounding."""
        from diffusers.models.attention_processor import AttnProcessor2_0

        return AttnProcessor2_0()

    def rounded(self, x: torch.Tensor, part: str) -> torch.Tensor:
        """Returns one of the factors as it comes back from its integers."""
        i = PARTS.index(part)
        zero = self.act_zero_point[i] if i < 3 else torch.zeros_like(self.act_scale[0])
        bits = 8 if i < 3 else self.softmax_bits
        return fake_quantize(x.float(), self.act_scale[i], zero, bits).to(x.dtype)

    def forward(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Computes an `Attention` layer; the arguments are Diffusers'."""
        residual, shape = hidden_states, hidden_states.shape
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        attention_mask = attn.prepare_attention_mask(attention_mask, context.shape[1], len(context))
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        if encoder_hidden_states is None:
            context = hidden_states
        elif attn.norm_cross:
            context = attn.norm_encoder_hidden_states(encoder_hidden_states)
        # Rounded before the heads are taken apart, which is the same: a grid is one for the whole tensor.
        query, key, value = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        query, key = self.rounded(query, "query"), self.rounded(key, "key")
        value = self.rounded(value, "value")
        query, key, value = (attn.head_to_batch_dim(x) for x in (query, key, value))
        probabilities = self.rounded(attn.get_attention_scores(query, key, attention_mask), "probabilities")
        hidden_states = attn.batch_to_head_dim(torch.bmm(probabilities, value))
        for layer in attn.to_out:
            hidden_states = layer(hidden_states)
        if len(shape) == 4:
            hidden_states = hidden_states.transpose(1, 2).reshape(shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor


def takes_processor(module: nn.Module) -> bool:
    """Returns whether a module is an `Attention` of the kind whose arithmetic the processor knows."""
    plain = type(getattr(module, "processor", None)).__name__ in REPLACED
    return plain and getattr(module, "norm_q", None) is None and getattr(module, "norm_k", None) is None


def attention_layers(model: nn.Module) -> dict[str, Any]:
    """Returns a model's `Attention` layers that take the processor, by name.

    Raises:
        ValueError: it has none.
    """
    found = {name: module for name, module in model.named_modules() if takes_processor(module)}
    if not found:
        raise ValueError(
            f"`quantize_attention` must be False for {type(model).__name__}, got True: it has no `Attention` layers "
            "such as UNets and DiT have."
        )
    return found


def use_quantized_attention(model: nn.Module, config: QDiffConfig) -> None:
    """Gives a model's `Attention` layers the processor."""
    for module in attention_layers(model).values():
        module.set_processor(QDiffAttnProcessor(config.softmax_bits, next(module.parameters()).device))
