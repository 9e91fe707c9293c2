"""Dark frames taken apart: what the simulator put in comes out again."""

import numpy as np
import pytest
import torch

from diffusers_ext import (
    CameraTruth,
    DarkFrameModel,
    decouple_dark_frames,
    photon_transfer_gain,
    simulate_dark_frames,
    simulate_flat_pairs,
)

ISOS = (400, 800, 1600)
TRUTH = CameraTruth(bad_pixels=1e-3)


@pytest.fixture(scope="module")
def model():
    return decouple_dark_frames(simulate_dark_frames(TRUTH, ISOS, 24), black_level=512)


def test_offset_rows_columns_and_pixels(model):
    for i, iso in enumerate(ISOS):
        gain = TRUTH.gain(iso)
        assert model.offset[i].item() == pytest.approx(TRUTH.offset(iso), abs=0.03)
        assert model.row_std[i].item() == pytest.approx(TRUTH.row_std * gain, rel=0.06)
        assert model.column_std[i].item() == pytest.approx(TRUTH.column_std * gain, rel=0.1)
        assert model.pixel_std[i].item() == pytest.approx(TRUTH.pixel_std(iso), rel=0.01)
        assert model.frame_std[i].item() < 0.03
        # Residuals have the noise of rounding too.
        assert model.residuals[i].std().item() == pytest.approx((TRUTH.pixel_std(iso) ** 2 + 1 / 12) ** 0.5, rel=0.01)
        assert abs(model.residuals[i].mean().item()) < 0.01


@pytest.mark.parametrize("black_level", [0, 512, 65535])
def test_sixteen_bits_are_summed_like_sixty_four(black_level):
    rng = np.random.default_rng(0)
    frames = {iso: [rng.integers(0, 65536, (96, 80), dtype=np.uint16) for _ in range(3)] for iso in (400, 800)}
    wide = {iso: [frame.astype(np.int64) for frame in those] for iso, those in frames.items()}
    one, other = (decouple_dark_frames(f, black_level=black_level).state_dict() for f in (frames, wide))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_bad_pixels_are_found_and_left_out(model):
    assert np.array_equal(model.bad_pixels.numpy(), TRUTH.bad())
    assert 10 < model.bad_pixels.sum() < 50


def test_residuals_have_the_law_of_the_noise_not_of_a_gaussian(model):
    rng = np.random.default_rng(1)
    true = TRUTH.pixel_noise((10**6,), 1600, rng)
    true, found = true + rng.uniform(-0.5, 0.5, true.shape), model.residuals[2].double().numpy()
    skew = [((x - x.mean()) ** 3).mean() / x.std() ** 3 for x in (true, found)]
    assert skew[0] > 0.09
    assert skew[1] == pytest.approx(skew[0], rel=0.2)


def test_two_frames_are_enough():
    truth = CameraTruth(256, 384)
    model = decouple_dark_frames(simulate_dark_frames(truth, ISOS[:2], 2), black_level=512, num_pixels=1000)
    for i, iso in enumerate(ISOS[:2]):
        assert model.pixel_std[i].item() == pytest.approx(truth.pixel_std(iso), rel=0.01)
        assert model.row_std[i].item() == pytest.approx(truth.row_std * truth.gain(iso), rel=0.2)


def test_maps_are_as_good_as_the_regression_can_be(model):
    """Errors of slope and intercept against the standard errors of weighted least squares with known variances."""
    isos = np.array(ISOS, float)
    variance = [
        TRUTH.pixel_std(i) ** 2 + 1 / 12 + (TRUTH.row_std**2 + TRUTH.column_std**2) * TRUTH.gain(i) ** 2 for i in ISOS
    ]
    weights = 24 / np.array(variance)
    information = np.array(
        [[(weights * isos**2).sum(), (weights * isos).sum()], [(weights * isos).sum(), weights.sum()]]
    )
    expected = np.sqrt(np.diag(np.linalg.inv(information)))
    good = ~TRUTH.bad()
    for found, true, error in zip((model.slope[0], model.intercept[0]), TRUTH.maps(), expected, strict=True):
        assert (found.numpy() - true)[good].std() < 1.1 * error
        assert (found.numpy() - true)[good].std() > 0.8 * error
    shading = model.dark_shading(800).numpy() - TRUTH.dark_shading(800)
    assert shading[good].std() < 0.5 * TRUTH.pixel_std(800)


def test_numbers_between_isos(model):
    """Between calibrated ISOs deviations are near the truth; outside they are refused."""
    for iso in (500, 1130):
        assert model.statistic("pixel_std", iso) == pytest.approx(TRUTH.pixel_std(iso), rel=0.01)
        drawn = model.sample_residuals((200_000,), iso, torch.Generator().manual_seed(0))
        assert drawn.std().item() == pytest.approx((TRUTH.pixel_std(iso) ** 2 + 1 / 12) ** 0.5, rel=0.03)
    assert model.statistic("pixel_std", 800) == model.pixel_std[1].item()
    for iso in (399, 1601):
        with pytest.raises(ValueError, match="`iso` must be within the calibrated range, 400 to 1600"):
            model.dark_shading(iso)
    with pytest.raises(ValueError, match="`name` must be one of"):
        model.statistic("gain", 800)


