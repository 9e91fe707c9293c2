"""The objective against Gaussian data, its own identities and the engine's parameterisations."""

import pytest
import torch
from diffusers import DDIMScheduler

from diffusers_ext import (
    EDM,
    AmbientTask,
    EpsX0V,
    FlowMatching,
    StepRNG,
    add_noise_to,
    ambient_prediction,
    ambient_prediction_vp,
    unbiased_clean_target,
    vp_timestep,
)
from diffusers_ext.training.timesteps import LogNormalLevels, UniformTimesteps


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tasks(**options):
    """A task for each parameterisation, with timesteps at about the levels 0.35, 1.1 and 6."""
    steps = torch.tensor([100, 400, 800])
    for kind in ("epsilon", "v_prediction", "sample"):
        scheduler = DDIMScheduler(prediction_type=kind, beta_schedule="squaredcos_cap_v2")
        task = AmbientTask(EpsX0V(scheduler), UniformTimesteps(1000), **options)
        yield kind, task, steps
    levels = task.schedule.sigma(steps)
    yield "flow", AmbientTask(FlowMatching(), UniformTimesteps(None), **options), (levels / (1 + levels)).float()
    yield "edm", AmbientTask(EDM(), LogNormalLevels(), **options), levels.float()


def test_the_ideal_denoiser_of_gaussian_data_predicts_the_noisy_sample():
    s2, sigma_n, sigma = 0.49, torch.tensor([0.0, 0.1, 0.5]), torch.tensor([0.3, 0.3, 0.9])
    x = torch.ones(3, 1, dtype=torch.float64)
    ideal = (s2 / (s2 + sigma.double() ** 2)).view(3, 1)
    found = ambient_prediction(ideal * x, x, sigma, sigma_n)[:, 0]
    expected = (s2 + sigma_n.double() ** 2) / (s2 + sigma.double() ** 2)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.fixture(scope="module")
def gains():
    """The gain g of a denoiser g x, fitted on 4 million noisy numbers of N(0, 0.49) by each loss."""
    s2, sigma_n, sigma, n = 0.49, 0.5, 0.8, 4_000_000
    y = s2**0.5 * randn(n) + sigma_n * randn(n, seed=1)
    x = add_noise_to(y[:, None], sigma_n, sigma, randn(n, seed=2)[:, None])[:, 0]
    q = (sigma_n / sigma) ** 2
    squares = (x * x).sum()
    target = unbiased_clean_target(y[:, None], x[:, None], sigma, sigma_n)[:, 0]
    # (A): |(1 - q) g x + q x - y|^2 is least at g = <x, y - q x> / ((1 - q) <x, x>).
    fitted = {"A": (x * (y - q * x)).sum() / ((1 - q) * squares), "B": (x * target).sum() / squares}
    fresh = y + sigma * randn(n, seed=3)  # as if y were clean
    fitted["naive"] = (fresh * y).sum() / (fresh * fresh).sum()
    return {k: v.item() for k, v in fitted.items()}, s2, sigma_n, sigma


def test_gains_that_are_fitted_on_noisy_data_are_the_clean_denoisers(gains):
    fitted, s2, sigma_n, sigma = gains
    clean = s2 / (s2 + sigma**2)
    assert fitted["A"] == pytest.approx(clean, rel=0.01)
    assert fitted["B"] == pytest.approx(clean, rel=0.01)
    assert fitted["naive"] == pytest.approx((s2 + sigma_n**2) / (s2 + sigma_n**2 + sigma**2), rel=0.01)
    assert abs(fitted["naive"] / clean - 1) > 0.1


def test_levels_may_be_shaped_to_multiply_samples():
    x, d, sigma_n, sigma = randn(2, 3, 4), randn(2, 3, 4, seed=1), torch.tensor([0.1, 0.2]), torch.tensor([0.5, 0.7])
    shaped = ambient_prediction(d, x, sigma.view(2, 1, 1), sigma_n.view(2, 1, 1))
    assert torch.equal(shaped, ambient_prediction(d, x, sigma, sigma_n))


