"""What is refused by name: wrong types and ranges, and shapes that would be broadcast unseen."""

import math
import re

import numpy as np
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)

from diffusers_ext import (
    VESDE,
    VPSDE,
    AnnealedLangevinScheduler,
    AnomalyDetectionPipeline,
    FourierSampling,
    LinearOperator,
    ReconstructionPipeline,
    ScoreSDEScheduler,
    SimplexNoise,
    geometric_sigmas,
    langevin_step_size,
    largest_distance,
    ncsn_as_denoiser,
    read_slices,
    score_from_output,
    sigma_of_timestep,
    solve_probability_flow,
    timestep_of_sigma,
)

NAN, INF = math.nan, math.inf
MASK = torch.tensor([1, 1, 1, 0, 0, 0, 1, 1])
SAMPLING, IMAGES, X = FourierSampling(MASK), torch.full((2, 1, 8, 8), 0.5), torch.ones(2, 3)
KSPACE = SAMPLING.forward(IMAGES)
ALPHAS = DDPMScheduler().alphas_cumprod
UNET = UNet2DModel(
    sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=2, layers_per_block=1,
    down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
).eval()  # fmt: skip
ANOMALIES = AnomalyDetectionPipeline(UNET, DDIMScheduler())


def identity(value):
    return value


def flow(**changes):
    return solve_probability_flow(**{"model": identity, "scheduler": DDPMScheduler(), "sample": X, **changes})


def found(**changes):
    return ANOMALIES(**{"image": IMAGES, "num_inference_steps": 1, **changes})


def calibrated(**changes):
    return ANOMALIES.calibrate(**{"images": IMAGES, "num_inference_steps": 1, **changes})


def reconstructed(**changes):
    return ReconstructionPipeline(UNET, DDIMScheduler())(
        **{"measurement": KSPACE, "operator": SAMPLING, "num_inference_steps": 1, **changes}
    )


