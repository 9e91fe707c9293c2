"""The Schroedinger bridge between clean and noisy speech."""

from __future__ import annotations

import math
from typing import Literal

import torch
from diffusers.configuration_utils import register_to_config

from diffusers_ext.training.config import require

from .scheduler import Generators, SpeechScheduler, SpeechSchedulerOutput, step_noise

__all__ = ["SBVEScheduler"]


class SBVEScheduler(SpeechScheduler):
    r"""The bridge that is clean speech x0 at time 0 and the recording y at time 1 (2409.10753, section II-D).

    With \(v_t = c (k^{2t} - 1) / (2 \ln k)\), a sample at time t has the mean
    \((1 - v_t / v_1) x_0 + (v_t / v_1) y\) and the variance \(v_t (1 - v_t / v_1)\). The network predicts x0 and is
    given the time of the sample that it sees; the authors' sampler gives it the time that is stepped to, which is not
    where the sample is.

    Args:
        k: growth of the diffusion coefficient, above 1.
        c: its scale.
        sampling_eps: the last time, in (0, 1).
        algorithm: `"ode"`, deterministic, or `"sde"`; one call of the network a step.
        prediction_type: `"sample"`, the only one.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> import torch
        >>> from diffusers_ext import SBVEScheduler
        >>> scheduler = SBVEScheduler()
        >>> scheduler.set_timesteps(3)
        >>> clean = torch.zeros(1, 1, 4, 4, dtype=torch.complex64)
        >>> noisy = clean + 1
        >>> x = scheduler.initial_sample(noisy)
        >>> for t in scheduler.timesteps:
        ...     x = scheduler.step(clean, t, x, noisy).prev_sample
        >>> x.abs().max().item() < 1e-3
        True
    """

    __module__ = "diffusers_ext"
    correct_steps = 0
    init_noise_sigma = 0.0

    @register_to_config
    def __init__(
        self,
        k: float = 2.6,
        c: float = 0.4,
        sampling_eps: float = 1e-4,
        algorithm: Literal["ode", "sde"] = "ode",
        prediction_type: Literal["sample"] = "sample",
    ) -> None:
        require(k > 1, "k", k, "a number > 1")
        require(c > 0, "c", c, "a number > 0")
        require(0 < sampling_eps < 1, "sampling_eps", sampling_eps, "a number in (0, 1)")
        require(algorithm in ("ode", "sde"), "algorithm", algorithm, "one of ['ode', 'sde']")
        require(prediction_type == "sample", "prediction_type", prediction_type, "'sample'")
        self.set_timesteps(30)

    def _level(self, t: float) -> float:
        """v_t."""
        log_k = math.log(self.config["k"])
        return self.config["c"] * math.expm1(2 * log_k * t) / (2 * log_k)

    def _share(self, t: torch.Tensor) -> torch.Tensor:
        """v_t / v_1."""
        log_k = math.log(self.config["k"])
        return torch.expm1(2 * log_k * t) / math.expm1(2 * log_k)

    def _variance(self, t: torch.Tensor) -> torch.Tensor:
        share = self._share(t)
        return self._level(1.0) * share * (1 - share).clamp(min=0)  # 0 at time 1

    def predicted_sample(
        self, output: torch.Tensor, t: float | torch.Tensor, sample: torch.Tensor, y: torch.Tensor
    ) -> torch.Tensor:
        """Returns the clean speech that an output of the network means: the output."""
        return output

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Sets the times of the way back.

        Args:
            num_inference_steps: calls of the network, at least 1.
            device: of `timesteps`.

        Raises:
            ValueError: there is no step.
        """
        require(num_inference_steps >= 1, "num_inference_steps", num_inference_steps, "an integer >= 1")
        self.num_inference_steps = num_inference_steps
        end = self.config["sampling_eps"]
        self._grid = torch.linspace(1, end, num_inference_steps + 1, dtype=torch.float64).tolist()
        self.timesteps = torch.tensor(self._grid[:-1], dtype=torch.float32, device=device)

    def initial_sample(
        self, y: torch.Tensor, generator: Generators = None, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns samples at time 1 to start from: the recording, without noise."""
        return y

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
            output: `(batch, ...)` clean speech that the network predicts for `sample` at `t`.
            t: one of `timesteps`.
            sample: `(batch, ...)` at `t`.
            y: `(batch, ...)` noisy.
            generator: for the noise of this step; only `"sde"` draws, and not in the last step.
            variance_noise: `(batch, ...)` to take instead.
            return_dict: return `SpeechSchedulerOutput` instead of a tuple.

        Raises:
            ValueError: `t` is none of `timesteps`.
        """
        found = [i for i, time in enumerate(self._grid[:-1]) if abs(time - float(t)) < 1e-6]
        require(len(found) > 0, "t", float(t), "one of `timesteps`")
        now, then = self._grid[found[0]], self._grid[found[0] + 1]
        before, after, whole = self._level(now), self._level(then), self._level(1.0)
        last, scale = found[0] == len(self._grid) - 2, 0.0
        if self.config["algorithm"] == "sde":
            mean = after / before * sample + (1 - after / before) * output
            scale = 0.0 if last else math.sqrt(after * (1 - after / before))
        else:
            mean = output + after / whole * (y - output)
            if now < 1:
                kept = math.sqrt(after * (whole - after) / (before * (whole - before)))
                mean = mean + kept * (sample - output - before / whole * (y - output))
        moved = mean + scale * step_noise(sample, generator, variance_noise) if scale > 0 else mean
        return SpeechSchedulerOutput(moved, mean) if return_dict else (moved, mean)
