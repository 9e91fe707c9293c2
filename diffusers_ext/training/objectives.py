r"""What a denoiser learns: noisy input, target and weighted loss.

With \(\bar\alpha_t\) the scheduler's `alphas_cumprod` and SNR \(= \bar\alpha_t / (1 - \bar\alpha_t)\):

- `EpsX0V`: \(x_t = \sqrt{\bar\alpha_t} x_0 + \sqrt{1 - \bar\alpha_t} n\); the target is \(n\), \(x_0\) or
  \(v = \sqrt{\bar\alpha_t} n - \sqrt{1 - \bar\alpha_t} x_0\).
- `FlowMatching`: \(x_t = (1 - \sigma) x_0 + \sigma n\); the target is \(n - x_0\), the model's timestep
  \(1000 \sigma\).
- `EDM`: \(x_t = x_0 + \sigma n\), which the network is given as \(c_{in} x_t\); the target is
  \((x_0 - c_{skip} x_t) / c_{out}\), the model's timestep \(\ln(\sigma) / 4\).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.training_utils import compute_snr

from diffusers_ext.generation.score_levels import sigma_of_timestep

__all__ = ["EDM", "EpsX0V", "FlowMatching", "Objective", "snr_weights"]

PredictionType = Literal["epsilon", "sample", "v_prediction"]
Weighting = Literal["none", "min_snr", "snr"]


def snr_weights(
    snr: torch.Tensor, prediction_type: PredictionType, weighting: Weighting, snr_gamma: float = 5.0
) -> torch.Tensor:
    """Computes the loss weight of each sample from its signal-to-noise ratio.

    `"min_snr"` is the weighting of Hang et al. (arXiv 2303.09556, eq. 6) in the space of each prediction:
    `min(SNR, gamma)` for the clean sample, divided by `SNR` for noise and by `SNR + 1` for v. `"snr"` weights every
    prediction as if the plain loss on the noise were taken.

    Args:
        snr: `(batch,)` signal-to-noise ratios, 0 and infinity included.
        prediction_type: `"epsilon"`, `"sample"` or `"v_prediction"`.
        weighting: `"none"`, `"min_snr"` or `"snr"`.
        snr_gamma: the bound of `"min_snr"`.

    Returns:
        `(batch,)` finite weights. Where SNR is 0 the weight of the noise is 0 / 0; its limit, 1, is taken.

    Example:
        >>> import torch
        >>> snr_weights(torch.tensor([0.0, 1.0, 10.0]), "epsilon", "min_snr")
        tensor([1.0000, 1.0000, 0.5000])
    """
    if weighting == "none":
        return torch.ones_like(snr)
    bound = snr.clamp(max=snr_gamma) if weighting == "min_snr" else snr
    if prediction_type == "sample":
        return bound
    if prediction_type == "v_prediction":
        return bound / (snr + 1)
    return torch.where(snr == 0, torch.ones_like(snr), bound / snr.clamp(min=torch.finfo(snr.dtype).tiny))


class Objective:
    """Makes noisy inputs and targets, and compares a prediction with its target."""

    def make(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the noisy samples and the targets, both of `x0`'s shape `(batch, ...)`."""
        raise NotImplementedError

    def model_timesteps(self, t: torch.Tensor) -> torch.Tensor:
        """Returns what the network is given as its timestep."""
        return t

    def predicted_sample(self, prediction: torch.Tensor, noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Returns the clean samples that a prediction sees in the noisy ones, `(batch, ...)` in fp32, not clipped."""
        raise NotImplementedError

    def snr(self, t: torch.Tensor) -> torch.Tensor:
        """Returns the `(batch,)` signal-to-noise ratios of timesteps."""
        raise NotImplementedError

    def weights(self, t: torch.Tensor) -> torch.Tensor | None:
        """Returns `(batch,)` loss weights, or `None` for the plain mean."""
        return None

    def loss(
        self, prediction: torch.Tensor, target: torch.Tensor, t: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns the weighted mean squared error, a scalar in fp32.

        Args:
            prediction: `(batch, ...)`.
            target: the same shape.
            t: `(batch,)` timesteps.
            mask: same shape or broadcastable to it; elements where it is 0 do not count.
        """
        weights = self.weights(t)
        if weights is None and mask is None:
            return F.mse_loss(prediction.float(), target.float())
        error = (prediction.float() - target.float()) ** 2
        if mask is not None:
            mask = mask.expand_as(error).float()
            each = (error * mask).flatten(1).sum(1) / mask.flatten(1).sum(1).clamp(min=1)
        else:
            each = error.flatten(1).mean(1)
        return each.mean() if weights is None else (weights * each).mean()


class EpsX0V(Objective):
    """Noise, clean sample or v on a discrete variance-preserving schedule; timesteps are ints, or fractions between.

    Args:
        scheduler: any Diffusers scheduler with `alphas_cumprod` and `add_noise`.
        weighting: see `snr_weights`.
        snr_gamma: bound of `"min_snr"`.

    Raises:
        ValueError: the scheduler's `prediction_type` is none of the three.
    """

    def __init__(self, scheduler: Any, weighting: Weighting = "none", snr_gamma: float = 5.0) -> None:
        self.prediction_type: PredictionType = scheduler.config.prediction_type
        if self.prediction_type not in ("epsilon", "sample", "v_prediction"):
            raise ValueError(
                "`scheduler.config.prediction_type` must be 'epsilon', 'sample' or 'v_prediction', got "
                f"{self.prediction_type!r}."
            )
        self.scheduler, self.snr_gamma = scheduler, snr_gamma
        self.weighting: Weighting = weighting

    def make(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Objective.make`; `t` holds timesteps in `0..T-1`."""
        if t.is_floating_point():
            a, b = ((value**0.5).to(x0.dtype).view(-1, *[1] * (x0.ndim - 1)) for value in self._squares(t))
            noisy, velocity = a * x0 + b * noise, a * noise - b * x0
        else:
            noisy = self.scheduler.add_noise(x0, noise, t)
            velocity = self.scheduler.get_velocity(x0, noise, t) if self.prediction_type == "v_prediction" else None
        return noisy, {"epsilon": noise, "sample": x0, "v_prediction": velocity}[self.prediction_type]

    def _squares(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the variances of signal and noise at fractional timesteps, `(batch,)` float64."""
        squared = sigma_of_timestep(self.scheduler.alphas_cumprod, t).square().to(t.device)
        return 1 / (1 + squared), squared / (1 + squared)

    def predicted_sample(self, prediction: torch.Tensor, noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """See `Objective.predicted_sample`; from v, (x_t sqrt(alpha) - v sqrt(1 - alpha))."""
        if self.prediction_type == "sample":
            return prediction.float()
        alphas = self._squares(t)[0] if t.is_floating_point() else self.scheduler.alphas_cumprod.to(noisy.device)[t]
        alpha = alphas.float().view(-1, *[1] * (noisy.ndim - 1))
        if self.prediction_type == "epsilon":
            return (noisy.float() - (1 - alpha).sqrt() * prediction.float()) / alpha.sqrt()
        return alpha.sqrt() * noisy.float() - (1 - alpha).sqrt() * prediction.float()

    def snr(self, t: torch.Tensor) -> torch.Tensor:
        """See `Objective.snr`."""
        if t.is_floating_point():
            signal, noise = self._squares(t)
            return (signal / noise).float()
        return compute_snr(self.scheduler, t)

    def weights(self, t: torch.Tensor) -> torch.Tensor | None:
        """Returns `(batch,)` weights of the chosen kind."""
        if self.weighting == "none":
            return None
        return snr_weights(self.snr(t), self.prediction_type, self.weighting, self.snr_gamma)


class FlowMatching(Objective):
    """Velocity of the straight path between data and noise (Lipman et al., arXiv 2210.02747).

    Args:
        num_train_timesteps: the network's timestep is this times the noise level, as Diffusers' flow-matching
            schedulers call it.
    """

    def __init__(self, num_train_timesteps: int = 1000) -> None:
        self.num_train_timesteps = num_train_timesteps

    def make(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Objective.make`; `t` holds noise levels in `[0, 1]`."""
        sigma = t.view(-1, *[1] * (x0.ndim - 1)).to(x0.dtype)
        return (1 - sigma) * x0 + sigma * noise, noise - x0

    def model_timesteps(self, t: torch.Tensor) -> torch.Tensor:
        """Returns `num_train_timesteps * sigma`."""
        return self.num_train_timesteps * t

    def predicted_sample(self, prediction: torch.Tensor, noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """See `Objective.predicted_sample`: `x_t - sigma v`."""
        return noisy.float() - t.view(-1, *[1] * (noisy.ndim - 1)).float() * prediction.float()

    def snr(self, t: torch.Tensor) -> torch.Tensor:
        """See `Objective.snr`: `((1 - sigma) / sigma)^2`."""
        return ((1 - t) / t).square()


class EDM(Objective):
    r"""The preconditioned clean sample of Karras et al. (arXiv 2206.00364, table 1), for any noise level.

    With \(\sigma_d\) the standard deviation of the data, \(c_{in} = 1 / \sqrt{\sigma^2 + \sigma_d^2}\),
    \(c_{skip} = \sigma_d^2 c_{in}^2\) and \(c_{out} = \sigma \sigma_d c_{in}\). The plain mean is their weighting,
    \((\sigma^2 + \sigma_d^2) / (\sigma \sigma_d)^2\) of the clean sample's squared error.

    Args:
        sigma_data: standard deviation of the data.
        sign: of the network's output; -1 for an `EDMEulerScheduler` that predicts v.

    Raises:
        ValueError: `sigma_data` is not a number > 0.

    Example:
        >>> import torch
        >>> from diffusers_ext import EDM
        >>> noisy, target = EDM().make(torch.ones(1, 1), torch.zeros(1, 1), t=torch.tensor([0.5]))
        >>> noisy, target  # 1 / sqrt(0.5) and (1 - 0.5) * sqrt(0.5) / 0.25
        (tensor([[1.4142]]), tensor([[1.4142]]))
    """

    def __init__(self, sigma_data: float = 0.5, sign: Literal[1, -1] = 1) -> None:
        if not sigma_data > 0:
            raise ValueError(f"`sigma_data` must be a number > 0, got {sigma_data!r}.")
        self.sigma_data, self.sign = sigma_data, sign

    def coefficients(self, sigma: torch.Tensor, ndim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns `c_in`, `c_skip` and `c_out`, shaped to multiply samples of `ndim` dimensions."""
        sigma = sigma.view(-1, *[1] * (ndim - 1))
        total = sigma**2 + self.sigma_data**2
        return total.rsqrt(), self.sigma_data**2 / total, self.sign * sigma * self.sigma_data * total.rsqrt()

    def make(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Objective.make`; `t` holds noise levels > 0, and the noisy samples are scaled by `c_in`."""
        c_in = self.coefficients(t, x0.ndim)[0].to(x0.dtype)
        # Not (x0 - c_skip x) / c_out, which divides small differences where there is little noise.
        sigma = t.view(-1, *[1] * (x0.ndim - 1)).to(x0.dtype)
        target = self.sign * (sigma * x0 - self.sigma_data**2 * noise) * c_in / self.sigma_data
        return c_in * (x0 + sigma * noise), target

    def model_timesteps(self, t: torch.Tensor) -> torch.Tensor:
        """Returns `ln(sigma) / 4`."""
        return t.log() / 4

    def predicted_sample(self, prediction: torch.Tensor, noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """See `Objective.predicted_sample`: `c_skip x + c_out F`, where `noisy` is `c_in x`."""
        c_in, c_skip, c_out = (c.float() for c in self.coefficients(t, noisy.ndim))
        return c_skip / c_in * noisy.float() + c_out * prediction.float()

    def snr(self, t: torch.Tensor) -> torch.Tensor:
        """See `Objective.snr`: `1 / sigma^2`."""
        return t**-2
