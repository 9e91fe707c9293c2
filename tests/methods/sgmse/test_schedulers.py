"""The processes and their ways back, on data whose scores are known. All in double precision."""

import math

import pytest
import torch

from diffusers_ext import OUVEScheduler, SBVEScheduler

TIMES = (0.03, 0.1, 0.5, 0.9, 1.0)
# Gaussian data CN(CLEAN, SPREAD ** 2) and one recording.
CLEAN, SPREAD, NOISY = 0.3, 0.2, 0.8
DTYPE = torch.complex128


def column(values):
    return torch.as_tensor(values, dtype=DTYPE).reshape(-1, 1, 1, 1)


class ExactOUVE:
    """The process written down anew, with the score of Gaussian data and what networks would say."""

    def __init__(self, theta=1.5, sigma_min=0.05, sigma_max=0.5, clean=CLEAN, spread=SPREAD, noisy=NOISY):
        self.theta, self.low, self.ratio = theta, sigma_min, sigma_max / sigma_min
        self.clean, self.spread, self.noisy = clean, spread, noisy

    def variance(self, t):
        log = math.log(self.ratio)
        return self.low**2 * log * (self.ratio ** (2 * t) - math.exp(-2 * self.theta * t)) / (self.theta + log)

    def mean(self, x0, t):
        return math.exp(-self.theta * t) * x0 + (1 - math.exp(-self.theta * t)) * self.noisy

    def score(self, x, t):
        decay = math.exp(-self.theta * t)
        return -(x - self.mean(self.clean, t)) / (decay**2 * self.spread**2 + self.variance(t))

    def __call__(self, kind, x, t):
        score, variance = self.score(x, t), self.variance(t)
        if kind == "score":
            return score
        if kind == "epsilon":
            return -math.sqrt(variance) * score
        mean = x + variance * score
        if kind == "mean":
            return mean
        return (mean - (1 - math.exp(-self.theta * t)) * self.noisy) / math.exp(-self.theta * t)


def way_back(scheduler, network, steps, noises):
    """Runs a scheduler from noise of ours: `noises` holds all draws, `(draws, batch)`, the first that of the start."""
    draws = iter(noises)
    y = torch.full((noises.shape[1], 1, 1, 1), NOISY, dtype=DTYPE)
    scheduler.set_timesteps(steps)
    x = scheduler.initial_sample(y, noise=column(next(draws)))
    kind = scheduler.config.prediction_type
    step = None
    for t in scheduler.timesteps:
        for _ in range(scheduler.correct_steps):
            output = network(kind, x, float(t))
            x = scheduler.step_correct(output, t, x, y, variance_noise=column(next(draws))).prev_sample
        noise = column(next(draws))
        step = scheduler.step(network(kind, x, float(t)), t, x, y, variance_noise=noise)
        x = step.prev_sample
    return step.prev_sample_mean.real.flatten()


def mean_and_std(scheduler, network, steps):
    """Mean and standard deviation of the result, exact, since all steps are linear: each draw's response by itself."""
    draws = 1 + 2 * steps * (1 + scheduler.correct_steps)
    found = way_back(scheduler, network, steps, torch.cat([torch.zeros(1, draws), torch.eye(draws)]).T)
    return found[0].item(), (found[1:] - found[0]).square().sum().sqrt().item()


def test_levels_of_noise():
    scheduler = OUVEScheduler()
    found = scheduler.std(torch.tensor(TIMES, dtype=torch.float64))
    expected = torch.tensor([0.018830, 0.035746, 0.121657, 0.308892, 0.388983], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=6e-7, rtol=0)
    assert OUVEScheduler(2.0, 0.1, 1.0).std(1.0).item() == pytest.approx(0.731481, abs=6e-7)
    assert scheduler.init_noise_sigma == pytest.approx(0.388983, abs=6e-7)


def test_variance_solves_its_equation():
    """dP/dt = -2 theta P + g^2, whose g(1) is known."""
    scheduler, h = OUVEScheduler(), 1e-5
    for t, g in ((1 - h, 1.072983), (0.5, 1.072983 / math.sqrt(10))):
        around = [scheduler.std(t + shift).item() ** 2 for shift in (-h, 0, h)]
        assert (around[2] - around[0]) / (2 * h) == pytest.approx(-3 * around[1] + g**2, rel=1e-4)


