"""The networks: the authors' weights, any size, exact tiles, and the loss on a case that is known."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from diffusers_ext import (
    Noise2ScoreConvNet,
    Noise2ScoreUNet,
    annealed_smoothing,
    ar_dae_loss,
    estimate_noise_std,
)
from diffusers_ext.generation.tiles import Tiling, tiled


class Original(nn.Module):
    """The network as the paper's code has it, built anew from its description."""

    def __init__(self, channels):
        super().__init__()

        def act():
            return nn.LeakyReLU(0.1)

        def conv(i, o):
            return nn.Conv2d(i, o, 3, stride=1, padding=1)

        def up(n):
            return nn.ConvTranspose2d(n, n, 3, stride=2, padding=1, output_padding=1)

        self._block1 = nn.Sequential(conv(channels, 48), act(), conv(48, 48), act(), nn.MaxPool2d(2))
        self._block2 = nn.Sequential(conv(48, 48), act(), nn.MaxPool2d(2))
        self._block3 = nn.Sequential(conv(48, 48), act(), up(48))
        self._block4 = nn.Sequential(conv(96, 96), act(), conv(96, 96), act(), up(96))
        self._block5 = nn.Sequential(conv(144, 96), act(), conv(96, 96), act(), up(96))
        self._block6 = nn.Sequential(conv(96 + channels, 64), act(), conv(64, 32), act(), conv(32, channels))

    def forward(self, x):
        pool1 = self._block1(x)
        pool2 = self._block2(pool1)
        pool3 = self._block2(pool2)
        pool4 = self._block2(pool3)
        up5 = self._block3(self._block2(pool4))
        up4 = self._block4(torch.cat((up5, pool4), 1))
        up3 = self._block5(torch.cat((up4, pool3), 1))
        up2 = self._block5(torch.cat((up3, pool2), 1))
        up1 = self._block5(torch.cat((up2, pool1), 1))
        return self._block6(torch.cat((up1, x), 1))


