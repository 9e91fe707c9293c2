"""Kernels against scikit-learn's formulas, and the squared MMD against closed forms."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from diffusers_ext import kernel_distance, mmd2, polynomial_kernel, rational_quadratic_kernel, rbf_kernel


def normal(n, d, seed, mean=0.0):
    return mean + torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_kernels_equal_their_formulas():
    x, y = normal(7, 5, 0), normal(9, 5, 1)
    squared = torch.tensor(cdist(x, y, "sqeuclidean"))
    expected = {
        polynomial_kernel: (x @ y.T / 5 + 1) ** 3,
        rbf_kernel: torch.exp(-squared / 5),
        rational_quadratic_kernel: sum((1 + squared / (2 * s)) ** -s for s in (0.2, 0.5, 1, 2, 5)),
    }
    for kernel, value in expected.items():
        torch.testing.assert_close(kernel(x, y), value, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(polynomial_kernel(x, y, 1, 0.5, 0.0), 0.5 * x @ y.T, atol=1e-12, rtol=0)


def test_kernels_equal_scikit_learn():
    pairwise = pytest.importorskip("sklearn.metrics.pairwise")
    x, y = normal(7, 5, 0), normal(9, 5, 1)
    for ours, theirs in (
        (polynomial_kernel(x, y), pairwise.polynomial_kernel(x, y)),
        (polynomial_kernel(x, y, 2, 0.3, 2.0), pairwise.polynomial_kernel(x, y, 2, 0.3, 2.0)),
        (rbf_kernel(x, y), pairwise.rbf_kernel(x, y)),
        (rbf_kernel(x, y, 0.7), pairwise.rbf_kernel(x, y, 0.7)),
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-10)


def test_degree_one_of_a_set_with_itself_has_a_closed_form():
    x, m, d = normal(12, 4, 2), 12, 4
    s, q = x.sum(0).square().sum(), x.square().sum()
    expected = 2 * (s - q) / (d * m * (m - 1)) - 2 * s / (d * m**2)  # constants of the kernel cancel
    assert mmd2(x, x, degree=1).item() == pytest.approx(expected.item(), abs=1e-10)


def test_degree_one_of_gaussians_is_the_squared_distance_of_means():
    d, m = 6, 500
    shift = torch.linspace(-1, 1, d, dtype=torch.float64)
    values = [mmd2(normal(m, d, 2 * i), normal(m, d, 2 * i + 1) + shift, degree=1).item() for i in range(30)]
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    assert abs(np.mean(values) - shift.square().sum().item() / d) < 5 * error


@pytest.mark.parametrize("kernel", ["polynomial", "rbf", "rational_quadratic"])
def test_the_mean_over_pairs_of_one_law_is_zero(kernel):
    values = [mmd2(normal(20, 3, 2 * i), normal(30, 3, 2 * i + 1), kernel).item() for i in range(500)]
    assert abs(np.mean(values)) < 4 * np.std(values, ddof=1) / math.sqrt(500)
    assert min(values) < 0  # not clamped


def test_rbf_between_shifted_gaussians_has_a_closed_form():
    d, g, m = 3, 0.2, 3000
    mu = torch.tensor([1.4, -0.9, 0.6], dtype=torch.float64)
    scale = 1 + 4 * g
    expected = 2 * scale ** (-d / 2) * (1 - math.exp(-g * mu.square().sum().item() / scale))
    assert mmd2(normal(m, d, 0), normal(m, d, 1) + mu, "rbf", gamma=g).item() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("unbiased", [True, False])
def test_unequal_sizes_equal_the_double_loop(unbiased):
    x, y = normal(5, 3, 0), normal(8, 3, 1)
    k = lambda a, b: math.exp(-0.4 * float((a - b).square().sum()))  # noqa: E731

    def within(z):
        pairs = [k(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j or not unbiased]
        return sum(pairs) / len(pairs)

    expected = within(x) + within(y) - 2 * sum(k(a, b) for a in x for b in y) / 40
    assert mmd2(x, y, "rbf", unbiased, gamma=0.4).item() == pytest.approx(expected, abs=1e-12)


def test_it_is_the_kernel_distance_with_gradients_in_the_features_dtype():
    x, y = normal(20, 4, 0).float().requires_grad_(), normal(20, 4, 1).float()
    value = mmd2(x, y)
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(kernel_distance(x.detach(), y), abs=1e-12)
    (gradient,) = torch.autograd.grad(value, x)
    assert gradient.dtype == torch.float32
    step = torch.zeros_like(x)
    step[3, 2] = 1e-3
    with torch.no_grad():
        expected = (mmd2(x + step, y) - mmd2(x - step, y)).item() / 2e-3
    assert gradient[3, 2].item() == pytest.approx(expected, rel=1e-3)


def test_blocks_change_nothing(monkeypatch):
    x, y = normal(23, 3, 0), normal(17, 3, 1)
    whole = mmd2(x, y).item()
    monkeypatch.setattr("diffusers_ext.metrics.kernel.BLOCK", 5)
    assert mmd2(x, y).item() == pytest.approx(whole, abs=1e-13)


def test_any_function_may_be_the_kernel():
    x, y = normal(6, 3, 0), normal(7, 3, 1)
    assert mmd2(x, y, lambda a, b: (a @ b.T / 3 + 1) ** 3).item() == pytest.approx(mmd2(x, y).item(), abs=1e-14)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: mmd2(x[:1], x), r"`first` must have the shape \(samples >= 2, features\), got \(1, 3\)"),
        (lambda x: mmd2(x, x[:, :2]), "`second` must have 3 features as `first`, got 2"),
        (lambda x: mmd2(x, x * math.inf), "`second` must be finite"),
        (lambda x: mmd2(x, x, "cosine"), "`kernel` must be one of .* got 'cosine'"),
        (lambda x: mmd2(x, x, degree=0), "`degree` must be an integer >= 1, got 0"),
        (lambda x: rational_quadratic_kernel(x, x, ()), "`scales` must be numbers > 0"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(normal(5, 3, 0))
