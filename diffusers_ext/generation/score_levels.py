r"""The noise levels of a Diffusers scheduler, and those between them.

A level is \(x_t = a x_0 + b\,\epsilon\) with \(\sigma = b/a\), where \(x_t\) is what the network is given. Levels are
told by \(\sigma\), which means the same on every schedule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

__all__ = ["Levels", "Schedule", "as_levels", "as_real", "noise_from_output", "sigma_of_timestep", "timestep_of_sigma"]

LEAST_SIGNAL = 1e-3  # levels of smaller a hold nothing of the image, and 1 / a no digits
PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")


@dataclass(frozen=True)
class Levels:
    r"""Noise levels as float64 tensors of one shape, in the order asked for.

    Attributes:
        t: the timestep that the network is given.
        a: factor of the clean sample.
        b: factor of the noise.
        sigma: \(b/a\).
    """

    t: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    sigma: torch.Tensor


class Schedule:
    """What a scheduler says of noise levels; the scheduler itself is not changed.

    Args:
        scheduler: one with `alphas_cumprod`, of flow matching, or an EDM one.
        prediction_type: what the network predicts, by default as the scheduler says.

    Raises:
        ValueError: the scheduler is of another kind, the prediction type unknown or of another kind of schedule.
    """

    def __init__(self, scheduler: Any, prediction_type: str | None = None) -> None:
        config = getattr(scheduler, "config", None)
        if not isinstance(config, Mapping):
            raise ValueError(f"`scheduler` must be a Diffusers scheduler, got {scheduler!r}.")
        found = config.get("prediction_type", "epsilon") if prediction_type is None else prediction_type
        flow = isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or (
            not hasattr(scheduler, "alphas_cumprod") and "shift" in config
        )
        flow = flow or found == "flow_prediction" or bool(config.get("use_flow_sigmas", False))
        if flow and prediction_type is None:
            found = "flow_prediction"
        if found not in PREDICTIONS or (found == "flow_prediction") != flow:
            accepted = "'flow_prediction'" if flow else repr(PREDICTIONS[:3])
            raise ValueError(
                f"`prediction_type` must be {accepted} with {type(scheduler).__name__}, got {prediction_type!r}."
            )
        self.prediction_type = found
        self.kind = "flow" if flow else "edm" if hasattr(scheduler, "precondition_outputs") else "vp"
        self.length = int(config.get("num_train_timesteps", 1000))
        self.sigma_data = float(config.get("sigma_data", 1.0))
        if flow:
            s = _flow_times(scheduler, self.length)
            self._t, self._sigma = self.length * s, s / (1 - s)
        elif self.kind == "edm":
            self._sigma = np.geomspace(config["sigma_min"], config["sigma_max"], self.length)
            self._t = np.log(self._sigma) / 4
        elif hasattr(scheduler, "alphas_cumprod"):
            alphas = scheduler.alphas_cumprod.double().cpu().numpy()
            kept = (alphas >= LEAST_SIGNAL**2) & (alphas < 1)
            self._t = np.arange(len(alphas), dtype=np.float64)[kept]
            self._sigma = np.sqrt((1 - alphas[kept]) / alphas[kept])
        else:
            raise ValueError(
                "`scheduler` must have `alphas_cumprod`, or be one of flow matching or of EDM, got "
                f"{type(scheduler).__name__}."
            )

    @property
    def levels(self) -> Levels:
        """The scheduler's own levels by rising sigma, without those of a < 0.001."""
        return self.at(torch.from_numpy(self._sigma))

    def at(self, sigma: float | torch.Tensor, beyond: bool = False) -> Levels:
        """Returns the levels of some sigmas.

        Between timesteps ln sigma is taken as linear in t, on flow schedules t as proportional to sigma / (1 + sigma).

        Args:
            sigma: levels of any shape.
            beyond: take levels outside the scheduler's too; their t is that of the nearest.

        Raises:
            ValueError: a sigma is outside the scheduler's levels.
        """
        sigma = as_levels(sigma, "sigma")
        if beyond and not bool(((sigma > 0) & sigma.isfinite()).all()):
            raise ValueError(f"`sigma` must be above 0 and finite, got {sigma.tolist()}.")
        low, high = float(self._sigma[0]), float(self._sigma[-1])
        outside = sigma[~((sigma >= low * (1 - 1e-6)) & (sigma <= high * (1 + 1e-6)))]
        if outside.numel() and not beyond:
            raise ValueError(
                f"`sigma` must be within the scheduler's levels, {low:.4g} to {high:.4g}, got {float(outside[0]):.4g}."
            )
        if self.kind == "flow":
            a = 1 / (1 + sigma)
            t = (self.length * sigma * a).clamp(float(self._t[0]), float(self._t[-1]))
        else:
            a = (sigma.square() + self.sigma_data**2).rsqrt()
            t = torch.as_tensor(np.interp(sigma.log().numpy(), np.log(self._sigma), self._t))
        return Levels(t, a, a * sigma, sigma)

    def eps(self, output: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Turns a network's output at x into its estimate of the noise; a and b broadcast to x."""
        if self.kind == "edm":  # of whichever type, the output is added to a share of the input
            variance, sign = (b / a).square() + self.sigma_data**2, -1 if self.prediction_type == "v_prediction" else 1
            skip = self.sigma_data**2 / variance
            clean = skip * x / a + sign * (b / a) * self.sigma_data / variance.sqrt() * output
            return (x - a * clean) / b
        return noise_from_output(output, x, a, b, self.prediction_type)


def noise_from_output(output: Any, x: Any, a: Any, b: Any, prediction_type: str) -> Any:
    """Returns the noise that an output of the network means at x = a x0 + b n; see `PREDICTIONS`."""
    if prediction_type == "epsilon":
        return output
    if prediction_type == "sample":
        return (x - a * output) / b
    return x + a * output if prediction_type == "flow_prediction" else a * output + b * x


def _log_sigmas(alphas_cumprod: torch.Tensor) -> np.ndarray:
    alphas = as_levels(alphas_cumprod, "alphas_cumprod").numpy()
    inside = alphas.ndim == 1 and len(alphas) > 0 and ((alphas > 0) & (alphas < 1)).all()
    if not inside or (np.diff(alphas) > 0).any():
        raise ValueError(
            "`alphas_cumprod` must be a falling row of numbers between 0 and 1, not one of zero terminal SNR, got "
            f"the shape {alphas.shape} and numbers from {alphas.min(initial=1):.4g} to {alphas.max(initial=0):.4g}."
        )
    return np.log((1 - alphas) / alphas) / 2


def sigma_of_timestep(alphas_cumprod: torch.Tensor, t: float | torch.Tensor) -> torch.Tensor:
    r"""Returns the noise levels \(\sigma = b/a\) of timesteps; between integers ln sigma is linear.

    Args:
        alphas_cumprod: `(num_train_timesteps,)` of a scheduler.
        t: timesteps of any shape, fractions included, in `0..num_train_timesteps - 1`.

    Returns:
        float64 tensor of `t`'s shape.

    Raises:
        ValueError: a timestep is outside, or the schedule ends at zero SNR.

    Example:
        >>> from diffusers import DDPMScheduler
        >>> from diffusers_ext import sigma_of_timestep
        >>> sigma_of_timestep(DDPMScheduler().alphas_cumprod, [0, 100.5])
        tensor([0.0100, 0.3440], dtype=torch.float64)
    """
    logs, t = _log_sigmas(alphas_cumprod), as_levels(t, "t")
    outside = t[~((t >= 0) & (t <= len(logs) - 1))]
    if outside.numel():
        raise ValueError(f"`t` must lie in 0..{len(logs) - 1}, got {outside[0]:.6g}.")
    return torch.as_tensor(np.exp(np.interp(t.numpy(), np.arange(len(logs)), logs)))


def timestep_of_sigma(alphas_cumprod: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
    r"""Returns the timesteps that a network is given at noise levels: the inverse of `sigma_of_timestep`.

    Levels beyond the schedule get its first or last timestep.

    Args:
        alphas_cumprod: `(num_train_timesteps,)` of a scheduler.
        sigma: levels \(\sigma = b/a > 0\) of any shape.

    Returns:
        float64 tensor of `sigma`'s shape, fractions in `0..num_train_timesteps - 1`.

    Raises:
        ValueError: a level is not above 0, or the schedule ends at zero SNR.
    """
    logs, sigma = _log_sigmas(alphas_cumprod), as_levels(sigma, "sigma")
    wrong = sigma[~(sigma > 0)]
    if wrong.numel():
        raise ValueError(f"`sigma` must be above 0, got {wrong[0]:.4g}.")
    return torch.as_tensor(np.interp(sigma.log().numpy(), logs, np.arange(len(logs))))


def as_levels(sigma: Any, name: str) -> torch.Tensor:
    """Returns noise levels in float64; what are no numbers is a `ValueError` that names the argument."""
    return as_real(name, sigma, torch.float64).to("cpu", torch.float64)


def as_real(name: str, values: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Returns a tensor of a number, a tensor, an array or nested lists.

    Args:
        name: of the argument.
        values: tensors and arrays keep their precision.
        dtype: of numbers and lists of them, by default torch's.

    Raises:
        ValueError: they are no real numbers; the message has `name`.
    """
    try:
        found = torch.as_tensor(values, dtype=None if hasattr(values, "dtype") else dtype)
    except (TypeError, ValueError, RuntimeError):
        found = None
    if found is None or found.is_complex():
        raise ValueError(f"`{name}` must be a real number, or several, got {values!r}.")
    return found


def _flow_times(scheduler: Any, length: int) -> np.ndarray:
    """Returns the rising noise levels s of a flow schedule, shifted as in training, below 1 - `LEAST_SIGNAL`."""
    config = scheduler.config
    s = np.arange(1, length + 1) / length
    shift = 1.0 if config.get("use_dynamic_shifting") else config.get("shift", config.get("flow_shift", 1.0))
    s = shift * s / (1 + (shift - 1) * s)
    return s[1 - s >= LEAST_SIGNAL]
