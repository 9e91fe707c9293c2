"""Simplex noise: its variance in closed form, its correlation, and what training asks of a noise strategy."""

import math

import pytest
import torch

from diffusers_ext import DenoisingConfig, SimplexNoise, StepRNG
from diffusers_ext.methods.score_frameworks.noise import VARIANCE


@pytest.fixture(scope="module")
def fields():
    generator = torch.Generator().manual_seed(0)
    return torch.cat([SimplexNoise().sample((50, 2, 64, 64), generator) for _ in range(10)]).flatten(0, 1)


def test_fields_of_variance_one_and_the_published_correlation(fields):
    assert len(fields) == 1000
    assert fields.std().item() == pytest.approx(1, abs=0.03)
    for distance, wanted, tolerance in ((1, 0.91, 0.03), (8, 0.47, 0.06)):
        across = fields[..., distance:] * fields[..., :-distance]
        down = fields[:, distance:] * fields[:, :-distance]
        for products in (across, down):
            assert products.mean() / fields.square().mean() == pytest.approx(wanted, abs=tolerance)


def test_samples_and_channels_differ_and_pixels_are_alike(fields):
    products = (fields[:20, None] * fields[None, :20]).mean((2, 3))
    # Smooth fields of 64 pixels have few independent values.
    assert (products - torch.diag(products.diag())).abs().max() < 0.8
    assert products.diag().min() > 0.1
    by_pixel = fields.square().mean(0)  # no place of the image is special
    assert by_pixel.min() > 0.75
    assert by_pixel.max() < 1.3


def test_one_octave_has_the_closed_variance_and_is_continuous():
    noise = SimplexNoise(frequency=7.3, octaves=1, unit_variance=False)
    found = noise.sample((300, 1, 64, 64), torch.Generator().manual_seed(1))
    assert found.std().item() == pytest.approx(105 * math.sqrt(VARIANCE), rel=0.01)
    assert 0.8 < found.abs().max() < 1.1
    fine = SimplexNoise(frequency=1000.0, octaves=1).sample((40, 1, 256, 2), torch.Generator().manual_seed(2))
    assert fine.diff(dim=2).abs().max() < 0.02  # a jump at the border of a simplex would be seen


def test_a_strategy_of_training_that_follows_the_sample():
    config = DenoisingConfig(
        train_data_dir="x", output_dir="y", max_train_steps=1, noise="simplex", noise_options='{"octaves": 3}'
    )
    made = config.make_noise()
    assert isinstance(made, SimplexNoise)
    assert made.octaves == 3
    x0 = torch.zeros(4, 1, 16, 24, dtype=torch.bfloat16)
    rng = StepRNG(seed=3, scope="sample")
    rng.begin(0)
    whole = made(x0, rng=rng, ids=[5, 6, 7, 8])
    assert whole.shape == x0.shape
    assert whole.dtype == torch.bfloat16
    rng.begin(9)
    assert torch.equal(made(x0[2:], rng=rng, ids=[7, 8]), whole[2:])
    rng.begin(9)
    step = StepRNG(seed=3)
    step.begin(0)
    first = made(x0, rng=step)
    step.begin(1)
    assert not torch.equal(made(x0, rng=step), first)


def test_bad_input_is_refused():
    for name, value in (("frequency", 0), ("octaves", 0), ("octaves", 1.5), ("persistence", 0), ("persistence", 1.1)):
        with pytest.raises(ValueError, match=f"`{name}` must be .*got {value}"):
            SimplexNoise(**{name: value})
    with pytest.raises(ValueError, match=r"`shape` must be \(batch, channels, height, width\)"):
        SimplexNoise().sample((2, 8, 8))
