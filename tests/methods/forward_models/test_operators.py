"""The linear forward models, flow and generators against closed forms."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from diffusers_ext import (
    BlurForwardModel,
    CropForwardModel,
    DownsampleForwardModel,
    GeneratorForwardModel,
    MaskForwardModel,
    ProjectionForwardModel,
    VolumeForwardModel,
    WarpForwardModel,
    check_differentiable,
)

F64 = torch.float64
LINEAR = {
    "crop": CropForwardModel(size=(3, 2), sample_size=(8, 6)),
    "mask": MaskForwardModel(sample_size=(8, 6)),
    "blur": BlurForwardModel(sigma=1.3),
    "blur and subsample": BlurForwardModel(sigma=0.7, factor=2),
    "downsample": DownsampleForwardModel(factor=2),
    "projection": ProjectionForwardModel(num_bins=7, extent=1.2),
}


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=draws(seed))


def decoder():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 64), nn.Unflatten(1, (1, 8, 8))).double()


@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_model_has_its_adjoint_as_lift_and_is_additive(name):
    model = LINEAR[name]
    parameters = model.sample_parameters(5, draws(1))
    model.check_parameters(parameters, 5)
    x, other = random(5, 2, 8, 6), random(5, 2, 8, 6, seed=1)
    seen = model(x, parameters)
    assert seen.dtype == F64
    y = random(*seen.shape, seed=2)
    lifted, coverage = model.lift(y, parameters, (2, 8, 6))
    left, right = (seen * y).flatten(1).sum(1), (x * lifted).flatten(1).sum(1)
    torch.testing.assert_close(left, right, rtol=0, atol=1e-10)
    torch.testing.assert_close(coverage, model.lift(torch.ones_like(y), parameters, (2, 8, 6))[0], rtol=0, atol=0)
    both = model(x - 2 * other, parameters)
    torch.testing.assert_close(both, seen - 2 * model(other, parameters), rtol=0, atol=1e-10)
    assert model.observation_shape((2, 8, 6), parameters) == tuple(seen.shape[1:])
    one = model(x[3:4], parameters[3:4])  # a batch is its members
    torch.testing.assert_close(seen[3:4], one, rtol=0, atol=1e-12)


def test_crops():
    crop = LINEAR["crop"]
    corner, x = torch.tensor([[0, 0], [5, 4], [2, 1]]), random(3, 2, 8, 6)
    seen = crop(x, corner)
    assert torch.equal(seen[2], x[2, :, 2:5, 1:3])
    lifted, mask = crop.lift(seen, corner, (2, 8, 6))
    assert torch.equal(crop(lifted, corner), seen)  # P P' = I
    assert torch.equal(lifted, mask * x)  # P' P
    drawn = crop.sample_parameters(2000, draws())
    assert drawn.unique(dim=0).shape == (6 * 5, 2)


def test_masks():
    mask = MaskForwardModel(sample_size=8, keep_probability=0.3)
    drawn = mask.sample_parameters(200, draws())
    assert abs(drawn.mean().item() - 0.3) < 4 * math.sqrt(0.21 / 12800)
    x = random(200, 1, 8, 8)
    assert torch.equal(mask(mask(x, drawn), drawn), x * drawn)


def test_pooling_and_its_adjoint():
    pool, y, none = DownsampleForwardModel(factor=2), random(3, 1, 4, 3), torch.zeros(3, 0)
    torch.testing.assert_close(pool(pool.lift(y, none, (1, 8, 6))[0], none), y / 4, rtol=0, atol=1e-12)


def test_blur_keeps_constants_and_has_its_width():
    blur = BlurForwardModel(sigma=1.3)
    first = torch.zeros(1, 2)
    constant = torch.full((1, 3, 8, 6), 0.7, dtype=F64)
    torch.testing.assert_close(blur(constant, first), constant, rtol=0, atol=1e-12)
    point = torch.zeros(1, 1, 33, 33, dtype=F64)
    point[..., 16, 16] = 1
    seen, places = blur(point, first)[0, 0], torch.arange(33, dtype=F64) - 16
    assert seen.sum().item() == pytest.approx(1, abs=1e-12)
    assert (seen.sum(0) * places**2).sum().item() == pytest.approx(1.3**2, rel=2e-3)  # the kernel ends at 4 sigma
    torch.testing.assert_close(seen, seen.T, rtol=0, atol=1e-15)


def test_phases_of_the_subsampling_make_up_the_whole():
    whole, part, x = BlurForwardModel(sigma=0.7), BlurForwardModel(sigma=0.7, factor=2), random(4, 1, 8, 6)
    phases = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    full, seen = whole(x[:1], phases[:1]), part(x[:1].expand(4, -1, -1, -1), phases)
    for (row, column), piece in zip(phases.tolist(), seen, strict=True):
        torch.testing.assert_close(piece, full[0, :, row::2, column::2], rtol=0, atol=1e-12)


def axes(n):
    places = (torch.arange(n, dtype=F64) + 0.5) * 2 / n - 1
    return torch.meshgrid(places, places, indexing="ij")


def test_projection_of_a_disc():
    y, x = axes(128)
    disc = (2.0 * ((x**2 + y**2) < 0.25)).double().expand(5, 1, 128, 128)
    angles = torch.tensor([0.0, 0.3, 0.7, 1.2, 2.5])
    chord = ProjectionForwardModel(num_bins=10)(disc, angles)[:, 0, 6]  # s = .3
    torch.testing.assert_close(chord, torch.full_like(chord, 1.6), rtol=0.02, atol=0)
    mass = ProjectionForwardModel(num_bins=128)(disc, angles)[:, 0].sum(1) * 2 / 128
    torch.testing.assert_close(mass, torch.full_like(mass, math.pi / 2), rtol=0.01, atol=0)


def test_projection_is_that_of_scikit_image_at_minus_the_angle():
    transform = pytest.importorskip("skimage.transform")
    y, x = axes(33)
    image = torch.rand(33, 33, dtype=F64, generator=draws()) * ((x**2 + y**2) < 0.9)
    degrees = [0, 10, 37, 90, 123]
    theirs = transform.radon(image.numpy(), theta=[-a for a in degrees], circle=True).T * (2 / 33)
    model = ProjectionForwardModel(num_bins=33)
    ours = model(image.expand(5, 1, 33, 33), torch.tensor(degrees, dtype=F64).deg2rad())[:, 0].numpy()
    assert np.abs(ours - theirs).max() <= 0.01 * np.abs(theirs).max()
    assert model(image[None, None], torch.zeros(1, 1)).shape == (1, 1, 33)  # angles (batch, 1) too


def test_projection_at_an_angle_and_half_a_turn_on_are_mirrored():
    model, x = ProjectionForwardModel(num_bins=8), random(1, 1, 8, 8)
    there, back = model(x, torch.tensor([0.4])), model(x, torch.tensor([0.4 + math.pi]))
    torch.testing.assert_close(there, back.flip(-1), rtol=0, atol=1e-6)
    drawn = ProjectionForwardModel(num_bins=8, num_angles=12).sample_parameters(500, draws())
    torch.testing.assert_close(drawn.unique(), torch.arange(12) * math.pi / 12)


def test_flow():
    warp, image = WarpForwardModel(flow_scale=2.0), random(2, 3, 6, 7)
    still = torch.zeros(2, 2, 6, 7, dtype=F64)
    torch.testing.assert_close(warp(still, image), image, rtol=0, atol=1e-12)
    flow = torch.tensor([1.0, -0.5], dtype=F64).view(1, 2, 1, 1)  # two pixels to the right, one up
    for shape in [(6, 7), (3, 3), (1, 1)]:  # coarse flows are made finer
        moved = warp(flow.expand(2, 2, *shape), image)
        torch.testing.assert_close(moved[:, :, :-1, 2:], image[:, :, 1:, :-2], rtol=0, atol=1e-12)
        torch.testing.assert_close(moved[:, :, -1, 2:], image[:, :, -1, :-2], rtol=0, atol=1e-12)  # repeated border
    lifted, coverage = warp.lift(moved, image, (2, 1, 1))
    assert torch.equal(lifted, torch.cat([moved, image], 1))
    assert coverage.shape == (2, 1, 6, 7)


def test_generator():
    model = GeneratorForwardModel(decoder(), then=CropForwardModel(size=(4, 8), sample_size=8))
    corner, latents = torch.tensor([[0, 0], [4, 0]]), random(2, 4)
    images = model.decoder(latents)
    assert torch.equal(model(latents, corner), torch.stack([images[0, :, :4], images[1, :, 4:]]))
    assert torch.equal(GeneratorForwardModel(decoder())(latents, torch.zeros(2, 0)), images)
    model.train()
    assert not model.decoder.training
    assert not any(p.requires_grad for p in model.parameters())
    # The lift is J' y with the Jacobian at 0.
    jacobian = torch.func.jacrev(lambda z: model(z[None], corner[:1])[0])(torch.zeros(4, dtype=F64))
    y = random(1, 1, 4, 8)
    lifted, coverage = model.lift(y, corner[:1], (4,))
    torch.testing.assert_close(lifted[0], (jacobian * y[0, ..., None]).sum((0, 1, 2)), rtol=0, atol=1e-10)
    torch.testing.assert_close(coverage[0], jacobian.sum((0, 1, 2)), rtol=0, atol=1e-10)


CURVED = {
    "warp": (WarpForwardModel(), lambda: random(2, 1, 4, 5), (2, 4, 5)),
    "generator": (GeneratorForwardModel(decoder(), CropForwardModel(4, 8)), lambda: torch.zeros(2, 2), (4,)),
    "volume": (VolumeForwardModel(4, 5, 0.5, 3.5, 0.3), lambda: torch.tensor([0.2, 1.9]), (2, 4, 5)),
    "brightness": (VolumeForwardModel(4, 5, 0, 2.6, -1, 4.0, "brightness"), lambda: torch.tensor([0.2]), (1, 4, 5)),
    "depth in space": (VolumeForwardModel((2, 3), 4, 1, 5, field_of_view=0.8, output="depth"),
                       lambda: torch.tensor([0.3]), (1, 3, 2, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", [*LINEAR, *CURVED])
def test_gradients(name):
    """Off the kinks: flows between pixels, densities above 0."""
    if name in LINEAR:
        model, shape = LINEAR[name], (1, 8, 6)
        parameters = model.sample_parameters(2, draws(3))
    else:
        model, made, shape = CURVED[name]
        parameters = made()
    signal = (0.2 + 0.5 * torch.rand(len(parameters), *shape, dtype=F64, generator=draws(4))).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: model(s, parameters), signal)
    check_differentiable(model, shape, parameters, (0.1, 0.9), draws())


@pytest.mark.parametrize("name", [*LINEAR, *CURVED])
def test_no_lift_is_zero(name):
    model, made, shape = CURVED.get(name) or (
        LINEAR[name],
        lambda: LINEAR[name].sample_parameters(2, draws(3)),
        (1, 8, 6),
    )
    parameters = made()
    observation = torch.rand(len(parameters), *model.observation_shape(shape, parameters), generator=draws())
    for part in model.double().lift(observation.double(), parameters, shape):
        assert (part.flatten(1) != 0).any(1).all()
        assert not part.requires_grad


BAD = {
    "size": (lambda: CropForwardModel(size=9, sample_size=8), "`size` must be at most `sample_size`"),
    "crop size": (lambda: CropForwardModel(size=0, sample_size=8), "`size` must be one or two integers > 0"),
    "crop outside": (lambda: LINEAR["crop"].check_parameters(torch.tensor([[0, 0], [6, 0]])),
                     r"whole numbers from \(0, 0\) to \(5, 4\), got \[\[6, 0\]\]"),
    "crop between": (lambda: LINEAR["crop"].check_parameters(torch.tensor([[0.5, 0]])), "must be whole numbers"),
    "crop of a row": (lambda: LINEAR["crop"].check_parameters(torch.zeros(3)), r"\(batch, 2\) of rows and columns"),
    "missing": (lambda: LINEAR["crop"].check_parameters(None), "must be those of CropForwardModel, got None"),
    "of some": (lambda: LINEAR["crop"].check_parameters(torch.zeros(2, 2), 3), "one entry for each of 3 observations"),
    "NaN": (lambda: LINEAR["projection"].check_parameters(torch.tensor([math.nan])), "`parameters` must be finite"),
    "no angle": (lambda: LINEAR["projection"].check_parameters(torch.zeros(2, 2)), "must be angles in radians"),
    "grey mask": (lambda: LINEAR["mask"].check_parameters(torch.full((1, 1, 8, 6), 0.5)), "masks of 0 and 1, got"),
    "keep": (lambda: MaskForwardModel(8, 0.0), "`keep_probability` must be in"),
    "sigma": (lambda: BlurForwardModel(0.0), "`sigma` must be a number > 0, got 0.0"),
    "factor": (lambda: DownsampleForwardModel(0), "`factor` must be an integer >= 1, got 0"),
    "phase": (lambda: BlurForwardModel(1.0, 2).check_parameters(torch.tensor([[2, 0]])), r"to .1, 1.*, got"),
    "divisible": (lambda: DownsampleForwardModel(4)(random(1, 1, 8, 6), torch.zeros(1, 0)), "divisible by 4"),
    "bins": (lambda: ProjectionForwardModel(0), "`num_bins` must be an integer >= 1"),
    "flow scale": (lambda: WarpForwardModel(0.0), "`flow_scale` must be a number > 0"),
    "no image": (lambda: WarpForwardModel().check_parameters(torch.zeros(2, 3)), "must be images"),
    "images unlike": (lambda: WarpForwardModel().lift(random(1, 1, 4, 4), random(1, 1, 5, 4), (2, 3, 3)),
                      r"`observation` must be \(1, 1, 5, 4\), got \(1, 1, 4, 4\)"),
    "lift unlike": (lambda: LINEAR["crop"].lift(random(1, 1, 4, 4), torch.zeros(1, 2), (1, 8, 6)),
                    r"`observation` must be \(1, 1, 3, 2\), got \(1, 1, 4, 4\)"),
    "no module": (lambda: GeneratorForwardModel("decoder"), "`decoder` must be a torch module, got 'str'"),
    "draw images": (lambda: WarpForwardModel().sample_parameters(2), "WarpForwardModel draws no parameters by itself"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()
