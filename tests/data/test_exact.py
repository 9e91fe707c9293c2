"""Measured images keep their values, and bring their noise levels."""

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from diffusers_ext import load_images
from diffusers_ext.data.exact import check_value_range
from diffusers_ext.training.images import ExactImageArguments

RNG = np.random.default_rng(0)


def read(path, **options):
    options = {"resolution": 6, "channels": 1, "exact": True, **options}
    return load_images(train_data_dir=str(path), **options)


def test_floats_outside_the_range_and_their_levels_are_kept(tmp_path):
    images = RNG.normal(0.5, 1.0, (5, 6, 6)).astype(np.float32)  # far outside of [0, 1]
    levels = np.array([0.0, 0.1, 0.2, 0.3, 2.0])
    np.savez(tmp_path / "data.npz", images=images, labels=np.arange(5), level=levels)
    data = read(tmp_path / "data.npz", sigma_column="level")
    data.verify()
    for i, item in enumerate(data):
        torch.testing.assert_close(item["pixel_values"][0], torch.from_numpy(2 * images[i] - 1), atol=1e-6, rtol=1e-6)
        assert item["sigma"].dtype == torch.float32
        assert item["sigma"].item() == pytest.approx(levels[i])
        assert item["label"] == i
    assert data.noise_levels().tolist() == levels.tolist()
    np.save(tmp_path / "data.npy", images.astype(np.float64))
    alone = read(tmp_path / "data.npy", value_range=(-1.0, 3.0))
    torch.testing.assert_close(
        alone[2]["pixel_values"][0], torch.from_numpy((images[2] - 1) / 2), atol=1e-6, rtol=1e-6
    )
    assert alone.noise_levels() is None
    assert alone.fingerprint != read(tmp_path / "data.npy").fingerprint


@pytest.mark.parametrize(("dtype", "top"), [(np.uint16, 65535), (np.uint8, 255), (np.float32, 1), (np.int32, 4095)])
def test_every_depth_is_kept_in_arrays_and_files(tmp_path, dtype, top):
    values = (RNG.random((6, 6)) * top).astype(dtype)
    expected = torch.from_numpy(values.astype(np.float64) / top * 2 - 1).float()
    value_range = (0, 4095) if dtype == np.int32 else None
    np.save(tmp_path / "data.npy", values[None])
    (tmp_path / "files").mkdir()
    Image.fromarray(values).save(tmp_path / "files" / "0.tif")
    sources = [tmp_path / "data.npy", tmp_path / "files"]
    if dtype == np.uint16:
        (tmp_path / "png").mkdir()
        Image.fromarray(values).save(tmp_path / "png" / "0.png")
        sources.append(tmp_path / "png")
    for source in sources:
        found = read(source, value_range=value_range)[0]["pixel_values"]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found[0], expected, atol=1e-6, rtol=0)


def test_files_of_floats_with_a_column_of_levels(tmp_path):
    values = RNG.normal(0.5, 1.0, (3, 6, 6)).astype(np.float32)
    for i, image in enumerate(values):
        Image.fromarray(image).save(tmp_path / f"{i}.tiff")
    (tmp_path / "metadata.csv").write_text("file_name,sigma\n0.tiff,0\n1.tiff,0.25\n2.tiff,1.5\n")
    data = read(tmp_path, sigma_column="sigma")
    data.verify()
    assert [item["sigma"].item() for item in data] == [0, 0.25, 1.5] == data.noise_levels().tolist()
    for i, item in enumerate(data):
        torch.testing.assert_close(item["pixel_values"][0], torch.from_numpy(2 * values[i] - 1), atol=1e-6, rtol=1e-6)
    stream = read(tmp_path, sigma_column="sigma", streaming=True)
    assert sorted(stream.decode(row)["sigma"].item() for row in stream.epoch(0, 10)) == [0, 0.25, 1.5]


