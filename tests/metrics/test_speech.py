"""Figures of speech against values that are known."""

import sys

import numpy as np
import pytest

from diffusers_ext import asset_path, dnsmos, energy_ratios, estoi, pesq_score, si_sdr


def tones(*frequencies):
    """Sines over whole periods: orthogonal, of one energy."""
    return [np.sin(2 * np.pi * f * np.arange(4000) / 8000) for f in frequencies]


def test_si_sdr_of_orthogonal_parts():
    speech, noise = tones(100, 300)
    for gain in (0.7, -2.0, 100.0):
        assert si_sdr(gain * (speech + np.sqrt(0.1) * noise), speech) == pytest.approx(10, abs=1e-9)
    assert si_sdr(3 * speech, speech) > 150
    assert si_sdr(np.zeros(4000), speech) != si_sdr(noise, speech)


def test_energy_ratios_of_orthogonal_parts():
    speech, noise, artifact = tones(100, 300, 500)
    found = energy_ratios(2 * speech + 0.2 * noise + 0.02 * artifact, speech, 5 * noise)
    assert found.si_sir == pytest.approx(20, abs=1e-9)
    assert found.si_sar == pytest.approx(40, abs=1e-9)
    assert found.si_sdr == pytest.approx(10 * np.log10(4 / 0.0404), abs=1e-9)


def test_wrong_arguments():
    (speech,) = tones(100)
    with pytest.raises(ValueError, match=r"`estimate` and `target` must be `\(samples,\)` of one length, got"):
        si_sdr(speech[1:], speech)
    with pytest.raises(ValueError, match="`target` must not be silent"):
        si_sdr(speech, 0 * speech)
    with pytest.raises(ValueError, match="`noise` must not be silent"):
        energy_ratios(speech, speech, 0 * speech)
    with pytest.raises(ValueError, match="`estimate` must be finite"):
        si_sdr(np.nan * speech, speech)


@pytest.fixture(scope="module")
def sentence():
    return pytest.importorskip("soundfile").read(asset_path("speech") / "sentence-1.flac")


def noisy(speech, snr):
    noise = np.random.default_rng(0).standard_normal(len(speech))
    return speech + noise * np.linalg.norm(speech) / np.linalg.norm(noise) * 10 ** (-snr / 20)


def test_estoi(sentence):
    pytest.importorskip("pystoi")
    speech, rate = sentence
    assert estoi(0.3 * speech, speech, rate) == pytest.approx(1, abs=1e-6)
    found = [estoi(noisy(speech, snr), speech, rate) for snr in (20, 5, -10)]
    assert 1 > found[0] > found[1] + 0.1 > found[2] + 0.2


def test_pesq(sentence):
    pytest.importorskip("pesq", reason="the package pesq needs a C compiler")
    speech, rate = sentence
    assert pesq_score(speech, speech, rate) == pytest.approx(4.644, abs=0.01)  # the largest of the wide-band score
    assert 1 < pesq_score(noisy(speech, 5), speech, rate) < pesq_score(noisy(speech, 20), speech, rate) < 4
    assert pesq_score(speech[::2], speech[::2], 8000) == pytest.approx(4.549, abs=0.01)  # of the narrow-band one


def test_dnsmos(sentence):
    reason = "needs speechmos: pip install 'diffusers-ext[dnsmos]'"
    module = pytest.importorskip("speechmos.dnsmos", reason=reason, exc_type=ImportError)
    speech, rate = sentence
    found = dnsmos(speech, rate)
    said = module.run(np.asarray(speech, np.float32), rate)
    assert found == pytest.approx([said[f"{name}_mos"] for name in ("ovrl", "sig", "bak", "p808")], abs=1e-3)
    worse = dnsmos(noisy(speech, 5), rate)
    assert all(1 < bad < good < 5 for bad, good in zip(worse, found, strict=True))


def test_what_is_not_installed_is_named(sentence, monkeypatch):
    speech, rate = sentence
    monkeypatch.setitem(sys.modules, "speechmos", None)
    monkeypatch.delitem(sys.modules, "speechmos.dnsmos", raising=False)
    with pytest.raises(ImportError, match=r"needs the package speechmos: pip install 'diffusers-ext\[dnsmos\]'"):
        dnsmos(speech, rate)
    with pytest.raises(ValueError, match="`wave` must not be silent"):
        dnsmos(0 * speech, rate)
