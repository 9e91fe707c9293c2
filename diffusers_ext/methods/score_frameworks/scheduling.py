"""What the schedulers of all frameworks share: levels of noise on one side, a network's timesteps on the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import ConfigMixin, DDPMScheduler, SchedulerMixin
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor

from diffusers_ext.generation.score_levels import noise_from_output, sigma_of_timestep, timestep_of_sigma
from diffusers_ext.generation.stepping import check_generator

__all__ = ["FrameworkScheduler", "Move"]

KINDS = ("epsilon", "sample", "v_prediction")
Generators = torch.Generator | list[torch.Generator] | None


class Move(NamedTuple):
    """What follows one call of the network: x becomes `sample` x + `eps` E + `noise` z, or a Langevin correction.

    Attributes:
        sigma: noise level at which the network is called.
        a: factor of the data in x there.
        sample: factor of x.
        eps: factor of the network's noise E.
        noise: factor of fresh noise z.
        correction: 0, or the factor of the squared step of a correction, whose other factors depend on the batch.
    """

    sigma: float
    a: float
    sample: float = 1.0
    eps: float = 0.0
    noise: float = 0.0
    correction: float = 0.0


class FrameworkScheduler(SchedulerMixin, ConfigMixin):
    """Base of schedulers that take a network of DDPM's kind, whatever process its samples follow.

    A subclass calls `_take_schedule` in its `__init__`, and `_take_moves` in its `set_timesteps`. Of the network it
    knows the betas and the `prediction_type`; `scale_model_input` maps a sample to what the network knows.
    """

    # All that know the same betas; EDM's does not.
    _compatibles = [kind.name for kind in KarrasDiffusionSchedulers if not kind.name.startswith("EDM")]
    order = 1
    timesteps: torch.Tensor
    num_inference_steps: int | None

    # ------------------------------------------------------------ for subclasses

    def _take_schedule(self) -> None:
        config: Any = self.config
        if config.prediction_type not in KINDS:
            raise ValueError(f"`prediction_type` must be one of {list(KINDS)}, got {config.prediction_type!r}.")
        names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
        given = {name: config[name] for name in names}
        try:
            stock = DDPMScheduler(**given)
            len(stock.alphas_cumprod)
        except (NotImplementedError, TypeError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"`beta_schedule` or `trained_betas` and the numbers that go with them must be those of a "
                f"DDPMScheduler, got {given}: {error}"
            ) from error
        self.betas, self.alphas_cumprod = stock.betas, stock.alphas_cumprod
        if config.rescale_betas_zero_snr or not bool((self.alphas_cumprod > 0).all()):
            raise ValueError(
                "`rescale_betas_zero_snr` must be False and the schedule must not end at zero SNR, where the level of "
                f"noise is infinite, got {config.rescale_betas_zero_snr!r} and a least `alphas_cumprod` of "
                f"{float(self.alphas_cumprod.min()):.4g}."
            )
        sigma_of_timestep(self.alphas_cumprod, 0)  # which checks the others
        self._moves: list[Move] = []
        self.num_inference_steps = None
        self.timesteps = torch.arange(len(self.alphas_cumprod) - 1, -1, -1, dtype=torch.float32)
        self._step_index: int | None = None
        self._begin_index: int | None = None

    def _default_sigmas(self) -> tuple[float, float]:
        """Returns the largest and the smallest level that the configuration names.

        `None` is what stock schedulers have where their own default counts, and means ours.
        """
        low, high = self.config["sigma_min"], self.config["sigma_max"]
        if high is None:
            high = sigma_of_timestep(self.alphas_cumprod, len(self.alphas_cumprod) - 1).item()
        return high, 0.01 if low is None else low

    def _take_moves(self, moves: list[Move], device: torch.device | str | None) -> None:
        self._moves = moves
        sigmas = torch.tensor([move.sigma for move in moves], dtype=torch.float64)
        self.timesteps = timestep_of_sigma(self.alphas_cumprod, sigmas).to(device, torch.float32)
        self._step_index = self._begin_index = None

    def _a(self, sigma: torch.Tensor) -> torch.Tensor:
        """Returns the factor of the data in samples at noise levels, both float64."""
        raise NotImplementedError

    def _corrected(
        self, move: Move, x: torch.Tensor, eps: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the factors of E and of z of a correction."""
        raise NotImplementedError

    # ------------------------------------------------------------ what pipelines ask for

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Makes the scheduler for the network of another one; see Diffusers.

        Raises:
            ValueError: the other scheduler has no betas, such as one of flow matching, for which stock schedulers
                would silently take their defaults.
        """
        # A configuration that is given by hand may have any part of the names; one of a scheduler has all.
        whole = isinstance(config, dict) and ("_class_name" in config or "_use_default_values" in config)
        if whole and "beta_schedule" not in config:
            found = config.get("_class_name", f"one of {sorted(config)}")
            raise ValueError(f"`config` must be that of a scheduler with `beta_schedule`, got {found}.")
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def step_index(self) -> int | None:
        """Number of the next call among `timesteps`, `None` before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Number of the first call, where a pipeline has set one."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Sets the number of the first call, for pipelines that start in between."""
        self._begin_index = begin_index

    def index_for_timestep(self, timestep: float | torch.Tensor) -> int:
        """Returns the number of the first call whose timestep is nearest to the given one."""
        return int((self.timesteps - torch.as_tensor(timestep, device=self.timesteps.device)).abs().argmin())

    def _next(self, timestep: float | torch.Tensor) -> Move:
        """Returns the present call. Timesteps repeat, so that calls are counted from the first on."""
        if not self._moves:
            raise ValueError("`set_timesteps` must be called before a step of the scheduler.")
        if self._step_index is None:
            begin = self._begin_index
            self._step_index = self.index_for_timestep(timestep) if begin is None else begin
        return self._moves[self._step_index]

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor) -> torch.Tensor:
        r"""Returns what the network is given: \(y / \sqrt{1 + \sigma^2}\) of a sample \(a y\).

        Args:
            sample: `(batch, ...)`.
            timestep: the present one of `timesteps`; before `set_timesteps` any of the network's.
        """
        return sample * self._input_scale(self._next(timestep) if self._moves else self._level(timestep))

    def _level(self, timestep: float | torch.Tensor) -> Move:
        """Returns the level of one of the network's timesteps."""
        sigma = sigma_of_timestep(self.alphas_cumprod, float(timestep))
        return Move(float(sigma), float(self._a(sigma)))

    @staticmethod
    def _input_scale(move: Move) -> float:
        return 1 / (move.a * (1 + move.sigma**2) ** 0.5)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> EulerDiscreteSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Makes the step that follows one call of the network.

        Args:
            model_output: `(batch, ...)` of the network for `scale_model_input(sample, timestep)`.
            timestep: one of `timesteps`, in their order; the first may be another, and stands for the nearest.
            sample: `(batch, ...)`.
            generator: one for the batch, or one for each sample.
            return_dict: return an object with `prev_sample` and `pred_original_sample` instead of a tuple of them.

        Raises:
            ValueError: `set_timesteps` was not called, or shapes or generators are of another batch.
        """
        if model_output.shape != sample.shape:
            raise ValueError(
                f"`model_output` must have the shape of `sample`, {tuple(sample.shape)}, got "
                f"{tuple(model_output.shape)}."
            )
        check_generator(generator, len(sample))
        move = self._next(timestep)
        x = sample.float() if sample.dtype in (torch.float16, torch.bfloat16) else sample
        scale = (1 + move.sigma**2) ** -0.5
        given = x * self._input_scale(move)
        eps = noise_from_output(
            model_output.to(x.dtype), given, scale, scale * move.sigma, self.config["prediction_type"]
        )
        clean = x / move.a - move.sigma * eps
        if move.noise or move.correction:
            noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            eps_factor, noise_factor = (
                self._corrected(move, x, eps, noise) if move.correction else (move.eps, move.noise)
            )
            moved = move.sample * x + eps_factor * eps + noise_factor * noise
        else:
            moved = move.sample * x + move.eps * eps
        index = (self._step_index or 0) + 1
        self._step_index = index if index < len(self._moves) else None
        moved, clean = moved.to(sample.dtype), clean.to(sample.dtype)
        if not return_dict:
            return moved, clean
        return EulerDiscreteSchedulerOutput(prev_sample=moved, pred_original_sample=clean)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Returns samples of the process.

        Args:
            original_samples: `(batch, ...)` clean.
            noise: the same shape, standard normal.
            timesteps: `(batch,)` of the network's, fractions included, or one. One of `self.timesteps` stands for the
                noise level there, also where that lies beyond the network's own.

        Raises:
            ValueError: shapes differ, or a timestep is outside the network's.
        """
        for name, value, good in (
            ("noise", noise, noise.shape == original_samples.shape),
            ("timesteps", timesteps, timesteps.numel() in (1, len(original_samples))),
        ):
            if not good:
                raise ValueError(
                    f"`{name}` must be those of samples of the shape {tuple(original_samples.shape)}, got the shape "
                    f"{tuple(value.shape)}."
                )
        sigma = sigma_of_timestep(self.alphas_cumprod, timesteps)
        for i, t in enumerate(timesteps.reshape(-1).tolist()) if self._moves else ():
            known = (self.timesteps == t).nonzero()
            if len(known):
                sigma.view(-1)[i] = self._moves[int(known[0])].sigma
        a = self._a(sigma)
        shape = (-1, *[1] * (original_samples.ndim - 1))
        a, b = (factor.to(original_samples).view(shape) for factor in (a, a * sigma))
        return a * original_samples + b * noise


def falling(values: Sequence[float] | np.ndarray) -> list[tuple[float, float]]:
    """Returns neighbours of a row of levels, the last with 0."""
    return list(zip(values, [*values[1:], 0.0], strict=True))
