"""Radiance fields and their pictures: a small differentiable volume renderer for scenes in a plane and in space."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput

from diffusers_ext.training.config import is_number, is_whole, require

from .protocol import ForwardModel, Parameters
from .rays import FULL_TURN, as_angles, centers, even_angles, frame_of, sampled

__all__ = ["VolumeForwardModel", "VolumeRendering", "render_cells"]

OUTPUTS = ("color", "opacity", "depth", "brightness")


@dataclass
class VolumeRendering(BaseOutput):
    """What rays see.

    Args:
        color: `(batch, channels, ...)`, sum_i w_i c_i + T_end background.
        opacity: `(batch, 1, ...)`, sum_i w_i = 1 - T_end.
        depth: `(batch, 1, ...)`, sum_i w_i z_i, from the camera along the ray; 0 where nothing is.
    """

    __module__ = "diffusers_ext"

    color: torch.Tensor
    opacity: torch.Tensor
    depth: torch.Tensor


def render_cells(
    density: torch.Tensor,
    color: torch.Tensor,
    length: float | torch.Tensor,
    near: float = 0.0,
    background: float | torch.Tensor = 0.0,
) -> VolumeRendering:
    """Renders rays through cells of constant density (2306.11719, section 4.1; exact for such cells).

    a_i = 1 - exp(-sigma_i d_i), T_i = prod_{j<i} (1 - a_j), w_i = T_i a_i.

    Args:
        density: `(batch, ..., cells)` sigma >= 0 from the camera on, floats.
        color: `(batch, channels, ..., cells)`.
        length: d of the cells, one number or `(cells,)`.
        near: where the first cell begins.
        background: colour behind the last cell, one number or `(channels, 1, ...)`.

    Returns:
        Colour, opacity and depth, without the last axis.

    Raises:
        ValueError: colours are not those of these cells, or lengths or `near` no numbers of their range.

    Example:
        >>> import torch
        >>> from diffusers_ext import render_cells
        >>> slab = render_cells(torch.ones(1, 4), torch.full((1, 1, 4), 0.7), length=0.5, background=0.1)
        >>> round(slab.color.item(), 6), round(slab.opacity.item(), 6)
        (0.618799, 0.864665)
    """
    fits = color.shape[0:1] + color.shape[2:] == density.shape
    require(fits, "color", tuple(color.shape), f"(batch, channels, ..., cells) of densities {tuple(density.shape)}")
    require(density.is_floating_point(), "density", str(density.dtype), "floats")
    good = isinstance(length, torch.Tensor) or (is_number(length) and length > 0)
    require(good, "length", length, "a number > 0, or a tensor (cells,)")
    require(is_number(near), "near", near, "a number")
    lengths = torch.as_tensor(length, dtype=density.dtype, device=density.device).expand(density.shape[-1])
    absorbed = density * lengths
    before = F.pad(absorbed.cumsum(-1), (1, 0))  # of cell i what cells 0 to i - 1 absorb; the last is that of all
    weights = (before[..., :-1].neg().exp() * -torch.expm1(-absorbed))[:, None]
    through = before[..., -1].neg().exp()[:, None]
    ends = near + lengths.cumsum(0)
    return VolumeRendering(
        color=(weights * color).sum(-1) + through * background,
        opacity=weights.sum(-1),
        depth=(weights * (ends - lengths / 2)).sum(-1),
    )


class VolumeForwardModel(ForwardModel):
    """Pictures of a radiance field: a scene in space seen by cameras, or one in a plane by cameras within it.

    The signal is `(batch, 1 + colours, height, width)` with pictures `(batch, ..., width)`, or `(batch, 1 + colours,
    depth, height, width)` with pictures `(batch, ..., height, width)`. It fills [-1, 1]; x, y and z run along width,
    height and depth, so y points down. Channel 0 is the density: what is below 0 counts as 0, and how many numbers
    were so stands in `negative_densities`.

    Parameters of an observation, one of

    * an angle in radians, `(batch,)` or `(batch, 1)`: the camera is on a circle around the middle, which it looks at;
      at 0 it looks along y in a plane, along z in space, where it turns about y;
    * a matrix from the camera to the world, `(batch, 3, 3)` in a plane, `(batch, 4, 4)` in space: columns right,
      (down,) forward and place, as OpenCV has them.

    Args:
        size: of the picture, one number, or height and width in space.
        num_samples: cells of a ray, all of one length.
        near: where rays begin, from the camera.
        far: where they end.
        background: colour behind the scene, one number or one a channel.
        density_scale: density of signal 1, a length's inverse.
        output: `"color"`, `"opacity"`, `"depth"`, or `"brightness"`: 1 at `near`, -1 at `far`, straight between, on
            `background`; it needs no colours.
        field_of_view: angle from the picture's left to its right side, in radians; by default rays are parallel.
        extent: of parallel rays, half of the picture's width.
        distance: of cameras given by an angle, from the middle; by default (near + far) / 2.
        num_angles: how many angles, evenly spaced, `sample_parameters` draws from; by default any.

    Raises:
        ValueError: a number is out of its range.

    Example:
        >>> import math, torch
        >>> from diffusers_ext import VolumeForwardModel
        >>> camera = VolumeForwardModel(size=16, num_samples=32, near=1.0, far=5.0, field_of_view=math.pi / 4)
        >>> scene = torch.rand(2, 4, 8, 8, 8)  # density and red, green, blue
        >>> camera(scene, torch.tensor([0.0, math.pi / 2])).shape
        torch.Size([2, 3, 16, 16])
    """

    __module__ = "diffusers_ext"

    @register_to_config
    def __init__(
        self,
        size: int | Sequence[int],
        num_samples: int = 64,
        near: float = 0.0,
        far: float = 2.0,
        background: float | Sequence[float] = 0.0,
        density_scale: float = 1.0,
        output: Literal["color", "opacity", "depth", "brightness"] = "color",
        field_of_view: float | None = None,
        extent: float = 1.0,
        distance: float | None = None,
        num_angles: int | None = None,
    ) -> None:
        super().__init__()
        sizes = list(size) if isinstance(size, list | tuple) else [size]
        require(len(sizes) in (1, 2) and all(map(is_whole, sizes)), "size", size, "one or two integers >= 1")
        require(is_whole(num_samples, 2), "num_samples", num_samples, "an integer >= 2")
        require(is_number(far), "far", far, "a number")
        require(is_number(near) and 0 <= near < far, "near", near, f"at least 0 and below `far`, {far}")
        colors = list(background) if isinstance(background, list | tuple) else [background]
        good = len(colors) > 0 and all(map(is_number, colors))
        require(good, "background", background, "a number, or one for each channel")
        for name, value in (("density_scale", density_scale), ("extent", extent)):
            require(is_number(value) and value > 0, name, value, "a number > 0")
        require(output in OUTPUTS, "output", output, f"one of {list(OUTPUTS)}")
        narrow = field_of_view is None or (is_number(field_of_view) and 0 < field_of_view < math.pi)
        require(narrow, "field_of_view", field_of_view, "an angle between 0 and pi, or left out")
        require(distance is None or is_number(distance), "distance", distance, "a number, or left out")
        require(num_angles is None or is_whole(num_angles), "num_angles", num_angles, "an integer >= 1, or left out")
        self.negative_densities: int | torch.Tensor = 0  # grows on the device, so that nothing waits for it

    def forward(self, signal: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        """Renders the kind of picture that `output` names.

        Args:
            signal: `(batch, 1 + colours, ...)`, see the class.
            parameters: angles or matrices.

        Returns:
            `(batch, colours or 1, ...)`.

        Raises:
            ValueError: the signal has no colours, or neither two nor three dimensions.
        """
        return getattr(self.render(signal, parameters), "color" if self._painted else self.config.output)

    @property
    def _painted(self) -> bool:
        return self.config.output in ("color", "brightness")

    def render(self, signal: torch.Tensor, parameters: Parameters) -> VolumeRendering:
        """Renders colour, opacity and depth; arguments and errors as of `forward`.

        Without colours in the signal, and for the output `"brightness"`, `color` is the brightness.
        """
        colored = self.config.output == "color"
        require(signal.ndim in (4, 5), "signal", tuple(signal.shape), "(batch, channels, [depth,] height, width)")
        enough = not colored or signal.shape[1] >= 2
        require(enough, "signal", tuple(signal.shape), "of a density and at least one colour for output 'color'")
        self.negative_densities = self.negative_densities + (signal[:, 0] < 0).sum()
        cells, near, far = self.config.num_samples, self.config.near, self.config.far
        length = (far - near) / cells
        depths = near + length * (torch.arange(cells, device=signal.device, dtype=signal.dtype) + 0.5)
        starts, directions = self._rays(self._pose(parameters, signal), signal)
        field = torch.cat([signal[:, :1].clamp(min=0) * self.config.density_scale, signal[:, 1:]], 1)
        values = sampled(field, starts[..., None, :] + depths[:, None] * directions[..., None, :])
        background: torch.Tensor = torch.as_tensor(self.config.background, dtype=signal.dtype, device=signal.device)
        background = background.reshape(-1, *[1] * (signal.ndim - 3))
        painted = signal.shape[1] - 1 if colored else 1
        accepted = f"one number, or {painted}, one a channel"
        require(len(background) in (1, painted), "background", self.config.background, accepted)
        color = values[:, 1:] if colored else (1 - 2 * (depths - near) / (far - near)).expand_as(values[:, :1])
        return render_cells(values[:, 0], color, length, near, background)

    def _pose(self, parameters: Parameters, signal: torch.Tensor) -> torch.Tensor:
        """Returns the matrix from the camera to the world, `(batch, dimensions, dimensions + 1)`."""
        dimensions = signal.ndim - 2
        assert isinstance(parameters, torch.Tensor)
        if parameters.ndim == 3:
            square = parameters.shape[1:] == (dimensions + 1, dimensions + 1)
            accepted = f"matrices (batch, {dimensions + 1}, {dimensions + 1})"
            require(square, "parameters", tuple(parameters.shape), f"angles, or {accepted}")
            return parameters[:, :-1].to(signal)
        right, forward = frame_of(as_angles(parameters).to(signal))
        distance = self.config.distance
        place = -forward * ((self.config.near + self.config.far) / 2 if distance is None else distance)
        if dimensions == 2:
            return torch.stack([right, forward, place], -1)
        zero = torch.zeros_like(right[:, 0])
        right, forward, place = (torch.stack([v[:, 0], zero, v[:, 1]], -1) for v in (right, forward, place))
        return torch.stack([right, right.new_tensor([0.0, 1.0, 0.0]).expand_as(right), forward, place], -1)

    def _rays(self, pose: torch.Tensor, signal: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns where rays start and their unit directions, both `(batch, picture ..., dimensions)`."""
        sizes = self._picture(signal.ndim - 2)
        u = centers(sizes[-1], signal)
        plane = u[:, None] * pose[:, None, :, 0]
        if len(sizes) == 2:
            v = centers(sizes[0], signal) * (sizes[0] / sizes[1])
            plane = plane[:, None] + v[:, None, None] * pose[:, None, None, :, 1]
        forward, place = (pose[..., i].reshape(len(pose), *[1] * len(sizes), -1) for i in (-2, -1))
        if self.config.field_of_view is None:
            return place + self.config.extent * plane, forward.expand_as(plane)
        return place.expand_as(plane), F.normalize(forward + math.tan(self.config.field_of_view / 2) * plane, dim=-1)

    def _picture(self, dimensions: int) -> list[int]:
        """Returns the picture's sizes: a width in a plane, height and width in space."""
        size = self.config.size
        sizes = [size] * (dimensions - 1) if isinstance(size, int) else list(size)
        require(len(sizes) == dimensions - 1, "size", size, f"of {dimensions - 1} numbers for such scenes")
        return sizes

    def lift(
        self, observation: torch.Tensor, parameters: Parameters, signal_shape: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Projects each picture back along its rays; the gradient at an empty scene is 0 for all that is on black.

        Args:
            observation: `(batch, channels, ...)`.
            parameters: angles or matrices.
            signal_shape: of a signal, without the batch.

        Returns:
            At each of the signal's cells what its pixel shows and the same times the cell's depth, from -1 at `near`
            to 1 at `far`, `(batch, 2 channels, ...)`; and the same of ones, `(batch, 2, ...)`.

        Raises:
            ValueError: the observation is no picture of this camera.
        """
        spatial = tuple(signal_shape[1:])
        sizes = tuple(self._picture(len(spatial)))
        fits = observation.shape[2:] == sizes
        require(fits, "observation", tuple(observation.shape), f"(batch, channels, {', '.join(map(str, sizes))})")
        like = observation.new_zeros(1, *signal_shape)
        pose = self._pose(parameters, like)
        axes = torch.meshgrid(*(centers(n, like) for n in spatial), indexing="ij")
        cells = torch.stack(axes[::-1], -1)  # x first
        seen = (cells.reshape(1, -1, len(spatial)) - pose[:, None, :, -1]) @ pose[..., :-1]
        depth, picture = seen[..., -1], seen[..., :-1]
        if self.config.field_of_view is None:
            picture, distance = picture / self.config.extent, depth
        else:
            ahead = depth.clamp(min=1e-6)[..., None] * math.tan(self.config.field_of_view / 2)
            picture, distance = picture / ahead, seen.norm(dim=-1)
        near, far = self.config.near, self.config.far
        if len(sizes) == 2:
            picture = picture * picture.new_tensor([1.0, sizes[1] / sizes[0]])
        else:
            observation = observation[:, :, None]
            picture = F.pad(picture, (0, 1))
        inside = (picture.abs() <= 1).all(-1) & (distance >= near) & (distance <= far) & (depth > 0)
        values = F.grid_sample(observation, picture[:, None], padding_mode="border", align_corners=False)[:, :, 0]
        ones = inside[:, None].to(values.dtype)
        place = (2 * (distance - near) / (far - near) - 1)[:, None]
        shape = (len(observation), -1, *spatial)
        lifted = torch.cat([values * ones, values * ones * place], 1).reshape(shape)
        return lifted, torch.cat([ones, ones * place], 1).reshape(shape)

    def sample_parameters(self, n: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """Draws `(n,)` angles of a full turn."""
        return even_angles(n, FULL_TURN, self.config.num_angles, generator)

    def check_parameters(self, parameters: Parameters, n: int | None = None) -> None:
        """Refuses what are neither angles nor matrices of a rigid motion.

        Raises:
            ValueError: as said, or parameters are missing or not finite.
        """
        super().check_parameters(parameters, n)
        if not (isinstance(parameters, torch.Tensor) and parameters.shape[1:] in ((3, 3), (4, 4))):
            as_angles(parameters)
            return
        matrices = parameters.cpu().double()
        turn, unit = matrices[:, :-1, :-1], torch.eye(matrices.shape[1], dtype=torch.float64)
        rigid = (turn.mT @ turn - unit[:-1, :-1]).abs().amax((1, 2)) + (matrices[:, -1] - unit[-1]).abs().amax(1)
        bad = matrices[rigid > 1e-3].tolist()
        accepted = "angles, or matrices of columns of length 1 at right angles and a place, above a row 0, ..., 1"
        require(not bad, "parameters", bad[:1], accepted)
