"""ScoreField: conversions, levels, networks and pipelines."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    ScoreSdeVeScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)

from diffusers_ext import (
    ImageGenerationPipeline,
    PipelineDenoiser,
    ScoreField,
    SteinResidualCallback,
    find_plateau,
    gauge_residual,
    gauge_transform,
    local_dimension,
    probability_flow,
    stein_residual,
)
from tests.methods.geometry.gaussian import PLANE, TIMES, gaussian_field, seeded, sigma_of
from tests.tiny_pipelines import build


def true_score(x, a, b, eigenvalues):
    return -x / (a**2 * eigenvalues + b**2)


def exact_output(x, a, b, kind, eigenvalues):
    """What a perfect network of each prediction type returns at x."""
    eps = -b * true_score(x, a, b, eigenvalues)
    x0 = (x - b * eps) / a
    return {"epsilon": eps, "sample": x0, "v_prediction": a * eps - b * x0, "flow_prediction": eps - x0}[kind]


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_scores_of_every_prediction_type(kind):
    scheduler = DDPMScheduler(prediction_type=kind)
    alphas = scheduler.alphas_cumprod.double()
    x = torch.randn(4, 10, generator=seeded(), dtype=torch.float64)

    def model(x, t):
        abar = alphas[t.round().long()][:, None]
        assert bool((t == t.round()).all())
        return exact_output(x, abar.sqrt(), (1 - abar).sqrt(), kind, PLANE)

    field = ScoreField(model, scheduler)
    for t in (0, 10, 500, 999):
        a, b = alphas[t].sqrt(), (1 - alphas[t]).sqrt()
        score, wanted = field.score(x, sigma_of(field, t)), true_score(x, a, b, PLANE)
        assert (score - wanted).abs().max() / wanted.abs().max() < 1e-10
    mixed = field.score(x, field.levels.sigma[torch.tensor([0, 10, 500, 999])])
    assert torch.allclose(mixed[2], field.score(x, sigma_of(field, 500))[2], rtol=1e-12)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_scores_of_flow_matching(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    x = torch.randn(4, 10, generator=seeded(), dtype=torch.float64)

    def model(x, t):
        s = t[:, None] / 1000
        return exact_output(x, 1 - s, s, "flow_prediction", PLANE)

    field = ScoreField(model, scheduler)
    # The scheduler's own levels, shift included; pure noise and what is next to it are none.
    own = scheduler.sigmas.double().flip(0)
    assert len(field.levels.t) == (999 if shift == 1 else 997)
    assert torch.allclose(field.levels.b, own[: len(field.levels.b)], atol=1e-6)
    assert torch.allclose(field.levels.t, 1000 * field.levels.b, atol=1e-9)
    for index in (0, 10, 500, 996):
        s = field.levels.b[index]
        wanted = true_score(x, 1 - s, s, PLANE)
        assert (field.score(x, sigma_of(field, index)) - wanted).abs().max() / wanted.abs().max() < 1e-10


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_scores_of_edm(kind):
    """By the scheduler's own preconditioning of a network that is right."""
    scheduler = EDMEulerScheduler(prediction_type=kind)
    sigma, data = torch.tensor(0.7, dtype=torch.float64), scheduler.config.sigma_data
    x = torch.randn(4, 10, generator=seeded(), dtype=torch.float64)
    y = x * (sigma**2 + data**2).sqrt()
    clean = y * PLANE / (PLANE + sigma**2)

    def model(given, t):
        assert torch.allclose(given, x)
        assert torch.allclose(t, sigma.log() / 4)
        # The output that the scheduler turns into the clean sample: it is linear in it.
        zero = scheduler.precondition_outputs(y, torch.zeros_like(y), sigma)
        return (clean - zero) / (scheduler.precondition_outputs(y, torch.ones_like(y), sigma) - zero)

    eps = ScoreField(model, scheduler).eps(x, float(sigma))
    assert torch.allclose(eps, (y - clean) / sigma, atol=1e-10)


def test_levels_are_the_scheduler_s():
    field = gaussian_field(PLANE)
    assert [round(sigma_of(field, t), 4) for t in TIMES] == [0.01, 0.0469, 0.176, 0.7236, 6.1735]
    x0, noise = torch.randn(2, 3, 10, generator=seeded(), dtype=torch.float64)
    stock = DDPMScheduler().add_noise(x0, noise, torch.tensor([200] * 3))
    assert torch.allclose(field.add_noise(x0, noise, sigma_of(field, 200)), stock, atol=1e-6)
    # Euler's input, scaled by the scheduler, is y a.
    euler = EulerDiscreteScheduler()
    assert torch.allclose(ScoreField(lambda x, t: x, euler).levels.sigma, field.levels.sigma)
    # Zero terminal signal: the level of pure noise is none of ours.
    rescaled = DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert float(ScoreField(lambda x, t: x, rescaled).levels.a[-1]) >= 1e-3
    # Between timesteps ln sigma is linear.
    between = (field.levels.sigma[10] * field.levels.sigma[11]).sqrt()
    assert abs(float(field.at(between).t) - 10.5) < 1e-9


