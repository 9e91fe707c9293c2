"""The samplers of Score SDE: predictors and correctors for three processes."""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config

from diffusers_ext.training.config import is_number, is_whole, require

from .langevin import check_sigmas
from .scheduling import FrameworkScheduler, Move, falling
from .sde import SDE, VPSDE, SDEKind, make_sde

__all__ = ["ScoreSDEScheduler"]

Predictor = Literal["reverse_diffusion", "ancestral", "euler_maruyama", "probability_flow"]
LAST_TIME = 1e-3  # at which Euler-Maruyama ends


class ScoreSDEScheduler(FrameworkScheduler):
    r"""Samples of a stochastic differential equation (2011.13456) with any denoiser.

    Processes are those of `VPSDE`, `VESDE` and `SubVPSDE`; s is the score \(-E/b\) of a network of DDPM's kind, which
    is given what it has learned to see at each level, and at levels beyond its own betas its first or last timestep.
    Of N steps the predictor makes

    * `"reverse_diffusion"`: VE \(x + (\sigma_i^2 - \sigma_{i-1}^2) s + \sqrt{\sigma_i^2 - \sigma_{i-1}^2}\, z\); VP
      \((2 - \sqrt{1 - B_i}) x + B_i s + \sqrt{B_i} z\) with \(B_i = 1 - \exp(-\int\beta)\) over
      \([(i - 1)/N, i/N]\) (the authors' \(\beta/N\) exceeds 1 in few steps); sub-VP Euler-Maruyama;
    * `"ancestral"`: VE the same mean, with noise of variance
      \(\sigma_{i-1}^2 (\sigma_i^2 - \sigma_{i-1}^2) / \sigma_i^2\); VP
      \((x + B_i s) / \sqrt{1 - B_i} + \sqrt{B_i} z\);
    * `"euler_maruyama"`: steps of \(dx = (f - g^2 s)\,dt + g\,dw\) over equal times from 1 to 0.001;
    * `"probability_flow"`: Euler steps in sigma of \(dx = (f - g^2 s / 2)\,dt\), which are DDIM's, without noise;
      `solve_probability_flow` has adaptive steps.

    The last step adds no noise. Before each, at the same level, `corrector_steps` Langevin steps
    \(x + e s + \sqrt{2 e} z\) are made, \(e = 2 A\,(\mathrm{snr}\,|z| / |s|)^2\), A = 1 for VE and \(1 - B_i\) else;
    each is a call of the network and an entry of `timesteps`.

    Args:
        num_train_timesteps: length of the network's schedule.
        beta_start: its first beta.
        beta_end: its last beta.
        beta_schedule: as in `DDPMScheduler`.
        trained_betas: betas instead.
        prediction_type: what the network predicts, `"epsilon"`, `"sample"` or `"v_prediction"`.
        sde: `"vp"`, `"ve"` or `"subvp"`.
        predictor: as above.
        corrector_steps: correctors before each predictor.
        snr: size of a corrector's step.
        norm: `"per_sample"`: lengths of z and s of every sample by itself; `"batch_mean"`: their means, as the
            authors take them, with which a sample depends on its batch.
        beta_min: of VP and sub-VP, beta at time 0.
        beta_max: of VP and sub-VP, beta at time 1.
        sigma_min: of VE, the smallest level; `None` is the default, 0.01.
        sigma_max: of VE, the largest level, by default that of the network's last beta.
        rescale_betas_zero_snr: False, the only one: pure noise has no level.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> from diffusers_ext import ScoreSDEScheduler
        >>> scheduler = ScoreSDEScheduler.from_config(DDIMScheduler().config, sde="ve", predictor="ancestral")
        >>> scheduler.set_timesteps(3)
        >>> [round(t, 1) for t in scheduler.timesteps.tolist()], round(scheduler.init_noise_sigma, 1)
        ([999.0, 999.0, 302.3, 302.3, 0.0, 0.0], 157.4)
    """

    __module__ = "diffusers_ext"

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
        prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon",
        sde: SDEKind = "vp",
        predictor: Predictor = "reverse_diffusion",
        corrector_steps: int = 1,
        snr: float = 0.16,
        norm: Literal["per_sample", "batch_mean"] = "per_sample",
        beta_min: float = 0.1,
        beta_max: float = 20.0,
        sigma_min: float | None = 0.01,
        sigma_max: float | None = None,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        self._take_schedule()
        predictors, norms = get_args(Predictor), ("per_sample", "batch_mean")
        if predictor not in predictors:
            raise ValueError(f"`predictor` must be one of {list(predictors)}, got {predictor!r}.")
        if predictor == "ancestral" and sde == "subvp":
            raise ValueError("`predictor` must not be 'ancestral' with `sde='subvp'`, which has no such steps.")
        if norm not in norms:
            raise ValueError(f"`norm` must be one of {list(norms)}, got {norm!r}.")
        require(is_whole(corrector_steps, 0), "corrector_steps", corrector_steps, "an integer >= 0")
        require(is_number(snr) and snr > 0, "snr", snr, "a number above 0")
        high, low = self._default_sigmas()
        check_sigmas(high, low)
        self.sde: SDE = make_sde(sde, beta_min, beta_max, low, high)

    @property
    def order(self) -> int:
        """Calls of the network at each level."""
        return 1 + self.config["corrector_steps"]

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the noise to start from: 1, or of VE the largest level."""
        return self._default_sigmas()[0] if self.config["sde"] == "ve" else 1.0

    def _a(self, sigma: torch.Tensor) -> torch.Tensor:
        return self.sde.a_of_sigma(sigma)

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Sets the levels.

        Args:
            num_inference_steps: N, at least 1; the calls of the network are `1 + corrector_steps` times as many.
            device: of `timesteps`.

        Raises:
            ValueError: there is no step.
        """
        require(is_whole(num_inference_steps), "num_inference_steps", num_inference_steps, "an integer >= 1")
        predictor, kind = self.config["predictor"], self.config["sde"]
        if predictor == "euler_maruyama" or (predictor == "reverse_diffusion" and kind == "subvp"):
            predictions = self._euler_maruyama(num_inference_steps)
        elif predictor == "probability_flow":
            predictions = self._flow(num_inference_steps)
        else:
            steps = self._exploding if kind == "ve" else self._preserving
            predictions = steps(num_inference_steps, predictor == "ancestral")
        predictions[-1] = (predictions[-1][0]._replace(noise=0.0), predictions[-1][1])
        moves = []
        for move, kept in predictions:
            moves += [Move(move.sigma, move.a, correction=kept)] * self.config["corrector_steps"] + [move]
        self.num_inference_steps = num_inference_steps
        self._take_moves(moves, device)

    # ------------------------------------------------------------ predictors: moves, and A of their correctors

    def _at(self, t: np.ndarray) -> tuple[list[float], ...]:
        """Returns sigma, a, b and the integral of beta (0 of VE) at times."""
        times = torch.from_numpy(t)
        whole = self.sde.integral(times) if isinstance(self.sde, VPSDE) else torch.zeros_like(times)
        return tuple(v.tolist() for v in (self.sde.sigma(times), self.sde.a(times), self.sde.b(times), whole))

    def _levels(self, count: int) -> list[float]:
        """Returns N falling noise levels, those of the times i / N or, of VE, from the largest to the smallest."""
        high, low = self._default_sigmas()
        if self.config["sde"] == "ve":
            return np.geomspace(high, low, count).tolist()
        return self._at(np.arange(count, 0, -1) / count)[0]

    def _exploding(self, count: int, ancestral: bool) -> list[tuple[Move, float]]:
        moves = []
        for sigma, then in falling(self._levels(count)):
            step = sigma**2 - then**2
            noise = step * (then / sigma) ** 2 if ancestral else step
            moves.append((Move(sigma, 1.0, 1.0, -step / sigma, noise**0.5), 1.0))
        return moves

    def _preserving(self, count: int, ancestral: bool) -> list[tuple[Move, float]]:
        moves = []
        times = np.arange(count, -1, -1) / count
        sigmas, factors, stds, integrals = self._at(times)
        for i in range(count):
            kept = math.exp(integrals[i + 1] - integrals[i])
            share = 1 - kept
            outer = kept**-0.5 if ancestral else 1.0
            sample = kept**-0.5 if ancestral else 2 - kept**0.5
            moves.append((Move(sigmas[i], factors[i], sample, -outer * share / stds[i], share**0.5), kept))
        return moves

    def _euler_maruyama(self, count: int) -> list[tuple[Move, float]]:
        moves = []
        times = np.linspace(1.0, LAST_TIME, count + 1)
        sigmas, factors, stds, integrals = self._at(times)
        rates = self.sde.drift_rate(torch.from_numpy(times)).tolist()
        squares = self.sde.squared_diffusion(torch.from_numpy(times)).tolist()
        for i in range(count):
            dt, kept = times[i] - times[i + 1], math.exp(integrals[i + 1] - integrals[i])
            move = Move(sigmas[i], factors[i], 1 - rates[i] * dt, -squares[i] * dt / stds[i], (squares[i] * dt) ** 0.5)
            moves.append((move, kept))
        return moves

    def _flow(self, count: int) -> list[tuple[Move, float]]:
        moves = []
        for sigma, then in falling(self._levels(count)):
            now, after = (float(self._a(torch.tensor(value, dtype=torch.float64))) for value in (sigma, then))
            kept = 1.0 if self.config["sde"] == "ve" else (now / after) ** 2
            moves.append((Move(sigma, now, after / now, after * (then - sigma)), kept))
        return moves

    # ------------------------------------------------------------ the corrector

    def _corrected(
        self, move: Move, x: torch.Tensor, eps: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        b = move.a * move.sigma
        lengths = [v.flatten(1).norm(dim=1) for v in (noise, eps)]
        if self.config["norm"] == "batch_mean":
            lengths = [length.mean(0, keepdim=True) for length in lengths]
        root = self.config["snr"] * b * lengths[0] / lengths[1].clamp(min=torch.finfo(x.dtype).tiny)
        size = (2 * move.correction * root.square()).view(-1, *[1] * (x.ndim - 1))
        return -size / b, (2 * size).sqrt()