def test_the_two_losses_differ_by_their_weight():
    y, noise, d = randn(3, 2, 5), randn(3, 2, 5, seed=1), randn(3, 2, 5, seed=2)
    sigma_n, sigma = torch.tensor([0.0, 0.2, 0.5]), torch.tensor([0.7, 0.3, 2.0])
    x = add_noise_to(y, sigma_n, sigma, noise)
    keep = (1 - (sigma_n / sigma) ** 2).view(3, 1, 1)
    a = (ambient_prediction(d, x, sigma, sigma_n) - y).square()
    b = keep**2 * (d - unbiased_clean_target(y, x, sigma, sigma_n)).square()
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_ddpm_steps_are_the_same_after_scaling():
    alphas = DDIMScheduler().alphas_cumprod
    t, t_n = torch.tensor([500, 300, 999, 0]), torch.tensor([100, 300, -1, -1])
    y, noise, d = randn(4, 6), randn(4, 6, seed=1), randn(4, 6, seed=2)
    now, own = alphas[t, None], torch.where(t_n < 0, 1.0, alphas[t_n])[:, None]
    x = (now / own).sqrt() * y + (1 - now / own).sqrt() * noise
    found = ambient_prediction_vp(d, x, alphas, t, t_n) / own.sqrt()
    level = ((1 - now.double()) / now).sqrt()[:, 0]
    own_level = ((1 - own.double()) / own).sqrt()[:, 0]
    expected = ambient_prediction(d, x / now.sqrt(), level, own_level)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1], x[1] / own[1].sqrt())  # at its own step a sample is all there is
    assert torch.equal(found[3], d[3])  # step 0 is not clean, -1 is
    levels = ((1 - alphas) / alphas).sqrt()
    assert vp_timestep(alphas, levels).tolist() == list(range(1000))
    sdxl = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    assert sdxl[100].item() == pytest.approx(0.8942, abs=5e-5)
    assert vp_timestep(sdxl, torch.tensor([0.0, 0.343, 0.344])).tolist() == [-1, 100, 101]


def test_every_parameterisation_is_the_one_loss():
    """From the definition: w |(1 - q) D + q z - y|^2, with the weight that each prediction gives to D."""
    y, noise, d = randn(3, 2, 6), randn(3, 2, 6, seed=1), randn(3, 2, 6, seed=2)
    sigma_n = torch.tensor([0.0, 0.2, 0.5])
    shape = (3, 1, 1)
    for kind, task, t in tasks():
        sigma = task.schedule.sigma(t)
        z = add_noise_to(y, sigma_n, sigma, noise)
        made = task.make(y, sigma_n, noise, t)
        # The prediction that says d: outputs are linear in the clean sample.
        zero = torch.zeros_like(y)
        offset = task.objective.predicted_sample(zero, made.noisy, t)
        slope = task.objective.predicted_sample(zero + 1, made.noisy, t) - offset
        prediction = (d - offset) / slope
        ours = task.loss(prediction, made)
        weight = slope[:, 0, 0].double() ** -2
        each = (ambient_prediction(d, z, sigma, sigma_n) - y).square().mean((1, 2))
        torch.testing.assert_close(ours, (weight * each).mean().float(), rtol=1e-4, atol=0, msg=kind)
        expected = {"epsilon": sigma**-2, "sample": sigma**0, "edm": (sigma**2 + 0.25) / (0.5 * sigma) ** 2}
        if kind in expected:
            torch.testing.assert_close(weight, expected[kind], rtol=1e-3, atol=0)
        noisy, _ = task.objective.make(z, zero, t)  # the input is z, scaled
        torch.testing.assert_close(made.noisy, noisy, atol=1e-5, rtol=1e-5)
        # The ordinary loss of the target whose clean sample is substituted.
        x_hat = unbiased_clean_target(y, z, sigma, sigma_n)
        root = (1 - (sigma_n.double() / sigma) ** 2).sqrt().float().view(shape)
        _, target = task.objective.make(x_hat, noise / root, t)
        uniform = AmbientTask(task.objective, task.law, weighting="uniform")
        substituted = uniform.loss(prediction, uniform.make(y, sigma_n, noise, t))
        torch.testing.assert_close(substituted, (prediction - target).square().mean(), rtol=1e-4, atol=0, msg=kind)


