"""Rounding learned over a whole model: what it gains, costs, and that it can be stopped."""

import copy
import os
import sys
import time

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from diffusers_ext import Calibration, QDiffConfig, QuantConv2d, collect_calibration, quantize_model
from diffusers_ext.methods.q_diffusion import units
from diffusers_ext.methods.q_diffusion.calibration import network_name
from diffusers_ext.methods.q_diffusion.layers import QuantLayer
from diffusers_ext.methods.q_diffusion.points import ActPoint
from diffusers_ext.methods.q_diffusion.quantizer import shortcut_splits
from tests import processes
from tests.tiny_pipelines import build

from .tiny import pipeline, unet

FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def model():
    return unet()


@pytest.fixture(scope="module")
def calibration(model):
    return collect_calibration(pipeline(model), 24, 4, batch_size=12, num_inference_steps=4)


@pytest.fixture(scope="module")
def held_out(model):
    return collect_calibration(pipeline(model), 16, 4, batch_size=16, num_inference_steps=4, seed=9).arguments()


@torch.no_grad()
def error(quantized, model, held_out):
    wanted = model(**held_out).sample
    return ((quantized(**held_out).sample - wanted).square().mean() / wanted.square().mean()).item()


@pytest.fixture(scope="module")
def learned(model, calibration):
    return quantize_model(model, calibration, QDiffConfig(4, act_bits=8), iters=40, act_iters=5)


def test_to_nearest_it_is_what_the_loader_makes(model, calibration, tmp_path):
    model.save_pretrained(tmp_path)
    config = QDiffConfig(weight_bits=4)
    made = quantize_model(model, calibration, config, iters=0)
    loaded = UNet2DModel.from_pretrained(tmp_path, quantization_config=config)
    assert made.state_dict().keys() == loaded.state_dict().keys()
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in made.state_dict().items())


def test_learned_rounding_beats_the_nearest_on_other_samples(model, calibration, held_out, learned):
    nearest = quantize_model(model, calibration, QDiffConfig(4), iters=0)
    weights_only = copy.deepcopy(learned)
    for layer in weights_only.modules():
        if isinstance(layer, QuantLayer):
            layer.act_scale = layer.act_zero_point = None
    # Random weights average errors out less than trained ones; the experiment holds the real goal.
    assert error(weights_only, model, held_out) <= 0.9 * error(nearest, model, held_out)
    assert error(learned, model, held_out) <= error(nearest, model, held_out)


def test_the_mean_of_the_output_is_the_original_s(model, calibration, learned):
    """The last layer's bias takes what is constant in the error, exactly over the states of the calibration."""
    states = calibration.arguments()
    with torch.no_grad():
        found, wanted = learned(**states).sample, model(**states).sample
        left = (found - wanted).mean((0, 2, 3))
        assert left.abs().max() <= 1e-4 * wanted.abs().mean()
        learned.conv_out.bias.data.copy_(model.conv_out.bias)
        before = (learned(**states).sample - wanted).mean((0, 2, 3))
        learned.conv_out.bias.data.add_(left - before)
    assert before.abs().max() > 1e-3 * wanted.abs().mean()


def test_the_original_stays_and_the_result_is_kept(model, held_out, learned, tmp_path):
    fresh = unet().state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in model.state_dict().items())
    assert type(model.conv_in) is torch.nn.Conv2d
    assert "quantization_config" not in model.config
    learned.save_pretrained(tmp_path / "first")
    loaded = UNet2DModel.from_pretrained(tmp_path / "first")
    with torch.no_grad():
        assert torch.equal(loaded(**held_out).sample, learned(**held_out).sample)
    loaded.save_pretrained(tmp_path / "second")
    assert (tmp_path / "first" / FILE).read_bytes() == (tmp_path / "second" / FILE).read_bytes()
    assert loaded.conv_in.act_scale.shape == (1,)


