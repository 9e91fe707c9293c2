"""KNN noise against closed forms, and the exact sampler against real candidates."""

import math

import pytest
import torch
from scipy import integrate, stats

from diffusers_ext import NearestNoise, StepRNG, knn_sample, knn_select


def begun(step=3, **kwargs):
    rng = StepRNG(**kwargs)
    rng.begin(step)
    return rng


def expected_maximum(k):
    """Mean of the largest of k standard normals."""
    density = lambda z: z * k * stats.norm.pdf(z) * stats.norm.cdf(z) ** (k - 1)  # noqa: E731
    return integrate.quad(density, -10, 10)[0]


def direction(dimension, rho):
    x = torch.randn(dimension, generator=torch.Generator().manual_seed(0))
    return x / x.norm() * math.sqrt(rho * dimension)


@pytest.mark.parametrize(("dimension", "rho", "k"), [(784, 0.25, 8), (1024, 1.0, 4), (3072, 0.25, 2)])
def test_mean_and_energy_have_their_closed_forms(dimension, rho, k):
    x = direction(dimension, rho)
    n = 20000 if dimension < 2000 else 6000
    noise = knn_sample(x.expand(n, dimension), k, generator=torch.Generator().manual_seed(1))
    m = expected_maximum(k)
    along = (noise @ (x / x.norm())).mean().item()
    assert along == pytest.approx(m * math.sqrt(2 * rho / (1 + 2 * rho)), rel=0.05)
    energy = noise.square().sum(1).mean().item() / dimension
    assert energy == pytest.approx(1 - m * math.sqrt(2 / (dimension * (1 + 2 * rho))), abs=0.005)


def test_inner_score_takes_the_largest_of_k_and_leaves_the_rest():
    x = direction(64, 0.5)
    noise = knn_sample(x.expand(20000, 64), 8, score="inner", generator=torch.Generator().manual_seed(1))
    unit = x / x.norm()
    z = noise @ unit
    # Standard error of the mean: the largest of 8 has standard deviation 0.61.
    assert z.mean().item() == pytest.approx(expected_maximum(8), abs=4 * 0.61 / 20000**0.5)
    across = (noise - z[:, None] * unit).square().sum(1)
    assert stats.kstest(across.numpy(), stats.chi2(63).cdf).pvalue > 1e-3


def test_divergence_of_the_chosen_from_the_normal():
    # The chosen noise has density k (1 - F(d))^(k-1) times the normal's, F the law of the distance d: with U = F(d)
    # of the chosen, U is the smallest of k uniforms, and the mean log ratio is ln k - (k - 1) / k.
    k, x = 8, direction(64, 0.5)
    distance = lambda noise: (x - noise).square().sum(1)  # noqa: E731
    plain = distance(torch.randn(100_000, 64, generator=torch.Generator().manual_seed(2))).sort().values
    chosen = distance(knn_sample(x.expand(20000, 64), k, generator=torch.Generator().manual_seed(1)))
    rank = torch.searchsorted(plain, chosen).double() / len(plain)
    divergence = (math.log(k) + (k - 1) * torch.log1p(-rank.clamp(max=1 - 1e-5))).mean().item()
    assert divergence == pytest.approx(math.log(k) - (k - 1) / k, abs=0.04)


@pytest.mark.parametrize("score", ["l2", "inner"])
@pytest.mark.parametrize(("dimension", "k"), [(1, 4), (2, 8), (48, 2), (48, 16)])
def test_exact_sampler_has_the_law_of_real_candidates(dimension, k, score):
    x, n = direction(dimension, 0.5), 6000
    generator = torch.Generator().manual_seed(6)
    fast = knn_sample(x.expand(n, dimension), k, score, generator)
    real = knn_select(x.expand(n, dimension), torch.randn(n, k, dimension, generator=generator), score)
    other = torch.randn(dimension, generator=generator)
    for statistic in (lambda v: v @ x, lambda v: v.norm(dim=1), lambda v: v @ other):
        assert stats.ks_2samp(statistic(fast).numpy(), statistic(real).numpy()).pvalue > 1e-3


def test_a_sample_at_the_origin_gets_the_shortest():
    noise = knn_sample(torch.zeros(20000, 8), 4, generator=torch.Generator().manual_seed(0))
    assert noise.isfinite().all()
    assert noise.mean(0).abs().max() < 4 / 20000**0.5
    shortest = 1 - (1 - stats.chi2(8).cdf(noise.square().sum(1).numpy())) ** 4
    assert stats.kstest(shortest, "uniform").pvalue > 1e-3


