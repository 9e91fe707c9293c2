"""The pipeline against known answers, and what a pipeline of Diffusers is expected to do."""

import math

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from scipy.signal import resample_poly

from diffusers_ext import OUVEScheduler, SBVEScheduler, SGMSEUNet2DModel, SpeechEnhancementPipeline, save_repo
from diffusers_ext.methods.sgmse.pipeline import _block_noise
from diffusers_ext.methods.sgmse.recordings import Windows, groups

from .ncsnpp import NCSNpp
from .test_published import checkpoint
from .tiny import SMALL, SOUND, Mirror, pipeline, transitions

soundfile = pytest.importorskip("soundfile")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def wave(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed)).numpy()


@pytest.fixture(scope="module")
def real():
    return pipeline()


# ---------------------------------------------------------------- known answers


@pytest.mark.parametrize(
    ("length", "chunk"), [(1, 10.0), (2, 10.0), (31, 0.06), (33, 10.0), (1000, 0.06), (3333, 0.1), (20001, 10.0)]
)
def test_a_network_that_knows_the_clean_speech(length, chunk):
    clean = wave(2, length) if length > 1 else wave(1)
    found = pipeline(Mirror(**SMALL))(
        -clean, 8000, num_inference_steps=2, chunk_seconds=chunk, overlap_seconds=0.05, generator=seeded()
    )
    np.testing.assert_allclose(found.audios[0], clean, atol=1e-5 * np.abs(clean).max() * 4)
    assert (found.audios[0].dtype, found.sample_rate) == (np.float32, 8000)