def test_samples_at_a_time():
    x0, y, noise = (torch.randn(3, 1, 2, 2, dtype=DTYPE) for _ in range(3))
    t, exact = torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64), ExactOUVE()
    found = OUVEScheduler().add_noise(x0, noise, t, y)
    for i, time in enumerate(t.tolist()):
        exact.noisy = y[i]
        expected = exact.mean(x0[i], time) + math.sqrt(exact.variance(time)) * noise[i]
        torch.testing.assert_close(found[i], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("steps", "mean", "plain", "std"),
    [(5, 0.342112, 0.346362, 0.193982), (30, 0.305358, 0.312290, 0.199462), (100, 0.301482, 0.308552, 0.200514)],
)
def test_predictor_and_corrector(steps, mean, plain, std):
    found = mean_and_std(OUVEScheduler(), ExactOUVE(), steps)
    assert found == pytest.approx((mean, std), abs=6e-7)
    assert mean_and_std(OUVEScheduler(correct_steps=0), ExactOUVE(), steps)[0] == pytest.approx(plain, abs=6e-7)


@pytest.mark.parametrize("algorithm", ["pc", "transitions", "heun"])
def test_all_predictions_say_the_same(algorithm):
    found = [
        mean_and_std(OUVEScheduler(prediction_type=kind, algorithm=algorithm), ExactOUVE(), 5)
        for kind in ("score", "epsilon", "sample", "mean")
    ]
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=1e-6)


@pytest.mark.parametrize(
    ("steps", "std", "deterministic"), [(5, 0.128896, 0.343671), (10, 0.159952, 0.350574), (30, 0.184777, 0.354737)]
)
def test_transitions(steps, std, deterministic):
    ancestral = OUVEScheduler(prediction_type="sample", algorithm="transitions")
    assert mean_and_std(ancestral, ExactOUVE(), steps) == pytest.approx((0.306495, std), abs=6e-7)
    ddim = OUVEScheduler(prediction_type="sample", algorithm="transitions", eta=0.0)
    assert mean_and_std(ddim, ExactOUVE(), steps)[0] == pytest.approx(deterministic, abs=6e-7)


def test_probability_flow():
    def found(algorithm, steps):
        return mean_and_std(OUVEScheduler(algorithm=algorithm), ExactOUVE(), steps)[0]

    assert found("heun", 10) == pytest.approx(0.376382, abs=6e-7)
    assert found("euler", 10) == pytest.approx(0.389262, abs=6e-7)
    assert found("heun", 300) == pytest.approx(0.376746, abs=2e-6)


def test_one_recording_that_is_known():
    """Data of one point x0: the predictor and corrector leave a little of y, transitions nothing."""
    network = ExactOUVE(clean=0.3, spread=0.0)
    mean, std = mean_and_std(OUVEScheduler(), network, 30)
    assert mean == pytest.approx(0.999071 * 0.3 + 0.000929 * NOISY, abs=1e-6)
    assert std == pytest.approx(0.001679, abs=6e-7)
    for eta in (0.0, 1.0):
        scheduler = OUVEScheduler(prediction_type="sample", algorithm="transitions", eta=eta)
        assert mean_and_std(scheduler, network, 7) == pytest.approx((0.3, 0), abs=1e-12)


def test_noise_of_the_scheduler_itself():
    """Complex noise with a mean square of 1; the bounds are five standard errors of 160,000 coefficients."""
    scheduler, network = OUVEScheduler(), ExactOUVE()
    generator = torch.Generator().manual_seed(0)
    y = torch.full((1, 1, 400, 400), NOISY, dtype=torch.complex64)
    scheduler.set_timesteps(5)
    x = scheduler.initial_sample(y, generator)
    step = None
    for t in scheduler.timesteps:
        x = scheduler.step_correct(network("score", x, float(t)), t, x, y, generator).prev_sample
        step = scheduler.step(network("score", x, float(t)), t, x, y, generator)
        x = step.prev_sample
    found = step.prev_sample_mean
    assert found.mean().real.item() == pytest.approx(0.342112, abs=0.002)
    assert (found - found.mean()).abs().square().mean().sqrt().item() == pytest.approx(0.193982, abs=0.0013)
    assert abs((found - found.mean()).square().mean().item()) < 0.001  # circular


# ---------------------------------------------------------------- the bridge


