"""Noisy images from clean ones: variances, rows and columns, the presets' laws, and a circle through dark frames."""

import math

import pytest
import torch

from diffusers_ext import (
    CameraProfile,
    CameraTruth,
    NativeGain,
    RawNoiseSynthesizer,
    SensorNoisePipeline,
    decouple_dark_frames,
    simulate_dark_frames,
    unpack_bayer,
)
from diffusers_ext.methods.pnnp.camera import CAMERAS

from .test_proxy import straight

SONY = CAMERAS["sony_a7s2"]
CAMERA = CameraProfile(4095, 95, (0.01, 0.0), (NativeGain(100, 200),), ratio=(10.0, 20.0))
SPAN = 4000


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def dark():
    """Dark frames at ISO 100 and 200 with deviations that are known."""
    frames = simulate_dark_frames(CameraTruth(16, 16), (100, 200), 2)
    model = decouple_dark_frames(frames, num_residuals=1000)
    for name, values in (("pixel", (2, 4)), ("row", (3, 6)), ("column", (1.5, 3)), ("frame", (0.5, 1))):
        getattr(model, f"{name}_std").copy_(torch.tensor(values))
    return model


def noise(synthesizer, level=0.5, iso=200.0, shape=(64, 4, 32, 32), ratio=10.0):
    """Returns the noise of an even image in DN."""
    clean = torch.full(shape, level)
    noisy = synthesizer(clean, iso, ratio, seeded()).noisy
    return (noisy - clean) / ratio * SPAN


def test_light_has_its_own_variance():
    """Mean y, variance K y."""
    only = RawNoiseSynthesizer(camera=CAMERA, terms=["shot"])
    for level in (0.1, 0.8):
        found, light = noise(only, level), level * SPAN / 10
        assert abs(found.mean().item()) < 0.01 * light
        assert found.var().item() == pytest.approx(2.0 * light, rel=0.01)


def test_all_parts_add_up(dark):
    """K y + s_pixel^2 + s_row^2 + s_column^2 + s_offset^2 + 1/12."""
    whole = RawNoiseSynthesizer(straight(1.5, 2.0), dark, CAMERA, augment=False)
    found = noise(whole, 0.2, shape=(1000, 4, 12, 12))
    pixel = (2 * 1.5) ** 2 + 2.0**2
    expected = 2 * 0.2 * SPAN / 10 + pixel + 6**2 + 3**2 + 1 + 1 / 12
    assert found.var().item() == pytest.approx(expected, rel=0.03)
    without = {"shot": 160, "pixel": pixel, "row": 36, "column": 9}
    for term, variance in without.items():
        terms = [t for t in ("shot", "pixel", "row", "column", "offset", "quantization") if t != term]
        part = RawNoiseSynthesizer(straight(1.5, 2.0), dark, CAMERA, terms=terms, augment=False)
        rest = noise(part, 0.2, shape=(600, 4, 12, 12)).var().item()
        assert rest == pytest.approx(expected - variance, rel=0.05)


def test_rows_and_columns_are_the_sensor_s(dark):
    rows = noise(RawNoiseSynthesizer(dark=dark, camera=CAMERA, terms=["row"], augment=False), shape=(40, 4, 64, 8))
    assert torch.equal(rows, rows[..., :1].expand_as(rows))
    assert torch.equal(rows[:, 0], rows[:, 1])
    assert torch.equal(rows[:, 2], rows[:, 3])
    mosaic = unpack_bayer(rows)[..., 0]  # (images, sensor rows)
    assert mosaic.std().item() == pytest.approx(6, rel=0.05)
    neighbours = (mosaic[:, 1:] * mosaic[:, :-1]).mean() / mosaic.var()
    assert abs(neighbours.item()) < 0.06
    columns = noise(
        RawNoiseSynthesizer(dark=dark, camera=CAMERA, terms=["column"], augment=False), shape=(9, 4, 8, 64)
    )
    assert torch.equal(columns, columns[..., :1, :].expand_as(columns))
    assert torch.equal(columns[:, 0], columns[:, 3])
    assert torch.equal(columns[:, 1], columns[:, 2])
    assert not torch.equal(columns[:, 0], columns[:, 1])


def test_presets_have_the_published_laws():
    low, high = SONY.native_gain(800), SONY.native_gain(3200)
    assert (low.iso_max, high.iso_min) == (1600, 2000)
    gain = 0.0009546 * 800 - 0.00193
    assert SONY.row_std(800) == pytest.approx(math.exp(0.78782 * math.log(gain) - 0.34227))
    assert SONY.gaussian_std(800) == pytest.approx(math.exp(0.82966 * math.log(gain) + 1.49343))
    only = RawNoiseSynthesizer(camera=SONY, terms=["row"], augment=False)
    clean = torch.zeros(200, 4, 32, 2)
    rows = only(clean, 800, 1.0, seeded()).noisy * (16383 - 512)
    assert rows.std().item() == pytest.approx(1.25 * SONY.row_std(800), rel=0.02)
    # In one of ten images rows are 3.5 times the law instead, and the offset is ten times as large.
    mixed = RawNoiseSynthesizer(camera=SONY, terms=["row"])(torch.zeros(3000, 4, 8, 1), 800, 1.0, seeded()).noisy
    expected = SONY.row_std(800) ** 2 * (0.9 * 1.25**2 + 0.1 * 3.5**2)
    assert (mixed * 15871).var().item() == pytest.approx(expected, rel=0.08)
    offset = RawNoiseSynthesizer(camera=SONY, terms=["offset"])(torch.zeros(4000, 4, 1, 1), 3200, 1.0, seeded()).noisy
    assert (offset * 15871).var().item() == pytest.approx(0.004**2 * 3200 * (0.9 + 0.1 * 100), rel=0.25)
    pixels = RawNoiseSynthesizer(camera=SONY, terms=["pixel"])(torch.zeros(500, 4, 16, 16), 800, 1.0, seeded()).noisy
    stds = pixels.flatten(1).std(1) * 15871 / SONY.gaussian_std(800)
    assert stds.std().item() == pytest.approx(0.05, rel=0.2)


