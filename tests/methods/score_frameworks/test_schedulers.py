"""One denoiser under all frameworks: exact variances on Gaussian data, and what Diffusers asks of a scheduler."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    UNet2DModel,
)
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from diffusers_ext import (
    AnnealedLangevinScheduler,
    ImageGenerationPipeline,
    ScoreSDEScheduler,
    geometric_sigmas,
    ncsn_as_denoiser,
    sigma_of_timestep,
    timestep_of_sigma,
)
from tests.methods.oms.tiny import stable_diffusion
from tests.methods.score_frameworks.gaussian import GaussianNetwork, final_variances, run


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- known answers

LOW_LEVELS = ncsn_as_denoiser(len, geometric_sigmas(160.0, 0.001, 1000)).betas


def test_annealed_langevin(monkeypatch):
    scheduler = AnnealedLangevinScheduler(sigma_max=10.0, sigma_min=0.05, dimension=64)
    scheduler.set_timesteps()
    assert (len(scheduler.sigmas), len(scheduler.timesteps)) == (19, 19 * 5 + 1)
    assert len(set(scheduler.timesteps.tolist())) == 19
    found = final_variances(scheduler, monkeypatch)
    assert found[-2:] == pytest.approx([0.3450278, 0.3382294], abs=2e-6)


@pytest.mark.parametrize(
    ("sde", "predictor", "after_50", "after_100"),
    [
        ("ve", "reverse_diffusion", 0.2988502, 0.2726919),
        ("ve", "ancestral", 0.2111010, 0.2295901),
        ("vp", "reverse_diffusion", 0.2752150, 0.2631744),
        ("vp", "ancestral", 0.2616412, 0.2566581),
        ("vp", "euler_maruyama", 0.2479160, 0.2507204),
        ("subvp", "euler_maruyama", 0.2581820, 0.2540097),
        ("subvp", "reverse_diffusion", 0.2581820, 0.2540097),
    ],
)
def test_predictors(sde, predictor, after_50, after_100, monkeypatch):
    settings = {"sde": sde, "predictor": predictor, "corrector_steps": 0, "sigma_max": 50.0}
    if sde == "subvp":  # whose levels go below those of the linear schedule
        settings |= {"trained_betas": LOW_LEVELS}
    for steps, wanted in ((50, after_50), (100, after_100)):
        scheduler = ScoreSDEScheduler(**settings)
        scheduler.set_timesteps(steps)
        assert final_variances(scheduler, monkeypatch)[-1] == pytest.approx(wanted, abs=4e-6)


@pytest.mark.parametrize("sde", ["ve", "vp", "subvp"])
def test_the_predictors_of_each_process_agree_in_many_steps(sde, monkeypatch):
    """Euler-Maruyama of VE and the flows have no number in print; all go to the data's variance, 0.25."""
    for predictor in ("reverse_diffusion", "euler_maruyama", "probability_flow"):
        scheduler = ScoreSDEScheduler(sde=sde, predictor=predictor, corrector_steps=0, sigma_max=50.0)
        found = []
        for steps in (40, 80):
            scheduler.set_timesteps(steps)
            found.append(final_variances(scheduler, monkeypatch)[-1])
        errors = [abs(value - 0.25) for value in found]
        assert errors[1] < min(0.04, 0.75 * errors[0] + 1e-3), predictor


def test_ddpm(monkeypatch):
    """The stock sampler of the same network, `fixed_small` and trailing: the number that the others stand beside."""
    for steps, wanted in ((50, 0.1972249), (100, 0.2192288)):
        stock = DDPMScheduler(variance_type="fixed_small", clip_sample=False, timestep_spacing="trailing")
        stock.set_timesteps(steps)
        x = torch.zeros(steps + 1, 1, dtype=torch.float64)
        x[0] = 1
        network = GaussianNetwork(stock.alphas_cumprod)
        for i, t in enumerate(stock.timesteps):
            unit = torch.zeros_like(x)
            unit[i + 1] = 1
            monkeypatch.setattr(
                "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *args, unit=unit, **kwargs: unit
            )
            x = stock.step(network(x, t), t, x).prev_sample
        assert x.square().sum().item() == pytest.approx(wanted, rel=2e-4)


def test_the_corrector():
    """VE, 100 steps and as many corrections, 600 samples of 64 pixels: 0.7 % of sampling error."""
    generator = seeded()
    for norm, wanted in (("per_sample", 0.272), ("batch_mean", 0.256)):
        scheduler = ScoreSDEScheduler(sde="ve", sigma_max=50.0, norm=norm)
        scheduler.set_timesteps(100)
        assert len(scheduler.timesteps) == 200
        start = 50 * torch.randn(600, 64, generator=generator)
        *_, last = run(scheduler, GaussianNetwork(scheduler.alphas_cumprod), start, generator)
        assert last.var().item() == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize("kind", ["sample", "v_prediction"])
