"""Every mode and bit depth of an image is read on its own scale, by all that take images, or refused by name."""

import struct
import zlib

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from PIL import Image

from diffusers_ext import NoiseDiffusionPipeline, load_images
from diffusers_ext.data.reading import pixels_of, read_images, unit_range
from diffusers_ext.methods.sda.pipeline import to_tensor

RAMP = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
EIGHT = (RAMP // 257).astype(np.uint8)


def grey(image):
    return read_images(image, "image", 1)[0][0].numpy()


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
def test_sixteen_bits(mode):
    order = ">u2" if mode == "I;16B" else "<u2"
    image = Image.frombytes(mode, (8, 8), RAMP.astype(order).tobytes())
    np.testing.assert_allclose(grey(image), RAMP / 65535, atol=1e-7)
    np.testing.assert_allclose(read_images(image, "image", 3)[0], np.stack([RAMP / 65535] * 3), atol=1e-7)


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_sixteen_bits_in_files(tmp_path, suffix):
    """PGM of 16 bits is mode "I" in Pillow, which says of other files nothing of their range."""
    image = Image.fromarray(RAMP)
    if suffix == "pgm":
        header = b"P5 8 8 65535\n"
        (tmp_path / "a.pgm").write_bytes(header + RAMP.astype(">u2").tobytes())
    else:
        image.save(tmp_path / f"a.{suffix}")
    with Image.open(tmp_path / f"a.{suffix}") as opened:
        np.testing.assert_allclose(grey(opened), RAMP / 65535, atol=1e-7)
    data = load_images(train_data_dir=str(tmp_path), resolution=8, channels=1)
    expected = torch.from_numpy((RAMP / 257).round() / 127.5 - 1).float()[None]
    torch.testing.assert_close(data[0]["pixel_values"], expected, atol=1e-6, rtol=0)


def chunk(kind, data):
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def test_sixteen_bit_colours_are_refused(tmp_path):
    """Pillow would keep the upper half of them, in silence."""
    colours = np.random.default_rng(0).integers(0, 65536, (4, 4, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in colours)
    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    message = "`image` must hold .*of 16-bit colours Pillow keeps 8 bits"
    with Image.open(tmp_path / "deep.png") as image, pytest.raises(ValueError, match=message):
        read_images(image, "image")
    found = read_images(colours.astype(np.uint16), "image")[0]
    np.testing.assert_allclose(found, colours.transpose(2, 0, 1) / 65535, atol=1e-7)


def test_floats_in_files_keep_their_precision(tmp_path):
    values = np.random.default_rng(0).random((8, 8), np.float32)
    Image.fromarray(values).save(tmp_path / "a.tiff")
    with Image.open(tmp_path / "a.tiff") as image:
        assert image.mode == "F"
        assert np.array_equal(grey(image), values)


def test_modes_of_eight_bits():
    plain = Image.fromarray(EIGHT)
    expected = EIGHT / 255
    of = {"La": "LA", "RGBa": "RGBA", "PA": "P"}  # modes that are reached from these only
    for mode in ("L", "LA", "La", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "HSV", "PA"):
        image = plain.convert(of.get(mode, "RGB")).convert(mode)
        np.testing.assert_allclose(grey(image), expected, atol=2 / 255, err_msg=mode)
    bits = Image.fromarray(EIGHT > 127)
    assert bits.mode == "1"
    assert np.array_equal(grey(bits), EIGHT > 127)
    palette = Image.fromarray(EIGHT).convert("P")
    np.testing.assert_allclose(grey(palette), expected, atol=1e-6)
    colours = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    found = read_images(Image.fromarray(colours), "image")[0]
    np.testing.assert_allclose(found, colours.transpose(2, 0, 1) / 255, atol=1e-7)


def test_transparency_is_white():
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 102))  # 40 % black on white
    np.testing.assert_allclose(grey(half), np.full((4, 4), 153 / 255), atol=1e-6)
    deep = Image.fromarray(RAMP)
    deep.info["transparency"] = int(RAMP[3, 3])
    expected = RAMP / 65535
    expected[3, 3] = 1
    np.testing.assert_allclose(grey(deep), expected, atol=1e-7)


def test_a_turned_photograph_is_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.fromarray(EIGHT[:4]).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        assert grey(image).shape == (8, 4)


def test_arrays_and_tensors():
    for values in (EIGHT, torch.from_numpy(EIGHT)[None]):
        np.testing.assert_allclose(grey(values), EIGHT / 255, atol=1e-7)
    for values in (RAMP, RAMP.astype(">u2"), RAMP / 65535, torch.from_numpy(RAMP)[None]):
        np.testing.assert_allclose(grey(values), RAMP / 65535, atol=1e-7)
    assert np.array_equal(grey(EIGHT > 127), EIGHT > 127)
    exact = read_images(EIGHT, "image", dtype=torch.float64)[0]
    assert torch.equal(exact[0], torch.from_numpy(EIGHT) / torch.tensor(255.0, dtype=torch.float64))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.fromarray(RAMP.astype(np.int32)), "`image` must hold images of a known range: pixels of mode 'I'"),
        (Image.fromarray(RAMP.astype(np.float32)), r"mode 'F' .* must lie in \[0, 1\], got values from 0 to 6.55"),
        (Image.new("LAB", (2, 2)), "mode 'LAB' cannot be converted"),
        (EIGHT.astype(np.int64), "`image` must hold uint8 or floats .*, got int64"),
        (EIGHT.astype(np.float32), r"`image` must lie in \[0, 1\], got values from 0 to 255"),
        (np.full((2, 2), np.nan), "`image` must be finite"),
        (np.zeros((0, 2)), "`image` must hold images of 1 channels"),
        (
            np.zeros((5, 4, 4)),
            r"`image` must hold images of 1 channels, the last axis of three or four, got .*5, 4, 4",
        ),
        (np.zeros(3), "`image` must hold arrays of shape"),
        (np.array([["a"]]), "`image` must hold uint8 or floats"),
        ([], "`image` must hold at least one image"),
    ],
)
def test_what_cannot_be_known_is_refused(image, message):
    with pytest.raises(ValueError, match=message):
        read_images(image, "image", 1)


def test_the_pipelines_and_the_data_agree(tmp_path):
    """The same deep image by every way in."""
    image = Image.fromarray(RAMP)
    network = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=2, layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    pipeline = NoiseDiffusionPipeline(network, DDIMScheduler())
    read = pipeline._read_pairs(image, image, 1, 2)[0]
    expected = torch.from_numpy(RAMP / 65535 * 2 - 1).float().expand(2, 1, 8, 8)
    torch.testing.assert_close(read, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(to_tensor(image, 8, 1), expected[:1], atol=1e-6, rtol=0)
    np.savez(tmp_path / "a.npz", images=RAMP[None])
    item = load_images(train_data_dir=str(tmp_path / "a.npz"), resolution=8, channels=1)[0]["pixel_values"]
    torch.testing.assert_close(item, expected[0], atol=1 / 255, rtol=0)


def test_pixels_and_ranges():
    assert pixels_of(Image.fromarray(EIGHT)).dtype == np.uint8  # no needless floats
    assert pixels_of(Image.fromarray(EIGHT).convert("CMYK")).shape == (8, 8, 3)
    assert unit_range(torch.tensor([0, 255], dtype=torch.uint8), "x").tolist() == [0.0, 1.0]