def test_larger_images_are_cropped_by_whole_pixels_and_smaller_ones_refused(tmp_path):
    image = RNG.normal(size=(9, 8)).astype(np.float32)
    np.save(tmp_path / "data.npy", image[None])
    places = {
        tuple(image[top : top + 6, left : left + 6].flatten().tolist()): (top, left)
        for top in range(4)
        for left in range(3)
    }
    data = read(tmp_path / "data.npy", value_range=(-1, 1))
    crops = [data.get(0, torch.Generator().manual_seed(s))["pixel_values"] for s in range(100)]
    assert {places[tuple(crop.flatten().tolist())] for crop in crops} == set(places.values())
    small = read(tmp_path / "data.npy", resolution=9)
    for act in (small.verify, lambda: small[0]):
        with pytest.raises(ValueError, match="`resolution` must be at most the size of every image.*9x9 .*of 8x9"):
            act()
    Image.fromarray(image).save(tmp_path / "0.tif")
    with pytest.raises(ValueError, match="0.tif.*8x9 is below the resolution, and it is not resized"):
        read(tmp_path, resolution=9).verify()


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([0.1, -0.2], "finite noise levels >= 0, 0 for a clean image, got 'sigma' with -0.2 for image 1"),
        ([0.1, np.nan], "finite noise levels >= 0.* with nan for image 1"),
        ([np.inf, 0.1], "finite noise levels >= 0.* with inf for image 0"),
        ([0.1], r"must hold 2 numbers, one noise level an image, got 'sigma' with float64 of shape \(1,\)"),
        ([[0.1], [0.2]], r"must hold 2 numbers, .* of shape \(2, 1\)"),
        (["a", "b"], "must hold 2 numbers, one noise level an image"),
    ],
)
def test_refuses_bad_levels(tmp_path, levels, message):
    np.savez(tmp_path / "data.npz", images=np.zeros((2, 6, 6), np.float32), sigma=np.array(levels))
    with pytest.raises(ValueError, match=f"`sigma_column` {message}|`sigma_column` must hold {message}"):
        read(tmp_path / "data.npz", sigma_column="sigma")


def test_refuses_bad_levels_of_a_column(tmp_path):
    features = Features({"image": ImageFeature(), "sigma": Value("float64")})
    rows = {"image": [Image.fromarray(np.zeros((6, 6), np.uint8))] * 2, "sigma": [0.5, None]}
    Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match="`sigma_column` must hold 2 numbers"):
        read(tmp_path / "saved", sigma_column="sigma")
    with pytest.raises(
        ValueError, match=r"`sigma_column` must be one of the columns \['image', 'sigma'\], got 'level'"
    ):
        read(tmp_path / "saved", sigma_column="level")
    stream = read(tmp_path / "saved", sigma_column="sigma", streaming=True)
    with pytest.raises(ValueError, match="`sigma_column` must hold 1 numbers"):
        [stream.decode(row) for row in stream.epoch(0, 10)]


def test_refuses_what_cannot_be_kept(tmp_path):
    np.save(tmp_path / "nan.npy", np.full((1, 6, 6), np.nan))
    with pytest.raises(ValueError, match="`images` cannot be read: its values must be finite, got NaN"):
        read(tmp_path / "nan.npy")
    np.save(tmp_path / "int.npy", np.zeros((1, 6, 6), np.int32))
    with pytest.raises(ValueError, match="values of type int32 have no known range; say by `value_range`"):
        read(tmp_path / "int.npy").verify()
    np.save(tmp_path / "colour.npy", np.zeros((1, 6, 6, 3), np.float32))
    with pytest.raises(ValueError, match="it must have 1 channels, as `channels` says, got 3"):
        read(tmp_path / "colour.npy").verify()
    for name, mode in (("clear.png", "RGBA"), ("cmyk.tif", "CMYK")):
        (tmp_path / mode).mkdir()
        Image.new(mode, (6, 6)).save(tmp_path / mode / name)
        with pytest.raises(ValueError, match=f"image .*{name}.* an image of mode '{mode}' is not read as it is"):
            read(tmp_path / mode, channels=3)[0]
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "deep.png").write_bytes(deep_colour())
    with pytest.raises(ValueError, match="Pillow keeps 8 bits of 16-bit colour; give such images as a NumPy file"):
        read(tmp_path / "deep", channels=3)[0]


def deep_colour():
    """A PNG of 6x6 pixels of 16-bit colour, which Pillow reads but does not write."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes(6 * 6) for _ in range(6))
    header = struct.pack(">IIBBBBB", 6, 6, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_refuses_bad_ranges(tmp_path):
    for bad in ((1, 0), (0, np.inf), (0,), 3, ("a", "b")):
        with pytest.raises(ValueError, match="`value_range` must be two finite numbers, low < high, got"):
            check_value_range(bad)
    np.save(tmp_path / "data.npy", np.zeros((1, 6, 6), np.float32))
    with pytest.raises(ValueError, match="`value_range` must be left out without `exact`"):
        read(tmp_path / "data.npy", exact=False, value_range=(0, 1))
    assert ExactImageArguments(value_range="-1, 3.5").exact_options()["value_range"] == (-1, 3.5)
    for bad in ("1", "a,b", "1,0"):
        with pytest.raises(ValueError, match="`value_range` must be two"):
            ExactImageArguments(value_range=bad).exact_options()
