"""Slices of volumes: where pixels lie, against closed forms and SciPy's resampling, and the way back."""

import gzip
import itertools
import sys

import nibabel
import numpy as np
import pytest
import torch
from nibabel.affines import apply_affine
from nibabel.processing import resample_from_to

from diffusers_ext import read_slices
from diffusers_ext.methods.score_frameworks.volumes import open_volume

SHAPE = (12, 16, 10)  # to the right, the front, the head
SPACING = (2.0, 1.5, 3.0)  # 24 x 24 x 30 mm
AXES = {"sagittal": (0, 1, 2), "coronal": (1, 0, 2), "axial": (2, 0, 1)}  # the normal, columns, rows from below
TURNS = [(p, f) for p in itertools.permutations(range(3)) for f in itertools.product((1, -1), repeat=3)]


def turned(values, permutation, flips):
    """Returns a volume given on axes to the right, the front and the head, stored on others at the same places."""
    affine = np.diag([*SPACING, 1.0])
    affine[:3, 3] = (-11.0, -40.0, 7.0)
    start = [n - 1 if flip < 0 else 0 for n, flip in zip(values.shape, flips, strict=True)]
    turn = np.zeros((4, 4))  # from stored indices to those on the patient's axes
    for stored, axis in enumerate(permutation):
        turn[axis, stored] = flips[axis]
    turn[:3, 3], turn[3, 3] = start, 1
    stored = values[tuple(slice(None, None, flip) for flip in flips)].transpose(permutation)
    return nibabel.Nifti1Image(np.ascontiguousarray(stored), affine @ turn)


def plain(shape=SHAPE, seed=0):
    return turned(np.random.default_rng(seed).random(shape, np.float32) + 0.1, (0, 1, 2), (1, 1, 1))


def slope(places):
    """A function of places in millimetres that tells all three axes and directions apart, and is linear."""
    return 200 + places @ np.array([1.0, 0.37, -0.81])


def pixel_places(volume, axis, size, field_of_view):
    """Returns where pixels lie, `(slices, size, size, 3)` in mm, from the middle of the volume's box outwards."""
    corners = apply_affine(volume.affine, [(0, 0, 0), np.array(volume.shape) - 1])
    low, high = corners.min(0), corners.max(0)
    normal, across, up = AXES[axis]
    count = SHAPE[normal]
    steps = (np.arange(size) - (size - 1) / 2) * field_of_view / size
    places = np.zeros((count, size, size, 3))
    places[..., normal] = np.linspace(low[normal], high[normal], count)[:, None, None]
    places[..., across] = (low[across] + high[across]) / 2 + steps
    places[..., up] = (low[up] + high[up]) / 2 - steps[:, None]
    return places


@pytest.mark.parametrize("axis", AXES)
def test_pixels_lie_where_they_should_in_every_orientation(axis):
    """Of all 48 orders and directions of the axes; interpolation and its filter keep a linear function inside."""
    size, view = 20, 30.0  # 24 mm are 16 pixels, 30 are 20
    for turn in TURNS:
        volume = turned(np.zeros(SHAPE, np.float32), *turn)
        indices = np.moveaxis(np.indices(volume.shape), 0, -1)
        values = slope(apply_affine(volume.affine, indices)).astype(np.float32)
        volume = nibabel.Nifti1Image(values, volume.affine)
        slices = read_slices(volume, size, axis, view, percentile=100)
        wanted = slope(pixel_places(volume, axis, size, view)) / values.max()
        found, inside = slices.images[:, 0].numpy(), np.s_[:, 4:-4, 4:-4]
        np.testing.assert_allclose(found[inside], wanted[inside], atol=1e-5)
        if axis == "axial":
            assert (found[:, :2] == 0).all()  # beyond the head
            assert (found[:, :, :2] == 0).all()
        again = slices.restore(torch.from_numpy(wanted)[:, None])
        assert again.shape == volume.shape
        np.testing.assert_array_equal(again.affine, volume.affine)
        inside = np.s_[3:-3, 3:-3, 3:-3]
        # In millimetres: the filter's weights are not quite even where voxels are no whole number of pixels.
        np.testing.assert_allclose(again.get_fdata()[inside] * values.max(), values[inside], atol=0.03)


def test_finer_pixels_are_those_of_scipy():
    volume, size, view = plain(), 48, 24.0
    slices = read_slices(volume, size, "axial", view, percentile=100)
    assert (slices.plane, slices.spacing) == ((16, 12), (1.5, 2.0))
    affine = np.diag([0.5, 0.5, 3.0, 1.0])
    affine[:3, 3] = pixel_places(volume, "axial", size, view)[0, -1, 0]
    wanted = resample_from_to(volume, ((size, size, SHAPE[2]), affine), order=1, mode="nearest").get_fdata()
    found = slices.images[:, 0].flip(1).permute(2, 1, 0).numpy() * volume.get_fdata().max()
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_of_finer_maps_a_voxel_is_the_mean_around_it():
    """Weighted by the distance in millimetres, 0 from the next voxel's middle on."""
    slices = read_slices(plain(), 48, "axial", 24.0)
    maps = torch.rand(10, 1, 48, 48, generator=torch.Generator().manual_seed(0))
    weights = []
    for count, spacing in ((16, 1.5), (12, 2.0)):
        distance = np.arange(48) * 0.5 + 0.25 - (np.arange(count)[:, None] + 0.5) * spacing
        weight = np.clip(1 - np.abs(distance) / spacing, 0, None)
        weights.append(weight / weight.sum(1, keepdims=True))
    wanted = np.einsum("ar,src,bc->bas", weights[0], maps[:, 0].flip(1).numpy(), weights[1])
    np.testing.assert_allclose(slices.restore(maps).get_fdata(), wanted, atol=1e-6)