def test_every_layer_has_a_range_and_8_bits_are_close(model, calibration, held_out):
    made = quantize_model(model, calibration, QDiffConfig(8, act_bits=8, scale_method="max"), iters=0, act_iters=0)
    layers = [m for m in made.modules() if isinstance(m, QuantLayer)]
    assert all((layer.act_scale != 1).all() for layer in layers)
    assert error(made, model, held_out) < 1e-2  # in 4 bits it is four times that


def test_shortcuts_are_split_where_the_parts_meet(learned):
    """A hook on the way up sees how wide each part is."""
    seen, splits = {}, shortcut_splits(learned)

    def watch(name, block):
        def hook(module, args, kwargs):
            h = kwargs.get("hidden_states", args[0] if args else None)
            seen[f"{name}.resnets.0.conv_shortcut"] = h.shape[1]

        block.register_forward_pre_hook(hook, with_kwargs=True)

    other = unet()
    for i, block in enumerate(other.up_blocks):
        watch(f"up_blocks.{i}", block)
    other(torch.randn(1, 1, 8, 8), 3)
    assert seen.items() <= splits.items()
    assert len(splits) == sum(len(block.resnets) for block in other.up_blocks)
    for name, split in splits.items():
        layer = learned.get_submodule(name)
        assert layer.split == split
        assert layer.weight_scale.shape[1] == len(layer.act_scale) == 2


def test_attention_is_quantized_where_it_is_asked_for(model, calibration, held_out, tmp_path):
    config = QDiffConfig(8, act_bits=8, quantize_attention=True, scale_method="max")
    made = quantize_model(model, calibration, config, iters=0, act_iters=5)
    plain = quantize_model(model, calibration, QDiffConfig(8, act_bits=8, scale_method="max"), iters=0, act_iters=5)
    with torch.no_grad():
        assert not torch.equal(made(**held_out).sample, plain(**held_out).sample)
    assert error(made, model, held_out) < 1e-2
    made.save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**held_out).sample, made(**held_out).sample)
    coarse = quantize_model(
        model, calibration, QDiffConfig(8, act_bits=8, quantize_attention=True, softmax_bits=2), iters=0, act_iters=0
    )
    assert error(coarse, model, held_out) > error(made, model, held_out)


def chain(depth):
    """Returns a network of so many equal layers and a calibration of it."""
    torch.manual_seed(0)
    made = UNet2DConditionModel(
        sample_size=8, in_channels=2, out_channels=2, block_out_channels=(4, 4), layers_per_block=depth,
        norm_num_groups=2, cross_attention_dim=4, attention_head_dim=2,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    ).eval()  # fmt: skip
    calls = [
        {
            "sample": torch.randn(4, 2, 8, 8),
            "timestep": torch.tensor(t),
            "encoder_hidden_states": torch.randn(4, 3, 4),
        }
        for t in (10, 500)
    ]
    from diffusers_ext.methods.q_diffusion.calibration import fingerprint

    return made, Calibration(calls, fingerprint(made))


def test_the_cost_is_linear_in_depth(monkeypatch):
    """Each unit is passed once by the original and once by the quantized states, whatever the depth."""
    real, passes = units.in_chunks, []

    def counted(module, unit, call, count, device):
        passes.append(unit.name)
        return real(module, unit, call, count, device)

    monkeypatch.setattr("diffusers_ext.methods.q_diffusion.reconstruct.in_chunks", counted)
    found = []
    for depth in (1, 3):
        passes.clear()
        made, calibration = chain(depth)
        quantize_model(made, calibration, QDiffConfig(8, scale_method="max"), iters=0)
        assert len(passes) == 2 * len(set(passes))
        found.append(len(passes))
    assert found[1] < 3 * found[0]


