"""DomainStudio's losses against loops, closed forms and an independent Haar transform."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler

from diffusers_ext import (
    DomainStudioLoss,
    EpsX0V,
    FlowMatching,
    haar_high_frequency,
    intra_cluster_distance,
    pairwise_log_similarity,
    pairwise_similarity_loss,
)


def images(n=5, seed=0, channels=3, size=8):
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def looped(adapted, source):
    """The mean of KLDivLoss over one row an image, each row by a loop over the others."""

    def row(x, i):
        others = [F.cosine_similarity(x[i].flatten(), x[j].flatten(), dim=0) for j in range(len(x)) if j != i]
        return torch.softmax(torch.stack(others), 0)

    ours = torch.stack([row(adapted, i) for i in range(len(adapted))])
    theirs = torch.stack([row(source, i) for i in range(len(source))])
    return torch.nn.KLDivLoss(reduction="none")(ours.log(), theirs).mean(), (
        theirs * (theirs / ours).log()
    ).sum() / len(ours)


@pytest.mark.parametrize("n", [3, 5, 16])
def test_the_batched_loss_is_the_double_loop(n):
    adapted, source = images(n), images(n, 1)
    elementwise, batchmean = looped(adapted, source)
    assert pairwise_similarity_loss(adapted, source).item() == pytest.approx(elementwise.item(), abs=1e-6)
    assert pairwise_similarity_loss(adapted, source, "batchmean").item() == pytest.approx(batchmean.item(), abs=1e-6)
    assert batchmean.item() == pytest.approx((n - 1) * elementwise.item(), rel=1e-3)


def test_equal_images_give_no_loss_and_no_gradient():
    adapted = images().requires_grad_()
    loss = pairwise_similarity_loss(adapted, images())
    assert abs(loss.item()) < 1e-7
    assert torch.autograd.grad(loss, adapted)[0].abs().max() < 1e-6


def test_two_images_give_exactly_nothing():
    assert pairwise_similarity_loss(images(2), images(2, 1)).item() == 0.0


def test_orthogonal_images_are_alike():
    x = torch.eye(3).view(3, 1, 1, 3)
    torch.testing.assert_close(pairwise_log_similarity(x).exp(), torch.full((3, 2), 0.5), atol=1e-7, rtol=0)


def test_scale_and_order_change_nothing():
    adapted, source = images(), images(5, 1)
    expected = pairwise_similarity_loss(adapted, source).item()
    scaled = adapted.clone()
    scaled[2] *= 7.5
    assert pairwise_similarity_loss(scaled, source).item() == pytest.approx(expected, abs=1e-6)
    order = torch.tensor([3, 0, 4, 1, 2])
    assert pairwise_similarity_loss(adapted[order], source[order]).item() == pytest.approx(expected, abs=1e-6)


def test_haar_of_constants_and_of_a_chequerboard():
    assert haar_high_frequency(torch.full((1, 2, 4, 6), 0.7)).abs().max() < 1e-6
    board = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(2, 3)[None, None]
    low, high, both = haar_high_frequency(board, combine="none")[0, 0]
    assert low.abs().max() == high.abs().max() == 0
    assert both.tolist() == [[2.0] * 3] * 2


def test_haar_equals_its_definition_and_keeps_the_sum_of_squares():
    x = images(2)
    a, b, c, d = x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
    bands = torch.stack([(-a + b - c + d) / 2, (-a - b + c + d) / 2, (a - b - c + d) / 2], 2)
    torch.testing.assert_close(haar_high_frequency(x, combine="none"), bands, atol=1e-6, rtol=0)
    one = F.conv2d(x.view(6, 1, 8, 8), torch.tensor([[[[-0.5, -0.5], [-0.5, 1.5]]]]), stride=2).view(2, 3, 4, 4)
    torch.testing.assert_close(haar_high_frequency(x), one, atol=1e-6, rtol=0)
    total = (((a + b + c + d) / 2).square().sum() + haar_high_frequency(x, combine="none").square().sum()).item()
    assert total == pytest.approx(x.square().sum().item(), rel=1e-6)


def test_haar_equals_pywavelets():
    pywt = pytest.importorskip("pywt")
    x = images(1, channels=1)
    _, (horizontal, vertical, diagonal) = pywt.dwt2(x[0, 0].numpy(), "haar")
    lh, hl, hh = haar_high_frequency(x, combine="none")[0, 0].numpy()
    for ours, theirs in ((lh, vertical), (hl, horizontal), (hh, diagonal)):
        np.testing.assert_allclose(np.abs(ours), np.abs(theirs), atol=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_true_prediction_gives_the_clean_sample(prediction_type):
    objective = EpsX0V(DDPMScheduler(prediction_type=prediction_type))
    x0, noise, t = images(), images(5, 1), torch.tensor([0, 100, 500, 800, 900])
    noisy, target = objective.make(x0, noise, t)
    found = objective.predicted_sample(target, noisy, t)
    torch.testing.assert_close(found, x0, atol=1e-4, rtol=0)
    terms = DomainStudioLoss(hf_mse_weighting="x0")(found, found, x0, snr=objective.snr(t), timesteps=t)
    assert terms["hf_mse"].item() < 1e-8


def test_all_kinds_of_prediction_give_the_same_sample():
    noisy, wrong, t = images(), images(5, 2), torch.tensor([10, 200, 500, 700, 900])
    kinds = {kind: EpsX0V(DDPMScheduler(prediction_type=kind)) for kind in ("epsilon", "v_prediction", "sample")}
    alpha = kinds["epsilon"].scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    x0 = (noisy - (1 - alpha).sqrt() * wrong) / alpha.sqrt()
    predictions = {"epsilon": wrong, "sample": x0, "v_prediction": alpha.sqrt() * wrong - (1 - alpha).sqrt() * x0}
    for kind, objective in kinds.items():
        torch.testing.assert_close(objective.predicted_sample(predictions[kind], noisy, t), x0, rtol=1e-4, atol=1e-4)


def test_the_clean_sample_of_a_flow():
    objective, x0, noise, sigma = FlowMatching(), images(), images(5, 1), torch.tensor([0.01, 0.3, 0.5, 0.9, 1.0])
    noisy, target = objective.make(x0, noise, sigma)
    torch.testing.assert_close(objective.predicted_sample(target, noisy, sigma), x0, atol=1e-5, rtol=0)
    torch.testing.assert_close(objective.snr(sigma)[:3], torch.tensor([99.0**2, (7 / 3) ** 2, 1.0]), rtol=1e-4, atol=0)


def test_terms_and_weights():
    adapted, source, target = images(4), images(4, 1), images(4, 2)
    snr, t = torch.tensor([0.01, 0.5, 2.0, 100.0]), torch.arange(4)
    terms = DomainStudioLoss(2.0, 3.0, 5.0)(adapted, source, target, snr=snr, timesteps=t)
    high = [haar_high_frequency(x) for x in (adapted, source, target)]
    each = (high[0] - high[2]).square().mean((1, 2, 3))
    assert terms["pair"].item() == pytest.approx(2 * pairwise_similarity_loss(adapted, source).item(), rel=1e-6)
    assert terms["hf_pair"].item() == pytest.approx(3 * pairwise_similarity_loss(*high[:2]).item(), rel=1e-6)
    weighted = 5 * (each * torch.tensor([0.01, 0.5, 1.0, 1.0])).mean().item()
    assert terms["hf_mse"].item() == pytest.approx(weighted, rel=1e-5)
    plain = DomainStudioLoss(0.0, 0.0, 5.0, "x0")(adapted, None, target, snr=snr, timesteps=t)
    assert list(plain) == ["hf_mse"]
    assert plain["hf_mse"].item() == pytest.approx(5 * each.mean().item(), rel=1e-6)
    assert dict(DomainStudioLoss(0.0, 0.0, 0.0)(adapted, None, target, snr=snr, timesteps=t)) == {}


def test_noisy_images_may_be_left_out_of_the_pairs():
    adapted, source, t = images(5), images(5, 1), torch.tensor([10, 900, 20, 950, 30])
    loss = DomainStudioLoss(1.0, 1.0, 0.0, max_pair_timestep=500)
    terms = loss(adapted, source, adapted, snr=torch.ones(5), timesteps=t)
    kept = t <= 500
    assert terms["pair"].item() == pytest.approx(
        pairwise_similarity_loss(adapted[kept], source[kept]).item(), rel=1e-6
    )
    none = loss(adapted, source, adapted, snr=torch.ones(5), timesteps=t + 600)
    assert (none["pair"].item(), none["hf_pair"].item()) == (0.0, 0.0)


def test_intra_cluster_distance_of_known_clusters():
    samples = torch.tensor([[0.0, 0.0], [0.0, 2.0], [0.0, 1.0], [9.0, 0.0], [9.0, 4.0], [50.0, 0.0]])
    references = torch.tensor([[0.0, 1.0], [9.0, 1.0], [50.0, 1.0]])
    # Pairs 2, 1, 1 in the first cluster, 4 in the second; one sample has no pair.
    assert intra_cluster_distance(samples, references) == pytest.approx(((2 + 1 + 1) / 3 + 4) / 2, rel=1e-6)
    copies = references.repeat(3, 1)
    assert intra_cluster_distance(copies, references) == pytest.approx(0, abs=1e-6)
    doubled = intra_cluster_distance(samples, references, lambda a, b: 2 * torch.cdist(a, b))
    assert doubled == pytest.approx(2 * intra_cluster_distance(samples, references), rel=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: haar_high_frequency(images(size=7)), r"`x` must be \(batch, channels, even height, even width\)"),
        (lambda: haar_high_frequency(images(), combine="mean"), "`combine` must be 'sum' or 'none', got 'mean'"),
        (lambda: pairwise_log_similarity(images(1)), "`x` must hold at least 2 images, got 1"),
        (lambda: pairwise_similarity_loss(images(3), images(4)), "`source` must hold 3 images as `adapted`, got 4"),
        (lambda: pairwise_similarity_loss(images(3), images(3), "sum"), "`reduction` must be 'elementwise' or"),
        (lambda: DomainStudioLoss(pair_weight=-1.0), "`pair_weight` must be a number >= 0, got -1.0"),
        (lambda: DomainStudioLoss(hf_mse_weighting="none"), "`hf_mse_weighting` must be 'snr' or 'x0', got 'none'"),
        (lambda: intra_cluster_distance(torch.eye(2), torch.eye(2)), "`samples` must hold two"),
        (
            lambda: DomainStudioLoss()(images(), None, images(), snr=torch.ones(5), timesteps=torch.arange(5)),
            "`source` must be given where a pair loss has a weight",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
