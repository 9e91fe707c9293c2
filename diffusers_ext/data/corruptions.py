"""The fifteen corruptions of ImageNet-C at five severities, with NumPy, SciPy and Pillow alone.

Definitions and parameters are those of the package imagecorruptions, for images of 224 pixels. What it states in
pixels (radii, widths, shifts) is scaled with the shorter side of smaller images; intensities and ratios are not. One
corruption differs: the photographs of frost that ImageNet-C overlays are not shipped, a fractal pattern takes their
place. Every image has a seed, and a seed always gives the same corruption.

Reference:
    Hendrycks and Dietterich 2019 (arXiv 1903.12261).
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from .reading import read_images

__all__ = ["CORRUPTIONS", "EXTRA_CORRUPTIONS", "corrupt"]

Array = np.ndarray
Draw = np.random.Generator


def _gaussian(x: Array, sigma: float, mode: str = "nearest", truncate: float = 4.0) -> Array:
    """Blurs height and width."""
    sigmas = (sigma, sigma) + (0.0,) * (x.ndim - 2)
    return ndimage.gaussian_filter(x, sigmas, mode=mode, truncate=truncate)


def _noise(x: Array, draw: Draw, scale: float, c: float) -> Array:
    return x + draw.normal(size=x.shape, scale=c)


def _shot(x: Array, draw: Draw, scale: float, c: float) -> Array:
    return draw.poisson(x * c) / c


def _impulse(x: Array, draw: Draw, scale: float, c: float) -> Array:
    hit, salt = draw.random(x.shape) < c, draw.random(x.shape) < 0.5
    return np.where(hit, salt.astype(x.dtype), x)


def _speckle(x: Array, draw: Draw, scale: float, c: float) -> Array:
    return x + x * draw.normal(size=x.shape, scale=c)


def _gaussian_blur(x: Array, draw: Draw, scale: float, c: float) -> Array:
    return _gaussian(x, c * scale)


def _filtered(x: Array, kernel: Array) -> Array:
    return ndimage.correlate(x, kernel.reshape(kernel.shape + (1,) * (x.ndim - 2)), mode="mirror")


def _defocus(x: Array, draw: Draw, scale: float, c: tuple[float, float]) -> Array:
    radius, alias = c[0] * scale, c[1]
    reach = max(8, math.ceil(radius))
    grid = np.arange(-reach, reach + 1)
    disk = (grid[:, None] ** 2 + grid[None] ** 2 <= radius**2).astype(float)
    # OpenCV's Gaussian of 3 or 5 taps softens the disk's edge.
    taps = np.arange(-1, 2) if radius <= 8 else np.arange(-2, 3)
    line = np.exp(-(taps**2) / (2 * alias**2))
    line /= line.sum()
    return _filtered(x, ndimage.correlate(disk / disk.sum(), np.outer(line, line), mode="mirror"))


def _glass(x: Array, draw: Draw, scale: float, c: tuple[float, int, int]) -> Array:
    sigma, reach, rounds = c[0] * scale, max(1, round(c[1] * scale)), c[2]
    x = np.floor(_gaussian(x, sigma) * 255) / 255
    height, width = x.shape[:2]
    for _ in range(rounds):
        shifts = draw.integers(-reach, reach, (height, width, 2))
        for i in range(height - reach - 1, reach, -1):
            for j in range(width - reach - 1, reach, -1):
                dx, dy = shifts[i, j]
                kept = x[i, j].copy()
                x[i, j], x[i + dy, j + dx] = x[i + dy, j + dx], kept
    return _gaussian(x, sigma)


def _moved(x: Array, dx: int, dy: int) -> Array:
    """Shifts an image and repeats its border."""
    height, width = x.shape[:2]
    rows, columns = (np.arange(n) - d for n, d in ((height, dy), (width, dx)))
    return x[np.clip(rows, 0, height - 1)][:, np.clip(columns, 0, width - 1)]


def _blurred_along(x: Array, radius: float, sigma: float, angle: float) -> Array:
    """Blurs in one direction with half a Gaussian, `angle` in degrees."""
    width = 2 * max(1, round(radius)) + 1
    kernel = np.exp(-(np.arange(width) ** 2) / (2 * max(sigma, 1e-3) ** 2))
    kernel /= kernel.sum()
    sine, cosine = math.sin(math.radians(angle)), math.cos(math.radians(angle))
    total = np.zeros_like(x, dtype=float)
    for i, weight in enumerate(kernel):
        dy, dx = -math.ceil(i * sine - 0.5), -math.ceil(i * cosine - 0.5)
        if abs(dy) >= x.shape[0] or abs(dx) >= x.shape[1]:
            break
        total += weight * _moved(x, dx, dy)
    return total


def _motion(x: Array, draw: Draw, scale: float, c: tuple[float, float]) -> Array:
    return _blurred_along(x, c[0] * scale, c[1] * scale, draw.uniform(-45, 45))


def _zoomed(x: Array, factor: float) -> Array:
    """Enlarges the centre to the whole image."""
    height, width = x.shape[:2]
    ch, cw = math.ceil(height / factor), math.ceil(width / factor)
    top, left = (height - ch) // 2, (width - cw) // 2
    part = x[top : top + ch, left : left + cw]
    large = np.asarray(ndimage.zoom(part, (factor, factor) + (1,) * (x.ndim - 2), order=1))
    top, left = (large.shape[0] - height) // 2, (large.shape[1] - width) // 2
    cut = large[max(top, 0) : max(top, 0) + height, max(left, 0) : max(left, 0) + width]
    missing = [(0, height - cut.shape[0]), (0, width - cut.shape[1])] + [(0, 0)] * (x.ndim - 2)
    return np.pad(cut, missing, mode="edge")  # rounding of the zoom may leave a line short


def _zoom_blur(x: Array, draw: Draw, scale: float, c: tuple[float, float]) -> Array:
    factors = np.arange(1, c[0], c[1])
    return (x + sum(_zoomed(x, f) for f in factors)) / (len(factors) + 1)


def _grey(x: Array) -> Array:
    """Returns the luma `(height, width)`."""
    return x if x.ndim == 2 else x @ np.array([0.299, 0.587, 0.114])


def _like(layer: Array, x: Array) -> Array:
    return layer if x.ndim == 2 else layer[..., None]


def _snow(x: Array, draw: Draw, scale: float, c: tuple[float, ...]) -> Array:
    mean, deviation, zoom, threshold, radius, sigma, kept = c
    layer = _zoomed(draw.normal(mean, deviation, x.shape[:2]), zoom)
    layer = np.clip(np.where(layer < threshold, 0, layer), 0, 1)
    layer = np.clip(_blurred_along(layer, radius * scale, sigma * scale, draw.uniform(-135, -45)), 0, 1)
    x = kept * x + (1 - kept) * np.maximum(x, _like(_grey(x) * 1.5 + 0.5, x))
    return x + _like(layer + np.rot90(layer, 2)[: x.shape[0], : x.shape[1]], x)


def _plasma(draw: Draw, size: int, decay: float) -> Array:
    """Returns a `(size, size)` fractal in [0, 1] by diamonds and squares; `size` is a power of two."""
    values, step, wibble = np.zeros((size, size)), size, 100.0

    def wobbled(total: Array) -> Array:
        return total / 4 + wibble * draw.uniform(-1, 1, total.shape)

    while step >= 2:
        half = step // 2
        corners = values[0:size:step, 0:size:step]
        total = corners + np.roll(corners, -1, 0)
        values[half:size:step, half:size:step] = wobbled(total + np.roll(total, -1, 1))
        centres = values[half:size:step, half:size:step]
        lower, right = centres + np.roll(centres, 1, 0), corners + np.roll(corners, -1, 1)
        values[0:size:step, half:size:step] = wobbled(lower + right)
        side, below = centres + np.roll(centres, 1, 1), corners + np.roll(corners, -1, 0)
        values[half:size:step, 0:size:step] = wobbled(side + below)
        step, wibble = half, wibble / decay
    values -= values.min()
    return values / values.max()


def _clouds(x: Array, draw: Draw, decay: float) -> Array:
    size = 2 ** max(1, math.ceil(math.log2(max(x.shape[:2]))))
    return _plasma(draw, size, decay)[: x.shape[0], : x.shape[1]]


def _frost(x: Array, draw: Draw, scale: float, c: tuple[float, float]) -> Array:
    # Bright ridges along the middle heights of a fractal, in the place of photographed crystals.
    ridges = (1 - np.abs(2 * _clouds(x, draw, 1.8) - 1)) ** 3
    return c[0] * x + c[1] * _like(ridges, x)


def _fog(x: Array, draw: Draw, scale: float, c: tuple[float, float]) -> Array:
    highest = x.max()
    return (x + c[0] * _like(_clouds(x, draw, c[1]), x)) * highest / (highest + c[0])


def _brightness(x: Array, draw: Draw, scale: float, c: float) -> Array:
    if x.ndim == 2:
        return x + c
    value = x.max(-1, keepdims=True)  # V of HSV; hue and saturation stay
    brighter = np.clip(value + c, 0, 1)
    return np.where(value > 0, x * brighter / np.maximum(value, 1e-12), brighter)


def _contrast(x: Array, draw: Draw, scale: float, c: float) -> Array:
    mean = x.mean((0, 1), keepdims=True)
    return (x - mean) * c + mean


def _elastic(x: Array, draw: Draw, scale: float, c: tuple[float, float, float]) -> Array:
    strength, sigma, shift = (244 * value * scale for value in c)
    height, width = x.shape[:2]
    side = min(height, width) // 3
    centre = np.array([height // 2, width // 2])
    # An affine map takes three points (x, y) to others near them; the image is looked up through its inverse.
    source = np.array([centre + side, [centre[0] + side, centre[1] - side], centre - side], float)
    target = source + draw.uniform(-shift, shift, source.shape)
    inverse = np.linalg.solve(np.c_[target, np.ones(3)], source)
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    found = np.stack([columns, rows, np.ones_like(rows)], -1) @ inverse
    x = _looked_up(x, found[..., 1], found[..., 0], "mirror")
    dx, dy = (
        _gaussian(draw.uniform(-1, 1, (height, width)), sigma, "reflect", 3) * strength if sigma > 0 else 0.0
        for _ in range(2)
    )
    return _looked_up(x, rows + dy, columns + dx, "reflect")


def _looked_up(x: Array, rows: Array, columns: Array, mode: str) -> Array:
    layers = x[..., None] if x.ndim == 2 else x
    found = [
        ndimage.map_coordinates(layers[..., k], [rows, columns], order=1, mode=mode) for k in range(layers.shape[-1])
    ]
    return np.stack(found, -1).reshape(x.shape)


def _bytes(x: Array) -> Image.Image:
    return Image.fromarray((np.clip(x, 0, 1) * 255).round().astype(np.uint8))


def _pixelate(x: Array, draw: Draw, scale: float, c: float) -> Array:
    height, width = x.shape[:2]
    small = (max(1, int(width * c)), max(1, int(height * c)))
    image = _bytes(x).resize(small, Image.Resampling.BOX).resize((width, height), Image.Resampling.BOX)
    return np.asarray(image) / 255


def _jpeg(x: Array, draw: Draw, scale: float, c: int) -> Array:
    buffer = io.BytesIO()
    _bytes(x).save(buffer, "JPEG", quality=c)
    return np.asarray(Image.open(buffer)) / 255


_TABLE: dict[str, tuple[Callable[..., Array], list]] = {
    "gaussian_noise": (_noise, [0.08, 0.12, 0.18, 0.26, 0.38]),
    "shot_noise": (_shot, [60, 25, 12, 5, 3]),
    "impulse_noise": (_impulse, [0.03, 0.06, 0.09, 0.17, 0.27]),
    "defocus_blur": (_defocus, [(3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)]),
    "glass_blur": (_glass, [(0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)]),
    "motion_blur": (_motion, [(10, 3), (15, 5), (15, 8), (15, 12), (20, 15)]),
    "zoom_blur": (_zoom_blur, [(1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)]),
    "snow": (
        _snow,
        [
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ],
    ),
    "frost": (_frost, [(1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)]),
    "fog": (_fog, [(1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)]),
    "brightness": (_brightness, [0.1, 0.2, 0.3, 0.4, 0.5]),
    "contrast": (_contrast, [0.4, 0.3, 0.2, 0.1, 0.05]),
    "elastic_transform": (
        _elastic,
        [(2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)],
    ),
    "pixelate": (_pixelate, [0.6, 0.5, 0.4, 0.3, 0.25]),
    "jpeg_compression": (_jpeg, [25, 18, 15, 10, 7]),
    "speckle_noise": (_speckle, [0.15, 0.2, 0.35, 0.45, 0.6]),
    "gaussian_blur": (_gaussian_blur, [1, 2, 3, 4, 6]),
}
CORRUPTIONS: tuple[str, ...] = tuple(_TABLE)[:15]
"""The fifteen that are reported."""
EXTRA_CORRUPTIONS: tuple[str, ...] = tuple(_TABLE)[15:]
"""Further ones, to choose settings with."""


def corrupt(image: Any, name: str, severity: int, seed: int = 0) -> np.ndarray:
    """Corrupts one image as in ImageNet-C.

    Args:
        image: what the pipelines take as one image: a PIL image, an array `(height, width)` or `(height, width, 3)`,
            or a tensor `(1 or 3, height, width)`; uint8, uint16 or floats in `[0, 1]`.
        name: one of `CORRUPTIONS` or `EXTRA_CORRUPTIONS`.
        severity: 1 to 5.
        seed: of this image's random numbers; give every image its own.

    Returns:
        The image as a uint8 array, `(height, width)` for grey or `(height, width, 3)`.

    Raises:
        ValueError: an argument is wrong.

    Example:
        >>> import numpy as np
        >>> from diffusers_ext import corrupt
        >>> corrupt(np.full((2, 2), 100, np.uint8), "brightness", severity=5)
        array([[227, 227],
               [227, 227]], dtype=uint8)
    """
    if name not in _TABLE:
        raise ValueError(f"`name` must be one of {list(_TABLE)}, got {name!r}.")
    if severity not in (1, 2, 3, 4, 5):
        raise ValueError(f"`severity` must be an integer from 1 to 5, got {severity!r}.")
    found = read_images(image, "image", dtype=torch.float64)
    if len(found) != 1:
        raise ValueError(f"`image` must be one image, got {len(found)}.")
    x = found[0].movedim(0, -1).cpu().numpy()
    x = x[..., 0] if x.shape[-1] == 1 else x
    function, parameters = _TABLE[name]
    scale = min(1.0, min(x.shape[:2]) / 224)
    draw = np.random.default_rng([seed, list(_TABLE).index(name), severity])
    result = function(x, draw, scale, parameters[severity - 1])
    return (np.clip(result, 0, 1) * 255).astype(np.uint8)
