"""Metrics of detectors against closed forms and scikit-learn."""

import numpy as np
import pytest
import torch

from diffusers_ext import auroc, average_precision, best_dice, fpr_at_tpr

LABELS, SCORES = [0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]


def test_known_answers():
    assert auroc(LABELS, SCORES) == 0.75
    assert average_precision(LABELS, SCORES) == pytest.approx(0.8333333, abs=1e-7)
    assert best_dice(LABELS, SCORES) == pytest.approx(0.8)
    assert fpr_at_tpr(LABELS, SCORES) == 0.5
    assert fpr_at_tpr(LABELS, SCORES, 0.5) == 0.0
    assert auroc(LABELS, [3.0] * 4) == 0.5
    assert average_precision(LABELS, [3.0] * 4) == 0.5
    assert best_dice(LABELS, [3.0] * 4) == pytest.approx(2 / 3)


def test_normal_scores_have_the_closed_area():
    draw = np.random.default_rng(0)
    scores = np.concatenate([draw.normal(0, 1, 40000), draw.normal(2, 1, 40000)])
    assert auroc(np.repeat([0, 1], 40000), scores) == pytest.approx(0.92135, abs=0.002)


def test_equal_to_scikit_learn_with_many_ties():
    metrics = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(1)
    labels, scores = draw.random((20, 30)) < 0.1, draw.integers(0, 9, (20, 30))
    given = torch.from_numpy(labels), torch.from_numpy(scores)
    flat = labels.ravel(), scores.ravel()
    assert auroc(*given) == pytest.approx(metrics.roc_auc_score(*flat), abs=1e-12)
    assert average_precision(*given) == pytest.approx(metrics.average_precision_score(*flat), abs=1e-12)
    dice = max(metrics.f1_score(flat[0], flat[1] >= t) for t in range(9))
    assert best_dice(*given) == pytest.approx(dice, abs=1e-12)
    false, true, _ = metrics.roc_curve(*flat, drop_intermediate=False)
    assert fpr_at_tpr(*given) == pytest.approx(false[true >= 0.95].min(), abs=1e-12)


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([0, 1], [1.0, 2.0, 3.0], "`labels` must be as many as `scores`, 3, got 2"),
        ([0, 2], [1.0, 2.0], r"`labels` must be 0 and 1, got \[0, 2\]"),
        ([1, 1], [1.0, 2.0], "`labels` must hold both 0 and 1, got 2 of 2 that are 1"),
        ([0, 1], [1.0, float("nan")], "`scores` must be numbers, got NaN"),
    ],
)
def test_bad_input_is_refused(labels, scores, message):
    for metric in (auroc, average_precision, best_dice, fpr_at_tpr):
        with pytest.raises(ValueError, match=message):
            metric(labels, scores)
    with pytest.raises(ValueError, match=r"`tpr` must be a number in \(0, 1\], got 0"):
        fpr_at_tpr(LABELS, SCORES, 0)
