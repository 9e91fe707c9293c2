"""The volume renderer against closed forms."""

import math

import pytest
import torch

from diffusers_ext import ProjectionForwardModel, VolumeForwardModel, render_cells

F64 = torch.float64


def random(*shape, seed=0):
    return torch.rand(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def rendered(density, color, length, background=0.0):
    return render_cells(
        torch.tensor([density], dtype=F64), torch.tensor([[color]], dtype=F64), length, 0.0, background
    )


@pytest.mark.parametrize("cells", [2, 4, 64])
def test_slab(cells):
    slab = rendered([1.0] * cells, [0.7] * cells, 2 / cells, background=0.1)
    assert slab.color.item() == pytest.approx(0.7 * (1 - math.exp(-2)) + 0.1 * math.exp(-2), abs=1e-12)
    assert slab.color.item() == pytest.approx(0.618799, abs=1e-6)
    assert slab.opacity.item() == pytest.approx(0.864665, abs=1e-6)
    if cells == 64:
        assert slab.depth.item() == pytest.approx(0.594065, abs=1e-6)


def test_half_opaque_before_opaque():
    two = rendered([math.log(2), math.inf], [1.0, 0.25], 1.0)
    assert two.color.item() == pytest.approx(0.625, abs=1e-12)
    assert two.depth.item() == pytest.approx(1.0, abs=1e-12)
    lengths = rendered([math.log(4), math.inf], [1.0, 0.25], torch.tensor([0.5, 1.5], dtype=F64))
    assert lengths.color.item() == pytest.approx(0.625, abs=1e-12)
    assert lengths.depth.item() == pytest.approx(0.5 * 0.25 + 0.5 * 1.25, abs=1e-12)


def test_weights_and_what_passes_sum_to_one():
    density = 5 * random(3, 4, 7)
    white = render_cells(density, torch.ones(3, 1, 4, 7, dtype=F64), 0.3, background=1.0)
    torch.testing.assert_close(white.color, torch.ones_like(white.color), rtol=0, atol=1e-12)
    passed = 1 - (1 - torch.exp(-density.sum(-1) * 0.3))
    torch.testing.assert_close(1 - white.opacity[:, 0], passed, rtol=0, atol=1e-12)


def test_a_scene_of_one_colour_is_a_slab():
    scene = torch.tensor([0.5, 0.7], dtype=F64).view(1, 2, 1, 1).expand(1, 2, 6, 6)
    model = VolumeForwardModel(size=6, num_samples=10, near=1.0, far=3.0, background=0.1, density_scale=2.0)
    seen = model.render(scene, torch.tensor([math.pi / 2]))
    torch.testing.assert_close(seen.color, torch.full((1, 1, 6), 0.618799, dtype=F64), rtol=0, atol=1e-6)
    assert seen.depth[0, 0, 0].item() > 1.0 * 0.864665  # from the camera, so behind `near`


def test_what_passes_is_the_exponential_of_the_projection():
    scene, angles = random(3, 1, 8, 8), torch.tensor([0.0, 0.4, 2.0])
    model = VolumeForwardModel(size=9, num_samples=16, near=0.0, far=4.0, output="opacity")  # cells of a pixel's width
    projection = ProjectionForwardModel(num_bins=9)(scene, angles)
    torch.testing.assert_close(-torch.log1p(-model(scene, angles)), projection, rtol=0, atol=1e-12)


@pytest.mark.parametrize("field_of_view", [None, 0.8])
def test_space_and_plane_agree(field_of_view):
    plane = random(2, 3, 6, 7)
    space = plane[:, :, :, None].expand(2, 3, 6, 5, 7)  # the same at every height
    kind = {"num_samples": 8, "near": 0.5, "far": 4.0, "background": (0.2, 0.4), "field_of_view": field_of_view}
    flat, full = VolumeForwardModel(size=11, **kind), VolumeForwardModel(size=(5, 11), **kind)
    angles = torch.tensor([0.3, 2.0])
    torch.testing.assert_close(full(space, angles)[:, :, 2], flat(plane, angles), rtol=0, atol=1e-12)
    # The lifts of a picture that is the same in every row agree at the middle too.
    picture = random(2, 2, 11)
    lifted, coverage = full.lift(picture[:, :, None].expand(2, 2, 5, 11), angles, (3, 6, 5, 7))
    for ours, theirs in zip((lifted, coverage), flat.lift(picture, angles, (3, 6, 7)), strict=True):
        torch.testing.assert_close(ours[:, :, :, 2], theirs, rtol=0, atol=1e-12)


def matrices(angles, distance, up):
    """Cameras of the class's angles as matrices, written down for themselves."""
    c, s, zero, one = angles.cos(), angles.sin(), torch.zeros_like(angles), torch.ones_like(angles)
    if up:
        rows = [
            [c, zero, -s, distance * s],
            [zero, one, zero, zero],
            [s, zero, c, -distance * c],
            [zero, zero, zero, one],
        ]
    else:
        rows = [[c, -s, distance * s], [s, c, -distance * c], [zero, zero, one]]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


@pytest.mark.parametrize("spatial", [(6, 6), (6, 6, 6)])
def test_an_angle_is_a_matrix(spatial):
    angles, scene = torch.tensor([0.3, 2.0], dtype=F64), random(2, 2, *spatial)
    model = VolumeForwardModel(size=5, num_samples=8, near=1.0, far=5.0, field_of_view=0.7, distance=2.5)
    camera = matrices(angles, 2.5, len(spatial) == 3)
    torch.testing.assert_close(model(scene, angles), model(scene, camera), rtol=0, atol=1e-12)
    picture = random(2, 1, *[5] * (len(spatial) - 1))
    for ours, theirs in zip(*(model.lift(picture, p, (2, *spatial)) for p in (angles, camera)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_where_a_point_is_seen():
    """A dense point right of the middle and near the camera at angle 0, in a space seen from four sides."""
    scene = torch.zeros(4, 1, 9, 9, 9, dtype=F64)
    scene[:, 0, 1, 4, 6] = 50.0  # x = 4/9, z = -2/3, and so near
    model = VolumeForwardModel(size=9, num_samples=90, near=0.0, far=4.0, output="depth")
    seen = model(scene, torch.arange(4) * math.pi / 2)[:, 0]
    places = [divmod(int(picture.argmax()), 9) for picture in seen]
    assert places == [(4, 6), (4, 1), (4, 2), (4, 7)]
    for picture, (row, column), depth in zip(seen, places, [4 / 3, 2 - 4 / 9, 2 + 2 / 3, 2 + 4 / 9], strict=True):
        assert abs(picture[row, column].item() - depth) < 0.15  # the front of a cell of 2/9, and interpolation
    # And it is lifted to the cells where it may be, all along its rays.
    lifted, coverage = model.lift(seen[:, None], torch.arange(4) * math.pi / 2, (1, 9, 9, 9))
    assert (lifted[:, 0, 1, 4, 6] > 1).all()
    torch.testing.assert_close(coverage[:, 0], torch.ones_like(coverage[:, 0]), rtol=0, atol=0)
    shares = torch.tensor([-2 / 3, -4 / 9, 2 / 3, 4 / 9], dtype=F64) / 2
    torch.testing.assert_close(coverage[:, 1, 1, 4, 6], shares, rtol=0, atol=1e-6)


def test_brightness_falls_from_near_to_far():
    model = VolumeForwardModel(8, 16, 0.0, 2.0, background=-1.0, density_scale=500.0, output="brightness")
    scene = torch.zeros(3, 1, 8, 8, dtype=F64)
    for i, row in enumerate((0, 4)):
        scene[i, 0, row:] = 1.0
    seen = model(scene, torch.zeros(3))
    assert seen[0, 0, 3].item() == pytest.approx(1 - 1 / 16, abs=1e-6)  # the middle of the first cell
    assert seen[1, 0, 3].item() == pytest.approx(0.06, abs=0.1)
    torch.testing.assert_close(seen[2], torch.full((1, 8), -1.0, dtype=F64), rtol=0, atol=1e-12)


def test_negative_densities_are_none_and_counted():
    scene = random(2, 1, 6, 6)
    scene[0, 0, :2, 0] = -3.0
    model = VolumeForwardModel(5, 6, output="opacity")
    seen = model(scene, torch.tensor([0.2, 0.4]))
    assert int(model.negative_densities) == 2
    torch.testing.assert_close(seen, model(scene.clamp(min=0), torch.tensor([0.2, 0.4])), rtol=0, atol=0)
    assert int(model.negative_densities) == 2


BAD = {
    "near": (lambda: VolumeForwardModel(8, near=2.0, far=2.0), "`near` must be at least 0 and below `far`, 2.0, got"),
    "num_samples": (lambda: VolumeForwardModel(8, num_samples=1), "`num_samples` must be an integer >= 2, got 1"),
    "size": (lambda: VolumeForwardModel(0), "`size` must be one or two integers >= 1, got 0"),
    "output": (lambda: VolumeForwardModel(8, output="normal"), "`output` must be one of"),
    "field_of_view": (lambda: VolumeForwardModel(8, field_of_view=4.0), "`field_of_view` must be an angle between"),
    "colourless": (lambda: VolumeForwardModel(8)(random(1, 1, 6, 6), torch.zeros(1)), "at least one colour"),
    "a line": (lambda: VolumeForwardModel(8)(random(1, 2, 6), torch.zeros(1)), "`signal` must be"),
    "plane": (lambda: VolumeForwardModel((8, 8))(random(1, 2, 6, 6), torch.zeros(1)), "`size` must be of 1 numbers"),
    "matrix": (lambda: VolumeForwardModel(8)(random(1, 2, 6, 6), torch.eye(4)[None]), r"matrices \(batch, 3, 3\)"),
    "camera": (lambda: VolumeForwardModel(8).check_parameters(torch.zeros(1, 3)), "must be angles in radians"),
    "picture": (lambda: VolumeForwardModel(8).lift(random(1, 1, 7), torch.zeros(1), (2, 6, 6)),
                r"`observation` must be \(batch, channels, 8\), got \(1, 1, 7\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()
