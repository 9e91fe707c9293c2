"""Text for a network: by one encoder, or by two of them joined as in SDXL."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.loaders import TextualInversionLoaderMixin

__all__ = ["Encoders", "encode", "find_encoders"]

LONGEST = 300  # tokens: tokenizers of T5 know no end, and PixArt's prompts have one

Encoders = list[tuple[Any, Any]]  # (tokenizer, encoder)


def find_encoders(own: Encoders, base: Any, width: int) -> Encoders:
    """Returns the encoders whose joint width is that of the network's cross-attention.

    Args:
        own: the module's own encoders, which come first; may be empty.
        base: the base pipeline, whose encoders are taken otherwise.
        width: `cross_attention_dim`.

    Raises:
        ValueError: none fit; the message says what would.
    """

    def widths(encoders: Encoders) -> list[int]:
        return [getattr(encoder.config, "hidden_size", 0) for _, encoder in encoders]

    pairs = [("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")]
    of_base = [(getattr(base, t, None), getattr(base, e, None)) for t, e in pairs]
    of_base = [(tokenizer, encoder) for tokenizer, encoder in of_base if tokenizer is not None and encoder is not None]
    choices = [own] if own else [of_base[:1], of_base[1:], of_base]
    for encoders in choices:
        if encoders and sum(widths(encoders)) == width:
            return encoders
    found = widths(own or of_base)
    raise ValueError(
        f"`oms_text_encoder` must give {width} features a token, as the module's `cross_attention_dim`, alone or "
        f"joined with `oms_text_encoder_2`; got widths {found} from {'the module' if own else 'the base pipeline'}."
    )


@torch.no_grad()
def encode(prompts: list[str], encoders: Encoders, device: torch.device) -> torch.Tensor:
    """Encodes prompts: one encoder by its last layer, two by their last but one, joined, as SDXL does.

    Args:
        prompts: texts; a textual inversion of several vectors is written out, as Diffusers' pipelines do.
        encoders: from `find_encoders`.
        device: where the encoders run.

    Returns:
        `(prompts, tokens, width)`.
    """
    parts = []
    for tokenizer, encoder in encoders:
        words = TextualInversionLoaderMixin().maybe_convert_prompt(prompts, tokenizer)
        length = min(tokenizer.model_max_length, LONGEST)
        tokens = tokenizer(words, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        # CLIP was trained on padding as it comes; the others were told of it.
        mask = None if encoder.config.model_type.startswith("clip") else tokens.attention_mask.to(device)
        output = encoder(tokens.input_ids.to(device), attention_mask=mask, output_hidden_states=len(encoders) > 1)
        # By name: an encoder with a projection gives its pooled output first.
        parts.append(output.hidden_states[-2] if len(encoders) > 1 else output.last_hidden_state)
    return torch.cat(parts, dim=-1)
