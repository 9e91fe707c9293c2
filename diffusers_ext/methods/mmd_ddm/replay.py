r"""The exact gradient of a loss on a large batch in the memory of a small one.

A loss L of all features together, such as the MMD, is no sum over parts of the batch, so that accumulating the losses
of parts gives another gradient. But \(\nabla_\theta L = \sum_i (\partial L / \partial f_i)\, \partial f_i / \partial
\theta\): a first pass computes all features without a graph and \(\partial L / \partial f\); a second computes them
part by part again and sends those vectors backward.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator

__all__ = ["gathered", "replayed_loss"]


def gathered(features: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """Returns the features of all processes' samples, in the processes' order; this one's own keep their gradient.

    Args:
        features: `(samples, features)`, as many on every process.
        accelerator: knows the processes.
    """
    if accelerator.num_processes == 1:
        return features
    parts = list(accelerator.gather(features.detach()).chunk(accelerator.num_processes))  # type: ignore[union-attr]
    parts[accelerator.process_index] = features
    return torch.cat(parts)


def replayed_loss(
    generate: Callable[[slice], torch.Tensor],
    count: int,
    micro_batch_size: int,
    loss: Callable[[torch.Tensor], torch.Tensor],
    backward: Callable[[torch.Tensor], None],
) -> torch.Tensor:
    """Computes a loss of `count` samples and, part by part, its gradient.

    Args:
        generate: computes the features of some of the samples, `(part, features)`. It is called twice for each and
            must give the same both times.
        count: samples.
        micro_batch_size: samples of a part.
        loss: a scalar of all the features `(count, features)`.
        backward: sends a scalar backward; called for all parts but the last.

    Returns:
        The loss, whose own gradient is the last part's: sending it backward completes the gradient.
    """
    parts = [slice(start, min(start + micro_batch_size, count)) for start in range(0, count, micro_batch_size)]
    with torch.no_grad():
        features = torch.cat([generate(part) for part in parts])
    value = loss(features.requires_grad_())
    (gradient,) = torch.autograd.grad(value, features)
    for part in parts[:-1]:
        backward((generate(part) * gradient[part]).sum())
    last = (generate(parts[-1]) * gradient[parts[-1]]).sum()
    return value.detach() + (last - last.detach())