def test_the_origin_in_one_dimension_and_beside_other_samples():
    # Rows at the origin take another path through the same formula; they must not disturb the rest of the batch.
    x = torch.zeros(20000, 1)
    smallest = knn_sample(x, 4, generator=torch.Generator().manual_seed(0)).abs().squeeze()
    assert stats.kstest(1 - (1 - stats.halfnorm.cdf(smallest.numpy())) ** 4, "uniform").pvalue > 1e-3
    x = torch.randn(6, 5)
    alone = knn_sample(x, 4, generator=torch.Generator().manual_seed(0))
    x[2] = 0
    mixed = knn_sample(x, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(mixed[[0, 1, 3, 4, 5]], alone[[0, 1, 3, 4, 5]])
    assert torch.equal(  # no inner product to choose by: plain noise
        knn_sample(torch.zeros(3, 5), 4, "inner", torch.Generator().manual_seed(0)),
        torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
    )


@pytest.mark.parametrize("method", ["fast", "candidates"])
def test_one_candidate_is_plain_noise(method):
    x = torch.randn(4, 1, 4, 4)
    assert torch.equal(NearestNoise(k=1, method=method)(x, rng=begun()), begun().randn_like(x))


@pytest.mark.parametrize("method", ["fast", "candidates"])
@pytest.mark.parametrize("pool", [None, 2])
def test_sample_scope_does_not_depend_on_the_cut(method, pool):
    x, strategy = torch.randn(6, 2, 4, 4), NearestNoise(k=3, method=method, pool=pool)
    whole = strategy(x, rng=begun(scope="sample"), ids=range(12, 18))
    part = strategy(x[4:], rng=begun(8, scope="sample", rank=1, world=2), ids=range(16, 18))
    torch.testing.assert_close(whole[4:], part, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["fast", "candidates"])
def test_pooled_choice_changes_only_the_averages(method):
    # Video (batch, channels, frames, height, width): averages over 2x2 follow the nearest of k, the rest is normal.
    x = torch.full((500, 1, 2, 4, 4), 0.7)
    noise = NearestNoise(k=8, method=method, pool=2)(x, rng=begun())
    averages = noise.unflatten(-1, (2, 2)).unflatten(-3, (2, 2)).mean((-1, -3)) * 2
    reference = knn_sample(torch.full((500, 8), 1.4), 8, generator=torch.Generator().manual_seed(9))
    assert stats.ks_2samp(averages.flatten(1).sum(1).numpy(), reference.sum(1).numpy()).pvalue > 1e-3
    assert stats.ks_2samp(averages.flatten(1).norm(dim=1).numpy(), reference.norm(dim=1).numpy()).pvalue > 1e-3
    rest = noise - (averages / 2).repeat_interleave(2, -1).repeat_interleave(2, -2)
    assert stats.kstest(rest.flatten(1).square().sum(1).numpy(), stats.chi2(32 - 8).cdf).pvalue > 1e-3


def test_centre_is_what_the_inner_product_is_taken_from():
    x = torch.ones(4000, 4)
    noise = NearestNoise(k=8, score="inner", center=1.0)(x, rng=begun())
    assert noise.mean(0).abs().max() < 4 * 1.2 / 4000**0.5  # nothing to lean towards on average
    x[:, 0] = 2
    noise = NearestNoise(k=8, score="inner", center=1.0)(x, rng=begun())
    assert noise[:, 0].mean().item() == pytest.approx(expected_maximum(8), abs=0.05)


@pytest.mark.parametrize("method", ["fast", "candidates"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_keeps_dtype_and_has_no_history(method, dtype):
    x = torch.randn(3, 1, 4, 4)
    noise = NearestNoise(method=method)(x.to(dtype).requires_grad_(), rng=begun())
    assert noise.dtype == dtype
    assert noise.shape == x.shape
    assert not noise.requires_grad


@pytest.mark.parametrize("k", [0, -1, 2.0, True, "4"])
def test_refuses_bad_k(k):
    with pytest.raises(ValueError, match="`k` must be an integer >= 1, got"):
        NearestNoise(k=k)


def test_refuses_bad_input():
    with pytest.raises(ValueError, match=r"`score` must be one of \['l2', 'inner'\], got 'cosine'"):
        NearestNoise(score="cosine")
    with pytest.raises(ValueError, match=r"`method` must be one of \['fast', 'candidates'\], got 'slow'"):
        NearestNoise(method="slow")
    with pytest.raises(ValueError, match="`center` must be None unless"):
        NearestNoise(center=1.0)
    with pytest.raises(ValueError, match="`pool` must divide height and width"):
        NearestNoise(pool=3)(torch.randn(1, 1, 4, 4), rng=begun())
    with pytest.raises(ValueError, match="`pool` must be an integer >= 1, got 0"):
        NearestNoise(pool=0)
    with pytest.raises(ValueError, match=r"`labels` must have the shape \(2,\)"):
        NearestNoise()(torch.randn(2, 3), rng=begun(), labels=torch.zeros(3))
    with pytest.raises(ValueError, match="`x0` must be finite"):
        NearestNoise()(torch.full((2, 2), torch.nan), rng=begun())
    with pytest.raises(ValueError, match="`x` must be finite"):
        knn_sample(torch.tensor([[math.inf, 0.0]]), 2)
    with pytest.raises(ValueError, match="`k` must be an integer >= 1, got 0"):
        knn_sample(torch.randn(2, 3), 0)
    with pytest.raises(ValueError, match=r"`score` must be one of \['l2', 'inner'\], got 'l1'"):
        knn_select(torch.randn(2, 3), torch.randn(2, 4, 3), "l1")
    with pytest.raises(ValueError, match="`candidates` must have the shape"):
        knn_select(torch.randn(2, 3), torch.randn(3, 4, 3))
