"""The distance cut: 0 for independent noise, its closed form for the nearest of k."""

import math

import pytest
import torch

from diffusers_ext import distance_cut, knn_sample


def test_cut_of_independent_noise_is_zero():
    torch.manual_seed(0)
    for dimension, batch in ((16, 200_000), (3072, 2000)):
        x = torch.randn(batch, dimension)
        # Standard deviation at most 1 / sqrt(2 D batch), and the closed form's error of about D^-2 / 8.
        bound = 4 / math.sqrt(2 * dimension * batch) + 0.2 / dimension**2
        assert distance_cut(x, torch.randn_like(x)).abs() < bound


def test_cut_of_the_nearest_of_k():
    # The squared distance falls by m_k standard deviations, m_8 = 1.424: here from 3840 by 1.424 * 96.
    x = torch.full((2000, 3072), 0.5)
    noise = knn_sample(x, 8, generator=torch.Generator().manual_seed(0))
    expected = 1 - math.sqrt(1 - 1.424 * 96 / 3840)
    assert distance_cut(x, noise).item() == pytest.approx(expected, rel=0.05)


def test_refuses_other_shapes():
    with pytest.raises(ValueError, match="`noise` must have the shape"):
        distance_cut(torch.randn(2, 3), torch.randn(3, 3))
