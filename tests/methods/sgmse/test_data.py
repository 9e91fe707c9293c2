"""Data to train on: what is cut out, mixed and reverberated is what it says."""

import numpy as np
import pytest
import torch

from diffusers_ext import MixedSpeech, PairedSpeech

soundfile = pytest.importorskip("soundfile")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def write(path, wave, rate=8000):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave, rate, subtype="FLOAT")


def noise(*shape, seed=0):
    return 0.1 * np.random.default_rng(seed).standard_normal(shape)


def test_pairs_are_cut_out_of_one_place(tmp_path):
    ramp = np.stack([np.arange(1000), -np.arange(1000)], axis=1) / 1000
    write(tmp_path / "clean" / "b" / "long.wav", ramp)
    write(tmp_path / "noisy" / "b" / "long.wav", 0.5 * ramp)
    write(tmp_path / "clean" / "short.wav", noise(30))
    write(tmp_path / "noisy" / "short.wav", noise(30, seed=1))
    data = PairedSpeech(tmp_path / "clean", tmp_path / "noisy", 8000, 100)
    assert len(data) == 2
    places, signs = set(), set()
    for seed in range(20):
        item = data.get(0, seeded(seed))
        torch.testing.assert_close(item["noisy"], 0.5 * item["clean"])
        start, sign = round(abs(item["clean"][0].item()) * 1000), np.sign(item["clean"][-1].item())
        torch.testing.assert_close(item["clean"], torch.from_numpy(sign * ramp[start : start + 100, 0]).float())
        places.add(start)
        signs.add(sign)
        assert torch.equal(data.get(0, seeded(seed))["clean"], item["clean"])
    assert len(places) > 15
    assert signs == {1, -1}
    short = data.get(1, seeded())["noisy"]
    assert not short[:35].any()
    assert not short[65:].any()
    torch.testing.assert_close(short[35:65], torch.from_numpy(noise(30, seed=1)).float())


def test_other_rates_are_resampled(tmp_path):
    tone = np.sin(2 * np.pi * 200 * np.arange(16000) / 16000)
    for name in ("clean", "noisy"):
        write(tmp_path / name / "tone.wav", tone, 16000)
    item = PairedSpeech(tmp_path / "clean", tmp_path / "noisy", 8000, 4000).get(0, seeded())
    spectrum = torch.fft.rfft(item["clean"] * torch.hann_window(4000)).abs()
    assert spectrum.argmax().item() == 100  # of 2 Hz each
    assert item["clean"].shape == (4000,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d / "noisy" / "a.wav").rename(d / "noisy" / "z.wav"), r"'a\.wav' of .*clean.* has no partner"),
        (lambda d: write(d / "noisy" / "a.wav", noise(201)), r"pairs of equal frames, got 200 in .* and 201 in"),
        (lambda d: write(d / "noisy" / "a.wav", noise(200), 16000), "pairs of equal samplerate, got 8000 in"),
        (lambda d: write(d / "noisy" / "a.wav", noise(200, 2)), "pairs of equal channels, got 1 in"),
        (
            lambda d: (d / "noisy" / "a.wav").write_bytes(b"x"),
            r"`train_data_dir` must be a sound file that can be read",
        ),
        (lambda d: (d / "noisy").rename(d / "other"), "`train_data_dir` must be an existing folder"),
    ],
)
def test_pairs_that_are_none(tmp_path, change, message):
    for name in ("clean", "noisy"):
        write(tmp_path / name / "a.wav", noise(200))
    change(tmp_path)
    with pytest.raises(ValueError, match=message):
        PairedSpeech(tmp_path / "clean", tmp_path / "noisy", 8000, 100)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "speech" / "a.wav", noise(4000))
    write(tmp_path / "noise" / "short.wav", noise(300, seed=1))
    write(tmp_path / "noise" / "long.wav", noise(9000, seed=2))
    return tmp_path


