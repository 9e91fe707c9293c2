"""Any Diffusers pipeline as a denoiser: (x_t, t, conditions) -> the model's output, by the pipeline's own call."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .latent_map import ImageLatents
from .prompts import Conditions
from .seam import Call
from .self_check import difference, evaluating, stock_steps
from .stock_call import StockCall, is_hooked

__all__ = ["PipelineDenoiser"]

logger = logging.getLogger(__name__)

COMPILED_MULTIPLE = 64  # tokens: a compiled network meets few lengths of text


class PipelineDenoiser(nn.Module):
    """A stock pipeline's network, called as the pipeline's own `__call__` calls it.

    The call runs on a shallow copy of the pipeline with latents, timesteps and prompts of ours, until it reaches
    `scheduler.step`. What arrives there is in the scheduler's space, the same for every pipeline: epsilon, v or x0 for
    schedulers with `alphas_cumprod`, noise minus image for flow-matching ones. Guidance is off unless `call` turns it
    on. The pipeline's network is the only submodule (`denoiser`); the pipeline itself is left as it is. Calls of
    several threads do not meet.

    Args:
        pipe: a text-to-image (or text-to-video) pipeline, or one that takes `class_labels`.
        height: of the images, in pixels; by default the pipeline's own. One denoiser serves one size.
        width: likewise.
        call: further arguments of the pipeline's call, such as `guidance_scale` or `max_sequence_length`. Where the
            scale is an input of the network (`guidance_embeds`), it is 1 by default.

    Raises:
        ValueError: the pipeline takes neither text nor labels, or an argument that its call does not have.

    Example:
        >>> denoiser = PipelineDenoiser(pipe, height=512, width=512)  # doctest: +SKIP
        >>> conditions = denoiser.encode_prompts(["a cat", "a red dog"])  # doctest: +SKIP
        >>> x0 = denoiser.encode_images(images)  # doctest: +SKIP
        >>> output = denoiser(x_t, t, conditions)  # doctest: +SKIP
    """

    __module__ = "diffusers_ext"

    def __init__(self, pipe: Any, height: int | None = None, width: int | None = None, **call: Any) -> None:
        super().__init__()
        size = {name: value for name, value in (("height", height), ("width", width)) if value is not None}
        self._stock = StockCall(pipe, {**call, **size})
        self._sample: Conditions | None = None  # of one prompt, to ask the pipeline for shapes
        self._first: Call | None = None  # the pipeline's own call, up to where its latents enter
        self._images: ImageLatents | None = None
        self._one_timestep: bool | None = None
        self._dtypes: dict[torch.dtype, torch.dtype] = {}
        self.denoiser: nn.Module = self._stock.network

    @property
    def pipe(self) -> Any:
        """The pipeline that was given."""
        return self._stock.pipe

    @property
    def scheduler(self) -> Any:
        """The pipeline's scheduler, in whose space the output is."""
        return self._stock.scheduler

    @property
    def device(self) -> torch.device:
        """Where the network runs."""
        device = next(self.denoiser.parameters()).device
        waits = device.type == "meta" or (device.type == "cpu" and torch.cuda.is_available())
        return self._stock.pipe._execution_device if waits and is_hooked(self.denoiser) else device

    @property
    def dtype(self) -> torch.dtype:
        """The precision in which the network takes its input."""
        stored = next(self.denoiser.parameters()).dtype
        if stored not in self._dtypes:  # Diffusers looks through every module
            dtype = getattr(self.denoiser, "dtype", None)
            self._dtypes[stored] = dtype if isinstance(dtype, torch.dtype) else stored
        return self._dtypes[stored]

    def latents_shape(self, batch: int) -> tuple[int, ...]:
        """Returns the shape of x: that of the latents in which the pipeline's loop steps, packed or not.

        Raises:
            ValueError: `batch` is no integer >= 0, or the pipeline makes no latents of this size.
        """
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 0:
            raise ValueError(f"`batch` must be an integer >= 0, got {batch!r}.")
        latents = self._entered().latents
        if latents is None or latents.shape[0] != 1:
            found = None if latents is None else tuple(latents.shape)
            raise ValueError(f"{self._stock.name}: no latents of one sample enter its call, but {found}.")
        return (batch, *latents.shape[1:])

    def schedule_arguments(self) -> dict[str, Any]:
        """Returns what the pipeline passes to `scheduler.set_timesteps` at this size, such as `mu` or `sigmas`."""
        return dict(self._entered().schedule)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[Any]) -> Conditions:
        """Encodes prompts one by one, by the pipeline's own `encode_prompt`.

        Args:
            prompts: texts, or ints for a pipeline that takes class labels.

        Returns:
            Conditions on the encoders' device. They fit every size, and need the encoders no more.
        """
        has_text = self._stock.prompt_key == "prompt"
        self._stock.check_prompts(prompts)
        recorded: dict[Any, list[Any]] = {}
        for prompt in dict.fromkeys(prompts):
            recorded[prompt] = []
            if has_text:
                device = self._stock.encoding_device
                call, _ = self._stock.run_without_loop("enter", [prompt], self.denoiser, device)
                recorded[prompt] = call.recorded
        conditions = Conditions(prompts, [recorded[prompt] for prompt in prompts], self._stock.takes_mask)
        self._sample = self._sample or conditions[0]
        return conditions

    @staticmethod
    def join(conditions: list[Conditions]) -> Conditions:
        """Joins conditions to one batch; prompts of unequal length get a mask.

        Raises:
            ValueError: there are none, or they are of pipelines that encode otherwise.
        """
        if not isinstance(conditions, list | tuple) or not conditions:
            raise ValueError(f"`conditions` must be a list of at least one `Conditions`, got {conditions!r}.")
        for other in conditions:
            _check_conditions(other, conditions[0])
        joined = conditions[0]
        for other in conditions[1:]:
            joined = joined + other
        return joined

    def bind(self, conditions: Conditions) -> Callable[[torch.Tensor, torch.Tensor | float], torch.Tensor]:
        """Returns the denoiser under these conditions, as a function (x, t) -> output."""
        return lambda x, t: self(x, t, conditions)

    def forward(self, x: torch.Tensor, t: torch.Tensor | float, conditions: Conditions) -> torch.Tensor:
        """Returns what the pipeline would hand to `scheduler.step`, with gradient.

        Samples that cannot share a call of the pipeline (its loop takes one timestep only, or texts of unequal length
        have no mask) are called in groups.

        Args:
            x: `latents_shape(batch)`: the latents as the network meets them, that is behind `scale_model_input`.
            t: the scheduler's timestep, one for all or `(batch,)`.
            conditions: of as many prompts as x has samples, or of one for all.

        Returns:
            As x, in fp32.

        Raises:
            ValueError: shapes do not fit, the pipeline's parts were exchanged, or its loop does other than hand the
                latents to the network and the output to the scheduler.
        """
        if not (isinstance(x, torch.Tensor) and x.is_floating_point() and x.ndim):
            raise ValueError(f"`x` must be a tensor of floats, got {_kind(x)}.")
        batch = len(x)
        _check_conditions(conditions, self._sample)
        if len(conditions) not in (1, batch):
            raise ValueError(f"`conditions` must be of 1 or {batch} prompts, as x has samples, got {len(conditions)}.")
        self._sample = self._sample or conditions[0]
        if tuple(x.shape) != self.latents_shape(batch):
            raise ValueError(
                f"`x` must have the shape {self.latents_shape(batch)} at the height and width of this denoiser (one "
                f"serves one size), got {tuple(x.shape)}."
            )
        t = self._timesteps(t, batch)
        conditions = conditions.repeat(batch)
        alone = len(t) > 1 and self.one_timestep
        keys = list(zip(t.tolist() if alone else [0] * batch, conditions.lengths, strict=True))
        if len(set(keys)) == 1:
            return self._output(x, t[:1] if alone else t, conditions)
        groups = [[i for i, key in enumerate(keys) if key == wanted] for wanted in dict.fromkeys(keys)]
        parts = [
            self._output(x[rows], t if len(t) == 1 else t[rows[:1] if alone else rows], conditions[rows])
            for rows in groups
        ]
        return torch.cat(parts)[torch.tensor(sum(groups, []), device=x.device).argsort()]

    def _timesteps(self, t: Any, batch: int) -> torch.Tensor:
        """Returns `(1,)` or `(batch,)` timesteps; those on another device than the CPU are not looked at."""
        last = self.scheduler.config.get("num_train_timesteps")
        accepted = "numbers" if last is None else f"numbers in 0..{last}, the scheduler's timesteps"
        try:
            times = torch.as_tensor(t).flatten()
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"`t` must hold {accepted}, got {_kind(t)}.") from None
        if len(times) not in (1, batch):
            raise ValueError(f"`t` must be one timestep or one for each of {batch} samples, got {len(times)}.")
        whole = times.dtype != torch.bool and not times.is_complex()
        if not whole or (times.device.type == "cpu" and not _within(times, last)):
            raise ValueError(f"`t` must hold {accepted}, got {times.tolist()}.")
        return times

    @property
    def one_timestep(self) -> bool:
        """Whether a call of the pipeline takes one timestep only; tried once, in a batch against single calls."""
        if self._one_timestep is None:
            self._one_timestep = False
            with evaluating(self.denoiser):
                self._one_timestep = not self._takes_timesteps()
            if self._one_timestep:
                logger.warning(
                    "%s takes one timestep a call: samples of a batch with different ones are called one by one.",
                    self._stock.name,
                )
        return self._one_timestep

    @torch.no_grad()
    def encode_images(
        self, images: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None = None
    ) -> torch.Tensor:
        """Encodes images to latents in which the pipeline's loop steps.

        The way from the autoencoder's latents is learned from the pipeline's own decoding, once.

        Args:
            images: `(batch, 3, height, width)` in `[-1, 1]`.
            generator: draws from the autoencoder's posterior; its mode is taken without one. Or a list, one an image.

        Returns:
            `latents_shape(batch)` in fp32.

        Raises:
            ValueError: the images have another size or range, or the pipeline gives no way from images to its latents.
        """
        return self._image_latents().encode(images, generator)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decodes latents to images in `[-1, 1]`, `(batch, 3, height, width)` in fp32, with gradient."""
        return self._image_latents().decode(latents)

    def check(self, prompts: list[Any]) -> float:
        """Compares with the first two steps of the stock pipeline's own call.

        Args:
            prompts: texts or class labels; of several, unequal ones test how recordings are joined.

        Returns:
            The largest difference; 0 in fp32.

        Raises:
            ValueError: it is beyond the rounding of the network's precision; the message names the place.
        """
        conditions, name = self.encode_prompts(prompts), self._stock.name
        unmasked = len(set(conditions.lengths)) > 1  # the stock call pads such prompts without a mask
        parts = [conditions[i] for i in range(len(conditions))] if unmasked else [conditions]
        worst, precision = 0.0, torch.finfo(self.dtype).eps
        with evaluating(self.denoiser), torch.no_grad():
            for part in parts:
                arguments = self._stock.arguments_for(part.prompts, self.device)
                steps, direct = stock_steps(self.pipe, arguments, len(part))
                for x, t, wanted in steps:
                    place = f"the call of {name} up to {type(self.scheduler).__name__}.step, t = {float(t):g}"
                    call = Call(self.device, t.to(self.device), x.to(self.device, self.dtype), direct)
                    output = self._predict(call, x, part.prompts)
                    worst = max(worst, difference(output, wanted, 4 * precision, place))
                    # Prompts are encoded with other rounding one by one than in a batch.
                    place = f"`encode_prompt` of {name}, recordings of {part.prompts!r} joined"
                    difference(self(x, t, part), wanted, 1e3 * precision, place)
        logger.info("%s: equal to the stock pipeline's call (difference %.2g).", name, worst)
        return worst

    def unused_parameters(self, conditions: Conditions) -> list[str]:
        """Returns the names of trainable parameters of the network that no output depends on, by a dry backward."""
        named = {name: p for name, p in self.denoiser.named_parameters() if p.requires_grad}
        if not named:
            return []
        with torch.enable_grad(), evaluating(self.denoiser):
            output = self(self._noise(1), 500, conditions[0])
            gradients = torch.autograd.grad(output.square().mean(), list(named.values()), allow_unused=True)
        return [name for name, gradient in zip(named, gradients, strict=True) if gradient is None]

    def _output(self, x: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        compiled = getattr(self.denoiser, "_compiled_call_impl", None) or hasattr(self.denoiser, "_orig_mod")
        device, dtype = self.device, self.dtype
        played = conditions.joined(device, dtype, COMPILED_MULTIPLE if compiled else 1)
        call = Call(device, (t if len(t) == 1 else t[None]).to(device), x.to(device, dtype), played)
        return self._predict(call, x, conditions.prompts)

    def _predict(self, call: Call, x: torch.Tensor, prompts: list[Any]) -> torch.Tensor:
        output = self._stock.run(call, prompts, self.denoiser)
        if not isinstance(output, torch.Tensor):
            raise ValueError(f"{self._stock.name}: its call did not reach `scheduler.step` with a tensor.")
        output = output.to(x.device, torch.float32)
        if torch.is_grad_enabled() and not output.requires_grad:
            wanted = x.requires_grad or any(p.requires_grad for p in self.denoiser.parameters())
            if wanted:
                raise ValueError(f"{self._stock.name}: no gradient reaches the output, its call turns it off inside.")
        return output

    @torch.no_grad()
    def _entered(self) -> Call:
        """Runs the pipeline's call until its own latents have entered, once."""
        if self._first is None:
            sample, run = self._one_prompt(), self._stock.run_without_loop
            played = sample.joined(self.device, self.dtype)
            self._first = run("enter", sample.prompts, self.denoiser, self.device, None, played)[0]
        return self._first

    @torch.no_grad()
    def _image_latents(self) -> ImageLatents:
        if self._images is None:
            sample, shape = self._one_prompt(), self.latents_shape(1)
            self._images = ImageLatents(self._stock, sample, shape, self.denoiser, self.device, self.dtype)
        return self._images

    @torch.no_grad()
    def _takes_timesteps(self) -> bool:
        sample, x = self._one_prompt(), self._noise(2)
        last = float(self.scheduler.config.get("num_train_timesteps", 1000))
        t = torch.tensor([int(0.9 * last), int(0.2 * last)], device=self.device)
        single = torch.cat([self._output(x[i : i + 1], t[i : i + 1], sample) for i in range(2)])
        try:
            both = self._output(x, t, sample.repeat(2))
        except torch.OutOfMemoryError:
            raise
        except Exception:  # noqa: BLE001 - whatever a loop says to two timesteps
            return False
        tolerance = 1e-3 if self.dtype == torch.float32 else 5e-2
        return both.shape == single.shape and bool((both - single).abs().max() <= tolerance * single.abs().max())

    def _one_prompt(self) -> Conditions:
        if self._sample is None:
            self.encode_prompts(["a" if self._stock.prompt_key == "prompt" else 0])
        assert self._sample is not None
        return self._sample

    def _noise(self, batch: int) -> torch.Tensor:
        return torch.randn(self.latents_shape(batch), generator=torch.Generator().manual_seed(0)).to(self.device)


def _kind(value: Any) -> str:
    """Says what a wrong value is."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return repr(value) if isinstance(value, str | int | float | None) else type(value).__name__


def _within(times: torch.Tensor, last: float | None) -> bool:
    """Whether timesteps are finite and of the scheduler's range."""
    finite = bool(torch.isfinite(times).all())
    return finite and (last is None or bool((times >= 0).all() and (times <= last).all()))


def _check_conditions(conditions: Any, like: Conditions | None) -> None:
    if not isinstance(conditions, Conditions):
        raise ValueError(f"`conditions` must be what `encode_prompts` returned, got {_kind(conditions)}.")
    if like is not None and len(conditions) and conditions.layout != like.layout:
        raise ValueError(
            "`conditions` must be of this pipeline, got some of another: `encode_prompt` returned "
            f"{conditions.layout} values, here {like.layout}."
        )
