"""Anomaly maps: exact reconstructions of Gaussian data, thresholds of healthy images, and what pipelines are asked."""

import numpy as np
import pytest
import scipy.ndimage
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, UNet2DModel

from diffusers_ext import AnomalyDetectionPipeline, SimplexNoise
from diffusers_ext.methods.score_frameworks.pipeline_anomaly import smoothed
from diffusers_ext.methods.score_frameworks.sampling import Estimator, partial_levels
from tests.methods.score_frameworks.linear import GaussianUNet, exact_scheduler, responses


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make(scheduler=None):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=2, layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    ).eval()  # fmt: skip
    pipeline = AnomalyDetectionPipeline(unet, scheduler or DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


IMAGES = torch.rand(3, 1, 8, 8, generator=seeded())
QUICK = {"num_inference_steps": 4, "num_samples": 2}


@pytest.fixture(scope="module")
def pipeline():
    return make()


@pytest.mark.parametrize(("steps", "variance"), [(250, 0.234534), (25, 0.208191)])
def test_what_comes_back_of_gaussian_data(steps, variance):
    estimator = Estimator(GaussianUNet(0.25), exact_scheduler())
    sigmas = partial_levels(estimator.field, 0.25, steps)
    timesteps = [round(float(estimator.field.at(s).t)) for s in sigmas[:-1]]
    assert timesteps[:2] + timesteps[-1:] == ([249, 248, 0] if steps == 250 else [249, 239, 10])
    a, b = estimator.coefficients(sigmas[0])
    found, added = responses(estimator, estimator, sigmas, (1,), start=(b, a * 1.0))
    assert (1 - found.item()) ** 2 == pytest.approx(0.614854, abs=1e-6)
    assert added.square().sum().item() == pytest.approx(variance, abs=1e-6)


def test_smoothing_is_that_of_scipy():
    maps = torch.rand(2, 1, 20, 30, generator=seeded())
    for std in (0.7, 1.0, 2.5):
        wanted = np.stack([scipy.ndimage.gaussian_filter(m[0].numpy(), std, mode="nearest") for m in maps])
        np.testing.assert_allclose(smoothed(maps, std)[:, 0].numpy(), wanted, atol=1e-5)
    assert smoothed(maps, 0) is maps


def test_maps_are_differences_to_the_mean_reconstruction(pipeline):
    found = {
        score: pipeline(IMAGES, score=score, smoothing=0, generator=seeded(), output_type="pt", **QUICK)
        for score in ("absolute", "bright", "dark")
    }
    difference = IMAGES - found["absolute"].reconstruction
    torch.testing.assert_close(found["absolute"].anomaly_map, difference.abs())
    torch.testing.assert_close(found["bright"].anomaly_map, difference.clamp(min=0))
    torch.testing.assert_close(found["dark"].anomaly_map, (-difference).clamp(min=0))
    assert torch.equal(found["dark"].image_score, found["dark"].anomaly_map.amax((1, 2, 3)))
    assert found["dark"].mask is None
    where = torch.zeros(8, 8).index_fill(1, torch.arange(4), 1)
    output = pipeline(IMAGES, mask=where, threshold=0.1, generator=seeded(), **QUICK)
    assert output.anomaly_map[..., 4:].max() == 0
    assert output.anomaly_map[..., :4].max() > 0
    assert torch.equal(output.mask, output.anomaly_map > 0.1)
    assert [(image.size, image.mode) for image in output.reconstruction] == [((8, 8), "L")] * 3


@pytest.mark.parametrize("noise", ["gaussian", "simplex", SimplexNoise(8.0, 2)])
def test_an_image_does_not_depend_on_the_others(pipeline, noise):
    options = {"noise": noise, **QUICK}
    both = pipeline(IMAGES[:2], generator=[seeded(1), seeded(2)], **options).anomaly_map
    alone = pipeline(IMAGES[1:2], generator=[seeded(2)], **options).anomaly_map
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=0)
    other = pipeline(IMAGES[1:2], generator=seeded(2), **{**options, "noise": "gaussian"}).anomaly_map
    assert torch.allclose(alone, other, atol=1e-5) == (noise == "gaussian")