def tiny_unet(**options):
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **{"out_channels": 1, **options},
    )


@pytest.fixture(scope="module")
def unet():
    return tiny_unet(dropout=0.5, num_class_embeds=4)


def test_networks_are_left_as_they_were(unet):
    unet.train()
    unet.conv_in.requires_grad_(False)
    before = [p.requires_grad for p in unet.parameters()], [m.training for m in unet.modules()]
    field = ScoreField(unet, DDPMScheduler(), class_labels=torch.tensor([1]))
    x = torch.randn(2, 1, 8, 8, generator=seeded())
    first, second = field.eps(x, 0.5), field.eps(x, 0.5)
    assert torch.equal(first, second)  # no dropout
    assert first.grad_fn is None
    local_dimension(field, x, "trace", sigmas=0.5, num_draws=2, generator=seeded())
    assert before == ([p.requires_grad for p in unet.parameters()], [m.training for m in unet.modules()])
    assert all(p.grad is None for p in unet.parameters())
    with pytest.raises(TypeError):
        ScoreField(unet, DDPMScheduler(), class_labels="no label").eps(x, 0.5)  # what goes wrong inside
    assert before == ([p.requires_grad for p in unet.parameters()], [m.training for m in unet.modules()])
    unet.eval()


def test_conditions_follow_their_images(unet):
    """An image has its own label in every draw, and the whole is what its parts are alone."""
    x = torch.randn(3, 1, 8, 8, generator=seeded())
    labels = torch.tensor([0, 3, 1])
    field = ScoreField(unet.eval(), DDPMScheduler(), class_labels=labels)
    generator = seeded(5)
    whole = local_dimension(field, x, sigmas=[0.3, 1.0], num_draws=3, batch_size=4, generator=seeded(5)).curve
    for i in range(3):
        alone = ScoreField(unet, DDPMScheduler(), class_labels=labels[i : i + 1])
        part = local_dimension(alone, x[i : i + 1], sigmas=[0.3, 1.0], num_draws=3, generator=generator).curve
        assert torch.allclose(part[0], whole[i], rtol=1e-4)
    other = ScoreField(unet, DDPMScheduler(), class_labels=torch.tensor([0, 0, 1]))
    moved = local_dimension(other, x, sigmas=[0.3, 1.0], num_draws=3, generator=seeded(5)).curve
    assert not torch.allclose(moved[1], whole[1], rtol=1e-4)
    assert torch.allclose(moved[2], whole[2], rtol=1e-4)
    with pytest.raises(
        ValueError, match="`class_labels` must have one row for all or one for each of 2 images, got 3"
    ):
        field.eps(x[:2], 0.5)


def test_kinds_of_networks(unet):
    x = torch.randn(2, 1, 8, 8, generator=seeded())
    # A learned variance is no part of the noise.
    learned = tiny_unet(out_channels=2).eval()
    wanted = learned(x, 200.0).sample[:, :1]
    field = ScoreField(learned, DDPMScheduler(variance_type="learned_range"))
    assert torch.allclose(field.eps(x, sigma_of(field, 200)), wanted, atol=1e-6)
    torch.manual_seed(0)
    text = UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()
    tokens = torch.randn(2, 3, 8, generator=seeded())
    field = ScoreField(text, DDPMScheduler(), encoder_hidden_states=tokens)
    assert torch.allclose(field.eps(x, sigma_of(field, 200)), text(x, 200.0, tokens).sample, atol=1e-6)
    assert torch.allclose(
        field.select(torch.tensor([1, 1])).eps(x, sigma_of(field, 200)),
        text(x, 200.0, tokens[[1, 1]]).sample,
        atol=1e-6,
    )
    dit = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=1, out_channels=2, num_layers=1, sample_size=8
    ).eval()
    labels = torch.tensor([3, 7])
    field = ScoreField(dit, DDIMScheduler(), class_labels=labels)
    wanted = dit(x, torch.full((2,), 200.0), labels).sample[:, :1]
    assert torch.allclose(field.eps(x, sigma_of(field, 200)), wanted, atol=1e-6)
    # Half precision inside, float32 outside.
    half = ScoreField(tiny_unet().bfloat16(), DDPMScheduler()).eps(x, 0.5)
    assert half.dtype == torch.float32
    assert (half - ScoreField(tiny_unet(), DDPMScheduler()).eps(x, 0.5)).abs().max() < 0.1


def test_pipelines():
    network = tiny_unet()
    pipeline = ImageGenerationPipeline(network, DDIMScheduler())
    field = ScoreField.from_pipeline(pipeline)
    assert field.model is network
    pipeline.tokenizer = object()
    with pytest.raises(ValueError, match="`prompts` must be given for ImageGenerationPipeline"):
        ScoreField.from_pipeline(pipeline)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusion3Pipeline"])
