r"""What a noise schedule leaves of the image at its last step.

With \(\bar\alpha_T > 0\) the network is trained on \(\sqrt{\bar\alpha_T} x_0 + \sqrt{1 - \bar\alpha_T} n\), never on
pure noise. Noise spreads over all frequencies alike and images do not, so the trace that is left is the image's
brightness and coarse layout: at spatial frequency \(f\) the signal-to-noise ratio is
\(\bar\alpha_T / (1 - \bar\alpha_T) \cdot E |X(f)|^2\), with the orthonormal Fourier transform \(X\) of the image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch

__all__ = ["SignalLeak", "signal_leak", "terminal_snr"]


def terminal_snr(scheduler: Any) -> float:
    """Computes the signal-to-noise ratio at the last step of the schedule a model is trained on.

    Args:
        scheduler: a Diffusers scheduler, or its configuration with `_class_name`.

    Returns:
        The ratio of variances for data of variance 1; 0 means that the schedule ends in pure noise.

    Raises:
        ValueError: the scheduler tells neither `alphas_cumprod` nor `sigmas`.

    Reference:
        Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed", arXiv 2305.08891, section 3.1.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
        >>> round(terminal_snr(scheduler), 6)
        0.004682
    """
    if isinstance(scheduler, Mapping):
        name = scheduler.get("_class_name")
        cls = getattr(diffusers, str(name), None)
        if cls is None or not hasattr(cls, "from_config"):
            raise ValueError(f"`scheduler` must be a scheduler or a config with its `_class_name`, got {name!r}.")
        # The values that it notes as defaults hold too: they may have been given by position.
        scheduler = cls.from_config({k: v for k, v in scheduler.items() if k != "_use_default_values"})
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is not None:
        last = float(alphas[-1])
        return last / (1 - last)
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None:
        raise ValueError(
            f"`scheduler` must have `alphas_cumprod` or `sigmas`, got {type(scheduler).__name__} without either."
        )
    sigma = float(torch.as_tensor(sigmas).max())
    signal = 1 - sigma if type(scheduler).__name__.startswith("FlowMatch") else 1.0
    return (signal / sigma) ** 2


@dataclass(frozen=True)
class SignalLeak:
    """What is left of a set of images at the last step of a schedule.

    Attributes:
        snr: `terminal_snr` of the schedule.
        brightness_snr: signal-to-noise ratio of the mean over all pixels and channels; above 1 the start tells the
            brightness of the image more than not.
        frequencies: radial frequencies in cycles per pixel, from 0.
        snr_by_frequency: signal-to-noise ratio of each.
    """

    snr: float
    brightness_snr: float
    frequencies: torch.Tensor
    snr_by_frequency: torch.Tensor

    def plot(self) -> Any:
        """Returns a matplotlib figure of the ratio over frequency.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5, 3.2), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(self.frequencies, self.snr_by_frequency, marker="o")
        axes.axhline(1, color="grey", linewidth=1)
        axes.set(
            yscale="log", xlabel="cycles per pixel", ylabel="signal-to-noise ratio", title="left at the last step"
        )
        return figure


def signal_leak(scheduler: Any, images: torch.Tensor) -> SignalLeak:
    """Measures what a schedule leaves of images at its last step.

    Args:
        scheduler: a Diffusers scheduler, or its configuration with `_class_name`.
        images: `(images, channels, height, width)` in the space that is diffused: pixels in `[-1, 1]`, or latents
            times their scaling factor.

    Raises:
        ValueError: another shape, or what `terminal_snr` raises.

    Example:
        >>> import torch
        >>> from diffusers import DDIMScheduler
        >>> leak = signal_leak(DDIMScheduler(), torch.ones(1, 1, 8, 8))
        >>> round(leak.brightness_snr / leak.snr)  # a constant image of 64 pixels: all its power is in the mean
        64
    """
    if images.ndim != 4 or images.numel() == 0:
        raise ValueError(f"`images` must have the shape (images, channels, height, width), got {tuple(images.shape)}.")
    snr = terminal_snr(scheduler)
    images = images.double()
    pixels = images[0].numel()
    brightness = snr * images.flatten(1).mean(1).square().mean().item() * pixels
    power = torch.fft.fft2(images, norm="ortho").abs().square().mean((0, 1))
    height, width = power.shape
    radius = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None])
    step = 1 / max(height, width)
    ring = (radius / step).round().long()
    counts = torch.bincount(ring.flatten())
    rings = torch.bincount(ring.flatten(), power.flatten()) / counts.clamp(min=1)
    frequencies = torch.arange(len(counts)) * step
    kept = counts > 0
    return SignalLeak(snr, brightness, frequencies[kept], snr * rings[kept])
