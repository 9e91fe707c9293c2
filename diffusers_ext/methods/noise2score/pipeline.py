"""Denoising in one network call: images in, noise family and parameter or a range to find it in, images out."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import UNet2DModel
from diffusers.utils import BaseOutput

from diffusers_ext.generation.tiles import Tiling, tiled
from diffusers_ext.hub.loading import SafePipeline

from .blind import BLIND_FAMILIES, NoiseEstimate, check_range, estimate_noise_parameter, noise_maker
from .images import as_output, read_noisy_images
from .networks import Noise2ScoreConvNet, Noise2ScoreUNet
from .noises import FAMILIES, ExponentialFamilyNoise, ExponentialNoise, NoiseModel, PoissonGaussianNoise
from .tweedie import posterior_mean

__all__ = ["Noise2ScorePipeline", "Noise2ScorePipelineOutput"]


@dataclass
class Noise2ScorePipelineOutput(BaseOutput):
    """What `Noise2ScorePipeline` returns.

    Attributes:
        images: the denoised images, of the asked type. Only PIL images are cut to [0, 1].
        noise_parameter: of each image, as given or as found.
        penalty_curve: the search of each image, or `None` where the parameter was given.
        tile_difference: mean difference of overlapping tiles in standard deviations of the score; 0 where tiles are
            exact or there was one.
    """

    images: Any
    noise_parameter: list[Any]
    penalty_curve: list[NoiseEstimate] | None
    tile_difference: float


class Noise2ScorePipeline(SafePipeline):
    """Denoises images with the score of noisy images, by Tweedie's formula of the noise (Noise2Score).

    Args:
        unet: the score network: `Noise2ScoreUNet`, `Noise2ScoreConvNet`, or a `UNet2DModel`, which is asked at
            timestep 0. Images lie in [0, 1], which noise may leave; the network sees them in the units of
            `NoiseModel.score_input`.
        noise: the family that it was trained on, `"gaussian"`, `"poisson"`, `"poisson_gaussian"`, `"gamma"` or
            `"exponential"`; a call must ask for the same. `None` leaves it open.
        domain: where it learned Gamma or exponential noise, `"log"` or `"linear"`.
        smoothing: of a `UNet2DModel`, the noise that its training added on top; our networks bring their own.
        input_scale: of a `UNet2DModel`, what its input is multiplied by.
        score_scale: of a `UNet2DModel`, what its output is multiplied by to be the score.

    Example:
        >>> import torch
        >>> from diffusers_ext import Noise2ScoreConvNet, Noise2ScorePipeline
        >>> pipeline = Noise2ScorePipeline(Noise2ScoreConvNet(score_scale=10.0), noise="gaussian")
        >>> pipeline.set_progress_bar_config(disable=True)
        >>> output = pipeline(torch.rand(1, 1, 20, 30), noise_parameter=25 / 255, output_type="pt")
        >>> output.images.shape, output.noise_parameter
        (torch.Size([1, 1, 20, 30]), [0.09803921568627451])
    """

    __module__ = "diffusers_ext"

    unet: Any

    model_cpu_offload_seq = "unet"

    def __init__(
        self,
        unet: Noise2ScoreUNet | Noise2ScoreConvNet | UNet2DModel,
        noise: str | None = None,
        domain: str = "log",
        smoothing: float = 0.0,
        input_scale: float = 1.0,
        score_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if noise is not None and noise not in FAMILIES:
            raise ValueError(f"`noise` must be one of {list(FAMILIES)} or left out, got {noise!r}.")
        if domain not in ("log", "linear"):
            raise ValueError(f"`domain` must be 'log' or 'linear', got {domain!r}.")
        for name, value in (("input_scale", input_scale), ("score_scale", score_scale)):
            if not value > 0:
                raise ValueError(f"`{name}` must be a number > 0, got {value!r}.")
        if not smoothing >= 0:
            raise ValueError(f"`smoothing` must be a number >= 0, got {smoothing!r}.")
        self.register_modules(unet=unet)
        self.register_to_config(
            noise=noise, domain=domain, smoothing=smoothing, input_scale=input_scale, score_scale=score_scale
        )

    @property
    def smoothing(self) -> float:
        """The noise that training added on top, in the units of the network's input before `input_scale`."""
        return float(self.unet.config.get("smoothing", self.config["smoothing"]))

    def check_inputs(
        self,
        noise: str | NoiseModel | None,
        noise_parameter: Any,
        estimator: str,
        blind_range: Any,
        penalty: Any,
        tile: int | None,
        output_type: str,
    ) -> tuple[str, NoiseModel | None]:
        """Checks the arguments of a call.

        Returns:
            The noise's family, and the noise where its parameter is known.

        Raises:
            ValueError: one is wrong; the message names it.
        """
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"`output_type` must be one of ['pil', 'np', 'pt'], got {output_type!r}.")
        if tile is not None and not (isinstance(tile, int) and tile >= 1):
            raise ValueError(f"`tile` must be an integer >= 1 or left out, got {tile!r}.")
        if penalty != "tv" and not callable(penalty):
            raise ValueError(f"`penalty` must be 'tv' or a function of (x, y), got {penalty!r}.")
        if estimator not in ("midpoint", "mode"):
            raise ValueError(f"`estimator` must be 'midpoint' or 'mode', got {estimator!r}.")
        trained: Any = self.config["noise"]
        if isinstance(noise, NoiseModel):
            if noise_parameter is not None or blind_range is not None:
                raise ValueError("`noise_parameter` and `blind_range` must be left out with a noise that has its own.")
            if isinstance(noise, ExponentialFamilyNoise):
                return "exponential_family", noise
            family = next(name for name, kind in FAMILIES.items() if isinstance(noise, kind))
        else:
            family = noise or trained or "gaussian"
            if family not in FAMILIES:
                raise ValueError(f"`noise` must be one of {list(FAMILIES)} or a noise model, got {noise!r}.")
        if trained is not None and family != trained:
            raise ValueError(f"`noise` must be {trained!r}, on which the network was trained, got {family!r}.")
        if isinstance(noise, NoiseModel):
            if getattr(noise, "domain", self.config["domain"]) != self.config["domain"]:
                raise ValueError(f"`noise` must have the network's domain, {self.config['domain']!r}, got {noise!r}.")
            return family, noise
        if family == "exponential":
            if noise_parameter is not None or blind_range is not None:
                raise ValueError("`noise_parameter` must be left out for exponential noise, which has none.")
            return family, ExponentialNoise(self.config["domain"])
        if (noise_parameter is None) == (blind_range is None):
            raise ValueError(
                "exactly one of `noise_parameter` and `blind_range` must be given, got "
                f"{noise_parameter!r} and {blind_range!r}."
            )
        if noise_parameter is None:
            self._noise(family, check_range(blind_range)[0], estimator)
            return family, None
        return family, self._noise(family, noise_parameter, estimator)

    def _noise(self, family: str, parameter: Any, estimator: str) -> NoiseModel:
        if family == "poisson_gaussian":
            if not (isinstance(parameter, tuple | list) and len(parameter) == 2):
                raise ValueError(f"`noise_parameter` must be (scale, read_std) for {family} noise, got {parameter!r}.")
            return PoissonGaussianNoise(*parameter)
        try:
            return noise_maker(family, estimator=estimator, domain=self.config["domain"])(parameter)
        except ValueError as error:
            raise ValueError(f"`noise_parameter` must be one of {family} noise: {error}") from error

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        noise: str | NoiseModel | None = None,
        noise_parameter: float | tuple[float, float] | None = None,
        estimator: Literal["midpoint", "mode"] = "midpoint",
        blind_range: tuple[float, float] | None = None,
        penalty: Literal["tv"] | Callable[[torch.Tensor, torch.Tensor], Any] = "tv",
        tile: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Noise2ScorePipelineOutput | tuple[Any, ...]:
        """Denoises images.

        Args:
            image: a PIL image (8 or 16 bits, or floats, as a TIFF has them), an array `(height, width[, channels])`,
                a tensor `(channels, height, width)` or `(batch, channels, height, width)`, or a list of these, of any
                and also different sizes. uint8 and uint16 are divided by 255 and 65535; floats are taken as they are,
                and may lie outside of [0, 1].
            noise: the noise's family or a noise with its parameter; by default what the network was trained on, or
                `"gaussian"`.
            noise_parameter: of the family, in units in which images lie in [0, 1]: sigma for Gaussian noise
                (25 / 255), z, the value of one count, for Poisson noise, (z, standard deviation of the read noise) for
                both together, the shape k for Gamma noise.
            estimator: of Poisson noise; see `PoissonNoise`.
            blind_range: find the parameter of each image between these two instead; for Gaussian, Poisson and Gamma
                noise. Gaussian and Gamma noise still take one call of the network, Poisson noise about 110.
            penalty: what the search makes least; see `estimate_noise_parameter`.
            tile: cut larger images into tiles of this side, rounded up to what the network takes. Networks of this
                package then give the same as for the whole image, at the cost of a margin around each tile
                (`tile_margin`); others give a blend of tiles, with a warning.
            generator: as in other pipelines; nothing is drawn here.
            output_type: `"pil"`, `"np"` `(batch, height, width, channels)`, `"pt"` `(batch, channels, height, width)`;
                arrays and tensors are not cut to [0, 1], and are a list where sizes differ.
            return_dict: return a `Noise2ScorePipelineOutput` instead of a tuple.

        Returns:
            `Noise2ScorePipelineOutput`, or its values as a tuple in the same order.

        Raises:
            ValueError: an argument is wrong, or an image is outside of its noise's range; the message names it.
        """
        family, known = self.check_inputs(noise, noise_parameter, estimator, blind_range, penalty, tile, output_type)
        images = read_noisy_images(image, self.unet.config["in_channels"])
        ends: Any = blind_range
        options = {"estimator": estimator, "domain": self.config["domain"]}
        first = known or self._noise(family, ends[0], estimator)
        for item in images:
            first.check(item, "image")
        poisson_search = known is None and family == "poisson"
        groups = [torch.stack(list(group)) for _, group in itertools.groupby(images, key=lambda x: x.shape)]
        calls = BLIND_FAMILIES["poisson"] + 1 if poisson_search else 2 if family == "poisson_gaussian" else 1
        total = sum(
            calls * (len(y) if poisson_search else 1) * self._tiling(tile, y).count(*y.shape[2:]) for y in groups
        )
        results: list[torch.Tensor] = []
        estimates: list[NoiseEstimate] = []
        self._difference = 0.0
        with self.progress_bar(total=total) as bar:  # pyright: ignore[reportCallIssue]

            def report() -> None:
                if bar.n < bar.total:  # how many calls refine a search is not known before
                    bar.update()

            def score(v: torch.Tensor) -> torch.Tensor:
                return self._score(v, tile, report)

            for y in groups:
                y = y.to(self._execution_device)
                if known is not None:
                    results += posterior_mean(y, score, known, self.smoothing)
                    continue
                answers = None if poisson_search else score(first.score_input(y))  # one call for all candidates
                for i, row in enumerate(y.split(1)):
                    ask = score if answers is None else lambda _, i=i, all=answers: all[i : i + 1]
                    estimate = estimate_noise_parameter(row, ask, family, ends, self.smoothing, penalty, **options)
                    found = self._noise(family, estimate.parameter, estimator)
                    results.append(posterior_mean(row, ask, found, self.smoothing)[0])
                    estimates.append(estimate)
        if self._difference:
            warnings.warn(
                f"{type(self.unet).__name__} looks at the whole image, so that tiles are an approximation: where they "
                f"overlap they differ by {self._difference:.3g} standard deviations of the score.",
                stacklevel=3,
            )
        self.maybe_free_model_hooks()
        parameters = [noise_parameter] * len(images) if known is not None else [e.parameter for e in estimates]
        output = Noise2ScorePipelineOutput(
            as_output(results, output_type), parameters, estimates or None, self._difference
        )
        fields = Noise2ScorePipelineOutput.__dataclass_fields__
        return output if return_dict else tuple(getattr(output, name) for name in fields)

    def _tiling(self, tile: int | None, like: torch.Tensor) -> Tiling:
        """Returns how images are cut: not at all where they are no larger than a tile."""
        multiple = getattr(self.unet, "tile_multiple", 2 ** (len(self.unet.config.get("block_out_channels", [0])) - 1))
        side = max(like.shape[2:])
        if tile is None or side <= tile:
            return Tiling(side + -side % multiple, 0, multiple)
        return Tiling(tile + -tile % multiple, getattr(self.unet, "tile_margin", None), multiple)

    def _score(self, v: torch.Tensor, tile: int | None, report: Callable[[], None]) -> torch.Tensor:
        """Asks the network, in its precision; returns the score in that of the images."""

        def network(x: torch.Tensor) -> torch.Tensor:
            x = x.to(self.unet.dtype)
            if not isinstance(self.unet, UNet2DModel):
                return self.unet(x).sample.to(v.dtype)
            return self.unet(x * self.config["input_scale"], 0).sample.to(v.dtype) * self.config["score_scale"]

        score, difference = tiled(network, v, self._tiling(tile, v), report)
        self._difference = max(self._difference, difference)
        return score
