"""A camera's noise as a pipeline: it draws dark frames, and holds what the denoiser's training needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.utils import BaseOutput

from diffusers_ext.hub.loading import SafePipeline
from diffusers_ext.training.config import require

from .camera import CameraProfile
from .dark_model import DarkFrameModel
from .proxy import SensorNoiseProxy
from .synthesis import RawNoiseSynthesizer

__all__ = ["SensorNoisePipeline", "SensorNoisePipelineOutput"]


@dataclass
class SensorNoisePipelineOutput(BaseOutput):
    """What `SensorNoisePipeline` returns.

    Attributes:
        frames: `(num_frames, height, width)` dark frames in DN: uint16, or a tensor of float32 with whole numbers.
    """

    frames: np.ndarray | torch.Tensor


class SensorNoisePipeline(SafePipeline):
    """Draws dark frames of a camera: shading, rows, columns, offset, and the learned noise of pixels.

    Args:
        proxy: the noise of pixels.
        dark: the rest.
        camera: `CameraProfile.to_dict()`.

    Raises:
        ValueError: the camera's entries make no sense.

    Example:
        >>> from diffusers import DiffusionPipeline
        >>> from diffusers_ext import RawNoiseSynthesizer
        >>> noise = DiffusionPipeline.from_pretrained("runs/noise")  # doctest: +SKIP
        >>> frames = noise(iso=1600, num_frames=2).frames  # doctest: +SKIP
        >>> synthesizer = noise.synthesizer()  # doctest: +SKIP
    """

    __module__ = "diffusers_ext"

    proxy: Any
    dark: Any

    model_cpu_offload_seq = "dark->proxy"

    def __init__(self, proxy: SensorNoiseProxy, dark: DarkFrameModel, camera: dict[str, Any] | None = None) -> None:
        super().__init__()
        # Diffusers takes arguments without a default for components.
        if camera is None:
            raise ValueError("`camera` must be a camera's entries, as of `CameraProfile.to_dict()`, got None.")
        CameraProfile.from_dict(dict(camera))
        self.register_modules(proxy=proxy, dark=dark)
        self.register_to_config(camera=dict(camera))

    @property
    def profile(self) -> CameraProfile:
        """The camera."""
        return CameraProfile.from_dict(dict(self.config["camera"]))

    def synthesizer(self, **options: Any) -> RawNoiseSynthesizer:
        """Returns what makes noisy raw images from clean ones with this noise.

        Args:
            **options: further arguments of `RawNoiseSynthesizer`.
        """
        return RawNoiseSynthesizer(self.proxy, self.dark, **{"camera": self.profile, **options})

    @torch.no_grad()
    def __call__(
        self,
        iso: float,
        num_frames: int = 1,
        generator: torch.Generator | None = None,
        output_type: str = "np",
        return_dict: bool = True,
    ) -> SensorNoisePipelineOutput | tuple[np.ndarray | torch.Tensor]:
        """Draws dark frames.

        Args:
            iso: within the calibrated range.
            num_frames: how many.
            generator: draws them.
            output_type: `"np"` for an array of uint16, `"pt"` for a tensor.
            return_dict: return a `SensorNoisePipelineOutput` instead of a tuple.

        Returns:
            `SensorNoisePipelineOutput`, or its frames in a tuple.

        Raises:
            ValueError: the ISO is outside of the calibrated range, no frames are asked for, or an unknown type.
        """
        require(output_type in ("np", "pt"), "output_type", output_type, "one of ['np', 'pt']")
        require(isinstance(num_frames, int) and num_frames >= 1, "num_frames", num_frames, "an integer >= 1")
        shading = self.dark.dark_shading(iso).cpu()
        height, width = shading.shape
        device = torch.device("cpu") if generator is None else generator.device
        camera, frames = self.profile, []

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device).cpu()

        with self.progress_bar(total=num_frames) as bar:  # pyright: ignore[reportCallIssue]
            for _ in range(num_frames):
                frame = shading + self.proxy.sample((1, height, width), iso, generator)[0].cpu()
                for name, shape in (("row", (height, 1)), ("column", (1, width)), ("frame", (1, 1))):
                    frame = frame + self.dark.statistic(f"{name}_std", iso) * normal(*shape)
                dn = (frame + camera.black_level).round().clamp(0, camera.white_level)
                frames.append(dn if output_type == "pt" else dn.numpy().astype(np.uint16))
                bar.update()
        self.maybe_free_model_hooks()
        found = torch.stack(frames) if output_type == "pt" else np.stack(frames)
        return SensorNoisePipelineOutput(found) if return_dict else (found,)
