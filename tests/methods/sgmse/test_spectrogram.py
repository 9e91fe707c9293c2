"""The representation against its definition, sample by sample."""

import cmath
import math

import numpy as np
import pytest
import torch

from diffusers_ext import Spectrogram


def test_compression():
    given = torch.tensor([4, -9j, 0, 3 - 4j], dtype=torch.complex128)
    spectrogram = Spectrogram()
    found = spectrogram.compress(given)
    expected = torch.tensor([0.3, -0.45j, 0, 0.15 * (3 - 4j) / math.sqrt(5)], dtype=torch.complex128)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(spectrogram.expand(found), given, atol=1e-12, rtol=0)
    wide = Spectrogram(48000, 1534, 384, 0.667, 0.065)
    assert wide.compress(given)[0].real.item() == pytest.approx(0.163865, abs=1e-6)
    assert wide.bins == 768


def test_transform_by_hand():
    """A frame is the DFT of the wave around its centre, reflected at the ends, times a periodic Hann window."""
    spectrogram = Spectrogram(8000, n_fft=8, hop_length=3, exponent=1.0, factor=1.0)
    wave = torch.randn(2, 2, 17, dtype=torch.float64)
    found = spectrogram.encode(wave)
    assert found.shape == (2, 2, 5, spectrogram.frames(17)) == (2, 2, 5, 6)
    for frame, k in ((0, 1), (3, 4), (5, 2)):
        total = 0
        for i in range(8):
            n = abs(frame * 3 - 4 + i)
            n = n if n <= 16 else 32 - n
            window = 0.5 - 0.5 * math.cos(2 * math.pi * i / 8)
            total += window * wave[1, 0, n].item() * cmath.exp(-2j * math.pi * k * i / 8)
        assert found[1, 0, k, frame].item() == pytest.approx(total, abs=1e-12)


@pytest.mark.parametrize("length", [1, 2, 255, 256, 5000])
def test_there_and_back(length):
    wave = torch.randn(3, length, dtype=torch.float64)
    spectrogram = Spectrogram()
    coefficients = spectrogram.encode(wave)
    assert coefficients.shape == (3, 256, spectrogram.frames(length))
    torch.testing.assert_close(spectrogram.decode(coefficients, length), wave, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    "wrong", [{"sample_rate": 0}, {"n_fft": 511}, {"hop_length": 256}, {"exponent": 0.0}, {"factor": -1.0}]
)
def test_wrong_arguments(wrong):
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` must be"):
        Spectrogram(**wrong)


def test_picture_of_a_tone():
    """A sine in the middle of a bin is a bright line at its height."""
    t = torch.arange(4000) / 8000
    image = np.asarray(Spectrogram(8000, 62, 16).image(torch.sin(2 * torch.pi * 8 * 8000 / 62 * t)))
    assert image.shape == (32, 251)
    inner = image[:, 3:-3].astype(float)  # at the ends the sine is reflected
    level = 255 * (0.15 * (62 / 4) ** 0.5) ** 0.5  # half the sum of the window, in the compressed scale
    assert inner[31 - 8] == pytest.approx(level, abs=1.5)
    assert np.delete(inner, [30 - 8, 31 - 8, 32 - 8], axis=0).max() < 60
