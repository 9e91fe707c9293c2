"""The formulas against closed forms of priors whose posterior means are known, in float64."""

import math

import pytest
import torch

from diffusers_ext import (
    AdditiveGaussianNoise,
    ExponentialFamilyNoise,
    ExponentialNoise,
    GammaNoise,
    PoissonGaussianNoise,
    PoissonNoise,
    posterior_mean,
)

A, B = 2.5, 0.15  # shape and rate of the Gamma prior of counts


def values(low, high, n=41):
    return torch.linspace(low, high, n, dtype=torch.float64)


def close(found, expected, atol=1e-6):
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_a_normal_prior_under_gaussian_noise(smoothing):
    s, m, sigma = 0.7, 0.2, 0.4
    total = sigma**2 + smoothing**2  # what y + sa u has, at which the smoothed score is exact
    y = values(-3, 3)
    found = posterior_mean(y, lambda v: -(v - m) / (s**2 + total), AdditiveGaussianNoise(sigma), smoothing)
    close(found, (s**2 * y + total * m) / (s**2 + total))


def test_a_mixture_of_normals_under_gaussian_noise():
    weights, means, stds, sigma = (0.3, 0.7), (-1.0, 2.0), (0.5, 0.2), 0.6
    y = values(-4, 4)
    # Each component's own posterior mean, weighed by how probable the component is.
    parts = [w * torch.exp(-((y - m) ** 2) / 2 / (s**2 + sigma**2)) / math.sqrt(s**2 + sigma**2)
             for w, m, s in zip(weights, means, stds, strict=True)]  # fmt: skip
    own = [(s**2 * y + sigma**2 * m) / (s**2 + sigma**2) for m, s in zip(means, stds, strict=True)]
    expected = sum(p * x for p, x in zip(parts, own, strict=True)) / sum(parts)

    def score(v):
        v = v.clone().requires_grad_()
        mixture = sum(w * torch.distributions.Normal(m, math.hypot(s, sigma)).log_prob(v).exp()
                      for w, m, s in zip(weights, means, stds, strict=True))  # fmt: skip
        return torch.autograd.grad(mixture.log().sum(), v)[0]

    close(posterior_mean(y, score, AdditiveGaussianNoise(sigma)), expected)


@pytest.mark.parametrize(("k", "noise"), [(10.0, GammaNoise), (1.0, lambda _, domain: ExponentialNoise(domain))])
def test_an_inverse_gamma_prior_under_gamma_noise(k, noise):
    a, b = 3.0, 2.0
    y = values(0.01, 5)

    def score(v):
        return (k - 1) / v - k * (a + k) / (b + k * v)

    def log_score(v):
        return 1 + v.exp() * score(v.exp())

    expected = (b + k * y) / (a + k)  # 1 / E[1/x|y]; the mean itself has a + k - 1 below
    close(posterior_mean(y, score, noise(k, domain="linear")), expected)
    close(posterior_mean(y, log_score, noise(k, domain="log")), expected)
    # Smoothing makes the variance 1/k of log y larger, and the score smaller by as much.
    sa = 0.2
    close(posterior_mean(y, lambda v: log_score(v) / (1 + k * sa**2), noise(k, domain="log"), sa), expected)


def test_defaults_are_the_log_domain_for_gamma_and_the_paper_s_formula_for_exponential_noise():
    y = values(0.5, 2)
    close(posterior_mean(y, torch.zeros_like, GammaNoise(5.0)), y)
    close(posterior_mean(y, lambda v: -1 / v, ExponentialNoise()), y)


def test_the_smoothed_log_gamma_score_is_corrected_nearly():
    """A constant image: log y has a known density, which is smoothed by numerical integration."""
    k, sa, x = 50.0, 0.3 / math.sqrt(50), 0.6
    grid = values(-3, 2, 20001)
    log_p = k * (grid - math.log(x)) - k * (grid - math.log(x)).exp()
    v = values(math.log(x) - 0.3, math.log(x) + 0.3)
    kernel = log_p.sub(log_p.max()).exp() * torch.exp(-((v[:, None] - grid) ** 2) / 2 / sa**2)
    score = ((grid - v[:, None]) / sa**2 * kernel).sum(1) / kernel.sum(1)
    corrected = posterior_mean(v.exp(), lambda _: score, GammaNoise(k), sa)
    plain = posterior_mean(v.exp(), lambda _: score, GammaNoise(k))
    assert (corrected - x).abs().mean() < 0.25 * (plain - x).abs().mean()


