"""Assignment against brute force, limits and other cuts of the same batch."""

import itertools

import pytest
import torch

from diffusers_ext import AssignmentNoise, StepRNG, assignment_permutation


def begun(**kwargs):
    rng = StepRNG(**kwargs)
    rng.begin(3)
    return rng


@pytest.mark.parametrize("cost", ["inner", "l2"])
@pytest.mark.parametrize("batch", [2, 4, 6])
def test_equals_brute_force(batch, cost):
    torch.manual_seed(batch)
    x, noise = torch.randn(batch, 3), torch.randn(batch, 3)
    distances = (x[:, None] - noise[None]).norm(dim=-1).double()
    distances = distances if cost == "l2" else distances**2

    def total(permutation):
        return distances[range(batch), permutation].sum().item()

    best = min(map(list, itertools.permutations(range(batch))), key=total)
    assert total(assignment_permutation(x, noise, cost).tolist()) == pytest.approx(total(best), rel=1e-12)


def test_inner_products_minimise_squared_distances():
    torch.manual_seed(0)
    x, noise = torch.randn(200, 48), torch.randn(200, 48)
    from scipy.optimize import linear_sum_assignment

    squared = torch.cdist(x.double(), noise.double()).square().numpy()
    expected = squared[linear_sum_assignment(squared)].sum()
    permutation = assignment_permutation(x, noise)
    found = squared[range(200), permutation.numpy()].sum()
    assert found == pytest.approx(expected, rel=1e-6)
    assert found < squared.trace()
    assert sorted(permutation.tolist()) == list(range(200))


def test_noise_is_a_permutation_of_independent_noise():
    x = torch.randn(32, 2, 4, 4)
    noise = AssignmentNoise()(x, rng=begun())
    plain = begun().randn_like(x)
    order = (noise.flatten(1)[:, None] == plain.flatten(1)[None]).all(-1)
    assert order.sum(0).tolist() == order.sum(1).tolist() == [1] * 32
    assert torch.equal(AssignmentNoise()(x[:1], rng=begun()), begun().randn_like(x[:1]))


def test_one_dimensional_gaussian_coupling_is_linear():
    # In the limit n = x0 / s: correlation 1, and Var x_t = (sqrt(a) s + sqrt(1 - a))^2. At 256 samples 0.985.
    s, alpha, x_all, n_all = 0.5, 0.4, [], []
    rng = StepRNG(1)
    for step in range(200):
        rng.begin(step)
        x = s * torch.randn(256, 1, generator=rng.generator("latents"))
        x_all.append(x)
        n_all.append(AssignmentNoise()(x, rng=rng))
    x, n = torch.cat(x_all).squeeze(), torch.cat(n_all).squeeze()
    correlation = torch.corrcoef(torch.stack([x, n]))[0, 1].item()
    assert correlation == pytest.approx(0.985, abs=0.004)
    variance = (alpha**0.5 * x + (1 - alpha) ** 0.5 * n).var().item()
    expected = alpha * s**2 + 1 - alpha + 2 * correlation * (alpha * (1 - alpha)) ** 0.5 * s
    assert variance == pytest.approx(expected, rel=0.02)
    assert abs(variance / (alpha**0.5 * s + (1 - alpha) ** 0.5) ** 2 - 1) < 0.02


def test_groups_are_solved_apart():
    x = torch.randn(12, 5)
    noise = AssignmentNoise(group_size=5)(x, rng=begun())
    plain = begun().randn_like(x)
    for group in (slice(0, 5), slice(5, 10), slice(10, 12)):
        assert torch.equal(noise[group], plain[group][assignment_permutation(x[group], plain[group])])
    assert torch.equal(AssignmentNoise(group_size=1)(x, rng=begun()), plain)


def test_within_labels_keeps_the_noise_of_a_class_centred():
    # Two classes at +-1 in 16 dimensions: assignment over the batch gives each class noise of its own half-space.
    rng, sums = StepRNG(0), {True: torch.zeros(16), False: torch.zeros(16)}
    steps, labels = 40, torch.arange(64) % 2
    for step in range(steps):
        rng.begin(step)
        x = (2.0 * labels - 1)[:, None].expand(64, 16).contiguous()
        for within in sums:
            rng.begin(step)
            noise = AssignmentNoise(within_labels=within)(x, rng=rng, labels=labels)
            sums[within] += noise[labels == 1].mean(0) / steps
    independent = (16 / (32 * steps)) ** 0.5  # root mean square of the mean's norm for independent noise
    assert sums[True].norm() < 2 * independent
    # Along the unit diagonal the upper half of normals has mean sqrt(2 / pi).
    assert sums[False].norm().item() == pytest.approx((2 / torch.pi) ** 0.5, rel=0.1)


def test_keeps_dtype_and_has_no_history():
    x = torch.randn(4, 3, dtype=torch.bfloat16, requires_grad=True)
    noise = AssignmentNoise()(x, rng=begun())
    assert noise.dtype == torch.bfloat16
    assert not noise.requires_grad


def test_refuses_bad_input():
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"`cost` must be one of \['inner', 'l2'\], got 'l1'"):
        AssignmentNoise(cost="l1")
    with pytest.raises(ValueError, match="`group_size` must be an integer >= 1, got 0"):
        AssignmentNoise(group_size=0)
    with pytest.raises(ValueError, match="`labels` must be given for `within_labels`"):
        AssignmentNoise(within_labels=True)(x, rng=begun())
    with pytest.raises(ValueError, match=r"`labels` must have the shape \(4,\)"):
        AssignmentNoise()(x, rng=begun(), labels=torch.zeros(3))
    with pytest.raises(ValueError, match="`x0` must be finite"):
        AssignmentNoise()(torch.full((2, 2), torch.nan), rng=begun())
    with pytest.raises(ValueError, match="`noise` must have the shape"):
        assignment_permutation(x, x[:2])
