"""Slices of medical volumes, as images of one pixel size, and maps of slices back on the volume's grid."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

__all__ = ["VolumeSlices", "open_volume", "read_slices"]

AXES = ("sagittal", "coronal", "axial")


@dataclass
class VolumeSlices:
    """Slices of a volume, and where they come from.

    Attributes:
        images: `(slices, 1, size, size)` in [0, 1], float32: the axis that points to the patient's head (of axial
            slices: to the front) upwards, the patient's left on the left side (of
            sagittal ones: the back).
        plane: height and width of a slice in voxels of the volume.
        spacing: distance of the voxels along them, in millimetres.
        axis: across which the slices were cut.
        field_of_view: side of the images in millimetres.
        volume: the NIfTI image, turned to right-anterior-superior axes.
    """

    images: torch.Tensor
    plane: tuple[int, int]
    spacing: tuple[float, float]
    axis: str
    field_of_view: float
    volume: Any

    def restore(self, maps: torch.Tensor) -> np.ndarray:
        """Brings maps of the slices back on the volume's grid.

        Args:
            maps: `(slices, 1, size, size)`.

        Returns:
            An array of the shape of `volume`, 0 where the images did not reach.
        """
        size = maps.shape[-1]
        sides = _sides(self.plane, self.spacing, self.field_of_view, size)
        planes = F.interpolate(_centred(maps.float(), sides), self.plane, mode="bilinear", align_corners=False)
        return np.moveaxis(planes[:, 0].flip(1).movedim(1, 2).cpu().numpy(), 0, AXES.index(self.axis))


def open_volume(path: str | Path) -> Any:
    """Opens a NIfTI file (or another kind that nibabel reads) with axes to the right, the front and the head.

    Raises:
        ValueError: the file is missing, of another kind, or no volume of three dimensions.
        ImportError: nibabel is not installed.
    """
    try:
        import nibabel
        from nibabel.filebasedimages import ImageFileError
    except ImportError as error:
        raise ImportError("volumes are read by nibabel: pip install 'diffusers-ext[medical]'.") from error
    try:
        volume = nibabel.load(path)
    except (OSError, ImageFileError) as error:
        raise ValueError(f"`volume` must be a file that nibabel reads, such as .nii.gz, got {str(path)!r}.") from error
    return _upright(volume, str(path))


def _upright(volume: Any, name: str) -> Any:
    from nibabel.funcs import as_closest_canonical, squeeze_image

    volume = squeeze_image(volume)
    if volume.ndim != 3:
        raise ValueError(f"`volume` must have three dimensions, got {tuple(volume.shape)} in {name}.")
    return as_closest_canonical(volume)


def read_slices(
    volume: Any,
    size: int = 64,
    axis: str = "axial",
    field_of_view: float | None = None,
    percentile: float = 99.5,
    categories: bool = False,
) -> VolumeSlices:
    """Cuts a volume into square images whose pixels are of one size in millimetres.

    Args:
        volume: a path, or an image of nibabel.
        size: pixels a side.
        axis: the slices' normal: `"axial"`, `"coronal"` or `"sagittal"`.
        field_of_view: side of the images in millimetres, cut or filled with 0 about the volume's middle; by default
            the longer side of a slice.
        percentile: of the volume's values, that becomes 1; 0 stays 0, and what is beyond is cut.
        categories: values are labels: those that are not 0 count as 1, and a pixel becomes the share of it that they
            cover.

    Raises:
        ValueError: the volume cannot be read or holds NaN or nothing but 0, or an argument is outside its range.

    Example:
        >>> import numpy as np, nibabel
        >>> volume = nibabel.Nifti1Image(np.random.default_rng(0).random((20, 30, 4), np.float32), np.eye(4))
        >>> slices = read_slices(volume, size=16)
        >>> slices.images.shape, slices.field_of_view, slices.restore(slices.images).shape
        (torch.Size([4, 1, 16, 16]), 30.0, (20, 30, 4))
    """
    if axis not in AXES:
        raise ValueError(f"`axis` must be one of {list(AXES)}, got {axis!r}.")
    if not (isinstance(size, int) and size >= 1):
        raise ValueError(f"`size` must be an integer >= 1, got {size!r}.")
    if not 0 < percentile <= 100:
        raise ValueError(f"`percentile` must be a number in (0, 100], got {percentile!r}.")
    if field_of_view is not None and not field_of_view > 0:
        raise ValueError(f"`field_of_view` must be a number > 0 of millimetres, got {field_of_view!r}.")
    volume = open_volume(volume) if isinstance(volume, str | Path) else _upright(volume, "an image of nibabel")
    values = volume.get_fdata(dtype=np.float32, caching="unchanged")
    if not np.isfinite(values).all():
        raise ValueError("`volume` must be finite, got NaN or infinity.")
    values = (values != 0).astype(np.float32) if categories else values
    top = 1.0 if categories else float(np.percentile(values, percentile))
    if not top > 0:
        raise ValueError(f"`percentile` must be one at which the volume is > 0, got {percentile!r} with {top:.4g}.")
    normal = AXES.index(axis)
    # Rows run downwards: against the second of the two axes that are left.
    planes = torch.from_numpy(np.ascontiguousarray(np.moveaxis(values, normal, 0))).movedim(1, 2).flip(1)[:, None]
    zooms = [float(z) for i, z in enumerate(volume.header.get_zooms()[:3]) if i != normal]
    plane, spacing = (planes.shape[2], planes.shape[3]), (zooms[1], zooms[0])
    fov = max(n * mm for n, mm in zip(plane, spacing, strict=True)) if field_of_view is None else float(field_of_view)
    small = F.interpolate(planes, _sides(plane, spacing, fov, size), mode="bilinear", antialias=True)
    images = _centred((small / top).clamp(0, 1), (size, size))
    return VolumeSlices(images, plane, spacing, axis, fov, volume)


def _sides(plane: Any, spacing: Any, field_of_view: float, size: int) -> tuple[int, int]:
    """Returns the sides of a whole slice in pixels of the images."""
    height, width = (max(1, round(n * mm * size / field_of_view)) for n, mm in zip(plane, spacing, strict=True))
    return height, width


def _centred(images: torch.Tensor, sides: tuple[int, int]) -> torch.Tensor:
    """Cuts or fills images about their middle."""
    for dim, side in ((2, sides[0]), (3, sides[1])):
        missing = side - images.shape[dim]
        before = missing // 2 if missing >= 0 else -((-missing + 1) // 2)
        after = missing - before
        images = F.pad(images, (0, 0, before, after) if dim == 2 else (before, after, 0, 0))
    return images
