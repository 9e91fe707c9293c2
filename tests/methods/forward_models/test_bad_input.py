"""What is refused by name: wrong types and ranges, and shapes that would be broadcast unseen."""

import math
import re

import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler, UNet2DModel

from diffusers_ext import (
    BlurForwardModel,
    CropForwardModel,
    DownsampleForwardModel,
    ForwardModelConfig,
    ForwardModelPipeline,
    ForwardModelRecipe,
    GeneratorForwardModel,
    MaskForwardModel,
    ObservationDataset,
    ObservationMLP,
    ProjectionForwardModel,
    SimulatedObservations,
    VolumeForwardModel,
    WarpForwardModel,
    check_differentiable,
    forward_model_loss,
    lift_views,
    map_parameters,
    observe,
    render_cells,
)

from .tiny import UNET, context, crops, scheduler, seeded, unet

NAN, INF = math.nan, math.inf
MLP = {"signal_shape": (1,), "observation_shape": (1,)}
# Class, its other arguments, an argument, and values that it must refuse.
ARGUMENTS = [
    (BlurForwardModel, {}, "sigma", [None, "1", True, NAN, INF, [1.0]]),
    (BlurForwardModel, {"sigma": 1.0}, "factor", [None, "2", True, 2.0]),
    (DownsampleForwardModel, {}, "factor", [None, True, 2.0]),
    (CropForwardModel, {"sample_size": 8}, "size", [None, "2", True, 2.0, (2, 2, 2), (2.0, 2)]),
    (CropForwardModel, {"size": 2}, "sample_size", [None, 8.0]),
    (MaskForwardModel, {"sample_size": 8}, "keep_probability", [None, "a", NAN, True, 1.1]),
    (ProjectionForwardModel, {}, "num_bins", [None, "4", True, 4.5]),
    (ProjectionForwardModel, {"num_bins": 4}, "extent", [None, "1", True, INF]),
    (ProjectionForwardModel, {"num_bins": 4}, "num_angles", ["4", True, 2.5, 0]),
    (VolumeForwardModel, {}, "size", [None, "4", True, 4.0, (4, 4, 4), [4.5, 4]]),
    (VolumeForwardModel, {"size": 4}, "num_samples", [None, "4", 2.5]),
    (VolumeForwardModel, {"size": 4}, "near", [None, "0", True, NAN, -1.0, 2.0]),
    (VolumeForwardModel, {"size": 4}, "far", [None, "2", INF]),
    (VolumeForwardModel, {"size": 4}, "background", [None, "black", NAN, [NAN], []]),
    (VolumeForwardModel, {"size": 4}, "density_scale", [None, "1", True, INF]),
    (VolumeForwardModel, {"size": 4}, "field_of_view", ["1", True, NAN]),
    (VolumeForwardModel, {"size": 4}, "extent", [None, NAN]),
    (VolumeForwardModel, {"size": 4}, "distance", ["1", True, INF]),
    (VolumeForwardModel, {"size": 4}, "num_angles", ["4", 2.5]),
    (WarpForwardModel, {}, "flow_scale", [None, "1", True, INF]),
    (GeneratorForwardModel, {"decoder": torch.nn.Identity()}, "then", ["half", torch.nn.Identity()]),
    (ObservationMLP, {"observation_shape": (1,)}, "signal_shape", [None, 4, (True,), (1.0,), "12"]),
    (ObservationMLP, MLP, "hidden_size", [None, True, 1.5]),
    (ObservationMLP, MLP, "num_blocks", [True]),
    (ObservationMLP, MLP, "signal_range", ["ab", 5, (0, INF), (0, "a"), (None, 1)]),
    (crops, {}, "signal_range", ["ab", 5, (0, INF), (0, "a")]),
    (crops, {}, "observation_scale", [None, "a", True, INF]),
    (crops, {}, "context_noise", [None, "a", True, INF]),
    (crops, {}, "max_context_views", ["a", -1, 1.5]),
    (crops, {}, "num_targets", [0, True]),
]


