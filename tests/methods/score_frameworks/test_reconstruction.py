"""Reconstruction: exact posteriors of Gaussian data, completion of k-space, and what Diffusers asks of a pipeline."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler, UNet2DModel

from diffusers_ext import (
    AnomalyDetectionPipeline,
    FourierSampling,
    ImageGenerationPipeline,
    LinearOperator,
    ReconstructionPipeline,
    asset_path,
)
from diffusers_ext.methods.score_frameworks.pipeline_reconstruction import corrected
from diffusers_ext.methods.score_frameworks.sampling import Estimator, partial_levels
from tests.methods.oms.tiny import stable_diffusion
from tests.methods.score_frameworks.linear import GaussianUNet, exact_scheduler, responses


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- known answers


def exact(operator, measurement, noise_std, steps, shape, variance=0.25, method="proximal", data_variance=None):
    """Returns the mean of reconstructions of N(0, variance) images, and what each draw of noise adds to it."""
    estimator = Estimator(GaussianUNet(variance), exact_scheduler())
    solve = operator.solver(measurement, noise_std)
    data_variance = variance if data_variance is None else data_variance

    def clean(x, sigma):
        return corrected(x, estimator, sigma, solve, method, data_variance)

    return responses(clean, estimator, partial_levels(estimator.field, 1.0, steps), shape)


def one_coefficient(noise_std, steps, **options):
    identity = LinearOperator(lambda x: x, lambda y: y)
    mean, added = exact(identity, torch.ones(1, 1, 1, 1, dtype=torch.float64), noise_std, steps, (1, 1, 1), **options)
    return mean.item(), added.square().sum().item()


@pytest.mark.parametrize(
    ("noise_std", "steps", "options", "mean", "variance"),
    [
        (0.5, 30, {}, 0.499997, 0.079617),
        (0.5, 200, {}, 0.499997, 0.113699),
        (0.5, 30, {"method": "pigdm"}, 0.499997, 0.079617),  # the same where the network is linear and v is right
        (0.5, 30, {"data_variance": 1.0}, 0.60327, None),
        (0.5, 30, {"data_variance": 1.0, "method": "pigdm"}, 0.42310, None),
        (0.1, 30, {"variance": 1.0}, 0.9900986, 0.003192),
    ],
)
def test_one_coefficient(noise_std, steps, options, mean, variance):
    found = one_coefficient(noise_std, steps, **options)
    assert found[0] == pytest.approx(mean, abs=6e-6)
    if variance is not None:
        assert found[1] == pytest.approx(variance, abs=1e-6)


@pytest.mark.parametrize("variance", [40.0, 1.0, 0.05])
def test_pigdm_is_cut_to_four_times_what_the_measurement_asks(variance):
    """Of N(0, variance) data the gradient is variance (v + s^2) / (v (variance + s^2)) times that."""
    estimator, identity = Estimator(GaussianUNet(variance), exact_scheduler()), LinearOperator(*[lambda x: x] * 2)
    solve = identity.solver(torch.randn(3, 1, 2, 2, generator=seeded(), dtype=torch.float64), 0.0)
    x, sigma, v = torch.randn(3, 1, 2, 2, generator=seeded(1), dtype=torch.float64), 3.0, 0.25
    clean = estimator(x, sigma)
    asked, pushed = (corrected(x, estimator, sigma, solve, method, v) - clean for method in ("proximal", "pigdm"))
    gain = variance * (v + sigma**2) / (v * (variance + sigma**2))
    torch.testing.assert_close(pushed, min(gain, 4.0) * asked, atol=1e-9, rtol=0)


def test_pigdm_holds_on_a_trained_network():
    """Digits vary far more than v along some directions, so that uncut gradients end at 1e10 and more."""
    pipeline = ReconstructionPipeline.from_pipe(DiffusionPipeline.from_pretrained(asset_path("digits-epsilon")))
    pipeline.set_progress_bar_config(disable=True)
    with np.load(asset_path("digits") / "digits.npz") as file:
        digits = torch.from_numpy(file["images"][500:502])[:, None] / 255
    operator = FourierSampling(torch.zeros(28).index_fill(0, torch.tensor([0, 1, 2, 3, 5, 8, 20, 23, 25, 26, 27]), 1))
    output = pipeline(
        operator.forward(digits), operator, method="pigdm", num_inference_steps=6, num_samples=1, generator=seeded(),
        output_type="pt",
    )  # fmt: skip
    assert (output.images - digits).square().mean() < 0.02


LINES = torch.zeros(16).index_fill(0, torch.tensor([0, 1, 2, 5, 9, 15]), 1.0)


def test_completed_kspace_of_a_real_white_image():
    operator = FourierSampling(LINES)
    image = torch.randn(1, 1, 16, 16, generator=seeded(), dtype=torch.float64)
    kspace = operator.forward(image)
    mean, added = exact(operator, kspace, 0.5, 30, (1, 16, 16))
    gain = (torch.fft.fft2(mean, norm="ortho") / torch.fft.fft2(image[0], norm="ortho")).real[0].mean(0)
    # A draw that is 1 in one pixel has the coefficients 1/16 of white noise's deviation.
    spread = (16 * torch.fft.fft2(added, norm="ortho")).abs().square().sum(0)[0].mean(0)
    for columns, wanted in (([0, 1, 15], (0.6667, 0.0497)), ([2, 5, 9, 14, 11, 7], (0.5, 0.0796))):
        for k in columns:
            assert gain[k].item() == pytest.approx(wanted[0], abs=1e-4)
            assert spread[k].item() == pytest.approx(wanted[1], abs=1e-4)
    assert gain[[3, 4, 6, 8]].abs().max() < 1e-9


def test_completion_takes_the_mean_of_both_halves():
    operator = FourierSampling(LINES)
    kspace = operator.forward(torch.randn(2, 1, 16, 16, generator=seeded()))
    noise = torch.randn(2, 1, 16, 16, dtype=torch.complex64, generator=seeded(1)) * operator.mask
    completed, variance = operator.complete(kspace + noise, 1.0)
    image = torch.fft.ifft2(completed, norm="ortho")
    assert image.imag.abs().max() < 1e-6  # as of a real image
    single, _ = operator.complete(noise, 1.0)
    for k, wanted in ((1, 0.5), (2, 1.0), (14, 1.0), (0, 0.5)):
        assert variance[3, k] == wanted
    many = torch.randn(4000, 1, 16, 16, dtype=torch.complex64, generator=seeded(2))
    found = operator.complete(many, 1.0)[0].abs().square().mean((0, 1, 2))
    torch.testing.assert_close(found, torch.where(variance[3].isinf(), 0.0, variance[3]), atol=0.01, rtol=0)
    torch.testing.assert_close(single[..., 2], noise[..., 2])


def dense(operator, shape, count):
    """Returns the operator as a matrix of real numbers."""
    basis = torch.eye(count, dtype=torch.float64).view(count, *shape)
    rows = operator.forward(basis)
    rows = torch.view_as_real(rows) if rows.is_complex() else rows
    return rows.reshape(count, -1).T


@pytest.mark.parametrize("kind", ["completed", "coils", "blur"])
def test_the_correction_is_the_posterior_mean_of_a_gaussian_error(kind):
    """Against r^2 A^T (r^2 A A^T + noise)^-1 (Y - A x) with matrices, of complex noise half in each part."""
    shape, generator = (1, 6, 6), seeded()
    mask = (torch.rand(6, 6, generator=generator) < 0.4).double()
    maps = torch.randn(3, 6, 6, dtype=torch.complex128, generator=generator)
    kernel = torch.rand(36, 20, dtype=torch.float64, generator=generator)
    operator = {
        "completed": FourierSampling(mask),
        "coils": FourierSampling(mask, maps),
        "blur": LinearOperator(lambda x: x.flatten(1) @ kernel, lambda y: (y @ kernel.T).view(-1, *shape), 200, 1e-12),
    }[kind]
    operator.max_iterations, operator.tolerance = 300, 1e-12
    matrix = dense(operator, shape, 36)
    clean, truth = torch.randn(2, 2, *shape, dtype=torch.float64, generator=generator)
    measured = operator.forward(truth)
    noise = torch.randn(measured.shape, dtype=measured.dtype, generator=generator)
    measured = measured + 0.3 * noise * (operator.mask if kind != "blur" else 1)
    found = operator.solver(measured, 0.3)(clean, 0.2)
    missing = measured - operator.forward(clean)
    missing = torch.view_as_real(missing) if missing.is_complex() else missing
    variance = 0.09 / (1 if kind == "blur" else 2)
    gram = 0.2 * matrix @ matrix.T + variance * torch.eye(len(matrix), dtype=torch.float64)
    wanted = 0.2 * torch.linalg.solve(gram, missing.reshape(2, -1).T).T @ matrix
    torch.testing.assert_close(found, wanted.view(2, *shape), atol=1e-6, rtol=1e-6)
    image = torch.randn(1, *shape, dtype=torch.float64, generator=generator)
    assert operator.check(operator.forward(image)) == (1, *shape)


# ---------------------------------------------------------------- the pipeline


def make(channels=1, size=8, scheduler=None):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=size, in_channels=channels, out_channels=channels, block_out_channels=(8, 8), norm_num_groups=2,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, layers_per_block=1,
    ).eval()  # fmt: skip
    scheduler = scheduler or DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    pipeline = ReconstructionPipeline(unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


OPERATOR = FourierSampling(torch.tensor([1, 1, 1, 0, 0, 0, 1, 0]))
KSPACE = OPERATOR.forward(torch.rand(2, 1, 8, 8, generator=seeded()))


@pytest.fixture(scope="module")
def pipeline():
    return make()


@pytest.mark.parametrize("method", ["proximal", "pigdm"])
def test_without_noise_what_was_measured_is_kept(pipeline, method):
    options = {"num_inference_steps": 5, "num_samples": 2, "output_type": "pt", "generator": seeded()}
    output = pipeline(KSPACE, OPERATOR, method="proximal", **options)
    again = OPERATOR.forward(output.images)
    assert (again - KSPACE).abs().max() < 1e-5 * KSPACE.abs().max()
    assert torch.equal(output.images, output.samples.mean(1))
    torch.testing.assert_close(output.std, output.samples.std(1))
    assert output.std.min() > 0
    guided = pipeline(KSPACE, OPERATOR, method=method, **{**options, "generator": seeded()}).images
    assert torch.equal(guided, output.images) == (method == "proximal")


def test_an_empty_mask_is_stock_ddim():
    nothing, kspace = FourierSampling(torch.zeros(28, 28)), torch.zeros(2, 1, 28, 28, dtype=torch.complex64)
    stock = ImageGenerationPipeline.from_pretrained(asset_path("digits-epsilon"))
    stock.register_modules(scheduler=DDIMScheduler.from_config(stock.scheduler.config, set_alpha_to_one=True))
    pipeline = ReconstructionPipeline(stock.unet, stock.scheduler)
    for pipe in (stock, pipeline):
        pipe.set_progress_bar_config(disable=True)
    for steps, tolerance in ((25, 1e-5), (30, 0.02)):  # 30 steps of 33 leave DDIM's own grid
        options = {"num_inference_steps": steps, "generator": seeded()}
        found = pipeline(kspace, nothing, num_samples=1, output_type="pt", **options).images
        latents = stock(2, eta=1.0, output_type="latent", **{**options, "generator": seeded()}).images
        difference = (found - (latents + 1) / 2).abs()
        assert (difference.max() if steps == 25 else difference.mean()) < tolerance


def test_a_measurement_does_not_depend_on_the_others(pipeline):
    options = {"noise_std": 0.05, "num_inference_steps": 4, "num_samples": 2, "output_type": "pt"}
    both = pipeline(KSPACE, OPERATOR, generator=[seeded(1), seeded(2)], **options)
    alone = pipeline(KSPACE[1:], OPERATOR, generator=[seeded(2)], **options)
    torch.testing.assert_close(both.samples[1:], alone.samples, atol=1e-5, rtol=0)


def test_a_linear_operator_equals_the_closed_form(pipeline):
    plain = LinearOperator(OPERATOR.forward, OPERATOR.adjoint)
    options = {"noise_std": 0.05, "num_inference_steps": 4, "num_samples": 1, "output_type": "pt"}
    closed, iterated = (pipeline(KSPACE, o, generator=seeded(), **options).images for o in (OPERATOR, plain))
    torch.testing.assert_close(closed, iterated, atol=1e-4, rtol=0)


def test_callbacks_types_and_other_schedulers(pipeline, tmp_path):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, int(timestep), tuple(tensors["latents"].shape)))
        if step == 2:
            pipe._interrupt = True
        return {}

    options = {"num_inference_steps": 5, "num_samples": 2, "generator": seeded()}
    images, samples, std = pipeline(KSPACE, OPERATOR, return_dict=False, callback_on_step_end=callback, **options)
    assert seen == [(0, 999, (4, 1, 8, 8)), (1, 799, (4, 1, 8, 8)), (2, 599, (4, 1, 8, 8))]
    assert [(image.size, image.mode) for image in images] == [((8, 8), "L")] * 2
    assert samples.shape == (2, 2, 1, 8, 8)
    assert std.shape == (2, 1, 8, 8)
    euler = make(scheduler=EulerDiscreteScheduler.from_config(pipeline.scheduler.config))
    assert euler(KSPACE, OPERATOR, output_type="np", **options).images.shape == (2, 8, 8, 1)

    full = pipeline(KSPACE, OPERATOR, output_type="pt", **{**options, "generator": seeded()}).images
    pipeline.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(again) is ReconstructionPipeline
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again(KSPACE, OPERATOR, output_type="pt", **{**options, "generator": seeded()}).images, full)
    half = again.to(torch.bfloat16)(KSPACE, OPERATOR, output_type="pt", **{**options, "generator": seeded()}).images
    assert half.dtype == torch.float32
    assert (half - full).abs().max() < 0.05 * full.abs().max()


def test_gradients_in_inference_mode(pipeline):
    def call():
        options = {"method": "pigdm", "num_inference_steps": 2, "num_samples": 1, "output_type": "pt"}
        return pipeline(KSPACE, OPERATOR, 0.1, generator=seeded(), **options).images

    with torch.inference_mode():
        inside = call()
    torch.testing.assert_close(inside, call())


@pytest.mark.parametrize("noise_std", [0.0, 0.5])
def test_what_no_image_would_give(noise_std):
    """An operator that sees every second pixel, and a measurement with numbers where it sees nothing."""
    seen = torch.tensor([1.0, 0.0], dtype=torch.float64).repeat(4)
    operator = LinearOperator(lambda x: x * seen, lambda y: y * seen)
    measurement, clean = torch.rand(2, 3, 1, 8, 8, generator=seeded(), dtype=torch.float64)
    found = operator.solver(measurement, noise_std)(clean, 0.25)
    expected = seen * (measurement - clean) * 0.25 / (0.25 + noise_std**2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    nothing = LinearOperator(lambda x: 0 * x, lambda y: 0 * y).solver(measurement, noise_std)
    assert torch.equal(nothing(clean, 0.25), torch.zeros_like(clean))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"measurement": KSPACE.real}, "`measurement` must be complex, as k-space is, got float32 of shape"),
        ({"measurement": KSPACE * float("nan")}, "`measurement` must be finite, got NaN or infinity"),
        ({"measurement": KSPACE[..., :6]}, r"`measurement` must be of the mask's size, \(8, 8\), got complex64"),
        ({"measurement": KSPACE.expand(2, 3, 8, 8)}, "`measurement` must be of images of 1 channels"),
        ({"operator": "fourier"}, "`operator` must be a FourierSampling or another LinearOperator, got str"),
        ({"noise_std": -1.0}, "`noise_std` must be a number >= 0, got -1.0"),
        ({"method": "dps"}, "`method` must be one of .* got 'dps'"),
        ({"eta": 1.5}, r"`eta` must be a number in \[0, 1\], got 1.5"),
        ({"data_variance": 0}, "`data_variance` must be a number > 0, got 0"),
        ({"num_samples": 0}, "`num_samples` must be an integer >= 1, got 0"),
        ({"num_inference_steps": 0}, "`num_inference_steps` must be an integer >= 1, got 0"),
        ({"output_type": "jpg"}, "`output_type` must be one of"),
        ({"generator": [seeded()]}, "`generator` must be one generator or a list of 2"),
        ({"operator": LinearOperator(lambda x: x, lambda y: 2 * y), "measurement": torch.rand(1, 1, 8, 8)},
         "`operator` must have an adjoint"),
        ({"operator": LinearOperator(lambda x: x, lambda y: y @ torch.ones(9, 9))},
         "`measurement` must be what `operator` makes"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(pipeline, call, message):
    with pytest.raises(ValueError, match=message):
        pipeline(**{"measurement": KSPACE, "operator": OPERATOR, **call})


def test_pipelines_of_text_or_latents_are_refused(pipeline):
    message = "`pipeline` must have an unconditional UNet2DModel of pixels for ReconstructionPipeline, got Stable"
    with pytest.raises(ValueError, match=f"{message}DiffusionPipeline with UNet2DConditionModel of latents"):
        ReconstructionPipeline.from_pipe(stable_diffusion())
    vae = AutoencoderKL(1, 1, norm_num_groups=2, block_out_channels=(2,))
    with pytest.raises(ValueError, match="got ImageGenerationPipeline with UNet2DModel of latents"):
        AnomalyDetectionPipeline.from_pipe(ImageGenerationPipeline(pipeline.unet, pipeline.scheduler, vae=vae))


def test_bad_operators_and_models_are_refused(pipeline):
    for mask, message in (
        (torch.tensor([0.5, 1.0]), r"`mask` must hold 0 and 1 alone, got \[0.5, 1.0\]"),
        (torch.tensor([1.0, float("nan")]), "`mask` must hold 0 and 1 alone"),
        (torch.ones(1, 8, 8), r"`mask` must have the shape \(height, width\) or \(width,\), got \(1, 8, 8\)"),
    ):
        with pytest.raises(ValueError, match=message):
            FourierSampling(mask)
    with pytest.raises(ValueError, match=r"`sensitivity_maps` must have the shape \(coils, 8, 8\)"):
        FourierSampling(torch.ones(8, 8), torch.ones(2, 4, 8))
    with pytest.raises(ValueError, match="`sensitivity_maps` must be left out"):
        FourierSampling(torch.ones(8, 8), torch.ones(2, 8, 8)).complete(KSPACE, 0.1)
    with pytest.raises(ValueError, match="`tolerance` must be a number > 0, got 0"):
        LinearOperator(lambda x: x, lambda y: y, tolerance=0)
    zero = DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing")
    with pytest.raises(ValueError, match="not one of zero terminal SNR"):
        make(scheduler=zero)(KSPACE, OPERATOR)
    classes = make()
    classes.register_modules(unet=UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=2, layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, num_class_embeds=3,
    ))  # fmt: skip
    with pytest.raises(ValueError, match="`unet` must be unconditional"):
        classes(KSPACE, OPERATOR)