@pytest.mark.parametrize(("shape", "size", "field_of_view"), [((9, 16, 3), 16, None), ((9, 16, 3), 11, 11.0)])
def test_the_way_back_is_exact_on_pixels_like_voxels(shape, size, field_of_view):
    """Odd numbers of pixels are filled or cut: what was seen returns, bit for bit but for the scale."""
    values = np.random.default_rng(0).random(shape, np.float32) + 0.1
    slices = read_slices(nibabel.Nifti1Image(values, np.eye(4)), size, "axial", field_of_view, percentile=100)
    again = slices.restore(slices.images).get_fdata() * values.max()
    seen = again != 0
    assert seen.sum() == shape[0] * min(size, shape[1]) * shape[2]
    np.testing.assert_allclose(again[seen], values[seen], rtol=1e-6)


def test_scale_and_labels():
    values = np.zeros((32, 32, 2), np.int16)
    values[8:24, 4:20] = np.arange(16)[:, None, None] * 10 + 5
    volume = nibabel.Nifti1Image(values, np.eye(4))
    top = np.percentile(values, 90.0)
    assert 0 < top < values.max()
    images = read_slices(volume, 32, percentile=90.0).images
    np.testing.assert_allclose(images[:, 0].flip(1).permute(2, 1, 0), np.clip(values / top, 0, 1), atol=1e-6)
    labels = read_slices(volume, 16, categories=True).images[:, 0]
    assert labels.sum(dtype=torch.float64).item() == pytest.approx((values > 0).sum() / 4)  # the area is kept
    assert (labels[:, 7:13, 5:11] - 1).abs().max() < 1e-6  # the lower half: the back
    assert labels[:, :5].max() == labels[:, :, :3].max() == 0


def test_files_and_trailing_dimensions(tmp_path):
    volume = plain()
    path = tmp_path / "head.nii.gz"
    nibabel.save(volume, path)
    assert torch.equal(read_slices(path).images, read_slices(volume).images)
    longer = nibabel.Nifti1Image(volume.get_fdata()[..., None], volume.affine)
    assert read_slices(longer).images.shape == (10, 1, 64, 64)
    assert read_slices(longer).restore(torch.zeros(10, 1, 32, 32)).shape == SHAPE


def test_bad_files_are_refused(tmp_path, monkeypatch):
    good = tmp_path / "good.nii.gz"
    nibabel.save(plain(), good)
    (tmp_path / "text.nii").write_text("no volume")
    (tmp_path / "text.nii.gz").write_text("no volume")
    raw = gzip.decompress(good.read_bytes())
    (tmp_path / "short.nii").write_bytes(raw[: len(raw) // 2])
    (tmp_path / "short.nii.gz").write_bytes(good.read_bytes()[:-2000])
    for name in ("none.nii", "text.nii", "text.nii.gz"):
        with pytest.raises(ValueError, match=f"`volume` must be a file that nibabel reads.* got .*{name}"):
            read_slices(tmp_path / name)
    for name in ("short.nii", "short.nii.gz"):
        with pytest.raises(ValueError, match=f"`volume` must be a whole file, got .*{name}"):
            read_slices(tmp_path / name)
    flat = bytearray(raw)
    flat[296:312] = bytes(16)  # a row of the affine
    (tmp_path / "flat.nii").write_bytes(flat)
    with pytest.raises(ValueError, match=r"`volume` must have voxels of three sizes > 0, got \[2.0, 0.0, 3.0\]"):
        read_slices(tmp_path / "flat.nii")
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(ImportError, match=r"pip install 'diffusers-ext\[medical\]'"):
        open_volume(good)


def image(values):
    return nibabel.Nifti1Image(values, np.eye(4))


ONES = np.ones(SHAPE, np.float32)


@pytest.mark.parametrize(
    ("volume", "arguments", "message"),
    [
        (ONES, {}, "`volume` must be a path or an image of nibabel, got ndarray"),
        (image(ONES[..., None].repeat(2, 3)), {}, r"`volume` must have three dimensions, got \(12, 16, 10, 2\)"),
        (image(ONES[0]), {}, r"`volume` must have three dimensions, got \(16, 10\)"),
        (image(ONES.astype(np.complex64)), {}, "`volume` must hold real numbers, got complex64"),
        (image(ONES * np.nan), {}, "`volume` must be finite, got NaN or infinity"),
        (image(0 * ONES), {}, "`percentile` must be one at which the volume is > 0, got 99.5 with 0"),
        (image(ONES), {"axis": "z"}, "`axis` must be one of .* got 'z'"),
        (image(ONES), {"size": 0}, "`size` must be an integer >= 1, got 0"),
        (image(ONES), {"size": 8.0}, "`size` must be an integer >= 1, got 8.0"),
        (image(ONES), {"percentile": 0}, r"`percentile` must be a number in \(0, 100\], got 0"),
        (image(ONES), {"field_of_view": -1.0}, "`field_of_view` must be a number > 0 of millimetres, got -1.0"),
    ],
)
def test_bad_input_is_refused(volume, arguments, message):
    with pytest.raises(ValueError, match=message):
        read_slices(volume, **arguments)


def test_maps_of_other_slices_are_refused():
    slices = read_slices(plain())
    for shape in ((9, 1, 64, 64), (10, 2, 64, 64), (10, 1, 64, 32), (10, 64, 64)):
        with pytest.raises(ValueError, match=r"`maps` must have the shape \(10, 1, size, size\), got"):
            slices.restore(torch.zeros(shape))
