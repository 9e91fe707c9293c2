"""The pipeline: what it returns agrees with itself, with plain diffusion, and with itself one by one."""

import re
import warnings

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from diffusers_ext import CropForwardModel, ForwardModel, ForwardModelPipeline, ImageGenerationPipeline, ObservationMLP

from . import gaussian
from .tiny import Everything, OnlyNoisy, context, crops, scheduler, seeded, unet

SHORT = {"num_inference_steps": 3, "eta": 1.0}


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_a_forward_model_that_sees_everything_is_plain_generation(eta):
    network = OnlyNoisy().eval()
    latents = torch.randn(3, 1, 8, 8, generator=seeded())
    call = {"num_inference_steps": 5, "eta": eta}
    plain = ImageGenerationPipeline(network.unet, scheduler())
    plain.set_progress_bar_config(disable=True)
    expected = plain(3, latents=latents, generator=seeded(), output_type="latent", **call).images
    pipeline = ForwardModelPipeline(network, scheduler(), Everything())
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline(num_samples=3, num_views=1, latents=latents[:, None], generator=seeded(), **call)
    assert torch.equal(found.signals, expected)
    assert torch.equal(found.observations[:, 0], expected)


@pytest.mark.parametrize("sampling", ["autoregressive", "joint", "single"])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_observations_are_those_of_the_signals(sampling, guidance_scale):
    pipeline = crops(null_context=True)
    result = pipeline(
        *context(2), num_views=2, num_samples=2, sampling=sampling, guidance_scale=guidance_scale,
        generator=seeded(), **SHORT,
    )  # fmt: skip
    assert result.signals.shape == (4, 1, 8, 8)
    assert torch.equal(result.observations, pipeline.render(result.signals, result.parameters))
    for view in range(2):
        seen = pipeline.forward_model(result.signals, result.parameters[:, view])
        assert torch.equal(seen, result.observations[:, view])
    assert result.signals.std(0).mean() > 1e-3


def test_guidance_mixes_observations_and_reads_the_signal_off_them():
    """The exact denoiser of a normal signal: with w = 0 the views are drawn as if there were no context."""
    pipeline = gaussian.pipeline(null_context=True)
    seen, first, views = gaussian.observed(4), gaussian.coordinates(4, 0), gaussian.coordinates(4, 1)
    latents = torch.randn(4, 1, 1, 1, 1, generator=seeded(), dtype=torch.float64)
    call = {"target_parameters": views, "latents": latents, "num_inference_steps": 6, "sampling": "single"}
    ends = []

    def keep(pipe, step, t, tensors):
        ends.append(tensors["latents"].flatten())
        return {}

    pipeline(seen, first, guidance_scale=0.0, callback_on_step_end=keep, **call)
    pipeline(callback_on_step_end=keep, **call)
    torch.testing.assert_close(ends[5], ends[11], atol=1e-12, rtol=0)
    pipeline.unet.calls = 0
    guided = pipeline(seen, first, guidance_scale=2.0, callback_on_step_end=keep, **call)
    assert pipeline.unet.calls == 7
    plain, alone = (pipeline(*given, callback_on_step_end=keep, **call) for given in ((seen, first), (None, None)))
    assert plain.signals.shape == alone.signals.shape
    # The signal is that of a call whose context has the guided view, which the observation then agrees with.
    torch.testing.assert_close(guided.signals[:, 0, 0, 1], ends[17], atol=1e-6, rtol=0)
    torch.testing.assert_close(guided.signals[:, 0, 0, 0], seen.flatten(), atol=1e-6, rtol=0)
    slope = (0.5 - 0.3 * 0.8) / (1 - 0.8**2)
    torch.testing.assert_close(guided.signals[:, 0, 0, 2] - 0.3, slope * (ends[17] - 0.8), atol=1e-6, rtol=0)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_scale_is_taken_off_again(scale):
    """With the exact denoiser: the truth's deviation, 0.6, on the line of every sample, at any scale."""
    latents = torch.tensor([0.0, 1.0]).double().view(2, 1, 1, 1, 1)
    signals = gaussian.pipeline(scale)(
        gaussian.observed(2), gaussian.coordinates(2, 0), gaussian.coordinates(2, 1), latents=latents,
        num_inference_steps=100,
    ).signals[:, 0, 0]  # fmt: skip
    slope = (signals[1] - signals[0]).tolist()
    assert slope[1] == pytest.approx(0.6, abs=0.02)
    assert slope[2] == pytest.approx(0.722222 * slope[1], abs=1e-6)


