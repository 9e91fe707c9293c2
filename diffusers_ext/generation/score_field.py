r"""A trained denoiser as a score: one function of \((x, \sigma)\), whatever the network predicts."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .score_levels import Levels, Schedule

__all__ = ["ScoreField"]


class ScoreField:
    r"""The noise that a network sees, \(E(x, \sigma)\), and its score \(-E/b\).

    Parameters are frozen and the network is in evaluation mode while it is called; afterwards it is as before.

    Args:
        model: a `UNet2DModel`, `UNet2DConditionModel`, `DiTTransformer2DModel`, `PipelineDenoiser` or any function
            (x, t) of a batch and its timesteps `(batch,)` that returns the output, alone or as a Diffusers model does.
        scheduler: its scheduler: of DDPM's kind (DDIM, Euler, ...), of flow matching, or an EDM one.
        prediction_type: `"epsilon"`, `"v_prediction"`, `"sample"` or `"flow_prediction"`, by default the scheduler's.
        model_kwargs: further arguments of the model, such as `class_labels` or `encoder_hidden_states`: tensors (or
            dicts of them) of one row for all images, or of one for each.

    Raises:
        ValueError: an unknown prediction type, or a scheduler without noise levels that are known.

    Example:
        >>> import torch
        >>> from diffusers import DDIMScheduler
        >>> from diffusers_ext import ScoreField
        >>> scheduler = DDIMScheduler()
        >>> def of_normal_data(x, t):  # of standard normal images; a trained network otherwise
        ...     return (1 - scheduler.alphas_cumprod[t.long()]).sqrt()[:, None] * x
        >>> field = ScoreField(of_normal_data, scheduler)
        >>> field.score(torch.tensor([[1.0, -2.0]]), field.levels.sigma[500].item())
        tensor([[-1.,  2.]])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        scheduler: Any,
        prediction_type: str | None = None,
        **model_kwargs: Any,
    ) -> None:
        if not callable(model):
            raise ValueError(f"`model` must be a network or a function (x, t), got {type(model).__name__}.")
        self.model, self.schedule, self.model_kwargs = model, Schedule(scheduler, prediction_type), model_kwargs
        forward = model.forward if isinstance(model, nn.Module) else model
        self._by_name = "timestep" in inspect.signature(forward).parameters

    @classmethod
    def from_pipeline(cls, pipe: Any, prompts: list[Any] | None = None, **model_kwargs: Any) -> ScoreField:
        """Takes the denoiser of a pipeline.

        Args:
            pipe: an `ImageGenerationPipeline` or another pipeline of a `UNet2DModel`; with `prompts`, any that
                `PipelineDenoiser` takes.
            prompts: texts (or class labels) for the images, one for all or one for each.
            model_kwargs: as above for a plain UNet; with `prompts`, arguments of `PipelineDenoiser`, such as `height`.

        Raises:
            ValueError: the pipeline has no UNet that could be called without prompts.
        """
        if prompts is not None:
            from .denoiser import PipelineDenoiser

            denoiser = PipelineDenoiser(pipe, **model_kwargs)
            return cls(denoiser, denoiser.scheduler, conditions=denoiser.encode_prompts(prompts))
        unet = getattr(pipe, "unet", None)
        if unet is None or hasattr(pipe, "tokenizer"):
            raise ValueError(f"`prompts` must be given for {type(pipe).__name__}: its network takes text or labels.")
        return cls(unet, pipe.scheduler, **model_kwargs)

    @property
    def levels(self) -> Levels:
        """The scheduler's noise levels by rising sigma; those of a < 0.001 are left out."""
        return self.schedule.levels

    def at(self, sigma: float | torch.Tensor, beyond: bool = False) -> Levels:
        """Returns t, a and b of some sigmas; see `Schedule.at`."""
        return self.schedule.at(sigma, beyond)

    def coefficients(
        self, sigma: float | torch.Tensor, like: torch.Tensor, beyond: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns a and b of one sigma or of `(batch,)` ones, in the dtype of a batch and broadcasting to it.

        Raises:
            ValueError: sigma is outside the levels, or of another batch.
        """
        return _of_batch(self.at(sigma, beyond), like)

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        r"""Returns \(a x_0 + b\,\epsilon\), which the network takes.

        Raises:
            ValueError: the noise is of another shape, or sigma is outside the levels or of another batch.
        """
        if noise.shape != x0.shape:
            raise ValueError(f"`noise` must have the shape of x0, {tuple(x0.shape)}, got {tuple(noise.shape)}.")
        a, b = self.coefficients(sigma, x0)
        return a * x0 + b * noise

    def eps(self, x: torch.Tensor, sigma: float | torch.Tensor, beyond: bool = False) -> torch.Tensor:
        r"""Returns the noise that the network sees.

        Args:
            x: `(batch, ...)` noisy samples, \(a x_0 + b\,\epsilon\).
            sigma: one level or `(batch,)` of them, within `levels`.
            beyond: take other levels too, at which the network is given the timestep of the nearest.

        Returns:
            As x, in float32, or in float64 if x is; with gradient where x asks for it.

        Raises:
            ValueError: sigma is outside the levels, or arguments of the model are of another number of images.
        """
        if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.ndim == 0:
            found = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(f"`x` must be floats of the shape (batch, ...), got {found}.")
        level = self.at(sigma, beyond)
        a, b = _of_batch(level, x)
        t = level.t.to(x.device, _precision(x)).expand(len(x))
        return self.schedule.eps(self._output(x, t), x.to(a.dtype), a, b)

    def score(self, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        r"""Returns \(-E/b\), the estimated gradient of the log-density of the noisy samples x; see `eps`."""
        return -self.eps(x, sigma) / self.coefficients(sigma, x)[1]

    def select(self, rows: torch.Tensor) -> ScoreField:
        """Returns the field for a batch whose row i is an image `rows[i]`: arguments of the model are chosen so."""
        if not self.model_kwargs:
            return self
        chosen = copy.copy(self)
        chosen.model_kwargs = _selected(self.model_kwargs, rows)
        return chosen

    def _output(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        arguments = _checked(self.model_kwargs, len(x))
        given = x
        if isinstance(self.model, nn.Module):
            dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), x.dtype)
            given = x.to(dtype)
        with _frozen(self.model):
            out = self.model(given, timestep=t, **arguments) if self._by_name else self.model(given, t, **arguments)
        if not isinstance(out, torch.Tensor):
            out = out[0]
        if out.ndim > 1 and out.shape[1] == 2 * x.shape[1]:  # the second half tells a learned variance
            out = out[:, : x.shape[1]]
        if out.shape != x.shape:
            raise ValueError(f"`model` must return the shape of x, {tuple(x.shape)}, got {tuple(out.shape)}.")
        return out.to(_precision(x))


def _precision(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _of_batch(level: Levels, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a and b of one level or of one for each row, in the dtype of a batch and broadcasting to it."""
    if level.sigma.numel() != 1 and tuple(level.sigma.shape) != (len(like),):
        raise ValueError(f"`sigma` must be one level or {len(like)}, got the shape {tuple(level.sigma.shape)}.")
    shape = (-1, *[1] * (like.ndim - 1)) if level.sigma.ndim else ()
    a, b = (value.to(like.device, _precision(like)).view(shape) for value in (level.a, level.b))
    return a, b


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """Puts a network into evaluation mode without gradients of its parameters; leaves it as it was."""
    if not isinstance(model, nn.Module):
        yield
        return
    training = [module for module in model.modules() if module.training]
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for module in training:
            module.training = False
        for p in trained:
            p.requires_grad_(False)
        yield
    finally:
        for module in training:
            module.training = True
        for p in trained:
            p.requires_grad_(True)


def _per_image(value: Any) -> bool:
    """Whether a value has one row for each image: tensors, and conditions of a `PipelineDenoiser`."""
    return hasattr(value, "__getitem__") and hasattr(value, "__len__") and hasattr(value, "repeat")


def _selected(value: Any, rows: torch.Tensor) -> Any:
    if isinstance(value, dict):
        return {name: _selected(item, rows) for name, item in value.items()}
    if isinstance(value, torch.Tensor):
        return value if value.ndim == 0 or len(value) == 1 else value[rows.to(value.device)]
    return value[rows.tolist()] if _per_image(value) and len(value) > 1 else value


def _checked(value: Any, batch: int, name: str = "model_kwargs") -> Any:
    """Gives a single row to every image of a batch."""
    if isinstance(value, dict):
        return {key: _checked(item, batch, key) for key, item in value.items()}
    if not isinstance(value, torch.Tensor) or value.ndim == 0:
        return value
    if len(value) not in (1, batch):
        raise ValueError(f"`{name}` must have one row for all or one for each of {batch} images, got {len(value)}.")
    return value.expand(batch, *value.shape[1:])
