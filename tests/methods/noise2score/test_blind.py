"""Finding the noise's parameter, where the best one is known, and against the penalties written anew."""

import math

import numpy as np
import pytest
import torch

from diffusers_ext import (
    AdditiveGaussianNoise,
    GammaNoise,
    PoissonNoise,
    estimate_noise_parameter,
    posterior_mean,
)
from diffusers_ext.methods.noise2score.blind import total_variation

FLAT = torch.full((1, 1, 48, 48), 0.5, dtype=torch.float64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Counted:
    """A score that counts its calls."""

    def __init__(self, score):
        self.score, self.calls = score, 0

    def __call__(self, y):
        self.calls += 1
        return self.score(y)


@pytest.mark.parametrize("smoothing", [0.0, 0.05])
def test_gaussian_noise_is_found_with_one_call(smoothing):
    """With the score of one image, x is that image at the true sigma and has noise left at every other."""
    sigma = 0.1
    y = AdditiveGaussianNoise(sigma).corrupt(FLAT, seeded())
    score = Counted(lambda v: (FLAT - v) / (sigma**2 + smoothing**2))
    found = estimate_noise_parameter(y, score, "gaussian", (0.02, 0.2), smoothing)
    assert found.parameter == pytest.approx(sigma, abs=2e-4)
    assert score.calls == 1
    assert len(found.parameters) == len(found.penalties) == 50
    assert found.parameters[int(np.argmin(found.penalties))] == pytest.approx(sigma, abs=0.18 / 49)


@pytest.mark.parametrize("smoothing", [0.0, 0.04])
def test_gamma_noise_is_found_with_one_call(smoothing):
    k = 80.0
    y = GammaNoise(k).corrupt(FLAT, seeded())
    score = Counted(lambda v: k * (1 - v.exp() / FLAT) / (1 + k * smoothing**2))
    found = estimate_noise_parameter(y, score, "gamma", (40, 120), smoothing, penalty=lambda x, y: total_variation(x))
    assert found.parameter == pytest.approx(k, abs=0.2)
    assert score.calls == 1


def tv(x):
    return np.sqrt(np.diff(x, axis=0) ** 2 + 1e-12).mean() + np.sqrt(np.diff(x, axis=1) ** 2 + 1e-12).mean()


def written_anew(family, x, y):
    inside = x > 0
    if family == "gaussian":
        return tv(x)
    if family == "poisson":
        return 0.1 * tv(np.maximum(x, 0)) + (x[inside] - y[inside] * np.log(x[inside])).mean()
    ratio = y[inside] / x[inside]
    return tv(x) + np.log(x[inside]).mean() + ratio.mean() + (ratio**2).mean()


@pytest.mark.parametrize(
    ("family", "blind_range", "count"),
    [("gaussian", (0.02, 0.2), 50), ("poisson", (0.005, 0.1), 100), ("gamma", (40, 120), 80)],
)
def test_the_penalties_are_the_paper_s(family, blind_range, count):
    clean = 0.2 + 0.6 * torch.rand(1, 1, 12, 12, generator=seeded(), dtype=torch.float64)
    make = {"gaussian": AdditiveGaussianNoise, "poisson": PoissonNoise, "gamma": GammaNoise}[family]
    y = make({"gaussian": 0.1, "poisson": 0.02, "gamma": 80.0}[family]).corrupt(clean, seeded(1))

    def score(v):
        return 5 * torch.sin(v) - 6 if family == "gaussian" else 0.1 * torch.sin(v)

    found = estimate_noise_parameter(y, score, family, blind_range, 0.01)
    grid = np.linspace(*blind_range, count)
    expected = [
        written_anew(family, posterior_mean(y, score, make(p), 0.01)[0, 0].numpy(), y[0, 0].numpy()) for p in grid
    ]
    np.testing.assert_allclose(found.penalties, expected, rtol=1e-9)
    np.testing.assert_allclose(found.parameters, grid)
    around = grid[max(np.argmin(expected) - 1, 0)], grid[min(np.argmin(expected) + 1, count - 1)]
    assert around[0] <= found.parameter <= around[1]
    found_x = posterior_mean(y, score, make(found.parameter), 0.01)[0, 0].numpy()
    assert written_anew(family, found_x, y[0, 0].numpy()) <= min(expected) + 1e-12


@pytest.mark.parametrize(
    ("family", "blind_range", "message"),
    [
        ("exponential", (1, 2), "`noise` must be one of .* without its parameter, got 'exponential'"),
        ("gaussian", (0.2, 0.1), r"`blind_range` must be two rising numbers > 0, got \(0.2, 0.1\)"),
        ("gaussian", 0.1, "`blind_range` must be two finite numbers, got 0.1"),
        ("gaussian", (0.1, math.inf), "`blind_range` must be two finite numbers"),
        ("gamma", (0.5, 2), "`shape` must be a finite number > 1, got 0.5"),
    ],
)
def test_bad_input_is_refused(family, blind_range, message):
    with pytest.raises(ValueError, match=message):
        estimate_noise_parameter(FLAT, torch.cos, family, blind_range)
