"""NCSN's sampler: Langevin dynamics at falling noise levels."""

from __future__ import annotations

from typing import Literal

import torch
from diffusers.configuration_utils import register_to_config

from diffusers_ext.training.config import is_number, is_whole, require

from .langevin import check_sigmas, geometric_sigmas, langevin_step_size
from .scheduling import FrameworkScheduler, Move

__all__ = ["AnnealedLangevinScheduler"]


class AnnealedLangevinScheduler(FrameworkScheduler):
    r"""Annealed Langevin dynamics (NCSN, 1907.05600; NCSNv2, 2006.09011) with any denoiser.

    Samples are \(y = x_0 + \sigma n\). At each of L geometric levels T steps are made,
    \(y + \alpha s + \sqrt{2 \alpha}\, z\) with \(\alpha = e\, \sigma_i^2 / \sigma_L^2\), each one call of the network;
    then \(y + \sigma_L^2 s\) without noise. The network is any of DDPM's kind: at each level it is given what it has
    learned to see there, and at levels beyond its own betas its first or last timestep. An NCSN itself goes through
    `ncsn_as_denoiser`.

    Args:
        num_train_timesteps: length of the network's schedule.
        beta_start: its first beta.
        beta_end: its last beta.
        beta_schedule: as in `DDPMScheduler`.
        trained_betas: betas instead.
        prediction_type: what the network predicts, `"epsilon"`, `"sample"` or `"v_prediction"`.
        sigma_max: largest level, by default that of the last beta. NCSNv2 takes the largest distance between training
            images: `largest_distance`.
        sigma_min: smallest level; `None` is the default, 0.01.
        dimension: number of values of a sample, by which NCSNv2 chooses the number of levels; see `geometric_sigmas`.
        num_levels: the number of levels where `set_timesteps` is not told.
        steps_per_level: T.
        step_size: e, by default the best one: `langevin_step_size`.
        final_denoise: whether the last step is made.
        rescale_betas_zero_snr: False, the only one: pure noise has no level.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> from diffusers import DDPMScheduler
        >>> from diffusers_ext import AnnealedLangevinScheduler
        >>> scheduler = AnnealedLangevinScheduler.from_config(DDPMScheduler().config, dimension=64, sigma_max=10.0)
        >>> scheduler.set_timesteps()
        >>> len(scheduler.sigmas), len(scheduler.timesteps), scheduler.init_noise_sigma
        (24, 121, 10.0)
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
        sigma_max: float | None = None,
        sigma_min: float | None = 0.01,
        dimension: int | None = None,
        num_levels: int | None = None,
        steps_per_level: int = 5,
        step_size: float | None = None,
        final_denoise: bool = True,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        self._take_schedule()
        check_sigmas(*self._default_sigmas())
        for name, value, least in (
            ("steps_per_level", steps_per_level, 1),
            ("num_levels", num_levels, 2),
            ("dimension", dimension, 1),
        ):
            left_out = value is None and name != "steps_per_level"
            require(left_out or is_whole(value, least), name, value, f"an integer >= {least}")
        good = step_size is None or (is_number(step_size) and step_size > 0)
        require(good, "step_size", step_size, "a number above 0")
        self.sigmas = torch.tensor([])

    @property
    def order(self) -> int:
        """Calls of the network at each level."""
        return self.config["steps_per_level"]

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the noise to start from: the largest level."""
        return self._default_sigmas()[0]

    def _a(self, sigma: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(sigma)

    def set_timesteps(self, num_inference_steps: int | None = None, device: torch.device | str | None = None) -> None:
        """Sets the levels.

        Args:
            num_inference_steps: number of levels L, by default `num_levels`, or as many as `dimension` asks for; the
                calls of the network are `steps_per_level` L, and one more for the last step.
            device: of `timesteps`.

        Raises:
            ValueError: nothing says how many levels there are.
        """
        config = self.config
        count = config["num_levels"] if num_inference_steps is None else num_inference_steps
        if count is None and config["dimension"] is None:
            raise ValueError(
                "`num_inference_steps` must be given where neither `num_levels` nor `dimension` is, got None."
            )
        sigmas = geometric_sigmas(
            *self._default_sigmas(), num_levels=count, dimension=config["dimension"] if count is None else None
        )
        size = config["step_size"]
        size = langevin_step_size(sigmas, self.order) if size is None else size
        last = sigmas[-1].item()
        moves = []
        for sigma in sigmas.tolist():
            alpha = size * (sigma / last) ** 2
            moves += [Move(sigma, 1.0, 1.0, -alpha / sigma, (2 * alpha) ** 0.5)] * self.order
        if config["final_denoise"]:
            moves.append(Move(last, 1.0, 1.0, -last))
        self.num_inference_steps, self.sigmas = len(sigmas), sigmas.float().to(device)
        self._take_moves(moves, device)
