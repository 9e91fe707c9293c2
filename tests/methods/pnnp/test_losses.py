"""The distance of distributions: closed forms of normal laws, torch's own quantiles, gradients in bad cases."""

import pytest
import torch

from diffusers_ext import DistributionLoss, cdf_loss, quantile_loss
from diffusers_ext.methods.pnnp.losses import _quantiles, loss_points

P, G = loss_points(1000, torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def normal():
    """A million values that lie as normal ones do on average, and random ones."""
    even = torch.special.ndtri((torch.arange(10**6, dtype=torch.float64) + 0.5) / 10**6).float()
    return torch.stack([even, torch.randn(10**6, generator=torch.Generator().manual_seed(1))])


def test_points_are_where_the_formula_puts_them():
    u = torch.linspace(1e-4, 1 - 1e-4, 1000, dtype=torch.float64)
    probabilities = torch.special.ndtr(8 * u - 4)
    middle = slice(250, 750)  # in the tails jittered points change places, and are cut
    assert (P - probabilities)[middle].std().item() == pytest.approx(1e-4, rel=0.1)
    assert bool((P >= 0).all()) and bool((P <= 1).all())  # noqa: PT018
    assert (torch.special.ndtr(G.double()) - u).std().item() == pytest.approx(0.5e-4, rel=0.1)
    assert torch.equal(G.sort().values, G)
    assert P[0] < 1e-3 < 1 - 1e-3 < P[-1]


@pytest.mark.parametrize(("mean", "std"), [(0.1, 1.2), (0.0, 1.2)])
def test_distances_of_normal_laws(normal, mean, std):
    """mean_j |mu + (s - 1) Phi^-1(p_j)| and mean_j |Phi(g_j) - Phi((g_j - mu) / s)|."""
    x, y = normal[0], mean + std * normal[0]
    assert quantile_loss(x, x, P) == cdf_loss(y, y, G) == 0
    z = torch.special.ndtri(P.double().clamp(1e-7, 1 - 1e-7))
    expected = (mean + (std - 1) * z).abs().mean().item()
    assert quantile_loss(x, y, P).item() == pytest.approx(expected, rel=0.01)
    assert quantile_loss(x, mean + std * normal[1], P).item() == pytest.approx(expected, rel=0.03)
    g = G.double()
    expected = (torch.special.ndtr(g) - torch.special.ndtr((g - mean) / std)).abs().mean().item()
    assert cdf_loss(x, y, G).item() == pytest.approx(expected, rel=0.001)
    assert cdf_loss(x, mean + std * normal[1], G).item() == pytest.approx(expected, rel=0.02)


def test_quantiles_are_torch_s(normal):
    x = normal[0, :20_001]
    expected = torch.quantile(x.double(), P.double()).float()
    torch.testing.assert_close(_quantiles(x.sort().values, P), expected, atol=1e-6, rtol=0)
    large = torch.linspace(0, 1, 2**24 + 2)  # one value more than torch.quantile takes
    assert _quantiles(large, torch.tensor([0.25])).item() == pytest.approx(0.25, abs=1e-6)


def test_both_at_once_is_their_weighted_sum_in_units_of_the_real_deviation(normal):
    model, real = 3 * normal[0, :4000], 2 * normal[1, :5000]
    p, g = loss_points(300, torch.Generator().manual_seed(5))
    scale = real.std()
    expected = 0.5 * quantile_loss(model / scale, real / scale, p) + 2 * cdf_loss(model / scale, real / scale, g)
    found = DistributionLoss(300, 0.5, 2.0)(model, real, torch.Generator().manual_seed(5))
    torch.testing.assert_close(found, expected)
    both = DistributionLoss(300)(model.repeat(2, 1), real.repeat(2, 1), torch.Generator().manual_seed(5))
    torch.testing.assert_close(both, DistributionLoss(300)(model, real, torch.Generator().manual_seed(5)))


def test_gradients():
    """Finite with ties and where points lie outside of a sample; a shifted sample moves both distances rightly."""
    for x in (torch.zeros(50), torch.tensor([0.0, 0, 1, 1, 1]), torch.full((10,), 9.0), torch.tensor([-1e6, 1e6])):
        x = x.clone().requires_grad_()
        loss = DistributionLoss(100)(x, torch.linspace(-1, 1, 40), torch.Generator().manual_seed(0))
        loss.backward()
        assert bool(x.grad.isfinite().all())
        assert bool(x.grad.any())
    x = torch.linspace(-2, 2, 4001, dtype=torch.float64).requires_grad_()
    y = torch.linspace(-2, 2, 4001, dtype=torch.float64) + 0.3
    quantile_loss(x, y, torch.tensor([0.3, 0.5])).backward()
    assert x.grad.sum().item() == pytest.approx(-1, rel=1e-6)  # every quantile moves with the sample
    x.grad = None
    cdf_loss(x, y, torch.tensor([0.0, 0.5])).backward()
    assert x.grad.sum().item() == pytest.approx(-1 / 4, rel=1e-4)  # by the density, 1/4


def test_wrong_samples_are_refused():
    for x, y in ((torch.zeros(2, 5), torch.zeros(3, 5)), (torch.zeros(5), torch.zeros(1, 5)), (torch.zeros(1),) * 2):
        with pytest.raises(ValueError, match="`x` must be"):
            DistributionLoss()(x, y)
        with pytest.raises(ValueError, match="`x` must be"):
            quantile_loss(x, y, P)
    with pytest.raises(ValueError, match="`num_points` must be an integer >= 2, got 1"):
        DistributionLoss(1)
    with pytest.raises(ValueError, match="`cdf_weight` must be a number >= 0"):
        DistributionLoss(cdf_weight=-1.0)