def test_a_threshold_of_healthy_images_is_kept(pipeline, tmp_path):
    with pytest.raises(ValueError, match="`threshold` must be a number: 'calibrated' needs a call of `calibrate`"):
        pipeline(IMAGES, threshold="calibrated")
    where = torch.ones(8, 8).index_fill(0, torch.arange(2), 0)
    threshold = pipeline.calibrate(
        IMAGES, quantile=0.9, mask=where, batch_size=3, generator=seeded(), strength=0.5, **QUICK
    )
    maps = pipeline(IMAGES, strength=0.5, generator=seeded(), **QUICK).anomaly_map
    assert threshold == pytest.approx(maps[..., 2:, :].double().quantile(0.9).item(), abs=1e-6)
    pipeline.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(again) is AnomalyDetectionPipeline
    again.set_progress_bar_config(disable=True)
    options = {"strength": 0.5, "threshold": "calibrated", **QUICK}
    output = again(IMAGES, generator=seeded(), **options)
    torch.testing.assert_close(output.anomaly_map, maps, atol=1e-6, rtol=0)
    assert torch.equal(output.mask, output.anomaly_map > threshold)
    with pytest.raises(ValueError, match="`strength` must be 0.5, for which the threshold was calibrated, got 0.25"):
        again(IMAGES, **{**options, "strength": 0.25})
    half = again.to(torch.bfloat16)(IMAGES, generator=seeded(), **options).anomaly_map
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, maps, atol=0.05, rtol=0)


def test_callbacks_and_flow_matching():
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, round(float(timestep)), tuple(tensors["latents"].shape)))
        pipe._interrupt = step == 1
        return {"latents": tensors["latents"]}

    options = {**QUICK, "generator": seeded()}
    output = make()(IMAGES, callback_on_step_end=callback, return_dict=False, **options)
    assert seen == [(0, 249, (6, 1, 8, 8)), (1, 187, (6, 1, 8, 8))]
    assert len(output) == 4
    flow = make(FlowMatchEulerDiscreteScheduler())
    assert flow(IMAGES, strength=1.0, **QUICK).anomaly_map.isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"strength": 0}, r"`strength` must be a number in \(0, 1\], got 0"),
        ({"strength": 1.5}, r"`strength` must be a number in \(0, 1\], got 1.5"),
        ({"strength": 0.01}, "`num_inference_steps` must be at most 10, the timesteps of `strength` 0.01, got 25"),
        ({"noise": "perlin"}, "`noise` must be one of .* or a SimplexNoise, got 'perlin'"),
        ({"score": "red"}, "`score` must be one of .* got 'red'"),
        ({"smoothing": -1.0}, "`smoothing` must be a number >= 0 of pixels, got -1.0"),
        ({"threshold": "auto"}, "`threshold` must be a number >= 0, 'calibrated' or left out, got 'auto'"),
        ({"threshold": -1.0}, "`threshold` must be a number >= 0, 'calibrated' or left out, got -1.0"),
        ({"mask": torch.full((8, 8), 0.5)}, r"`mask` must hold 0 and 1 alone, got \[0.5\]"),
        ({"mask": torch.ones(4, 4)}, r"`mask` must have the shape \(8, 8\) or \(3, 1, 8, 8\), got \(4, 4\)"),
        ({"mask": torch.zeros(8, 8)}, "`mask` must be 1 somewhere, got 0 everywhere"),
        ({"image": IMAGES * float("nan")}, "`image` must be finite, got NaN or infinity"),
        ({"image": 3 * IMAGES}, r"`image` must lie in \[0, 1\]"),
        ({"image": [IMAGES, IMAGES[..., :4]]}, "`image` must hold images of one size"),
        ({"image": IMAGES[..., :7]}, "`image` must be of images of 1 channels and of sides that 2 divides"),
        ({"num_samples": 0}, "`num_samples` must be an integer >= 1, got 0"),
    ],
)
def test_bad_input_is_refused(pipeline, call, message):
    with pytest.raises(ValueError, match=message):
        pipeline(**{"image": IMAGES, **call})


def test_bad_calibration_is_refused(pipeline):
    for options, message in (
        ({"quantile": 1.0}, r"`quantile` must be a number in \(0, 1\), got 1.0"),
        ({"batch_size": 0}, "`batch_size` must be an integer >= 1, got 0"),
        ({"steps": 3}, "`settings` must be among .* got 'steps'"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline.calibrate(IMAGES, **options)


def test_a_schedule_of_zero_terminal_snr_begins_at_a_finite_level():
    zero = DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing")
    pipeline = make(zero)
    assert 900 < partial_levels(Estimator(pipeline.unet, zero).field, 1.0, 4)[0] < 1000
    assert pipeline(IMAGES, strength=1.0, **QUICK).anomaly_map.isfinite().all()