@pytest.mark.parametrize("row", ARGUMENTS, ids=lambda row: f"{row[0].__name__}-{row[2]}")
def test_arguments(row):
    kind, others, name, values = row
    for value in values:
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            kind(**{**others, name: value})


CROP, MASK, WARP = CropForwardModel(2, 8), MaskForwardModel(8), WarpForwardModel()
CAMERA = VolumeForwardModel(4, num_samples=4, near=1.0, far=3.0)
IMAGES, CORNERS, SCENES = torch.ones(3, 1, 8, 8), torch.zeros(3, 2), torch.ones(3, 2, 8, 8)
SEEN, SIGNAL, ONES = torch.ones(2, 3, 1, 8, 8), torch.ones(2, 1, 8, 8), torch.ones(2, 3, 1, 8, 8)


def colored(background):
    return VolumeForwardModel(4, num_samples=4, near=1.0, far=3.0, background=background)


def loss(**changes):
    given = {"signal": SIGNAL, "forward_model": MASK, "target": SEEN, "target_parameters": ONES}
    return forward_model_loss(**{**given, **changes})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        # One entry of the parameters for each signal, of its size.
        (lambda: CROP(IMAGES[:1], CORNERS), "`parameters` must be one entry for each of 1 observations, got (3, 2)"),
        (lambda: MASK(IMAGES, torch.ones(1, 1, 8, 8)), "`parameters` must be one entry for each of 3"),
        (lambda: CAMERA(SCENES, torch.zeros(1)), "`parameters` must be one entry for each of 3"),
        (lambda: CROP(IMAGES, None), "`parameters` must be those of CropForwardModel, got None"),
        (lambda: CROP(IMAGES, [[0, 0]] * 3), "`parameters` must be a tensor, got 'list'"),
        (lambda: CROP([[0.0]], CORNERS), "`signal` must be a tensor (batch, ...), got 'list'"),
        (lambda: CROP(torch.ones(3, 1, 16, 16), CORNERS), "`signal` must be (batch, channels, 8, 8), as"),
        (lambda: MASK(IMAGES, torch.ones(3, 3, 8, 8)), "`parameters` must be masks of 1 or all channels"),
        (lambda: MASK(IMAGES, torch.ones(3, 1, 1, 1)), "`parameters` must be masks of 1 or all channels"),
        (lambda: WARP(torch.ones(3, 3, 8, 8), IMAGES), "`signal` must be a flow (batch, 2, height, width)"),
        (lambda: colored([0.0, 1.0, 0.0])(SCENES, torch.zeros(3)), "`background` must be one number, or 1, one a"),
        # Parameters of another kind.
        (lambda: CAMERA.check_parameters(torch.zeros(1, 3, 3)), "`parameters` must be angles, or matrices of columns"),
        (lambda: CAMERA.check_parameters(2 * torch.eye(3)[None]), "`parameters` must be angles, or matrices of colum"),
        (lambda: CROP.check_parameters(CORNERS + 0j), "`parameters` must be real numbers, got 'torch.complex64'"),
        (lambda: map_parameters(torch.neg, {}), "`parameters` must be a tensor, or a dict of one or more"),
        (lambda: observe(SIGNAL, MASK, torch.ones(2)), "`parameters` must be a tensor (batch, views, ...), or a dict"),
        (lambda: observe(SIGNAL, MASK, {}), "`parameters` must be a tensor (batch, views, ...), or a dict of them"),
        (lambda: check_differentiable(CROP, (1, 8, 8), None), "`parameters` must be those of CropForwardModel"),
        (lambda: check_differentiable(CROP, (1, 8, 8), CORNERS, (1, -1)), "`signal_range` must be two numbers, low <"),
        # Weights and views.
        (lambda: lift_views(unet(), MASK, SEEN, ONES, torch.ones(1, 1)), "`weights` must be of (2, 3) samples and"),
        (lambda: lift_views(unet(), MASK, SEEN, ONES, None, torch.ones(2, 1)), "`sampled` must be of (2, 3) samples"),
        (lambda: lift_views(unet(), MASK, SEEN[:, :1], ONES), "`observations` must be of (2, 3) samples and views"),
        (lambda: loss(target=SEEN[:, :0], target_parameters=ONES[:, :0]), "`target` must be at least one observation"),
        (lambda: loss(novel=SEEN[:, :0], novel_parameters=ONES[:, :0]), "`novel` must be at least one observation"),
        (lambda: loss(novel=SEEN), "`novel_parameters` must be given"),
        (lambda: loss(novel_parameters=ONES), "`novel` must be given"),
        (lambda: loss(novel_weight=NAN), "`novel_weight` must be a number >= 0, got nan"),
        (lambda: loss(target_weights=torch.ones(2, 1)), "`target_weights` must be (2, 3), got (2, 1)"),
        (lambda: loss(target_weights=torch.tensor([[2.0, -1, 1]] * 2)), "`target_weights` must be >= 0 and leave"),
        # Cells of a ray.
        (lambda: render_cells(torch.ones(2, 4), torch.ones(1, 1, 4), 0.5), "`color` must be (batch, channels, ..."),
        (lambda: render_cells(torch.ones(2, 4), torch.ones(2, 4), 0.5), "`color` must be (batch, channels, ..., cell"),
        (lambda: render_cells(torch.ones(1, 4).int(), torch.ones(1, 1, 4), 0.5), "`density` must be floats"),
        (lambda: render_cells(torch.ones(1, 4), torch.ones(1, 1, 4), -0.5), "`length` must be a number > 0"),
        (lambda: render_cells(torch.ones(1, 4), torch.ones(1, 1, 4), 0.5, NAN), "`near` must be a number, got nan"),
    ],
)  # fmt: skip
def test_shapes_and_numbers(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_calls_of_the_pipeline():
    pipeline = crops(null_context=True)
    pipeline.unet.register_forward_hook(lambda *_: pytest.fail("the network was called"))
    seen, corners = context(2)
    latents = torch.zeros(2, 3, 1, 4, 4)
    for name, value, message in (
        ("num_views", True, "must be an integer >= 1, got True"),
        ("num_inference_steps", 2.0, "must be an integer >= 1, got 2.0"),
        ("eta", 2, "must be a number in [0, 1], got 2"),
        ("eta", None, "must be a number in [0, 1], got None"),
        ("guidance_scale", NAN, "must be a number, got nan"),
        ("context_noise", INF, "must be a number >= 0, got inf"),
        ("generator", [None, None], "must be one generator or a list of 2"),
        ("latents", "noise", "must be a real number, or several, got 'noise'"),
        ("latents", latents * NAN, "must be finite"),
        ("latents", latents + 0j, "must be a real number, or several"),
        ("target_parameters", "x", "must be a real number, or several, got 'x'"),
        ("target_parameters", {}, "must be a tensor, or a dict of one or more"),
        ("observations", "x", "must be a real number, or several, got 'x'"),
        ("observations", seen + 1j, "must be a real number, or several"),
        ("parameters", {}, "must be a tensor, or a dict of one or more"),
    ):
        shown = "parameters" if value == {} else name
        with pytest.raises(ValueError, match=re.escape(f"`{shown}` {message}")):
            pipeline(**{"observations": seen, "parameters": corners, name: value})
    for signals, message in (
        (None, "a real number, or several, got None"),
        (torch.zeros(2, 3, 8, 8), "(batch, 1, 8, 8), got (2, 3, 8, 8)"),
        (torch.full((2, 1, 8, 8), NAN), "finite"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"`signals` must be {message}")):
            pipeline.render(signals, corners)


def test_parts_of_the_pipeline():
    crop = CropForwardModel(4, 8)
    for parts, message in (
        (("net", scheduler(), crop), "`unet` must be a Module, got 'str'"),
        ((unet(), "ddim", crop), "`scheduler` must be a Diffusers scheduler, got 'str'"),
        ((unet(), DDIMInverseScheduler(prediction_type="sample"), crop), "must be one from noise to data"),
        ((unet(), scheduler(), torch.nn.Identity()), "`forward_model` must be a ForwardModel, got 'Identity'"),
    ):
        with pytest.raises(ValueError, match=message):
            ForwardModelPipeline(*parts)
    few = ForwardModelPipeline(unet(5), scheduler(), crop)
    with pytest.raises(ValueError, match="`unet` must be a network of 6 input channels, .* got 5"):
        few(*context(1), num_inference_steps=1)
    sizeless = UNet2DModel(in_channels=6, out_channels=1, **UNET)
    with pytest.raises(ValueError, match="`unet` must be a network that knows its `sample_size`"):
        ForwardModelPipeline(sizeless, scheduler(), crop)(*context(1))


def test_arrays_lists_and_wide_floats_are_taken():
    pipeline = crops()
    seen, corners = context(2)
    options = {"num_inference_steps": 1, "num_views": 1}
    expected = pipeline(seen, corners, generator=seeded(), **options).signals
    for given in ((seen.numpy(), corners.numpy()), (seen.tolist(), corners.tolist()), (seen.double(), corners)):
        assert torch.equal(pipeline(*given, generator=seeded(), **options).signals, expected)


def test_data(tmp_path):
    seen, corners = np.zeros((2, 3, 1, 4, 4)), np.zeros((2, 3, 2))

    def data(**arrays):
        np.savez(tmp_path / "data.npz", **{"observations": seen, "parameters": corners, **arrays})
        return ObservationDataset(tmp_path / "data.npz")

    for arrays, message in (
        ({"observations": seen + 1e300}, "`observations` must be finite in float32"),
        ({"parameters": corners + 1e300}, "`parameters` must be finite in float32"),
        ({"observations": np.float32(1)}, r"`observations` must be of shape \(n, views, ...\), got \(\)"),
        ({"parameters": np.float32(1)}, "`parameters` must be of shape"),
        ({"observations": seen + 0j}, "`observations` must be numbers, got 'complex128'"),
    ):
        with pytest.raises(ValueError, match=message):
            data(**arrays)
    data()
    whole = (tmp_path / "data.npz").read_bytes()
    np.save(tmp_path / "one.npy", seen)
    broken = bytearray(whole)
    broken[len(whole) // 3] ^= 255
    for contents in (b"", whole[: len(whole) // 2], bytes(broken), (tmp_path / "one.npy").read_bytes()):
        (tmp_path / "broken.npz").write_bytes(contents)
        with pytest.raises(ValueError, match="`train_data_dir` must be a NumPy file of plain arrays"):
            ObservationDataset(tmp_path / "broken.npz")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    for source in (None, "", tmp_path, tmp_path / "broken.parquet", tmp_path / "none.parquet"):
        with pytest.raises(ValueError, match="`train_data_dir` must be"):
            ObservationDataset(source)
    for most in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match="`max_samples` must be an integer >= 1 or left out"):
            ObservationDataset(tmp_path / "data.npz", max_samples=most)
    images = type("Images", (), {"description": "none"})()
    for name, value in {"num_views": 1.5, "signal_range": (1, 0), "seed": -1, "forward_model": None}.items():
        given = {"images": images, "forward_model": CROP, "num_views": 2, name: value}
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            SimulatedObservations(**given)


def test_a_run_is_refused_before_it_begins():
    def config(**changes):
        given = {"train_data_dir": "x.npz", "signal_shape": "1,8,8", "max_train_steps": 1, "forward_model": None}
        return ForwardModelConfig(**{**given, **changes})

    with pytest.raises(ValueError, match="`validation_inference_steps` must be at most `num_train_timesteps`, 1000"):
        config(validation_inference_steps=2000)
    with pytest.raises(ValueError, match="`signal_range` must be two numbers"):
        config(signal_range="0,inf")
    for model in (CropForwardModel, torch.nn.Identity(), "crop"):
        with pytest.raises(ValueError, match="`forward_model` must be a ForwardModel, or left out"):
            ForwardModelRecipe(config(), model)