def test_one_batch_of_three_levels_is_three_losses():
    y, noise, prediction = randn(6, 8), randn(6, 8, seed=1), randn(6, 8, seed=2)
    sigma_n = torch.tensor([0.0, 0.2, 0.5]).repeat(2)
    for kind, task, t in tasks():
        t = t[[2, 1, 1, 1, 2, 2]]
        whole = task.loss(prediction, task.make(y, sigma_n, noise, t))
        parts = []
        for first in range(3):
            rows = slice(first, None, 3)
            parts.append(task.loss(prediction[rows], task.make(y[rows], sigma_n[rows], noise[rows], t[rows])))
        torch.testing.assert_close(whole, sum(parts) / 3, rtol=1e-5, atol=0, msg=kind)


def test_clean_data_are_trained_as_ever_bit_by_bit():
    y, noise = randn(3, 2, 6), randn(3, 2, 6, seed=1)
    for kind, task, t in tasks():
        prediction = randn(3, 2, 6, seed=2).requires_grad_()
        made = task.make(y, torch.zeros(3), noise, t)
        loss = task.loss(prediction, made)
        (gradient,) = torch.autograd.grad(loss, prediction)
        noisy, target = task.objective.make(y, noise, t)
        plain = task.objective.loss(prediction, target, t)
        assert torch.equal(made.noisy, noisy), kind
        assert torch.equal(loss, plain), kind
        assert torch.equal(gradient, torch.autograd.grad(plain, prediction)[0]), kind
        mixed = task.make(y, torch.tensor([0.0, 0.0, 0.2]), noise, t)  # beside a noisy sample too
        assert torch.equal(mixed.noisy[:2], noisy[:2]), kind
        assert torch.equal(mixed.target[:2], target[:2]), kind
        rng, plain_rng = StepRNG(0), StepRNG(0)
        rng.begin(0), plain_rng.begin(0)
        assert torch.equal(task.draw(torch.zeros(50), rng)[0], task.law(50, plain_rng)), kind


def test_pure_noise_has_a_finite_loss():
    for objective, t in ((FlowMatching(), torch.ones(2)), (v_to_pure_noise(), torch.tensor([999, 999]))):
        task = AmbientTask(objective, UniformTimesteps(None if t.is_floating_point() else 1000))
        made = task.make(randn(2, 4), torch.tensor([0.0, 0.3]), randn(2, 4, seed=1), t)
        assert task.loss(torch.zeros(2, 4), made).isfinite()
        assert (made.keep == 1).all()


def v_to_pure_noise():
    return EpsX0V(DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True))


