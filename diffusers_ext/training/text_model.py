"""A text-to-image pipeline that is trained: loading it, its network at several sizes, and what memory it takes."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import nn

from diffusers_ext.generation.denoiser import PipelineDenoiser
from diffusers_ext.generation.prompts import Conditions

from .pretrained import loaded

__all__ = ["SizedDenoiser", "TextPipeline"]

Size = tuple[int, int]
NETWORKS = ("transformer", "unet")


class TextPipeline:
    """A pipeline by name, loaded for training.

    Args:
        argument: the command-line argument that named it, for messages.
        name: Hub repo or folder.
        dtype: precision of its modules.
        network_dtype: precision of the network that is trained.
        from_scratch: make that network from its configuration, with new weights by torch's global generator.
        bits: 4 or 8 to load that network quantized by bitsandbytes.

    Attributes:
        pipe: the pipeline, on the CPU but for a quantized network.
        network_name: the component that is trained, `"transformer"` or `"unet"`.

    Raises:
        ValueError: it cannot be loaded, or has no such network; the message names the argument.
    """

    def __init__(
        self,
        argument: str,
        name: str,
        dtype: torch.dtype = torch.float32,
        network_dtype: torch.dtype = torch.float32,
        from_scratch: bool = False,
        bits: int | None = None,
    ) -> None:
        self.argument, self.name, self.dtype, self.network_dtype = argument, name, dtype, network_dtype
        try:
            index: Any = DiffusionPipeline.load_config(name)
        except Exception as error:  # the libraries raise many kinds
            raise ValueError(
                f"`{argument}` must be a Hub repo or a folder of a pipeline, got {name!r}: {error}"
            ) from None
        names = [n for n in NETWORKS if index.get(n, [None])[0] is not None]
        if not names:
            found = sorted(key for key in index if not key.startswith("_"))
            raise ValueError(
                f"`{argument}` must be a pipeline with a `transformer` or a `unet`, got {name!r}, a "
                f"{index.get('_class_name')} of {found}."
            )
        self.network_name = names[0]
        parts: dict[str, Any] = {}
        if from_scratch:
            parts[self.network_name] = self._new_network(index[self.network_name][1])
        self.pipe: Any = self._load(bits, parts)

    def _new_network(self, kind: str) -> Any:
        try:
            cls: Any = getattr(diffusers, kind)
            return cls.from_config(cls.load_config(self.name, subfolder=self.network_name))
        except Exception as error:  # whatever a wrong configuration runs into
            raise ValueError(
                f"`{self.argument}` must hold {self.network_name}/config.json of a network of Diffusers, got "
                f"{self.name!r}: {error}"
            ) from error

    def _load(self, bits: int | None, parts: dict[str, Any]) -> Any:
        options: dict[str, Any] = dict(parts)
        if bits is not None:
            options["quantization_config"] = _quantization(bits, self.network_name, self.dtype)
        dtypes = {"default": self.dtype, self.network_name: self.network_dtype}
        return loaded(self.argument, DiffusionPipeline, self.name, dtype=dtypes, **options)

    @property
    def network(self) -> Any:
        """The network that is trained."""
        return getattr(self.pipe, self.network_name)

    def others(self) -> dict[str, nn.Module]:
        """Returns the pipeline's other modules by name."""
        parts = self.pipe.components.items()
        return {n: m for n, m in parts if isinstance(m, nn.Module) and n != self.network_name}

    @contextmanager
    def one_precision(self) -> Iterator[None]:
        """Holds all modules in the network's precision for a while: the stock call takes no mixture."""
        modules = self.others().values() if self.dtype != self.network_dtype else ()
        tensors = [t for module in modules for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
        before = [t.dtype for t in tensors]
        for tensor in tensors:
            tensor.data = tensor.data.to(self.network_dtype)
        try:
            yield
        finally:
            for tensor, dtype in zip(tensors, before, strict=True):
                tensor.data = tensor.data.to(dtype)

    def release(self, names: Iterable[str]) -> None:
        """Frees the memory of modules that training does not need any more; their configurations stay."""
        for name in names:
            getattr(self.pipe, name).to("meta")
        diffusers.training_utils.free_memory()

    def whole(self, network: Any, original: bool = False) -> Any:
        """Returns the pipeline with a network; what was released is loaded again.

        Args:
            network: the trained network.
            original: with all other modules in fp32, as they are to be saved.
        """
        released = any(p.is_meta for module in self.others().values() for p in module.parameters())
        if not released and not (original and self.dtype != torch.float32):
            self.pipe.register_modules(**{self.network_name: network})
            return self.pipe
        dtype = torch.float32 if original else self.dtype
        return loaded(self.argument, DiffusionPipeline, self.name, dtype=dtype, **{self.network_name: network})


def _quantization(bits: int, network_name: str, dtype: torch.dtype) -> Any:
    from diffusers.quantizers import PipelineQuantizationConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("`quantization` must be left out without bitsandbytes: pip install bitsandbytes")
    if not torch.cuda.is_available():
        raise ValueError("`quantization` must be left out without a GPU: bitsandbytes quantizes there.")
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    return PipelineQuantizationConfig(
        quant_backend=f"bitsandbytes_{bits}bit",
        quant_kwargs=four if bits == 4 else {"load_in_8bit": True},
        components_to_quantize=[network_name],
    )


class SizedDenoiser(nn.Module):
    """A pipeline's network as a denoiser of images of several sizes, each by a `PipelineDenoiser` of its own.

    Args:
        pipe: the pipeline.
        sizes: `(height, width)` of the images.
        call: further arguments of the pipeline's call.

    Attributes:
        denoiser: the network, the only submodule.
    """

    def __init__(self, pipe: Any, sizes: Iterable[Size], **call: Any) -> None:
        super().__init__()
        self._sized = {size: PipelineDenoiser(pipe, *size, **call) for size in sizes}
        self.denoiser: Any = self.at().denoiser

    def __deepcopy__(self, memo: dict[int, Any]) -> SizedDenoiser:
        """Copies the network alone: a copy holds weights, and is not called."""
        twin = SizedDenoiser.__new__(SizedDenoiser)
        nn.Module.__init__(twin)
        twin._sized, twin.denoiser = {}, copy.deepcopy(self.denoiser, memo)
        return twin

    def at(self, size: Size | None = None) -> PipelineDenoiser:
        """Returns the denoiser of a size, by default of the first."""
        return next(iter(self._sized.values())) if size is None else self._sized[size]

    def forward(self, x: torch.Tensor, t: torch.Tensor, conditions: Conditions, size: Size) -> torch.Tensor:
        """Returns the output in the scheduler's space; see `PipelineDenoiser.forward`."""
        return self._sized[size](x, t, conditions)