@pytest.mark.parametrize(("channels", "count"), [(1, 698_017), (3, 700_611)])
def test_the_authors_weights_give_the_authors_output(channels, count):
    torch.manual_seed(channels)
    original = Original(channels)
    assert sum(p.numel() for p in original.parameters()) == count
    state = {f"module.{name}": value for name, value in original.state_dict().items()}
    unet = Noise2ScoreUNet.from_original_state_dict(state, smoothing=0.001)
    assert unet.config.smoothing == 0.001
    x = torch.randn(2, channels, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(unet(x).sample, original(x), atol=1e-5, rtol=0)


def test_other_weights_are_refused():
    with pytest.raises(ValueError, match="`state` must hold `_block1.0.weight`"):
        Noise2ScoreUNet.from_original_state_dict({"conv.weight": torch.zeros(1)})
    state = Original(1).state_dict()
    del state["_block3.2.bias"]
    with pytest.raises(ValueError, match="`state` must hold the weights of Noise2Score's U-Net"):
        Noise2ScoreUNet.from_original_state_dict(state)


def unet(**config):
    torch.manual_seed(0)
    network = Noise2ScoreUNet(base_channels=6, **config).eval()
    for p in network.parameters():  # larger than in training, so that every path counts
        nn.init.normal_(p, 0, 0.15)
    return network


@pytest.mark.parametrize("size", [(321, 481), (33, 20), (1, 5)])
def test_any_size_is_mirrored_and_cut(size):
    network, x = unet(), torch.rand(1, 1, *size)
    height, width = (-n % 32 for n in size)
    mode = "reflect" if min(size) > 1 else "symmetric"
    mirrored = torch.from_numpy(np.pad(x[0, 0].numpy(), ((0, height), (0, width)), mode))[None, None]
    if size == (1, 5):  # a row is repeated, then mirrored
        mirrored = torch.from_numpy(np.pad(np.tile(x[0, 0].numpy(), (32, 1)), ((0, 0), (0, width)), "reflect"))
        mirrored = mirrored[None, None]
    with torch.no_grad():
        expected = network(mirrored).sample[..., : size[0], : size[1]]
        torch.testing.assert_close(network(x).sample, expected, atol=1e-6, rtol=0)


def test_scales_and_levels_are_used():
    x = torch.rand(2, 1, 32, 32)
    plain, scaled = unet(), unet(input_scale=0.5, score_scale=4.0)
    with torch.no_grad():
        torch.testing.assert_close(scaled(x).sample, 4 * plain(x / 2).sample)
        network = unet(sigma_conditioning=True, smoothing=0.3)
        torch.testing.assert_close(network(x).sample, network(x, 0.3).sample)
        rows = network(x, torch.tensor([0.1, 0.3])).sample
        torch.testing.assert_close(rows[1:], network(x[1:]).sample)
        assert (rows[0] - network(x[:1]).sample).abs().max() > 1e-3
        assert network(x, return_dict=False)[0].shape == x.shape


@pytest.mark.parametrize("kind", ["unet", "conv"])
def test_tiles_are_exact(kind):
    torch.manual_seed(0)
    network = unet() if kind == "unet" else Noise2ScoreConvNet(base_channels=6).eval()
    x = torch.rand(1, 1, 390, 231) if kind == "unet" else torch.rand(2, 1, 50, 61)
    tile = 64 if kind == "unet" else 17
    with torch.no_grad():
        whole = network(x).sample
        count = []

        def call(v):
            return network(v).sample

        tiling = Tiling(tile, network.tile_margin, network.tile_multiple)
        cut, difference = tiled(call, x, tiling, lambda: count.append(1))
        torch.testing.assert_close(cut, whole, atol=1e-5, rtol=0)
        assert difference == 0
        assert len(count) == tiling.count(*x.shape[2:]) > 8
        # Less than the margin is not enough, so that the test can fail.
        short = Tiling(tile, network.tile_margin - (96 if kind == "unet" else 2), network.tile_multiple)
        assert (tiled(call, x, short)[0] - whole).abs().max() > 1e-5


def test_blending_is_right_where_tiles_agree_and_measures_where_they_do_not():
    x = torch.rand(1, 1, 41, 50)
    tiling = Tiling(16, None, 4)
    same, difference = tiled(lambda v: 2 * v, x, tiling)
    torch.testing.assert_close(same, 2 * x)
    assert difference < 1e-5
    other, difference = tiled(lambda v: v - v.mean(), x, tiling)
    assert other.shape == x.shape
    assert 0.01 < difference < 1


def test_ar_dae_has_its_known_loss_and_minimum():
    v, n = 1.0, 1_000_000
    sa = math.sqrt(v / 4)
    y, u = torch.randn(2, n, generator=torch.Generator().manual_seed(0))
    for g in (0.0, -0.4, -1.1):
        expected = (1 + sa**2 * g) ** 2 + sa**2 * g**2 * v
        assert ar_dae_loss(lambda x, g=g: g * x, y, u, sa).item() == pytest.approx(expected, rel=0.01)
    noisy = y + sa * u  # the least squares solution of u + sa g (y + sa u) = 0
    g = -(u * noisy).mean() / (sa * noisy.square().mean())
    assert g.item() == pytest.approx(-1 / (v + sa**2), rel=0.01)
    assert ar_dae_loss(torch.zeros_like, y, u, sa).item() == pytest.approx(1, rel=0.01)


def test_annealing_goes_down_once():
    assert [annealed_smoothing(n, 1.5, 1.0, 100) for n in (0, 50, 100, 10_000)] == [1.5, 1.25, 1.0, 1.0]
    assert annealed_smoothing(0, 1.5, 1.0, 0) == 1.0


def test_the_noise_of_an_image_is_estimated_through_its_edges():
    step = torch.arange(101).float().div(100).round().mul(0.8)
    y = step + 0.1 * torch.randn(2, 1, 91, 101, generator=torch.Generator().manual_seed(0))
    assert estimate_noise_std(y) == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Noise2ScoreUNet(out_channels=3), "`out_channels` must be 1 as `in_channels`"),
        (lambda: Noise2ScoreUNet(base_channels=0), "`base_channels` must be an integer >= 1, got 0"),
        (lambda: Noise2ScoreConvNet(layers=1), "`layers` must be an integer >= 2, got 1"),
        (lambda: Noise2ScoreConvNet(score_scale=0.0), "`score_scale` must be a number > 0, got 0.0"),
        (lambda: Noise2ScoreConvNet()(torch.rand(1, 3, 8, 8)), r"`sample` must be \(batch, 1, height, width\)"),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