class ExactSBVE:
    """What a network would say of Gaussian data on the bridge."""

    def __call__(self, kind, x, t, k=2.6, c=0.4):
        level = [c * (k ** (2 * time) - 1) / (2 * math.log(k)) for time in (t, 1)]
        share = level[0] / level[1]
        if t == 1:
            return torch.full_like(x, CLEAN)
        gain = (1 - share) * SPREAD**2 / ((1 - share) ** 2 * SPREAD**2 + level[0] * (1 - share))
        return CLEAN + gain * (x - (1 - share) * CLEAN - share * NOISY)


def test_levels_of_the_bridge():
    scheduler = SBVEScheduler()
    found = scheduler.std(torch.tensor(TIMES, dtype=torch.float64))
    expected = torch.tensor([0.110563, 0.206073, 0.491804, 0.442588, 0], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=6e-7, rtol=0)
    one, zero = torch.ones(1, 1, 1, 1, dtype=DTYPE), torch.zeros(1, 1, 1, 1, dtype=DTYPE)
    assert scheduler.mean(one, zero, 0.5).real.item() == pytest.approx(0.722222, abs=6e-7)
    assert scheduler.mean(zero, one, 0.5).real.item() == pytest.approx(1 - 0.722222, abs=6e-7)
    # v_1 by the standard deviation where half of it is behind: v (1 - v / v_1) = v_1 / 4.
    half = math.log(1 + (2.6**2 - 1) / 2) / (2 * math.log(2.6))
    assert 2 * scheduler.std(half).item() == pytest.approx(1.098015, abs=6e-7)


@pytest.mark.parametrize(("steps", "std"), [(5, 0.098125), (50, 0.169336)])
def test_bridge(steps, std):
    assert mean_and_std(SBVEScheduler(algorithm="sde"), ExactSBVE(), steps) == pytest.approx((0.300017, std), abs=1e-6)
    assert mean_and_std(SBVEScheduler(), ExactSBVE(), steps) == pytest.approx((0.300017, 0), abs=1e-6)


# ---------------------------------------------------------------- contracts

ALL = [OUVEScheduler(algorithm=name) for name in ("pc", "transitions", "heun", "euler")]
ALL += [SBVEScheduler(algorithm=name) for name in ("ode", "sde")]


@pytest.mark.parametrize("scheduler", ALL, ids=lambda s: f"{type(s).__name__}-{s.config.algorithm}")
def test_contracts(scheduler, tmp_path):
    scheduler.save_pretrained(tmp_path)
    copy = type(scheduler).from_pretrained(tmp_path)
    public = [{k: v for k, v in s.config.items() if k != "_use_default_values"} for s in (scheduler, copy)]
    assert public[0] == public[1]
    y = torch.randn(2, 1, 4, 4, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    results = []
    for one in (scheduler, copy):
        one.set_timesteps(3, device="cpu")
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        x = one.initial_sample(y, generators)
        for t in one.timesteps:
            x, mean = one.step(0.5 * x, t, x, y, generators, return_dict=False)
        results.append(x)
    assert torch.equal(*results)
    assert results[0].dtype == y.dtype
    with pytest.raises(ValueError, match=r"`t` must be one of `timesteps`, got 0\.123"):
        scheduler.step(y, 0.123, y, y)
    with pytest.raises(ValueError, match="`num_inference_steps` must be an integer >= 1, got 0"):
        scheduler.set_timesteps(0)
    for t in (0.0, 1.1, torch.tensor([0.5, -0.1])):
        with pytest.raises(ValueError, match=r"`t` must be in \(0, 1\]"):
            scheduler.add_noise(y, y, t, y)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (OUVEScheduler, {"sigma_min": 0.5}),
        (OUVEScheduler, {"sampling_eps": 0.0}),
        (OUVEScheduler, {"prediction_type": "v_prediction"}),
        (OUVEScheduler, {"algorithm": "ddim"}),
        (OUVEScheduler, {"eta": 1.5}),
        (OUVEScheduler, {"snr": 0.0}),
        (SBVEScheduler, {"k": 1.0}),
        (SBVEScheduler, {"c": 0.0}),
        (SBVEScheduler, {"algorithm": "pc"}),
        (SBVEScheduler, {"prediction_type": "score"}),
    ],
)
def test_wrong_arguments(kind, wrong):
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` must be"):
        kind(**wrong)
