"""The noise of pixels: exact laws of networks that are known, the table, gains between ISOs, published weights."""

import math

import pytest
import torch
from torch import nn

from diffusers_ext import SensorNoiseProxy
from diffusers_ext.methods.pnnp.proxy import ISO_STOPS

GAIN = (0.001, 0.05)


@pytest.fixture(scope="module")
def proxy():
    """A proxy of some noise that is not normal, with different corrections at three ISOs."""
    torch.manual_seed(0)
    proxy = SensorNoiseProxy(iso_to_gain=GAIN, isos=(400, 800, 1600))
    proxy.start_at(2.0, 0.8)
    with torch.no_grad():
        proxy.nn_pre[-1].weight.mul_(2)
        proxy.scaler.copy_(torch.tensor([-0.1, 0.05, 0.2]))
    return proxy.eval()


def straight(gain_std, constant_std, isos=(100, 200)):
    """A proxy whose networks are exactly a z, of deviation K a and b."""
    proxy = SensorNoiseProxy(4, 1, (0.01, 0.0), isos)
    proxy.start_at(gain_std, constant_std)
    with torch.no_grad():
        for network in (proxy.nn_pre, proxy.nn_fol):
            network[-1].weight[:, 2:] = 0
    return proxy


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_straight_networks_give_the_normal_law():
    proxy = straight(3.0, 0.5)
    z = torch.randn(2, 1, 1000, generator=seeded())
    torch.testing.assert_close(proxy(z[0], z[1], 200), 2 * 3 * z[0] + 0.5 * z[1], atol=1e-5, rtol=0)
    noise = proxy.sample((1, 10**6), 200, seeded())
    assert noise.std().item() == pytest.approx(math.hypot(6, 0.5), rel=5e-3)
    assert abs(noise.mean().item()) < 0.02
    standard = (noise / noise.std()).sort().values[0, ::1000]
    expected = torch.special.ndtri((torch.arange(1000) + 0.5 / 1000).double() / 1000).float()
    assert (standard - expected)[10:-10].abs().max() < 0.03


def test_the_table_is_the_network(proxy):
    exact = proxy.sample((3, 40_000), 800, seeded(), table=None)
    found = proxy.sample((3, 40_000), 800, seeded())
    assert (found - exact).abs().max() < 1e-4 * exact.std()
    # Beyond the table the network itself is asked.
    z = torch.tensor([-30.0, -6.5, -6.0, 0.0, 6.0, 6.5, 30.0])
    assert (proxy._looked_up("nn_pre", z, 4096) - proxy.evaluate("nn_pre", z)).abs().max() < 1e-4 * exact.std()


def test_corrections_are_those_of_calibrated_isos_and_straight_between(proxy):
    iso = torch.tensor([400.0, 800.0, 1600.0])
    plain = GAIN[0] * iso + GAIN[1]
    torch.testing.assert_close(proxy.gain(iso), plain * proxy.scaler.exp())
    middle = math.sqrt(800 * 1600)
    expected = (GAIN[0] * middle + GAIN[1]) * math.exp(0.125)
    assert proxy.gain(middle).item() == pytest.approx(expected, rel=1e-6)
    for outside, correction in ((100, -0.1), (6400, 0.2)):
        expected = (GAIN[0] * outside + GAIN[1]) * math.exp(correction)
        assert proxy.gain(outside).item() == pytest.approx(expected, rel=1e-6)
    stds = [proxy.sample((1, 30_000), iso, seeded()).std() for iso in (400, 500, 800, 1130, 1600, 3200)]
    assert stds == sorted(stds)
    each = proxy.sample((2, 30_000), torch.tensor([400.0, 1600.0]), seeded())
    assert each[0].std().item() == pytest.approx(stds[0].item(), rel=0.02)
    assert each[1].std().item() == pytest.approx(stds[4].item(), rel=0.02)


def test_gradients_reach_the_corrections_of_the_isos_that_were_asked(proxy):
    gain = proxy.gain(400.0)
    (grad,) = torch.autograd.grad(gain, proxy.scaler)
    torch.testing.assert_close(grad, torch.tensor([gain.item(), 0, 0]))


