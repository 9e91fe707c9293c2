"""Images from undersampled measurements, with a denoiser that knows what such images look like."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.utils import BaseOutput

from diffusers_ext.training.config import is_number, require

from .base import DenoiserPipeline, as_output
from .measurement import LinearOperator, Solver
from .sampling import Estimator, ddim_step, draw_rows, scheduler_levels

__all__ = ["ReconstructionPipeline", "ReconstructionPipelineOutput", "corrected"]

METHODS = ("proximal", "pigdm")
LONGEST = 4.0  # of a push through the network, in lengths of what is asked; the exact one where it is shorter


@dataclass
class ReconstructionPipelineOutput(BaseOutput):
    """What `ReconstructionPipeline` returns.

    Attributes:
        images: the mean of each measurement's samples, of the asked type. Only PIL images are cut to [0, 1].
        samples: `(batch, samples, channels, height, width)` in the units of [0, 1] images.
        std: `(batch, channels, height, width)`, the samples' standard deviation; of one sample 0. It tells where
            samples differ, and is no calibrated uncertainty: it is too small.
    """

    images: Any
    samples: torch.Tensor
    std: torch.Tensor


def corrected(
    x: torch.Tensor, estimator: Estimator, sigma: float, solve: Solver, method: str, data_variance: float
) -> torch.Tensor:
    r"""Returns a clean estimate that agrees with a measurement.

    The estimate's error is taken as \(r^2 = v \sigma^2 / (v + \sigma^2)\), as of N(0, v) data. `"proximal"` adds what
    the measurement asks; `"pigdm"` (Song et al., "Pseudoinverse-guided diffusion models", 2023) adds its gradient
    through the network, \(b^2/a\, J^T\) of it over r^2, so that pixels that are told by their neighbours move too.
    Where data vary far more than v along some directions, that can grow from step to step without end: it is cut to
    four times the length of what the measurement asks.

    Args:
        x: `(batch, ...)` noisy samples, on the network's scale.
        estimator: of the clean samples.
        sigma: the level.
        solve: of `LinearOperator.solver`, on the same scale.
        method: `"proximal"` or `"pigdm"`.
        data_variance: v.
    """
    error = data_variance * sigma**2 / (data_variance + sigma**2)
    if method == "proximal":
        clean = estimator(x, sigma)
        return clean + solve(clean, error)
    a, b = estimator.coefficients(sigma)
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone().requires_grad_()  # copied: autograd takes none that was made in inference mode
        clean = estimator(x, sigma)
        asked = solve(clean.detach(), error)
        push = torch.autograd.grad(clean, x, asked / error)[0] * (b**2 / a)
    wanted, length = (torch.linalg.vector_norm(v.flatten(1), dim=1) for v in (asked, push))
    share = (LONGEST * wanted / length.clamp(min=torch.finfo(length.dtype).tiny)).clamp(max=1)
    return clean.detach() + push * share.view(-1, *[1] * (push.ndim - 1))


class ReconstructionPipeline(DenoiserPipeline):
    """Reconstructs images from linear measurements such as undersampled k-space.

    For research, not for diagnosis: what was not measured is made up to look like the training images.

    Args:
        unet: an unconditional `UNet2DModel` of pixels.
        scheduler: the one that it was trained with, of DDPM's kind, of flow matching or EDM.
        image_scale: what pixels of [-1, 1] were multiplied by in training.

    Example:
        >>> import torch
        >>> from diffusers import DDIMScheduler, UNet2DModel
        >>> from diffusers_ext import FourierSampling, ReconstructionPipeline
        >>> unet = UNet2DModel(
        ...     sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=2,
        ...     down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        ... )
        >>> pipeline = ReconstructionPipeline(unet, DDIMScheduler(timestep_spacing="trailing"))
        >>> pipeline.set_progress_bar_config(disable=True)
        >>> operator = FourierSampling(torch.tensor([1, 1, 1, 0, 0, 0, 1, 1]))
        >>> kspace = operator.forward(torch.rand(2, 1, 8, 8))
        >>> output = pipeline(kspace, operator, noise_std=0.01, num_inference_steps=5)
        >>> len(output.images), output.samples.shape, output.std.shape
        (2, torch.Size([2, 4, 1, 8, 8]), torch.Size([2, 1, 8, 8]))
    """

    __module__ = "diffusers_ext"

    def check_inputs(self, operator: Any, noise_std: float, method: str, eta: float, data_variance: float) -> None:
        """Checks the arguments of a call but the measurement.

        Raises:
            ValueError: one is wrong; the message names it.
        """
        if not isinstance(operator, LinearOperator):
            raise ValueError(
                f"`operator` must be a FourierSampling or another LinearOperator, got {type(operator).__name__}."
            )
        require(is_number(noise_std) and noise_std >= 0, "noise_std", noise_std, "a number >= 0")
        if method not in METHODS:
            raise ValueError(f"`method` must be one of {list(METHODS)}, got {method!r}.")
        require(is_number(eta) and 0 <= eta <= 1, "eta", eta, "a number in [0, 1]")
        require(is_number(data_variance) and data_variance > 0, "data_variance", data_variance, "a number > 0")

    @torch.no_grad()
    def __call__(
        self,
        measurement: torch.Tensor,
        operator: LinearOperator,
        noise_std: float = 0.0,
        method: Literal["proximal", "pigdm"] = "proximal",
        num_inference_steps: int = 30,
        num_samples: int = 4,
        eta: float = 1.0,
        data_variance: float = 0.25,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 - as in Diffusers, never changed
    ) -> ReconstructionPipelineOutput | tuple[Any, ...]:
        """Reconstructs images.

        Args:
            measurement: what `operator` made of images in [0, 1], `(batch, ...)`: k-space must be scaled so. Complex
                for `FourierSampling`, `(batch, channels or coils, height, width)`.
            operator: `FourierSampling`, or a `LinearOperator` of your own.
            noise_std: root of the mean square of the measurement's noise, of a complex number both parts together; 0
                keeps what was measured exactly.
            method: `"proximal"`, or `"pigdm"`, which takes about twice the time and memory for the gradient through
                the network.
            num_inference_steps: scheduler steps.
            num_samples: reconstructions of each measurement. Their mean is nearer to the truth than one.
            eta: share of the noise of an ancestral step; 0 is deterministic given the start.
            data_variance: of the training images in [-1, 1] about 0, which says how far an estimate may be off; the
                papers take 1.
            generator: one for all, or one for each measurement; with a list, a measurement's samples do not depend on
                the others in the batch.
            output_type: of `images`: `"pil"`, `"np"` `(batch, height, width, channels)`, `"pt"` `(batch, channels,
                height, width)`.
            return_dict: return a `ReconstructionPipelineOutput` instead of a tuple.
            callback_on_step_end: called as `(pipeline, step, timestep, {"latents": ...})` after every step with the
                `(batch * num_samples, channels, height, width)` noisy samples; those that it returns are used.
                `pipeline._interrupt = True` ends the call with the last clean estimate.
            callback_on_step_end_tensor_inputs: names passed to it.

        Returns:
            `ReconstructionPipelineOutput`, or its values as a tuple in the same order.

        Raises:
            ValueError: an argument is wrong; the message names it.
        """
        self.check_inputs(operator, noise_std, method, eta, data_variance)
        self._check_counts(num_inference_steps, num_samples)
        names = self._check_call(output_type, callback_on_step_end, callback_on_step_end_tensor_inputs)
        device = self._execution_device
        measurement = measurement.to(device) if isinstance(measurement, torch.Tensor) else measurement
        shape = operator.check(measurement)
        self._check_images(shape, "measurement", generator)
        estimator = self._estimator()
        timesteps, sigmas = scheduler_levels(estimator.field, self.scheduler, num_inference_steps, device)
        self._num_timesteps = len(timesteps)

        # On the network's scale, x = (2 u - 1) s of an image u.
        scale = self.config["image_scale"]
        ones = operator.forward(torch.ones(shape, device=device))
        scaled = ((2 * measurement - ones) * scale).repeat_interleave(num_samples, 0)
        solve = operator.solver(scaled, 2 * scale * noise_std)

        start = torch.empty(shape[0] * num_samples, *shape[1:], device=device)
        a, b = estimator.coefficients(sigmas[0])
        x = draw_rows(tuple(start.shape), num_samples, generator, start)
        x = x * math.hypot(a * estimator.field.schedule.sigma_data, b)
        clean = x
        with self.progress_bar(total=len(timesteps)) as bar:  # pyright: ignore[reportCallIssue]
            for i, t in enumerate(timesteps):
                clean = corrected(x, estimator, sigmas[i], solve, method, data_variance)
                levels = estimator.coefficients(sigmas[i]), estimator.coefficients(sigmas[i + 1])
                x = ddim_step(
                    x, clean, *levels, eta, lambda: draw_rows(tuple(start.shape), num_samples, generator, start)
                )
                if callback_on_step_end is not None:
                    given = {name: x for name in names}
                    x = callback_on_step_end(self, i, t, given).get("latents", x)
                bar.update()
                if self._interrupt:
                    break
        found = clean if self._interrupt else x
        samples = self._to_images(found).unflatten(0, (shape[0], num_samples))
        self.maybe_free_model_hooks()
        std = samples.std(1) if num_samples > 1 else torch.zeros_like(samples[:, 0])
        output = ReconstructionPipelineOutput(as_output(samples.mean(1), output_type), samples, std)
        return output if return_dict else (output.images, output.samples, output.std)
