"""Denoising of raw images: a file or an array in, the same clean, as numbers or as a picture."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.utils import BaseOutput

from diffusers_ext.generation.tiles import Tiling, tiled
from diffusers_ext.hub.loading import SafePipeline
from diffusers_ext.training.config import require

from .bayer import check_pattern, pack_bayer, unpack_bayer
from .camera import check_levels
from .dark_model import DarkFrameModel
from .develop import develop
from .raw_files import RawImage, read_raw
from .unet import RawUNet

__all__ = ["RawDenoisePipeline", "RawDenoisePipelineOutput"]


@dataclass
class RawDenoisePipelineOutput(BaseOutput):
    """What `RawDenoisePipeline` returns.

    Attributes:
        images: the denoised images in the order of the given ones, of the asked type.
    """

    images: list[Any]


class RawDenoisePipeline(SafePipeline):
    """Denoises raw images, exposed too short or not.

    Dark shading and bad pixels are taken off first, where dark frames of the camera were learned.

    Args:
        unet: the denoiser.
        dark: the camera's dark frames, or `None`.
        white_level: of the camera, in DN, for arrays; files say theirs.
        black_level: of the camera.
        pattern: of the mosaic.

    Raises:
        ValueError: levels or pattern make no sense.

    Example:
        >>> import numpy as np
        >>> from diffusers_ext import RawDenoisePipeline, RawUNet
        >>> pipeline = RawDenoisePipeline(RawUNet(base_channels=4), white_level=1023, black_level=64)
        >>> pipeline.set_progress_bar_config(disable=True)
        >>> raw = np.full((32, 48), 100, np.uint16)
        >>> float(pipeline(raw, ratio=2.0).images[0].mean())  # untrained: only brighter
        136.0
    """

    __module__ = "diffusers_ext"

    unet: Any
    dark: Any

    model_cpu_offload_seq = "dark->unet"
    _optional_components = ["dark"]

    def __init__(
        self,
        unet: RawUNet,
        dark: DarkFrameModel | None = None,
        white_level: float = 16383.0,
        black_level: float = 512.0,
        pattern: str = "RGGB",
    ) -> None:
        super().__init__()
        check_levels(white_level, black_level)
        check_pattern(pattern)
        self.register_modules(unet=unet, dark=dark)
        self.register_to_config(white_level=white_level, black_level=black_level, pattern=pattern)

    def check_inputs(self, ratio: float, tile: int | None, output_type: str) -> None:
        """Checks what does not depend on the images.

        Raises:
            ValueError: an argument is wrong; the message names it.
        """
        require(output_type in ("raw", "pt", "pil"), "output_type", output_type, "one of ['raw', 'pt', 'pil']")
        whole = tile is None or (isinstance(tile, int) and tile >= 1)
        require(whole, "tile", tile, "an integer >= 1 or left out")
        require(math.isfinite(ratio) and ratio >= 1, "ratio", ratio, "a number >= 1")

    @torch.no_grad()
    def __call__(
        self,
        raw: Any,
        iso: float | None = None,
        ratio: float = 1.0,
        black_level: float | None = None,
        white_level: float | None = None,
        pattern: str | None = None,
        tile: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "raw",
        return_dict: bool = True,
    ) -> RawDenoisePipelineOutput | tuple[list[Any]]:
        """Denoises raw images.

        Args:
            raw: a file (DNG, NEF, ARW ... with the extra `raw`, `.npy`, grey `.tif`), an array or tensor `(height,
                width)` in DN, or a list of these. Do not cut values below the black level before.
            iso: of the exposure; by default as the file says. Needed with `dark` only.
            ratio: by how much to brighten: how many times the exposure was too short.
            black_level: in DN; by default as the file says, or of the pipeline.
            white_level: in DN, likewise.
            pattern: of the mosaic, likewise.
            tile: cut larger images into tiles of this side, in pixels, rounded up to what the network takes; the
                result is the same.
            generator: as in other pipelines; nothing is drawn here.
            output_type: `"raw"` for arrays `(height, width)` of float32 in DN, with black and white where they were;
                `"pt"` for packed tensors `(4, height / 2, width / 2)`, 0 black and 1 white; `"pil"` for pictures in
                sRGB.
            return_dict: return a `RawDenoisePipelineOutput` instead of a tuple.

        Returns:
            `RawDenoisePipelineOutput`, or its images in a tuple.

        Raises:
            ValueError: an argument is wrong, an image is not two-dimensional or not finite, or its ISO is outside of
                the calibrated range; the message names it.
        """
        self.check_inputs(ratio, tile, output_type)
        given = raw if isinstance(raw, list | tuple) else [raw]
        require(len(given) > 0, "raw", raw, "at least one image")
        results = []
        with self.progress_bar(total=len(given)) as bar:  # pyright: ignore[reportCallIssue]
            for one in given:
                image = self._described(one, iso, black_level, white_level, pattern)
                results.append(self._denoised(image, ratio, tile, output_type))
                bar.update()
        self.maybe_free_model_hooks()
        return RawDenoisePipelineOutput(results) if return_dict else (results,)

    def _described(
        self, one: Any, iso: float | None, black: float | None, white: float | None, pattern: str | None
    ) -> RawImage:
        """Reads an image, and fills in what its file does not say."""
        if isinstance(one, str | os.PathLike):
            image = read_raw(one)
        else:
            array = one.detach().cpu().numpy() if isinstance(one, torch.Tensor) else np.asarray(one)
            numbers = array.ndim == 2 and array.dtype.kind in "uif"
            require(numbers, "raw", f"{array.dtype} {array.shape}", "numbers (height, width)")
            image = RawImage(array)
        if image.pixels.dtype.kind == "f":
            require(bool(np.isfinite(image.pixels).all()), "raw", "NaN or infinity", "finite")
        config = self.config
        image.iso = iso if iso is not None else image.iso
        for name, value in (("black_level", black), ("white_level", white), ("pattern", pattern)):
            if value is not None or getattr(image, name) is None:
                setattr(image, name, value if value is not None else config[name])
        check_levels(image.white_level or 0.0, image.black_level or 0.0)
        check_pattern(image.pattern or "")
        if self.dark is not None:
            require(
                image.iso is not None, "iso", None, "given: the file does not say it, and dark shading depends on it"
            )
            assert image.iso is not None
            self.dark.check_iso(image.iso)
            shape = (self.dark.config.height, self.dark.config.width)
            accepted = f"of the dark frames' height and width, {shape}"
            require(image.pixels.shape == shape, "raw", image.pixels.shape, accepted)
        return image

    def _denoised(self, image: RawImage, ratio: float, tile: int | None, output_type: str) -> Any:
        pattern, black, white = image.pattern or "", image.black_level or 0.0, image.white_level or 0.0
        device = self._execution_device
        dn = torch.from_numpy(image.pixels.astype(np.float32)).to(device) - black
        bad = None
        if self.dark is not None:
            dn = dn - self.dark.dark_shading(float(image.iso or 0)).to(device)
            bad = pack_bayer(self.dark.bad_pixels, pattern).to(device)
        packed = pack_bayer(dn, pattern)
        if bad is not None:
            packed = _mended(packed, bad)
        x = (packed / (white - black)).clamp_max(1)[None] * ratio

        def network(part: torch.Tensor) -> torch.Tensor:
            return self.unet(part.to(self.unet.dtype), return_dict=False)[0].float()

        y = tiled(network, x, self._tiling(tile, x))[0][0]
        if output_type == "pt":
            return y
        mosaic = unpack_bayer(y, pattern)
        if output_type == "pil":
            return develop(mosaic, pattern, image.white_balance, image.color_matrix)
        return (mosaic * (white - black) + black).cpu().numpy()

    def _tiling(self, tile: int | None, x: torch.Tensor) -> Tiling:
        """Returns how an image is cut: not at all where it is no larger than a tile."""
        multiple, side = self.unet.tile_multiple, max(x.shape[2:])
        half = side if tile is None else -(-tile // 2)
        if half >= side:
            return Tiling(side + -side % multiple, 0, multiple)
        return Tiling(half + -half % multiple, self.unet.tile_margin, multiple)


def _mended(packed: torch.Tensor, bad: torch.Tensor) -> torch.Tensor:
    """Replaces bad pixels by the mean of the good ones of their colour around them, as far as there are any."""
    good = (~bad).to(packed.dtype)
    kernel = torch.ones(1, 1, 3, 3, dtype=packed.dtype, device=packed.device)
    sums = F.conv2d((packed * good)[:, None], kernel, padding=1)[:, 0]
    counts = F.conv2d(good[:, None], kernel, padding=1)[:, 0]
    return torch.where(bad & (counts > 0), sums / counts.clamp_min(1), packed)
