"""Raw files: what was written is read, mosaics that are none are refused."""

import numpy as np
import pytest
from PIL import Image

from diffusers_ext import read_raw
from diffusers_ext.methods.pnnp.bayer import PATTERNS
from diffusers_ext.methods.pnnp.raw_files import frames_by_iso, raw_files, read_frames

from .dng import write_dng

pytest.importorskip("rawpy")

PIXELS = np.random.default_rng(0).integers(300, 16383, (32, 48)).astype(np.uint16)


@pytest.mark.parametrize("pattern", list(PATTERNS))
def test_a_dng_comes_back(pattern, tmp_path):
    write_dng(tmp_path / "a.dng", PIXELS, pattern, iso=1600, celsius=21)
    image = read_raw(tmp_path / "a.dng")
    assert np.array_equal(image.pixels, PIXELS)
    assert (image.pattern, image.black_level, image.white_level) == (pattern, 512, 16383)
    assert (image.iso, image.exposure, image.temperature) == (1600, pytest.approx(0.1), 21)
    assert image.white_balance == pytest.approx((2, 1, 2))
    assert image.color_matrix.shape == (3, 3)


def test_a_dng_of_another_writer(tmp_path):
    """pidng, which packs nothing, writes RGGB."""
    pidng = pytest.importorskip("pidng.core")
    from pidng.defs import CFAPattern, DNGVersion, Orientation, PhotometricInterpretation, PreviewColorSpace
    from pidng.dng import DNGTags, Tag

    tags = DNGTags()
    height, width = PIXELS.shape
    for tag, value in (
        (Tag.ImageWidth, width), (Tag.ImageLength, height), (Tag.TileWidth, width), (Tag.TileLength, height),
        (Tag.Orientation, Orientation.Horizontal),
        (Tag.PhotometricInterpretation, PhotometricInterpretation.Color_Filter_Array),
        (Tag.SamplesPerPixel, 1), (Tag.BitsPerSample, 16), (Tag.CFARepeatPatternDim, [2, 2]),
        (Tag.CFAPattern, CFAPattern.RGGB), (Tag.BlackLevel, 512), (Tag.WhiteLevel, 16383),
        (Tag.ColorMatrix1, [[1, 1], [0, 1], [0, 1], [0, 1], [1, 1], [0, 1], [0, 1], [0, 1], [1, 1]]),
        (Tag.AsShotNeutral, [[1, 1]] * 3), (Tag.Make, "None"), (Tag.Model, "None"), (Tag.DNGVersion, DNGVersion.V1_4),
        (Tag.DNGBackwardVersion, DNGVersion.V1_2), (Tag.PreviewColorSpace, PreviewColorSpace.sRGB),
    ):  # fmt: skip
        tags.set(tag, value)
    writer = pidng.RAW2DNG()
    writer.options(tags, path=f"{tmp_path}/", compress=False)
    writer.convert(PIXELS, filename="b")
    image = read_raw(tmp_path / "b.dng")
    assert np.array_equal(image.pixels, PIXELS)
    assert (image.pattern, image.black_level, image.white_level) == ("RGGB", 512, 16383)


def test_arrays_and_tiffs(tmp_path):
    np.save(tmp_path / "a.npy", PIXELS)
    Image.fromarray(PIXELS).save(tmp_path / "b.tif")
    for name in ("a.npy", "b.tif"):
        image = read_raw(tmp_path / name)
        assert np.array_equal(image.pixels, PIXELS)
        assert (image.pattern, image.iso, image.white_level) == (None, None, None)


def test_other_sensors_and_files_are_refused(tmp_path):
    write_dng(tmp_path / "x.dng", PIXELS, "GGRGGBGGBGGRBRGRBGGGBGGRGGRGGBRBGBRG")
    write_dng(tmp_path / "l.dng", np.stack([PIXELS] * 3, -1), None)
    write_dng(tmp_path / "m.dng", PIXELS, None)
    for name in ("x.dng", "l.dng", "m.dng"):
        with pytest.raises(ValueError, match="`raw` must be of a sensor with a 2x2 Bayer pattern, got .*are not read"):
            read_raw(tmp_path / name)
    (tmp_path / "broken.nef").write_bytes(b"II*\0 nothing")
    with pytest.raises(ValueError, match="`raw` must be a file that rawpy can read"):
        read_raw(tmp_path / "broken.nef")
    (tmp_path / "broken.npy").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="`raw` must be"):
        read_raw(tmp_path / "broken.npy")
    np.save(tmp_path / "rgb.npy", np.zeros((4, 4, 3)))
    with pytest.raises(ValueError, match=r"`raw` must be numbers \(height, width\)"):
        read_raw(tmp_path / "rgb.npy")
    for name, message in (("none.npy", "a file that exists"), ("photo.jpg", "a file of one of the kinds")):
        (tmp_path / "photo.jpg").touch()
        with pytest.raises(ValueError, match=f"`raw` must be {message}"):
            read_raw(tmp_path / name)


def test_frames_are_sorted_by_iso(tmp_path):
    for name in ("400", "ISO800"):
        (tmp_path / "named" / name).mkdir(parents=True)
        np.save(tmp_path / "named" / name / "a.npy", PIXELS)
    assert list(frames_by_iso(tmp_path / "named", "darks")) == [400, 800]
    (tmp_path / "mixed").mkdir()
    for i, iso in enumerate((1600, 200, 1600)):
        write_dng(tmp_path / "mixed" / f"{i}.dng", PIXELS, iso=iso)
    found = frames_by_iso(tmp_path / "mixed", "darks")
    assert {iso: [path.stem for path in paths] for iso, paths in found.items()} == {200: ["1"], 1600: ["0", "2"]}
    (tmp_path / "plain").mkdir()
    np.save(tmp_path / "plain" / "a.npy", PIXELS)
    with pytest.raises(ValueError, match="`darks` must be in folders that are named by their ISO"):
        frames_by_iso(tmp_path / "plain", "darks")
    with pytest.raises(ValueError, match="`darks` must be an existing folder"):
        raw_files(tmp_path / "none", "darks")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="`darks` must be a folder with raw files"):
        raw_files(tmp_path / "empty", "darks")


@pytest.mark.parametrize(("what", "change"), [("exposure", {"seconds": (1, 4)}), ("temperature", {"celsius": 40})])
def test_frames_of_other_conditions_are_told(tmp_path, what, change):
    paths = [tmp_path / f"{i}.dng" for i in range(4)]
    for i, path in enumerate(paths):
        write_dng(path, PIXELS, **{"celsius": 20, **(change if i >= 2 else {})})
    with pytest.warns(UserWarning, match=f"frames differ in {what}, .*dark shading depends on it") as found:
        assert len(list(read_frames(paths, []))) == 4
    assert len(found) == 1