def test_every_native_gain_has_its_own_fit():
    rng = np.random.default_rng(0)
    maps = rng.normal(0, 3, (2, 64, 96))

    def frames(iso):
        shading = maps[int(iso > 1600)] * iso / 1600
        return (shading + rng.normal(100, 1, shading.shape) for _ in range(12))

    model = decouple_dark_frames({iso: frames(iso) for iso in (3200, 400, 1600, 12800)}, native_limits=(1600,))
    assert list(model.config.isos) == [400, 1600, 3200, 12800]
    for iso in (400, 1600, 3200, 12800):
        expected = maps[int(iso > 1600)] * iso / 1600 + 100
        assert np.abs(model.dark_shading(iso).numpy() - expected).mean() < 0.3
    assert model.statistic("pixel_std", 2000) == model.pixel_std[2].item()  # of the upper range's lowest ISO
    assert not model.config.rounded


def test_hot_pixels_do_not_reach_the_rows():
    """Ten very hot pixels in one frame of 64 rows: rows without common noise are found to have none."""
    rng = np.random.default_rng(0)
    std = np.ones((64, 64))
    std[rng.integers(64, size=10), rng.integers(64, size=10)] = 300
    frames = {iso: (std * rng.standard_normal((64, 64)) for _ in range(64)) for iso in (100, 200)}
    model = decouple_dark_frames(frames)
    assert model.pixel_std.tolist() == pytest.approx([1, 1], rel=0.01)
    assert model.residuals.std(1).tolist() == pytest.approx([1, 1], rel=0.25)  # the means carry what is left of them


def test_gain_from_flats():
    pairs = simulate_flat_pairs(CameraTruth(256, 256), (400, 800, 1600))
    for iso, own in pairs.items():
        assert photon_transfer_gain(own, 512) == pytest.approx(TRUTH.gain(iso), rel=0.04)
    frames = simulate_dark_frames(CameraTruth(256, 256), (400, 800), 2)
    model = decouple_dark_frames(frames, pairs, black_level=512, num_residuals=10)
    slope, offset = model.config.iso_to_gain
    assert slope * 1600 + offset == pytest.approx(TRUTH.gain(1600), rel=0.02)
    assert decouple_dark_frames(simulate_dark_frames(TRUTH, (400, 800), 2)).config.iso_to_gain is None


def test_saved_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = DarkFrameModel.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert torch.equal(loaded.dark_shading(900), model.dark_shading(900))
    assert [path.suffix for path in tmp_path.iterdir() if path.suffix != ".json"] == [".safetensors"]


def test_frames_are_read_once_and_not_kept():
    """An iterator is enough, and no more than one frame of it is alive at a time."""
    import weakref

    alive = []

    def frames():
        rng = np.random.default_rng(0)
        for _ in range(6):
            frame = rng.normal(0, 1, (16, 16)).view(np.ndarray)
            alive.append(weakref.ref(frame))
            yield frame
            del frame
            assert sum(ref() is not None for ref in alive) <= 1

    decouple_dark_frames({100: frames(), 200: frames()})


def zeros(*shape):
    return np.zeros(shape)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ({400: [zeros(4, 4)] * 2, 800: [zeros(4, 6)] * 2}, "`frames` must be frames of one shape"),
        ({400: [zeros(4, 4), zeros(4, 6)], 800: []}, "`frames` must be frames of one shape"),
        ({400: [zeros(4, 4)] * 3}, "`frames` must be of at least 2 ISOs for each native gain, got"),
        ({400: [zeros(4, 4)], 800: [zeros(4, 4)] * 2}, "`frames` must be at least 2 frames at ISO 400, got 1"),
        ({400: [], 800: []}, "`frames` must be at least 2 frames at ISO 400, got 0"),
        ({0: [zeros(4, 4)] * 2, 800: [zeros(4, 4)] * 2}, "`iso` must be numbers > 0"),
        ({400: [zeros(4, 4) * np.nan] * 2, 800: []}, "`frames` must be finite, got NaN or infinity at ISO 400"),
        ({400: [zeros(4, 4, 3)] * 2, 800: []}, r"`frames` must be frames \(height, width\)"),
    ],
)
def test_bad_frames_are_refused(frames, message):
    with pytest.raises(ValueError, match=message):
        decouple_dark_frames(frames)


def test_bad_flats_are_refused():
    flat = np.random.default_rng(0).normal(500, 3, (8, 8))
    with pytest.raises(ValueError, match="`flats` must be pairs of frames of one shape"):
        photon_transfer_gain([(flat, flat[:4])])
    with pytest.raises(ValueError, match="`flats` must be at least two pairs"):
        photon_transfer_gain([(flat, flat + 1)])
    with pytest.raises(ValueError, match="`flats` must be pairs whose mean above the black level differs"):
        photon_transfer_gain([(flat, flat[::-1]), (flat, flat[:, ::-1])])
