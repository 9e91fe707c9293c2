"""The loss: its gradients, its minimiser, and what it is when the forward model sees everything."""

import pytest
import torch

from diffusers_ext import (
    CropForwardModel,
    EpsX0V,
    LiftedViews,
    MaskForwardModel,
    ObservationMLP,
    forward_model_loss,
    lift_views,
    lifted_input,
)

from .gaussian import COVARIANCE
from .tiny import Everything, scheduler, unet


def masks(*places):
    """`(1, views, 1, 1, 4)` masks that show these pixels of four."""
    made = torch.zeros(1, len(places), 1, 1, 4, dtype=torch.float64)
    for view, seen in enumerate(places):
        made[0, view, ..., list(seen)] = 1
    return made


def test_gradient_of_two_of_four_pixels():
    signal = torch.zeros(1, 1, 1, 4, dtype=torch.float64, requires_grad=True)
    corner = torch.tensor([[[0, 0]]])
    target = torch.ones(1, 1, 1, 1, 2, dtype=torch.float64)
    forward_model_loss(signal, CropForwardModel((1, 2), (1, 4)), target, corner).backward()
    assert signal.grad.flatten().tolist() == [-1, -1, 0, 0]


def test_only_seen_pixels_have_a_gradient():
    signal = torch.randn(1, 1, 1, 4, dtype=torch.float64, requires_grad=True)
    both = masks([0], [2])
    target, novel = both[:, :1], both[:, 1:]
    model = MaskForwardModel((1, 4))
    forward_model_loss(signal, model, target, target).backward()
    assert (signal.grad.flatten() != 0).tolist() == [True, False, False, False]
    signal.grad = None
    forward_model_loss(signal, model, target, target, novel, novel, novel_weight=3.0).backward()
    assert (signal.grad.flatten() != 0).tolist() == [True, False, True, False]
    s = signal.detach().flatten()
    expected = torch.stack([2 * (s[0] - 1), 3 * 2 * (s[2] - 1)]) / 4
    torch.testing.assert_close(signal.grad.flatten()[[0, 2]], expected)


def test_targets_without_weight_do_not_count():
    signal = torch.randn(2, 1, 1, 4, dtype=torch.float64)
    views = masks([0], [2]).expand(2, -1, -1, -1, -1)
    model, target = MaskForwardModel((1, 4)), torch.randn(2, 2, 1, 1, 4, dtype=torch.float64)
    weights = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    found = forward_model_loss(signal, model, target, views, target_weights=weights)
    error = (signal[:, None] * views - target).square().flatten(2).mean(2)
    torch.testing.assert_close(found, (error[0, 0] + (error[1, 0] + error[1, 1]) / 2) / 2)
    with pytest.raises(ValueError, match="at least one target observation of each sample"):
        forward_model_loss(signal, model, target, views, target_weights=weights * torch.tensor([[0.0], [1.0]]))


def test_a_forward_model_that_sees_everything_is_plain_diffusion():
    objective, nothing = EpsX0V(scheduler()), torch.zeros(3, 1, 0)
    x0, noise, prediction = torch.randn(3, 3, 1, 8, 8).unbind(0)
    t = torch.tensor([3, 500, 999])
    _, target = objective.make(x0, noise, t)
    found = forward_model_loss(prediction, Everything(), x0[:, None], nothing)
    assert torch.equal(found, objective.loss(prediction, target, t))


def test_the_minimiser_is_the_mean_of_the_signal_given_what_the_network_is_shown():
    """One coordinate as context, one noised, one novel: at the exact estimator the gradient is 0, up to the draws."""
    n, alpha = 400_000, 0.3
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(2, n, 3, generator=generator, dtype=torch.float64)
    signal = draws[0] @ torch.linalg.cholesky(COVARIANCE).T
    shown = torch.stack([signal[:, 0], alpha**0.5 * signal[:, 1] + (1 - alpha) ** 0.5 * draws[1, :, 0]], 1)
    rows = torch.tensor([[1, 0, 0], [0, alpha**0.5, 0]], dtype=torch.float64)
    noise = torch.tensor([0, 1 - alpha]).double().diag()
    exact = torch.linalg.solve(rows @ COVARIANCE @ rows.T + noise, rows @ COVARIANCE)
    weights = exact.clone().requires_grad_()
    estimate = (shown @ weights)[:, None, None]
    model, corner = CropForwardModel(1, (1, 3)), torch.tensor([[[0, 1]]]).expand(n, -1, -1)
    seen, novel = (signal[:, None, None, None, i : i + 1] for i in (1, 2))
    forward_model_loss(estimate, model, seen, corner, novel, corner + torch.tensor([0, 1])).backward()
    assert torch.equal(weights.grad[:, 0], torch.zeros(2).double())  # seen by no view
    error = (estimate.detach().flatten(1) - signal)[:, 1:]
    products = 2 * shown[:, :, None] * error[:, None]
    torch.testing.assert_close(weights.grad[:, 1:], products.mean(0))
    assert (weights.grad[:, 1:].abs() < 4 * products.std(0) / n**0.5).all()


