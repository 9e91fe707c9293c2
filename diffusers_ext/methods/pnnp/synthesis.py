"""Makes noisy raw images from clean ones: the light's own noise, and that of a camera."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Literal, NamedTuple

import torch

from diffusers_ext.training.config import require

from .camera import CAMERAS, CameraProfile
from .dark_model import DarkFrameModel
from .proxy import SensorNoiseProxy

__all__ = ["TERMS", "NoisyRaw", "RawNoiseSynthesizer"]

TERMS = ("shot", "pixel", "row", "column", "offset", "quantization")
RARE = 0.1  # share of images with strong bands, and with a strong offset
JITTER = 0.05  # of the pixels' deviation, from image to image


class NoisyRaw(NamedTuple):
    """What a synthesizer returns.

    Attributes:
        noisy: `(batch, 4, height, width)` at the brightness of the clean images.
        ratio: `(batch,)` by how much the exposure was too short.
        iso: `(batch,)`.
    """

    noisy: torch.Tensor
    ratio: torch.Tensor
    iso: torch.Tensor


class RawNoiseSynthesizer:
    """A camera's noise for clean raw images (PNNP): raw = K Poisson(y / K) + pixels + rows + columns + offset.

    What was measured in dark frames comes before the laws of the camera's profile.

    Args:
        proxy: the learned noise of pixels; `None` for a Gaussian of the same deviation.
        dark: what dark frames said of rows, columns, offset and the pixels' deviation; shading and bad pixels are not
            added, for a pipeline takes them off.
        camera: levels, gain, ranges of ISO and ratio, and laws of rows and columns where there is no `dark`.
        pixel: `"proxy"`, `"gaussian"`, or `"recorded"`, which draws from the residuals of `dark`.
        terms: which parts to add, some of `TERMS`.
        augment: vary the pixels' deviation by 5 %, and make bands and offset stronger in one of ten images, as the
            authors do. Off, every number is the measured one.
        iso: least and largest ISO, drawn evenly in the logarithm; by default those of the camera and of `dark`.
        ratio: least and largest ratio; by default the camera's.

    Raises:
        ValueError: an unknown term, or no source for what is asked.

    Example:
        >>> import torch
        >>> from diffusers_ext import RawNoiseSynthesizer, SensorNoiseProxy
        >>> synthesizer = RawNoiseSynthesizer(SensorNoiseProxy())
        >>> noisy, ratio, iso = synthesizer(torch.rand(2, 4, 32, 32), generator=torch.Generator().manual_seed(0))
        >>> noisy.shape, bool((ratio >= 100).all())
        (torch.Size([2, 4, 32, 32]), True)
    """

    def __init__(
        self,
        proxy: SensorNoiseProxy | None = None,
        dark: DarkFrameModel | None = None,
        camera: CameraProfile | None = None,
        pixel: Literal["proxy", "gaussian", "recorded"] | None = None,
        terms: Collection[str] = TERMS,
        augment: bool = True,
        iso: tuple[float, float] | None = None,
        ratio: tuple[float, float] | None = None,
    ) -> None:
        self.proxy, self.dark, self.camera = proxy, dark, camera or CAMERAS["sony_a7s2"]
        self.pixel, self.augment = pixel or ("gaussian" if proxy is None else "proxy"), augment
        require(self.pixel in ("proxy", "gaussian", "recorded"), "pixel", pixel, "'proxy', 'gaussian' or 'recorded'")
        require(self.pixel != "proxy" or proxy is not None, "proxy", None, "given for `pixel='proxy'`")
        require(self.pixel != "recorded" or dark is not None, "dark", None, "given for `pixel='recorded'`")
        self.terms = tuple(terms)
        require(set(self.terms) <= set(TERMS), "terms", self.terms, f"some of {list(TERMS)}")
        self.ratio = ratio or self.camera.ratio
        require(1 <= self.ratio[0] <= self.ratio[1], "ratio", self.ratio, "two numbers >= 1, not falling")
        self.ranges = self._ranges(iso)

    def _ranges(self, asked: tuple[float, float] | None) -> list[tuple[float, float]]:
        """Returns the ranges of ISO to draw from, one for each native gain."""
        low, high = asked or (0.0, math.inf)
        if self.dark is not None:
            isos = self.dark.config.isos
            low, high = max(low, isos[0]), min(high, isos[-1])
        branches = self.camera.native_gains
        cut = [(max(low, branch.iso_min), min(high, branch.iso_max)) for branch in branches]
        found = [ends for ends in cut if ends[0] <= ends[1]]
        known = [(branch.iso_min, branch.iso_max) for branch in branches]
        require(len(found) > 0, "iso", asked, f"within the camera's {known} and the calibrated range")
        return found

    def draw(self, count: int, generator: torch.Generator | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws ISO and ratio, `(count,)` each: a native gain evenly, its ISO by the logarithm, a ratio evenly."""
        device = generator.device if generator is not None else torch.device("cpu")
        branch = torch.randint(len(self.ranges), (count,), generator=generator, device=device).cpu()
        u = torch.rand((2, count), generator=generator, device=device).cpu()
        ends = torch.tensor(self.ranges)[branch]
        iso = ends[:, 0] * (ends[:, 1] / ends[:, 0]) ** u[0]
        return iso, self.ratio[0] + (self.ratio[1] - self.ratio[0]) * u[1]

    def __call__(
        self,
        clean: torch.Tensor,
        iso: float | Sequence[float] | torch.Tensor | None = None,
        ratio: float | Sequence[float] | torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> NoisyRaw:
        """Makes noisy images.

        Args:
            clean: `(batch, 4, height, width)` packed raw images, 0 black and 1 white; what is below 0 is taken for 0.
            iso: of all or of each; by default drawn.
            ratio: by how much the exposure is too short, of all or of each; by default drawn.
            generator: draws everything.

        Returns:
            `NoisyRaw`; the noisy images are brightened by the ratio, may be negative, and are cut at -black / white
            and 1 before that, as the camera does.

        Raises:
            ValueError: a wrong shape, ISO or ratio, or values that are not finite.
        """
        fits = clean.ndim == 4 and clean.shape[1] == 4 and clean.is_floating_point()
        require(fits, "clean", tuple(clean.shape), "floats (batch, 4, height, width)")
        require(bool(clean.isfinite().all()), "clean", "NaN or infinity", "finite")
        drawn = self.draw(len(clean), generator) if iso is None or ratio is None else (None, None)
        isos = self._each(iso, drawn[0], "iso", len(clean))
        ratios = self._each(ratio, drawn[1], "ratio", len(clean))
        require(bool((ratios >= 1).all()), "ratio", ratios.tolist(), "numbers >= 1")
        camera, device = self.camera, clean.device
        span = camera.white_level - camera.black_level
        shape = (-1, 1, 1, 1)
        light = clean.float().clamp_min(0) * (span / ratios.to(device).reshape(shape))
        noisy = self._noise(light, isos.tolist(), generator)
        noisy = noisy.div_(span).clamp_(-camera.black_level / camera.white_level, 1)
        return NoisyRaw(noisy.mul_(ratios.to(device).reshape(shape)).to(clean.dtype), ratios, isos)

    def corrupt(self, clean: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Returns noisy images alone, of drawn ISO and ratio, for trainings that want no more."""
        return self(clean, generator=generator).noisy

    def _each(self, given: object, drawn: torch.Tensor | None, name: str, count: int) -> torch.Tensor:
        if given is None:
            assert drawn is not None
            return drawn
        values = torch.as_tensor(given, dtype=torch.float32).cpu().reshape(-1)
        require(len(values) in (1, count), name, values.tolist(), f"a number or one for each of {count} images")
        require(bool((values > 0).all()), name, values.tolist(), "above 0")
        return values.expand(count)

    def _noise(self, light: torch.Tensor, isos: list[float], generator: torch.Generator | None) -> torch.Tensor:
        """Adds the parts, in DN."""
        device = light.device if generator is None else generator.device
        batch, _, height, width = light.shape

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device).to(light.device)

        def of_each(values: list[float]) -> torch.Tensor:
            return torch.tensor(values, device=light.device).reshape(-1, 1, 1, 1)

        if "shot" in self.terms:
            gain = of_each([self.camera.gain(iso) for iso in isos])
            noisy = torch.poisson((light / gain).to(device), generator=generator).to(light.device).mul_(gain)
        else:
            noisy = light.clone()
        if "pixel" in self.terms:
            noise = self._pixels((batch, 4, height, width), isos, normal, generator).to(light.device)
            if self.augment:
                noise = noise.mul_(1 + JITTER * normal(batch, 1, 1, 1))
            noisy.add_(noise)
        rare = torch.rand((2, batch), generator=generator, device=device).cpu() < (RARE if self.augment else 0)
        if "row" in self.terms:
            std = of_each([self._band("row", iso, bool(r)) for iso, r in zip(isos, rare[0], strict=True)])
            # A sensor row is a row of channels 0 and 1, the next one of 2 and 3.
            noisy.add_((normal(batch, 2, height, 1) * std).repeat_interleave(2, 1))
        if "column" in self.terms:
            std = of_each([self._band("column", iso, bool(r)) for iso, r in zip(isos, rare[0], strict=True)])
            noisy.add_((normal(batch, 2, 1, width) * std)[:, [0, 1, 1, 0]])
        if "offset" in self.terms:
            std = of_each([self._offset(iso, bool(r)) for iso, r in zip(isos, rare[1], strict=True)])
            noisy.add_(normal(batch, 1, 1, 1) * std)
        recorded = self.pixel == "recorded" and self.dark is not None and self.dark.config.rounded
        if "quantization" in self.terms and not ("pixel" in self.terms and recorded):
            noisy.add_(torch.rand(light.shape, generator=generator, device=device).to(light.device)).sub_(0.5)
        return noisy

    def _pixels(
        self,
        shape: tuple[int, ...],
        isos: list[float],
        normal: Callable[..., torch.Tensor],
        generator: torch.Generator | None,
    ) -> torch.Tensor:
        if self.pixel == "proxy":
            assert self.proxy is not None
            return self.proxy.sample(shape, torch.tensor(isos), generator)
        if self.pixel == "recorded":
            assert self.dark is not None
            return torch.stack([self.dark.sample_residuals(shape[1:], iso, generator) for iso in isos])
        std = [self.pixel_std(iso) for iso in isos]
        noise = normal(*shape)
        return noise * torch.tensor(std, device=noise.device).reshape(-1, 1, 1, 1)

    def pixel_std(self, iso: float) -> float:
        """Returns the deviation of the Gaussian in place of the learned noise, in DN."""
        if self.dark is not None:
            return self.dark.statistic("pixel_std", iso)
        return self.camera.gaussian_std(iso)

    def _band(self, kind: str, iso: float, rare: bool) -> float:
        """Returns the standard deviation of rows or columns; measured ones have the profile's factor only if rare."""
        usual, strong = self.camera.row_scale if kind == "row" else self.camera.column_scale
        if self.dark is not None:
            return self.dark.statistic(f"{kind}_std", iso) * (strong / usual if rare else 1)
        return self.camera.row_std(iso) * (strong if rare else usual)

    def _offset(self, iso: float, rare: bool) -> float:
        factor = self.camera.offset_scale if rare else 1.0
        if self.dark is not None:
            return self.dark.statistic("frame_std", iso) * factor
        return self.camera.native_gain(iso).offset_std * math.sqrt(iso) * factor
