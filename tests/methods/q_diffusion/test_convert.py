"""The original's checkpoints: the same integers in a Diffusers model."""

import re

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel

from diffusers_ext import QDiffConfig, convert_qdiffusion_checkpoint, quantization_grid, train
from diffusers_ext.methods.q_diffusion.layers import QuantLayer
from diffusers_ext.methods.q_diffusion.quantizer import shortcut_splits
from tests.tiny_pipelines import build

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


# The same for latent diffusion and Stable Diffusion: one resnet a level, attention at the lower one.
LATENT = [
    (r"^time_embedding\.linear_1", "time_embed.0"),
    (r"^time_embedding\.linear_2", "time_embed.2"),
    (r"^conv_in", "input_blocks.0.0"),
    (r"^down_blocks\.0\.resnets\.0", "input_blocks.1.0"),
    (r"^down_blocks\.0\.downsamplers\.0\.conv", "input_blocks.2.0.op"),
    (r"^down_blocks\.1\.resnets\.0", "input_blocks.3.0"),
    (r"^down_blocks\.1\.attentions\.0", "input_blocks.3.1"),
    (r"^mid_block\.resnets\.0", "middle_block.0"),
    (r"^mid_block\.attentions\.0", "middle_block.1"),
    (r"^mid_block\.resnets\.1", "middle_block.2"),
    (r"^up_blocks\.0\.resnets\.(\d)", r"output_blocks.\1.0"),
    (r"^up_blocks\.0\.attentions\.(\d)", r"output_blocks.\1.1"),
    (r"^up_blocks\.0\.upsamplers\.0\.conv", "output_blocks.1.2.conv"),
    (r"^up_blocks\.1\.resnets\.0", "output_blocks.2.0"),
    (r"^up_blocks\.1\.resnets\.1", "output_blocks.3.0"),
    (r"^conv_norm_out", "out.0"),
    (r"^conv_out", "out.2"),
    (r"^(\w+\.\d\.0|middle_block\.[02])\.norm1", r"\1.in_layers.0"),
    (r"^(\w+\.\d\.0|middle_block\.[02])\.conv1", r"\1.in_layers.2"),
    (r"^(\w+\.\d\.0|middle_block\.[02])\.norm2", r"\1.out_layers.0"),
    (r"^(\w+\.\d\.0|middle_block\.[02])\.conv2", r"\1.out_layers.3"),
    (r"time_emb_proj", "emb_layers.1"),
    (r"conv_shortcut", "skip_connection"),
]
# Attention of models without texts.
LATENT_PLAIN = [*LATENT, (r"group_norm", "norm"), (r"to_([qkv])\b", r"\1"), (r"to_out\.0", "proj_out")]


def as_original(model, table, extra_axes):
    """Returns what the original saves, with roundings drawn at random, and the weights that it stands for."""
    state, wanted, splits = {}, {}, shortcut_splits(model)
    draw = torch.Generator().manual_seed(0)

    def original_name(name):
        for pattern, place in table:
            name = re.sub(pattern, place, name)
        return f"model.{name}"

    for name, value in model.state_dict().items():
        is_projection = re.search(r"\.to_(q|k|v|out\.0)\.weight$", name)  # convolutions there
        state[original_name(name)] = value[(..., *[None] * extra_axes)] if is_projection else value
    for name, layer in model.named_modules():
        if not isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            continue
        key, split = original_name(name), splits.get(name, 0)
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
    return state, wanted


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of the DDIM repository's network."""
    state, wanted = as_original(unet(), BACK, 2)
    path = tmp_path_factory.mktemp("original") / "ckpt.pth"
    torch.save(state, path)
    return path, wanted


def same_integers(made, wanted):
    layers = {name: m for name, m in made.named_modules() if isinstance(m, QuantLayer)}
    assert layers.keys() == wanted.keys()
    for name, layer in layers.items():
        torch.testing.assert_close(layer.dequantize(), wanted[name], atol=0, rtol=0)
        assert layer.act_scale.tolist() == pytest.approx([0.02, 0.03][: len(layer.act_scale)])
        assert layer.act_zero_point.tolist() == [120] * len(layer.act_scale)


def test_a_checkpoint_of_stable_diffusion(tmp_path):
    model = build("StableDiffusionPipeline").unet
    state, wanted = as_original(model, LATENT, 0)
    assert "model.output_blocks.1.1.transformer_blocks.0.attn2.to_k.weight_quantizer.alpha" in state
    assert "model.output_blocks.3.0.skip_connection.weight_quantizer_0.delta" in state
    torch.save(state, tmp_path / "ckpt.pth")
    made = convert_qdiffusion_checkpoint(tmp_path / "ckpt.pth", model, QDiffConfig(4, act_bits=8))
    same_integers(made, wanted)
    assert torch.equal(made.conv_norm_out.weight, model.conv_norm_out.weight)


def merged_attention(state, heads):
    """Puts query, key and value into one layer: of each head those three, one after the other."""
    merged = {}
    for name, value in state.items():
        match = re.search(r"\.q\.(.+)$", name)
        if re.search(r"\.[kv]\.", name):
            continue
        if match is None:
            merged[name] = value
        elif "act_quantizer" in name:
            merged[name.replace(".q.", ".qkv.")] = value
        else:
            own = [state[name.replace(".q.", f".{part}.")].chunk(heads) for part in "qkv"]
            merged[name.replace(".q.", ".qkv.")] = torch.cat([part[h] for h in range(heads) for part in own])
    return merged


def test_a_checkpoint_of_latent_diffusion_without_texts(tmp_path):
    """Its attention makes query, key and value by one convolution, which splits into heads first."""
    model, heads = unet(), 4
    state, wanted = as_original(model, LATENT_PLAIN, 1)
    state = merged_attention(state, heads)
    weight, bias = (state[f"model.middle_block.1.qkv.{name}"] for name in ("weight", "bias"))
    assert weight.shape == (48, 16, 1)
    torch.save(state, tmp_path / "ckpt.pth")
    made = convert_qdiffusion_checkpoint(tmp_path / "ckpt.pth", model, QDiffConfig(4, act_bits=8))
    same_integers(made, wanted)
    # As the original computes it (`QKVAttentionLegacy`), in fp32.
    attention, x = model.mid_block.attentions[0], torch.randn(2, 16, 4, 4)
    q, k, v = F.conv1d(attention.group_norm(x).flatten(2), weight, bias).reshape(2 * heads, 12, 16).split(4, 1)
    found = torch.einsum("bts,bcs->bct", (torch.einsum("bct,bcs->bts", q, k) / 2).softmax(-1), v)
    project = (state[f"model.middle_block.1.proj_out.{name}"] for name in ("weight", "bias"))
    found = x + F.conv1d(found.reshape(2, 16, 16), *project).view(x.shape)
    torch.testing.assert_close(attention(x), found, atol=1e-5, rtol=1e-4)


def test_the_integers_are_those_of_the_checkpoint(checkpoint, tmp_path):
    path, wanted = checkpoint
    made = convert_qdiffusion_checkpoint(path, unet(), QDiffConfig(4, act_bits=8))
    same_integers(made, wanted)
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
