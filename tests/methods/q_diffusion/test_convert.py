"""The original's checkpoints: the same integers in a Diffusers model."""

import re

import pytest
import torch
from diffusers import UNet2DModel

from diffusers_ext import QDiffConfig, convert_qdiffusion_checkpoint, quantization_grid, train
from diffusers_ext.methods.q_diffusion.layers import QuantLayer
from diffusers_ext.methods.q_diffusion.quantizer import shortcut_splits

from .tiny import pipeline, unet

# The other way round than the converter: a Diffusers name -> the DDIM repository's, for two levels.
BACK = [
    (r"time_embedding\.linear_1", "temb.dense.0"),
    (r"time_embedding\.linear_2", "temb.dense.1"),
    (r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d)\.attentions\.(\d)", r"down.\1.attn.\2"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"up_blocks\.0\.resnets\.(\d)", r"up.1.block.\1"),
    (r"up_blocks\.1\.resnets\.(\d)", r"up.0.block.\1"),
    (r"up_blocks\.0\.attentions\.(\d)", r"up.1.attn.\1"),
    (r"up_blocks\.0\.upsamplers\.0", "up.1.upsample"),
    (r"conv_norm_out", "norm_out"),
    (r"time_emb_proj", "temb_proj"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"group_norm", "norm"),
    (r"to_([qkv])\b", r"\1"),
    (r"to_out\.0", "proj_out"),
]


def original_name(name):
    for pattern, place in BACK:
        name = re.sub(pattern, place, name)
    return name


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint as the original writes it, with roundings drawn at random, and the weights that it stands for."""
    model, state, wanted, splits = unet(), {}, {}, shortcut_splits(unet())
    draw = torch.Generator().manual_seed(0)
    for name, value in model.state_dict().items():
        is_projection = re.search(r"\.to_(q|k|v|out\.0)\.weight$", name)  # 1x1 convolutions there
        state[f"model.{original_name(name)}"] = value[..., None, None] if is_projection else value
    for name, layer in model.named_modules():
        if not isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            continue
        key, split = f"model.{original_name(name)}", splits.get(name, 0)
        parts, rounded = (layer.weight[:, :split], layer.weight[:, split:]) if split else (layer.weight,), []
        for i, part in enumerate(parts):
            end = "_0" if i else ""
            step, zero = quantization_grid(part, 4, "max", per_channel=True)
            shape = (-1, *[1] * (part.ndim - 1))
            alpha = torch.randn(part.shape, generator=draw)
            q = (torch.floor(part / step.view(shape)) + (alpha >= 0) + zero.view(shape)).clamp(0, 15)
            rounded.append(((q - zero.view(shape)) * step.view(shape)).detach())
            values = {"alpha": alpha, "delta": step.view(shape), "zero_point": zero.view(shape)}
            state |= {f"{key}.weight_quantizer{end}.{k}": v for k, v in values.items()}
            state[f"{key}.act_quantizer{end}.delta"] = torch.tensor(0.02 + 0.01 * i)
            state[f"{key}.act_quantizer{end}.zero_point"] = torch.tensor(120.0)
        wanted[name] = torch.cat(rounded, 1)
    path = tmp_path_factory.mktemp("original") / "ckpt.pth"
    torch.save(state, path)
    return path, wanted


def test_the_integers_are_those_of_the_checkpoint(checkpoint, tmp_path):
    path, wanted = checkpoint
    made = convert_qdiffusion_checkpoint(path, unet(), QDiffConfig(4, act_bits=8))
    layers = {name: m for name, m in made.named_modules() if isinstance(m, QuantLayer)}
    assert layers.keys() == wanted.keys()
    for name, layer in layers.items():
        torch.testing.assert_close(layer.dequantize(), wanted[name], atol=0, rtol=0)
        assert layer.act_scale.tolist() == pytest.approx([0.02, 0.03][: len(layer.act_scale)])
        assert layer.act_zero_point.tolist() == [120] * len(layer.act_scale)
    made.save_pretrained(tmp_path)
    again = type(made).from_pretrained(tmp_path)
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(again(x, 7).sample, made(x, 7).sample)


def test_a_channel_of_one_sign_is_rounded_anew(checkpoint, tmp_path):
    """The original's "mse" gives it a zero point below 0, which no byte holds."""
    state = torch.load(checkpoint[0], weights_only=True)
    key = "model.conv_in.weight_quantizer"
    state["model.conv_in.weight"][0] = torch.linspace(0.8, 1.0, 9).view(1, 3, 3)
    step = 0.2 / 15
    state[f"{key}.delta"][0], state[f"{key}.zero_point"][0] = step, -60.0
    torch.save(state, tmp_path / "ckpt.pth")
    made = convert_qdiffusion_checkpoint(tmp_path / "ckpt.pth", unet(), QDiffConfig(4))
    error = made.conv_in.dequantize()[0] - state["model.conv_in.weight"][0]
    assert error.abs().max() <= 1 / 15 / 2 + step
    assert torch.equal(made.conv_in.dequantize()[1:], checkpoint[1]["conv_in"][1:])


def test_weights_of_more_bits_go_to_the_nearest_symmetric_grid(checkpoint):
    path, _ = checkpoint
    made = convert_qdiffusion_checkpoint(path, unet(), QDiffConfig(8))
    assert made.conv_in.qweight.dtype == torch.int8


def test_what_does_not_fit_is_refused(checkpoint, tmp_path):
    path, _ = checkpoint
    with pytest.raises(ValueError, match="`model` must have the checkpoint's architecture"):
        convert_qdiffusion_checkpoint(path, unet(num_class_embeds=3), QDiffConfig(4))
    with pytest.raises(ValueError, match="`split_shortcuts` must be True, as in the checkpoint"):
        convert_qdiffusion_checkpoint(path, unet(), QDiffConfig(4, split_shortcuts=False))
    torch.save({"model.conv_in.weight": torch.ones(1)}, tmp_path / "plain.pth")
    with pytest.raises(ValueError, match="`checkpoint` must hold weight quantizers with `alpha`, got none"):
        convert_qdiffusion_checkpoint(tmp_path / "plain.pth", unet(), QDiffConfig(4))
    state = torch.load(path, weights_only=True)
    torch.save({k: v for k, v in state.items() if "act_quantizer" not in k}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="`act_bits` must be None for a checkpoint of weights alone"):
        convert_qdiffusion_checkpoint(tmp_path / "weights.pth", unet(), QDiffConfig(4, act_bits=8))


def test_the_command_converts_too(checkpoint, tmp_path):
    path, wanted = checkpoint
    pipeline().save_pretrained(tmp_path / "plain")
    options = {"num_inference_steps": 2, "num_timesteps": 2, "sample_batch_size": 2, "num_evaluation_images": 0}
    words = [f"--{name}={value}" for name, value in options.items()]
    words += [f"--pretrained_model_name_or_path={tmp_path / 'plain'}", f"--output_dir={tmp_path / 'made'}"]
    train.main(["q_diffusion", *words, "--act_bits=8", f"--original_checkpoint={path}"])
    made = UNet2DModel.from_pretrained(tmp_path / "made" / "unet")
    torch.testing.assert_close(made.conv_in.dequantize(), wanted["conv_in"], atol=0, rtol=0)


class Hostile:
    def __reduce__(self):
        return eval, ("1 / 0",)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    torch.save({"model.x": Hostile()}, tmp_path / "hostile.pth")
    with pytest.raises(ValueError, match="loads with `weights_only=True`"):
        convert_qdiffusion_checkpoint(tmp_path / "hostile.pth", unet(), QDiffConfig(4))
