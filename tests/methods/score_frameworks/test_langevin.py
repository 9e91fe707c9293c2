"""Levels and step of annealed Langevin dynamics."""

import math

import pytest
import torch

from diffusers_ext import geometric_sigmas, langevin_step_size, largest_distance
from diffusers_ext.methods.score_frameworks.langevin import _ratio


@pytest.mark.parametrize(("dimension", "ratio"), [(64, 1.3608498), (784, 1.0819717), (3072, 1.0397964)])
def test_ratio_of_levels(dimension, ratio):
    assert _ratio(dimension, 0.5) == pytest.approx(ratio, abs=6e-8)
    sigmas = geometric_sigmas(50.0, 0.01, dimension=dimension)
    assert len(sigmas) == 1 + math.ceil(math.log(5000) / math.log(ratio))
    ratios = sigmas[:-1] / sigmas[1:]
    assert ratios.max() - ratios.min() < 1e-12
    assert 1 < ratios[0] <= ratio
    assert (sigmas[0].item(), sigmas[-1].item()) == pytest.approx((50.0, 0.01), rel=1e-12)


def test_step_size():
    assert langevin_step_size(geometric_sigmas(50.0, 0.01, 232), 5) == pytest.approx(6.1840e-6, abs=6e-11)
    sigmas = geometric_sigmas(10.0, 0.05, dimension=64)
    assert len(sigmas) == 19
    assert langevin_step_size(sigmas, 5) == pytest.approx(5.880442e-4, abs=6e-11)


def test_largest_distance():
    images = torch.zeros(4, 1, 2, 2)
    images[1, 0, 0, 0], images[2, 0, 1, 1], images[3] = 3.0, 4.0, 0.5
    assert largest_distance(images, batch_size=3) == pytest.approx(5.0, rel=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: geometric_sigmas(1.0, 0.0, 3), "`sigma_min` must be a number above 0, got 0.0"),
        (lambda: geometric_sigmas(1.0, 1.0, 3), "`sigma_max` must be a number above `sigma_min`, 1.0, got 1.0"),
        (lambda: geometric_sigmas(1.0, 0.1, 1), "`num_levels` must be an integer >= 2, got 1"),
        (lambda: geometric_sigmas(1.0, 0.1), "`num_levels` or `dimension` must be given"),
        (lambda: geometric_sigmas(1.0, 0.1, dimension=64, overlap=1.0), r"`overlap` must be in \(0, 1\)"),
        (lambda: geometric_sigmas(1.0, 0.1, dimension=64, overlap=0.0), r"`overlap` must be in \(0, 1\)"),
        (lambda: langevin_step_size([1.0, 2.0], 5), "`sigmas` must be two falling numbers"),
        (lambda: langevin_step_size([2.0, 1.0], 0), "`steps_per_level` must be an integer >= 1"),
        (lambda: largest_distance(torch.full((3, 2), math.nan)), "`images` must be two or more, .* of finite floats"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
