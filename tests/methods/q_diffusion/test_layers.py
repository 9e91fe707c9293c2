"""Layers that store integers, their kernels, and what chooses between them."""

import copy
import json

import pytest
import torch
from torch import nn

from diffusers_ext import QDiffConfig, QuantConv2d, QuantLinear, fake_quantize, quantization_grid, select_kernel
from diffusers_ext.methods.q_diffusion import kernels
from diffusers_ext.methods.q_diffusion.layers import check_compute, quantized_layer


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Answers of the kernels' choice go to a place of their own."""
    monkeypatch.setattr(kernels, "HF_HOME", str(tmp_path))
    forget()
    yield tmp_path
    forget()


def forget():
    """Starts as another process does."""
    kernels._selected.cache_clear()
    kernels.exact_kernel.cache_clear()


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def conv(channels=6, **options):
    torch.manual_seed(0)
    return nn.Conv2d(channels, 5, 3, padding=1, **options)


def active(layer, config, split=0):
    """Returns a layer with ranges of activations, found on standard normal inputs."""
    made = quantized_layer(layer, config, split)
    x = normal(64, *([6, 4, 4] if isinstance(layer, nn.Conv2d) else [6]), seed=9)
    grids = [quantization_grid(made.channels(x, part), 8) for part, _ in made.parts()]
    made.act_scale = torch.stack([step for step, _ in grids])
    made.act_zero_point = torch.stack([zero for _, zero in grids]).to(torch.uint8)
    return made


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 7, 8])
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_stored_integers_are_the_nearest_of_the_grid(bits, kind):
    layer = conv() if kind == "conv" else nn.Linear(7, 5)
    made = quantized_layer(layer, QDiffConfig(weight_bits=bits))
    step, zero = quantization_grid(layer.weight, bits, "mse", symmetric=bits > 4, per_channel=True)
    shape = (-1, *[1] * (layer.weight.ndim - 1))
    wanted = fake_quantize(layer.weight.detach(), step.view(shape), zero.view(shape), bits)
    assert torch.equal(made.dequantize(), wanted)
    length = layer.weight[0].numel()
    assert made.qweight.shape == ((5, (length + 1) // 2) if bits <= 4 else layer.weight.shape)
    assert made.qweight.dtype == (torch.uint8 if bits <= 4 else torch.int8)
    assert made.weight_scale.dtype == torch.float32
    assert (made.weight_zero_point is None) == (bits > 4)
    assert made.integers().float().abs().max() <= made.max_abs_weight
    x = normal(2, *([6, 4, 4] if kind == "conv" else [3, 7]))
    plain = nn.functional.conv2d if kind == "conv" else nn.functional.linear
    options = {"padding": 1} if kind == "conv" else {}
    torch.testing.assert_close(made(x), plain(x, wanted, layer.bias, **options))


def test_a_split_layer_has_a_grid_for_each_part():
    """One part of the concatenation is eight times as large, and its weights are as much smaller."""
    torch.manual_seed(0)
    layer, x = nn.Conv2d(32, 16, 1), normal(64, 32, 4, 4)
    with torch.no_grad():
        layer.weight[:, :16] /= 8
        x[:, :16] *= 8
    errors = []
    for split in (16, 0):
        made = quantized_layer(layer, QDiffConfig(weight_bits=4), split)
        assert made.weight_scale.shape == ((16, 2) if split else (16,))
        errors.append((made(x) - layer(x)).square().mean().item())
    assert errors[0] <= 0.1 * errors[1]


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 1, 4, 4), (3, 1, 1, 1), (2, 4, 1, 6), (2, 5, 6, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_layouts_are_those_of_the_library(shape, dtype):
    x = normal(*shape).mul(50).to(dtype)
    last = x.contiguous(memory_format=torch.channels_last)
    for given in (x, last, x.transpose(2, 3).contiguous().transpose(2, 3), x[:, :1]):
        assert torch.equal(kernels.channels_last(given), given)
        assert kernels.channels_last(given).is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(kernels.channels_first(given), given)
        assert kernels.channels_first(given).is_contiguous()


def test_activations_are_rounded_to_the_nearest_and_clipped():
    x, step, zero = normal(4000) * 3, 0.0213, 37
    wanted = ((x.double() / step).round() + zero).clamp(0, 255)
    far = ((x.double() / step) % 1 - 0.5).abs() > 1e-4  # where two integers are as near, either is right
    found = kernels.to_uint8(x, step, zero)
    assert torch.equal(found[far].double(), wanted[far])
    assert (found.double() - wanted).abs().max() <= 1
    torch.testing.assert_close(kernels.rounded_activations(x, step, zero), (found.float() - zero) * step)
    ends = torch.tensor([-1e9, -1e30, 1e9, 1e30, float("inf")])
    assert kernels.to_uint8(ends, step, zero).tolist() == [0, 0, 255, 255, 255]


@pytest.mark.parametrize("bits", [4, 7, 8])
@pytest.mark.parametrize("split", [0, 2])
@pytest.mark.parametrize("kind", ["conv", "strided", "grouped", "linear"])
def test_integers_compute_what_floats_do(bits, split, kind):
    options = {"strided": {"stride": 2}, "grouped": {"groups": 2}}.get(kind, {})
    if kind == "grouped" and split:
        pytest.skip("a grouped convolution is over no concatenation")
    torch.manual_seed(0)
    layer = nn.Linear(6, 5) if kind == "linear" else nn.Conv2d(6, 4, 3, padding=1, **options)
    made = active(layer, QDiffConfig(weight_bits=bits, act_bits=8, scale_method="max"), split)
    shape = (2, 7, 6) if kind == "linear" else (2, 6, 5, 5)
    if not kernels.exact_kernel(made.op, (made.weight_shape, shape, *made.options()), made.max_abs_weight):
        pytest.skip("this processor has no exact kernel for so many bits")
    for x in (normal(*shape), torch.full(shape, 50.0), torch.full(shape, -50.0)):  # clipped on either side too
        wanted = made.operation(made.rounded(x), made.dequantize(), made.bias)
        found = made.integer_forward(x)
        assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_a_kernel_that_saturates_is_refused(monkeypatch):
    """Sums of pairs kept in 16 bits, as processors with AVX2 alone do."""

    def saturating(q, step, zero, weight, scale, bias):
        x, w = q.double().unflatten(-1, (-1, 2)), weight.double().unflatten(-1, (-1, 2))
        pairs = torch.einsum("nkp,okp->nok", x.reshape(-1, *x.shape[-2:]), w).clamp(-(2**15), 2**15 - 1)
        correction = zero * weight.double().sum(1)
        return ((pairs.sum(-1) - correction) * step * scale).float()

    shape = ((8, 16), (4, 16))
    assert kernels.kernel_is_exact("linear", shape, 64)
    monkeypatch.setattr(kernels, "pack_linear", lambda weight, rows: weight)
    monkeypatch.setattr(kernels, "int8_linear", saturating)
    assert not kernels.kernel_is_exact("linear", shape, 128)
    assert select_kernel("linear", shape, 128) == "dequantize"
    assert kernels.kernel_is_exact("linear", shape, 64)  # pairs of 255 * 64 fit

    def missing(*arguments):
        raise RuntimeError("not compiled in")

    monkeypatch.setattr(kernels, "int8_linear", missing)
    assert select_kernel("linear", ((8, 18), (4, 18)), 64) == "dequantize"


def test_the_faster_of_exact_kernels_is_chosen_and_kept(monkeypatch, home):
    monkeypatch.setattr(kernels, "kernel_is_exact", lambda *arguments: True)
    times = {"int8": 1.0, "dequantize": 2.0}
    monkeypatch.setattr(kernels, "_times", lambda *arguments: times)
    assert select_kernel("linear", ((8, 16), (4, 16)), 127) == "int8"
    times["int8"] = 3.0
    assert select_kernel("linear", ((8, 16), (3, 16)), 127) == "int8"  # up to the next power of two
    assert select_kernel("linear", ((8, 16), (8, 16)), 127) == "dequantize"
    forget()
    monkeypatch.setattr(kernels, "_times", None)
    assert select_kernel("linear", ((8, 16), (4, 16)), 127) == "int8"
    kept = json.loads((home / "diffusers_ext" / "kernels.json").read_text())
    assert [torch.__version__ in machine for machine in kept] == [True]
    with pytest.raises(ValueError, match="`op` must be one of .*, got 'conv3d'"):
        select_kernel("conv3d", ((8, 16), (4, 16)), 127)


def test_an_answer_comes_from_a_real_measurement():
    shape = ((32, 16, 3, 3), (2, 16, 8, 8), ((1, 1), (1, 1), (1, 1), 1))
    for split in (0, 4):
        times = kernels._times("conv2d", shape, 15, True, split)
        assert set(times) == {"int8", "dequantize"}
        assert min(times.values()) > 0


def test_integers_that_are_asked_for_and_wrong_are_refused(monkeypatch):
    monkeypatch.setattr(kernels, "kernel_is_exact", lambda *arguments: False)
    made = active(nn.Linear(6, 5), QDiffConfig(weight_bits=8, act_bits=8, compute="int8"))
    with pytest.raises(ValueError, match="`compute` must be 'auto' .*With `weight_bits=7` or 4"):
        made(normal(3, 6))
    with pytest.raises(ValueError, match="`compute` must be 'auto' .*`weight_bits=8`"):
        check_compute(QDiffConfig(weight_bits=8, act_bits=8, compute="int8"))


def test_weights_for_the_kernel_are_counted_and_not_kept():
    """They are there while they are used: counted as memory, not saved, copied or moved."""
    made = active(conv(), QDiffConfig(weight_bits=7, act_bits=8))
    x, names = normal(2, 6, 4, 4), set(made.state_dict())
    if not kernels.exact_kernel(made.op, (made.weight_shape, x.shape, *made.options()), made.max_abs_weight):
        pytest.skip("this processor has no exact kernel for so many bits")
    before, wanted = sum(b.numel() for b in made.buffers()), made.integer_forward(x)
    assert sum(b.numel() for b in made.buffers()) >= before + made.qweight.numel()
    assert set(made.state_dict()) == names
    for other in (copy.deepcopy(made), made.to("cpu")):
        assert sum(b.numel() for b in other.buffers()) == before
        assert torch.equal(other.integer_forward(x), wanted)


def test_gradients_pass_as_if_nothing_was_rounded():
    made = active(nn.Linear(6, 5), QDiffConfig(weight_bits=8, act_bits=8))
    x = normal(3, 6).requires_grad_()
    made(x).sum().backward()
    torch.testing.assert_close(x.grad, made.dequantize().sum(0).expand(3, 6))


def test_lower_precision_is_computed_in_its_own():
    made = quantized_layer(nn.Linear(6, 5).to(torch.bfloat16), QDiffConfig(weight_bits=8))
    assert made(normal(3, 6).bfloat16()).dtype == torch.bfloat16
    assert made.weight_scale.dtype == torch.float32


def test_the_first_argument_is_the_bits():
    """The base class of configurations has a field that would come before."""
    config = QDiffConfig(8, 8)
    assert (config.weight_bits, config.act_bits, config.quant_method.value) == (8, 8, "qdiff")
    assert QDiffConfig(quant_method="other").quant_method.value == "qdiff"  # as a saved one is read
    assert "weight_bits" in repr(config)


def test_they_print_and_look_like_what_they_replace():
    made = QuantConv2d(conv(), QDiffConfig())
    assert isinstance(made, nn.Conv2d)
    assert repr(made).startswith("QuantConv2d(6, 5, kernel_size=(3, 3)")
    assert isinstance(QuantLinear(nn.Linear(3, 2), QDiffConfig()), nn.Linear)
    assert made.weight.dtype == torch.float32
    with pytest.raises(RuntimeError):  # so that nothing is merged into it unnoticed
        made.weight.data += torch.ones(5, 6, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight_bits": 1}, r"`weight_bits` must be an int in 2\.\.8, got 1"),
        ({"weight_bits": 9}, r"`weight_bits` must be an int in 2\.\.8, got 9"),
        ({"weight_bits": 4.0}, r"`weight_bits` must be an int in 2\.\.8, got 4.0"),
        ({"act_bits": 4}, "`act_bits` must be 8 or None, got 4"),
        ({"scale_method": "best"}, r"`scale_method` must be one of \['max', 'mse'\], got 'best'"),
        ({"compute": "fast"}, "`compute` must be one of .*, got 'fast'"),
        ({"compute": "int8"}, "`compute` must be other than 'int8' without `act_bits`"),
        ({"quantize_attention": True}, "`quantize_attention` must be False without `act_bits`"),
        ({"modules_to_not_convert": "conv_in"}, "`modules_to_not_convert` must be a list"),
        ({"softmax_bits": 1}, r"`softmax_bits` must be in 2\.\.16, got 1"),
    ],
)
def test_wrong_configurations(arguments, message):
    with pytest.raises(ValueError, match=message):
        QDiffConfig(**arguments)