def poisson_score(c):
    return torch.digamma(c + A) - torch.digamma(c + 1) - math.log(1 + B)


@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_a_gamma_prior_under_poisson_noise(scale):
    c = torch.arange(0, 60, dtype=torch.float64)
    exact = (c + A) / (1 + B)
    midpoint = posterior_mean(scale * c, poisson_score, PoissonNoise(scale)) / scale - exact
    mode = posterior_mean(scale * c, poisson_score, PoissonNoise(scale, "mode")) / scale - exact
    assert midpoint[5:].abs().max() < 0.003
    assert midpoint[0] == pytest.approx(-0.064, abs=0.001)
    assert (mode[15:] + 0.5 / (1 + B)).abs().max() < 0.01
    assert mode.max() < -0.43


def mixed(s):
    """Density and exact posterior mean of counts with read noise; the score by differentiation of the exact sum."""
    c = torch.arange(0, 400, dtype=torch.float64)
    prior = torch.lgamma(c + A) - torch.lgamma(c + 1) - c * math.log(1 + B)

    def log_terms(y):
        return prior - (y[:, None] - c) ** 2 / 2 / s**2

    def score(y):
        y = y.clone().requires_grad_()
        return torch.autograd.grad(log_terms(y).logsumexp(1).sum(), y)[0]

    return score, lambda y: log_terms(y).logsumexp(1), lambda y: log_terms(y).softmax(1) @ ((c + A) / (1 + B))


@pytest.mark.parametrize(("s", "tolerance"), [(1.0, 0.026), (2.0, 0.0045), (3.0, 0.004)])
def test_a_gamma_prior_under_mixed_noise(s, tolerance):
    score, log_p, exact = mixed(s)
    y = values(-1, 40, 42)
    error = posterior_mean(y, score, PoissonGaussianNoise(1.0, s)) - exact(y)
    assert error.abs().max() <= tolerance
    # In other units, and with part of the read noise as smoothing, it is the same.
    z, part = 0.02, 0.6 * s
    noise = PoissonGaussianNoise(z, z * math.sqrt(s**2 - part**2))
    found = posterior_mean(z * y, lambda v: score(v / z) / z, noise, z * part)
    close(found / z - exact(y), error, 1e-9)
    # The identity behind it, with the true ratio of densities.
    close((y + 1 + s**2 * score(y + 1)) * (log_p(y + 1) - log_p(y)).exp(), exact(y))


def test_exponential_families_by_their_parts():
    k, sigma, y = 8.0, 0.5, values(0.1, 3)

    def score(v):
        return torch.sin(v) / (1 + v)

    gaussian = ExponentialFamilyNoise(lambda v: -v / sigma**2, lambda eta: sigma**2 * eta)
    close(posterior_mean(y, score, gaussian), posterior_mean(y, score, AdditiveGaussianNoise(sigma)))
    gamma = ExponentialFamilyNoise(lambda v: (k - 1) / v, lambda eta: -k / eta)  # eta = -k / x
    close(posterior_mean(y, score, gamma), posterior_mean(y, score, GammaNoise(k, "linear")))
    # The same noise told with T(y) = 2 y, whose natural parameter is half as large.
    doubled = ExponentialFamilyNoise(
        lambda v: -v / sigma**2, lambda eta: 2 * sigma**2 * eta, lambda v: torch.full_like(v, 2.0)
    )
    close(posterior_mean(y, score, doubled), posterior_mean(y, score, gaussian))


def test_no_noise_returns_the_image():
    y = values(0.1, 1)
    close(posterior_mean(y, torch.cos, AdditiveGaussianNoise(1e-5)), y, 1e-9)
    for noise in (PoissonNoise(1e-7), PoissonNoise(1e-7, "mode")):
        # Scores in counts are those in y times the scale.
        close(posterior_mean(y, lambda c: 1e-7 * torch.cos(1e-7 * c), noise), y, 1e-6)


