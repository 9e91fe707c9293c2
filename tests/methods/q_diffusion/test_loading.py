"""The quantizer in Diffusers' loader: every way in which a quantized model is made, kept and loaded."""

import json
import os
import sys

import pytest
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig, UNet2DModel
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from safetensors.torch import load_file

import diffusers_ext
from diffusers_ext import QDiffConfig, QuantConv2d, QuantLinear
from diffusers_ext.methods.q_diffusion.layers import QuantLayer
from tests import processes

from .tiny import pipeline, unet

FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline as its author saved it, in fp32."""
    folder = tmp_path_factory.mktemp("loading")
    pipeline().save_pretrained(folder / "plain")
    return folder


@pytest.fixture(scope="module")
def quantized(folder):
    config = QDiffConfig(weight_bits=4, modules_to_not_convert=["conv_out"])
    return UNet2DModel.from_pretrained(folder / "plain" / "unet", quantization_config=config)


def call(model, dtype=torch.float32):
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        return model(x, torch.tensor([3, 50, 90])).sample


def test_weights_are_rounded_while_they_load(folder, quantized):
    plain = UNet2DModel.from_pretrained(folder / "plain" / "unet")
    kinds = {name: type(m) for name, m in quantized.named_modules() if isinstance(m, QuantLayer)}
    assert set(kinds.values()) == {QuantConv2d, QuantLinear}
    assert "conv_out" not in kinds
    layers = [n for n, m in plain.named_modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert set(kinds) == {*layers} - {"conv_out"}
    for name in kinds:
        own = QuantLayer.dequantize(quantized.get_submodule(name))
        weight = plain.get_submodule(name).weight
        assert 0 < (own - weight).abs().max() < weight.abs().max() / 4
    assert torch.equal(quantized.conv_out.weight, plain.conv_out.weight)
    assert not any(t.device.type == "meta" for t in [*quantized.parameters(), *quantized.buffers()])
    error = (call(quantized) - call(plain)).square().mean() / call(plain).square().mean()
    assert 0 < error < 0.1


def test_saved_and_saved_again_it_is_the_same(folder, quantized, tmp_path):
    quantized.save_pretrained(tmp_path / "first")
    loaded = UNet2DModel.from_pretrained(tmp_path / "first")
    assert torch.equal(call(loaded), call(quantized))
    loaded.save_pretrained(tmp_path / "second")
    assert (tmp_path / "first" / FILE).read_bytes() == (tmp_path / "second" / FILE).read_bytes()
    config = json.loads((tmp_path / "second" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "qdiff"
    assert QDiffConfig.from_dict(config).to_dict() == quantized.config.quantization_config.to_dict()


def test_scales_stay_exact_in_lower_precision(quantized, tmp_path):
    quantized.save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.conv_in.weight_scale, quantized.conv_in.weight_scale)
    torch.testing.assert_close(call(loaded, torch.bfloat16).float(), call(quantized), atol=0.1, rtol=0.1)


def test_a_pipeline_takes_it_by_a_mapping(folder, tmp_path):
    config = PipelineQuantizationConfig(quant_mapping={"unet": QDiffConfig(weight_bits=8)})
    pipe = DiffusionPipeline.from_pretrained(folder / "plain", quantization_config=config)
    assert isinstance(pipe.unet.conv_in, QuantConv2d)
    assert pipe.unet.conv_in.bits == 8
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert torch.equal(call(again.unet), call(pipe.unet))
    with pytest.raises(ValueError, match="quant_backend"):
        PipelineQuantizationConfig(quant_backend="qdiff", quant_kwargs={"weight_bits": 4})


def test_without_a_configuration_nothing_changes(folder):
    plain = UNet2DModel.from_pretrained(folder / "plain" / "unet")
    saved = load_file(folder / "plain" / "unet" / FILE)
    assert type(plain.conv_in) is torch.nn.Conv2d
    assert all(torch.equal(value, saved[name]) for name, value in plain.state_dict().items())
    assert torch.equal(call(plain), call(unet()))


def test_a_device_works_and_a_dtype_is_refused(folder, quantized):
    assert torch.equal(call(quantized.to("cpu")), call(quantized))
    for cast in (lambda: quantized.to(torch.float16), lambda: quantized.half()):
        with pytest.raises(ValueError, match="quantized"):
            cast()


def test_dequantized_it_is_a_plain_model_of_the_same_output(quantized, tmp_path):
    quantized.save_pretrained(tmp_path / "quantized")
    plain = UNet2DModel.from_pretrained(tmp_path / "quantized").dequantize()
    assert not any(isinstance(m, QuantLayer) for m in plain.modules())
    torch.testing.assert_close(call(plain), call(quantized), atol=1e-6, rtol=1e-5)
    plain.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    again = UNet2DModel.from_pretrained(tmp_path / "plain")
    assert torch.equal(call(again), call(plain))
    again.half()  # as any model


def test_files_and_memory_are_an_eighth_and_a_quarter(tmp_path):
    made = unet(width=56)  # 1.2 million parameters
    made.save_pretrained(tmp_path / "plain")
    assert made.num_parameters() >= 1e6
    before = (tmp_path / "plain" / FILE).stat().st_size
    for bits, share in ((4, 0.16), (8, 0.28)):
        config = QDiffConfig(weight_bits=bits, scale_method="max")
        loaded = UNet2DModel.from_pretrained(tmp_path / "plain", quantization_config=config)
        loaded.save_pretrained(tmp_path / str(bits))
        assert (tmp_path / str(bits) / FILE).stat().st_size <= share * before
        call(loaded)
        assert loaded.get_memory_footprint() <= share * made.get_memory_footprint()


def test_what_needs_calibration_is_refused_on_the_fly(folder):
    with pytest.raises(ValueError, match="`act_bits` must be None .*`quantize_model`"):
        UNet2DModel.from_pretrained(folder / "plain" / "unet", quantization_config=QDiffConfig(act_bits=8))


def test_a_name_that_does_not_exist_is_refused(folder):
    config = QDiffConfig(modules_to_not_convert=["conv_inn"])
    with pytest.raises(ValueError, match="`modules_to_not_convert` must name modules of UNet2DModel.*'conv_inn'"):
        UNet2DModel.from_pretrained(folder / "plain" / "unet", quantization_config=config)
    config = QDiffConfig(modules_to_not_convert=["conv_in", "conv_out", "down_blocks", "mid_block", "up_blocks"])
    config.modules_to_not_convert.append("time_embedding")
    with pytest.raises(ValueError, match="must have Conv2d or Linear layers to quantize"):
        UNet2DModel.from_pretrained(folder / "plain" / "unet", quantization_config=config)


def test_a_file_without_its_integers_is_refused(quantized, tmp_path):
    from safetensors.torch import save_file

    quantized.save_pretrained(tmp_path)
    kept = {k: v for k, v in load_file(tmp_path / FILE).items() if k != "conv_in.qweight"}
    save_file(kept, tmp_path / FILE, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the file must hold the weights of 'conv_in'"):
        UNet2DModel.from_pretrained(tmp_path)


def test_diffusers_knows_the_names():
    config = AUTO_QUANTIZATION_CONFIG_MAPPING["qdiff"]
    assert isinstance(QDiffConfig(), config)
    assert not isinstance(3, config)
    assert config.from_dict({"weight_bits": 8, "quant_method": "qdiff"}) == QDiffConfig(weight_bits=8)
    assert isinstance(AUTO_QUANTIZER_MAPPING["qdiff"](QDiffConfig()), diffusers_ext.QDiffQuantizer)


STRANGER = """
import sys, torch
if sys.argv[2] == "with":
    import diffusers_ext