@pytest.mark.parametrize("sampling", ["autoregressive", "joint"])
def test_a_batch_is_its_samples_one_by_one(sampling):
    pipeline = crops(null_context=True, context_noise=0.1)
    seen, corners = context(3)
    call = {"num_views": 2, "sampling": sampling, "guidance_scale": 1.5, **SHORT}
    whole = pipeline(seen, corners, generator=[seeded(i) for i in range(3)], **call)
    for i in range(3):
        one = pipeline(seen[i : i + 1], corners[i : i + 1], generator=[seeded(i)], **call)
        torch.testing.assert_close(one.signals[0], whole.signals[i], atol=1e-5, rtol=1e-5)
        assert torch.equal(one.parameters[0], whole.parameters[i])
    again = pipeline(seen, corners, generator=[seeded(i) for i in range(3)], **call)
    assert torch.equal(again.signals, whole.signals)
    twice = [pipeline(seen, corners, generator=seeded(5), num_samples=2, **call).signals for _ in range(2)]
    assert torch.equal(*twice)


def test_samples_of_a_context_stand_together():
    pipeline = gaussian.pipeline()
    seen = torch.tensor([1.0, -1.0]).double().view(2, 1, 1, 1, 1)
    call = {"num_inference_steps": 5, "generator": seeded(), "num_samples": 3}
    result = pipeline(seen, gaussian.coordinates(2, 0), gaussian.coordinates(2, 1, 2), **call)
    torch.testing.assert_close(result.signals[:, 0, 0, 0], seen.flatten().repeat_interleave(3), atol=1e-9, rtol=0)


def test_each_context_view_is_lifted_once(monkeypatch):
    pipeline, lifted = crops(), []
    lift = CropForwardModel.lift

    def counted(self, observation, *rest):
        lifted.append(len(observation))
        return lift(self, observation, *rest)

    monkeypatch.setattr(CropForwardModel, "lift", counted)
    pipeline(*context(2, views=3), num_views=2, **SHORT)
    # 3 views of 2 contexts at first, then one noisy view a step; the first sampled view joins the context once.
    assert lifted == [6, 2, 2, 2, 2, 2, 2, 2]


def test_callbacks_see_and_change_every_step():
    pipeline, seen = crops(), []

    def watch(pipe, step, t, tensors):
        seen.append((step, int(t), sorted(tensors), tensors["signals"].shape))
        return {"latents": torch.zeros_like(tensors["latents"])}

    names = ["latents", "signals"]
    call = {"num_views": 2, "callback_on_step_end_tensor_inputs": names, **SHORT}
    pipeline(*context(2), callback_on_step_end=watch, **call)
    assert [entry[0] for entry in seen] == [*range(6)]
    assert pipeline.num_timesteps == 6
    assert seen[0] == (0, 999, names, (2, 1, 8, 8))

    def stop(pipe, step, t, tensors):
        pipe._interrupt = step == 3
        return {}

    result = pipeline(*context(2), callback_on_step_end=stop, num_views=3, **SHORT)
    assert result.observations.shape[:2] == (2, 3)
    with pytest.raises(ValueError, match=r"`callback_on_step_end_tensor_inputs` must be a subset of"):
        pipeline(*context(2), callback_on_step_end=stop, callback_on_step_end_tensor_inputs=["noise"])


def test_a_regression_calls_its_network_once():
    network = ObservationMLP((1, 8, 8), (1, 4, 4), parameter_size=2, hidden_size=8).eval()
    pipeline = ForwardModelPipeline(network, scheduler(), CropForwardModel(4, 8), regression=True)
    pipeline.set_progress_bar_config(disable=True)
    calls = []
    network.register_forward_hook(lambda *_: calls.append(1))
    result = [pipeline(*context(2), generator=seeded(i), num_views=2) for i in range(2)]
    assert len(calls) == 2
    assert torch.equal(result[0].signals, result[1].signals)
    assert result[0].observations.shape == (2, 2, 1, 4, 4)