@pytest.mark.parametrize("cls", [AnnealedLangevinScheduler, ScoreSDEScheduler])
def test_every_prediction_type_says_the_same(cls, kind):
    outputs = []
    for prediction_type in ("epsilon", kind):
        scheduler = cls(prediction_type=prediction_type, sigma_max=50.0)
        scheduler.set_timesteps(10)
        start = torch.linspace(-1, 1, 6, dtype=torch.float64).view(3, 2)
        network = GaussianNetwork(scheduler.alphas_cumprod, prediction_type)
        outputs.append(list(run(scheduler, network, start, seeded())))
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-6, rtol=1e-6)


def test_one_network_sees_the_same_in_every_framework():
    """At equal sigma the noise is equal, whatever the process scales its samples by."""
    y, clean = torch.linspace(-3, 3, 4, dtype=torch.float64).view(1, 4), []
    made = [ScoreSDEScheduler(sde=sde, sigma_max=20.0) for sde in ("vp", "ve", "subvp")]
    made.append(AnnealedLangevinScheduler(sigma_max=20.0))
    for scheduler in made:
        scheduler.set_timesteps(40)
        network = GaussianNetwork(scheduler.alphas_cumprod)
        for move, t in zip(scheduler._moves, scheduler.timesteps, strict=True):
            x = move.a * y
            exact = timestep_of_sigma(scheduler.alphas_cumprod, move.sigma)  # what is rounded in `timesteps`
            assert exact.item() == pytest.approx(t.item(), rel=1e-6)
            output = network(scheduler.scale_model_input(x, t), exact)
            found = scheduler.step(output, t, x, generator=seeded()).pred_original_sample
            if 0.02 < move.sigma < 150:  # levels that the network knows
                clean.append((found - y * 0.25 / (0.25 + move.sigma**2)).abs().max())
    assert len(clean) > 150
    assert max(clean) < 1e-10


def test_ddpm_is_euler_ancestral_in_other_units():
    """x = a y, the same network and noise, 1000 steps: `fixed_small` is the ancestral sampler of VE."""
    ddpm = DDPMScheduler(variance_type="fixed_small", clip_sample=False, timestep_spacing="trailing")
    euler = EulerAncestralDiscreteScheduler(timestep_spacing="trailing")
    ddpm.set_timesteps(1000)
    euler.set_timesteps(1000)
    assert ddpm.timesteps.tolist() == euler.timesteps.tolist()
    known = sigma_of_timestep(ddpm.alphas_cumprod, torch.arange(1000)).tolist()
    start = torch.randn(4, 3, generator=seeded(1), dtype=torch.float64)
    a = ddpm.alphas_cumprod[999].double().sqrt()
    x, y = start, start / a
    generators = seeded(), seeded()

    def network(x, t):
        sigma = known[int(t)]
        return sigma * (1 + sigma**2) ** 0.5 / (0.25 + sigma**2) * x

    for t in ddpm.timesteps:
        x = ddpm.step(network(x, t), t, x, generator=generators[0]).prev_sample
        output = network(euler.scale_model_input(y, float(t)), t)
        y = euler.step(output, float(t), y, generator=generators[1]).prev_sample
    torch.testing.assert_close(x, y, atol=1e-4, rtol=0)


