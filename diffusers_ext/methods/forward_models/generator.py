"""A generator's images as observations of its latents."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn
from typing_extensions import Self

from diffusers_ext.training.config import require

from .protocol import ForwardModel, Parameters

__all__ = ["GeneratorForwardModel"]

# A saved model may name classes of these; those of other libraries are passed as objects.
LIBRARIES = ("diffusers", "diffusers_ext", "transformers")


class GeneratorForwardModel(ForwardModel):
    """What a frozen generator makes of latents, then any forward model of its images: inversion as sampling.

    The signal are the latents, as a diffusion model has them: an autoencoder's `scaling_factor` and `shift_factor` are
    undone. Parameters of an observation: those of `then`; without it a tensor `(batch, 0)`.

    It saves with its parts in the subfolders `decoder` and `then`.

    Args:
        decoder: an autoencoder with `decode`, or any module from latents to images; it is frozen.
        then: forward model of the images; by default they are seen whole.

    Example:
        >>> import torch
        >>> from diffusers_ext import CropForwardModel, GeneratorForwardModel
        >>> decoder = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Unflatten(1, (1, 8, 8)))
        >>> half = GeneratorForwardModel(decoder, then=CropForwardModel(size=(4, 8), sample_size=8))
        >>> half(torch.zeros(2, 4), torch.zeros(2, 2)).shape
        torch.Size([2, 1, 4, 8])
    """

    __module__ = "diffusers_ext"

    def __init__(self, decoder: nn.Module, then: ForwardModel | None = None) -> None:
        super().__init__()
        require(isinstance(decoder, nn.Module), "decoder", type(decoder).__name__, "a torch module")
        then_fits = then is None or isinstance(then, ForwardModel)
        require(then_fits, "then", type(then).__name__, "a ForwardModel, or left out")
        self.decoder = decoder.requires_grad_(False).eval()
        self.then = then
        named = {f"{k}_class": [type(v).__module__.split(".")[0], type(v).__name__] for k, v in self._parts().items()}
        self.register_to_config(**named)

    def _parts(self) -> dict[str, nn.Module]:
        return {k: v for k, v in (("decoder", self.decoder), ("then", self.then)) if v is not None}

    def train(self, mode: bool = True) -> Self:
        """Sets the mode of `then`; the decoder stays frozen."""
        super().train(mode)
        self.decoder.eval()
        return self

    def generate(self, latents: torch.Tensor) -> torch.Tensor:
        """Returns the images of latents."""
        dtype = next((p.dtype for p in self.decoder.parameters()), latents.dtype)
        decode: Any = getattr(self.decoder, "decode", None)
        if decode is None:
            made = self.decoder(latents.to(dtype))
        else:
            scale, shift = (getattr(self.decoder.config, k, None) for k in ("scaling_factor", "shift_factor"))
            made = decode((latents / (scale or 1.0) + (shift or 0.0)).to(dtype))
        return getattr(made, "sample", made).to(latents.dtype)

    def forward(self, signal: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        """Generates, then observes.

        Args:
            signal: `(batch, ...)` latents.
            parameters: those of `then`, else not used.

        Returns:
            `(batch, ...)` observations of the images.
        """
        images = self.generate(signal)
        return images if self.then is None else self.then(images, parameters)

    def sample_parameters(self, n: int, generator: torch.Generator | None = None) -> Parameters:
        """Draws those of `then`, else returns `(n, 0)`."""
        if self.then is None:
            return torch.zeros(n, 0, device=None if generator is None else generator.device)
        return self.then.sample_parameters(n, generator)

    def check_parameters(self, parameters: Parameters, n: int | None = None) -> None:
        """Refuses what `then` refuses.

        Raises:
            ValueError: as said.
        """
        (super() if self.then is None else self.then).check_parameters(parameters, n)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:  # pyright: ignore
        """Saves as Diffusers' models do, each part in its subfolder.

        Raises:
            ValueError: a part has no `save_pretrained`.
        """
        for name, part in self._parts().items():
            saves = hasattr(part, "save_pretrained")
            require(saves, name, type(part).__name__, "a model with `save_pretrained` to be saved")
        super().save_config(save_directory)
        variant = kwargs.get("variant")
        stem, ending = SAFETENSORS_WEIGHTS_NAME.rsplit(".", 1)
        file = f"{stem}.{variant}.{ending}" if variant else SAFETENSORS_WEIGHTS_NAME
        save_file({"placeholder": self.placeholder.contiguous()}, Path(save_directory) / file, {"format": "pt"})
        for name, part in self._parts().items():
            cast(Any, part).save_pretrained(Path(save_directory) / name, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, **kwargs: Any) -> Self:
        """Loads the parts and puts them together.

        Args:
            pretrained_model_name_or_path: folder or Hub repo.
            **kwargs: as of Diffusers' models; `decoder` or `then` replace what was saved.

        Raises:
            ValueError: a part is of another library than Diffusers, Transformers and this package, and was not passed.
        """
        name: Any = pretrained_model_name_or_path
        subfolder = kwargs.pop("subfolder", None)
        given = {part: kwargs.pop(part) for part in ("decoder", "then") if part in kwargs}
        hub = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision")
        config: Any = cls.load_config(name, subfolder=subfolder, **{k: kwargs[k] for k in hub if k in kwargs})
        for part in ("decoder", "then"):
            if part in given or f"{part}_class" not in config:
                continue
            library, kind = config[f"{part}_class"]
            require(library in LIBRARIES, part, f"{library}.{kind}", f"of {LIBRARIES}, or passed to `from_pretrained`")
            folder = f"{subfolder}/{part}" if subfolder else part
            # In a local folder Diffusers would take weights beside the subfolder for those in it.
            place = {"subfolder": folder} if not os.path.isdir(name) else {}
            where = Path(name) / folder if os.path.isdir(name) else name
            given[part] = getattr(importlib.import_module(library), kind).from_pretrained(where, **place, **kwargs)
        model = cls(**given)
        dtype = kwargs.get("dtype") or kwargs.get("torch_dtype")
        model.register_to_config(_name_or_path=str(name))
        return (model if dtype is None else model.to(dtype)).eval()
