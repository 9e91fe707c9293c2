"""The networks without a time path, against Diffusers' own with zero time weights."""

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from diffusers_ext import OMSUNet2DConditionModel

from .tiny import PIXELS, TEXT_BLOCKS, WIDTH, module, pixel_module

BASE = {
    "block_out_channels": (160, 320, 640),
    "layers_per_block": 2,
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 1024,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "in_channels": 4,
    "out_channels": 4,
    "use_linear_projection": False,
    "sample_size": None,
}
PARAMETERS = {1024: 154_014_564, 2048: 2_542_541_124}
LARGE = {
    **BASE,
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10),
}


def timeless(weights):
    return {k: v for k, v in weights.items() if not k.startswith("time_embedding.") and ".time_emb_proj." not in k}


@pytest.mark.parametrize("config", [BASE, LARGE], ids=["base", "large"])
def test_keys_shapes_and_size_of_the_published_modules(config):
    with torch.device("meta"):
        ours, theirs = OMSUNet2DConditionModel(**config), UNet2DConditionModel(**config)
    expected, found = timeless(theirs.state_dict()), ours.state_dict()
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()}
    assert len(found) < len(theirs.state_dict())
    assert sum(p.numel() for p in ours.parameters()) == PARAMETERS[config["cross_attention_dim"]]


def zero_time(network):
    for name, parameter in network.named_parameters():
        if name.startswith("time_embedding.") or ".time_emb_proj." in name:
            parameter.data.zero_()
    return network.eval()


@pytest.mark.parametrize("shift", ["default", "scale_shift"])
def test_output_is_that_of_zero_time_weights(shift):
    ours = module(resnet_time_scale_shift=shift)
    theirs = zero_time(UNet2DConditionModel(**TEXT_BLOCKS, cross_attention_dim=WIDTH, resnet_time_scale_shift=shift))
    theirs.load_state_dict(ours.state_dict(), strict=False)
    sample, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, WIDTH)
    expected = theirs(sample, 321, text).sample
    assert expected.std() > 0.01
    assert torch.equal(ours(sample, text).sample, expected)
    assert torch.equal(ours(sample, encoder_hidden_states=text, return_dict=False)[0], expected)


def test_pixel_network_is_that_of_zero_time_weights():
    ours, theirs = pixel_module(), zero_time(UNet2DModel(**PIXELS))
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in timeless(theirs.state_dict()).items()
    }
    theirs.load_state_dict(ours.state_dict(), strict=False)
    sample = torch.randn(2, 1, 8, 8)
    assert torch.equal(ours(sample).sample, theirs(sample, 321).sample)


def test_classes_act_without_a_time():
    """The label's embedding goes the way that the time's would have gone with it."""
    ours, theirs = pixel_module(4), zero_time(UNet2DModel(**PIXELS, num_class_embeds=4))
    assert [k for k in ours.state_dict() if k.startswith("time_embedding")] == []
    theirs.load_state_dict(ours.state_dict(), strict=False)
    sample, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 3])
    out = ours(sample, labels).sample
    assert torch.equal(out, theirs(sample, 321, labels).sample)
    assert not torch.equal(out, ours(sample, labels.flip(0)).sample)


def test_weights_of_a_network_with_time_load_without_it(tmp_path):
    theirs = zero_time(UNet2DConditionModel(**TEXT_BLOCKS, cross_attention_dim=WIDTH))
    theirs.save_pretrained(tmp_path)
    ours = OMSUNet2DConditionModel.from_pretrained(tmp_path)
    for key, value in timeless(theirs.state_dict()).items():
        assert torch.equal(ours.state_dict()[key], value)


def test_gradients_reach_every_weight():
    for network, condition in ((module(), torch.randn(1, 5, WIDTH)), (pixel_module(4), torch.tensor([1]))):
        network.train()(torch.randn(1, network.config.in_channels, 8, 8), condition).sample.square().mean().backward()
        assert [name for name, p in network.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("option", [{"num_class_embeds": 3}, {"addition_embed_type": "text"}])
def test_settings_that_act_through_time_are_refused(option):
    with pytest.raises(ValueError, match="must be None: they act through the time path"):
        OMSUNet2DConditionModel(**TEXT_BLOCKS, cross_attention_dim=WIDTH, **option)
