"""Corruptions against hand-made values, and what all of them promise."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from diffusers_ext import corrupt
from diffusers_ext.data.corruptions import _TABLE, CORRUPTIONS, EXTRA_CORRUPTIONS
from diffusers_ext.data.digits import DIGITS

DIGIT = np.load(DIGITS)["images"][:30]
FLAT = np.full((224, 224), 128, np.uint8)


def test_the_fifteen():
    assert len(CORRUPTIONS) == 15
    assert set(EXTRA_CORRUPTIONS) == {"speckle_noise", "gaussian_blur"}
    assert CORRUPTIONS[0] == "gaussian_noise"
    assert CORRUPTIONS[-1] == "jpeg_compression"


@pytest.mark.parametrize("severity", [1, 3, 5])
@pytest.mark.parametrize("name", _TABLE)
def test_shape_seed_and_effect(name, severity):
    for image in (DIGIT[0], np.stack([DIGIT[0], DIGIT[1], DIGIT[2]], -1)):
        changed = corrupt(image, name, severity, seed=1)
        assert changed.shape == image.shape
        assert changed.dtype == np.uint8
        assert np.array_equal(changed, corrupt(image, name, severity, seed=1))
        small = name in ("glass_blur", "gaussian_blur", "motion_blur", "defocus_blur") and severity == 1
        assert small or np.abs(changed.astype(int) - image).mean() > 0.5


@pytest.mark.parametrize("name", ["gaussian_noise", "shot_noise", "impulse_noise", "snow", "fog", "elastic_transform"])
def test_another_seed_is_another_corruption(name):
    assert not np.array_equal(corrupt(DIGIT[0], name, 3, seed=1), corrupt(DIGIT[0], name, 3, seed=2))


@pytest.mark.parametrize(("severity", "sigma"), [(1, 0.08), (2, 0.12), (3, 0.18)])
def test_noise_has_its_deviation(severity, sigma):
    noise = corrupt(FLAT, "gaussian_noise", severity).astype(float) / 255
    assert noise.std() == pytest.approx(sigma, rel=0.02)
    assert noise.mean() == pytest.approx(128 / 255, abs=0.005)


def test_shot_noise_is_poisson():
    noise = corrupt(FLAT, "shot_noise", 1) / 255
    assert noise.var() == pytest.approx(128 / 255 / 60, rel=0.03)


def test_impulses_are_black_or_white():
    noise = corrupt(FLAT, "impulse_noise", 5)
    assert (noise != 128).mean() == pytest.approx(0.27, abs=0.01)
    assert set(np.unique(noise)) == {0, 128, 255}


def test_contrast_by_hand():
    image = np.array([[0, 200], [100, 100]], np.uint8)
    assert corrupt(image, "contrast", 3).tolist() == [[80, 120], [100, 100]]


def test_brightness_keeps_hue():
    image = np.array([[[50, 100, 25], [0, 0, 0]]], np.uint8)
    bright = corrupt(image, "brightness", 1)
    assert bright[0, 0].tolist() == [62, 125, 31]  # 100 + 25.5 is 125, the others in proportion
    assert bright[0, 1].tolist() == [25, 25, 25]


def test_defocus_is_a_disk():
    point = np.zeros((224, 224), np.uint8)
    point[112, 112] = 255
    spread = corrupt(point, "defocus_blur", 1)
    assert (spread > 0).sum() == 29  # lattice points within radius 3
    assert spread.max() == 255 // 29


def test_pixelate_by_hand():
    image = np.repeat(np.repeat(np.array([[0, 100], [200, 40]], np.uint8), 2, 0), 2, 1)
    assert np.array_equal(corrupt(image, "pixelate", 2), image)  # blocks of two stay what they are
    stripes = np.tile(np.array([0, 200], np.uint8), (4, 2))
    assert (corrupt(stripes, "pixelate", 2) == 100).all()


def test_motion_blur_keeps_the_mean_and_glass_blur_the_pixels():
    image = ndimage.gaussian_filter(np.random.default_rng(0).random((64, 64)), 4)
    image = ((image - image.min()) / np.ptp(image) * 255).astype(np.uint8)
    for name in ("motion_blur", "glass_blur", "zoom_blur"):
        assert corrupt(image, name, 1).mean() == pytest.approx(image.mean(), abs=3)


def test_every_kind_of_image_is_taken():
    colour = np.stack([DIGIT[0], DIGIT[1], DIGIT[2]], -1)
    for array in (DIGIT[0], colour):
        expected = corrupt(array, "fog", 3, seed=1)
        tensor = torch.from_numpy(np.atleast_3d(array).copy()).permute(2, 0, 1)
        same = [Image.fromarray(array), tensor, array / 255, tensor.double() / 255]
        if array.ndim == 2:
            same += [Image.fromarray(array.astype(np.uint16) * 257), array.astype(np.uint16) * 257]
        for image in same:
            assert np.array_equal(corrupt(image, "fog", 3, seed=1), expected)


def test_lengths_scale_with_small_images():
    point = np.zeros((28, 28), np.uint8)
    point[14, 14] = 255
    assert (corrupt(point, "defocus_blur", 5) > 0).sum() <= 25  # radius 10 / 8
    large = np.zeros((224, 224), np.uint8)
    large[107:118, 107:118] = 255
    assert (corrupt(large, "defocus_blur", 5) > 0).sum() >= 600  # the square widened by radius 10


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"name": "rain"}, "`name` must be one of"),
        ({"severity": 0}, "`severity` must be an integer from 1 to 5"),
        ({"severity": 6}, "`severity` must be an integer from 1 to 5"),
        ({"image": np.full((2, 2), 2.0)}, r"`image` must lie in \[0, 1\], got values from 2 to 2"),
        ({"image": np.zeros((2, 2, 4), np.uint8)}, "`image` must hold images of 1 or 3 channels"),
        ({"image": np.zeros((2, 2, 2, 3), np.uint8)}, "`image` must be one image, got 2"),
        ({"image": "photo.png"}, "`image` must hold PIL images, arrays or tensors, got str"),
    ],
)
def test_bad_input(changes, match):
    with pytest.raises(ValueError, match=match):
        corrupt(**{"image": FLAT, "name": "fog", "severity": 1, **changes})