def test_running_ranges_are_averages_of_extremes(model, calibration):
    point, batches = ActPoint(QDiffConfig(act_bits=8)), [torch.tensor([-1.0, 0.2, 3.0]), torch.tensor([-2.0, 5.0])]
    point.observe(batches[:1], 0.9)
    point.observe([batches[1][:1], batches[1][1:]], 0.9)  # one batch in two parts
    assert point.step.item() == pytest.approx((3.2 + 1.1) / 255)
    assert point.zero == round(1.1 / (4.3 / 255))
    point.observe(batches, None)
    assert point.step.item() == pytest.approx(4.3 / 255)
    made = quantize_model(
        model,
        calibration,
        QDiffConfig(8, act_bits=8),
        iters=0,
        act_iters=0,
        act_momentum=0.001,
        batch_size=len(calibration),
    )
    x = calibration.arguments()["sample"]  # the last batch is all states, and takes nearly all
    assert made.conv_in.act_scale.item() == pytest.approx((x.max() - x.min()).item() / 255, rel=1e-3)


def test_single_layers_can_be_rounded_by_themselves(model, calibration, held_out):
    config = QDiffConfig(4, act_bits=8, scale_method="max")
    made = quantize_model(model, calibration, config, iters=4, act_iters=1, granularity="layer")
    nearest = quantize_model(model, calibration, config, iters=0, act_iters=0)
    assert error(made, model, held_out) < 1.2 * error(nearest, model, held_out)


KILLED = """
import sys, torch
torch.set_num_threads(1)
from diffusers_ext import Calibration, QDiffConfig, quantize_model
from tests.methods.q_diffusion.tiny import unet
quantize_model(unet(), Calibration.load(sys.argv[1]), QDiffConfig(4, act_bits=8), iters=4, act_iters=2,
               output_dir=sys.argv[2])
"""


def test_a_killed_run_goes_on_to_the_same_bits(model, tmp_path):
    states = collect_calibration(
        pipeline(model), 8, 2, batch_size=8, num_inference_steps=2, output_dir=tmp_path / "states"
    )
    settings = {"iters": 4, "act_iters": 2}
    config = QDiffConfig(4, act_bits=8)
    whole = quantize_model(model, states, config, **settings, output_dir=tmp_path / "whole")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "states"), str(tmp_path / "cut")]
    child = processes.Popen(command, env=dict(os.environ))
    deadline = time.monotonic() + 300
    while len(list((tmp_path / "cut").glob("weights-*.safetensors"))) < 3 and child.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.kill()
    child.wait()
    done = len(list((tmp_path / "cut").glob("*.safetensors")))
    assert 3 <= done < len(list((tmp_path / "whole").glob("*.safetensors")))
    again = quantize_model(model, states, config, **settings, output_dir=tmp_path / "cut")
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in again.state_dict().items())
    with pytest.raises(ValueError, match="`output_dir` must be new or hold a run of the same settings: iters is 4"):
        quantize_model(model, states, config, iters=13, output_dir=tmp_path / "cut")


def test_states_in_groups_are_learned_as_in_one(model, calibration, monkeypatch):
    """The mean over states drawn from all groups is the mean over states; so are ranges those of all of them."""
    config, settings = QDiffConfig(4, act_bits=8), {"iters": 1, "act_iters": 1, "batch_size": 8}
    whole = quantize_model(model, calibration, config, **settings)
    monkeypatch.setattr(
        Calibration, "groups", lambda self: [Calibration(self.calls[i : i + 4], self.model) for i in (0, 4)]
    )
    made = quantize_model(model, calibration, config, **settings).state_dict()
    for name, value in whole.state_dict().items():
        if name.endswith("qweight"):  # the order of sums may decide a weight near the middle
            assert (value == made[name]).float().mean() > 0.99
        else:
            torch.testing.assert_close(made[name], value, rtol=0.05, atol=1.01 if name.endswith("point") else 0)


def test_prompts_of_different_lengths_calibrate_one_model():
    pipe = build("QwenImagePipeline")
    options = {"num_inference_steps": 2, "height": 16, "width": 16, "true_cfg_scale": 3.0, "negative_prompt": "bad"}
    prompts = ["a cat", "a dog that runs over a field", "a", "an owl"]
    states = collect_calibration(pipe, 4, 2, batch_size=2, prompt=prompts, **options)
    assert len(states.groups()) > 1
    made = quantize_model(pipe.transformer, states, QDiffConfig(8, act_bits=8), iters=2, act_iters=1, batch_size=4)
    for call in states.calls:
        with torch.no_grad():
            found, wanted = (m(**call, return_dict=False)[0] for m in (made, pipe.transformer))
        assert (found - wanted).square().mean() < 0.02 * wanted.square().mean()


