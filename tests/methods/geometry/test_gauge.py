"""Jacobians, residuals and gauges against closed forms of Gaussian data."""

import pytest
import torch
from diffusers import DDPMScheduler

from diffusers_ext import (
    ScoreField,
    conservativity,
    exact_jacobian,
    gauge_residual,
    gauge_transform,
    jacobian_probes,
    stein_residual,
)
from tests.methods.geometry.gaussian import (
    PLANE,
    TIMES,
    antisymmetric,
    expected_dimension,
    gaussian_field,
    plane_data,
    seeded,
    sigma_of,
)

Q = antisymmetric(10)
C = 0.5


@pytest.fixture(scope="module")
def field():
    return gaussian_field(PLANE)


@pytest.fixture(scope="module")
def gauged(field):
    return gauge_transform(field, Q, C)


@pytest.fixture(scope="module")
def x():
    return plane_data(600)


def asymmetry(matrix):
    return ((matrix - matrix.T).square().sum() / (4 * matrix.square().sum())).item()


def test_exact_jacobian(field, gauged):
    a, b, sigma = (getattr(field.levels, name)[10].item() for name in ("a", "b", "sigma"))
    point = plane_data(2)
    wanted = torch.diag(sigma / (PLANE + sigma**2) / a)
    assert torch.allclose(exact_jacobian(field, point, sigma, batch_size=3)[1], wanted, atol=1e-9)
    jacobian = exact_jacobian(gauged, point, sigma)[0]
    assert torch.allclose(jacobian, (torch.eye(10, dtype=torch.float64) + C * Q) @ wanted, atol=1e-9)
    assert asymmetry(exact_jacobian(field, point, sigma)[0]) < 1e-20
    assert round(asymmetry(jacobian), 4) == 0.1574
    assert round(asymmetry(torch.eye(10, dtype=torch.float64) - b * jacobian), 4) == 0.2908


def test_probes_are_unbiased(gauged):
    """A matrix that is full and asymmetric, against its own trace and norms."""
    weights = torch.randn(10, 10, generator=seeded(3), dtype=torch.float64) / 3
    field = ScoreField(lambda x, t: x @ weights.T, DDPMScheduler())
    points, sigma = torch.zeros(150, 10, dtype=torch.float64), 0.7236
    b = float(field.at(sigma).b)
    found = jacobian_probes(field, points, sigma, num_probes=8, generator=seeded())
    own = torch.eye(10, dtype=torch.float64) - b * weights
    for name, wanted in {
        "trace": weights.trace(),
        "squared_norm": weights.square().sum(),
        "squared_asymmetry": (weights - weights.T).square().sum(),
        "denoiser_squared_norm": own.square().sum(),
        "denoiser_squared_asymmetry": (own - own.T).square().sum(),
    }.items():
        values = getattr(found, name)
        assert abs(values.mean() - wanted) < 3 * values.std() / 150**0.5, name
    # The error that is stated is the one that is made.
    assert 0.85 < (found.trace_error.square().mean() / found.trace.var()).sqrt() < 1.15


def test_probes_vary_as_hutchinson_says():
    """Rademacher: 2 (|S|^2 - sum S_ii^2); normal probes would vary 30 times as much."""
    basis = torch.linalg.qr(torch.randn(100, 3, generator=seeded(2), dtype=torch.float64))[0]
    normal = torch.eye(100, dtype=torch.float64) - basis @ basis.T
    variance = 2 * (normal.square().sum() - normal.diagonal().square().sum())
    assert abs(variance - 5.69) < 0.05
    assert abs(2 * normal.square().sum() - 194) < 1e-9
    field = ScoreField(lambda x, t: x @ normal, DDPMScheduler())
    found = jacobian_probes(field, torch.zeros(1, 100, dtype=torch.float64), 0.5, 4000, 1000, seeded())
    # The variance of 4,000 values is known to 2.2 % for a normal law, whose kurtosis theirs is near.
    assert abs(4000 * found.trace_error.square().item() / variance.item() - 1) < 0.08


