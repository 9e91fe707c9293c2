"""What the processes between clean and noisy speech share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from diffusers_ext.training.config import require

__all__ = ["Generators", "SpeechScheduler", "SpeechSchedulerOutput", "broadcast", "step_noise"]

Generators = torch.Generator | list[torch.Generator] | None


@dataclass
class SpeechSchedulerOutput(BaseOutput):
    """Output of a step of `OUVEScheduler` and `SBVEScheduler`.

    Args:
        prev_sample: `(batch, ...)` at the next, smaller time.
        prev_sample_mean: the same without the noise of this step; of the last step it is the result.
    """

    __module__ = "diffusers_ext"

    prev_sample: torch.Tensor
    prev_sample_mean: torch.Tensor


def broadcast(t: float | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Returns times in the real dtype of a batch, shaped so that they broadcast over its samples."""
    t = torch.as_tensor(t, dtype=like.real.dtype, device=like.device)
    return t.reshape(*t.shape, *([1] * (like.ndim - t.ndim)))


def step_noise(like: torch.Tensor, generator: Generators, given: torch.Tensor | None) -> torch.Tensor:
    """Returns the given noise, or draws some of a sample's shape with a mean square of 1, complex if that is."""
    if given is not None:
        return given.to(like)
    return randn_tensor(like.shape, generator=generator, device=like.device, dtype=like.dtype)


def _check_time(t: float | torch.Tensor) -> None:
    inside = (t > 0) & (t <= 1)
    require(bool(inside.all() if isinstance(inside, torch.Tensor) else inside), "t", t, "in (0, 1]")


class SpeechScheduler(SchedulerMixin, ConfigMixin):
    """A process whose samples at time t are Gaussian around a mix of clean and noisy speech."""

    order = 1
    timesteps: torch.Tensor

    def _share(self, t: torch.Tensor) -> torch.Tensor:
        """Returns the weight of the recording in the mean."""
        raise NotImplementedError

    def _variance(self, t: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def mean(self, x0: torch.Tensor, y: torch.Tensor, t: float | torch.Tensor) -> torch.Tensor:
        """Returns the mean at a time.

        Args:
            x0: `(batch, ...)` clean.
            y: `(batch, ...)` noisy.
            t: one time or `(batch,)` of them, in (0, 1].

        Raises:
            ValueError: a time is outside (0, 1].
        """
        _check_time(t)
        share = self._share(broadcast(t, x0))
        return (1 - share) * x0 + share * y

    def std(self, t: float | torch.Tensor) -> torch.Tensor:
        """Returns the standard deviation of the noise at a time, in the shape of `t`.

        Raises:
            ValueError: a time is outside (0, 1].
        """
        _check_time(t)
        t = torch.as_tensor(t, dtype=None if isinstance(t, torch.Tensor) else torch.float64)
        return self._variance(t).sqrt()

    def add_noise(
        self, x0: torch.Tensor, noise: torch.Tensor, t: float | torch.Tensor, y: torch.Tensor
    ) -> torch.Tensor:
        """Returns samples at a time: `mean(x0, y, t) + std(t) * noise`.

        Args:
            x0: `(batch, ...)` clean.
            noise: `(batch, ...)` with a mean square of 1.
            t: one time or `(batch,)` of them, in (0, 1].
            y: `(batch, ...)` noisy.
        """
        return self.mean(x0, y, t) + broadcast(self.std(t), x0) * noise

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """Returns the sample: networks see it as it is."""
        return sample

    def __len__(self) -> int:
        return len(self.timesteps)
