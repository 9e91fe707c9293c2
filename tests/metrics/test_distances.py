"""Distances between Gaussians in closed form, and the kernel estimator term by term."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from diffusers_ext import GaussianStatistics, frechet_distance, kernel_distance


def gaussian(seed, dimension, rank=None):
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(dimension, rank or dimension + 2))
    return GaussianStatistics(torch.tensor(rng.normal(size=dimension)), torch.tensor(factor @ factor.T), 100)


@pytest.mark.parametrize("seed", range(3))
def test_frechet_of_non_commuting_gaussians_equals_the_matrix_root(seed):
    a, b = gaussian(seed, 5), gaussian(seed + 10, 5)
    root = sqrtm(a.covariance.numpy() @ b.covariance.numpy()).real
    expected = (a.mean - b.mean).square().sum().item() + np.trace((a.covariance + b.covariance).numpy() - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-8)


def test_frechet_closed_forms():
    one, four = torch.ones(3, dtype=torch.float64), torch.full((3,), 4.0, dtype=torch.float64)
    a = GaussianStatistics(0 * one, torch.diag(one), 10)
    b = GaussianStatistics(2 * one, torch.diag(four), 10)
    assert frechet_distance(a, b) == pytest.approx(3 * 4 + 3 * (1 - 2) ** 2, rel=1e-12)
    singular = gaussian(0, 6, rank=2)
    assert frechet_distance(singular, singular) == pytest.approx(0, abs=1e-6)
    point = GaussianStatistics(0 * one, 0 * torch.diag(one), 10)
    assert frechet_distance(point, b) == pytest.approx(12 + 12, rel=1e-12)


def test_frechet_of_samples_uses_their_moments():
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    statistics = GaussianStatistics.from_features(x)
    np.testing.assert_allclose(statistics.covariance, np.cov(x.double().numpy().T), atol=1e-12)
    assert frechet_distance(x, statistics) == pytest.approx(0, abs=1e-9)


def test_kernel_distance_equals_the_double_loop():
    x, y = torch.randn(2, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    k = lambda a, b: (a @ b / 3 + 1) ** 3  # noqa: E731
    pairs = [(i, j) for i in range(6) for j in range(6)]
    expected = sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in pairs if i != j) / 30
    expected -= 2 * sum(k(x[i], y[j]) for i, j in pairs) / 36
    assert kernel_distance(x, y) == pytest.approx(expected.item(), abs=1e-12)


def test_kernel_distance_is_unbiased_under_the_null():
    generator = torch.Generator().manual_seed(0)
    values = [kernel_distance(*torch.randn(2, 40, 4, generator=generator)) for _ in range(200)]
    assert abs(np.mean(values)) < 4 * np.std(values) / 200**0.5
    assert min(values) < 0


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_refuses_bad_features(distance):
    x = torch.randn(5, 3)
    with pytest.raises(ValueError, match=r"shape \(samples >= 2, features\), got \(1, 3\)"):
        distance(x[:1], x)
    with pytest.raises(ValueError, match="must be finite"):
        distance(x, torch.full((5, 3), torch.nan))
    with pytest.raises(ValueError, match="`second` must have 3 features as `first`, got 2"):
        distance(x, x[:, :2])
