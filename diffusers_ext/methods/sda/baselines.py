"""Two adaptations without diffusion that change the classifier instead of the image, and so depend on the stream.

References:
    Nado et al. 2020 (arXiv 2006.10963): batch statistics at test time. Wang et al. 2021 (arXiv 2006.10726): Tent.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import nn

from .views import classify

__all__ = ["STREAMS", "stream_logits", "stream_order"]

STREAMS = ("shuffled", "sorted", "single")


def stream_order(stream: str, labels: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Returns the order in which images come: `"sorted"` by label, else (`"shuffled"`, `"single"`) at random."""
    if stream not in STREAMS:
        raise ValueError(f"`stream` must be one of {list(STREAMS)}, got {stream!r}.")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return order[labels[order].argsort(stable=True)] if stream == "sorted" else order


def stream_logits(
    classifier: nn.Module,
    images: torch.Tensor,
    method: Literal["bn", "tent"],
    batch_size: int = 50,
    learning_rate: float = 1e-3,
    image_processor: Any = None,
) -> torch.Tensor:
    """Classifies a stream while the classifier adapts to it.

    Args:
        classifier: with batch-norm layers; it is copied.
        images: `(count, channels, height, width)` in [-1, 1], in the stream's order.
        method: `"bn"` normalises by the statistics of each batch; `"tent"` also takes a step of Adam on the batch-norm
            scales and shifts down the mean entropy of each batch, after predicting it.
        batch_size: images that arrive together.
        learning_rate: Tent's.
        image_processor: as in `classify`.

    Returns:
        `(count, classes)` logits in the same order.

    Raises:
        ValueError: there is no such method, or the classifier has no batch-norm layers.
    """
    if method not in ("bn", "tent"):
        raise ValueError(f"`method` must be 'bn' or 'tent', got {method!r}.")
    model = copy.deepcopy(classifier).eval().requires_grad_(False)
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not layers:
        raise ValueError(f"`classifier` must have batch-norm layers, got {type(classifier).__name__} without.")
    for layer in layers:
        layer.track_running_stats, layer.running_mean, layer.running_var = False, None, None
        layer.train().requires_grad_(method == "tent")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, learning_rate) if parameters else None
    found = []
    for batch in images.split(batch_size):
        with torch.set_grad_enabled(optimizer is not None):
            logits = classify(model, batch, image_processor)
            if optimizer is not None:
                logs = logits.log_softmax(1)
                optimizer.zero_grad()
                (-(logs.exp() * logs).sum(1).mean()).backward()
                optimizer.step()
        found.append(logits.detach())
    return torch.cat(found)