NETWORKS = ["StableDiffusionXL", "DiT", "StableDiffusion3", "Flux", "QwenImage", "ZImage"]


@pytest.mark.parametrize("name", [f"{name}Pipeline" for name in NETWORKS])
def test_networks_are_quantized_through_their_pipelines(name, tmp_path, caplog):
    pipe = build(name)
    said = {"class_labels": [1, 2]} if name == "DiTPipeline" else {"prompt": ["a cat", "a dog"]}
    size = {} if name == "DiTPipeline" else {"height": 16, "width": 16}
    states = collect_calibration(pipe, 2, 2, batch_size=2, num_inference_steps=2, **said, **size)
    part = network_name(pipe)
    network = getattr(pipe, part)
    made = quantize_model(network, states, QDiffConfig(8, act_bits=8), iters=2, act_iters=1, batch_size=2)
    assert ("`split_shortcuts` changes nothing" in caplog.text) == (part == "transformer")
    arguments = states.calls[-1]
    with torch.no_grad():
        found, wanted = (m(**arguments, return_dict=False)[0] for m in (made, network))
    pairs = zip(found, wanted, strict=True)
    assert all((a - b).square().mean() < 0.02 * b.square().mean() for a, b in pairs)
    made.save_pretrained(tmp_path)
    again = type(network).from_pretrained(tmp_path)
    with torch.no_grad():
        assert all(map(torch.equal, again(**arguments, return_dict=False)[0], found))
    setattr(pipe, part, again)
    pipe.set_progress_bar_config(disable=True)
    pipe(**said, **size, num_inference_steps=1)


def test_wrong_arguments(model, calibration):
    config = QDiffConfig()
    other = unet(num_class_embeds=3)
    for arguments, message in (
        ({"config": 4}, "`config` must be a `QDiffConfig`, got int"),
        ({"calibration": {}}, "`calibration` must be a `Calibration`, got dict"),
        ({"model": other}, "`calibration` must be of this model, UNet2DModel-"),
        ({"calibration": calibration.at(calibration.timesteps[:1])}, "states of several timesteps, got those of"),
        ({"iters": -1}, "`iters` must be an integer >= 0, got -1"),
        ({"act_iters": 1.5}, "`act_iters` must be an integer >= 0, got 1.5"),
        ({"batch_size": 0}, "`batch_size` must be an integer >= 1, got 0"),
        ({"lr": 0}, "`lr` must be a number > 0, got 0"),
        ({"act_momentum": 1.0}, r"`act_momentum` must be a number in \(0, 1\) or None, got 1.0"),
        ({"granularity": "net"}, r"`granularity` must be one of \['block', 'layer'\], got 'net'"),
        ({"config": QDiffConfig(modules_to_not_convert=["nix"])}, "`modules_to_not_convert` must name .*'nix'"),
        (
            {"config": QDiffConfig(act_bits=8, quantize_attention=True), "granularity": "layer"},
            "`granularity` must be 'block' with `quantize_attention`, got 'layer'",
        ),
    ):
        given = {"model": model, "calibration": calibration, "config": config, **arguments}
        with pytest.raises(ValueError, match=message):
            quantize_model(**given)
    made = quantize_model(model, calibration, QDiffConfig(8, scale_method="max"), iters=0)
    assert isinstance(made.conv_in, QuantConv2d)
    with pytest.raises(ValueError, match="`model` must not be quantized before"):
        quantize_model(made, calibration, config)
    convolutional, states = chain(1)
    with pytest.raises(ValueError, match="`quantize_attention` must be False for"):
        quantize_model(
            _without_attention(convolutional), states, QDiffConfig(act_bits=8, quantize_attention=True), iters=0
        )


def _without_attention(model):
    model.mid_block.attentions = torch.nn.ModuleList()
    return model