def test_text_pipelines_through_their_own_call(name):
    """The noise that a family's network sees, from the output of its denoiser, prompt by prompt."""
    pipe, prompts = build(name), ["a cat", "a dog"]
    field = ScoreField.from_pipeline(pipe, prompts, height=32, width=32)
    denoiser = PipelineDenoiser(pipe, height=32, width=32)
    conditions = denoiser.encode_prompts(prompts)
    x = torch.randn(denoiser.latents_shape(2), generator=seeded())
    flow = name == "StableDiffusion3Pipeline"
    index = 400
    a, b, t, sigma = (getattr(field.levels, key)[index].item() for key in ("a", "b", "t", "sigma"))
    assert t == pytest.approx(1000 * b) if flow else t == 400
    with torch.no_grad():
        output = denoiser(x, t, conditions)
        wanted = x + a * output if flow else output
        assert torch.allclose(field.eps(x, sigma), wanted, atol=1e-5)
        second = field.select(torch.tensor([1])).eps(x[1:], sigma)
        assert torch.allclose(second, wanted[1:], atol=1e-4)
    # With gradient, and in an estimator that repeats each image under its own prompt.
    found = local_dimension(field, x, "trace", sigmas=sigma, num_draws=2, generator=seeded(1)).curve
    alone = ScoreField.from_pipeline(pipe, prompts[:1], height=32, width=32)
    part = local_dimension(alone, x[:1], "trace", sigmas=sigma, num_draws=2, generator=seeded(1)).curve
    assert found[0].item() == pytest.approx(part[0].item(), rel=1e-3)


def test_bad_input():
    field = gaussian_field(PLANE)
    x = torch.zeros(1, 10, dtype=torch.float64)
    with pytest.raises(ValueError, match="`prediction_type` must be .*'epsilon'.*, got 'noise'"):
        ScoreField(lambda x, t: x, DDPMScheduler(), prediction_type="noise")
    with pytest.raises(ValueError, match="`prediction_type` must be 'flow_prediction' with Flow.*, got 'epsilon'"):
        ScoreField(lambda x, t: x, FlowMatchEulerDiscreteScheduler(), prediction_type="epsilon")
    with pytest.raises(ValueError, match="`scheduler` must have `alphas_cumprod`.*, got ScoreSdeVe"):
        ScoreField(lambda x, t: x, ScoreSdeVeScheduler())
    for scheduler in (object(), DDPMScheduler, None):
        with pytest.raises(ValueError, match="`scheduler` must be a Diffusers scheduler, got"):
            ScoreField(lambda x, t: x, scheduler)
    for sigma in ("a", None):
        with pytest.raises(ValueError, match="`sigma` must be a real number, or several, got"):
            field.eps(x, sigma)
    with pytest.raises(ValueError, match=r"`sigma` must be one level or 1, got the shape \(2,\)"):
        field.eps(x, torch.tensor([0.5, 1.0]))
    for wrong in (None, [0.0], x.numpy(), x.long(), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="`x` must be floats of the shape"):
            field.score(wrong, 0.5)
    with pytest.raises(ValueError, match="`model` must be a network or a function"):
        ScoreField(None, DDPMScheduler())
    for sigma in (0.0, 0.001, 1e4, float("nan")):
        with pytest.raises(ValueError, match="`sigma` must be within the scheduler's levels, 0.01 to"):
            field.eps(x, sigma)
    with pytest.raises(ValueError, match=r"`model` must return the shape of x, \(1, 10\), got \(1, 7\)"):
        ScoreField(lambda x, t: x[:, :7], DDPMScheduler()).eps(x, 0.5)


TWO = torch.zeros(2, 10, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: local_dimension(None, TWO), "`field` must be a ScoreField, got NoneType"),
        (lambda f: stein_residual(f.eps, TWO), "`field` must be a ScoreField, got method"),
        (lambda f: stein_residual(f, TWO, sigmas="a"), "`sigmas` must be a real number, or several, got 'a'"),
        (lambda f: stein_residual(f, TWO, generator=3), "`generator` must be one torch.Generator or left out, got 3"),
        (lambda f: local_dimension(f, TWO, tol=float("nan")), "`tol` must be a number between 0 and 1, got nan"),
        (lambda f: local_dimension(f, TWO, sigmas=0.5, residual=3), "`residual` must be a SteinResidual"),
        (lambda f: gauge_residual(f, TWO, functions=3), "`functions` must be TestFunctions of 10 values, got 3"),
        (lambda f: gauge_transform(f, None), r"antisymmetric \(D, D\) matrix of finite numbers, got NoneType"),
        (lambda f: gauge_transform(f, torch.full((10, 10), float("nan"))), "antisymmetric"),
        (lambda f: gauge_transform(f, torch.zeros(10, 10), "a"), "`beta` must be a finite number or a function"),
        (lambda f: gauge_transform(f, torch.zeros(3, 3)).eps(TWO, 0.5), "`x` must have 3 values an image"),
        (lambda f: probability_flow(f, TWO, [0.5]), "`sigmas` must be two levels or more"),
        (lambda f: find_plateau(torch.ones(3), torch.ones(2), 3), r"tensors of one shape \(sigmas,\)"),
        (lambda f: SteinResidualCallback(num_draws=0), "`num_draws` must be an integer >= 1, got 0"),
    ],
)
def test_bad_arguments_of_measurements(call, message):
    with pytest.raises(ValueError, match=message):
        call(gaussian_field(PLANE))
