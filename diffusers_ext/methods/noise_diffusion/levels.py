"""The levels of noise that an inversion climbs, and one step between them, of both kinds of schedule."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from diffusers_ext.generation.stepping import current_config

__all__ = ["FlowLevels", "Levels", "NoiseLevels", "any_levels", "check_steps", "flow_levels", "noise_levels"]


@dataclass(frozen=True)
class NoiseLevels:
    r"""The levels between an image and the state at which images are mixed, in the order of rising noise.

    Attributes:
        timesteps: K timesteps; step k of the inversion leads to `timesteps[k]`.
        alphas_cumprod: K + 1 values of \(\bar\alpha\), that of the image first, that of `timesteps[k]` at k + 1.
        next_alpha_cumprod: the value one step beyond the last; the last itself where the grid ends there.
        prediction_type: `"epsilon"`, `"v_prediction"` or `"sample"`.
    """

    timesteps: tuple[int, ...]
    alphas_cumprod: tuple[float, ...]
    next_alpha_cumprod: float
    prediction_type: str

    @property
    def std(self) -> float:
        """The standard deviation of states of normal data."""
        return 1.0

    def scales(self, legacy_timestep: bool = False) -> tuple[float, float]:
        """Returns the scales of image and noise at the last level, or one step beyond it."""
        alpha_cumprod = self.next_alpha_cumprod if legacy_timestep else self.alphas_cumprod[-1]
        return alpha_cumprod**0.5, (1 - alpha_cumprod) ** 0.5

    def raised(self, step: int, state: torch.Tensor, found: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Returns the state of level `step` at the next one, by what the network answered for `found` there."""
        image_scale, noise_scale, there = self._rise(step)
        # The network answers for the level it was asked about, so its output is read at that level.
        _, noise = _split(output, found, there, self.prediction_type)
        return image_scale * state + noise_scale * noise

    def lowered(self, step: int, state: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Returns the state of level `step + 1` at the one below, by what the network answered for it."""
        there, here = self.alphas_cumprod[step : step + 2]
        image, noise = _split(output, state, here, self.prediction_type)
        return there**0.5 * image + (1 - there) ** 0.5 * noise

    def inverted_std(self, data_std: float) -> float:
        """Computes the standard deviation of inverted states for normal data and an exact network."""
        std = data_std
        for step in range(len(self.timesteps)):
            image_scale, noise_scale, there = self._rise(step)
            # The exact prediction at the level to be reached is a multiple of the state's deviation from the mean.
            std *= image_scale + noise_scale * (1 - there) ** 0.5 / (there * data_std**2 + 1 - there)
        return std

    def _rise(self, step: int) -> tuple[float, float, float]:
        here, there = self.alphas_cumprod[step : step + 2]
        image_scale = (there / here) ** 0.5
        return image_scale, (1 - there) ** 0.5 - image_scale * (1 - here) ** 0.5, there


@dataclass(frozen=True)
class FlowLevels:
    r"""The same for flow matching, where a state is \((1-s)\,x + s\,n\) and the network predicts \(n - x\).

    Attributes:
        timesteps: K timesteps; step k of the inversion leads to `timesteps[k]`.
        sigmas: K + 1 values of s, that of the image (0) first, that of `timesteps[k]` at k + 1.
    """

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]

    @property
    def std(self) -> float:
        """The standard deviation of states of normal data at the last level."""
        return math.hypot(*self.scales())

    def scales(self, legacy_timestep: bool = False) -> tuple[float, float]:
        """Returns the scales of image and noise at the last level."""
        return 1 - self.sigmas[-1], self.sigmas[-1]

    def raised(self, step: int, state: torch.Tensor, found: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Returns the state of level `step` at the next one: Euler's step."""
        return state + (self.sigmas[step + 1] - self.sigmas[step]) * output.to(state.dtype)

    def lowered(self, step: int, state: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Returns the state of level `step + 1` at the one below: Euler's step."""
        return state + (self.sigmas[step] - self.sigmas[step + 1]) * output.to(state.dtype)

    def inverted_std(self, data_std: float) -> float:
        """Computes the standard deviation of inverted states for normal data and an exact network."""
        std = data_std
        for here, there in zip(self.sigmas, self.sigmas[1:], strict=False):
            variance = ((1 - there) * data_std) ** 2 + there**2
            std *= 1 + (there - here) * (there - (1 - there) * data_std**2) / variance
        return std


Levels: TypeAlias = NoiseLevels | FlowLevels


def noise_levels(scheduler: Any, num_inference_steps: int, strength: float = 1.0) -> NoiseLevels:
    """Reads the levels of a DDIM scheduler; the scheduler is not changed.

    Neighbouring timesteps bound a step, also where Diffusers' `DDIMScheduler.step` rounds the lower one by itself
    (`"trailing"` grids whose steps do not divide the training timesteps). `clip_sample` and `thresholding` have no
    inverse and are not applied.

    Args:
        scheduler: a `DDIMScheduler`.
        num_inference_steps: S, steps from pure noise to the image.
        strength: share of them that is used, in `(0, 1]`; K = round(strength * S).

    Raises:
        ValueError: another scheduler, grid or prediction type, or numbers outside their range.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> from diffusers_ext import noise_levels
        >>> noise_levels(DDIMScheduler(), 10, strength=0.3).timesteps
        (0, 100, 200)
    """
    if not isinstance(scheduler, DDIMScheduler):
        raise ValueError(
            f"`scheduler` must be a DDIMScheduler, got {type(scheduler).__name__}. To exchange it: "
            "pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)."
        )
    config: Any = scheduler.config
    if config.timestep_spacing not in ("leading", "trailing"):
        raise ValueError(
            f"`scheduler` must have the timestep_spacing 'leading' or 'trailing', got {config.timestep_spacing!r}."
        )
    if config.prediction_type not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(
            "`scheduler` must have the prediction_type 'epsilon', 'v_prediction' or 'sample', got "
            f"{config.prediction_type!r}."
        )
    total = config.num_train_timesteps
    count = check_steps(num_inference_steps, strength, total)
    # A copy, not one made from its arguments: those leave out what was given by position or changed since.
    own = copy.copy(scheduler)
    own.set_timesteps(num_inference_steps)
    ascending = sorted(int(t) for t in own.timesteps)
    if ascending[-1] >= total:
        raise ValueError(
            f"`num_inference_steps` must leave room for the scheduler's steps_offset, got {num_inference_steps}, "
            f"whose last timestep {ascending[-1]} is not below {total}."
        )
    alphas = [float(scheduler.alphas_cumprod[t]) for t in ascending]
    below = ascending[0] - total // num_inference_steps
    image = float(scheduler.alphas_cumprod[below] if below >= 0 else scheduler.final_alpha_cumprod)
    if config.prediction_type == "epsilon" and alphas[count - 1] == 0:
        raise ValueError(
            "`strength` must be below 1 for a scheduler of zero terminal SNR that predicts epsilon, got "
            f"{strength!r}: its last state holds nothing of the image."
        )
    return NoiseLevels(
        tuple(ascending[:count]),
        (image, *alphas[:count]),
        alphas[min(count, len(alphas) - 1)],
        config.prediction_type,
    )


def any_levels(
    scheduler: Any, num_inference_steps: int, strength: float, arguments: dict[str, Any]
) -> NoiseLevels | FlowLevels:
    """Reads the levels of any scheduler; see `noise_levels` and `flow_levels`.

    Schedulers of variance-preserving diffusion other than DDIM lend their alphas to one; a `"linspace"` grid, which
    has no constant step, becomes a `"leading"` one.

    Raises:
        ValueError: it has neither `alphas_cumprod` nor flow matching, or as in those functions.
    """
    config: Any = scheduler.config
    if type(scheduler).__name__.startswith("FlowMatch") or config.get("prediction_type") == "flow_prediction":
        return flow_levels(scheduler, num_inference_steps, strength, arguments)
    alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
    if alphas_cumprod is None:
        raise ValueError(
            "`pipe.scheduler` must have `alphas_cumprod` or be one of flow matching (FlowMatch*, or the "
            f"prediction_type 'flow_prediction'), got {type(scheduler).__name__}."
        )
    if not isinstance(scheduler, DDIMScheduler):
        spacing = config.get("timestep_spacing", "leading")
        spacing = "leading" if spacing == "linspace" else spacing
        ddim: Any = DDIMScheduler.from_config(current_config(scheduler), timestep_spacing=spacing)
        ddim.alphas_cumprod = alphas_cumprod
        ddim.final_alpha_cumprod = 1.0 if ddim.config.set_alpha_to_one else alphas_cumprod[0]
        scheduler = ddim
    return noise_levels(scheduler, num_inference_steps, strength)


def flow_levels(
    scheduler: Any, num_inference_steps: int, strength: float = 1.0, arguments: dict[str, Any] | None = None
) -> FlowLevels:
    """Reads the levels of a flow-matching scheduler; the scheduler is not changed.

    Args:
        scheduler: `FlowMatch*`, or one whose `prediction_type` is `"flow_prediction"`; its sigmas are those that
            `FlowMatchEulerDiscreteScheduler` makes of the same configuration.
        num_inference_steps: S, steps from pure noise to the image.
        strength: share of them that is used, in `(0, 1]`; K = round(strength * S).
        arguments: what a pipeline passes to `set_timesteps` instead of the number of steps alone, such as `mu`.

    Raises:
        ValueError: the sigmas do not fall from at most 1 to 0, or numbers outside their range.
    """
    config: Any = scheduler.config
    count = check_steps(num_inference_steps, strength, config.num_train_timesteps)
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        own: Any = copy.copy(scheduler)
    else:
        shift = config.get("flow_shift", config.get("shift", 1.0))
        own = FlowMatchEulerDiscreteScheduler.from_config(current_config(scheduler), shift=shift)
    own.set_timesteps(**(arguments or {"num_inference_steps": num_inference_steps}))
    sigmas, timesteps = own.sigmas.double().tolist()[::-1], own.timesteps.tolist()[::-1]
    rising = all(here <= there for here, there in zip(sigmas, sigmas[1:], strict=False))
    if sigmas[0] != 0 or not rising or sigmas[-1] > 1 or len(timesteps) != num_inference_steps:
        raise ValueError(
            f"`scheduler` must have {num_inference_steps} sigmas that fall from at most 1 to 0, got {sigmas[::-1]}."
        )
    return FlowLevels(tuple(timesteps[:count]), tuple(sigmas[: count + 1]))


def check_steps(num_inference_steps: int, strength: float, total: int) -> int:
    """Returns K, the steps that are used."""
    if isinstance(num_inference_steps, bool) or not isinstance(num_inference_steps, int):
        raise ValueError(f"`num_inference_steps` must be an integer in 1..{total}, got {num_inference_steps!r}.")
    if not 1 <= num_inference_steps <= total:
        raise ValueError(f"`num_inference_steps` must be an integer in 1..{total}, got {num_inference_steps}.")
    if not (isinstance(strength, int | float) and 0 < strength <= 1):
        raise ValueError(f"`strength` must be a number in (0, 1], got {strength!r}.")
    count = round(strength * num_inference_steps)
    if count < 1:
        raise ValueError(
            f"`strength` must give at least one of {num_inference_steps} steps, got {strength}, which gives none."
        )
    return count


def _split(
    output: torch.Tensor, state: torch.Tensor, alpha_cumprod: float, prediction_type: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the image and the noise that a network's output stands for at a level."""
    output = output.to(state.dtype)
    image_scale, noise_scale = alpha_cumprod**0.5, (1 - alpha_cumprod) ** 0.5
    if prediction_type == "v_prediction":
        return image_scale * state - noise_scale * output, image_scale * output + noise_scale * state
    if prediction_type == "sample":
        return output, (state - image_scale * output) / noise_scale
    return (state - noise_scale * output) / image_scale, output
