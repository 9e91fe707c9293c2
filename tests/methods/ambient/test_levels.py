"""Levels are drawn above the samples', noise is frozen, and consistency is measured without bias."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch.utils.data import DataLoader

from diffusers_ext import (
    EDM,
    AmbientTask,
    EpsX0V,
    FlowMatching,
    FrozenNoise,
    PositionalBatchSampler,
    SeededDataset,
    StepRNG,
    consistency_loss,
    reverse_step,
    sample_sigma,
)
from diffusers_ext.methods.ambient.noisy_data import rigid_augmentation
from diffusers_ext.training.timesteps import (
    LogitNormalTimesteps,
    LogNormalLevels,
    ShiftedNoiseLevels,
    UniformTimesteps,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


LAWS = {
    "uniform": UniformTimesteps(None),
    "integers": UniformTimesteps(50),
    "logit_normal": LogitNormalTimesteps(),
    "log_normal": LogNormalLevels(-0.4, 1.0),
    "shifted": ShiftedNoiseLevels("logit_normal", lambda s: 3 * s / (1 + 2 * s)),
    "mode": ShiftedNoiseLevels("mode", lambda s: 2 * s / (1 + s)),
}


@pytest.mark.parametrize("name", LAWS)
def test_a_law_above_a_level_is_the_law_s_part_above_it(name):
    law, rng, n = LAWS[name], StepRNG(0), 40_000
    rng.begin(0)
    drawn = law(n, rng).double()
    bound = torch.tensor([20.0 if name == "integers" else 0.6], dtype=torch.float64)
    part = law.exceeded(bound)
    assert (drawn > bound).double().mean().item() == pytest.approx(part.item(), abs=4 * 0.5 / n**0.5)
    u = torch.rand(n, generator=generator(1), dtype=torch.float64)
    above, wanted = law.at(u * part), drawn[drawn > bound]
    assert (above > bound).all()
    quantiles = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    found, expected = torch.quantile(above, quantiles), torch.quantile(wanted, quantiles)
    # Against the empirical law: its distribution at our quantiles, within 4.5 standard errors.
    below = torch.stack([(wanted <= q).double().mean() for q in found])
    slack = 0.02 if name != "integers" else 0.06  # an integer has a probability of its own
    assert (below - quantiles).abs().max() < slack, (found, expected)


@pytest.mark.parametrize("sigma_n", [0.3, 5.0, 20.0, 80.0])
def test_truncated_levels_are_finite_and_above(sigma_n):
    sigma, weight = sample_sigma(torch.full((20_000,), sigma_n), generator=generator())
    assert sigma.isfinite().all()
    assert (sigma > torch.tensor(sigma_n).double()).all()
    assert (weight > 0).all()
    bound = sample_sigma(torch.full((20_000,), sigma_n), max_amplification=5.0, generator=generator())[0]
    assert (1 / (1 - (torch.tensor(sigma_n).double() / bound) ** 2) < 5).all()
    clamped, one = sample_sigma(torch.full((20_000,), sigma_n), "clamp", generator=generator())
    assert (clamped >= torch.tensor(sigma_n).double()).all()
    assert (clamped == torch.tensor(sigma_n).double()).any()
    assert (one == 1).all()


def test_both_ways_have_the_same_mean_gradient():
    """d/dg of the loss (A) of a denoiser g x, in many draws."""
    n, sigma_n = 200_000, 0.5
    y = 0.7 * torch.randn(n, generator=generator(1)) + sigma_n * torch.randn(n, generator=generator(2))
    noise, own = torch.randn(n, generator=generator(3)), torch.full((n,), sigma_n)
    means, errors = [], []
    for levels in ("truncate", "clamp"):
        sigma, weight = sample_sigma(own, levels, generator=generator(4))
        task = AmbientTask(EDM(), LogNormalLevels(), levels=levels)
        t = sigma.float().maximum(own)
        made = task.make(y[:, None], own, noise[:, None], t, weight.float())
        prediction = 0.9 * made.noisy
        residual = made.keep * prediction - made.target
        gradient = (2 * made.weight[:, None] * made.keep * residual * made.noisy)[:, 0].double()
        means.append(gradient.mean())
        errors.append(gradient.std() / n**0.5)
    assert abs(means[0] - means[1]) < 4 * (errors[0] ** 2 + errors[1] ** 2).sqrt()
    assert errors[0] < errors[1]  # nothing is wasted
    assert abs(means[0]) > 10 * errors[0]


@pytest.mark.parametrize("kind", ["vp", "flow", "edm"])
@pytest.mark.parametrize("levels", ["truncate", "clamp"])
def test_every_schedule_draws_above_the_level(kind, levels):
    objective, law = {
        "vp": (EpsX0V(DDIMScheduler()), UniformTimesteps(1000)),
        "flow": (FlowMatching(), ShiftedNoiseLevels("uniform", lambda s: 3 * s / (1 + 2 * s))),
        "edm": (EDM(), LogNormalLevels()),
    }[kind]
    task, rng = AmbientTask(objective, law, levels=levels), StepRNG(0)
    rng.begin(0)
    own = torch.tensor([0.0, 0.344, 2.0]).repeat(4000)
    t, weight = task.draw(own, rng)
    sigma = task.schedule.sigma(t)
    if levels == "truncate":
        assert (sigma > own.double()).all()
    else:
        assert (sigma * (1 + 1e-6) >= own.double()).all()
    for first, level in enumerate((0.0, 0.344, 2.0)):
        plain = task.schedule.sigma(law(4000, rng))
        share = (plain > level).double().mean().item()
        expected = share if levels == "truncate" else 1.0
        assert weight[first::3].mean().item() == pytest.approx(expected, abs=0.04)
    one = StepRNG(0, scope="sample")
    one.begin(0)
    part = StepRNG(0, scope="sample")
    part.begin(5)
    whole, tail = task.draw(own[:8], one, range(8)), task.draw(own[4:8], part, range(4, 8))
    assert torch.equal(whole[0][4:], tail[0])


# ---------------------------------------------------------------- frozen noise


class Clean:
    def __len__(self):
        return 12

    def get(self, index, generator):
        return {"pixel_values": torch.full((1, 4, 3), float(index))}


def test_frozen_noise_belongs_to_the_index(tmp_path):
    noise = FrozenNoise(0.3, probability=0.7, seed=5)

    def run(start=0, workers=0, drawn=noise):
        sampler = PositionalBatchSampler(12, 4, seed=1, start=start, total=9)
        loader = DataLoader(
            SeededDataset(Clean(), 3), batch_sampler=sampler, num_workers=workers, generator=torch.Generator()
        )
        return [(batch["index"], *drawn(batch["pixel_values"], batch["index"])) for batch in loader]

    whole = run()
    seen = {}
    for index, noisy, levels in whole:  # three epochs, each in an order of its own
        for i, y, level in zip(index.tolist(), noisy, levels, strict=True):
            first = seen.setdefault(i, (y, level))
            assert torch.equal(first[0], y)
            assert first[1] == level
            assert torch.equal(y, torch.full_like(y, float(i))) == (level == 0)
    assert len(seen) == 12
    assert {level.item() for _, level in seen.values()} == {0.0, np.float32(0.3)}
    filed = FrozenNoise(0.3, probability=0.7, seed=5)
    path = filed.draw_once(tmp_path, 12, (1, 4, 3))
    assert path.stat().st_size - 12 * 12 * 4 in range(200)
    for other in (run(workers=2), [*whole[:5], *run(start=5)], run(drawn=filed)):
        assert all(
            torch.equal(a, b) for one, two in zip(whole, other, strict=True) for a, b in zip(one, two, strict=True)
        )
    stamp = path.stat().st_mtime_ns
    assert filed.draw_once(tmp_path, 12, (1, 4, 3)).stat().st_mtime_ns == stamp  # taken as it is
    with pytest.raises(
        ValueError, match=r"room for the noise of 1000000000000 samples, 1.64e\+07 GB, got .* GB; with"
    ):
        filed.draw_once(tmp_path, 10**12, (1, 64, 64))
    assert len(list(tmp_path.iterdir())) == 1


def test_frozen_noise_is_standard_normal_and_independent():
    from scipy.stats import kstest

    noise = FrozenNoise(1.0, seed=1)
    drawn = noise.noise(torch.arange(400), (3, 8, 7))
    values = drawn.double().flatten()
    assert kstest(values.numpy(), "norm").pvalue > 1e-3
    rows = drawn.flatten(1).double()
    covariance = rows @ rows.T / rows.shape[1]
    off = covariance - torch.diag(covariance.diag())
    assert off.abs().max() < 6 / rows.shape[1] ** 0.5  # between samples
    along = (rows.T @ rows) / len(rows)
    assert (along - torch.eye(len(along))).abs().max() < 6.5 / len(rows) ** 0.5  # between places
    other = FrozenNoise(1.0, seed=2).noise(torch.arange(400), (3, 8, 7)).double().flatten()
    assert abs((values * other).mean()) < 5 / len(values) ** 0.5
    chosen = FrozenNoise(1.0, probability=0.25).levels(torch.arange(20_000)).mean().item()
    assert chosen == pytest.approx(0.25, abs=4 * (0.1875 / 20_000) ** 0.5)
    column = FrozenNoise([0.0, 0.5, 2.0])
    assert column.levels(torch.tensor([2, 0, 1])).tolist() == [2.0, 0.0, 0.5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sigma": -0.1}, "`sigma` must be a finite number >= 0, got -0.1"),
        ({"sigma": float("nan")}, "`sigma` must be a finite number >= 0, got nan"),
        ({"sigma": [0.1, -1.0]}, "finite noise levels >= 0, .* with -1.0 for image 1"),
        ({"sigma": [[0.1]]}, r"one noise level an image, got 'sigma' with float64 of shape \(1, 1\)"),
        ({"sigma": 0.1, "probability": 1.5}, r"`probability` must be a number in \[0, 1\], got 1.5"),
        ({"sigma": 0.1, "seed": -1}, "`seed` must be an integer >= 0, got -1"),
    ],
)
def test_frozen_noise_refuses_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        FrozenNoise(**arguments)


def test_levels_refuse_bad_arguments():
    for bad in (torch.tensor([-1.0]), torch.tensor([float("inf")]), torch.ones(2, 2)):
        with pytest.raises(ValueError, match="`sigma_n` must be one finite level >= 0 for each sample"):
            sample_sigma(bad)
    with pytest.raises(ValueError, match="`levels` must be one of"):
        sample_sigma(torch.ones(1), "cut")
    with pytest.raises(ValueError, match="`max_amplification` must be a finite number > 1, got 0.5"):
        sample_sigma(torch.ones(1), max_amplification=0.5)


def test_rigid_augmentation_moves_whole_pixels():
    rng, x = StepRNG(0), torch.arange(2 * 16.0).view(1, 2, 4, 4).repeat(600, 1, 1, 1)
    rng.begin(0)
    assert rigid_augmentation(x, (), rng) is x
    counts = {"flip": 2, "turn": 4, "roll": 16}
    for kind, count in counts.items():
        moved = rigid_augmentation(x, [kind], rng)
        assert len({tuple(row.flatten().tolist()) for row in moved}) == count
        assert torch.equal(moved.flatten(2).sort(2).values, x.flatten(2))  # the same values in each channel
        assert torch.equal(moved[:, 1] - moved[:, 0], torch.full((600, 4, 4), 16.0))  # channels move together
    turned = {tuple(row.flatten().tolist()) for row in rigid_augmentation(x, ["turn"], rng)}
    assert turned == {tuple(x[0].rot90(k, (1, 2)).flatten().tolist()) for k in range(4)}


# ---------------------------------------------------------------- consistency


def two_points(x, sigma, shift=0.0, scale=1.0):
    """The ideal denoiser of the two values -1 and 1; `shift` and `scale` change it below level 0.999."""
    level = sigma.view(-1, 1).to(x.dtype)
    ideal = torch.tanh(x / level**2)
    return torch.where(level < 0.999, scale * ideal + shift, ideal)


@pytest.fixture(scope="module")
def measured():
    """Consistency from level 1 to 0.3 in 4e5 values (standard error .0009), by steps and by what is wrong."""
    n = 400_000
    x = torch.randn(n, 1, generator=generator(1)) + torch.where(
        torch.rand(n, 1, generator=generator(2)) < 0.5, 1.0, -1.0
    )
    level = torch.ones(n)

    def loss(steps, **wrong):
        denoise = lambda x, sigma: two_points(x, sigma, **wrong)  # noqa: E731
        return consistency_loss(denoise, x, level, 0.3 * level, steps, generator(3)).mean().item()

    found = {steps: loss(steps) for steps in (1, 2, 5, 20)}
    return found | {"shifted": loss(20, shift=0.1), "shrunk": loss(20, scale=0.8)}


def test_an_ideal_denoiser_is_consistent_in_many_steps_and_a_wrong_one_is_not(measured):
    assert measured[20] < 0.005
    assert measured["shifted"] > 0.02
    assert measured["shrunk"] > 0.02
    for steps, expected in {1: 0.059, 2: 0.019, 5: 0.004, 20: 0.0013}.items():
        assert measured[steps] == pytest.approx(expected, abs=0.0036)  # 4 standard errors


def test_one_step_is_ddim_with_eta_1():
    scheduler = DDIMScheduler(prediction_type="sample", clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(10)
    alphas = scheduler.alphas_cumprod
    t, following = scheduler.timesteps[3], scheduler.timesteps[4]
    scale, level = alphas.sqrt(), ((1 - alphas) / alphas).sqrt()
    x, x0, noise = (torch.randn(4, 5, generator=generator(i)) for i in range(3))
    expected = scheduler.step(x0, t, scale[t] * x, eta=1.0, variance_noise=noise).prev_sample
    found = reverse_step(x, x0, level[t].expand(4), level[following].expand(4), noise)
    torch.testing.assert_close(scale[following] * found, expected, atol=1e-5, rtol=1e-5)


def test_no_way_has_no_loss_and_the_gradient_goes_through_the_runs():
    level = torch.full((3,), 0.7)
    x = torch.randn(3, 5, generator=generator())
    assert torch.equal(consistency_loss(two_points, x, level, level, 4, generator()), torch.zeros(3))
    weight = torch.tensor(0.5, requires_grad=True)
    loss = consistency_loss(lambda x, sigma: weight * x, x, level, 0.5 * level, 2, generator()).sum()
    assert torch.autograd.grad(loss, weight)[0].abs() > 0
    snapped = []
    consistency_loss(
        lambda x, sigma: snapped.append(sigma.tolist()) or x,
        x,
        level,
        0.5 * level,
        2,
        generator(),
        lambda s: s.round(decimals=1),
    )
    assert snapped[1] == [0.5] * 3  # 0.7 / sqrt(2) = 0.495
    for bad in ({"sigma_next": 2 * level}, {"sigma_next": 0 * level}, {"sigma": level[:2]}, {"num_steps": 0}):
        with pytest.raises(ValueError, match=r"`(sigma_next|sigma|num_steps)` must"):
            consistency_loss(two_points, x, **{"sigma": level, "sigma_next": level, **bad})


@pytest.mark.parametrize("every", ["below", "all"])
@pytest.mark.parametrize("kind", ["vp", "flow", "edm"])
def test_consistency_of_a_task_is_asked_of_noisy_samples_only(every, kind):
    objective, law = {
        "vp": (EpsX0V(DDIMScheduler(prediction_type="sample")), UniformTimesteps(1000)),
        "flow": (FlowMatching(), UniformTimesteps(None)),
        "edm": (EDM(), LogNormalLevels()),
    }[kind]
    task, rng = AmbientTask(objective, law, every=every, consistency_weight=1.0), StepRNG(0)
    rng.begin(0)
    own = torch.tensor([0.0, 0.4]).repeat(3000)
    t, _ = task.draw(own, rng)
    rows, start, end = task.eligible(own, t, rng)
    assert (own[rows] > 0).all()
    assert (end < start).all()
    below = task.law.exceeded(task.schedule.first_not_below(own[1:2])).item()
    expected = 1 - below if every == "below" else 1.0
    assert len(rows) / 3000 == pytest.approx(expected, abs=0.04)
    if every == "all" and kind == "vp":
        assert (start - end).min() >= 1  # t - U{1..100}, as in arXiv 2404.10177
        assert (start - end).max() <= 100
    # A network that knows the answer, 0.3 everywhere, is consistent; one that grows with the level is not.
    y = 0.3 + own[rows].view(-1, 1) * torch.randn(len(rows), 4, generator=generator())

    def saying(value):
        def predict(noisy, t):
            zero = torch.zeros_like(noisy)
            offset = task.objective.predicted_sample(zero, noisy, t)
            slope = task.objective.predicted_sample(zero + 1, noisy, t) - offset
            return (value(task.schedule.sigma(t).float().view(-1, 1)) - offset) / slope

        return predict

    known = task.consistency(saying(lambda s: 0.3 + 0 * s), y, own[rows], start, end, generator())
    assert known.abs().max() < 1e-5
    grown = task.consistency(saying(lambda s: s), y, own[rows], start, end, generator())
    gap = (task.schedule.sigma(end) - task.schedule.sigma(start)).float() ** 2
    torch.testing.assert_close(grown, gap, atol=1e-3, rtol=1e-3)
