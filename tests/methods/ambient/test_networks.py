"""DDPM++ of the published weights: against its equations written out on weights by the authors' names."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, EDMEulerScheduler

from diffusers_ext import AmbientPipeline, SongUNet2DModel, save_repo

BASE, EMBEDDING = 8, 32


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def state():
    """Random weights by the authors' names: 8x8 pixels, two levels, attention on the coarser one."""
    found, generator = {}, seeded()

    def layer(name, *shape):
        found[f"model.{name}.weight"] = torch.randn(shape, generator=generator) / math.prod(shape[1:]) ** 0.5
        found[f"model.{name}.bias"] = 0.1 * torch.randn(shape[0], generator=generator)

    def block(name, inputs, outputs, attention=False, resampled=False):
        for norm, channels in (("norm0", inputs), ("norm1", outputs)):
            layer(f"{name}.{norm}", channels)
        layer(f"{name}.conv0", outputs, inputs, 3, 3)
        layer(f"{name}.conv1", outputs, outputs, 3, 3)
        layer(f"{name}.affine", outputs, EMBEDDING)
        if inputs != outputs or resampled:
            layer(f"{name}.skip", outputs, inputs, 1, 1)
        if resampled:
            for conv in ("conv0", "skip"):
                found[f"model.{name}.{conv}.resample_filter"] = torch.full((1, 1, 2, 2), 0.25)
        if attention:
            layer(f"{name}.norm2", outputs)
            layer(f"{name}.qkv", 3 * outputs, outputs, 1, 1)
            layer(f"{name}.proj", outputs, outputs, 1, 1)

    layer("map_layer0", EMBEDDING, BASE)
    layer("map_layer1", EMBEDDING, EMBEDDING)
    found["model.map_augment.weight"] = torch.randn(BASE, 9, generator=generator)
    layer("enc.8x8_conv", BASE, 3, 3, 3)
    block("enc.8x8_block0", 8, 16)
    block("enc.8x8_block1", 16, 16)
    block("enc.4x4_down", 16, 16, resampled=True)
    block("enc.4x4_block0", 16, 24, attention=True)
    block("enc.4x4_block1", 24, 24, attention=True)
    block("dec.4x4_in0", 24, 24, attention=True)
    block("dec.4x4_in1", 24, 24)
    block("dec.4x4_block0", 24 + 24, 24)
    block("dec.4x4_block1", 24 + 24, 24)
    block("dec.4x4_block2", 24 + 16, 24, attention=True)
    block("dec.8x8_up", 24, 24, resampled=True)
    block("dec.8x8_block0", 24 + 16, 16)
    block("dec.8x8_block1", 16 + 16, 16)
    block("dec.8x8_block2", 16 + 8, 16)
    layer("dec.8x8_aux_norm", 16)
    layer("dec.8x8_aux_conv", 3, 16, 3, 3)
    return found