def test_outputs_and_precisions():
    pipeline = crops(signal_range=(-1.0, 1.0))
    call = {"num_views": 1, "generator": seeded(), **SHORT}
    result = pipeline(*context(2), output_type="np", **call)
    assert result.signals.shape == (2, 1, 8, 8)
    assert result.observations.dtype == "float32"
    assert pipeline(*context(2), output_type="pil", **call).signals[0].size == (8, 8)
    assert len(pipeline(*context(2), return_dict=False, **call)) == 3
    half = pipeline.to(torch.bfloat16)(*context(2), **call)
    assert half.signals.dtype == half.observations.dtype == torch.float32
    assert half.signals.isfinite().all()


@pytest.mark.parametrize(
    "kind", [DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler]
)
def test_other_schedulers_sample_too(kind):
    """Deterministic ones give the truth's deviation, 0.6, and all of them the line."""
    pipeline = gaussian.pipeline()
    options = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"}
    options |= {"clip_sample": False, "variance_type": "fixed_small"} if kind is DDPMScheduler else {}
    pipeline.scheduler = kind(**options)
    latents = torch.tensor([0.0, 1.0]).double().view(2, 1, 1, 1, 1)
    result = pipeline(
        gaussian.observed(2), gaussian.coordinates(2, 0), gaussian.coordinates(2, 1), latents=latents,
        num_inference_steps=100, generator=seeded(),
    )  # fmt: skip
    signals = result.signals[:, 0, 0]
    torch.testing.assert_close(signals[:, 2] - 0.3, 0.26 / 0.36 * (signals[:, 1] - 0.8), atol=1e-5, rtol=0)
    if kind is not DDPMScheduler:
        assert abs(signals[1, 1] - signals[0, 1]) == pytest.approx(0.6, abs=0.03)


# ---------------------------------------------------------------- what is refused


@pytest.mark.filterwarnings(  # by those of Diffusers that give tensors to NumPy
    "ignore:__array_wrap__ must accept context and return_scalar arguments:DeprecationWarning"
)
@pytest.mark.parametrize(
    "made",
    [
        lambda: scheduler(prediction_type="epsilon"),
        lambda: scheduler(prediction_type="v_prediction"),
        lambda: EulerAncestralDiscreteScheduler(prediction_type="sample"),
        lambda: KDPM2DiscreteScheduler(prediction_type="sample"),
        lambda: PNDMScheduler(prediction_type="sample", skip_prk_steps=True),
        EDMEulerScheduler,
        FlowMatchEulerDiscreteScheduler,
    ],
)
def test_schedulers_that_take_no_clean_sample(made):
    scheduler = made()
    with pytest.raises(ValueError, match=type(scheduler).__name__) as error:
        ForwardModelPipeline(unet(), scheduler, CropForwardModel(4, 8))
    assert "prediction_type" in str(error.value)
    assert "'sample'" in str(error.value)


