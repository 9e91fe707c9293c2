"""Frames between real images, by any unconditional diffusion model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DModel, VQModel
from diffusers.image_processor import VaeImageProcessor

from .base import InterpolationPipeline, Network, NoiseDiffusionPipelineOutput
from .levels import noise_levels
from .mix import PerFrame

__all__ = ["NoiseDiffusionPipeline"]


class NoiseDiffusionPipeline(InterpolationPipeline):
    """Makes frames between two real images, or along a path of them, with an unconditional model as it is.

    The images are inverted by DDIM to a state between image and noise, the states are mixed by NoiseDiffusion's
    correction (or by one of the methods it is compared with), and the mixtures are denoised. All images are inverted
    in one batch, all frames denoised in another: 2 K calls of the network for K steps, for any number of frames.

    Args:
        unet: an unconditional `UNet2DModel`. Where it predicts a variance too, that is not used.
        scheduler: a `DDIMScheduler`; epsilon-, v- and sample-prediction.
        vqvae: `VQModel` (or `AutoencoderKL`) of a latent model, as in `LDMPipeline`.
        vae: the same by its other name, as in `ImageGenerationPipeline`.
        image_scale: what pixels (or scaled latents) were multiplied by in training.

    Reference:
        Zheng et al., "NoiseDiffusion: Correcting Noise for Image Interpolation with Diffusion Models beyond
        Spherical Linear Interpolation", arXiv 2403.08840.

    Example:
        >>> import torch
        >>> from diffusers import DDIMScheduler, UNet2DModel
        >>> from diffusers_ext import NoiseDiffusionPipeline
        >>> unet = UNet2DModel(
        ...     sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=2,
        ...     down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        ... )
        >>> pipeline = NoiseDiffusionPipeline(unet, DDIMScheduler())
        >>> pipeline.set_progress_bar_config(disable=True)
        >>> images = torch.rand(2, 1, 8, 8)
        >>> len(pipeline(images[0], images[1], num_frames=3, num_inference_steps=4).images)
        3
    """

    __module__ = "diffusers_ext"

    model_cpu_offload_seq = "unet->vqvae->vae"
    _optional_components = ["vqvae", "vae"]

    vqvae: Any
    vae: Any

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: DDIMScheduler,
        vqvae: VQModel | AutoencoderKL | None = None,
        vae: AutoencoderKL | VQModel | None = None,
        image_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if vqvae is not None and vae is not None:
            raise ValueError("`vae` must be left out where `vqvae` is given: a model has one autoencoder.")
        if not image_scale > 0:
            raise ValueError(f"`image_scale` must be a number > 0, got {image_scale!r}.")
        self.register_modules(unet=unet, scheduler=scheduler, vqvae=vqvae, vae=vae)
        self.register_to_config(image_scale=image_scale)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @property
    def _autoencoder(self) -> Any:
        return self.vae if self.vqvae is None else self.vqvae

    def _image_format(self) -> tuple[int, int]:
        """Returns the channels of an image, and what its height and width must be divisible by."""
        network: Any = self.unet.config
        divisor = 2 ** (len(network.get("block_out_channels", (0,))) - 1)
        if self._autoencoder is None:
            return network.in_channels, divisor
        config = self._autoencoder.config
        return config.in_channels, divisor * 2 ** (len(config.block_out_channels) - 1)

    @torch.no_grad()
    def __call__(
        self,
        image_0: Any,
        image_1: Any = None,
        num_frames: int = 5,
        weights: PerFrame | None = None,
        method: Literal["noise_diffusion", "slerp", "lerp", "noise"] = "noise_diffusion",
        num_inference_steps: int = 200,
        strength: float = 0.7,
        gamma: PerFrame = 0.0,
        injection: PerFrame = 1.2,
        mu: PerFrame | None = None,
        nu: PerFrame | None = None,
        boundary: PerFrame | None = 2.0,
        legacy_timestep: bool = False,
        fixed_point_iterations: int = 0,
        frame_batch_size: int | None = None,
        diagnostics: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 - as in Diffusers, never changed
    ) -> NoiseDiffusionPipelineOutput | tuple:
        """Makes the frames.

        Args:
            image_0: the first image, or the first images of several pairs: PIL images of any mode with a known range;
                arrays `(height, width)`, `(height, width, channels)` or with a batch in front; tensors `(channels,
                height, width)` or with a batch in front; or a list of these. Values are uint8, uint16, or floats in
                `[0, 1]`.
            image_1: the second image, or as many as `image_0`. Left out, `image_0` is a path of two images or more.
            num_frames: N, frames of each pair, evenly spaced between the images and without them.
            weights: the frames' places instead, numbers in `[0, 1]`, 0 at the first image.
            method: `"noise_diffusion"`; `"slerp"` or `"lerp"` of the inverted states; `"noise"`, which adds the same
                noise to both images, inverts nothing and takes half the calls.
            num_inference_steps: S, steps from pure noise to an image.
            strength: share of them that is used, K = round(strength * S): more changes more.
            gamma: share of fresh noise in `[0, 1]`, one number or one per frame.
            injection: how much of the images is put back in, the sum of their two weights; likewise.
            mu: weight of the first image instead, together with `nu`; likewise.
            nu: weight of the second image.
            boundary: states are clipped to `[-boundary, boundary]`; likewise. `None` does not clip.
            legacy_timestep: put images back in at the level one step higher, as the authors' code does.
            fixed_point_iterations: further calls of the network per inversion step, which bring the inversion nearer
                to the inverse of the sampler.
            frame_batch_size: frames denoised at a time, by default all; memory grows with it, and with all frames
                only by what is returned.
            diagnostics: look at the states, see `NoiseDiffusionPipelineOutput`.
            generator: draws the noise of `gamma` and of `"noise"`, which all frames of a pair share and all of a path
                too; one, or one per pair.
            output_type: `"pil"`; `"np"` `(frames, height, width, channels)` or `"pt"` `(frames, channels, height,
                width)` in `[0, 1]`; `"latent"`: the frames before decoding and clipping, fp32.
            return_dict: return `NoiseDiffusionPipelineOutput` instead of a tuple of its entries.
            callback_on_step_end: called as `(pipeline, step, timestep, {"latents": ...})` after every step, those of
                the inversion first; the latents that it returns are used. With `frame_batch_size` every part counts
                its steps from the end of the inversion. `pipeline._interrupt = True` stops: what is not denoised by
                then is returned as it is.
            callback_on_step_end_tensor_inputs: names passed to it.

        Returns:
            `NoiseDiffusionPipelineOutput` with the frames of the first pair first.

        Raises:
            ValueError: an argument is wrong or contradicts another; raised before the network is called.
        """
        numbers = {"gamma": gamma, "injection": injection, "mu": mu, "nu": nu, "boundary": boundary}
        if getattr(self.unet, "class_embedding", None) is not None:
            raise ValueError("`unet` must be unconditional, got one with classes.")
        mixing = self._check_mixing(
            num_frames, weights, method, noise_levels(self.scheduler, num_inference_steps, strength), numbers,
            legacy_timestep, fixed_point_iterations, frame_batch_size,
        )  # fmt: skip
        pixels, first, second = self._read_pairs(image_0, image_1, *self._image_format())
        draws = 1 if image_1 is None else len(first)
        names = self._check_call(
            generator, draws, output_type, callback_on_step_end, callback_on_step_end_tensor_inputs
        )

        scale, network = self.config["image_scale"], Network(self._predict)
        clean = self._encode(pixels) * scale
        found = {} if diagnostics else None
        parts = self._make_frames(
            clean,
            (first, second),
            mixing,
            network,
            lambda part: network,
            generator,
            callback_on_step_end,
            names,
            found,
        )
        if output_type != "latent":
            parts = (part / scale for part in parts)
        images, _ = self._images(parts, len(mixing.weights) * len(first), output_type, frame_batch_size)
        self.maybe_free_model_hooks()
        return self._output(images, first, second, mixing, found or {}, return_dict)

    def _predict(self, states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        output = self.unet(states.to(self.unet.dtype), timestep, return_dict=False)[0]
        return output[:, : states.shape[1]]  # a learned variance stands behind
