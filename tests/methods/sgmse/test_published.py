"""Checkpoints of the published layout, made here, against a network written down anew."""

import pickle
import sys
import types

import pytest
import torch

from diffusers_ext import OUVEScheduler, SBVEScheduler, SGMSEUNet2DModel
from diffusers_ext.methods.sgmse.published import _places, load_published

from .ncsnpp import NCSNpp

TINY = {"nf": 32, "ch_mult": [1, 2, 2], "num_res_blocks": 1, "attn_resolutions": [8], "image_size": 16}
# Each with its hyperparameters, and its prediction from the network F at variance P.
KINDS = {
    "ncsnpp": ({"backbone": "ncsnpp", "sde": "ouve", "theta": 1.5}, {"divide": "before"}, "score", -1),
    "ncsnpp_48k": (
        {"backbone": "ncsnpp_48k", "sde": "ouve", "attn_resolutions": []},
        {"divide": "after", "pyramid": False, "attention": ()},
        "score",
        -1,
    ),
    "v2-score": ({"backbone": "ncsnpp_v2", "network_scaling": "1/t"}, {"divide": "after"}, "score", 1),
    "v2-epsilon": ({"backbone": "ncsnpp_v2", "network_scaling": "1/sigma"}, {}, "epsilon", -1),
    "v2-epsilon-out": ({"backbone": "ncsnpp_v2", "c_out": "1/sigma"}, {}, "epsilon", -1),
    "v2-denoiser": ({"backbone": "ncsnpp_v2", "loss_type": "denoiser", "c_skip": "edm"}, {}, "mean", 1),
    "v2-bridge": (
        {"backbone": "ncsnpp_v2", "loss_type": "data_prediction", "sde": "sbve", "k": 2.5, "sampler_type": "sde"},
        {},
        "sample",
        1,
    ),
}


def checkpoint(path, parameters, net, **changes):
    """Writes a file as Lightning does, with a class of the authors' package among the hyperparameters."""
    package, module = types.ModuleType("sgmse"), types.ModuleType("sgmse.data_module")
    data = type("SpecsDataModule", (), {"__module__": "sgmse.data_module"})
    module.SpecsDataModule = data  # type: ignore[attr-defined]
    sys.modules |= {"sgmse": package, "sgmse.data_module": module}
    try:
        state = {f"dnn.{name}": value for name, value in net.state_dict().items()}
        content = {
            "epoch": 3,
            "state_dict": {name: 0 * value for name, value in state.items()} | {"pesq_loss.window": torch.ones(3)},
            "ema": {"decay": 0.999, "num_updates": 5, "shadow_params": list(state.values()), "collected_params": None},
            "hyper_parameters": {**TINY, **parameters, "data_module_cls": data},
        }
        torch.save(content | changes, path)
    finally:
        del sys.modules["sgmse"], sys.modules["sgmse.data_module"]
    return path


def reference(**options):
    torch.manual_seed(0)
    return NCSNpp(32, (1, 2, 2), 1, **{"attention": (1,), **options})


@pytest.mark.parametrize("name", KINDS)
def test_networks_are_the_published_ones(name, tmp_path):
    parameters, options, prediction, sign = KINDS[name]
    net = reference(**options)
    found = load_published(checkpoint(tmp_path / "tiny.ckpt", parameters, net))
    x, y = (torch.randn(2, 1, 16, 12, dtype=torch.complex64) for _ in range(2))
    t = torch.tensor([0.2, 0.7])
    with torch.no_grad():
        expected = sign * net(x, y, t)
        output = found["unet"](torch.cat([x.real, x.imag, y.real, y.imag], dim=1), t).sample
    torch.testing.assert_close(torch.complex(output[:, :1], output[:, 1:]), expected, atol=3e-5, rtol=1e-4)
    assert expected.abs().mean() > 0.01
    assert found["scheduler"].config.prediction_type == prediction
    if name == "v2-bridge":
        assert isinstance(found["scheduler"], SBVEScheduler)
        assert (found["scheduler"].config.k, found["scheduler"].config.algorithm) == (2.5, "sde")
    else:
        assert isinstance(found["scheduler"], OUVEScheduler)
        assert found["scheduler"].config.algorithm == "pc"
    if name == "ncsnpp_48k":
        assert [found[key] for key in ("sample_rate", "n_fft", "hop_length")] == [48000, 1534, 384]
        assert [found[key] for key in ("exponent", "factor")] == [0.667, 0.065]
        theta, low, high = (found["scheduler"].config[key] for key in ("theta", "sigma_min", "sigma_max"))
        assert (theta, low, high) == (2.0, 0.1, 1.0)


def test_plain_weights(tmp_path):
    path = checkpoint(tmp_path / "tiny.ckpt", {"backbone": "ncsnpp"}, reference(divide="before"))
    plain = load_published(path, ema=False)["unet"]
    assert all(not value.any() for name, value in plain.state_dict().items())


def test_published_size():
    with torch.device("meta"):
        unet = SGMSEUNet2DModel(divide_by_time="before")
        wide = SGMSEUNet2DModel(
            down_block_types=("SkipDownBlock2D",) * 7, up_block_types=("SkipUpBlock2D",) * 7, skip_pyramid=False
        )
    assert sum(value.numel() for value in unet.state_dict().values()) == 65_590_822
    assert len(unet.state_dict()) == 647
    assert len(list(_places(unet))) < 647
    assert not any("skip" in name for name in wide.state_dict())


def test_nothing_is_unpickled(tmp_path):
    class Bad:
        def __reduce__(self):
            return (pytest.fail, ("code of the file ran",))

    path = tmp_path / "bad.ckpt"
    torch.save({"state_dict": {}, "hyper_parameters": {"bad": Bad()}}, path, pickle_module=pickle)
    with pytest.raises(ValueError, match="`path` must be a checkpoint that holds weights and plain values only"):
        load_published(path)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"backbone": "dcunet"}, "`backbone` must be one of"),
        ({"backbone": "ncsnpp_48k"}, "`backbone` must be the one that the checkpoint's tensors are of"),
        ({"backbone": "ncsnpp", "ch_mult": [1, 1, 2]}, "`backbone` must be the one that the checkpoint's tensors"),
        ({"backbone": "ncsnpp_v2", "c_skip": "edm"}, "`loss_type` must be .* without EDM's scalings"),
        ({"backbone": "ncsnpp_v2", "loss_type": "denoiser", "network_scaling": "1/sigma"}, "without EDM's scalings"),
        ({"backbone": "ncsnpp", "transform_type": "log"}, "`transform_type` must be 'exponent', got 'log'"),
        ({"backbone": "ncsnpp", "sde": "ouvp"}, "`sde` must be 'ouve' or 'sbve', got 'ouvp'"),
    ],
)
def test_other_checkpoints_are_refused(parameters, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_published(checkpoint(tmp_path / "tiny.ckpt", parameters, reference(divide="before")))


def test_files_that_are_no_checkpoints(tmp_path):
    net = reference(divide="before")
    path = checkpoint(tmp_path / "tiny.ckpt", {}, net, ema=None)
    with pytest.raises(ValueError, match="`ema` must be False for a checkpoint without averaged weights, got True"):
        load_published(path)
    short = {"shadow_params": list(net.state_dict().values())[1:]}
    with pytest.raises(ValueError, match="`shadow_params` must be the .* tensors of 'state_dict' in their order"):
        load_published(checkpoint(path, {}, net, ema=short))
    torch.save({"weights": 1}, path)
    with pytest.raises(ValueError, match="`path` must be a Lightning checkpoint"):
        load_published(path)