# ---------------------------------------------------------------- what the network is shown


def test_the_network_is_shown_sums_over_views_in_any_order():
    model, corners = CropForwardModel(4, 8), torch.tensor([[[0, 0], [2, 3]]])
    views = torch.randn(1, 2, 1, 4, 4)
    lifted = lift_views(unet(), model, views, corners)
    expected = torch.zeros(8, 8)
    expected[:4, :4] += views[0, 0, 0]
    expected[2:6, 3:7] += views[0, 1, 0]
    torch.testing.assert_close(lifted.values[0, 0], expected)
    assert lifted.coverage[0, 0, 3, 3] == 2
    assert lifted.coverage.sum() == 32
    other = lift_views(unet(), model, views.flip(1), corners.flip(1))
    torch.testing.assert_close(lifted_input(other), lifted_input(lifted), atol=1e-6, rtol=0)
    one = [lift_views(unet(), model, views[:, i : i + 1], corners[:, i : i + 1]) for i in range(2)]
    torch.testing.assert_close(vars(one[0] + one[1]), vars(lifted))


def test_flags_tell_sampled_views_and_no_context():
    model, corners = CropForwardModel(4, 8), torch.tensor([[[0, 0], [4, 4]]]).expand(2, -1, -1)
    views, noisy = torch.randn(2, 2, 1, 4, 4), torch.randn(2, 1, 1, 4, 4)
    weights = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    context = lift_views(unet(), model, views, corners, weights, sampled=torch.tensor([[0.0, 1.0]]).expand(2, -1))
    shown = lifted_input(lift_views(unet(), model, noisy, corners[:, :1]), context)
    assert shown.shape == (2, 6, 8, 8)
    assert shown[0, 4, 4:, 4:].eq(1).all()
    assert shown[0, 4].sum() == 16
    assert shown[:, 5].flatten(1).mean(1).tolist() == [0, 1]
    assert shown[1, [0, 1, 4]].eq(0).all()
    nothing = lifted_input(lift_views(unet(), model, noisy, corners[:, :1]))
    assert torch.equal(nothing[1], shown[1])


def test_an_mlp_reads_every_pixel_of_eight_angles():
    """Sums over 8 views of the products with 8 functions of the angle: the views come back by least squares."""
    network = ObservationMLP((1, 8, 8), (12,), angle_harmonics=4, hidden_size=8).double()
    angles = (torch.arange(8).double() * torch.pi / 4)[None]
    views = torch.randn(1, 8, 12, dtype=torch.float64)
    summed = lift_views(network, None, views, angles).values.view(9, 12)
    phases = angles[0, :, None] * torch.arange(1, 5)
    waves = torch.cat([torch.ones(8, 1), phases.cos(), phases.sin()], 1)
    torch.testing.assert_close(torch.linalg.lstsq(waves.T, summed).solution, views[0])


def test_an_mlp_s_signals_lie_in_its_range():
    network = ObservationMLP((2, 3), (4,), parameter_size=2, hidden_size=8, signal_range=(-1.0, 3.0))
    shown = lifted_input(
        lift_views(network, None, torch.randn(5, 2, 4), {"a": torch.rand(5, 2), "b": torch.rand(5, 2)})
    )
    with torch.no_grad():
        signal = network(1000 * shown, torch.arange(5)).sample
    assert signal.shape == (5, 2, 3)
    assert -1 <= signal.min() < -0.9
    assert 2.9 < signal.max() <= 3
    with pytest.raises(
        ValueError, match="`parameter_size` must be 3, the numbers in a view's parameters, or 0, got 2"
    ):
        lift_views(network, None, torch.randn(5, 2, 4), torch.rand(5, 2, 3))
    with pytest.raises(ValueError, match="`angle_harmonics` must be 0 unless a view has one parameter, got 2"):
        lift_views(ObservationMLP((2,), (4,), angle_harmonics=2), None, torch.randn(5, 2, 4), torch.rand(5, 2, 3))
    for name, value in {"signal_shape": (0,), "hidden_size": 0, "signal_range": (1.0, 1.0)}.items():
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            ObservationMLP(**{"signal_shape": (2,), "observation_shape": (2,), name: value})


def test_lifted_views_are_repeated_together():
    part = torch.arange(2.0)[:, None]
    views = LiftedViews(part, part, part, part[:, 0]).repeated(3)
    assert views.values.flatten().tolist() == [0, 0, 0, 1, 1, 1]
