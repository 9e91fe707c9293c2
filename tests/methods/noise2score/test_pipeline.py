"""The pipeline against the formulas, for every kind of image and noise, and its refusals."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from PIL import Image

from diffusers_ext import (
    AdditiveGaussianNoise,
    ExponentialFamilyNoise,
    ExponentialNoise,
    GammaNoise,
    Noise2ScoreConvNet,
    Noise2ScorePipeline,
    Noise2ScoreUNet,
    PoissonGaussianNoise,
    PoissonNoise,
    estimate_noise_parameter,
    posterior_mean,
    score_from_diffusion,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*denominators were not positive")


def network(channels=1, **config):
    torch.manual_seed(0)
    return Noise2ScoreConvNet(channels, channels, base_channels=4, layers=3, score_scale=5.0, **config).eval()


def make(net=None, **config):
    pipeline = Noise2ScorePipeline(net or network(smoothing=0.03), **config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


IMAGES = torch.rand(2, 1, 20, 26, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("noise", "name", "parameter"),
    [
        (AdditiveGaussianNoise(0.1), "gaussian", 0.1),
        (PoissonNoise(0.02), "poisson", 0.02),
        (PoissonGaussianNoise(0.02, 0.03), "poisson_gaussian", (0.02, 0.03)),
        (GammaNoise(30.0), "gamma", 30.0),
        (ExponentialNoise("log"), "exponential", None),
    ],
)
def test_it_is_the_formula(noise, name, parameter):
    pipeline = make()
    with torch.no_grad():
        expected = posterior_mean(IMAGES, lambda v: pipeline.unet(v).sample, noise, 0.03)
    for output in (
        pipeline(IMAGES, name, noise_parameter=parameter, output_type="pt"),
        pipeline(IMAGES, noise, output_type="pt"),
        make(noise=name)(IMAGES, noise_parameter=parameter, output_type="pt"),
    ):
        torch.testing.assert_close(output.images, expected)
        assert output.penalty_curve is None
        assert output.tile_difference == 0
    assert pipeline(IMAGES, name, noise_parameter=parameter).noise_parameter == [parameter] * 2
    # One by one, in tiles, and as arrays it is the same.
    one = [pipeline(image, noise, output_type="pt").images[0] for image in IMAGES]
    torch.testing.assert_close(torch.stack(one), expected, atol=1e-5, rtol=1e-4)
    cut = pipeline(IMAGES, noise, tile=9, output_type="np").images
    torch.testing.assert_close(torch.from_numpy(cut).movedim(-1, 1), expected, atol=1e-5, rtol=1e-4)


def test_other_estimators_domains_and_families():
    found = make()(IMAGES, "poisson", noise_parameter=0.02, estimator="mode", output_type="pt").images
    with torch.no_grad():
        score = make().unet
        expected = posterior_mean(IMAGES, lambda v: score(v).sample, PoissonNoise(0.02, "mode"))
        torch.testing.assert_close(found, expected)
        found = make(domain="linear")(IMAGES, "gamma", noise_parameter=30.0, output_type="pt").images
        expected = posterior_mean(IMAGES, lambda v: score(v).sample, GammaNoise(30.0, "linear"))
        torch.testing.assert_close(found, expected)
        own = ExponentialFamilyNoise(lambda y: -y / 0.01, lambda eta: 0.01 * eta)
        found = make()(IMAGES, own, output_type="pt").images
        torch.testing.assert_close(found, posterior_mean(IMAGES, lambda v: score(v).sample, own))


def test_kinds_of_images_agree_and_keep_their_depth(tmp_path):
    deep = (IMAGES * 65535).round()
    array = deep[:, 0].numpy().astype(np.uint16)
    expected = make()(deep / 65535, noise_parameter=0.1, output_type="pt").images
    Image.fromarray(array[0]).save(tmp_path / "deep.png")
    noisy = np.float32(array[0] / 65535) * 3 - 1  # outside of [0, 1]
    Image.fromarray(noisy).save(tmp_path / "noisy.tif")
    for same in (list(array), [Image.open(tmp_path / "deep.png"), array[1]], torch.from_numpy(array)[:, None]):
        found = make()(same, noise_parameter=0.1, output_type="pt").images
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    outside = make()(torch.from_numpy(noisy)[None], noise_parameter=0.1, output_type="pt").images
    assert outside.min() < -0.5
    found = make()(Image.open(tmp_path / "noisy.tif"), noise_parameter=0.1, output_type="pt").images
    torch.testing.assert_close(found, outside, atol=1e-5, rtol=0)
    shown = np.asarray(make()(Image.open(tmp_path / "noisy.tif"), noise_parameter=0.1).images[0])
    np.testing.assert_allclose(shown, (outside[0, 0].clamp(0, 1) * 255).round(), atol=1)
    colour = make(network(3))([Image.new("RGB", (9, 7)), np.zeros((5, 6, 3), np.uint8)], noise_parameter=0.1)
    assert [image.size for image in colour.images] == [(9, 7), (6, 5)]
    sizes = make()([IMAGES[0], IMAGES[1, :, :5]], noise_parameter=0.1, output_type="np", return_dict=False)[0]
    assert [image.shape for image in sizes] == [(20, 26, 1), (5, 26, 1)]


@pytest.mark.parametrize(
    ("family", "blind_range", "kind"),
    [
        ("gaussian", (0.02, 0.2), AdditiveGaussianNoise),
        ("gamma", (20, 60), GammaNoise),
        ("poisson", (0.01, 0.1), PoissonNoise),
    ],
)
def test_blind_is_search_and_formula(family, blind_range, kind):
    pipeline = make()
    calls = []
    pipeline.unet.register_forward_hook(lambda *_: calls.append(1))
    output = pipeline(IMAGES, family, blind_range=blind_range, output_type="pt")
    assert len(calls) == 1 if family != "poisson" else len(calls) > 200

    @torch.no_grad()
    def score(v):
        return pipeline.unet(v).sample

    for i, image in enumerate(IMAGES):
        estimate = estimate_noise_parameter(image[None], score, family, blind_range, 0.03)
        assert output.noise_parameter[i] == pytest.approx(estimate.parameter, rel=1e-4)
        np.testing.assert_allclose(output.penalty_curve[i].penalties, estimate.penalties, rtol=1e-4)
        expected = posterior_mean(image[None], score, kind(output.noise_parameter[i]), 0.03)
        torch.testing.assert_close(output.images[i], expected[0], atol=1e-5, rtol=1e-5)


def unet2d(**config):
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=16, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=2,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, layers_per_block=1, **config,
    ).eval()  # fmt: skip


def test_a_unet_of_diffusers_with_scales_and_tiles():
    net = unet2d()
    pipeline = make(net, smoothing=0.05, input_scale=0.5, score_scale=3.0)
    assert pipeline.smoothing == 0.05
    even = IMAGES[..., :20, :26]
    with torch.no_grad():
        expected = posterior_mean(even, lambda v: 3 * net(v / 2, 0).sample, AdditiveGaussianNoise(0.1), 0.05)
    torch.testing.assert_close(pipeline(even, noise_parameter=0.1, output_type="pt").images, expected)
    odd = pipeline(IMAGES[..., :19, :25], noise_parameter=0.1, output_type="np").images
    assert odd.shape == (2, 19, 25, 1)
    with pytest.warns(UserWarning, match="tiles are an approximation: where they overlap they differ by"):
        output = pipeline(even, noise_parameter=0.1, tile=12, output_type="pt")
    assert output.tile_difference > 0
    assert (output.images - expected).abs().max() > 1e-6
    # Where tiles would be the same, so is the blend: tiles as large as the image.
    whole = pipeline(even, noise_parameter=0.1, tile=26, output_type="pt")
    torch.testing.assert_close(whole.images, expected)


def test_the_bar_counts_tiles(monkeypatch):
    bars = []

    class Bar:
        def __init__(self, total):
            self.n, self.total = 0, total
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self):
            self.n += 1

    pipeline = make()
    monkeypatch.setattr(pipeline, "progress_bar", Bar)
    pipeline(IMAGES, noise_parameter=0.1, tile=10)  # 2 x 3 tiles of a stack of two
    pipeline(IMAGES, "poisson_gaussian", noise_parameter=(0.1, 0.1))
    pipeline(IMAGES, "poisson", blind_range=(0.05, 0.1))
    assert [(bar.n, bar.total) for bar in bars] == [(6, 6), (2, 2), (202, 202)]


def test_it_is_restored_and_takes_half_precision(tmp_path):
    pipeline = make(Noise2ScoreUNet(base_channels=3, score_scale=5.0, smoothing=0.03), noise="gaussian")
    expected = pipeline(IMAGES, noise_parameter=0.1, output_type="pt").images
    pipeline.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(again) is Noise2ScorePipeline
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again(IMAGES, noise_parameter=0.1, output_type="pt").images, expected)
    half = again.to(torch.bfloat16)(IMAGES, noise_parameter=0.1, output_type="pt").images
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, atol=0.05, rtol=0)
    double = make()(IMAGES.double(), noise_parameter=0.1, output_type="pt").images
    assert double.dtype == torch.float64


@pytest.mark.parametrize("scheduler", [DDIMScheduler(), FlowMatchEulerDiscreteScheduler(), EDMEulerScheduler()])
def test_a_diffusion_model_is_a_score(scheduler):
    """Of N(0, s^2) data the best denoiser is known in every parametrisation; so is the posterior mean."""
    s, sigma = 0.8, 0.4
    y = torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(2, 6)

    def model(x, t):
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):  # predicts noise - x0
            b = (t / 1000)[:, None]
            a, v = 1 - b, (1 - b) ** 2 * s**2 + b**2
            return (b - a * s**2) / v * x
        if isinstance(scheduler, EDMEulerScheduler):  # the preconditioned output
            level, data = (4 * t).exp()[:, None], scheduler.config.sigma_data
            noisy = x * (level**2 + data**2).sqrt()
            clean = s**2 / (s**2 + level**2) * noisy
            skip = data**2 / (level**2 + data**2)
            return (clean - skip * noisy) / (level * data / (level**2 + data**2).sqrt())
        # Between timesteps the level is that of the linear interpolation of log sigma.
        alphas = scheduler.alphas_cumprod.double()
        log_sigma = ((1 - alphas) / alphas).log() / 2
        low = t.long().clamp(max=998)
        level = (log_sigma[low] + (t - low) * (log_sigma[low + 1] - log_sigma[low])).exp()[:, None]
        a = (1 + level**2).rsqrt()
        return level * a / (a**2 * s**2 + level**2 * a**2) * x  # the noise

    score = score_from_diffusion(model, scheduler, sigma)
    torch.testing.assert_close(score(y), -y / (s**2 + sigma**2), atol=1e-6, rtol=1e-5)
    found = posterior_mean(y, score, AdditiveGaussianNoise(sigma))
    torch.testing.assert_close(found, s**2 / (s**2 + sigma**2) * y, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "exactly one of `noise_parameter` and `blind_range` must be given, got None and None"),
        ({"noise_parameter": 0.1, "blind_range": (0.1, 0.2)}, "exactly one of"),
        ({"noise": "speckle", "noise_parameter": 0.1}, "`noise` must be one of .* or a noise model, got 'speckle'"),
        ({"noise_parameter": -0.1}, "`noise_parameter` must be one of gaussian noise: `sigma` must be .* got -0.1"),
        ({"noise": "gamma", "noise_parameter": 1.0}, "`shape` must be a finite number > 1, got 1.0"),
        ({"noise": "poisson_gaussian", "noise_parameter": 0.1}, r"`noise_parameter` must be \(scale, read_std\)"),
        ({"noise": "poisson_gaussian", "blind_range": (0.1, 0.2)}, "without its parameter|scale, read_std"),
        ({"noise": "exponential", "noise_parameter": 0.1}, "`noise_parameter` must be left out"),
        ({"noise": PoissonNoise(0.1), "noise_parameter": 0.1}, "must be left out with a noise that has its own"),
        ({"noise": GammaNoise(5.0, "linear")}, "`noise` must have the network's domain, 'log'"),
        ({"noise_parameter": 0.1, "estimator": "mean"}, "`estimator` must be 'midpoint' or 'mode', got 'mean'"),
        ({"noise_parameter": 0.1, "tile": 0}, "`tile` must be an integer >= 1 or left out, got 0"),
        ({"noise_parameter": 0.1, "output_type": "jpg"}, "`output_type` must be one of"),
        ({"blind_range": (0.1, 0.2), "penalty": "l1"}, "`penalty` must be 'tv' or a function"),
        ({"noise_parameter": 0.1, "image": IMAGES.expand(2, 3, 20, 26)}, "`image` must hold images of 1 channels"),
        ({"noise_parameter": 0.1, "image": []}, "`image` must hold at least one image"),
        ({"noise_parameter": 0.1, "image": "x.png"}, "`image` must hold PIL images, arrays or tensors, got str"),
        ({"noise_parameter": 0.1, "image": Image.new("RGB", (4, 4))}, "`image` must hold images of 1 channels"),
        ({"noise_parameter": 0.1, "image": IMAGES * torch.nan}, "`image` must be .*finite"),
        ({"noise": "poisson", "noise_parameter": 0.1, "image": -IMAGES}, "`image` must not be negative for Poisson"),
        ({"noise": "gamma", "noise_parameter": 9.0, "image": -IMAGES}, "`image` must not be negative for GammaNoise"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, message):
    pipeline = make()
    pipeline.unet.forward = None
    with pytest.raises(ValueError, match=message):
        pipeline(**{"image": IMAGES, **call})


def test_another_family_than_it_was_trained_on_is_refused():
    with pytest.raises(ValueError, match="`noise` must be 'poisson', on which the network was trained, got 'gamma'"):
        make(noise="poisson")(IMAGES, "gamma", noise_parameter=30.0)
    with pytest.raises(ValueError, match="`noise` must be one of .* or left out, got 'rice'"):
        make(noise="rice")
    with pytest.raises(ValueError, match="`domain` must be 'log' or 'linear', got 'cube'"):
        make(domain="cube")
    with pytest.raises(ValueError, match="`score_scale` must be a number > 0, got 0"):
        make(score_scale=0)