def test_generators_shapes_precision(proxy):
    one, other = (proxy.sample((2, 4, 8, 8), 800, seeded(3)) for _ in range(2))
    assert torch.equal(one, other)
    assert not torch.equal(one, proxy.sample((2, 4, 8, 8), 800, seeded(4)))
    half = SensorNoiseProxy.from_config(proxy.config).to(torch.bfloat16)
    half.load_state_dict(proxy.state_dict())
    rounded = half.sample((2, 4, 8, 8), 800, seeded(3))
    assert rounded.dtype == torch.float32
    assert (rounded - one).abs().max() < 0.1 * one.std()


def test_saved_and_loaded(proxy, tmp_path):
    proxy.save_pretrained(tmp_path)
    loaded = SensorNoiseProxy.from_pretrained(tmp_path)
    assert torch.equal(loaded.sample((100,), 900, seeded()), proxy.sample((100,), 900, seeded()))


class Published(nn.Module):
    """The authors' proxy of pixels, from its description: names, gain and the factor's place."""

    def __init__(self):
        super().__init__()

        def network():
            return nn.Sequential(nn.Conv2d(1, 16, 1), nn.SiLU(), self.block(), self.block(), nn.Conv2d(16, 1, 1))

        self.nn_pre, self.nn_fol = network(), network()
        self.ISO2K = nn.Parameter(torch.tensor([0.0009546, -0.00193]), requires_grad=False)
        self.scaler = nn.Parameter(torch.zeros(31))

    @staticmethod
    def block():
        class Wrapped(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(16, 16, 1)

        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv1, self.conv2 = Wrapped(), Wrapped()

            def forward(self, x):
                act = nn.functional.silu
                return x + act(self.conv2.conv(act(self.conv1.conv(x))))

        return Block()

    def forward(self, z1, z2, iso):
        gain = (self.ISO2K[0] * iso + self.ISO2K[1]) * self.scaler[ISO_STOPS.index(iso)].exp()
        return gain * self.nn_pre(z1) + self.nn_fol(z2)


def test_published_weights():
    torch.manual_seed(1)
    theirs = Published()
    with torch.no_grad():
        theirs.scaler[[9, 12, 15]] = torch.tensor([0.1, -0.2, 0.3])  # 400, 800, 1600
    state = {f"proxy_pixel.{name}": value for name, value in theirs.state_dict().items()}
    ours = SensorNoiseProxy.from_original_state_dict(state)
    assert ours.config.calibrated_isos == (400, 800, 1600)
    assert sum(p.numel() for p in ours.nn_pre.parameters()) == 1137
    z = torch.randn(2, 4, 1, 20, 30, generator=seeded())
    for iso in (400, 800, 1600):
        torch.testing.assert_close(ours(z[0], z[1], iso), theirs(z[0], z[1], iso), atol=1e-6, rtol=1e-6)
    # Between the ISOs of its frames the factor is between theirs, not that of stops that were never trained.
    assert 0.8 < ours.gain(1130.0).item() / (0.0009546 * 1130 - 0.00193) < 1.36
    for wrong in ({}, {**state, "proxy_pixel.nn_pre.0.weight": torch.zeros(16, 2, 1, 1)}, {"a": torch.zeros(1)}):
        with pytest.raises(ValueError, match="`state` must"):
            SensorNoiseProxy.from_original_state_dict(wrong)


def test_wrong_arguments_are_refused(proxy):
    with pytest.raises(ValueError, match="`iso` must be above 0"):
        proxy.sample((4,), 0)
    with pytest.raises(ValueError, match="`iso` must be a number or one for each of the batch"):
        proxy.sample((3, 4), torch.tensor([400.0, 800.0]))
    with pytest.raises(ValueError, match="`table` must be an integer >= 2 or None"):
        proxy.sample((4,), 800, table=1)
    with pytest.raises(ValueError, match="`z2` must be of the shape of `z1`"):
        proxy(torch.zeros(1, 4), torch.zeros(1, 5), 800)
    with pytest.raises(ValueError, match="where 0.001 ISO"):
        SensorNoiseProxy(iso_to_gain=(0.001, -1.0)).gain(100)
    for wrong in (
        {"isos": (2, 1)},
        {"isos": ()},
        {"calibrated_isos": (1,)},
        {"hidden_channels": 1},
        {"num_blocks": -1},
    ):
        with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` must be"):
            SensorNoiseProxy(**wrong)