X, D = torch.zeros(2, 3), torch.zeros(2, 3)
ALPHAS = DDIMScheduler().alphas_cumprod


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ambient_prediction(D, X, 1.0, -0.1), "`sigma_n` must hold finite noise levels >= 0, got -0.1"),
        (lambda: ambient_prediction(D, X, 1.0, float("nan")), "`sigma_n` must hold finite noise levels >= 0, got nan"),
        (lambda: ambient_prediction(D, X, float("inf"), 0.1), "`sigma` must hold finite noise levels"),
        (
            lambda: ambient_prediction(D, X, torch.ones(3), 0.1),
            r"`sigma` must be one level or .* 2 samples, got \(3,\)",
        ),
        (lambda: ambient_prediction(D, X, 1.0, torch.ones(2, 3)), r"`sigma_n` must be one level or .*got \(2, 3\)"),
        (lambda: ambient_prediction(D, X, 0.1, 0.2), "`sigma` must be > 0 and >= `sigma_n`"),
        (lambda: unbiased_clean_target(X, X, 0.2, 0.2), "`sigma` must be > 0 and > `sigma_n`"),
        (lambda: add_noise_to(X, 0.2, 0.1, X), "`sigma` must be > 0 and >= `sigma_n`"),
        (
            lambda: ambient_prediction_vp(D, X, ALPHAS, 1000, 3),
            r"`t` must hold integers in 0..999, got \[1000, 1000\]",
        ),
        (lambda: ambient_prediction_vp(D, X, ALPHAS, 5, -2), r"`t_n` must hold integers in -1..999, got \[-2, -2\]"),
        (lambda: ambient_prediction_vp(D, X, ALPHAS, 5, 1000), "`t_n` must hold integers in -1..999"),
        (lambda: ambient_prediction_vp(D, X, ALPHAS, 5, 6), "`t` must be at least `t_n`"),
        (lambda: vp_timestep(ALPHAS, 1e6), r"`sigma_n` must hold finite levels in \[0, 157.*got 1000000.0"),
        (lambda: vp_timestep(ALPHAS, -1.0), r"`sigma_n` must hold finite levels in \[0"),
    ],
)
def test_refuses_bad_levels(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weighting": "omni"}, r"`weighting` must be one of \['paper', 'uniform'\], got 'omni'"),
        ({"every": "some"}, r"`every` must be one of \['below', 'all'\], got 'some'"),
        ({"levels": "cut"}, r"`levels` must be one of \['truncate', 'clamp'\], got 'cut'"),
        ({"consistency_weight": -1.0}, "`consistency_weight` must be a finite number >= 0, got -1.0"),
        ({"consistency_steps": 0}, "`consistency_steps` must be an integer >= 1, got 0"),
        ({"max_amplification": 1.0}, "`max_amplification` must be a finite number > 1, got 1.0"),
        ({"weighting": "uniform", "levels": "clamp"}, "`weighting` must be 'paper' with `levels='clamp'`"),
    ],
)
def test_refuses_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        AmbientTask(FlowMatching(), UniformTimesteps(None), **options)


def test_refuses_timesteps_at_which_nothing_is_learned():
    clamped = EpsX0V(DDIMScheduler(), "min_snr")
    with pytest.raises(ValueError, match="`snr_gamma` must be left out with `levels='clamp'`"):
        AmbientTask(clamped, UniformTimesteps(1000), levels="clamp")
    own = torch.full((2,), 0.5)
    paper = AmbientTask(EDM(), LogNormalLevels())
    assert paper.loss(X, paper.make(X, own, D, own)) == 0  # q = 1
    for task in (
        AmbientTask(EDM(), LogNormalLevels(), weighting="uniform"),
        AmbientTask(clamped, UniformTimesteps(1000)),
    ):
        t = own if task.schedule.kind is EDM else torch.full((2,), 300)
        level = task.schedule.sigma(t)
        with pytest.raises(ValueError, match="`t` must hold timesteps whose noise levels are above `sigma_n`"):
            task.make(X, level, D, t)
    with pytest.raises(ValueError, match="`t` must hold timesteps whose noise levels are not below `sigma_n`"):
        paper.make(X, own, D, own / 2)
    with pytest.raises(
        ValueError, match="`sigma` must be below the largest noise level of the schedule, 157.4, got 2"
    ):
        AmbientTask(clamped, UniformTimesteps(1000)).check(200.0)
    with pytest.raises(ValueError, match="gap of `max_amplification`"):
        AmbientTask(EpsX0V(DDIMScheduler()), UniformTimesteps(1000), max_amplification=1.01).check(20.0)
