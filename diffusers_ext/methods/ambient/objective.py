r"""Learning the clean sample from noisy ones of known level.

A sample \(y = x_0 + \sigma_n n\) is noised on to \(x_t = y + \sqrt{\sigma^2 - \sigma_n^2}\, n'\) with
\(\sigma > \sigma_n\). With \(q = (\sigma_n / \sigma)^2\), and \(D = \mathbb E[x_0 | x_t]\) to be learned,

\[
\mathbb E[y | x_t] = (1 - q) D + q x_t, \qquad
\mathbb E[\hat x | x_t] = D \;\text{ for }\; \hat x = (y - q x_t) / (1 - q).
\]

So the squared error of \((1 - q) D + q x_t\) to y is least for the clean denoiser (A), and so is any denoising loss
whose clean sample is replaced by \(\hat x\) (B); the first is \((1 - q)^2\) times the second.
"""

from __future__ import annotations

import torch

__all__ = ["add_noise_to", "ambient_prediction", "ambient_prediction_vp", "unbiased_clean_target", "vp_timestep"]


def _levels(name: str, values: torch.Tensor | float, x: torch.Tensor) -> torch.Tensor:
    """Returns noise levels as float64 of `x`'s device, one a sample or one for all, shaped to multiply samples.

    Raises:
        ValueError: they are not finite, negative, or of another shape.
    """
    levels = torch.as_tensor(values, dtype=torch.float64, device=x.device)
    if levels.ndim == x.ndim and levels[0].numel() == 1:  # shaped for the samples already
        levels = levels.flatten()
    if levels.ndim > 1 or (levels.ndim == 1 and len(levels) not in (1, len(x))):
        raise ValueError(f"`{name}` must be one level or one for each of {len(x)} samples, got {tuple(levels.shape)}.")
    if not bool((levels.isfinite() & (levels >= 0)).all()):
        raise ValueError(f"`{name}` must hold finite noise levels >= 0, got {levels.tolist()}.")
    return levels.view(-1, *[1] * (x.ndim - 1))