def test_our_ancestral_sampler_on_the_network_s_levels_is_euler_s():
    """Two levels: the same formula, step for step."""
    betas = [0.1, 0.9]
    ours = ScoreSDEScheduler(trained_betas=betas, sde="ve", predictor="ancestral", corrector_steps=0, sigma_min=1 / 3)
    euler = EulerAncestralDiscreteScheduler(2, trained_betas=betas, timestep_spacing="trailing")
    ours.set_timesteps(2)
    euler.set_timesteps(2)
    assert ours.timesteps.tolist() == euler.timesteps.tolist() == [1, 0]
    y = torch.randn(3, 2, generator=seeded(1), dtype=torch.float64)
    network = GaussianNetwork(ours.alphas_cumprod)
    for a, b in zip(run(ours, network, y, seeded()), run(euler, network, y, seeded()), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_the_flow_is_ddim():
    """On one schedule of two levels; a process of other times has other levels."""
    betas = [0.1, 0.9]
    ours = ScoreSDEScheduler(
        trained_betas=betas, sde="ve", predictor="probability_flow", corrector_steps=0, sigma_min=1 / 3
    )
    ddim = DDIMScheduler(2, trained_betas=betas, clip_sample=False, timestep_spacing="trailing")
    ours.set_timesteps(2)
    ddim.set_timesteps(2)
    y = torch.randn(3, 2, generator=seeded(1), dtype=torch.float64)
    network, x = GaussianNetwork(ours.alphas_cumprod), y * ddim.alphas_cumprod[1].double().sqrt()
    for after, t in zip(run(ours, network, y), ddim.timesteps, strict=True):
        x = ddim.step(network(x, t), t, x).prev_sample
        a = ddim.alphas_cumprod[t - 1].double().sqrt() if t else 1.0
        torch.testing.assert_close(after, x / a, atol=1e-6, rtol=1e-6)


# ---------------------------------------------------------------- what Diffusers asks of a scheduler

SETTINGS = [
    (AnnealedLangevinScheduler, {"sigma_max": 20.0}),
    (ScoreSDEScheduler, {}),
    (ScoreSDEScheduler, {"sde": "ve", "predictor": "ancestral"}),
    (ScoreSDEScheduler, {"sde": "subvp", "corrector_steps": 0}),
    (ScoreSDEScheduler, {"predictor": "probability_flow", "corrector_steps": 2}),
]


@pytest.fixture(params=SETTINGS, ids=lambda it: f"{it[0].__name__}-{'-'.join(map(str, it[1].values()))}")
def scheduler(request):
    cls, settings = request.param
    return cls(num_train_timesteps=200, **settings)


@pytest.fixture(params=SETTINGS[:2], ids=lambda it: it[0].__name__)
def one_of_each_class(request):
    cls, settings = request.param
    return cls(num_train_timesteps=200, **settings)


def outputs(scheduler, x, generator, network=None):
    return torch.stack(list(run(scheduler, network or GaussianNetwork(scheduler.alphas_cumprod), x, generator)))


def test_saving_loading_and_trained_betas(scheduler, tmp_path):
    scheduler.save_pretrained(tmp_path)
    loaded = type(scheduler).from_pretrained(tmp_path)
    config = {name: value for name, value in scheduler.config.items() if name != "_use_default_values"}
    assert dict(loaded.config) == config
    assert dict(type(scheduler).from_config(scheduler.config).config) == dict(scheduler.config)
    x = torch.randn(2, 3, 4, 4, generator=seeded())
    for each in (scheduler, loaded):
        each.set_timesteps(6)
    assert torch.equal(outputs(scheduler, x, seeded()), outputs(loaded, x, seeded()))
    betas = np.array([0.1, 0.3])
    assert type(scheduler)(trained_betas=betas).betas.tolist() == pytest.approx(betas)


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")
def test_compatible_schedulers(one_of_each_class):
    """From any stock scheduler of betas, by which ours are known, and back."""
    scheduler = one_of_each_class
    kinds = [kind for kind in scheduler.compatibles if ".dummy_" not in kind.__module__]
    assert {DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler} <= set(kinds)
    for kind in kinds:
        other = kind.from_config(scheduler.config)
        back = type(scheduler).from_config(other.config)
        assert {name: back.config[name] for name in scheduler.config} == dict(scheduler.config)


@pytest.mark.parametrize("cls", [AnnealedLangevinScheduler, ScoreSDEScheduler])
def test_from_a_saved_euler(cls, tmp_path):
    """Where every default stands in the file, its `sigma_min` of None too, which means our default."""
    EulerDiscreteScheduler(num_train_timesteps=300, beta_schedule="scaled_linear").save_pretrained(tmp_path)
    made = cls.from_pretrained(tmp_path)
    assert (made.config.num_train_timesteps, made.config.beta_schedule) == (300, "scaled_linear")
    made = cls.from_config(EulerDiscreteScheduler.from_pretrained(tmp_path).config, **{"sigma_max": 10.0})
    made.set_timesteps(4)
    assert made.config.sigma_max == 10.0
    assert cls(sigma_min=None)._default_sigmas() == pytest.approx((157.407, 0.01), rel=1e-5)


def test_steps_are_reproducible_and_a_batch_is_its_samples(scheduler):
    x = torch.randn(3, 2, 4, 4, generator=seeded())
    scheduler.set_timesteps(5)
    together = outputs(scheduler, x, [seeded(i) for i in range(3)])
    scheduler.set_timesteps(5)
    assert torch.equal(together, outputs(scheduler, x, [seeded(i) for i in range(3)]))
    for i in range(3):
        scheduler.set_timesteps(5)
        alone = outputs(scheduler, x[i : i + 1], seeded(i))
        torch.testing.assert_close(alone[:, 0], together[:, i], atol=1e-5, rtol=1e-5)


def test_steps_as_tuples_and_in_half_precision(scheduler):
    x = torch.randn(2, 3, 4, 4, generator=seeded())
    level = sigma_of_timestep(scheduler.alphas_cumprod, 7)
    a = scheduler._a(level)
    torch.testing.assert_close(scheduler.scale_model_input(x, 7), x / float(a * (1 + level**2).sqrt()))
    found = []
    for given, as_dict in ((x, True), (x, False), (x.half(), True)):
        scheduler.set_timesteps(6)
        t = scheduler.timesteps[0]
        assert scheduler.scale_model_input(given, t).shape == x.shape
        out = scheduler.step(given / 4, t, given, generator=seeded(), return_dict=as_dict)
        found.append((out.prev_sample, out.pred_original_sample) if as_dict else out)
        assert found[-1][0].dtype == found[-1][1].dtype == given.dtype
    for whole, tuples, half in zip(*found, strict=True):
        assert torch.equal(whole, tuples)
        scale = whole.abs().max()
        torch.testing.assert_close(half.float() / scale, whole / scale, atol=2e-3, rtol=0)


def test_calls_are_counted_where_timesteps_repeat(scheduler):
    """From the first of the nearest timestep on; clamped levels share a timestep too."""
    scheduler.set_timesteps(6)
    assert scheduler.step_index is None
    middle = scheduler.timesteps[3 * scheduler.order]
    first = scheduler.timesteps.tolist().index(middle)
    x = torch.ones(1, 2)
    scheduler.scale_model_input(x, middle + 1e-3)
    assert scheduler.step_index == first
    scheduler.step(x, middle, x)
    scheduler.step(x, middle, x)
    assert scheduler.step_index == first + 2
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(2 * scheduler.order)
    scheduler.step(x, scheduler.timesteps[2 * scheduler.order], x)
    assert (scheduler.begin_index, scheduler.step_index) == (2 * scheduler.order, 2 * scheduler.order + 1)
    for t in scheduler.timesteps[scheduler.step_index :]:
        scheduler.step(x, t, x)
    assert scheduler.step_index is None  # ready for the next run


def test_levels_beyond_the_network_s():
    """They share its last timestep; samples and noise are those of the level."""
    scheduler = ScoreSDEScheduler(num_train_timesteps=100, sde="ve", corrector_steps=0, sigma_max=50.0)
    network_s = sigma_of_timestep(scheduler.alphas_cumprod, 99).item()
    assert network_s < 2
    scheduler.set_timesteps(10)
    assert scheduler.timesteps.tolist()[:3] == [99, 99, 99]
    x = torch.ones(1, 1)
    assert scheduler.scale_model_input(x, scheduler.timesteps[0]).item() == pytest.approx(2501**-0.5)
    noised = scheduler.add_noise(torch.zeros(2, 1), torch.ones(2, 1), scheduler.timesteps[[0, -1]])
    assert noised.flatten().tolist() == pytest.approx([50.0, 0.01])
    noised = scheduler.add_noise(torch.ones(1, 1), torch.ones(1, 1), torch.tensor([50]))
    assert noised.item() == pytest.approx(1 + sigma_of_timestep(scheduler.alphas_cumprod, 50).item())


def test_adding_noise():
    x0, noise = torch.full((3, 2), 2.0, dtype=torch.float64), torch.full((3, 2), 3.0, dtype=torch.float64)
    t = torch.tensor([10, 400, 998])
    stock = DDPMScheduler()
    sigma = sigma_of_timestep(stock.alphas_cumprod, t)[:, None]
    found = {sde: ScoreSDEScheduler(sde=sde).add_noise(x0, noise, t) for sde in ("vp", "ve", "subvp")}
    torch.testing.assert_close(found["vp"], stock.add_noise(x0, noise, t), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["ve"], x0 + sigma * noise)
    a = found["subvp"][:, :1] / (x0 + sigma * noise)[:, :1]
    torch.testing.assert_close(a * sigma, 1 - a**2, atol=1e-9, rtol=1e-9)
    assert torch.equal(AnnealedLangevinScheduler().add_noise(x0, noise, t), found["ve"])


def test_images_of_the_stock_pipeline_loop(scheduler):
    """`ImageGenerationPipeline` takes them unchanged; a batch is its images."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=2, layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    ).eval()  # fmt: skip
    pipeline = ImageGenerationPipeline(unet, DDIMScheduler(num_train_timesteps=200))
    pipeline.scheduler = type(scheduler).from_config(scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    steps, given = [], {"num_inference_steps": 3, "output_type": "latent"}
    both = pipeline(
        2,
        generator=[seeded(0), seeded(1)],
        callback_on_step_end=lambda p, i, t, kw: steps.append(float(t)) or kw,
        **given,
    ).images
    alone = pipeline(1, generator=seeded(1), **given).images
    torch.testing.assert_close(both[1:], alone, atol=2e-4, rtol=1e-4)
    assert torch.isfinite(both).all()
    scheduler.set_timesteps(3)
    assert steps == scheduler.timesteps.tolist()
    x = scheduler.init_noise_sigma * randn_tensor((1, 1, 8, 8), generator=(source := seeded(1)))
    with torch.no_grad():
        *_, by_hand = run(scheduler, lambda x, t: unet(x, t).sample, x, source)
    torch.testing.assert_close(by_hand, alone, atol=2e-4, rtol=1e-4)


def test_text_pipelines_by_exchanging_the_scheduler(one_of_each_class):
    """Stable Diffusion's own loops, from noise and from an image; the latter begins in between and counts calls."""
    pipe, scheduler = stable_diffusion(), one_of_each_class
    pipe.scheduler = type(scheduler).from_config({**pipe.scheduler.config, **scheduler.config})
    drawn = pipe("ab", num_inference_steps=2, guidance_scale=2.0, output_type="np", generator=seeded()).images
    assert np.isfinite(drawn).all()
    from_image = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    from_image.set_progress_bar_config(disable=True)
    seen = []
    found = from_image(
        "ab", Image.new("RGB", (16, 16)), strength=0.5, num_inference_steps=4, guidance_scale=1.0, output_type="np",
        generator=seeded(), callback_on_step_end=lambda p, i, t, kw: seen.append(float(t)) or kw,
    )  # fmt: skip
    assert np.isfinite(found.images).all()
    made = from_image.scheduler
    assert seen == made.timesteps[2 * made.order :].tolist()
    assert made.step_index is None


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ScoreSDEScheduler(sigma_min=0.0, sde="ve"), "`sigma_min` must be a number above 0, got 0.0"),
        (lambda: ScoreSDEScheduler(sigma_min=3.0, sigma_max=3.0, sde="ve"), "`sigma_max` must be .* `sigma_min`, 3.0"),
        (lambda: AnnealedLangevinScheduler(sigma_min=200.0), "`sigma_max` must be a number above `sigma_min`, 200.0"),
        (lambda: ScoreSDEScheduler(snr=0.0), "`snr` must be a number above 0, got 0.0"),
        (lambda: ScoreSDEScheduler(rescale_betas_zero_snr=True), "`rescale_betas_zero_snr` must be False"),
        (lambda: AnnealedLangevinScheduler(trained_betas=[0.5, 1.0]), "must not end at zero SNR"),
        (
            lambda: ScoreSDEScheduler.from_config(
                DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction").config
            ),
            "`rescale_betas_zero_snr` must be False",
        ),
        (lambda: ScoreSDEScheduler(sde="edm"), "`sde` must be 'vp', 've' or 'subvp', got 'edm'"),
        (lambda: ScoreSDEScheduler(beta_min=0.0), "`beta_min` must be a number between 0 and `beta_max`"),
        (lambda: ScoreSDEScheduler(predictor="heun"), "`predictor` must be one of"),
        (lambda: ScoreSDEScheduler(sde="subvp", predictor="ancestral"), "`predictor` must not be 'ancestral'"),
        (lambda: ScoreSDEScheduler(norm="sum"), "`norm` must be one of"),
        (lambda: ScoreSDEScheduler(corrector_steps=-1), "`corrector_steps` must be an integer >= 0"),
        (lambda: ScoreSDEScheduler(prediction_type="flow"), "`prediction_type` must be one of"),
        (lambda: ScoreSDEScheduler().set_timesteps(0), "`num_inference_steps` must be an integer >= 1"),
        (lambda: ScoreSDEScheduler().step(torch.ones(1), 0, torch.ones(1)), "`set_timesteps` must be called"),
        (lambda: AnnealedLangevinScheduler().set_timesteps(), "`num_inference_steps` must be given"),
        (lambda: AnnealedLangevinScheduler(step_size=0.0), "`step_size` must be a number above 0"),
        (lambda: AnnealedLangevinScheduler(steps_per_level=0), "`steps_per_level` must be an integer >= 1"),
        (lambda: AnnealedLangevinScheduler().set_timesteps(1), "`num_levels` must be an integer >= 2, got 1"),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()
