r"""The loss of signals that are seen through a forward model only (2306.11719, eq. 7).

With \(\hat S\) the network's signal, \(\phi_t\) the parameters of the noised observation \(O\) and \(\phi_n\) those
of a novel one, \(O_n\), which the network is not shown,

\[ \mathcal L = \lVert F(\hat S, \phi_t) - O \rVert^2 + \lambda \lVert F(\hat S, \phi_n) - O_n \rVert^2 . \]

Without the second term, parts of the signal outside of \(\phi_t\) would get no gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from diffusers_ext.training.config import is_number, require

from .protocol import ForwardModel, Parameters, map_parameters

__all__ = ["batch_and_views", "forward_model_loss", "observe"]


def batch_and_views(parameters: Parameters) -> tuple[int, int]:
    """Returns the first two sizes of parameters `(batch, views, ...)`.

    Raises:
        ValueError: they have no such sizes.
    """
    first: Any = next(iter(parameters.values()), None) if isinstance(parameters, Mapping) else parameters
    found = tuple(first.shape) if isinstance(first, torch.Tensor) else type(first).__name__
    good = isinstance(first, torch.Tensor) and first.ndim >= 2
    require(good, "parameters", found, "a tensor (batch, views, ...), or a dict of them")
    return first.shape[0], first.shape[1]


def observe(signal: torch.Tensor, forward_model: ForwardModel, parameters: Parameters) -> torch.Tensor:
    """Observes each signal from several views, in one call of the forward model.

    Args:
        signal: `(batch, ...)`.
        forward_model: the forward model.
        parameters: `(batch, views, ...)`.

    Returns:
        `(batch, views, ...)` observations.
    """
    sizes = batch_and_views(parameters)
    flat = map_parameters(lambda value: value.flatten(0, 1), parameters)
    return forward_model(signal.repeat_interleave(sizes[1], 0), flat).unflatten(0, sizes)


def forward_model_loss(
    signal: torch.Tensor,
    forward_model: ForwardModel,
    target: torch.Tensor,
    target_parameters: Parameters,
    novel: torch.Tensor | None = None,
    novel_parameters: Parameters | None = None,
    novel_weight: float = 1.0,
    target_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compares what is seen of the network's signals with observations (2306.11719, eq. 7).

    Args:
        signal: `(batch, ...)` the network's.
        forward_model: the forward model.
        target: `(batch, views, ...)` the observations whose noisy versions the network was shown.
        target_parameters: `(batch, views, ...)` theirs.
        novel: `(batch, views, ...)` observations that the network was not shown.
        novel_parameters: `(batch, views, ...)` theirs.
        novel_weight: lambda.
        target_weights: `(batch, views)`, 0 for targets that do not count; by default all count.

    Returns:
        A scalar: means over pixels and views of the squared errors, in fp32 (or in float64 of such signals).

    Raises:
        ValueError: `novel` without its parameters, observations of another shape than the forward model's, a sample
            without a target, or a weight below 0.

    Example:
        >>> import torch
        >>> from diffusers_ext import MaskForwardModel, forward_model_loss
        >>> signal = torch.zeros(1, 1, 1, 4, requires_grad=True)
        >>> seen = torch.tensor([1.0, 1.0, 0.0, 0.0]).view(1, 1, 1, 1, 4)
        >>> forward_model_loss(signal, MaskForwardModel((1, 4)), seen, seen).backward()
        >>> signal.grad.flatten()
        tensor([-0.5000, -0.5000,  0.0000,  0.0000])
    """
    good = is_number(novel_weight) and novel_weight >= 0
    require(good, "novel_weight", novel_weight, "a number >= 0")
    for name, one, other in (("novel", novel, novel_parameters), ("novel_parameters", novel_parameters, novel)):
        require(one is not None or other is None, name, None, "given, or both it and what belongs to it left out")
    loss = _error(observe(signal, forward_model, target_parameters), target, "target", target_weights)
    if novel is None or novel_parameters is None:
        return loss
    return loss + novel_weight * _error(observe(signal, forward_model, novel_parameters), novel, "novel")


def _error(
    seen: torch.Tensor, observation: torch.Tensor, name: str, weights: torch.Tensor | None = None
) -> torch.Tensor:
    if seen.shape != observation.shape:
        raise ValueError(
            f"`{name}` must have the shape of what the forward model sees, {tuple(seen.shape)}, got "
            f"{tuple(observation.shape)}."
        )
    require(seen.numel() > 0, name, tuple(seen.shape), "at least one observation of each sample, and one sample")
    seen = seen if seen.dtype == torch.float64 else seen.float()
    error = (seen - observation.to(seen.dtype)).square()
    if weights is None:
        return error.mean()
    require(weights.shape == seen.shape[:2], "target_weights", tuple(weights.shape), str(tuple(seen.shape[:2])))
    if not bool(((weights >= 0).all(1) & (weights.sum(1) > 0)).all()):
        raise ValueError("`target_weights` must be >= 0 and leave at least one target observation of each sample.")
    each = error.flatten(2).mean(2)
    return ((each * weights).sum(1) / weights.sum(1)).mean()