def written_out(state, x, c_noise):
    """The network by its equations, block by block in the order of the weights' names."""
    w = {name.removeprefix("model."): value for name, value in state.items()}

    def norm(name, x):
        return F.group_norm(x, min(32, x.shape[1] // 4), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def conv(name, x):
        kernel = w[f"{name}.weight"]
        return F.conv2d(x, kernel, w[f"{name}.bias"], padding=kernel.shape[-1] // 2)

    def resampled(name, x):
        """Means of 2x2 pixels on the way down, repeated ones on the way up, by the stored filter."""
        if f"{name}.conv0.resample_filter" not in w:
            return x
        kernel = w[f"{name}.conv0.resample_filter"].repeat(x.shape[1], 1, 1, 1)
        if name.endswith("down"):
            return F.conv2d(x, kernel, stride=2, groups=x.shape[1])
        return F.conv_transpose2d(x, 4 * kernel, stride=2, groups=x.shape[1])

    def block(name, x, embedding):
        h = conv(f"{name}.conv0", resampled(name, F.silu(norm(f"{name}.norm0", x))))
        h = h + (embedding @ w[f"{name}.affine.weight"].T + w[f"{name}.affine.bias"])[:, :, None, None]
        h = conv(f"{name}.conv1", F.silu(norm(f"{name}.norm1", h)))
        x = resampled(name, x)
        x = (h + (conv(f"{name}.skip", x) if f"{name}.skip.weight" in w else x)) / 2**0.5
        if f"{name}.qkv.weight" in w:
            batch, channels, height, width = x.shape
            q, k, v = conv(f"{name}.qkv", norm(f"{name}.norm2", x)).view(batch, channels, 3, -1).unbind(2)
            weights = (torch.einsum("bcq,bck->bqk", q, k) / channels**0.5).softmax(-1)
            seen = torch.einsum("bqk,bck->bcq", weights, v).reshape(batch, channels, height, width)
            x = (x + conv(f"{name}.proj", seen)) / 2**0.5
        return x

    frequencies = (1 / 10000) ** (torch.arange(BASE // 2) / (BASE // 2 - 1))
    angles = c_noise[:, None] * frequencies
    embedding = torch.cat([angles.sin(), angles.cos()], 1)
    for name in ("map_layer0", "map_layer1"):
        embedding = F.silu(embedding @ w[f"{name}.weight"].T + w[f"{name}.bias"])
    order = list(dict.fromkeys(re.match(r"(enc|dec)\.\w+", name)[0] for name in w if not name.startswith("map")))
    x = conv(order[0], x)
    skips = [x]
    for name in order[1:-2]:
        if name.startswith("dec") and "block" in name:
            x = torch.cat([x, skips.pop()], 1)
        x = block(name, x, embedding)
        if name.startswith("enc"):
            skips.append(x)
    assert not skips
    return conv(order[-1], F.silu(norm(order[-2], x)))


def test_published_weights_give_the_same_network(state, tmp_path):
    unet = SongUNet2DModel.from_original_state_dict(state).eval()
    assert unet.config.block_out_channels == [16, 24]
    assert unet.config.attention_levels == [1]
    x, c_noise = torch.randn(3, 3, 8, 8, generator=seeded(1)), torch.tensor([-1.5, 0.0, 1.1])
    with torch.no_grad():
        wanted, found = written_out(state, x, c_noise), unet(x, c_noise).sample
        assert wanted.std() > 0.05
        assert (unet(x, c_noise + 0.5).sample - wanted).abs().max() > 1e-3
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    save_repo(AmbientPipeline(unet, EDMEulerScheduler()), tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    again = pipeline(2, num_inference_steps=3, stop_at_sigma=0.2, output_type="pt", generator=seeded()).images
    assert again.shape == (2, 3, 8, 8)
    assert torch.equal(pipeline.unet(x, c_noise).sample, found)


def test_the_published_size():
    """arXiv 2411.02780 at 32x32: 55,733,891 parameters in 425 tensors, augmentation and fixed filters included."""
    with torch.device("meta"):
        unet = SongUNet2DModel()
    sizes = [p.numel() for p in unet.parameters()]
    attentions = sum(block.attention is not None for block in [*unet.down, *unet.up])
    assert sum(sizes) + 9 * 128 == 55_733_891
    assert len(sizes) - 4 * attentions + 1 + 2 * 4 == 425  # q, k and v are one there; two filters a resampling


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {}, "`state` must hold the weights of EDM's DDPM"),
        (lambda s: {**s, "model.map_label.weight": torch.ones(1)}, "without classes.*got .*map_label"),
        (lambda s: {**s, "model.map_noise.freqs": torch.ones(1)}, "got .*map_noise"),
        (lambda s: {**s, "model.enc.4x4_down.conv0.resample_filter": torch.ones(1, 1, 4, 4)}, "must hold the weights"),
        (lambda s: {k: v for k, v in s.items() if "in1" not in k}, "`state` must hold all weights.*up.1.resnet"),
        (lambda s: {**s, "model.enc.4x4_block7.conv0.bias": torch.ones(1)}, "`state` must hold all weights"),
    ],
)
def test_other_weights_are_refused(state, change, message):
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        SongUNet2DModel.from_original_state_dict(change(state))
    for bad, name in (({"sample_size": 9}, "sample_size"), ({"layers_per_block": 0}, "layers_per_block")):
        with pytest.raises(ValueError, match=name):
            SongUNet2DModel(**{"block_out_channels": (8, 8), "base_channels": 8, **bad})
    unet = SongUNet2DModel(8, base_channels=8, block_out_channels=(8,), layers_per_block=1)
    with pytest.raises(ValueError, match="`class_labels` must be left out"):
        unet(torch.zeros(1, 3, 8, 8), 0.0, class_labels=torch.tensor([0]))