def _both(
    sigma: torch.Tensor | float, sigma_n: torch.Tensor | float, x: torch.Tensor, strictly: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    level, own = _levels("sigma", sigma, x), _levels("sigma_n", sigma_n, x)
    low = level <= own if strictly else level < own
    low = (low & (own > 0)) | (level <= 0)
    if bool(low.any()):
        sign = ">" if strictly else ">="
        raise ValueError(
            f"`sigma` must be > 0 and {sign} `sigma_n`, the level that the samples have already, got "
            f"{level.flatten().tolist()} with {own.flatten().tolist()}."
        )
    return level, own


def add_noise_to(
    y: torch.Tensor, sigma_n: torch.Tensor | float, sigma: torch.Tensor | float, noise: torch.Tensor
) -> torch.Tensor:
    r"""Noises samples on: \(x_t = y + \sqrt{\sigma^2 - \sigma_n^2}\, n'\).

    Args:
        y: `(batch, ...)` samples of level `sigma_n`.
        sigma_n: their levels, `(batch,)` or one for all; 0 is clean.
        sigma: the levels to reach, likewise, none below `sigma_n`.
        noise: standard normal, of `y`'s shape.

    Returns:
        Samples of level `sigma`.

    Raises:
        ValueError: a level is negative, not finite, of another shape, or `sigma` is below `sigma_n`.

    Reference:
        "How much is a noisy image worth?", arXiv 2411.02780, section 3.

    Example:
        >>> import torch
        >>> from diffusers_ext import add_noise_to
        >>> add_noise_to(torch.zeros(1, 1), sigma_n=3.0, sigma=5.0, noise=torch.ones(1, 1))
        tensor([[4.]])
    """
    level, own = _both(sigma, sigma_n, y, strictly=False)
    return y + ((level - own) * (level + own)).sqrt().to(y.dtype) * noise


def ambient_prediction(
    x0_pred: torch.Tensor, x_t: torch.Tensor, sigma: torch.Tensor | float, sigma_n: torch.Tensor | float
) -> torch.Tensor:
    r"""Turns a prediction of the clean sample into one of the noisy sample: \((1 - q) D + q x_t\).

    Args:
        x0_pred: `(batch, ...)` predictions of the clean samples, D.
        x_t: the samples of level `sigma` that they were made from.
        sigma: `(batch,)` or one for all.
        sigma_n: levels of the noisy samples, likewise; 0 is clean, and the prediction then stays as it is.

    Returns:
        E[y | x_t], to be compared with y.

    Raises:
        ValueError: a level is negative, not finite, of another shape, or `sigma` is below `sigma_n`.

    Reference:
        arXiv 2411.02780, section 3; "Consistent Diffusion Meets Tweedie", arXiv 2404.10177, theorem 1.

    Example:
        >>> import torch
        >>> from diffusers_ext import ambient_prediction
        >>> ambient_prediction(torch.zeros(1, 1), torch.ones(1, 1), sigma=2.0, sigma_n=1.0)
        tensor([[0.2500]])
    """
    level, own = _both(sigma, sigma_n, x_t, strictly=False)
    q = (own / level) ** 2
    mixed = (1 - q).to(x_t.dtype) * x0_pred + q.to(x_t.dtype) * x_t
    return torch.where(own > 0, mixed, x0_pred)


def unbiased_clean_target(
    y: torch.Tensor, x_t: torch.Tensor, sigma: torch.Tensor | float, sigma_n: torch.Tensor | float
) -> torch.Tensor:
    r"""Computes what stands for the clean sample in a denoising loss: \(\hat x = (y - q x_t) / (1 - q)\).

    Its mean given `x_t` is that of the clean sample; its variance grows like \(1 / (1 - q)\).

    Args:
        y: `(batch, ...)` noisy samples.
        x_t: the same, noised on to level `sigma`.
        sigma: `(batch,)` or one for all, above `sigma_n`.
        sigma_n: levels of the noisy samples, likewise; 0 is clean, and `y` then stays as it is.

    Raises:
        ValueError: a level is negative, not finite, of another shape, or `sigma` is not above `sigma_n`.

    Reference:
        "Ambient Diffusion Omni", arXiv 2506.10038, section 3.

    Example:
        >>> import torch
        >>> from diffusers_ext import unbiased_clean_target
        >>> unbiased_clean_target(torch.ones(1, 1), torch.zeros(1, 1), sigma=2.0, sigma_n=1.0)  # 1 / (1 - 1/4)
        tensor([[1.3333]])
    """
    level, own = _both(sigma, sigma_n, x_t, strictly=True)
    q, rest = (own / level) ** 2, (level - own) * (level + own) / level**2
    substituted = (y - q.to(y.dtype) * x_t) / rest.to(y.dtype)
    return torch.where(own > 0, substituted, y)


def ambient_prediction_vp(
    x0_pred: torch.Tensor,
    x_t: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    t: torch.Tensor | int,
    t_n: torch.Tensor | int,
) -> torch.Tensor:
    r"""Turns a prediction of the clean sample into one of the noisy sample, on a DDPM schedule.

    The noisy sample is \(y = \sqrt{\bar\alpha_n} x_0 + \sqrt{1 - \bar\alpha_n}\, n\), and
    \(x_t = s y + c\, n'\) with \(s^2 = \bar\alpha_t / \bar\alpha_n\), \(c^2 = 1 - s^2\):

    \[
    \mathbb E[y | x_t] = \frac 1 s \Bigl( x_t + \frac{c^2}{1 - \bar\alpha_t} (\sqrt{\bar\alpha_t} D - x_t) \Bigr).
    \]

    Args:
        x0_pred: `(batch, ...)` predictions of the clean samples, D.
        x_t: the samples at step `t` that they were made from.
        alphas_cumprod: `(T,)`, the scheduler's.
        t: steps `0..T-1`, `(batch,)` or one for all, none below `t_n`.
        t_n: steps of the noisy samples, likewise; -1 is clean, which step 0 is not.

    Returns:
        E[y | x_t], to be compared with y.

    Raises:
        ValueError: a step is outside of its range, or `t` is below `t_n`.

    Reference:
        arXiv 2404.10177, theorem 1.

    Example:
        >>> import torch
        >>> from diffusers_ext import ambient_prediction_vp
        >>> alphas_cumprod = torch.tensor([0.9, 0.5])
        >>> x0, x = torch.zeros(2, 1), torch.ones(2, 1)
        >>> ambient_prediction_vp(x0, x, alphas_cumprod, t=1, t_n=torch.tensor([-1, 1]))  # clean, and as it is
        tensor([[0.],
                [1.]])
    """
    last = len(alphas_cumprod) - 1
    steps = [torch.as_tensor(value, device=x_t.device).expand(len(x_t)) for value in (t, t_n)]
    for name, value, least in (("t", steps[0], 0), ("t_n", steps[1], -1)):
        if value.is_floating_point() or bool(((value < least) | (value > last)).any()):
            raise ValueError(f"`{name}` must hold integers in {least}..{last}, got {value.tolist()}.")
    if bool((steps[0] < steps[1]).any()):
        raise ValueError(f"`t` must be at least `t_n`, got {steps[0].tolist()} with {steps[1].tolist()}.")
    alphas = torch.cat([alphas_cumprod.double(), torch.ones(1, dtype=torch.float64)]).to(x_t.device)  # [-1] is clean
    shape = (-1, *[1] * (x_t.ndim - 1))
    now, own = alphas[steps[0]].view(shape), alphas[steps[1]].view(shape)
    scale = (now / own).sqrt()
    part = (1 - now / own) / (1 - now)
    weight_x0, weight_x = (part * now.sqrt() / scale).to(x_t.dtype), ((1 - part) / scale).to(x_t.dtype)
    return torch.where(steps[1].view(shape) < 0, x0_pred, weight_x0 * x0_pred + weight_x * x_t)


def vp_timestep(alphas_cumprod: torch.Tensor, sigma_n: torch.Tensor | float) -> torch.Tensor:
    r"""Finds the first step of a DDPM schedule whose level \(\sqrt{(1 - \bar\alpha) / \bar\alpha}\) is not below one.

    Samples of level `sigma_n` are brought there by `add_noise_to` up to that step's level, and scaled by
    \(\sqrt{\bar\alpha}\).

    Args:
        alphas_cumprod: `(T,)`, the scheduler's.
        sigma_n: noise levels >= 0 of samples \(x_0 + \sigma_n n\).

    Returns:
        Steps of `sigma_n`'s shape; -1 where it is 0, which is clean.

    Raises:
        ValueError: a level is negative, not finite, or above that of the last step.

    Example:
        >>> import torch
        >>> from diffusers_ext import vp_timestep
        >>> vp_timestep(torch.tensor([0.9, 0.5, 0.1]), torch.tensor([0.0, 0.01, 1.0, 2.0]))  # levels 1/3, 1 and 3
        tensor([-1,  0,  1,  2])
    """
    levels = torch.as_tensor(sigma_n, dtype=torch.float64)
    alphas = alphas_cumprod.double().to(levels.device)
    # A hair of slack, so that a level that was computed from a step in single precision finds that step.
    table = ((1 - alphas) / alphas).sqrt() * (1 + 1e-6)
    if not bool((levels.isfinite() & (levels >= 0) & (levels <= table[-1])).all()):
        raise ValueError(f"`sigma_n` must hold finite levels in [0, {float(table[-1]):.4g}], got {levels.tolist()}.")
    return torch.where(levels > 0, torch.searchsorted(table, levels), -1)