def test_gauge_leaves_the_trace(field, gauged):
    point, sigma = plane_data(1), sigma_of(field, 10)
    plain, turned = (exact_jacobian(f, point, sigma)[0].trace().item() for f in (field, gauged))
    assert abs(plain - turned) < 1e-12 * abs(plain)
    found = jacobian_probes(gauged, point, sigma, 500, 500, generator=seeded())
    assert abs(found.trace.item() - plain) < 3 * found.trace_error.item() < 0.05 * plain


def test_constant_gauge_is_divergence_free(field, gauged):
    """div r + r.s = 0 at every point, for r = c Q s."""
    for t in TIMES:
        sigma = sigma_of(field, t)
        b = float(field.at(sigma).b)
        x = plane_data(3) * field.coefficients(sigma, plane_data(1))[0]
        score = field.score(x, sigma)
        r = gauged.score(x, sigma) - score
        assert torch.allclose(r, C * score @ Q.T, atol=1e-9 * float(score.abs().max()))
        jacobian = (exact_jacobian(gauged, x, sigma) - exact_jacobian(field, x, sigma)) / -b
        divergence = jacobian.diagonal(dim1=1, dim2=2).sum(1)
        scale = (r.norm(dim=1) * score.norm(dim=1)).max()
        assert ((divergence + (r * score).sum(1)).abs().max() / scale) < 1e-14


def test_local_gauge_is_divergence_free(field):
    n = torch.eye(10, dtype=torch.float64)[9]
    sigma = sigma_of(field, 50)
    a, b = (float(value) for value in (field.at(sigma).a, field.at(sigma).b))
    local = gauge_transform(field, Q, lambda y, s: (y @ n) ** 2 / s)
    x = torch.randn(2, 10, generator=seeded(), dtype=torch.float64) * 0.3
    score = field.score(x, sigma)
    r = local.score(x, sigma) - score
    beta, slope = (x @ n / a) ** 2 / sigma, 2 * (x @ n)[:, None] * n / (a**2 * sigma)
    assert torch.allclose(r, slope @ Q.T + beta[:, None] * (score @ Q.T), atol=1e-9)
    jacobian = (exact_jacobian(local, x, sigma) - exact_jacobian(field, x, sigma)) / -b
    assert torch.allclose(jacobian.diagonal(dim1=1, dim2=2).sum(1), -(r * score).sum(1), atol=1e-9)


def test_asymmetry_of_a_data_set(field, gauged, x):
    found = conservativity(gauged, x[:60], sigma_of(field, 10), num_probes=32, generator=seeded())
    assert abs(found.eps.item() - 0.1574) < 3 * found.eps_error.item() < 0.01
    assert abs(found.denoiser.item() - 0.2908) < 3 * found.denoiser_error.item() < 0.02
    none = conservativity(field, x[:2], sigma_of(field, 10), num_probes=4, generator=seeded())
    assert max(none.eps.item(), none.denoiser.item()) < 1e-20


def test_stein_residual(field, gauged, x):
    sigmas = [sigma_of(field, t) for t in TIMES]
    plain, turned = (
        stein_residual(f, x, sigmas, num_draws=2, batch_size=600, generator=seeded(1)) for f in (field, gauged)
    )
    assert bool((plain.value.abs() < 3 * plain.standard_error).all())
    assert not bool(plain.masked.any())
    levels = field.at(torch.tensor(sigmas, dtype=torch.float64))
    wanted = []
    for a, b in zip(levels.a, levels.b, strict=True):
        precision = torch.diag(1 / (a**2 * PLANE + b**2))
        wanted.append((b**2 * C**2 * (Q @ precision @ Q.T).trace()).item())
    assert abs(wanted[1] - 1.752) < 5e-4
    wanted = torch.tensor(wanted, dtype=torch.float64)
    assert bool(((turned.value - wanted).abs() < 3 * turned.standard_error).all())
    assert bool(turned.masked.all())
    # The denoising error of the score is d(sigma), and the gauge adds as much as R.
    for k, sigma in enumerate(sigmas):
        d = expected_dimension(PLANE, sigma)
        assert abs(plain.denoising_error[k].item() - d) < 3 * (2 * d / 600 / 2) ** 0.5 + 1e-3
    shift = turned.denoising_error - plain.denoising_error
    assert bool(((shift - wanted).abs() < 3 * 2 * turned.standard_error).all())