@pytest.mark.parametrize(
    ("noise", "variance"),
    [
        (AdditiveGaussianNoise(0.1), lambda x: 0.1**2),
        (PoissonNoise(0.05), lambda x: 0.05 * x),
        (PoissonGaussianNoise(0.05, 0.1), lambda x: 0.05 * x + 0.1**2),
        (GammaNoise(20.0), lambda x: x**2 / 20),
        (ExponentialNoise(), lambda x: x**2),
    ],
)
def test_corruption_has_its_mean_and_variance_and_follows_the_generator(noise, variance):
    n, x = 200_000, 0.6
    clean = torch.full((2, n), x, dtype=torch.float64)
    y = noise.corrupt(clean, torch.Generator().manual_seed(0))
    assert y.dtype == torch.float64
    std = math.sqrt(variance(x))
    assert abs(y.mean().item() - x) < 4 * std / math.sqrt(2 * n)
    assert y.var().item() == pytest.approx(variance(x), rel=0.05)
    assert torch.equal(y, noise.corrupt(clean, torch.Generator().manual_seed(0)))
    assert not torch.equal(y[0], y[1])
    both = noise.corrupt(clean[:, :50], [torch.Generator().manual_seed(i) for i in (3, 4)])
    assert torch.equal(both[1:], noise.corrupt(clean[1:, :50], [torch.Generator().manual_seed(4)]))
    half = noise.corrupt(clean[:, :50].half())
    assert half.dtype == torch.float16


def test_poisson_noise_has_whole_counts():
    y = PoissonNoise(0.05).corrupt(torch.rand(1000, dtype=torch.float64))
    close(y / 0.05, (y / 0.05).round(), 1e-9)


def test_half_precision_is_computed_in_full():
    y = values(0.1, 1).half()
    found = posterior_mean(y, lambda v: -v, AdditiveGaussianNoise(0.5))
    assert found.dtype == torch.float16
    assert torch.equal(found, (0.75 * y.float()).half())


def test_what_cannot_be_is_counted():
    y = torch.tensor([0.0, 0.5, 0.0, 1.0])
    with pytest.warns(UserWarning, match="2 of 4 values are 0"):
        found = posterior_mean(y, torch.zeros_like, GammaNoise(5.0))
    close(found, torch.tensor([1e-3, 0.5, 1e-3, 1.0]))
    with pytest.warns(UserWarning, match="1 of 2 denominators were not positive"):
        found = posterior_mean(torch.tensor([0.5, 1.0]), lambda v: torch.where(v < -0.1, 6.0, 0.0), GammaNoise(5.0))
    assert found.isfinite().all()
    close(found[1], torch.tensor(1.0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdditiveGaussianNoise(0.0), "`sigma` must be a finite number > 0, got 0.0"),
        (lambda: PoissonNoise(math.inf), "`scale` must be a finite number > 0, got inf"),
        (lambda: PoissonNoise(0.1, "median"), "`estimator` must be 'midpoint' or 'mode', got 'median'"),
        (lambda: PoissonGaussianNoise(0.1, -1.0), "`read_std` must be"),
        (lambda: GammaNoise(1.0), "`shape` must be a finite number > 1, got 1.0"),
        (lambda: GammaNoise(5.0, "cube"), "`domain` must be"),
        (lambda: posterior_mean(torch.tensor([-0.1]), torch.cos, PoissonNoise(0.1)), "`y` must not be negative"),
        (lambda: posterior_mean(torch.tensor([-0.1]), torch.cos, GammaNoise(2.0)), "`y` must not be negative"),
        (lambda: posterior_mean(torch.tensor([math.nan]), torch.cos, AdditiveGaussianNoise(1.0)), "must be finite"),
        (lambda: posterior_mean(torch.ones(1), torch.cos, "gaussian"), "`noise` must be a noise model"),
        (lambda: posterior_mean(torch.ones(1), torch.cos, AdditiveGaussianNoise(1.0), -1.0), "`smoothing` must be"),
        (lambda: posterior_mean(torch.ones(1).int(), torch.cos, AdditiveGaussianNoise(1.0)), "tensor of floats"),
        (lambda: PoissonNoise(0.1).corrupt(torch.tensor([-1.0])), "`x` must not be negative"),
        (lambda: PoissonGaussianNoise(0.1, 0.1).corrupt(torch.tensor([-1.0])), "`x` must not be negative"),
        (lambda: ExponentialFamilyNoise(torch.cos, torch.cos).corrupt(torch.ones(1)), "`sampler` must be given"),
        (lambda: PoissonNoise(0.1).corrupt(torch.ones(2), [torch.Generator()]), "`generator` must be a list of 2"),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