# Function, its other arguments, an argument, and values that it must refuse.
ARGUMENTS = [
    (geometric_sigmas, {"sigma_min": 0.1, "num_levels": 3}, "sigma_max", [None, "a", True, NAN, INF]),
    (geometric_sigmas, {"sigma_max": 1.0, "num_levels": 3}, "sigma_min", [None, "a", NAN, 0]),
    (geometric_sigmas, {"sigma_max": 1.0, "sigma_min": 0.1}, "num_levels", ["3", 2.5, True]),
    (geometric_sigmas, {"sigma_max": 1.0, "sigma_min": 0.1}, "dimension", ["a", 1.5, True, NAN]),
    (geometric_sigmas, {"sigma_max": 1.0, "sigma_min": 0.1, "dimension": 64}, "overlap", ["a", NAN]),
    (langevin_step_size, {"sigmas": [2.0, 1.0]}, "steps_per_level", [None, "a", 2.5, True]),
    (langevin_step_size, {"steps_per_level": 5}, "sigmas", [None, [INF, 1.0], [2.0], [[2.0, 1.0]]]),
    (largest_distance, {}, "images", [None, [[1.0], [2.0]], X.int(), X + 0j, X[:1], X[0]]),
    (largest_distance, {"images": X}, "batch_size", [0, "a", True]),
    (VPSDE, {}, "beta_min", [None, "a", True, NAN, INF, 30.0]),
    (VESDE, {}, "sigma_max", [None, "a", INF, 0.001]),
    (SimplexNoise, {}, "frequency", [None, "a", True, INF]),
    (SimplexNoise, {}, "octaves", [None, "a", True]),
    (SimplexNoise, {}, "persistence", [None, "a", True, NAN]),
    (ncsn_as_denoiser, {"sigmas": [2.0, 1.0]}, "model", [None, "a"]),
    (ncsn_as_denoiser, {"model": identity}, "sigmas", [None, "a", [INF, 1.0], [1.0, 1.0]]),
    (sigma_of_timestep, {"t": 5}, "alphas_cumprod", [None, "a", ALPHAS.flip(0), DDPMScheduler().betas, ALPHAS[:0]]),
    (timestep_of_sigma, {"sigma": 1.0}, "alphas_cumprod", [ALPHAS.flip(0)]),
    (ScoreSDEScheduler, {}, "corrector_steps", [None, "a", 1.5, True]),
    (ScoreSDEScheduler, {}, "snr", [None, "a", True, INF]),
    (ScoreSDEScheduler, {}, "sigma_min", [0, NAN, "a", True]),
    (ScoreSDEScheduler, {}, "beta_schedule", ["x", None]),
    (AnnealedLangevinScheduler, {}, "dimension", ["a", 1.5, True]),
    (AnnealedLangevinScheduler, {}, "num_levels", ["a", 1.5, 1]),
    (AnnealedLangevinScheduler, {}, "steps_per_level", [None, "a", 1.5, True]),
    (AnnealedLangevinScheduler, {}, "step_size", ["a", INF, True]),
    (read_slices, {"volume": "x.nii"}, "percentile", [None, "a", True, NAN]),
    (read_slices, {"volume": "x.nii"}, "field_of_view", ["a", True, INF]),
    (flow, {}, "sample", [None, [[1.0]], X.int(), X + 0j, X[:0], X[0]]),
    (flow, {}, "rtol", [None, "a", INF, True]),
    (found, {}, "strength", [None, "a", True, NAN]),
    (found, {}, "num_inference_steps", [True, 1.5]),
    (found, {}, "smoothing", [None, "a", True, INF]),
    (found, {}, "threshold", [[0.1], torch.ones(2), True, INF]),
    (found, {}, "mask", ["a", np.ones((8, 8), object), torch.ones(8, 8) + 0j, torch.ones(2, 3, 8, 8)]),
    (found, {}, "generator", [[None, None], (torch.Generator(),)]),
    (calibrated, {}, "quantile", [None, "a", True, NAN]),
    (calibrated, {}, "batch_size", [None, True]),
    (reconstructed, {}, "noise_std", [None, "a", True, INF]),
    (reconstructed, {}, "eta", [None, "a", True]),
    (reconstructed, {}, "data_variance", [None, "a", True, NAN]),
    (reconstructed, {}, "measurement", [None, KSPACE.numpy(), KSPACE[:0], KSPACE[..., None], KSPACE.real.int()]),
]


@pytest.mark.parametrize("row", ARGUMENTS, ids=lambda row: f"{row[0].__name__}-{row[2]}")
def test_arguments(row):
    function, others, name, values = row
    for value in values:
        with pytest.raises(ValueError, match=f"`{name}`.* must "):
            function(**{**others, name: value})


