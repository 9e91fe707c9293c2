"""Any Diffusers pipeline as a denoiser: (x_t, t, conditions) -> the model's output, by the pipeline's own call."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .latent_map import LatentMap
from .latents import full_precision
from .prompts import Conditions
from .seam import Call, Reached, Undecoded, copied, pipeline_class, scheduler_class
from .self_check import evaluating, stock_steps

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
        cls = type(pipe)
        self._function: Any = inspect.unwrap(cls.__call__)  # without `torch.no_grad`
        self._parameters_of_call = inspect.signature(self._function).parameters
        self._key = _check_pipeline(pipe, self._parameters_of_call)
        self._network_name = _network_name(pipe)
        self._arguments = self._call_arguments(pipe, height, width, call)
        self._pipe, self._scheduler = pipe, pipe.scheduler
        self._network = [getattr(pipe, self._network_name)]  # a list, that it is no submodule twice
        self._vae_name = next(
            (n for n, m in _modules(pipe).items() if hasattr(m, "decode") and hasattr(m, "encode")), None
        )
        self._pipeline_class = pipeline_class(cls)
        self._scheduler_class = scheduler_class(type(pipe.scheduler), not hasattr(cls, "prepare_latents"))
        encode = getattr(cls, "encode_prompt", None)
        self._masked = encode is not None and any("mask" in name for name in inspect.signature(encode).parameters)
        self._sample: Conditions | None = None  # of one prompt, to ask the pipeline for shapes
        self._shape: tuple[int, ...] | None = None
        self._map: tuple[LatentMap, tuple, dict] | None = None
        self._one_timestep: bool | None = None
        self.denoiser: nn.Module = self._network[0]

    @property
    def pipe(self) -> Any:
        """The pipeline that was given."""
        return self._pipe

    @property
    def scheduler(self) -> Any:
        """The pipeline's scheduler, in whose space the output is."""
        return self._scheduler

    @property
    def device(self) -> torch.device:
        """Where the network runs."""
        network: Any = self.denoiser
        if any(hasattr(network, name) for name in ("_hf_hook", "_diffusers_hook")):  # offloaded
            return self._pipe._execution_device
        return next(network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The precision in which the network takes its input."""
        dtype = getattr(self.denoiser, "dtype", None)
        return dtype if isinstance(dtype, torch.dtype) else next(self.denoiser.parameters()).dtype

    def latents_shape(self, batch: int) -> tuple[int, ...]:
        """Returns the shape of x: that of the latents in which the pipeline's loop steps, packed or not."""
        if self._shape is None:
            self._shape = tuple(self._without_loop()[1].shape)
            if self._shape[0] != 1:
                raise ValueError(f"{self._name}: the latents of one prompt have the shape {self._shape}.")
        return (batch, *self._shape[1:])

    def schedule_arguments(self) -> dict[str, Any]:
        """Returns what the pipeline passes to `scheduler.set_timesteps` at this size, such as `mu` or `sigmas`."""
        return self._without_loop()[0].schedule

    @torch.no_grad()
    def encode_prompts(self, prompts: list[Any]) -> Conditions:
        """Encodes prompts one by one, by the pipeline's own `encode_prompt`.

        Args:
            prompts: texts, or ints for a pipeline that takes class labels.

        Returns:
            Conditions on the encoders' device. They fit every size, and do not need the encoders any more.
        """
        if isinstance(prompts, str) or not len(prompts):
            raise ValueError(f"`prompts` must be a list of at least one prompt, got {prompts!r}.")
        kind = int if self._key == "class_labels" else str
        wrong = [prompt for prompt in prompts if not isinstance(prompt, kind)]
        if wrong:
            raise ValueError(f"`prompts` must be a list of {kind.__name__} for {self._name}, got {wrong[0]!r}.")
        recorded: dict[Any, list[Any]] = {}
        for prompt in dict.fromkeys(prompts):
            call = Call(self._encoding_device(), torch.empty(0))
            if self._key == "prompt":
                self._run(call, [prompt], loop=False)
            recorded[prompt] = call.recorded
        conditions = Conditions(prompts, [recorded[prompt] for prompt in prompts], self._masked)
        self._sample = self._sample or conditions[0]
        return conditions

    @staticmethod
    def join(conditions: list[Conditions]) -> Conditions:
        """Joins conditions to one batch; prompts of unequal length get a mask."""
        joined = conditions[0]
        for other in conditions[1:]:
            joined = joined + other
        return joined

    def bind(self, conditions: Conditions) -> Callable[[torch.Tensor, torch.Tensor | float], torch.Tensor]:
        """Returns the denoiser under these conditions, as a function (x, t) -> output."""
        return lambda x, t: self(x, t, conditions)

    def forward(self, x: torch.Tensor, t: torch.Tensor | float, conditions: Conditions) -> torch.Tensor:
        """Returns what the pipeline would hand to `scheduler.step`, with gradient.

        Args:
            x: `latents_shape(batch)`: the latents as the network meets them, that is behind `scale_model_input`.
            t: the scheduler's timestep, one for all or `(batch,)`. A pipeline that can take only one for a call is
                called once for each.
            conditions: of as many prompts as x has samples, or of one for all.

        Returns:
            As x, in fp32.
        """
        batch = len(x)
        if len(conditions) not in (1, batch):
            raise ValueError(f"`conditions` must be of 1 or {batch} prompts, as x has samples, got {len(conditions)}.")
        self._sample = self._sample or conditions[0]
        if tuple(x.shape) != self.latents_shape(batch):
            raise ValueError(
                f"`x` must have the shape {self.latents_shape(batch)} at the size of this denoiser (one serves one "
                f"height and width), got {tuple(x.shape)}."
            )
        self._check_pipe()
        t = torch.as_tensor(t, device=self.device)
        if t.shape not in ((), (1,), (batch,)):
            raise ValueError(f"`t` must be one timestep or one for each of {batch} samples, got {tuple(t.shape)}.")
        conditions = conditions.repeat(batch)
        groups: dict[Any, list[int]] = {}
        times = t.tolist() if t.numel() > 1 and self._shares_timestep(conditions) else [None] * batch
        for i, key in enumerate(zip(times, conditions.lengths(), strict=True)):
            groups.setdefault(key, []).append(i)
        if len(groups) == 1:
            return self._output(x, t.reshape(-1)[:1] if times[0] is not None else t, conditions)
        rows = list(groups.values())
        parts = [
            self._output(x[r], t if t.numel() == 1 else t[r[0]] if times[0] is not None else t[r], conditions[r])
            for r in rows
        ]
        return torch.cat(parts)[torch.tensor([i for r in rows for i in r], device=x.device).argsort()]

    def _output(self, x: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        compiled = getattr(self.denoiser, "_compiled_call_impl", None) or hasattr(self.denoiser, "_orig_mod")
        played = conditions.joined(self.device, self.dtype, COMPILED_MULTIPLE if compiled else 1)
        return self._predict(x, t, conditions.prompts, played)

    def _predict(self, x: torch.Tensor, t: torch.Tensor, prompts: list[Any], played: list[Any]) -> torch.Tensor:
        device = self.device
        timesteps = (t.reshape(1) if t.numel() == 1 else t[None]).to(device)
        output = self._run(Call(device, timesteps, x.to(device, self.dtype), played), prompts)
        if not isinstance(output, torch.Tensor):
            raise ValueError(f"{self._name}: its call ended without reaching `scheduler.step` with a tensor.")
        output = output.to(x.device, torch.float32)
        if (
            torch.is_grad_enabled()
            and not output.requires_grad
            and (x.requires_grad or any(p.requires_grad for p in self.denoiser.parameters()))
        ):
            raise ValueError(f"{self._name}: no gradient reaches the output, something turns it off inside the call.")
        return output

    @torch.no_grad()
    def encode_images(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Encodes images to latents in which the pipeline's loop steps.

        Args:
            images: `(batch, 3, height, width)` in `[-1, 1]`.
            generator: draws from the autoencoder's posterior; its mode is taken without one.

        Returns:
            `latents_shape(batch)` in fp32.
        """
        latent_map = self._latent_map()[0]
        z_shape = tuple(latent_map.shift.shape[1:])
        vae: Any = getattr(self._pipe, str(self._vae_name))
        if images.ndim == 4 and len(z_shape) == 4:
            images = images.unsqueeze(2)  # one frame
        parameter = next(vae.parameters())
        with full_precision(vae):
            encoded = vae.encode(images.to(parameter.device, vae.dtype))
        if hasattr(encoded, "latent_dist"):
            posterior = encoded.latent_dist
            z = posterior.mode() if generator is None else posterior.sample(generator)
        else:
            z = encoded.latents if hasattr(encoded, "latents") else encoded.latent
        if tuple(z.shape[1:]) != z_shape:
            raise ValueError(
                f"{self._name}: `images` {tuple(images.shape)} are encoded to {tuple(z.shape[1:])}, but the pipeline "
                f"decodes {z_shape} at the size of this denoiser: either the images have another size, or the "
                "pipeline does more around its autoencoder than scale, shift and permute."
            )
        return latent_map.inverse(z.to(self.device, torch.float32))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decodes latents to images in `[-1, 1]`, `(batch, 3, height, width)` in fp32, with gradient."""
        latent_map, args, kwargs = self._latent_map()
        vae: Any = getattr(self._pipe, str(self._vae_name))
        with full_precision(vae):
            z = latent_map(latents.float()).to(next(vae.parameters()).device, vae.dtype)
            images = vae.decode(z, *args, **{**kwargs, "return_dict": False})[0].float()
        return images.squeeze(2) if images.ndim == 5 else images

    @torch.no_grad()
    def _latent_map(self) -> tuple[LatentMap, tuple, dict]:
        if self._map is None:
            if self._vae_name is None:
                raise ValueError(f"{self._name} has no autoencoder: its latents are images.")
            conditions = self._any_conditions()
            arguments: list[Any] = [(), {}]

            def decoded(latents: torch.Tensor) -> torch.Tensor:
                device = self.device
                played = conditions.joined(device, self.dtype)
                call = Call(device, self._no_timesteps(), latents, played, stop="decode")
                reached = self._run(call, conditions.prompts, loop=False)
                if reached is None:
                    raise ValueError("its call ended without `vae.decode`.")
                arguments[:] = reached[1:]
                return reached[0].float()

            try:
                latent_map = LatentMap(decoded, self.latents_shape(1), self.device)
            except ValueError as error:
                raise ValueError(f"{self._name} cannot turn images to latents here: {error}") from error
            self._map = latent_map, *arguments
        return self._map

    @torch.no_grad()
    def _without_loop(self) -> tuple[Call, torch.Tensor]:
        conditions, device = self._any_conditions(), self.device
        call = Call(device, self._no_timesteps(), None, conditions.joined(device, self.dtype), stop="enter")
        self._run(call, conditions.prompts, loop=False)
        if call.latents is None:
            raise ValueError(f"{self._name}: no latents entered by `prepare_latents` or `scale_model_input`.")
        return call, call.latents

    def _no_timesteps(self) -> torch.Tensor:
        """Timesteps that skip the loop, or one where latents enter within it."""
        return torch.zeros(0 if hasattr(type(self._pipe), "prepare_latents") else 1, dtype=torch.long)

    def _any_conditions(self) -> Conditions:
        if self._sample is None:
            self.encode_prompts([0 if self._key == "class_labels" else "a"])
        assert self._sample is not None
        return self._sample

    def _run(self, call: Call, prompts: list[Any], loop: bool = True) -> Any:
        """Runs the pipeline's call and returns what it reached, `None` at its end."""
        scheduler = copied(self._scheduler, self._scheduler_class, _seam=call)
        parts = {self._network_name: self.denoiser, "scheduler": scheduler, "_seam": call}
        parts["_progress_bar_config"] = {"disable": True}
        if not loop and self._vae_name is not None:
            parts[self._vae_name] = Undecoded(getattr(self._pipe, self._vae_name))
        try:
            self._function(
                copied(self._pipe, self._pipeline_class, **parts), **self._arguments_for(prompts, call.device)
            )
        except Reached as reached:
            return reached.value
        return None

    def _arguments_for(self, prompts: list[Any], device: torch.device) -> dict[str, Any]:
        arguments = {
            name: [value] * len(prompts) if "prompt" in name and isinstance(value, str) else value
            for name, value in self._arguments.items()
        }
        arguments[self._key] = list(prompts)  # its own, since some pipelines write into it
        if "generator" in self._parameters_of_call:
            # Noise that is drawn for nothing must not move the global generator.
            arguments.setdefault("generator", torch.Generator(device).manual_seed(0))
        return arguments

    def check(self, prompts: list[Any]) -> float:
        """Compares with the first two steps of the stock pipeline's own call.

        Args:
            prompts: texts or class labels; of several, unequal ones test how recordings are joined.

        Returns:
            The largest difference; 0 in fp32.

        Raises:
            ValueError: it is beyond the rounding of the network's precision.
        """
        conditions = self.encode_prompts(prompts)
        alone = len(set(conditions.lengths())) > 1  # the stock call pads such prompts without a mask
        parts = [conditions[i] for i in range(len(conditions))] if alone else [conditions]
        worst, precision = 0.0, torch.finfo(self.dtype).eps
        with evaluating(self.denoiser), torch.no_grad():
            for part in parts:
                steps, direct = stock_steps(self._pipe, self._arguments_for(part.prompts, self.device), len(part))
                for x, t, wanted in steps:
                    place = f"the call up to {type(self._scheduler).__name__}.step, at t = {float(t):g}"
                    worst = max(
                        worst, self._differ(self._predict(x, t, part.prompts, direct), wanted, precision, place)
                    )
                    # One by one, prompts are encoded with other rounding than in a batch.
                    place = f"`encode_prompt`, joined recordings of {part.prompts!r}"
                    self._differ(self(x, t, part), wanted, 1e3 * precision, place)
        logger.info("%s: equal to the stock pipeline's call (difference %.2g).", self._name, worst)
        return worst

    def _differ(self, output: torch.Tensor, wanted: torch.Tensor, tolerance: float, place: str) -> float:
        wanted = wanted.to(output.device, torch.float32)
        same = output.shape == wanted.shape
        difference, scale = float((output - wanted).abs().max()) if same else float("inf"), float(wanted.abs().max())
        if not difference <= tolerance * scale:
            raise ValueError(
                f"{self._name} cannot be taken over: its output differs by {difference:.2g} (of {scale:.2g}) from "
                f"what the stock call hands to its scheduler. Place: {place}."
            )
        return difference

    def unused_parameters(self, conditions: Conditions) -> list[str]:
        """Returns the names of trainable parameters of the network that no output depends on, by a dry backward."""
        named = {name: p for name, p in self.denoiser.named_parameters() if p.requires_grad}
        x = torch.randn(self.latents_shape(1), generator=torch.Generator().manual_seed(0))
        with torch.enable_grad(), evaluating(self.denoiser):
            output = self(x.to(self.device), 500, conditions[0])
            gradients = torch.autograd.grad(output.square().mean(), list(named.values()), allow_unused=True)
        return [name for name, gradient in zip(named, gradients, strict=True) if gradient is None]

    @property
    def _name(self) -> str:
        return type(self._pipe).__name__

    def _call_arguments(
        self, pipe: Any, height: int | None, width: int | None, call: dict[str, Any]
    ) -> dict[str, Any]:
        known = self._parameters_of_call
        given = {**call, **{k: v for k, v in {"height": height, "width": width}.items() if v is not None}}
        unknown = [name for name in given if name not in known or name in ("self", self._key, "latents")]
        if unknown:
            raise ValueError(f"`{unknown[0]}` is no argument that {type(pipe).__name__} takes from a denoiser.")
        defaults: dict[str, Any] = {"use_resolution_binning": False, "output_type": "pt", "return_dict": False}
        network: Any = getattr(pipe, self._network_name)
        for name, parameter in known.items():
            if "guidance_scale" in name or name.endswith("cfg_scale"):
                if parameter.default is not None or getattr(network.config, "guidance_embeds", False):
                    defaults[name] = 1.0
            elif name == "pag_scale":
                defaults[name] = 0.0
        trial = copied(pipe, type(pipe), _guidance_scale=1.0)
        with contextlib.suppress(AttributeError):  # made from other attributes of the call
            if trial.do_classifier_free_guidance and "guidance_scale" in defaults:
                defaults["guidance_scale"] = 0.0
        return {name: value for name, value in {**defaults, **given}.items() if name in known}

    def _check_pipe(self) -> None:
        for name, own in ((self._network_name, self._network[0]), ("scheduler", self._scheduler)):
            if getattr(self._pipe, name) is not own:
                raise ValueError(
                    f"`pipe.{name}` was exchanged after this denoiser was made: make a new PipelineDenoiser."
                )

    def _encoding_device(self) -> torch.device:
        encoders = [m for n, m in _modules(self._pipe).items() if n.startswith("text_encoder")]
        hooked = any(hasattr(m, name) for m in encoders for name in ("_hf_hook", "_diffusers_hook"))
        if hooked or not encoders:
            return self._pipe._execution_device
        return next(encoders[0].parameters()).device

    def _shares_timestep(self, conditions: Conditions) -> bool:
        """Whether one call of the pipeline can take one timestep only; tried once."""
        if self._one_timestep is None:
            self._one_timestep = False
            with evaluating(self.denoiser):
                self._one_timestep = not self._takes_timesteps(conditions[0])
            if self._one_timestep:
                logger.warning("%s takes one timestep a call: each sample of a batch is called alone.", self._name)
        return self._one_timestep

    @torch.no_grad()
    def _takes_timesteps(self, conditions: Conditions) -> bool:
        x = torch.randn(self.latents_shape(2), generator=torch.Generator().manual_seed(0)).to(self.device)
        last = float(self._scheduler.config.get("num_train_timesteps", 1000))
        t = torch.tensor([int(0.9 * last), int(0.2 * last)], device=self.device)
        single = torch.cat([self._output(x[i : i + 1], t[i], conditions) for i in range(2)])
        try:
            both = self._output(x, t, conditions.repeat(2))
        except Exception:  # noqa: BLE001 - whatever a loop says to two timesteps
            return False
        tolerance = 1e-3 if self.dtype == torch.float32 else 5e-2
        return both.shape == single.shape and bool((both - single).abs().max() <= tolerance * single.abs().max())


def _modules(pipe: Any) -> dict[str, nn.Module]:
    return {name: module for name, module in pipe.components.items() if isinstance(module, nn.Module)}


def _network_name(pipe: Any) -> str:
    """Finds the component that denoises: no encoder of text or images and no autoencoder."""
    from transformers import PreTrainedModel

    found = [
        name
        for name, module in _modules(pipe).items()
        if not isinstance(module, PreTrainedModel) and not (hasattr(module, "decode") and hasattr(module, "encode"))
    ]
    if (
        len(found) > 1
    ):  # where the pipeline lists in which order its models run, the network is the last but the decoder
        order = (pipe.model_cpu_offload_seq or "").split("->")
        found = sorted((n for n in found if n in order), key=order.index, reverse=True) or found
    if not found:
        raise ValueError(f"{type(pipe).__name__} has no component that denoises.")
    return found[0]


def _check_pipeline(pipe: Any, parameters: Any) -> str:
    name = type(pipe).__name__
    if "strength" in parameters:
        raise ValueError(
            f"{name} starts from an image: use the text-to-image pipeline of the same components, "
            "`AutoPipelineForText2Image.from_pipe(pipe)`."
        )
    if "prompt" not in parameters and "class_labels" not in parameters:
        raise ValueError(
            f"{name} takes neither `prompt` nor `class_labels`: for a model without conditions use its network "
            "itself, or ImageGenerationPipeline and `training/train_denoising.py`."
        )
    if "prompt" in parameters and not hasattr(pipe, "encode_prompt"):
        raise ValueError(f"{name} has no `encode_prompt`, so its prompts cannot be recorded.")
    if getattr(pipe, "scheduler", None) is None:
        raise ValueError(f"{name} has no scheduler.")
    return "prompt" if "prompt" in parameters else "class_labels"
