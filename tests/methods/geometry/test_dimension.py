"""Local dimension by six estimators against closed forms."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from diffusers_ext import (
    ScoreField,
    find_plateau,
    gauge_transform,
    local_dimension,
    log_likelihood,
    rank_by_dimension,
    stein_residual,
)
from diffusers_ext.methods.geometry.dimension import normal_bundle_values, slope_errors
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
KNOWN = torch.tensor([2.9996, 2.9923, 2.8964, 1.9374, 0.0884], dtype=torch.float64)
FLIPD_MEAN = (3.0, 3.0, 2.9955, 2.5772, 0.1734)


@pytest.fixture(scope="module")
def field():
    return gaussian_field(PLANE)


@pytest.fixture(scope="module")
def sigmas(field):
    return [sigma_of(field, t) for t in TIMES]


def test_trace_is_exact(field, sigmas):
    found = local_dimension(field, plane_data(2), "trace", sigmas, num_draws=2, generator=seeded())
    assert torch.allclose(found.curve, KNOWN.expand(2, 5), atol=5.1e-5)
    wanted = torch.tensor([expected_dimension(PLANE, sigma) for sigma in sigmas], dtype=torch.float64)
    assert torch.allclose(found.curve[0], wanted, atol=1e-9)
    assert found.standard_error.max() < 1e-9


def test_dsm_is_unbiased(field, sigmas):
    found = local_dimension(field, plane_data(500), "dsm", sigmas, num_draws=2, batch_size=500, generator=seeded(1))
    mean, error = found.curve.mean(0), found.curve.std(0) / 500**0.5
    assert bool(((mean - KNOWN).abs() < 3 * error).all())
    assert bool((error < 0.1).all())
    assert not bool(found.masked.any())


def test_flipd_at_points_and_in_the_mean(field, sigmas):
    x = plane_data(40)
    found = local_dimension(field, x, "flipd", sigmas, num_draws=2, generator=seeded())
    for k, (sigma, mean) in enumerate(zip(sigmas, FLIPD_MEAN, strict=True)):
        noise = sigma**2 / (PLANE + sigma**2)
        wanted = 10 - noise.sum() + (noise * x**2 / (PLANE + sigma**2)).sum(1)
        assert torch.allclose(found.curve[:, k], wanted, atol=1e-12)
        # Over data x^2 is l: the mean of the same formula.
        over_data = 10 - noise.sum() + (noise * PLANE / (PLANE + sigma**2)).sum()
        assert abs(over_data.item() - mean) < 6e-5
        assert abs(over_data.item() - (1 - noise**2).sum().item()) < 1e-12


def test_normal_bundle(field, sigmas):
    found = local_dimension(field, plane_data(2), "normal_bundle", sigmas[:3], batch_size=80, generator=seeded())
    assert found.curve.tolist() == [[3, 3, 3]] * 2
    # Normal directions are 1, tangent ones sigma^2 / (l + sigma^2) of it.
    values = normal_bundle_values(field, plane_data(1), sigmas[2], 4000, 1000, [0])[0].flip(0)
    variances = sigmas[2] ** 2 / (PLANE + sigmas[2] ** 2)
    wanted = (variances.square() * (1 + PLANE * 0)).sqrt().sort().values
    noise = wanted[:3]
    assert torch.allclose(values[:3], noise, rtol=0.1)
    assert torch.allclose(values[3:], torch.ones(7, dtype=torch.float64), atol=0.12)


def test_lidl(field):
    x = PLANE.sqrt()[None]
    grid = torch.logspace(-1.69897, -1.1707, 3, dtype=torch.float64).tolist()  # 0.02 to 0.0675
    found = local_dimension(field, x, "lidl", grid, num_draws=2, generator=seeded())
    assert (found.curve - 3).abs().max() < 0.01
    n = torch.eye(10, dtype=torch.float64)[9]
    local = gauge_transform(field, Q, lambda y, s: (y @ n) / s)
    nats = [log_likelihood(local, x, sigma, tol=1e-5, trace="exact").nats.item() for sigma in grid[:2]]
    assert abs(10 + (nats[1] - nats[0]) / math.log(grid[1] / grid[0]) - 3) < 0.01


def test_flow_map(field):
    found = local_dimension(field, plane_data(1), "flow_map", [0.02, 0.3, 1.2], num_steps=30)
    assert found.curve.tolist() == [[3, 3, 1]]  # eigenvalues 2, 1, 0.5 against sigma^2 = 1.44


def test_constant_gauge(field, sigmas):
    """What a gauge that moves no density does to the estimators."""
    c, x = 0.5, plane_data(400)
    gauged = gauge_transform(field, Q, c)
    levels = sigmas[1:4]
    # The trace is the same in expectation; FLIPD's other part is that of E + c Q E at every point.
    trace, flipd = (
        [local_dimension(f, x[:20], name, levels, num_draws=16, generator=seeded()).curve for f in (field, gauged)]
        for name in ("trace", "flipd")
    )
    moved = trace[1] - trace[0]
    assert bool((moved.mean(0).abs() < 3 * moved.std(0) / 20**0.5).all())
    for k, (sigma, mean) in enumerate(zip(levels, (0.0019, 0.0248, 0.1600), strict=True)):
        seen = sigma * x[:20] / (PLANE + sigma**2)
        shift = (flipd[1] - trace[1]) - (flipd[0] - trace[0])
        assert torch.allclose(shift[:, k], c**2 * seen.square().sum(1), atol=1e-9)
        assert abs((c**2 * sigma**2 * PLANE / (PLANE + sigma**2) ** 2).sum().item() - mean) < 6e-5
    # dsm moves by b^2 c^2 tr(Q P Q^T); at t = 10 by 1.752.
    dsm = [
        local_dimension(f, x, "dsm", sigmas[1], num_draws=2, batch_size=400, generator=seeded(6)).curve
        for f in (field, gauged)
    ]
    shift = dsm[1] - dsm[0]
    assert abs(shift.mean().item() - 1.752) < 3 * shift.std().item() / 400**0.5 < 0.3
    bundle = local_dimension(gauged, x[:2], "normal_bundle", levels[:2], batch_size=80, generator=seeded())
    assert bundle.curve.tolist() == [[3, 3]] * 2


def test_local_gauge(field, sigmas):
    """beta = n.y / sigma off the plane: densities stay, FLIPD, dsm and the normal bundle do not."""
    n, sigma = torch.eye(10, dtype=torch.float64)[9], sigmas[0]
    assert torch.equal(Q @ n, torch.eye(10, dtype=torch.float64)[0])
    local = gauge_transform(field, Q, lambda y, s: (y @ n) / s)
    x = plane_data(40)
    flipd = local_dimension(local, x, "flipd", sigma, num_draws=16, generator=seeded()).curve
    trace = local_dimension(local, x, "trace", sigma, num_draws=16, generator=seeded()).curve
    seen = sigma * x / (PLANE + sigma**2) - torch.eye(10, dtype=torch.float64)[0]
    assert torch.allclose(flipd - trace, seen.square().sum(1, keepdim=True), atol=1e-9)
    over_data = expected_dimension(PLANE, sigma) + 1 + (sigma**2 * PLANE / (PLANE + sigma**2) ** 2).sum().item()
    assert abs(over_data - 4.0) < 1e-3
    assert abs(trace.mean().item() - 2.9997) < 3 * trace.std().item() / 40**0.5
    assert abs(flipd.mean().item() - 4.0) < 3 * flipd.std().item() / 40**0.5
    others = (sigma**2 / (PLANE[:-1] + sigma**2)).sum().item()
    wanted = expected_dimension(PLANE, sigma) + 2 + others
    assert abs(wanted - 11.0) < 1e-3
    dsm = local_dimension(local, plane_data(600), "dsm", sigma, num_draws=4, batch_size=600, generator=seeded(2)).curve
    assert abs(dsm.mean().item() - 11.0) < 3 * dsm.std().item() / 600**0.5 < 1.5
    # The bundle at n = 40 D sees no plane at all: its singular values are sqrt 2 and 1, five times each.
    found = local_dimension(local, x[:1], "normal_bundle", sigma, num_draws=400, batch_size=400, generator=seeded())
    assert found.curve.tolist() == [[0]]
    values = normal_bundle_values(local, x[:1], sigma, 8000, 2000, [3])[0]
    assert torch.allclose(values[:5], torch.full((5,), 2**0.5, dtype=torch.float64), atol=0.1)
    assert torch.allclose(values[5:], torch.ones(5, dtype=torch.float64), atol=0.1)


def test_error_of_draws():
    """sqrt(2k/m) for m draws of dsm; stated and made."""
    k, m = 8, 32
    eigenvalues = torch.cat([torch.ones(k), torch.zeros(24)]).double()
    found = local_dimension(
        gaussian_field(eigenvalues), plane_data(150, 3, eigenvalues), "dsm", 0.0101, m, 200, seeded()
    )
    wanted = (2 * k / m) ** 0.5
    assert abs(found.curve.std().item() / wanted - 1) < 3 / (2 * 150) ** 0.5
    assert abs(found.standard_error.square().mean().sqrt().item() / wanted - 1) < 3 * 2 / (2 * m * 150) ** 0.5


def test_plateaus_of_thirty_spectra():
    sigmas = torch.logspace(-2, 1, 25, dtype=torch.float64)
    errors, none = [], 0
    for k in (3, 12):
        for scale in (0.3, 1.0, 3.0):
            for noise in (0.0, 0.01, 0.03, 0.05, 0.1):
                eigenvalues = torch.full((64,), noise**2, dtype=torch.float64)
                eigenvalues[:k] += scale**2
                curve = torch.tensor([expected_dimension(eigenvalues, s) for s in sigmas.tolist()])
                found = find_plateau(sigmas, curve, 64)
                if found is None:
                    none += 1
                else:
                    errors.append(abs(found[1] / k - 1))
    assert (len(errors), none) == (13, 17)
    assert round(max(errors), 3) == 0.024


def test_masked_levels_hold_no_plateau():
    sigmas, curve = torch.logspace(-2, 1, 25), torch.full((25,), 5.0)
    assert find_plateau(sigmas, curve, 64)[1] == 5.0
    assert find_plateau(sigmas, curve, 64, torch.ones(25, dtype=torch.bool)) is None
    assert find_plateau(sigmas[:1], curve[:1], 64) is None
    assert find_plateau(sigmas, torch.full((25,), 60.0), 64) is None


def test_curves_that_are_flat_by_chance_have_no_plateau():
    """Sixty-four dimensions whose number falls as sigma^-0.4, seen by four draws an image."""
    sigmas = torch.logspace(-1, 1, 25, dtype=torch.float64)
    draws = torch.randn(400, 4, 24, generator=seeded(), dtype=torch.float64).square()
    wanted = 24 * (sigmas / sigmas[0]) ** -0.4
    # In 24 directions of error 1, whose weights move from one to the next, so that levels differ in their chance.
    weights = torch.softmax(-((torch.arange(24.0) - 12 * (1 + sigmas.log10())[:, None]) ** 2) / 8, 1).double()
    rows = wanted * (draws @ weights.T)
    errors = slope_errors(sigmas.tolist(), rows)
    slopes = torch.gradient(rows.mean(1).log(), spacing=(sigmas.log(),), dim=1)[0]
    assert ((slopes + 0.4) / errors).square().mean().sqrt() < 2.5  # of 3 degrees of freedom
    blind = sum(find_plateau(sigmas, row, 64) is not None for row in rows.mean(1))
    told = sum(
        find_plateau(sigmas, row, 64, None, error) is not None for row, error in zip(rows.mean(1), errors, strict=True)
    )
    assert blind > 200
    assert told < blind / 4
    with pytest.raises(ValueError, match=r"`slope_error` must have the shape \(25,\), got \(2,\)"):
        find_plateau(sigmas, rows.mean(1)[0], 64, None, torch.ones(2))


def test_masks_come_from_the_data_set(field):
    """A field that is wrong at small noise, by a factor."""
    wrong = ScoreField(lambda x, t: field.model(x, t) * torch.where(t < 100, 0.5, 1.0)[:, None], DDPMScheduler())
    x, levels = plane_data(60), [sigma_of(field, t) for t in (10, 50, 200, 400)]
    found = local_dimension(wrong, x, sigmas=levels, num_draws=16, batch_size=480, generator=seeded())
    assert found.masked.tolist() == [True, True, False, False]
    assert not bool(local_dimension(wrong, x[:1], sigmas=levels, num_draws=4, generator=seeded()).masked.any())
    residual = stein_residual(wrong, x, levels, 16, 480, seeded())
    given = local_dimension(wrong, x[:1], "trace", levels, num_draws=4, generator=seeded(), residual=residual)
    assert given.masked.tolist() == found.masked.tolist()


def test_default_sigmas_and_plateau_of_data(field):
    found = local_dimension(field, plane_data(20), num_draws=64, batch_size=640, generator=seeded())
    assert len(found.sigmas) == 25
    assert (found.sigmas[0].item(), found.sigmas[-1].item()) == pytest.approx(
        (sigma_of(field, 0), sigma_of(field, len(field.levels.t) - 1))
    )
    values = [value for value in found.value if value is not None]
    assert len(values) >= 18
    assert all((p is None) == (v is None) for p, v in zip(found.plateau, found.value, strict=True))
    assert abs(sum(values) / len(values) - 3) < 0.35


def test_ranking_puts_the_simple_first_and_the_odd_last():
    """Two planes of 2 and of 8 dimensions; the noise estimate of a mixture knows which is which."""
    small = torch.cat([torch.ones(2), torch.zeros(14)]).double()
    large = torch.cat([torch.zeros(8), torch.ones(8)]).double()
    fields = [gaussian_field(small), gaussian_field(large)]

    def model(x, t):
        both = [f.model(x, t) for f in fields]
        beside = [(x.abs() * (e == 0)).sum(1) for e in (small, large)]
        return torch.where((beside[0] < beside[1])[:, None], *both)

    x = torch.cat([plane_data(10, 1, small), plane_data(10, 2, large)])[torch.arange(20).view(2, 10).T.reshape(-1)]
    x = x + x.sign()  # away from the point that the planes share
    field = ScoreField(model, DDPMScheduler())
    order, values, sigma = rank_by_dimension(field, x, sigma=0.05, generator=seeded())
    assert sorted(order[:10].tolist()) == list(range(0, 20, 2))
    assert abs(values[::2].mean().item() - 2) < 0.5
    assert abs(values[1::2].mean().item() - 8) < 1
    assert sigma == 0.05
    *_, found = rank_by_dimension(field, x, generator=seeded(), num_draws=8, batch_size=160)
    assert 0.01 <= found < 0.3


def test_batches_seeds_and_methods_agree(field):
    x, levels = plane_data(3), [0.05, 0.2]
    for method in ("dsm", "trace", "normal_bundle"):
        kwargs = {"method": method, "sigmas": levels, "num_draws": 90}
        whole = local_dimension(field, x, batch_size=64, generator=seeded(3), **kwargs).curve
        generator = seeded(3)
        alone = [local_dimension(field, x[i : i + 1], batch_size=7, generator=generator, **kwargs) for i in range(3)]
        assert torch.allclose(whole, torch.cat([a.curve for a in alone]), rtol=1e-9)
    other = local_dimension(field, x, sigmas=levels, generator=seeded(4)).curve
    assert not torch.allclose(other, local_dimension(field, x, sigmas=levels, generator=seeded(5)).curve)


def test_bad_input(field):
    x = plane_data(1)
    wide = torch.zeros(1, 4097)
    with pytest.raises(ValueError, match="`method` must be one of .*'dsm'.*, got 'pca'"):
        local_dimension(field, x, "pca")
    with pytest.raises(ValueError, match="at most 4096 values an image for 'normal_bundle', got 4097"):
        local_dimension(field, wide, "normal_bundle")
    with pytest.raises(ValueError, match="at most 256 values an image for 'flow_map', got 257"):
        local_dimension(field, wide[:, :257], "flow_map")
    for method in ("dsm", "trace"):
        with pytest.raises(ValueError, match="`num_draws` must be an integer >= 2, got 1"):
            local_dimension(field, x, method, num_draws=1)
    dim = x[0].numel()
    with pytest.raises(ValueError, match=f"`num_draws` must be an integer >= {dim}, got {dim - 1}"):
        local_dimension(field, x, "normal_bundle", num_draws=dim - 1)
    with pytest.raises(ValueError, match="`sigma` must be within the scheduler's levels"):
        local_dimension(field, x, sigmas=[0.001, 0.1])
    with pytest.raises(ValueError, match="`sigmas` must be two or more for 'lidl'"):
        local_dimension(field, x, "lidl", sigmas=0.1)
    with pytest.raises(ValueError, match="`residual` must be a SteinResidual of the same sigmas"):
        local_dimension(field, x, sigmas=[0.1], residual=stein_residual(field, plane_data(2), [0.2]))
    with pytest.raises(ValueError, match=r"`x` must be floats of the shape \(images >= 2"):
        rank_by_dimension(field, x)
    broken = ScoreField(lambda x, t: 0.5 * field.model(x, t), DDPMScheduler())
    with pytest.raises(ValueError, match="`field` must be a score at some noise level"):
        rank_by_dimension(broken, plane_data(60), num_draws=8, batch_size=480, generator=seeded())