@pytest.mark.parametrize("kind", [ScoreSDEScheduler, AnnealedLangevinScheduler])
def test_schedulers(kind):
    for changes in (
        {"num_train_timesteps": 0},
        {"num_train_timesteps": 1.5},
        {"beta_start": "a"},
        {"trained_betas": []},
        {"trained_betas": 5},
        {"trained_betas": [0.1, "a"]},
    ):
        with pytest.raises(ValueError, match="`beta_schedule` or `trained_betas`|`alphas_cumprod` must be"):
            kind(**changes)
    for other in (FlowMatchEulerDiscreteScheduler, EDMEulerScheduler, CMStochasticIterativeScheduler):
        for config in (other().config, {"_class_name": other.__name__, "num_train_timesteps": 1000}):
            with pytest.raises(ValueError, match="`config` must be that of a scheduler with `beta_schedule`, got "):
                kind.from_config(config)
    scheduler = kind()
    for count in ("a", 1.5, True, [5]):
        with pytest.raises(ValueError, match="`num_.*` must be an integer"):
            scheduler.set_timesteps(count)
    scheduler.set_timesteps(3)
    t, one = scheduler.timesteps[0], torch.tensor([0])
    for call, message in (
        (lambda: scheduler.step(X[:1], t, X), "`model_output` must have the shape of `sample`, (2, 3), got (1, 3)"),
        (lambda: scheduler.step(X, t, X[:1]), "`model_output` must have the shape of `sample`, (1, 3), got (2, 3)"),
        (lambda: scheduler.step(X, t, X, [torch.Generator()] * 3), "`generator` must be one generator or a list of 2"),
        (lambda: scheduler.add_noise(X, X[:1], one), "`noise` must be those of samples of the shape (2, 3), got the"),
        (
            lambda: scheduler.add_noise(X[:1], X[:1], torch.tensor([0, 1])),
            "`timesteps` must be those of samples of th",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: score_from_output(X[:1], X, 1.0, "epsilon"), "`output` must be a tensor of floats, both of one"),
        (lambda: score_from_output(X.int(), X.int(), 1.0, "epsilon"), "`output` must be a tensor of floats"),
        (lambda: score_from_output(None, X, 1.0, "epsilon"), "`output` must be a tensor of floats"),
        (lambda: score_from_output(X, X, torch.ones(3), "epsilon"), "`sigma` must be above 0 and finite, one or 2"),
        (lambda: score_from_output(X, X, INF, "epsilon"), "`sigma` must be above 0 and finite, one or 2, got inf"),
        (lambda: ncsn_as_denoiser(lambda y, _: y[:1], [2.0, 1.0])(X, 0), "`model` must be one that returns (2, 3)"),
        (lambda: AnomalyDetectionPipeline(UNET, DDIMScheduler(), image_scale=True), "`image_scale` must"),
        (lambda: AnomalyDetectionPipeline(UNET, DDIMScheduler(), calibration="a"), "`calibration` must"),
        # Operators and what they measured.
        (lambda: LinearOperator(identity, identity, True), "`max_iterations` must be an integer >= 1, got True"),
        (lambda: LinearOperator(identity, identity, tolerance=INF), "`tolerance` must be a number > 0, got inf"),
        (lambda: FourierSampling("a"), "`mask` must be a real number, or several, got 'a'"),
        (lambda: FourierSampling(torch.ones(8, 8) + 0j), "`mask` must be a real number, or several"),
        (lambda: FourierSampling(MASK, "a"), "`sensitivity_maps` must be a tensor of finite numbers, got 'str'"),
        (lambda: FourierSampling(MASK, torch.ones(2, 8, 8) * NAN), "`sensitivity_maps` must be a tensor of finite"),
        (lambda: FourierSampling(MASK, torch.ones(0, 8, 8)), "`sensitivity_maps` must be a tensor of finite numbers"),
        (lambda: FourierSampling(MASK, torch.ones(2, 8, 8)).forward(torch.ones(1, 2, 8, 8)), "`image` must be of one"),
        (lambda: SAMPLING.complete(KSPACE, NAN), "`noise_std` must be a number >= 0, got nan"),
        (lambda: SAMPLING.complete(KSPACE.real, 0.1), "`measurement` must be complex, as k-space is"),
        (lambda: SAMPLING.complete(KSPACE[..., :4], 0.1), "`measurement` must be of the mask's size, (8, 8)"),
        (lambda: reconstructed(operator=LinearOperator(lambda _: None, identity), measurement=IMAGES), "must be what"),
        (lambda: reconstructed(operator=LinearOperator(lambda x: x * NAN, identity), measurement=IMAGES),
         "`operator` must have an adjoint"),
        (lambda: reconstructed(operator=LinearOperator(lambda x: x + 1, identity), measurement=IMAGES),
         "`operator` must have an adjoint"),
    ],
)  # fmt: skip
def test_shapes_and_numbers(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_a_threshold_of_many_pixels(monkeypatch):
    """torch's own quantile takes 16 million values at most."""
    maps = torch.arange(17.0).repeat_interleave(1_000_000)
    monkeypatch.setattr(
        AnomalyDetectionPipeline, "__call__", lambda *_, **__: type("Found", (), {"anomaly_map": maps})
    )
    assert ANOMALIES.calibrate(IMAGES, quantile=0.5) == 8.0