from diffusers.models import UNet2DModel  # not by the front door
assert not any(name.startswith("diffusers_ext.methods") for name in sys.modules)
model = UNet2DModel.from_pretrained(sys.argv[1])
print(type(model.conv_in).__name__)
"""


@pytest.mark.parametrize("imported", ["with", "without"])
def test_another_process_loads_it_after_the_import(quantized, tmp_path, imported):
    quantized.save_pretrained(tmp_path)
    found = processes.run([sys.executable, "-c", STRANGER, str(tmp_path), imported], env=dict(os.environ))
    if imported == "with":
        assert found.returncode == 0, found.stderr
        assert found.stdout.split()[-1] == "QuantConv2d"
    else:
        assert "Unknown quantization type, got qdiff" in found.stderr


def test_low_rank_layers_stand_on_top(folder):
    from peft import LoraConfig

    model = UNet2DModel.from_pretrained(folder / "plain" / "unet", quantization_config=QDiffConfig(weight_bits=8))
    before = call(model)
    torch.manual_seed(0)
    targets = ["to_q", "to_v", "conv1"]
    from peft import inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), model)
    layer = next(m for n, m in model.named_modules() if n.endswith("to_q"))
    assert isinstance(layer.base_layer, QuantLinear)
    # Flux's loader would put a layer of zeros in the place of one whose weight is smaller than the LoRA's.
    assert layer.base_layer.weight.shape == (16, 16)
    assert layer.base_layer.weight.untyped_storage().nbytes() == 4
    x = torch.randn(2, 3, 16)
    added = layer.lora_B["default"](layer.lora_A["default"](x)) * layer.scaling["default"]
    torch.testing.assert_close(layer(x), layer.base_layer(x) + added)
    assert (call(model) - before).abs().max() > 1e-3
    x = torch.randn(1, 1, 8, 8)
    model(x, 3).sample.sum().backward()  # trainable on top of integers
    assert layer.lora_A["default"].weight.grad.abs().sum() > 0


def test_it_compiles_without_a_break(folder):
    model = UNet2DModel.from_pretrained(folder / "plain" / "unet", quantization_config=QDiffConfig(weight_bits=4))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(call(compiled), call(model))


def test_it_can_be_offloaded_layer_by_layer(folder):
    from accelerate import cpu_offload

    model = UNet2DModel.from_pretrained(folder / "plain" / "unet", quantization_config=QDiffConfig(weight_bits=4))
    wanted = call(model)
    cpu_offload(model, torch.device("cpu"), offload_buffers=True)
    assert torch.equal(call(model), wanted)
