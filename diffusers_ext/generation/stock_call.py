"""A pipeline's own call, found out from its signature and its components, and run up to a place of the seam."""

from __future__ import annotations

import contextlib
import inspect
import math
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from .seam import ENTRANCES, Call, Reached, Undecoded, copied, pipeline_class, scheduler_class

__all__ = ["StockCall", "guides", "is_hooked"]


class StockCall:
    """Runs a pipeline's `__call__` on a shallow copy of it, without its `torch.no_grad`.

    Args:
        pipe: any pipeline that takes text or class labels; it stays as it is.
        given: arguments of its call.

    Raises:
        ValueError: the pipeline or an argument does not fit; the message says what does.
    """

    def __init__(self, pipe: Any, given: dict[str, Any]) -> None:
        if not isinstance(pipe, DiffusionPipeline):
            raise ValueError(f"`pipe` must be a DiffusionPipeline, got {type(pipe).__name__}.")
        cls = type(pipe)
        self.pipe, self.name = pipe, cls.__name__
        self._function: Any = inspect.unwrap(cls.__call__)
        self._known = inspect.signature(self._function).parameters
        self._check()
        self.prompt_key = "prompt" if "prompt" in self._known else "class_labels"
        self.network_name = self._find_network()
        self.network: nn.Module = getattr(pipe, self.network_name)
        self.scheduler: Any = pipe.scheduler
        self.autoencoder_name = next(
            (name for name, module in self._modules().items() if _is_autoencoder(module)), None
        )
        self.given, self.arguments = given, self._fill(given)
        prepares = any(hasattr(cls, name) for name in ENTRANCES)
        self._latents_are_given = not prepares and "latents" in self._known
        self._skips_loop = prepares or self._latents_are_given
        encode = getattr(cls, "encode_prompt", None)
        self.takes_mask = encode is not None and any(
            name.endswith("mask") for name in inspect.signature(encode).parameters
        )
        self._pipeline_class = pipeline_class(cls)
        self._scheduler_class = scheduler_class(type(pipe.scheduler), not prepares)

    @property
    def autoencoder(self) -> Any:
        """The pipeline's autoencoder.

        Raises:
            ValueError: it has none.
        """
        if self.autoencoder_name is None:
            raise ValueError(f"{self.name} has no autoencoder: its latents are images.")
        return getattr(self.pipe, self.autoencoder_name)

    @property
    def encoding_device(self) -> torch.device:
        """Where the text encoders run."""
        encoders = [module for name, module in self._modules().items() if name.startswith("text_encoder")]
        if not encoders or any(is_hooked(module) for module in encoders):
            return self.pipe._execution_device
        return next(encoders[0].parameters()).device

    def run(self, call: Call, prompts: list[Any], network: nn.Module) -> Any:
        """Runs the call and returns what it reached, `None` at its end.

        Args:
            call: what goes in, and where it ends.
            prompts: texts or class labels.
            network: in the place of the pipeline's, which may have been wrapped since.
        """
        for name, own in ((self.network_name, self.network), ("scheduler", self.scheduler)):
            if getattr(self.pipe, name) is not own:
                raise ValueError(
                    f"`pipe.{name}` was exchanged after this denoiser was made: make a new PipelineDenoiser."
                )
        parts: dict[str, Any] = {self.network_name: network, "_seam": call}
        parts["scheduler"] = copied(self.scheduler, self._scheduler_class, _seam=call)
        parts["_progress_bar_config"] = {"disable": True}
        if call.stop != "step" and self.autoencoder_name is not None:
            parts[self.autoencoder_name] = Undecoded(self.autoencoder)
        copy = copied(self.pipe, self._pipeline_class, **parts)
        arguments = self.arguments_for(prompts, call.device)
        if self._latents_are_given and call.x is not None:
            arguments["latents"] = call.enter(call.x)
        try:
            self._function(copy, **arguments)
        except Reached as reached:
            return reached.value
        except UnboundLocalError as error:
            if call.stop != "step":
                raise
            raise ValueError(f"{self.name}: its loop does not run at one timestep ({error}).") from error
        except Exception as error:
            if call.stop == "step" or isinstance(error, ValueError):
                raise
            given = ", ".join(f"{name}={value!r}" for name, value in self.given.items()) or "no arguments"
            raise ValueError(
                f"the call of {self.name} with {given} fails before its network is called: "
                f"{type(error).__name__}: {error}"
            ) from error
        return None

    def run_without_loop(
        self,
        stop: str,
        prompts: list[Any],
        network: nn.Module,
        device: torch.device,
        x: torch.Tensor | None = None,
        recordings: list[Any] | None = None,
    ) -> tuple[Call, Any]:
        """Runs what stands before the loop, up to where latents enter, or what stands behind it, up to the decoding.

        There are no timesteps; or one, whose step changes nothing, for pipelines that need the loop: latents enter
        within it, or it makes what is decoded.

        Returns:
            The call, and what it reached.
        """
        while True:
            call = Call(device, torch.zeros(0 if self._skips_loop else 1, dtype=torch.long), x, recordings, stop)
            try:
                reached = self.run(call, prompts, network)
            except UnboundLocalError:  # a result of the loop
                if not self._skips_loop:
                    raise
            else:
                if self._skips_loop is False or stop != "enter" or recordings is None or call.latents is not None:
                    return call, reached
            self._skips_loop = False

    def arguments_for(self, prompts: list[Any], device: torch.device) -> dict[str, Any]:
        """Returns the call's arguments for a batch; lists are new, since some pipelines write into them."""
        arguments = {
            name: [value] * len(prompts) if "prompt" in name and isinstance(value, str) else value
            for name, value in self.arguments.items()
        }
        arguments[self.prompt_key] = list(prompts)
        if "generator" in self._known:
            # Noise that is drawn for nothing must not move the global generator.
            arguments.setdefault("generator", torch.Generator(device).manual_seed(0))
        return arguments

    def _check(self) -> None:
        if "strength" in self._known:
            raise ValueError(
                f"{self.name} starts from an image: use the text-to-image pipeline of the same components, "
                "`AutoPipelineForText2Image.from_pipe(pipe)`."
            )
        if "prompt" not in self._known and "class_labels" not in self._known:
            raise ValueError(
                f"{self.name} takes neither `prompt` nor `class_labels`: call the network of a model without "
                "conditions itself, or sample with ImageGenerationPipeline."
            )
        if "prompt" in self._known and not hasattr(self.pipe, "encode_prompt"):
            raise ValueError(f"{self.name} has no `encode_prompt`, so its prompts cannot be recorded.")
        if getattr(self.pipe, "scheduler", None) is None:
            raise ValueError(
                f"{self.name} has no `scheduler`, so there is no step at which its output could be taken."
            )

    def _check_argument(self, name: str, value: Any) -> None:
        """Checks the arguments that most calls have; the others are the pipeline's to check."""
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if name in ("height", "width", "num_inference_steps"):
            good, accepted = number and isinstance(value, int) and value >= 1, "an integer >= 1, or left out"
        elif name == "generator":
            good, accepted = isinstance(value, torch.Generator), "a torch.Generator, or left out"
        elif guides(name):
            good, accepted = value is None or (number and math.isfinite(value)), "a finite number, or left out"
        else:
            return
        if not good:
            raise ValueError(f"`{name}` must be {accepted}, got {value!r}.")

    def check_prompts(self, prompts: Any) -> None:
        """Checks what a denoiser is to be conditioned on.

        Raises:
            ValueError: no list, an empty one, or one of other things than texts or labels of the network.
        """
        kind = str if self.prompt_key == "prompt" else int
        if not isinstance(prompts, list | tuple) or not prompts:
            raise ValueError(f"`prompts` must be a list of at least one prompt, got {prompts!r}.")
        for prompt in prompts:
            if not isinstance(prompt, kind) or isinstance(prompt, bool):
                raise ValueError(f"`prompts` must be a list of {kind.__name__} for {self.name}, got {prompt!r}.")
        if kind is int:
            # The transformer keeps the null label behind the classes.
            last = getattr(self.network.config, "num_embeds_ada_norm", None)
            if min(prompts) < 0 or (last is not None and max(prompts) > last):
                accepted = "labels >= 0" if last is None else f"labels in 0..{last}"
                raise ValueError(f"`prompts` must be {accepted} for {self.name}, got {list(prompts)}.")

    def _modules(self) -> dict[str, nn.Module]:
        components = self.pipe.components.items()
        return {name: module for name, module in components if isinstance(module, nn.Module)}

    def _find_network(self) -> str:
        """Finds the component that denoises: no encoder of text or images and no autoencoder."""
        from transformers import PreTrainedModel

        modules = self._modules().items()
        found = [n for n, m in modules if not isinstance(m, PreTrainedModel) and not _is_autoencoder(m)]
        if not found:
            raise ValueError(f"{self.name} has no component that denoises.")
        usual = [name for name in ("transformer", "unet") if name in found]
        if usual:
            return usual[0]
        # Pipelines list in which order their models run: the network is the last.
        order: list[str] = str(self.pipe.model_cpu_offload_seq).split("->")
        return max(found, key=lambda name: order.index(name) if name in order else -1)

    def _fill(self, given: dict[str, Any]) -> dict[str, Any]:
        """Adds to the given arguments those that turn guidance off and leave the size alone."""
        taken = ("self", self.prompt_key, "latents", "output_type", "return_dict")
        unknown = [name for name in given if name not in self._known or name in taken]
        if unknown:
            raise ValueError(f"`{unknown[0]}` is no argument that a denoiser can hand to the call of {self.name}.")
        for name, value in given.items():
            self._check_argument(name, value)
        defaults: dict[str, Any] = {"use_resolution_binning": False, "output_type": "pt", "return_dict": False}
        embedded = getattr(getattr(self.network, "config", None), "guidance_embeds", False)
        for name, parameter in self._known.items():
            if guides(name) and (parameter.default is not None or embedded):
                defaults[name] = 0.0 if name == "pag_scale" else 1.0
        trial = copied(self.pipe, type(self.pipe), _guidance_scale=1.0)
        with contextlib.suppress(AttributeError):  # a property that reads more than the scale
            if trial.do_classifier_free_guidance and "guidance_scale" in defaults:
                defaults["guidance_scale"] = 0.0
        return {name: value for name, value in {**defaults, **given}.items() if name in self._known}


def guides(name: str) -> bool:
    """Whether an argument of a pipeline's call is a scale of guidance."""
    return "guidance_scale" in name or name.endswith("cfg_scale") or name == "pag_scale"


def is_hooked(module: Any) -> bool:
    """Whether hooks may decide where a module runs."""
    return hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook")


def _is_autoencoder(module: Any) -> bool:
    return hasattr(module, "decode") and hasattr(module, "encode")
