"""Slices of medical volumes, as images of one pixel size, and maps of slices back on the volume's grid."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from diffusers_ext.training.config import is_number, is_whole, require

__all__ = ["VolumeSlices", "check_slicing", "count_slices", "open_volume", "read_slices"]

AXES = ("sagittal", "coronal", "axial")
RAS = np.array([[0, 1], [1, 1], [2, 1]])  # nibabel's words for axes to the right, the front and the head


@dataclass
class VolumeSlices:
    """Slices of a volume, and where they come from.

    Attributes:
        images: `(slices, 1, size, size)` in [0, 1], float32. The head is up, in axial slices the front; the patient's
            left is on the left, in sagittal slices the back. Slices are counted from the feet upwards, coronal ones
            from the back, sagittal ones from the patient's left.
        plane: height and width of a slice in voxels.
        spacing: distance of the voxels along them, in millimetres.
        axis: across which the slices were cut.
        field_of_view: side of the images in millimetres.
        volume: the image of nibabel, with three dimensions, as it was given.
    """

    images: torch.Tensor
    plane: tuple[int, int]
    spacing: tuple[float, float]
    axis: str
    field_of_view: float
    volume: Any

    def restore(self, maps: torch.Tensor) -> Any:
        """Brings maps of the slices back on the volume's grid.

        Args:
            maps: `(slices, 1, size, size)`, of any size.

        Returns:
            A NIfTI image (nibabel's) of the volume's shape and affine, float32; 0 where the images did not reach.

        Raises:
            ValueError: `maps` has another shape.
        """
        import nibabel
        from nibabel.orientations import apply_orientation, io_orientation, ornt_transform

        size = maps.shape[-1]
        if tuple(maps.shape) != (len(self.images), 1, size, size):
            raise ValueError(f"`maps` must have the shape ({len(self.images)}, 1, size, size), got {(*maps.shape,)}.")
        sides = _sides(self.plane, self.spacing, self.field_of_view, size)
        planes = F.interpolate(_centred(maps.float(), sides), self.plane, mode="bilinear", antialias=True)
        values = np.moveaxis(planes[:, 0].flip(1).movedim(1, 2).cpu().numpy(), 0, AXES.index(self.axis))
        own = ornt_transform(RAS, io_orientation(self.volume.affine))
        return nibabel.Nifti1Image(np.ascontiguousarray(apply_orientation(values, own)), self.volume.affine)


def open_volume(path: str | Path) -> Any:
    """Opens a NIfTI file (or another kind that nibabel reads).

    Raises:
        ValueError: the file is missing, of another kind, or no volume of three dimensions and real numbers.
        ImportError: nibabel is not installed.
    """
    try:
        import nibabel
        from nibabel.filebasedimages import ImageFileError
        from nibabel.spatialimages import HeaderDataError
    except ImportError as error:
        raise ImportError("volumes are read by nibabel: pip install 'diffusers-ext[medical]'.") from error
    try:
        volume = nibabel.load(path)
    except (OSError, ImageFileError, HeaderDataError) as error:
        raise ValueError(f"`volume` must be a file that nibabel reads, such as .nii.gz, got {str(path)!r}.") from error
    return _checked(volume, str(path))


def _checked(volume: Any, name: str) -> Any:
    """Returns an image of nibabel without dimensions of length 1 behind the third."""
    if not hasattr(volume, "affine"):
        raise ValueError(f"`volume` must be a path or an image of nibabel, got {type(volume).__name__}.")
    from nibabel.affines import voxel_sizes
    from nibabel.funcs import squeeze_image

    volume = volume if volume.ndim == 3 else squeeze_image(volume)
    if volume.ndim != 3:
        raise ValueError(f"`volume` must have three dimensions, got {tuple(volume.shape)} in {name}.")
    if volume.get_data_dtype().kind not in "biuf":
        raise ValueError(f"`volume` must hold real numbers, got {volume.get_data_dtype()} in {name}.")
    sizes = voxel_sizes(volume.affine)
    if not (np.isfinite(sizes).all() and sizes.min() > 0 and np.linalg.matrix_rank(volume.affine[:3, :3]) == 3):
        raise ValueError(f"`volume` must have voxels of three sizes > 0, got {sizes.tolist()} in {name}.")
    return volume


def count_slices(volume: Any, axis: str) -> int:
    """Returns how many slices an opened volume has across an axis."""
    from nibabel.orientations import io_orientation

    return int(volume.shape[list(io_orientation(volume.affine)[:, 0]).index(_normal(axis))])


def _normal(axis: str) -> int:
    if axis not in AXES:
        raise ValueError(f"`axis` must be one of {list(AXES)}, got {axis!r}.")
    return AXES.index(axis)


def check_slicing(size: Any, field_of_view: Any, percentile: Any) -> None:
    """Checks arguments of `read_slices`.

    Raises:
        ValueError: one is outside its range.
    """
    require(is_whole(size), "size", size, "an integer >= 1")
    require(is_number(percentile) and 0 < percentile <= 100, "percentile", percentile, "a number in (0, 100]")
    wide = field_of_view is None or (is_number(field_of_view) and field_of_view > 0)
    require(wide, "field_of_view", field_of_view, "a number > 0 of millimetres")


def read_slices(
    volume: Any,
    size: int = 64,
    axis: str = "axial",
    field_of_view: float | None = None,
    percentile: float = 99.5,
    categories: bool = False,
) -> VolumeSlices:
    """Cuts a volume into square images whose pixels are of one size in millimetres.

    A volume that lies at an angle is cut along those of its own axes that are nearest to the patient's.

    Args:
        volume: a path, or an image of nibabel.
        size: pixels a side.
        axis: the slices' normal: `"axial"`, `"coronal"` or `"sagittal"`.
        field_of_view: side of the images in millimetres, cut or filled with 0 about the volume's middle; by default
            the longer side of a slice. Sides of slices are rounded to whole pixels.
        percentile: of the volume's values, that becomes 1; 0 stays 0, and what is beyond is cut.
        categories: values are labels: those that are not 0 count as 1, and a pixel becomes the share of them in it,
            weighted towards its middle.

    Raises:
        ValueError: the volume cannot be read or holds NaN or nothing but 0, or an argument is outside its range.

    Example:
        >>> import numpy as np, nibabel
        >>> volume = nibabel.Nifti1Image(np.random.default_rng(0).random((20, 30, 4), np.float32), np.eye(4))
        >>> slices = read_slices(volume, size=16)
        >>> slices.images.shape, slices.field_of_view, slices.restore(slices.images).shape
        (torch.Size([4, 1, 16, 16]), 30.0, (20, 30, 4))
    """
    normal = _normal(axis)
    check_slicing(size, field_of_view, percentile)
    volume = open_volume(volume) if isinstance(volume, str | Path) else _checked(volume, "an image of nibabel")
    from nibabel.affines import voxel_sizes
    from nibabel.funcs import as_closest_canonical

    upright = as_closest_canonical(volume)
    try:
        values = upright.get_fdata(dtype=np.float32, caching="unchanged")
    except (OSError, EOFError, zlib.error, ValueError) as error:  # of a file that is cut off or damaged
        raise ValueError(f"`volume` must be a whole file, got {volume.get_filename()!r}: {error}") from error
    if not np.isfinite(values).all():
        raise ValueError("`volume` must be finite, got NaN or infinity.")
    values = (values != 0).astype(np.float32) if categories else values
    top = 1.0 if categories else float(np.percentile(values, percentile))
    if not top > 0:
        raise ValueError(f"`percentile` must be one at which the volume is > 0, got {percentile!r} with {top:.4g}.")
    # Rows run downwards: against the second of the two axes that are left.
    planes = torch.from_numpy(np.ascontiguousarray(np.moveaxis(values, normal, 0))).movedim(1, 2).flip(1)[:, None]
    sizes = [float(mm) for i, mm in enumerate(voxel_sizes(upright.affine)) if i != normal]
    plane, spacing = (planes.shape[2], planes.shape[3]), (sizes[1], sizes[0])
    fov = max(n * mm for n, mm in zip(plane, spacing, strict=True)) if field_of_view is None else float(field_of_view)
    small = F.interpolate(planes, _sides(plane, spacing, fov, size), mode="bilinear", antialias=True)
    images = _centred((small / top).clamp(0, 1), (size, size))
    return VolumeSlices(images, plane, spacing, axis, fov, volume)


def _sides(plane: Any, spacing: Any, field_of_view: float, size: int) -> tuple[int, int]:
    """Returns the sides of a whole slice in pixels of the images."""
    height, width = (max(1, round(n * mm * size / field_of_view)) for n, mm in zip(plane, spacing, strict=True))
    return height, width


def _centred(images: torch.Tensor, sides: tuple[int, int]) -> torch.Tensor:
    """Cuts or fills images about their middle; to cut what was filled, or the other way round, gives them back."""
    for dim, side in ((2, sides[0]), (3, sides[1])):
        missing = side - images.shape[dim]
        before = int(missing / 2)  # towards 0, so that both ways are alike
        after = missing - before
        images = F.pad(images, (0, 0, before, after) if dim == 2 else (before, after, 0, 0))
    return images
