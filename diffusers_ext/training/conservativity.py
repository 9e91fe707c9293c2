"""A penalty on networks whose Jacobian is not symmetric, as that of a score is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["predict_with_asymmetry"]


def predict_with_asymmetry(
    predict: Callable[[torch.Tensor], torch.Tensor], noisy: torch.Tensor, probes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Calls a network and estimates how asymmetric its Jacobian J by its noisy input is.

    With two normal probes \((v^\top J w - w^\top J v)^2\) is \(|J - J^\top|^2\) in expectation (arXiv 2402.03845,
    section 4). Noise, v, clean sample and velocity differ from each other by multiples and by symmetric parts, so that
    it is 0 for all of them or for none. Needs two backward passes with a graph, and the attention that has second
    derivatives.

    Args:
        predict: the network as a function of its noisy input.
        noisy: `(batch, ...)`.
        probes: `(batch, 2, ...)` standard normal values.

    Returns:
        The prediction, and the mean of the estimate over samples and values, a scalar with gradient.

    Example:
        >>> import torch
        >>> from diffusers_ext.training.conservativity import predict_with_asymmetry
        >>> turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        >>> probes = torch.randn(20000, 2, 2, generator=torch.Generator().manual_seed(0))
        >>> _, asymmetry = predict_with_asymmetry(lambda x: x @ turn, torch.zeros(20000, 2), probes)
        >>> round(asymmetry.item(), 1)  # |J - J^T|^2 = 8, over two values
        4.0
    """
    v, w = probes.unbind(1)
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        x = noisy.detach().requires_grad_()
        prediction = predict(x)
        first, second = (
            torch.autograd.grad(prediction, x, probe.to(prediction.dtype), create_graph=True)[0] for probe in (v, w)
        )
    difference = (first * w - second * v).flatten(1).float().sum(1)
    return prediction, difference.square().mean() / noisy[0].numel()