def test_wrong_arguments_are_named_before_any_call():
    pipeline = crops()
    pipeline.unet.register_forward_hook(lambda *_: pytest.fail("the network was called"))
    seen, corners = context(2)
    outside, nan = corners.clone(), seen.clone()
    outside[1, 0, 0], nan[0, 0, 0, 0, 0] = 5, float("nan")
    wrong = [
        ((seen, None), {}, "`parameters` must be given with `observations`, those of each of them, got None"),
        ((None, corners), {}, "`parameters` must be left out without `observations`, got 'Tensor'"),
        ((seen, corners[:, :, 0].float() * float("nan")), {}, "`parameters` must be "),
        ((seen, corners.repeat(1, 2, 1)), {}, "`parameters` must be those of each of the 1 observations"),
        ((seen, corners[:1]), {}, r"`parameters` must be of shape (2, views, ...) with at least one view"),
        ((seen, outside), {}, "`parameters` must be whole numbers from (0, 0) to (4, 4), got [[5, "),
        ((seen[..., :3], corners), {}, "`observations` must be of shape (batch, views, 1, 4, 4), as CropForwardModel"),
        ((seen[0, 0, 0], corners), {}, "`observations` must be of shape (batch, views, ...)"),
        ((nan, corners), {}, "`observations` must be finite, got 'NaN or infinite numbers'"),
        ((seen, corners), {"num_views": 0}, "`num_views` must be an integer >= 1, got 0"),
        ((seen, corners), {"num_samples": 0}, "`num_samples` must be an integer >= 1, got 0"),
        ((seen, corners), {"num_inference_steps": 0}, "`num_inference_steps` must be an integer >= 1, got 0"),
        ((seen, corners), {"sampling": "both"}, "`sampling` must be one of ['autoregressive', 'joint', 'single']"),
        ((seen, corners), {"guidance_scale": 2.0}, "`guidance_scale` must be 1 for a network that was not trained"),
        ((seen, corners), {"context_noise": -1.0}, "`context_noise` must be a number >= 0, got -1.0"),
        ((seen, corners), {"latents": torch.zeros(2, 1, 1, 4, 4)}, "`latents` must be of shape (2, 3, 1, 4, 4), got"),
        ((seen, corners), {"generator": [seeded()]}, "`generator` must be one generator or a list of 2"),
        (
            (seen, corners),
            {"output_type": "pil"},
            "`output_type` must be 'pt' or 'np' until black and white are known",
        ),
        ((seen, corners), {"output_type": "jpg"}, "`output_type` must be one of"),
        ((seen, corners), {"target_parameters": outside}, "`parameters` must be whole numbers from (0, 0) to (4, 4)"),
        ((seen, corners), {"target_parameters": corners[:1]}, "`target_parameters` must be of shape (2, views, ...)"),
    ]
    for given, changes, message in wrong:
        with pytest.raises(ValueError, match=re.escape(message)):
            pipeline(*given, **changes)
    guided = crops(null_context=True)  # without a context there is nothing to guide by
    for changes in ({"num_views": 1}, {"sampling": "joint"}, {"sampling": "single"}):
        with pytest.raises(ValueError, match="`guidance_scale` must be 1 without `observations` or further views"):
            guided(guidance_scale=2.0, **changes)
    mean = crops(null_context=True, regression=True)
    with pytest.raises(ValueError, match="`guidance_scale` must be 1 for a regression"):
        mean(seen, corners, guidance_scale=2.0)
    pipeline.scheduler = scheduler(prediction_type="epsilon")
    with pytest.raises(ValueError, match="`prediction_type` must be 'sample' in DDIMScheduler"):
        pipeline(seen, corners)
    for name, value in {"signal_range": (1.0, 0.0), "observation_scale": 0.0, "context_noise": -1.0}.items():
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            crops(**{name: value})


def test_more_views_than_in_training_are_told():
    pipeline = crops(max_context_views=2, num_targets=1)
    with pytest.warns(UserWarning, match=r"a context of at most 2 views \(`max_context_views`\) and is asked for 3"):
        pipeline(*context(1), num_views=3, **SHORT)
    with pytest.warns(UserWarning, match=r"denoising together at most 1 views \(`num_targets`\) and is asked for 2"):
        pipeline(*context(1), num_views=2, sampling="joint", **SHORT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline(*context(1), num_views=2, **SHORT)


class Row(ForwardModel):
    def forward(self, signal, parameters):
        return signal[torch.arange(len(signal)), :, parameters]


def test_a_forward_model_of_ones_own_is_handed_over(tmp_path):
    pipeline = ForwardModelPipeline(unet(), scheduler(), Row(), observation_scale=2.0)
    pipeline.save_pretrained(tmp_path)
    call = {"target_parameters": torch.tensor([[3, 5]]), **SHORT}
    expected = pipeline(generator=seeded(), **call).signals
    again = DiffusionPipeline.from_pretrained(tmp_path, forward_model=Row())
    assert torch.equal(again(generator=seeded(), **call).signals, expected)
    with pytest.raises(ValueError, match="`forward_model` must be handed over, `from_pretrained"):
        DiffusionPipeline.from_pretrained(tmp_path)
    other = ForwardModelPipeline.from_pipe(again)
    assert other.forward_model is again.forward_model
    assert other.config["observation_scale"] == 2


def test_parameters_that_cannot_be_drawn_must_be_given():
    pipeline = ForwardModelPipeline(unet(), scheduler(), Row())
    pipeline.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="Row draws no parameters by itself: pass them"):
        pipeline()
    rows = torch.tensor([[3, 5]])
    result = pipeline(target_parameters=rows, **SHORT)
    assert torch.equal(result.observations[0, 1], result.signals[0, :, 5])
