"""Closed forms: what is sampled of a normal signal, with the exact denoiser in the place of a network."""

import pytest
import torch
from diffusers.schedulers import scheduling_ddim

from .gaussian import coordinates, observed, pipeline


def moments(monkeypatch, places, steps, eta=1.0, **call):
    """Mean and covariance of the signals, exactly: they are affine in the starts and in every noise drawn.

    The first row of the batch has none of them, each further row a single number alone.
    """
    together = len(places) if call.get("sampling") == "joint" else 1  # views of a chain
    chains = 1 if call.get("sampling") in ("joint", "single") else len(places)
    batch = 1 + together * chains * (1 + (steps if eta else 0))
    rows = iter(range(1, batch, together))

    def unit(shape, **_):
        made, row = torch.zeros(shape, dtype=torch.float64), next(rows)
        made[row : row + together].flatten(1).fill_diagonal_(1)
        return made

    starts = [unit((batch, together, 1, 1, 1)) for _ in range(chains)]
    monkeypatch.setattr(scheduling_ddim, "randn_tensor", unit)
    signals = pipeline()(
        observed(batch), coordinates(batch, 0), coordinates(batch, *places), latents=torch.cat(starts, 1), eta=eta,
        num_inference_steps=steps, **call,
    ).signals[:, 0, 0]  # fmt: skip
    slopes = signals[1:] - signals[:1]
    return signals[0], slopes.T @ slopes


@pytest.mark.parametrize(
    ("steps", "eta", "first", "second"),
    [
        (10, 0, 0.520372, 0.375824),
        (250, 0, 0.596565, 0.430853),
        (10, 1, 0.476533, 0.344163),
        (250, 1, 0.592135, 0.427653),
    ],
)
def test_a_single_view_is_a_sample_and_the_rest_is_its_mean(monkeypatch, steps, eta, first, second):
    mean, covariance = moments(monkeypatch, [1], steps, float(eta), sampling="single")
    found = covariance.diagonal().sqrt()
    torch.testing.assert_close(found, torch.tensor([0, first, second]).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(mean, torch.tensor([1, 0.8, 0.3]).double(), atol=1e-4, rtol=0)  # of 1,000 levels


def test_joint_views(monkeypatch):
    _, covariance = moments(monkeypatch, [1, 2], 250, sampling="joint")
    expected = torch.tensor([0, 0.350809, 0.892412]).double()
    torch.testing.assert_close(covariance.diagonal(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("order", "first", "second"), [([1, 2], 0.350624, 0.890190), ([2, 1], 0.350433, 0.892337)])
def test_autoregressive_views_agree_in_the_limit(monkeypatch, order, first, second):
    _, covariance = moments(monkeypatch, order, 250)
    expected = torch.tensor([0, first, second]).double()
    torch.testing.assert_close(covariance.diagonal(), expected, atol=1e-6, rtol=0)


def test_every_sample_lies_on_the_line_of_its_view():
    signals = pipeline()(
        observed(50), coordinates(50, 0), coordinates(50, 1), num_inference_steps=10, eta=1.0,
        generator=torch.Generator().manual_seed(0),
    ).signals[:, 0, 0]  # fmt: skip
    slope = (0.5 - 0.3 * 0.8) / (1 - 0.8**2)
    assert slope == pytest.approx(0.722222, abs=1e-6)
    torch.testing.assert_close(signals[:, 2] - 0.3, slope * (signals[:, 1] - 0.8), atol=1e-6, rtol=0)
    assert signals[:, 1].std() > 0.3
