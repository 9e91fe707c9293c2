"""The denoiser: its size and names, exact tiles, levels and patterns, dark shading, files."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from diffusers_ext import (
    CameraTruth,
    RawDenoisePipeline,
    RawUNet,
    decouple_dark_frames,
    pack_bayer,
    simulate_dark_frames,
    simulate_raw,
)

from .dng import write_dng


def pipeline(unet=None, dark=None, **levels):
    made = RawDenoisePipeline(unet or RawUNet(base_channels=2), dark, **levels)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def trained():
    """A network that does something, the same every time."""
    torch.manual_seed(0)
    unet = RawUNet(base_channels=2)
    nn.init.normal_(unet.conv10_1.weight)
    return unet.eval()


RAW = np.random.default_rng(0).integers(400, 3000, (320, 350)).astype(np.uint16)


def test_size_names_and_start_of_the_network():
    original = RawUNet(residual=False)
    assert sum(p.numel() for p in original.parameters()) == 7_760_484
    names = {name.split(".")[0] for name in original.state_dict()}
    assert names == {f"conv{i}_{j}" for i in range(1, 10) for j in (1, 2)} | {f"upv{i}" for i in (6, 7, 8, 9)} | {
        "conv10_1"
    }
    x = torch.randn(1, 4, 21, 30)
    assert torch.equal(RawUNet(base_channels=2)(x).sample, x)
    with pytest.raises(ValueError, match=r"`sample` must be \(batch, 4, height, width\)"):
        original(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="`out_channels` must be 4 as `in_channels` with `residual`"):
        RawUNet(out_channels=3)


def test_the_network_is_that_of_its_description():
    """The U-Net written down again, on its own weights by name."""
    torch.manual_seed(0)
    unet, f = RawUNet(base_channels=2, residual=False), nn.functional
    w = unet.state_dict()

    def conv(name, x):
        return f.leaky_relu(f.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], padding=1), 0.2)

    x = torch.randn(1, 4, 32, 48)
    levels, y = [], x
    for i in range(1, 6):
        y = conv(f"conv{i}_2", conv(f"conv{i}_1", y))
        levels.append(y)
        y = f.max_pool2d(y, 2)
    y = levels[4]
    for i in range(6, 10):
        up = f.conv_transpose2d(y, w[f"upv{i}.weight"], w[f"upv{i}.bias"], stride=2)
        y = conv(f"conv{i}_2", conv(f"conv{i}_1", torch.cat([up, levels[9 - i]], 1)))
    y = f.conv2d(y, w["conv10_1.weight"], w["conv10_1.bias"])
    torch.testing.assert_close(unet(x).sample, y, atol=1e-6, rtol=0)
    ours = RawUNet.from_original_state_dict({f"module.{name}": value for name, value in w.items()})
    assert torch.equal(ours(x).sample, unet(x).sample)
    with pytest.raises(ValueError, match="`state` must hold `conv1_1.weight`"):
        RawUNet.from_original_state_dict({})
    with pytest.raises(ValueError, match="`state` must hold the weights of the raw U-Net"):
        RawUNet.from_original_state_dict({name: w[name] for name in ("conv1_1.weight", "conv10_1.weight")})


def test_tiles_are_exact_and_their_margin_is_enough(trained):
    whole = pipeline(trained)(RAW, ratio=20.0).images[0]
    tiled = pipeline(trained)(RAW, ratio=20.0, tile=64).images[0]
    assert np.abs(whole - tiled).max() < 1e-2  # of DN up to hundreds of thousands
    assert np.abs(whole - (RAW - 512.0) * 20).max() > 100
    # No value depends on what is further away than the margin.
    x = torch.randn(1, 4, 288, 288, requires_grad=True)
    trained(x).sample[..., 144:160, 144:160].sum().backward()
    seen = x.grad.abs().sum((0, 1)).nonzero()
    assert seen.min() >= 144 - RawUNet.tile_margin
    assert seen.max() < 160 + RawUNet.tile_margin


def test_levels_ratio_and_pattern(trained):
    """By hand: black off, divided by the range, brightened, in the order of the pattern, and back."""
    found = pipeline(trained, white_level=4095, black_level=100)(RAW, ratio=3.0, pattern="GBRG").images[0]
    x = pack_bayer((torch.from_numpy(RAW.astype(np.float32)) - 100) / 3995, "GBRG")
    with torch.no_grad():
        y = trained(x[None] * 3).sample[0]
    torch.testing.assert_close(pack_bayer(torch.from_numpy(found), "GBRG"), y * 3995 + 100, atol=0.01, rtol=0)
    packed = pipeline(trained, white_level=4095, black_level=100)(RAW, ratio=3.0, pattern="GBRG", output_type="pt")
    torch.testing.assert_close(packed.images[0], y)
    both = pipeline(trained)([RAW, RAW[:64, :96]], ratio=3.0)
    assert [image.shape for image in both.images] == [(320, 350), (64, 96)]
    alone = pipeline(trained)(RAW[:64, :96], ratio=3.0, return_dict=False)[0][0]
    np.testing.assert_array_equal(both.images[1], alone)
    assert both.images[0].min() < 512  # what is below black is not cut


def test_dark_shading_and_bad_pixels_are_taken_off():
    truth = CameraTruth(64, 96, bad_pixels=0.005, shading=8.0)
    dark = decouple_dark_frames(simulate_dark_frames(truth, (400, 1600), 20), black_level=512, num_residuals=10)
    light = np.full((64, 96), 300.0)
    raw = simulate_raw(truth, light, 1600, np.random.default_rng(5))
    plain, corrected = (pipeline(dark=d)(raw, iso=1600).images[0] - 512 - light for d in (None, dark))
    expected = (truth.gain(1600) * 300 + truth.pixel_std(1600) ** 2) ** 0.5
    bad = truth.bad()
    assert plain[~bad].std() > 1.1 * expected
    assert corrected[~bad].std() == pytest.approx(expected, rel=0.05)
    assert np.abs(plain[bad]).mean() > 2 * expected
    assert np.abs(corrected[bad]).mean() < expected
    saved = pipeline(dark=dark)
    for call, message in (
        ({}, "`iso` must be given: the file does not say it"),
        ({"iso": 3200}, "`iso` must be within the calibrated range, 400 to 1600"),
    ):
        with pytest.raises(ValueError, match=message):
            saved(raw, **call)
    with pytest.raises(ValueError, match="`raw` must be of the dark frames' height and width"):
        saved(raw[:32], iso=400)


def test_saved_and_loaded(trained, tmp_path):
    dark = decouple_dark_frames(simulate_dark_frames(CameraTruth(64, 96), (400, 800), 2), num_residuals=5)
    for name, own in (("with", dark), ("without", None)):
        made = pipeline(trained, own, white_level=1023, black_level=64, pattern="BGGR")
        made.save_pretrained(tmp_path / name)
        loaded = RawDenoisePipeline.from_pretrained(tmp_path / name)
        loaded.set_progress_bar_config(disable=True)
        assert (loaded.dark is None) == (own is None)
        one, other = (p(RAW[:64, :96] // 4, iso=500, ratio=2.0).images[0] for p in (made, loaded))
        np.testing.assert_array_equal(one, other)


def test_files_say_what_they_know(trained, tmp_path):
    pytest.importorskip("rawpy")
    write_dng(tmp_path / "a.dng", RAW, "GRBG", iso=800, black=256, white=4095)
    made = pipeline(trained, white_level=16383)
    found = made(tmp_path / "a.dng", ratio=2.0).images[0]
    expected = made(RAW, ratio=2.0, black_level=256, white_level=4095, pattern="GRBG").images[0]
    np.testing.assert_array_equal(found, expected)
    picture = made(str(tmp_path / "a.dng"), ratio=2.0, output_type="pil").images[0]
    assert isinstance(picture, Image.Image)
    assert picture.size == (350, 320)
    assert np.asarray(picture).std() > 10


@pytest.mark.parametrize(
    ("raw", "call", "message"),
    [
        (RAW, {"ratio": 0.5}, "`ratio` must be a number >= 1"),
        (RAW, {"white_level": 500}, "`white_level` must be above black_level"),
        (RAW, {"pattern": "RGBW"}, "`pattern` must be one of"),
        (RAW, {"tile": 0}, "`tile` must be an integer >= 1"),
        (RAW, {"output_type": "np"}, "`output_type` must be one of"),
        (RAW[None], {}, r"`raw` must be numbers \(height, width\)"),
        (RAW[:31], {}, "`raw` must be .* even height and width"),
        (RAW * np.nan, {}, "`raw` must be finite"),
        ([], {}, "`raw` must be at least one image"),
    ],
)
def test_wrong_calls_are_refused(raw, call, message):
    with pytest.raises(ValueError, match=message):
        pipeline()(raw, **call)
