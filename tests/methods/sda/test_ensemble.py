"""Every way to combine two views, by hand."""

import math

import pytest
import torch

from diffusers_ext import ensemble_logits

LN3 = math.log(3)
# Two classes; a gap of ln 3 is the probabilities 3/4 and 1/4, a gap of 0 a half each.
FIRST = torch.tensor([[LN3, 0.0], [0.0, 0.0], [0.0, LN3], [1.0, 1.0], [2.0, 2.0], [LN3, 0.0]])
SECOND = torch.tensor([[0.0, 0.0], [0.0, LN3], [LN3, 0.0], [3.0, 3.0], [0.0, LN3], [5.0, 5.0 + LN3]])
H_GAP = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
H_EVEN = math.log(2)


def rows(*choice):
    """Rows of the first view (1) or of the second (2)."""
    return torch.stack([(FIRST if view == 1 else SECOND)[i] for i, view in enumerate(choice)])


def test_sum_and_single_views():
    assert torch.equal(ensemble_logits(FIRST, SECOND), FIRST + SECOND)
    assert ensemble_logits(FIRST, SECOND, "source") is FIRST
    assert ensemble_logits(FIRST, SECOND, "adapted") is SECOND


@pytest.mark.parametrize("mode", ["entropy", "confidence", "variance"])
def test_the_surer_view_is_taken_and_the_second_on_a_tie(mode):
    chosen = ensemble_logits(FIRST[:5], SECOND[:5], mode)
    assert torch.equal(chosen, rows(1, 2, 2, 2, 2))


def test_weighted_by_the_other_views_entropy():
    first, second = [H_GAP, H_EVEN, H_GAP, H_EVEN, H_EVEN, H_GAP], [H_EVEN, H_GAP, H_GAP, H_EVEN, H_GAP, H_GAP]
    expected = FIRST * torch.tensor(second)[:, None] + SECOND * torch.tensor(first)[:, None]
    assert torch.allclose(ensemble_logits(FIRST, SECOND, "entropy_sum"), expected, atol=1e-6)


def test_weighted_by_confidence():
    first, second = [0.75, 0.5, 0.75, 0.5, 0.5, 0.75], [0.5, 0.75, 0.75, 0.5, 0.75, 0.75]
    expected = FIRST * torch.tensor(first)[:, None] + SECOND * torch.tensor(second)[:, None]
    assert torch.allclose(ensemble_logits(FIRST, SECOND, "confidence_sum"), expected, atol=1e-6)


def test_bad_input():
    with pytest.raises(ValueError, match=r"are the label sets the same\?"):
        ensemble_logits(FIRST, torch.zeros(6, 3))
    with pytest.raises(ValueError, match="`mode` must be one of"):
        ensemble_logits(FIRST, SECOND, "mean")  # type: ignore[arg-type]