def test_noise_has_its_snr(folder):
    found = []
    for snr in ((5.0, 5.0), (-5.0, 15.0)):
        data = MixedSpeech(folder / "speech", folder / "noise", 8000, 1000, snr=snr)
        for seed in range(30):
            item = data.get(0, seeded(seed))
            added = item["noisy"] - item["clean"]
            found.append(10 * (item["clean"].square().sum() / added.square().sum()).log10().item())
        assert torch.equal(data.get(0, seeded(7))["noisy"], data.get(0, seeded(7))["noisy"])
    np.testing.assert_allclose(found[:30], 5, atol=1e-3)
    assert -5 <= min(found[30:]) < 0
    assert 10 < max(found[30:]) <= 15


def test_low_frequencies_are_taken_away_before_mixing(tmp_path):
    t = np.arange(16000) / 8000
    write(tmp_path / "speech" / "a.wav", 0.3 * np.sin(2 * np.pi * 25 * t) + 0.1 * np.sin(2 * np.pi * 1000 * t))
    write(tmp_path / "noise" / "n.wav", 0.5 * np.sin(2 * np.pi * 25 * t) + 0.1 * np.sin(2 * np.pi * 2000 * t))
    item = MixedSpeech(tmp_path / "speech", tmp_path / "noise", 8000, 12000, (0, 0), high_pass=100).get(0, seeded())
    spectrum = torch.fft.rfft(item["noisy"][4000:]).abs()
    parts = {hertz: spectrum[hertz - 2 : hertz + 3].max().item() for hertz in (25, 1000, 2000)}
    # Order 4 at a quarter of its corner: 48 dB; what is left are two tones of one energy, 0 dB.
    assert parts[25] < 0.03 * parts[1000]
    assert parts[2000] == pytest.approx(parts[1000], rel=0.02)


def test_rooms(tmp_path):
    """An impulse as speech shows the room: a direct path of 1 in time with what is clean, and a decaying tail."""
    impulse = np.zeros(4000)
    impulse[100] = 1
    write(tmp_path / "speech" / "a.wav", impulse)
    ratios = []
    for seed in range(10):
        data = MixedSpeech(tmp_path / "speech", None, 8000, 4000, reverberation_time=(0.3, 0.3))
        item = data.get(0, seeded(seed))
        assert item["clean"].argmax() == 100
        torch.testing.assert_close(item["noisy"][:116], item["clean"][:116])
        tail = item["noisy"][116:]
        ratios.append(-10 * tail.square().sum().log10().item())
        early, late = (tail[i : i + 400].square().mean() for i in (0, 1800))
        # 60 dB in 2400 samples are 45 in 1800, within three standard errors of two energies of 400 samples.
        assert 10 * (early / late).log10().item() == pytest.approx(45, abs=1.5)
    assert -5 <= min(ratios) < 0
    assert 3 < max(ratios) <= 10


def test_a_room_rings_on_from_before(tmp_path):
    write(tmp_path / "speech" / "a.wav", noise(8000))
    data = MixedSpeech(tmp_path / "speech", None, 8000, 400, reverberation_time=(0.5, 0.5), direct_ratio=(0.0, 0.0))
    energies = torch.stack(
        [(i["noisy"] - i["clean"])[:20].square().mean() for i in (data.get(0, seeded(s)) for s in range(20))]
    )
    assert energies.median() > 0.1 * 0.01  # of the speech's own


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_dir": None}, "`noise_dir` must be a folder of noise where there is no reverberation"),
        ({"snr": (5.0, 0.0)}, "`snr` must be"),
        ({"high_pass": 4000.0}, "`high_pass` must be"),
        ({"reverberation_time": (0.0, 1.0)}, "`reverberation_time` must be"),
        ({"noise_dir": "nowhere"}, "`noise_dir` must be an existing folder"),
    ],
)
def test_wrong_arguments(folder, options, message):
    with pytest.raises(ValueError, match=message):
        MixedSpeech(
            **{
                "speech_dir": folder / "speech",
                "noise_dir": folder / "noise",
                "sample_rate": 8000,
                "length": 100,
                **options,
            }
        )
