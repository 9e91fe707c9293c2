"""The Ornstein-Uhlenbeck process of SGMSE+, which drifts from clean to noisy speech, and its ways back."""

from __future__ import annotations

import math
from typing import Literal

import torch
from diffusers.configuration_utils import register_to_config

from diffusers_ext.training.config import require

from .scheduler import Generators, SpeechScheduler, SpeechSchedulerOutput, broadcast, step_noise

__all__ = ["OUVEScheduler"]


class OUVEScheduler(SpeechScheduler):
    r"""The process \(dx = \theta(y - x)\,dt + g\,dw\) from clean speech x0 to a recording y (2208.05830, eq. 5-10).

    \(g = \sigma_{min} r^t \sqrt{2 \ln r}\) with \(r = \sigma_{max} / \sigma_{min}\), so at time t a sample has the
    mean \(e^{-\theta t} x_0 + (1 - e^{-\theta t}) y\) and the variance
    \(\sigma_{min}^2 \ln r\, (r^{2t} - e^{-2\theta t}) / (\theta + \ln r)\). Samples are complex spectrograms
    `(batch, 1, bins, frames)`; noise is circular with a mean square of 1.

    `algorithm` is the way back from time 1:

    * `"pc"`: the authors' predictor and corrector, annealed Langevin dynamics before a reverse step of the SDE
      (2208.05830, algorithm 1); two calls of the network a step.
    * `"transitions"`: exact steps between two times given the clean speech that the network predicts, as DDIM's
      (2010.02502, eq. 12) carried over to this process; ancestral with `eta=1`, deterministic with `eta=0`. One call.
    * `"heun"` and `"euler"`: the probability flow ODE down to `sampling_eps`; two calls or one.

    Args:
        theta: stiffness of the drift.
        sigma_min: level of noise at time 0.
        sigma_max: level of noise at time 1.
        sampling_eps: the smallest time at which the network is asked, in (0, 1).
        prediction_type: what the network predicts: the `"score"`, `"epsilon"` (score = -output / std), the clean
            `"sample"`, or the `"mean"` at the sample's time.
        algorithm: `"pc"`, `"transitions"`, `"heun"` or `"euler"`.
        snr: size of the corrector's steps.
        correct_steps: corrector steps before each step of `"pc"`.
        eta: share of fresh noise in transitions, in 0..1.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> import torch
        >>> from diffusers_ext import OUVEScheduler
        >>> scheduler = OUVEScheduler(prediction_type="sample", algorithm="transitions")
        >>> scheduler.set_timesteps(5)
        >>> clean = torch.zeros(2, 1, 4, 4, dtype=torch.complex64)
        >>> noisy = clean + 1
        >>> x = scheduler.initial_sample(noisy)
        >>> for t in scheduler.timesteps:  # with a network that knows the answer
        ...     x = scheduler.step(clean, t, x, noisy).prev_sample
        >>> torch.equal(x, clean)
        True
    """

    __module__ = "diffusers_ext"

    @register_to_config
    def __init__(
        self,
        theta: float = 1.5,
        sigma_min: float = 0.05,
        sigma_max: float = 0.5,
        sampling_eps: float = 0.03,
        prediction_type: Literal["score", "epsilon", "sample", "mean"] = "score",
        algorithm: Literal["pc", "transitions", "heun", "euler"] = "pc",
        snr: float = 0.5,
        correct_steps: int = 1,
        eta: float = 1.0,
    ) -> None:
        require(theta >= 0, "theta", theta, "a number >= 0")
        require(
            0 < sigma_min < sigma_max, "sigma_min", sigma_min, f"a number in (0, sigma_max), sigma_max {sigma_max}"
        )
        require(0 < sampling_eps < 1, "sampling_eps", sampling_eps, "a number in (0, 1)")
        kinds, ways = ("score", "epsilon", "sample", "mean"), ("pc", "transitions", "heun", "euler")
        require(prediction_type in kinds, "prediction_type", prediction_type, f"one of {list(kinds)}")
        require(algorithm in ways, "algorithm", algorithm, f"one of {list(ways)}")
        require(snr > 0, "snr", snr, "a number > 0")
        require(correct_steps >= 0, "correct_steps", correct_steps, "an integer >= 0")
        require(0 <= eta <= 1, "eta", eta, "a number in [0, 1]")
        self.set_timesteps(30)

    @property
    def correct_steps(self) -> int:
        """Corrector steps, each a call of the network, before every step."""
        return self.config["correct_steps"] if self.config["algorithm"] == "pc" else 0

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation at time 1."""
        return self.std(1.0).item()

    # ------------------------------------------------------------ the process

    def _log_ratio(self) -> float:
        return math.log(self.config["sigma_max"] / self.config["sigma_min"])

    def _share(self, t: torch.Tensor) -> torch.Tensor:
        return -torch.expm1(-self.config["theta"] * t)

    def _variance(self, t: torch.Tensor) -> torch.Tensor:
        theta, log_ratio = self.config["theta"], self._log_ratio()
        spread = torch.exp(2 * log_ratio * t) - torch.exp(-2 * theta * t)
        return self.config["sigma_min"] ** 2 * log_ratio * spread / (theta + log_ratio)

    def _diffusion(self, t: float) -> float:
        log_ratio = self._log_ratio()
        return self.config["sigma_min"] * math.exp(log_ratio * t) * math.sqrt(2 * log_ratio)

    # ------------------------------------------------------------ what the network says

    def score(
        self, output: torch.Tensor, t: float | torch.Tensor, sample: torch.Tensor, y: torch.Tensor
    ) -> torch.Tensor:
        """Returns the score that an output of the network means, for samples at time `t`."""
        kind, std = self.config["prediction_type"], broadcast(self.std(t), sample)
        if kind == "score":
            return output
        if kind == "epsilon":
            return -output / std
        return ((output if kind == "mean" else self.mean(output, y, t)) - sample) / std**2

    def predicted_sample(
        self, output: torch.Tensor, t: float | torch.Tensor, sample: torch.Tensor, y: torch.Tensor
    ) -> torch.Tensor:
        """Returns the clean speech that an output of the network means, for samples at time `t`."""
        kind, std = self.config["prediction_type"], broadcast(self.std(t), sample)
        if kind == "sample":
            return output
        means = {"mean": lambda: output, "epsilon": lambda: sample - std * output}
        mean = means.get(kind, lambda: sample + std**2 * output)()
        return y + torch.exp(self.config["theta"] * broadcast(t, sample)) * (mean - y)

    # ------------------------------------------------------------ the way back

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Sets the times of the way back.

        Args:
            num_inference_steps: N, at least 1; the calls of the network are N for transitions and Euler, 2 N for Heun
                and `(1 + correct_steps) N` for `"pc"`.
            device: of `timesteps`.

        Raises:
            ValueError: there is no step.
        """
        require(num_inference_steps >= 1, "num_inference_steps", num_inference_steps, "an integer >= 1")
        ode = self.config["algorithm"] in ("heun", "euler")
        grid = torch.linspace(1, self.config["sampling_eps"], num_inference_steps + ode, dtype=torch.float64).tolist()
        if not ode:
            grid.append(0.0)  # the last step ends in clean speech
        self.num_inference_steps = num_inference_steps
        self._steps = [(t, u, False) for t, u in zip(grid[:-1], grid[1:], strict=True)]
        if self.config["algorithm"] == "heun":  # at the start of each step, and at its end
            self._steps = [step for t, u, _ in self._steps for step in ((t, u, False), (u, t, True))]
        self.timesteps = torch.tensor([t for t, _, _ in self._steps], dtype=torch.float32, device=device)
        self._step_index: int | None = None
        self._start: tuple[torch.Tensor, torch.Tensor] | None = None

    def initial_sample(
        self, y: torch.Tensor, generator: Generators = None, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns samples at time 1 to start from: the recording with noise.

        Args:
            y: `(batch, ...)` noisy.
            generator: for the noise.
            noise: `(batch, ...)` to take instead.
        """
        return y + self.init_noise_sigma * step_noise(y, generator, noise)

    def _find(self, t: float | torch.Tensor) -> tuple[float, float, bool]:
        """Returns the exact times of the step that starts at one of `timesteps`."""
        if self._step_index is None or abs(self._steps[self._step_index][0] - float(t)) > 1e-6:
            found = [i for i, step in enumerate(self._steps) if abs(step[0] - float(t)) < 1e-6]
            require(len(found) > 0, "t", float(t), "one of `timesteps`")
            self._step_index = found[0]
        return self._steps[self._step_index]

    def step_correct(
        self,
        output: torch.Tensor,
        t: float | torch.Tensor,
        sample: torch.Tensor,
        y: torch.Tensor,
        generator: Generators = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> SpeechSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Makes a step of annealed Langevin dynamics at time `t`.

        Args:
            output: `(batch, ...)` of the network for `sample`.
            t: one of `timesteps`.
            sample: `(batch, ...)` at `t`.
            y: `(batch, ...)` noisy.
            generator: for the noise.
            variance_noise: `(batch, ...)` to take instead.
            return_dict: return `SpeechSchedulerOutput` instead of a tuple.
        """
        now = self._find(t)[0]
        size = 2 * (self.config["snr"] * self.std(now).item()) ** 2
        mean = sample + size * self.score(output, now, sample, y)
        moved = mean + math.sqrt(2 * size) * step_noise(sample, generator, variance_noise)
        return SpeechSchedulerOutput(moved, mean) if return_dict else (moved, mean)

    def step(
        self,
        output: torch.Tensor,
        t: float | torch.Tensor,
        sample: torch.Tensor,
        y: torch.Tensor,
        generator: Generators = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> SpeechSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Steps to the next time.

        Args:
            output: `(batch, ...)` of the network for `sample`.
            t: one of `timesteps`.
            sample: `(batch, ...)` at `t`.
            y: `(batch, ...)` noisy.
            generator: for the noise of this step.
            variance_noise: `(batch, ...)` to take instead.
            return_dict: return `SpeechSchedulerOutput` instead of a tuple.

        Raises:
            ValueError: `t` is none of `timesteps`.
        """
        now, then, second = self._find(t)
        way = self.config["algorithm"]
        if way == "pc":
            mean, scale = self._reverse_step(output, now, then, sample, y)
        elif way == "transitions":
            mean, scale = self._transition(output, now, then, sample, y)
        else:
            mean, scale = self._ode_step(output, now, then, second, sample, y), 0.0
        moved = mean
        if scale > 0:
            moved = mean + scale * step_noise(sample, generator, variance_noise)
        index = self._step_index or 0
        self._step_index = index + 1 if index + 1 < len(self._steps) else None
        return SpeechSchedulerOutput(moved, mean) if return_dict else (moved, mean)

    def _reverse_step(
        self, output: torch.Tensor, t: float, u: float, x: torch.Tensor, y: torch.Tensor
    ) -> tuple[torch.Tensor, float]:
        dt, g = t - u, self._diffusion(t)
        mean = x - self.config["theta"] * dt * (y - x) + g**2 * dt * self.score(output, t, x, y)
        return mean, g * math.sqrt(dt)

    def _transition(
        self, output: torch.Tensor, t: float, u: float, x: torch.Tensor, y: torch.Tensor
    ) -> tuple[torch.Tensor, float]:
        x0 = self.predicted_sample(output, t, x, y)
        if u == 0:
            return x0, 0.0
        decay, before, after = math.exp(-self.config["theta"] * (t - u)), *(self.std(v).item() ** 2 for v in (t, u))
        fresh = self.config["eta"] ** 2 * after * (1 - decay**2 * after / before)
        kept = math.sqrt((after - fresh) / before) * (x - self.mean(x0, y, t))
        return self.mean(x0, y, u) + kept, math.sqrt(fresh)

    def _ode_step(
        self, output: torch.Tensor, t: float, u: float, second: bool, x: torch.Tensor, y: torch.Tensor
    ) -> torch.Tensor:
        slope = self.config["theta"] * (y - x) - self._diffusion(t) ** 2 / 2 * self.score(output, t, x, y)
        if second:  # `x` is where the first slope led; `u` is the time before
            require(self._start is not None, "t", t, "preceded by the other half of its step")
            (start, first), self._start = self._start, None  # type: ignore[misc]
            return start + (t - u) * (first + slope) / 2
        if self.config["algorithm"] == "heun":
            self._start = (x, slope)
        return x + (u - t) * slope