def test_weak_residual(field, x):
    """Of 1.1 times the score -0.1 D along |x|^2/2; of a score with a gauge 0 for every function."""
    sigma = sigma_of(field, 50)
    kwargs = {"num_draws": 2, "batch_size": 600, "generator": seeded(2)}
    scaled = ScoreField(lambda x, t: 1.1 * field.model(x, t), DDPMScheduler())
    found = gauge_residual(scaled, x, sigma, **kwargs)
    assert abs(found.value[0, 0].item() + 0.1 * 10) < 3 * found.standard_error[0, 0].item() < 1
    assert found.names[0] == "|x|^2/2"
    assert len(found.names) == found.value.shape[1] == 65
    # Its mean square slope there is E|x|^2, as data and noise have it.
    a, b = (float(value) for value in (field.at(sigma).a, field.at(sigma).b))
    assert abs(found.scale[0, 0].item() ** 2 / (a**2 * 3.5 + 10 * b**2) - 1) < 0.1
    assert torch.allclose(found.relative, found.value / found.scale)
    turned = gauge_residual(gauge_transform(field, Q, 1.0), x, sigma, **{**kwargs, "generator": seeded(3)})
    assert abs(turned.z[0, 0].item()) < 3
    assert turned.z.abs().max() < 4.2  # of 65 values: 0.2 %
    # Seen by the cosines and linear functions too: a field that is shifted.
    shifted = ScoreField(lambda x, t: field.model(x, t) + 0.3, DDPMScheduler())
    assert gauge_residual(shifted, x, sigma, **{**kwargs, "generator": seeded(4)}).z[0, 1:33].abs().max() > 10


def test_batches_and_seeds(field, gauged, x):
    sigma = sigma_of(field, 50)
    whole, cut, other = (
        stein_residual(gauged, x[:20], sigma, 3, batch_size, seeded(seed)).value
        for batch_size, seed in ((64, 7), (7, 7), (64, 8))
    )
    assert torch.allclose(whole, cut, rtol=1e-12)
    assert not torch.allclose(whole, other)
    together = jacobian_probes(gauged, x[:3], sigma, 8, 8, seeded(4))
    generator = seeded(4)
    alone = [jacobian_probes(gauged, x[i : i + 1], sigma, 8, 3, generator).squared_norm for i in range(3)]
    assert torch.allclose(together.squared_norm, torch.cat(alone), rtol=1e-12)


def test_bad_input(field, x):
    for q in (torch.eye(10), torch.zeros(3, 4)):
        with pytest.raises(ValueError, match="`Q` must be an antisymmetric"):
            gauge_transform(field, q)
    with pytest.raises(ValueError, match="`num_probes` must be an integer >= 2, got 1"):
        jacobian_probes(field, x[:1], 0.5, num_probes=1)
    with pytest.raises(ValueError, match="`num_probes` must be an integer >= 2, got 1"):
        conservativity(field, x[:4], 0.5, num_probes=1)
    for function in (stein_residual, gauge_residual, conservativity):
        with pytest.raises(ValueError, match=r"`x` must be floats of the shape \(images >= 2"):
            function(field, x[:1], 0.5)
        with pytest.raises(ValueError, match="`sigma` must be within"):
            function(field, x[:4], 1e-4)
        with pytest.raises(ValueError, match="`batch_size` must be an integer >= 1, got 0"):
            function(field, x[:4], 0.5, batch_size=0)
    with pytest.raises(ValueError, match="`num_draws` must be an integer >= 1, got 0"):
        stein_residual(field, x[:4], 0.5, num_draws=0)
    with pytest.raises(ValueError, match="`sigmas` must be one or more rising numbers"):
        stein_residual(field, x[:4], [0.5, 0.4])
    with pytest.raises(ValueError, match="`x` must be finite"):
        stein_residual(field, x[:4] * float("nan"), 0.5)