@pytest.mark.parametrize("rate", [16000, 44100, 6000])
def test_other_rates_are_what_resampling_there_and_back_gives(rate):
    clean = wave(3001)
    common = math.gcd(rate, 8000)
    there = resample_poly(clean, 8000 // common, rate // common)
    back = resample_poly(there, rate // common, 8000 // common)[:3001]
    found = pipeline(Mirror(**SMALL))(-clean, rate, num_inference_steps=2)
    np.testing.assert_allclose(found.audios[0], back, atol=1e-4)
    assert found.sample_rate == rate


def test_whole_pipeline_by_hand(real):
    """The bridge draws no noise: padding, transform, network, steps and inverse, written down anew."""
    made = pipeline(real.unet, SBVEScheduler(), frame_padding="reflection")
    noisy = wave(1219)
    window = torch.hann_window(62, periodic=True, dtype=torch.float64)
    gain = np.abs(noisy).max()
    stft = torch.stft(torch.tensor(noisy / gain, dtype=torch.float64), 62, 16, window=window, return_complex=True)
    y = 0.15 * stft.abs().sqrt() * torch.exp(1j * stft.angle())
    y = torch.cat([y, y[:, -2:-1]], dim=1)[None, None]  # 77 frames and a reflected one
    assert y.shape[-1] == 78

    def level(t):
        return 0.4 * (2.6 ** (2 * t) - 1) / (2 * math.log(2.6))

    x, times = y, [1 - i * (1 - 1e-4) / 3 for i in range(4)]
    for t, u in zip(times[:-1], times[1:], strict=True):
        parts = torch.cat([x.real, x.imag, y.real, y.imag], dim=1).float()
        with torch.no_grad():
            output = real.unet(parts, torch.tensor([t])).sample.double()
        x0 = torch.complex(output[:, :1], output[:, 1:])
        now, then = (level(time) / level(1) for time in (t, u))
        kept = 0 if t == 1 else math.sqrt(then * (1 - then) / (now * (1 - now)))
        x = (1 - then) * x0 + then * y + kept * (x - (1 - now) * x0 - now * y)
    back = (x[0, 0, :, :77] / 0.15).abs() ** 2 * torch.exp(1j * x[0, 0, :, :77].angle())
    expected = torch.istft(back, 62, 16, window=window, length=1219).numpy() * gain
    found = made(noisy, 8000, num_inference_steps=3).audios[0]
    np.testing.assert_allclose(found, expected, atol=1e-4 * gain)
    assert np.abs(found - noisy).max() > 0.1


def test_the_authors_sampler_by_hand(real):
    """Predictor and corrector in the order and with the constants of the authors' code, on the same noise."""
    made = pipeline(real.unet, OUVEScheduler())
    noisy, steps = wave(1200), 3
    seed = int(torch.randint(2**62, (1,), generator=seeded(5)))
    window = torch.hann_window(62, periodic=True)
    gain = np.abs(noisy).max()
    stft = torch.stft(torch.tensor(noisy / gain), 62, 16, window=window, return_complex=True)
    y = (0.15 * stft.abs() ** 0.5 * torch.exp(1j * stft.angle()))[None, None]
    theta, low, ratio = 1.5, 0.05, 10.0
    log = math.log(ratio)

    def std(t):
        return low * math.sqrt(math.exp(-2 * theta * t) * (math.exp(2 * (theta + log) * t) - 1) * log / (theta + log))

    def score(x, t):
        parts = torch.cat([x.real, x.imag, y.real, y.imag], dim=1)
        with torch.no_grad():
            output = real.unet(parts, torch.tensor([t])).sample
        return torch.complex(output[:, :1], output[:, 1:])

    draws = (_block_noise(y, [(seed, 0, 0)], draw, 2) for draw in range(100))
    x = mean = y + std(1) * next(draws)
    times = torch.linspace(1, 0.03, steps).tolist()
    for i, t in enumerate(times):
        size = 2 * (0.5 * std(t)) ** 2
        x = x + size * score(x, t) + next(draws) * math.sqrt(2 * size)
        stepsize = t - times[i + 1] if i + 1 < steps else t
        diffusion = low * ratio**t * math.sqrt(2 * log)
        drift = theta * (y - x) * stepsize - diffusion**2 * stepsize * score(x, t)
        mean = x - drift
        x = mean + diffusion * math.sqrt(stepsize) * next(draws)
    back = (mean[0, 0] / 0.15).abs() ** 2 * torch.exp(1j * mean[0, 0].angle())
    expected = torch.istft(back, 62, 16, window=window, length=1200).numpy() * gain
    found = made(noisy, 8000, num_inference_steps=steps, generator=seeded(5)).audios[0]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    assert np.abs(found - noisy).max() > 0.1


def test_noise_agrees_where_windows_overlap():
    """A window's noise is that of the same place in the whole recording."""
    whole = Windows(10_000, 10_000, 0, 32, 16)
    cut = Windows(10_000, 2000, 300, 32, 16)
    like = torch.zeros(1, 1, 5, 640, dtype=torch.complex64)
    everything = _block_noise(like, [(7, 1, whole.first_block(0))], 3, 2)
    for index in range(len(cut)):
        start, end = cut.bounds(index)
        part = like[..., : (end - start + 16) // 32 * 2]
        frames = start // 16
        found = _block_noise(part, [(7, 1, cut.first_block(index))], 3, 2)
        assert torch.equal(found, everything[..., frames : frames + part.shape[-1]])
    others = [_block_noise(like, [place], draw, 2) for place, draw in (((8, 1, 0), 3), ((7, 0, 0), 3), ((7, 1, 0), 4))]
    assert all((other - everything).abs().mean() > 0.5 for other in others)
    assert everything.abs().square().mean().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("length", "chunk", "overlap"), [(1, 50, 0), (9999, 2000, 100), (9999, 33, 0), (4096, 4095, 1024)]
)
def test_weights_of_windows_add_up_to_one(length, chunk, overlap):
    windows = Windows(length, chunk, overlap, 32, 16)
    total = torch.zeros(length)
    for index in range(len(windows)):
        start, end = windows.bounds(index)
        assert start % 32 == 0
        total[start:end] += windows.weights(index)
    torch.testing.assert_close(total, torch.ones(length), atol=1e-6, rtol=0)


def test_groups_of_equal_sizes():
    assert groups([3, 3, 5, 3, 5], 2) == [[0, 1], [2, 4], [3]]


# ---------------------------------------------------------------- contracts


def test_a_batch_is_its_recordings_one_by_one(real):
    waves = [wave(2, 2000), wave(900, seed=1), wave(2000, seed=2)]
    call = {"sample_rate": 8000, "num_inference_steps": 1, "chunk_seconds": 0.2, "overlap_seconds": 0.05}
    together = real(waves, generator=[seeded(i) for i in range(3)], batch_size=5, **call).audios
    for i, one in enumerate(waves):
        alone = real(one, generator=[seeded(i)], batch_size=1, **call).audios[0]
        np.testing.assert_allclose(together[i], alone, atol=1e-4)
        assert alone.shape == one.shape
    other = real(waves[1], generator=seeded(9), **call).audios[0]
    assert np.abs(other - together[1]).max() > 1e-3


def test_loudness_stays(real):
    call = {"sample_rate": 8000, "num_inference_steps": 2}
    quiet, loud = (real(gain * wave(2, 900), generator=seeded(), **call).audios[0] for gain in (1e-3, 10.0))
    np.testing.assert_allclose(loud, 1e4 * quiet, rtol=1e-3, atol=1e-3)


def test_silence_stays_silence(real):
    found = real([np.zeros(500), wave(500)], 8000, num_inference_steps=1, generator=seeded()).audios
    assert not found[0].any()
    assert found[1].any()
    stereo = real(np.stack([wave(500), np.zeros(500)]), 8000, num_inference_steps=1, generator=seeded()).audios[0]
    assert np.isfinite(stereo).all()


def test_kinds_of_input(real, tmp_path):
    """Files, integers and tensors give what arrays give."""
    integers = (3000 * wave(2, 800)).clip(-32768, 32767).astype(np.int16)
    expected = real(integers / 32768, 44100, num_inference_steps=1, generator=seeded()).audios[0]
    for suffix in ("wav", "flac"):
        soundfile.write(tmp_path / f"stereo.{suffix}", integers.T, 44100)
        found = real(tmp_path / f"stereo.{suffix}", num_inference_steps=1, generator=seeded())
        np.testing.assert_allclose(found.audios[0], expected, atol=1e-5)
        assert found.sample_rate == 44100
    for given in (integers, torch.from_numpy(integers), torch.from_numpy(integers / 32768)):
        found = real(given, 44100, num_inference_steps=1, generator=seeded(), output_type="pt", return_dict=False)
        assert isinstance(found[0][0], torch.Tensor)
        np.testing.assert_allclose(found[0][0].numpy(), expected, atol=1e-5)
    soundfile.write(tmp_path / "mono.wav", integers[0], 8000)
    files = [str(tmp_path / "stereo.wav"), str(tmp_path / "mono.wav")]
    found = real(files, num_inference_steps=1)
    assert found.sample_rate == [44100, 8000]
    assert [one.shape for one in found.audios] == [(2, 800), (800,)]


@pytest.mark.parametrize("algorithm", ["pc", "transitions", "heun", "euler"])
def test_callbacks_and_calls(algorithm):
    calls, seen = [], []
    unet = SGMSEUNet2DModel(**SMALL)
    unet.register_forward_hook(lambda *_: calls.append(1))
    made = pipeline(unet, OUVEScheduler(algorithm=algorithm, prediction_type="sample"))

    def callback(pipe, step, t, tensors):
        seen.append((step, tuple(tensors["latents"].shape), float(t)))
        return {"latents": 0 * tensors["latents"]} if step == 2 else {}

    found = made(wave(700), 8000, num_inference_steps=3, callback_on_step_end=callback).audios[0]
    assert [step for step, *_ in seen] == [0, 1, 2]
    assert seen[0][1] == (1, 1, 32, 44)
    assert len(calls) == {"pc": 6, "transitions": 3, "heun": 6, "euler": 3}[algorithm]
    assert not found.any()


def test_a_stopped_call_returns_what_is_left_as_it_is(real):
    noisy = wave(4000)

    def stop(pipe, step, t, tensors):
        pipe._interrupt = True
        return {"latents": 0 * tensors["latents"]}

    call = {"chunk_seconds": 0.2, "overlap_seconds": 0.0, "batch_size": 1}
    found = real(noisy, 8000, num_inference_steps=2, callback_on_step_end=stop, **call).audios[0]
    assert not found[:1000].any()
    np.testing.assert_allclose(found[2000:], noisy[2000:], atol=1e-5)


def test_progress_and_precision(real, capsys):
    made = SpeechEnhancementPipeline(real.unet, real.scheduler, **SOUND)
    made(wave(500), 8000, num_inference_steps=2)
    assert "2/2" in capsys.readouterr().err
    full = real(wave(500), 8000, num_inference_steps=2, generator=seeded()).audios[0]
    for dtype, tolerance in ((torch.bfloat16, 0.1), (torch.float64, 1e-4)):
        copy = pipeline(SGMSEUNet2DModel.from_config(real.unet.config))
        copy.unet.load_state_dict(real.unet.state_dict())
        found = copy.to(dtype=dtype)(wave(500), 8000, num_inference_steps=2, generator=seeded()).audios[0]
        assert 0 < np.abs(found - full).mean() < tolerance


def test_published_checkpoints_convert_and_load(tmp_path):
    torch.manual_seed(0)
    net = NCSNpp(32, (1, 2, 2), 1, (1,), divide="before")
    small = {"n_fft": 30, "hop_length": 8, "sr": 8000}
    path = checkpoint(tmp_path / "tiny.ckpt", {"backbone": "ncsnpp", **small}, net)
    made = SpeechEnhancementPipeline.from_published(path)
    save_repo(made, tmp_path / "repo")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "repo")
    assert (loaded.config.sample_rate, loaded.config.n_fft, loaded.config.frame_padding) == (8000, 30, "zero")
    call = {"sample_rate": 8000, "num_inference_steps": 2}
    results = []
    for one in (made, loaded):
        one.set_progress_bar_config(disable=True)
        results.append(one(wave(400), generator=seeded(), **call).audios[0])
    np.testing.assert_allclose(*results, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"audio": wave(2, 3, 4)}, r"must be a recording `\(samples,\)` or .* got one of shape \(2, 3, 4\)"),
        ({"audio": wave(9, 2)}, "must not have more channels than samples"),
        ({"audio": []}, "`audio` must be at least one recording"),
        ({"audio": np.zeros(0)}, "must have at least one sample, got none"),
        ({"audio": np.array([0.0, np.nan])}, "must be finite, got NaN or infinity"),
        ({"audio": np.array([True, False])}, "`audio` must be of floats or integers, got 'bool'"),
        ({"sample_rate": None}, "`sample_rate` must be the rate in Hz of recordings that are given as arrays"),
        ({"sample_rate": 0}, "`sample_rate` must be the rate in Hz"),
        ({"audio": "no.wav"}, "`sample_rate` must be left out for files"),
        ({"audio": "no.wav", "sample_rate": None}, "`audio` must be a sound file that can be read, got 'no.wav'"),
        ({"num_inference_steps": 0}, "`num_inference_steps` must be an integer >= 1, got 0"),
        ({"chunk_seconds": 1.0, "overlap_seconds": 1.0}, "`chunk_seconds` must be a number > overlap_seconds, 1.0"),
        ({"overlap_seconds": -1.0}, "`overlap_seconds` must be a number >= 0"),
        ({"batch_size": 0}, "`batch_size` must be an integer >= 1"),
        ({"output_type": "pil"}, "`output_type` must be 'np' or 'pt'"),
        ({"generator": [torch.Generator()] * 2}, "`generator` must be one generator or a list of 1, got a list of 2"),
        ({"generator": 3}, "`generator` must be one generator or a list of 1, got 3"),
        ({"callback_on_step_end": 3}, "`callback_on_step_end` must be callable or left out, got 3"),
        ({"callback_on_step_end_tensor_inputs": ["x"]}, "`callback_on_step_end_tensor_inputs` must be a subset of"),
    ],
)
def test_wrong_arguments(real, call, message):
    with pytest.raises(ValueError, match=message):
        real(**{"audio": wave(100), "sample_rate": 8000, **call})


def test_parts_that_do_not_fit():
    with pytest.raises(ValueError, match="`n_fft` must be such that .* bins are a multiple of 2"):
        SpeechEnhancementPipeline(SGMSEUNet2DModel(**SMALL), transitions(), n_fft=60, hop_length=16)
    with pytest.raises(ValueError, match="`frame_padding` must be one of"):
        pipeline(frame_padding="mirror")
