"""Diagnostics of states whose figures are known."""

import numpy as np
import pytest
import torch
from scipy import stats

from diffusers_ext import noise_diagnostics, plot_noise_diagnostics


def noise(scale=1.0, shape=(4, 4, 128, 128), seed=0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("scale", "ks"), [(1.1, 0.0230), (0.9, 0.0255), (1.0, 0.0)])
def test_scaled_noise(scale, ks):
    found = noise_diagnostics(noise(scale))
    assert found.pooled["rms"] == pytest.approx(scale, abs=0.005)
    assert found.pooled["norm_ratio"] == pytest.approx(scale, abs=0.005)
    assert found.pooled["tail_2"] == pytest.approx(2 * stats.norm.sf(2 / scale), abs=2e-3)
    assert found.pooled["tail_3"] == pytest.approx(2 * stats.norm.sf(3 / scale), abs=1e-3)
    assert found.pooled["ks"] == pytest.approx(ks, abs=0.005)
    assert abs(found.pooled["excess_kurtosis"]) < 0.05
    assert abs(found.pooled["correlation"]) < 0.01
    assert found.rms.shape == (4,)
    assert found.rms.square().mean().sqrt().item() == pytest.approx(found.pooled["rms"], abs=1e-9)


def test_each_sample_is_its_own():
    states = torch.cat([noise(1.0, (1, 4, 64, 64)), noise(2.0, (1, 4, 64, 64), 1)])
    found = noise_diagnostics(states, expected_std=2.0, inflation=1.25)
    alone = noise_diagnostics(states[1:], expected_std=2.0)
    assert found.norm_ratio.tolist() == pytest.approx([0.5, 1.0], abs=0.02)
    assert found.ks[1].item() == pytest.approx(alone.pooled["ks"], abs=1e-12)
    assert found.own_norm_ratio.tolist() == pytest.approx([0.4, 0.8], abs=0.02)
    assert "1.250 for normal data" in str(found)
    assert len(str(found).splitlines()) == 5


def test_heavy_tails_and_neighbours():
    laplace = torch.from_numpy(np.random.default_rng(0).laplace(size=(1, 1, 256, 256)))
    assert noise_diagnostics(laplace).pooled["excess_kurtosis"] == pytest.approx(3, abs=0.3)
    white = noise(1.0, (1, 1, 512, 512))
    smooth = (white + white.roll(1, -1) + white.roll(1, -2) + white.roll((1, 1), (-2, -1))) / 2
    # A moving average of two values has the correlation 1/2 with its neighbour, on both axes.
    assert noise_diagnostics(smooth).pooled["correlation"] == pytest.approx(0.5, abs=0.01)
    ramp = torch.arange(16.0).reshape(1, 16).expand(1, 16, 16)
    assert noise_diagnostics(ramp).pooled["correlation"] == pytest.approx(1.0, abs=1e-9)
    assert torch.isnan(noise_diagnostics(torch.randn(2, 8)).correlation).all()


def test_against_scipy():
    """The same figures from another implementation, in both precisions."""
    states = 1.3 * noise(1.0, (3, 2, 9, 7)).abs() - 0.4
    for given, tolerance in ((states, 1e-9), (states.float(), 1e-5)):
        found = noise_diagnostics(given, expected_std=1.1)
        rows = [*(x.flatten().numpy() for x in states / 1.1), (states / 1.1).flatten().numpy()]
        for i, row in enumerate(rows):
            figures = {n: getattr(found, n)[i].item() for n in found.pooled} if i < 3 else found.pooled
            assert figures["ks"] == pytest.approx(stats.ks_1samp(row, stats.norm.cdf).statistic, abs=tolerance)
            assert figures["excess_kurtosis"] == pytest.approx(stats.kurtosis(row), abs=tolerance)
            assert figures["tail_2"] == (np.abs(row) > 2).mean()
            assert figures["tail_3"] == (np.abs(row) > 3).mean()
    flat = noise_diagnostics(torch.full((1, 2, 4, 4), 0.3))
    assert flat.pooled["excess_kurtosis"] == flat.pooled["correlation"] == 0
    assert flat.samples == (0,)


def test_plot(tmp_path):
    figure = plot_noise_diagnostics({"inverted": noise(1.2), "frames": noise(1.0).half()}, inflation=1.05)
    top, table = figure.axes
    assert [text.get_text() for text in top.get_legend().get_texts()] == [
        "expected noise",
        "normal data, inverted",
        "inverted",
        "frames",
    ]
    cells = table.tables[0].get_celld()
    assert cells[1, 0].get_text().get_text() == f"{noise_diagnostics(noise(1.2)).pooled['rms']:.3f}"
    figure.savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="`latents` must hold at least one set of states"):
        plot_noise_diagnostics({})


@pytest.mark.parametrize(
    ("latents", "expected_std", "message"),
    [
        (torch.zeros(0, 4), 1.0, r"`latents` must have the shape \(batch >= 1, ...\)"),
        (torch.zeros(3), 1.0, r"`latents` must have the shape"),
        (torch.tensor([[1.0, float("nan")]]), 1.0, "`latents` must be finite"),
        (torch.zeros(1, 4), 0.0, "`expected_std` must be a number > 0, got 0.0"),
    ],
)
def test_refusals(latents, expected_std, message):
    with pytest.raises(ValueError, match=message):
        noise_diagnostics(latents, expected_std)
