r"""How the noise of two images is mixed: spherical and linear interpolation, and NoiseDiffusion's correction.

With \(z_i\) the inverted state of image \(x_i\) at the level \(\bar\alpha\), weight \(w\) and fresh noise \(n\),

\(\alpha = \sqrt{1-\gamma^2} \cos(w\pi/2), \quad \beta = \sqrt{1-\gamma^2} \sin(w\pi/2), \quad
\mu = s\alpha/(\alpha+\beta), \quad \nu = s\beta/(\alpha+\beta)\)

\(z = \mathrm{clip}(\alpha\,\mathrm{clip}(z_0) + \beta\,\mathrm{clip}(z_1) + (\mu-\alpha)\sqrt{\bar\alpha}\,x_0
+ (\nu-\beta)\sqrt{\bar\alpha}\,x_1 + \gamma\sqrt{1-\bar\alpha}\,n)\), clipped to \([-c, c]\):

image and noise get weights of their own, and the noise keeps its variance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from diffusers.utils.torch_utils import randn_tensor

__all__ = ["interpolate_embeddings", "lerp", "noise_diffusion_mix", "noise_diffusion_weights", "slerp"]

PerFrame: TypeAlias = float | Sequence[float] | torch.Tensor
"""One number for all frames, or one for each."""


def slerp(a: torch.Tensor, b: torch.Tensor, weight: PerFrame, *, eps: float = 1e-7) -> torch.Tensor:
    r"""Interpolates along the great circle: \([\sin((1-w)\theta)\,a + \sin(w\theta)\,b] / \sin\theta\).

    \(\theta\) is the angle between the flattened samples, one angle per sample; a sample of zero norm is interpolated
    linearly.

    Args:
        a: `(batch, ...)`, the end at `weight` 0.
        b: the same shape, the end at `weight` 1.
        weight: a number, or N numbers.
        eps: the cosine is kept within `1 - eps` of 0, where the formula is defined.

    Returns:
        `(batch, ...)`, or `(N, batch, ...)` for N weights, in the dtype of `a`; computed in float64.

    Raises:
        ValueError: the shapes differ, or `weight` has more than one dimension.

    Example:
        >>> import torch
        >>> from diffusers_ext import slerp
        >>> slerp(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), 0.5)
        tensor([[0.7071, 0.7071]])
    """
    _check_pair("a", a, "b", b)
    first, second = a.double().flatten(1), b.double().flatten(1)
    norms = first.norm(dim=1) * second.norm(dim=1)
    cosine = (first * second).sum(1) / norms.clamp(min=torch.finfo(torch.float64).tiny)
    theta = cosine.clamp(-1 + eps, 1 - eps).arccos()
    w = _frames("weight", weight, a.device)
    column = w if w.ndim == 0 else w[:, None]
    straight = norms == 0
    of_first = torch.where(straight, 1 - column, ((1 - column) * theta).sin() / theta.sin())
    of_second = torch.where(straight, column, (column * theta).sin() / theta.sin())
    mixed = of_first[..., None] * first + of_second[..., None] * second
    return mixed.reshape(*w.shape, *a.shape).to(a.dtype)


def lerp(a: torch.Tensor, b: torch.Tensor, weight: PerFrame) -> torch.Tensor:
    """Interpolates linearly, `(1 - weight) a + weight b`; arguments, shapes and errors as in `slerp`.

    Example:
        >>> import torch
        >>> from diffusers_ext import lerp
        >>> lerp(torch.zeros(1, 2), torch.ones(1, 2), [0.0, 0.5]).shape
        torch.Size([2, 1, 2])
    """
    _check_pair("a", a, "b", b)
    w = _frames("weight", weight, a.device)
    shaped = w.reshape(*w.shape, *[1] * a.ndim)
    return ((1 - shaped) * a.double() + shaped * b.double()).reshape(*w.shape, *a.shape).to(a.dtype)


def noise_diffusion_weights(
    weight: PerFrame, gamma: PerFrame = 0.0, injection: PerFrame = 1.2
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    r"""Computes \(\alpha, \beta, \mu, \nu\) of the module's equation; \(\alpha^2+\beta^2+\gamma^2 = 1\).

    Args:
        weight: w in `[0, 1]`; 0 is the first image.
        gamma: share of fresh noise, in `[0, 1]`.
        injection: s, the sum of \(\mu\) and \(\nu\).

    Returns:
        Four float64 tensors, scalars or `(N,)`.

    Raises:
        ValueError: an argument lies outside its range, or the numbers of frames differ.

    Example:
        >>> from diffusers_ext import noise_diffusion_weights
        >>> alpha, beta, mu, nu = noise_diffusion_weights(0.5)
        >>> [round(float(v), 4) for v in (alpha, beta, mu, nu)]
        [0.7071, 0.7071, 0.6, 0.6]
    """
    w, g, s = _share("weight", weight), _share("gamma", gamma), _frames("injection", injection)
    _check_lengths({"weight": w, "gamma": g, "injection": s})
    kept = (1 - g.square()).sqrt()
    cosine, sine = (w * (math.pi / 2)).cos(), (w * (math.pi / 2)).sin()
    # The common factor of alpha and beta cancels, which keeps mu and nu defined where gamma is 1.
    return kept * cosine, kept * sine, s * cosine / (cosine + sine), s * sine / (cosine + sine)


def noise_diffusion_mix(
    z_0: torch.Tensor,
    z_1: torch.Tensor,
    x_0: torch.Tensor,
    x_1: torch.Tensor,
    weights: PerFrame,
    sqrt_alpha_prod: float,
    sqrt_one_minus_alpha_prod: float,
    *,
    gamma: PerFrame = 0.0,
    injection: PerFrame = 1.2,
    mu: PerFrame | None = None,
    nu: PerFrame | None = None,
    boundary: PerFrame | None = 2.0,
    noise: torch.Tensor | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> torch.Tensor:
    """Mixes two inverted states with NoiseDiffusion's correction (the module's equation).

    Args:
        z_0: `(batch, ...)` inverted states of the first images.
        z_1: those of the second.
        x_0: the first images themselves, in the space that is diffused.
        x_1: the second.
        weights: one number, or N, in `[0, 1]`.
        sqrt_alpha_prod: root of the cumulated alpha at which images are put back in.
        sqrt_one_minus_alpha_prod: root of one minus it, the scale of `noise`.
        gamma: share of fresh noise, in `[0, 1]`, one number or N.
        injection: sum of `mu` and `nu`, one number or N.
        mu: weight of the first image, one number or N; together with `nu` it replaces `injection`.
        nu: weight of the second image.
        boundary: c > 0, one number or N; `None` does not clip. States must have variance near 1 for it to make sense.
        noise: `(batch, ...)` standard normal, the same for all frames; drawn if it is left out and `gamma` is not 0.
        generator: draws it, one generator or one per sample.

    Returns:
        `(N, batch, ...)`, N = 1 for a single weight, in the dtype of `z_0`.

    Raises:
        ValueError: shapes or numbers of frames differ, a number lies outside its range, or one of `mu` and `nu` is
            missing.

    Reference:
        Zheng et al., "NoiseDiffusion: Correcting Noise for Image Interpolation with Diffusion Models beyond
        Spherical Linear Interpolation", arXiv 2403.08840.

    Example:
        >>> import torch
        >>> from diffusers_ext import noise_diffusion_mix
        >>> z, x = torch.randn(2, 1, 4), torch.zeros(1, 4)
        >>> noise_diffusion_mix(z[0], z[1], x, x, [0.25, 0.75], 0.3, 0.95).abs().max() <= 2
        tensor(True)
    """
    for name, tensor in (("z_1", z_1), ("x_0", x_0), ("x_1", x_1)):
        _check_pair("z_0", z_0, name, tensor)
    if (mu is None) != (nu is None):
        raise ValueError(f"`mu` and `nu` must be given together or not at all, got mu={mu!r} and nu={nu!r}.")
    given = {"injection": injection, "mu": mu, "nu": nu, "boundary": boundary}
    number = {name: _frames(name, value, z_0.device) for name, value in given.items() if value is not None}
    number |= {"weights": _share("weights", weights, z_0.device), "gamma": _share("gamma", gamma, z_0.device)}
    frames = _check_lengths(number)
    alpha, beta, image_0, image_1 = noise_diffusion_weights(number["weights"], number["gamma"], number["injection"])
    if mu is not None:
        image_0, image_1 = number["mu"], number["nu"]
    c = number.get("boundary")
    if c is not None and not bool((c > 0).all()):
        raise ValueError(f"`boundary` must be > 0 or None, got {c.tolist()}.")

    dtype = torch.promote_types(z_0.dtype, torch.float32)
    z_0_, z_1_, x_0_, x_1_ = (tensor.to(dtype) for tensor in (z_0, z_1, x_0, x_1))

    def spread(values: torch.Tensor) -> torch.Tensor:
        return values.to(dtype).reshape(-1, *[1] * z_0.ndim)

    def clip(states: torch.Tensor) -> torch.Tensor:
        return states if c is None else states.clamp(-spread(c), spread(c))

    mixed = spread(alpha) * clip(z_0_) + spread(beta) * clip(z_1_)
    mixed = mixed + spread((image_0 - alpha) * sqrt_alpha_prod) * x_0_
    mixed = mixed + spread((image_1 - beta) * sqrt_alpha_prod) * x_1_
    if bool((number["gamma"] > 0).any()):
        if noise is None:
            noise = randn_tensor(z_0.shape, generator=generator, device=z_0.device, dtype=dtype)
        _check_pair("z_0", z_0, "noise", noise)
        mixed = mixed + spread(number["gamma"] * sqrt_one_minus_alpha_prod) * noise.to(z_0.device, dtype)
    return clip(mixed).expand(frames, *z_0.shape).to(z_0.dtype)


def interpolate_embeddings(
    e_0: torch.Tensor, e_1: torch.Tensor, weights: PerFrame, mode: Literal["lerp", "slerp"] = "lerp"
) -> torch.Tensor:
    """Interpolates text embeddings.

    Args:
        e_0: `(batch, ...)`, the end at weight 0.
        e_1: the same shape, the end at weight 1.
        weights: N numbers.
        mode: `"lerp"`, or `"slerp"` with one angle per sample.

    Returns:
        `(N, batch, ...)`; `(batch, ...)` for a single number.

    Raises:
        ValueError: `mode` is unknown, or the shapes differ.

    Example:
        >>> import torch
        >>> from diffusers_ext import interpolate_embeddings
        >>> interpolate_embeddings(torch.zeros(1, 77, 8), torch.ones(1, 77, 8), [0.2, 0.8]).shape
        torch.Size([2, 1, 77, 8])
    """
    if mode not in ("lerp", "slerp"):
        raise ValueError(f"`mode` must be 'lerp' or 'slerp', got {mode!r}.")
    return (lerp if mode == "lerp" else slerp)(e_0, e_1, weights)


def _check_pair(first: str, a: torch.Tensor, second: str, b: torch.Tensor) -> None:
    if a.shape != b.shape or a.ndim < 1:
        raise ValueError(
            f"`{second}` must have the shape (batch, ...) of `{first}`, got {tuple(b.shape)} and {tuple(a.shape)}."
        )


def _frames(name: str, value: PerFrame, device: torch.device | None = None) -> torch.Tensor:
    """Returns one number, or one per frame, as a float64 tensor."""
    try:
        tensor = torch.as_tensor(value, dtype=torch.float64, device=device)
    except (TypeError, ValueError, RuntimeError):
        tensor = torch.empty(0)
    if tensor.ndim > 1 or tensor.numel() == 0 or not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"`{name}` must be a number or a list of numbers, one per frame, got {value!r}.")
    return tensor


def _share(name: str, value: PerFrame, device: torch.device | None = None) -> torch.Tensor:
    numbers = _frames(name, value, device)
    if not bool(((numbers >= 0) & (numbers <= 1)).all()):
        raise ValueError(f"`{name}` must lie in [0, 1], got {numbers.tolist()}.")
    return numbers


def _check_lengths(numbers: dict[str, torch.Tensor]) -> int:
    """Returns the number of frames."""
    lengths = {name: values.numel() for name, values in numbers.items()}
    frames = max(lengths.values())
    wrong = [name for name, length in lengths.items() if length not in (1, frames)]
    if wrong:
        raise ValueError(f"`{wrong[0]}` must be one number or {frames}, one per frame, got {lengths[wrong[0]]}.")
    return frames
