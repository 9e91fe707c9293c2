"""What every forward model keeps: a user's own ones, saving and loading, refusals by name."""

import pytest
import torch
from diffusers import AutoencoderKL

from diffusers_ext import (
    CropForwardModel,
    DownsampleForwardModel,
    ForwardModel,
    GeneratorForwardModel,
    ProjectionForwardModel,
    check_differentiable,
    map_parameters,
)


class Square(ForwardModel):
    """A user's own forward model."""

    def forward(self, signal, parameters):
        return (signal**2).mean(1, keepdim=True) * parameters["gain"].view(-1, 1, 1, 1)


GAIN = {"gain": torch.tensor([1.0, 2.0])}


def test_an_own_forward_model_needs_forward_only(tmp_path):
    Square().save_pretrained(tmp_path)
    model = Square.from_pretrained(tmp_path)
    assert model.observation_shape((3, 4, 4), GAIN) == (1, 4, 4)
    model.check_parameters(GAIN, 2)
    check_differentiable(model, (3, 4, 4), GAIN)
    with pytest.raises(ValueError, match=r"`parameters\['gain'\]` must be finite"):
        model.check_parameters({"gain": torch.tensor([1.0, torch.nan])})
    with pytest.raises(ValueError, match=r"`parameters\['gain'\]` must be a tensor, got 'float'"):
        model.check_parameters({"gain": 1.0})
    with pytest.raises(ValueError, match="Square draws no parameters by itself"):
        model.sample_parameters(3)


def test_half_precision_leaves_signals_in_fp32():
    model, angle = ProjectionForwardModel(6).to(torch.bfloat16), torch.tensor([0.3])
    assert model.observation_shape((1, 8, 8), angle) == (1, 6)
    check_differentiable(model, (1, 8, 8), angle)


def test_the_lift_works_without_gradients_and_in_inference_mode():
    model, y = CropForwardModel(2, 4), torch.rand(2, 1, 2, 2)
    expected = model.lift(y, torch.tensor([[0, 0], [1, 2]]), (1, 4, 4))
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            found = model.lift(y * 1, torch.tensor([[0, 0], [1, 2]]) * 1, (1, 4, 4))
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_parameters_of_several_names():
    views = {"angle": torch.arange(6.0).view(2, 3), "gain": torch.zeros(2, 3, 4)}
    first = map_parameters(lambda value: value[:, 0], views)
    assert torch.equal(first["angle"], torch.tensor([0.0, 3.0]))
    joined = map_parameters(lambda a, b: torch.cat([a, b]), views, views)
    assert joined["gain"].shape == (4, 3, 4)
    with pytest.raises(ValueError, match=r"`parameters` must be \['angle', 'gain'\], got \['angle'\]"):
        map_parameters(torch.add, views, {"angle": views["angle"]})
    with pytest.raises(ValueError, match="all tensors or all dicts"):
        map_parameters(torch.add, torch.zeros(1), views)


class Detached(Square):
    def forward(self, signal, parameters):
        return super().forward(signal.detach(), parameters)


class Rounded(Square):
    def forward(self, signal, parameters):
        return super().forward(signal.round(), parameters)


class Root(Square):
    def forward(self, signal, parameters):
        return (signal - signal).sqrt().mean(1, keepdim=True)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Detached(), "The forward model Detached is not differentiable"),
        (Rounded(), "`gradient of Rounded` must be different from 0 somewhere, got '0 everywhere at a random signal'"),
        (Root(), "`gradient of Root` must be finite, got 'NaN or infinite numbers at a random signal'"),
    ],
)
def test_what_nothing_can_be_learned_from_is_refused_by_name(model, message):
    with pytest.raises(ValueError, match=message):
        check_differentiable(model, (3, 4, 4), GAIN, generator=torch.Generator().manual_seed(0))
    if isinstance(model, Detached):
        with pytest.raises(ValueError, match=message):
            model.lift(torch.zeros(2, 1, 4, 4), GAIN, (3, 4, 4))


def test_an_autoencoders_latents_are_scaled_as_a_diffusion_model_has_them(tmp_path):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        1, 1, ("DownEncoderBlock2D",), ("UpDecoderBlock2D",), (8,), norm_num_groups=4, shift_factor=0.5
    )
    model = GeneratorForwardModel(vae)
    latents = torch.rand(2, 4, 8, 8)
    model.save_pretrained(tmp_path)
    again = GeneratorForwardModel.from_pretrained(tmp_path)
    assert again.then is None
    with torch.no_grad():
        expected = vae.decode(latents / vae.config.scaling_factor + 0.5).sample
        assert torch.equal(model(latents, torch.zeros(2, 0)), expected)
        assert torch.equal(again(latents, torch.zeros(2, 0)), expected)
    half = GeneratorForwardModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert (half.dtype, half.decoder.dtype) == (torch.bfloat16, torch.bfloat16)


def test_a_plain_module_as_generator_is_not_saved_but_passed(tmp_path):
    model = GeneratorForwardModel(torch.nn.Linear(3, 4))
    with pytest.raises(ValueError, match="`decoder` must be a model with `save_pretrained` to be saved, got 'Linear'"):
        model.save_pretrained(tmp_path)
    whole = GeneratorForwardModel(DownsampleForwardModel(2))
    whole.save_pretrained(tmp_path)
    assert isinstance(GeneratorForwardModel.from_pretrained(tmp_path).decoder, DownsampleForwardModel)
    loaded = GeneratorForwardModel.from_pretrained(tmp_path, decoder=model.decoder)
    assert loaded.decoder is model.decoder
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"diffusers_ext"', '"os"'))
    with pytest.raises(ValueError, match="`decoder` must be of .* or passed to `from_pretrained`"):
        GeneratorForwardModel.from_pretrained(tmp_path)
