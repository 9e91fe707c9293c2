"""Mosaics: exact for every pattern, and which planes share rows and columns of the sensor."""

import pytest
import torch

from diffusers_ext import develop, pack_bayer, unpack_bayer
from diffusers_ext.methods.pnnp.bayer import PATTERNS
from diffusers_ext.methods.pnnp.develop import demosaic


@pytest.mark.parametrize("pattern", list(PATTERNS))
def test_planes_are_the_colours_and_come_back(pattern):
    raw = torch.arange(2 * 6 * 8).reshape(2, 6, 8)
    packed = pack_bayer(raw, pattern)
    assert packed.shape == (2, 4, 3, 4)
    assert torch.equal(unpack_bayer(packed, pattern), raw)
    for plane, colour in enumerate("RGBG"):
        place = int(packed[0, plane, 0, 0])
        assert pattern[2 * (place // 8) + place % 8] == colour
    rows, columns = raw[0] // 8, raw[0] % 8
    for a, b in ((0, 1), (2, 3)):
        assert torch.equal(pack_bayer(rows, pattern)[a], pack_bayer(rows, pattern)[b])
    for a, b in ((0, 3), (1, 2)):
        assert torch.equal(pack_bayer(columns, pattern)[a], pack_bayer(columns, pattern)[b])


def test_what_is_no_mosaic_is_refused():
    for shape in ((3, 4), (4, 3), (4,), (0, 4)):
        with pytest.raises(ValueError, match="`raw` must be .* even height and width, got"):
            pack_bayer(torch.zeros(shape))
    with pytest.raises(ValueError, match="`pattern` must be one of .*got 'RGBG'"):
        pack_bayer(torch.zeros(4, 4), "RGBG")
    with pytest.raises(ValueError, match="`pattern` must be one of"):
        unpack_bayer(torch.zeros(4, 4, 4), "X")
    with pytest.raises(ValueError, match=r"`packed` must be \(..., 4, height, width\)"):
        unpack_bayer(torch.zeros(3, 4, 4))


@pytest.mark.parametrize("pattern", list(PATTERNS))
def test_demosaicing_keeps_even_colours_and_straight_ramps(pattern):
    colours = torch.tensor([0.2, 0.5, 0.7])
    planes = colours[[0, 1, 2, 1]].reshape(4, 1, 1).expand(4, 5, 6)
    found = demosaic(unpack_bayer(planes, pattern), pattern)
    torch.testing.assert_close(found, colours.reshape(3, 1, 1).expand(3, 10, 12), atol=1e-6, rtol=0)
    ramp = torch.arange(12.0).expand(10, 12) + 3 * torch.arange(10.0)[:, None]
    found = demosaic(ramp, pattern)
    torch.testing.assert_close(found[:, 1:-1, 1:-1], ramp.expand(3, 10, 12)[:, 1:-1, 1:-1], atol=1e-5, rtol=0)


def test_development_is_srgb():
    """The curve of IEC 61966-2-1 at values on both sides of its corner; white balance and matrix come before it."""
    planes = torch.tensor([0.002, 0.2, 0.5, 0.2]).reshape(4, 1, 1).expand(4, 4, 4)
    pixel = develop(unpack_bayer(planes)).getpixel((4, 4))
    expected = [12.92 * 0.002, 1.055 * 0.2 ** (1 / 2.4) - 0.055, 1.055 * 0.5 ** (1 / 2.4) - 0.055]
    assert pixel == tuple(round(255 * value) for value in expected)
    swapped = torch.tensor([[0.0, 0, 1], [0, 1, 0], [1, 0, 0]]).numpy()
    pixel = develop(unpack_bayer(planes), white_balance=(100.0, 1.0, 0.4), color_matrix=swapped).getpixel((4, 4))
    grey = round(255 * expected[1])
    assert pixel == (grey, grey, grey)
