"""Assignment against brute force, limits and other cuts of the same batch."""

import itertools

import pytest
import torch
from accelerate import Accelerator, debug_launcher
from scipy.optimize import linear_sum_assignment

from diffusers_ext import AssignmentNoise, StepRNG, assignment_permutation
from tests.conftest import reset_accelerate


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
    squared = torch.cdist(x.double(), noise.double()).square().numpy()
    expected = squared[linear_sum_assignment(squared)].sum()
    permutation = assignment_permutation(x, noise)
    found = squared[range(200), permutation.numpy()].sum()
    assert found == pytest.approx(expected, rel=1e-6)
    assert found < squared.trace()
    assert sorted(permutation.tolist()) == list(range(200))


DATA = {
    "gaussian": lambda n: torch.randn(n, 48),
    "clusters": lambda n: 5 * torch.randn(4, 48)[torch.arange(n) % 4] + 0.01 * torch.randn(n, 48),
    "norms of many sizes": lambda n: torch.randn(n, 48) * torch.logspace(-4, 4, n)[:, None],
    "one line": lambda n: torch.randn(n, 1),
    "equal rows": lambda n: torch.randn(1, 48).repeat(n, 1),
    "origin": lambda n: torch.zeros(n, 48),
}


@pytest.mark.parametrize("cost", ["inner", "l2"])
@pytest.mark.parametrize("data", DATA)
def test_large_batches_are_solved_exactly(data, cost):
    # From 256 samples on, the solver is handed shifted costs; plain double-precision costs must be no better.
    torch.manual_seed(0)
    n = 260
    x = DATA[data](n)
    noise = torch.randn_like(x)
    costs = torch.cdist(x.double(), noise.double()) if cost == "l2" else -(x.double() @ noise.double().T)
    costs = costs.numpy()
    expected = costs[linear_sum_assignment(costs)].sum()
    permutation = assignment_permutation(x, noise, cost).tolist()
    assert sorted(permutation) == list(range(n))
    # fp32 costs leave equally good assignments undecided to about 1e-7.
    assert costs[range(n), permutation].sum() == pytest.approx(expected, rel=1e-6)


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


def test_sample_scope_draws_by_index():
    x = torch.randn(6, 5)
    noise = AssignmentNoise()(x, rng=begun(scope="sample"), ids=range(6))
    # The same samples in other places get the same noise.
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.equal(AssignmentNoise()(x[order], rng=begun(scope="sample"), ids=order.tolist()), noise[order])


GATHERED = [
    {"gather": True},
    {"cost": "l2"},
    {"within_labels": True},
    {"group_size": 96},  # the second group lies on both processes
    {"group_size": 50, "within_labels": True},
]


def global_batch():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(192, 2, 4, 4, generator=generator), torch.randint(3, (192,), generator=generator)


def _two(folder):
    """Runs in each of two processes and writes what the parent checks."""
    torch.set_num_threads(1)
    reset_accelerate()
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    rank, (x, labels) = accelerator.process_index, global_batch()
    mine = slice(96 * rank, 96 * (rank + 1))
    results = {}
    for scope in ("sample", "step"):
        for index, options in enumerate([*GATHERED, {"gather": False}]):
            rng = begun(scope=scope, rank=rank, world=2)
            results[scope, index] = AssignmentNoise(**options)(
                x[mine], rng=rng, ids=range(192)[mine], labels=labels[mine], accelerator=accelerator
            )
    try:
        AssignmentNoise()(x[: 3 + rank], rng=begun(rank=rank, world=2), accelerator=accelerator)
    except ValueError as error:
        results["unequal"] = str(error)
    torch.save(results, folder / f"{rank}.pt")


def test_two_processes_equal_one(tmp_path):
    debug_launcher(_two, args=(tmp_path,), num_processes=2)
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    x, labels = global_batch()
    for index, options in enumerate(GATHERED):
        one = AssignmentNoise(**options)(x, rng=begun(scope="sample"), ids=range(192), labels=labels)
        assert torch.equal(torch.cat([part["sample", index] for part in both]), one)
    for scope in ("sample", "step"):
        together, apart = (torch.cat([part[scope, index] for part in both]) for index in (0, len(GATHERED)))
        assert (together * x).sum() > (apart * x).sum()  # a wider choice
        # Both are permutations of the same noise.
        assert torch.equal(together.flatten(1).sort(0).values, apart.flatten(1).sort(0).values)
    message = "`x0` must have the same batch size on every process, got [3, 4]."
    assert [part["unequal"] for part in both] == [message] * 2


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
    with pytest.raises(ValueError, match="`x` must be finite"):
        assignment_permutation(torch.full((2, 2), torch.inf), torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"`cost` must be one of \['inner', 'l2'\], got 'l3'"):
        assignment_permutation(x, x, "l3")
    with pytest.raises(ValueError, match="`noise` must have the shape"):
        assignment_permutation(x, x[:2])