def test_what_is_drawn():
    synthesizer = RawNoiseSynthesizer(camera=SONY)
    iso, ratio = synthesizer.draw(4000, seeded())
    low = iso <= 1600
    assert low.float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert bool(((iso >= 50) & (iso <= 25600) & ~((iso > 1600) & (iso < 2000))).all())
    assert iso[low].log().mean().item() == pytest.approx(math.log(50 * 1600) / 2, abs=0.06)
    assert ratio.mean().item() == pytest.approx(200, rel=0.02)
    assert (ratio.min() >= 100, ratio.max() <= 300) == (True, True)
    clean = torch.rand(3, 4, 16, 16, generator=seeded(1))
    one, other = (synthesizer(clean, generator=seeded(2)) for _ in range(2))
    assert torch.equal(one.noisy, other.noisy)
    assert torch.equal(synthesizer.corrupt(clean, seeded(2)), one.noisy)
    assert not torch.equal(synthesizer.corrupt(clean, seeded(3)), one.noisy)
    narrow = RawNoiseSynthesizer(camera=SONY, iso=(3200, 3200), ratio=(2, 2)).draw(50, seeded())
    assert (narrow[0].unique().tolist(), narrow[1].unique().tolist()) == ([3200.0], [2.0])


def test_the_camera_cuts(dark):
    strong = RawNoiseSynthesizer(straight(3000.0, 0.1), dark, CAMERA, augment=False)
    noisy = strong(torch.full((1, 4, 64, 64), 0.5), 200, 10.0, seeded()).noisy
    assert noisy.min().item() == pytest.approx(-95 / 4095 * 10)
    assert noisy.max().item() == pytest.approx(10)


def test_recorded_noise_brings_its_own_rounding():
    frames = simulate_dark_frames(CameraTruth(32, 32), (400, 800), 24)
    dark = decouple_dark_frames(frames, black_level=512)
    terms = ["pixel", "quantization"]
    found = RawNoiseSynthesizer(dark=dark, pixel="recorded", terms=terms, augment=False)
    noisy = found(torch.zeros(20, 4, 64, 64), 800, 1.0, seeded()).noisy * 15871
    assert noisy.std().item() == pytest.approx(dark.residuals[1].std().item(), rel=0.01)


def test_drawn_dark_frames_come_apart_again():
    """Frames of the pipeline, taken apart, give the deviations that it drew them with."""
    truth = CameraTruth(96, 128)
    dark = decouple_dark_frames(simulate_dark_frames(truth, (400, 1600), 12), black_level=512, num_residuals=10)
    proxy = straight(0.22, 0.8, (400, 1600))
    camera = CameraProfile(16383, 512, (0.001, 0.0), (NativeGain(400, 1600),))
    pipeline = SensorNoisePipeline(proxy, dark, camera.to_dict())
    pipeline.set_progress_bar_config(disable=True)
    frames = {iso: pipeline(iso, 12, seeded(int(iso))).frames for iso in (400, 1600)}
    assert frames[400].shape == (12, 96, 128)
    again = decouple_dark_frames(frames, black_level=512)
    for i, iso in enumerate((400, 1600)):
        assert again.pixel_std[i].item() == pytest.approx(math.hypot(0.22 * 0.01 * iso, 0.8), rel=0.01)
        assert again.row_std[i].item() == pytest.approx(dark.row_std[i].item(), rel=0.12)
        assert again.offset[i].item() == pytest.approx(dark.offset[i].item(), abs=0.2)
    assert CameraProfile.from_dict(dict(pipeline.config["camera"])) == camera == pipeline.profile
    with pytest.raises(ValueError, match="`iso` must be within the calibrated range"):
        pipeline(3200)
    with pytest.raises(ValueError, match="`num_frames` must be an integer >= 1"):
        pipeline(400, 0)
    with pytest.raises(ValueError, match="`camera` must be a camera's entries"):
        SensorNoisePipeline(proxy, dark)


def test_wrong_arguments_are_refused(dark):
    synthesizer, clean = RawNoiseSynthesizer(camera=SONY), torch.rand(2, 4, 8, 8)
    for name, call in {
        "ratio": lambda: synthesizer(clean, 800, 0.5),
        "iso": lambda: synthesizer(clean, 0, 100.0),
        "clean": lambda: synthesizer(clean[0]),
        "terms": lambda: RawNoiseSynthesizer(terms=["dust"]),
        "proxy": lambda: RawNoiseSynthesizer(pixel="proxy"),
        "dark": lambda: RawNoiseSynthesizer(pixel="recorded"),
        "pixel": lambda: RawNoiseSynthesizer(pixel="poisson"),
        "white_level": lambda: CameraProfile(95, 95, (1, 0), (NativeGain(1, 2),)),
        "iso_to_gain": lambda: CameraProfile(4095, 95, (0.001, -1), (NativeGain(100, 200),)),
        "native_gains": lambda: CameraProfile(4095, 95, (1, 0), (NativeGain(200, 100),)),
    }.items():
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            call()
    with pytest.raises(ValueError, match="`clean` must be finite"):
        synthesizer(clean * math.nan)
    with pytest.raises(ValueError, match="`iso` must be a number or one for each of 2 images"):
        synthesizer(clean, [800.0] * 3, 100.0)
    with pytest.raises(ValueError, match="`iso` must be within the camera's"):
        RawNoiseSynthesizer(dark=dark, camera=CAMERA, iso=(400, 800))
