"""What the network adds to the published ones."""

import pytest
import torch

from diffusers_ext import SGMSEUNet2DModel

SMALL = {
    "block_out_channels": (8, 12),
    "layers_per_block": 1,
    "add_attention": False,
    "down_block_types": ("SkipDownBlock2D",) * 2,
    "up_block_types": ("SkipUpBlock2D",) * 2,
}


def test_residual_and_patches():
    torch.manual_seed(0)
    unet = SGMSEUNet2DModel(**SMALL, frequency_patch=4, residual=0.2)
    x = torch.randn(2, 4, 16, 6)
    with torch.no_grad():
        unet.output_layer.weight.zero_()
        unet.output_layer.bias.copy_(torch.arange(8.0))
        found = unet(x, 0.5).sample
    # Four neighbouring bins are channels of their own: real parts 0..3, imaginary parts 4..7.
    steps = torch.stack([torch.arange(4.0), torch.arange(4.0, 8.0)]).repeat(1, 4)[None, :, :, None]
    torch.testing.assert_close(found, x[:, 2:] + 0.2 * steps, atol=1e-6, rtol=0)
    assert torch.equal(unet._unfold(unet._fold(x)), x)


def test_division_by_time():
    torch.manual_seed(0)
    plain, x, t = SGMSEUNet2DModel(**SMALL), torch.randn(2, 4, 8, 4), torch.tensor([0.1, 0.5])
    plain.output_layer.bias.data += 1
    with torch.no_grad():
        output, bias = plain(x, t).sample, plain.output_layer.bias[None, :, None, None]
        for place, added in (("after", bias / t[:, None, None, None]), ("before", bias)):
            divided = SGMSEUNet2DModel(**SMALL, divide_by_time=place)
            divided.load_state_dict(plain.state_dict())
            expected = (output - bias) / t[:, None, None, None] + added
            torch.testing.assert_close(divided(x, t).sample, expected, atol=1e-4, rtol=1e-4)


def test_save_and_load(tmp_path):
    torch.manual_seed(0)
    unet = SGMSEUNet2DModel(**SMALL, frequency_patch=2, residual=0.5, skip_pyramid=False, divide_by_time="after")
    unet.save_pretrained(tmp_path)
    copy = SGMSEUNet2DModel.from_pretrained(tmp_path)
    x = torch.randn(1, 4, 8, 4)
    with torch.no_grad():
        assert torch.equal(unet(x, 0.3).sample, copy(x, 0.3).sample)
        half = copy.to(torch.bfloat16)(x.bfloat16(), 0.3)
        assert half.sample.dtype == torch.bfloat16
        torch.testing.assert_close(half.sample.float(), unet(x, 0.3).sample, atol=0.1, rtol=0.1)
    assert SGMSEUNet2DModel.from_config(unet.config).config["frequency_patch"] == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"in_channels": 2},
        {"out_channels": 4},
        {"block_out_channels": (8, 10)},
        {"down_block_types": ("DownBlock2D",) * 2},
        {"divide_by_time": "never"},
        {"frequency_patch": 0},
    ],
)
def test_wrong_arguments(wrong):
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` must be"):
        SGMSEUNet2DModel(**{**SMALL, **wrong})


def test_bins_that_cannot_be_halved():
    with pytest.raises(ValueError, match=r"multiples of 8 bins and 2 frames, got \(1, 4, 12, 4\)"):
        SGMSEUNet2DModel(**SMALL, frequency_patch=4)(torch.zeros(1, 4, 12, 4), 0.5)
