"""Speech, noise and music of the experiment, from Debian packages that are unpacked into one folder.

    mkdir -p runs/sgmse/packages && cd runs/sgmse/packages
    apt-get download asterisk-core-sounds-{en,fr,it}-wav asterisk-moh-opsound-wav pocketsphinx-testdata
    for f in *.deb; do dpkg-deb -x $f .; done

The recordings of Asterisk are CC-BY-SA-3.0, those of pocketsphinx-testdata LibriVox's, public domain. Everything is
brought to 8 kHz, and high-passed at 100 Hz before the SNR is set: most of a 1/f noise lies below, and a filter alone
would gain several dB.
"""

from pathlib import Path

import numpy as np
from scipy.signal import butter, sosfilt

from diffusers_ext.data.audio import read_audio, resample, write_audio

RATE = 8000
HELD_OUT = 80  # English prompts
CONDITIONS = [(exponent, snr) for exponent in (0.0, 0.5, 1.0) for snr in (0, 5)]
HIGH_PASS = butter(4, 100, "highpass", fs=RATE, output="sos")


def coloured(samples, exponent, rng):
    """Returns noise whose amplitudes fall as f ** -exponent, with a standard deviation of 0.1."""
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    spectrum *= np.maximum(np.arange(len(spectrum)), 1.0) ** -exponent
    wave = np.fft.irfft(spectrum, samples)
    return (0.1 * wave / wave.std()).astype(np.float32)


def loaded(path):
    wave, rate = read_audio(path)
    return resample(wave[0], rate, RATE)


def prompts(packages, language):
    """Prompts of one second and more, in the order of their names."""
    folder = next((packages / "usr/share/asterisk/sounds").glob(f"{language}_*"))
    files = sorted(path for path in folder.rglob("*.wav") if "silence" not in path.parts)
    return [path for path in files if path.stat().st_size > 2 * RATE]


def music(packages):
    return sorted((packages / "usr/share/asterisk/moh").glob("*.wav"))


def held_out(packages):
    english = prompts(packages, "en")
    return english[:: max(1, len(english) // HELD_OUT)][:HELD_OUT]


def write_training(packages, folder):
    """Writes the folders `speech` and `noise`: three fifths of the draws of noise are coloured, two fifths music."""
    if (folder / "done").is_file():
        return
    out = set(held_out(packages))
    chosen = [path for language in ("en", "fr", "it") for path in prompts(packages, language) if path not in out]
    for number, path in enumerate(chosen):
        write_audio(folder / "speech" / f"{number:04d}.wav", loaded(path), RATE)
    rng = np.random.default_rng(0)
    for number in range(45):
        wave = coloured(20 * RATE, rng.uniform(0, 1), rng)
        write_audio(folder / "noise" / f"coloured-{number:02d}.wav", wave.clip(-1, 1), RATE)
    for piece, path in enumerate(music(packages)[:3]):
        for number, part in enumerate(np.array_split(loaded(path), 10)):
            write_audio(folder / "noise" / f"music-{piece}-{number}.wav", part, RATE)
    (folder / "done").write_text("")


def mixed(speech, noise, snr):
    """Returns clean and noisy speech, both high-passed before."""
    speech, noise = sosfilt(HIGH_PASS, speech), sosfilt(HIGH_PASS, noise)
    gain = np.linalg.norm(speech) / np.linalg.norm(noise) * 10 ** (-snr / 20)
    return speech.astype(np.float32), (speech + gain * noise).astype(np.float32)


def make_test_sets(packages, sentences):
    """Returns lists of `(clean, noisy)`: held-out prompts with noise and with held-out music, unseen speakers."""
    rng = np.random.default_rng(1)
    waves = [loaded(path) for path in held_out(packages)]
    waves = [wave for wave in waves if len(wave) > 2 * RATE][:sentences]
    unseen = sorted((packages / "usr/share/pocketsphinx/test/data/librivox").glob("*.wav"))
    strangers = [loaded(unseen[i % len(unseen)]) for i in range(sentences)]
    pieces = [loaded(path) for path in music(packages)[3:]]
    sets = {"noise": [], "music": [], "unseen": []}
    for i, (wave, stranger) in enumerate(zip(waves, strangers, strict=True)):
        exponent, snr = CONDITIONS[i % len(CONDITIONS)]
        sets["noise"].append(mixed(wave, coloured(len(wave), exponent, rng), snr))
        sets["unseen"].append(mixed(stranger, coloured(len(stranger), exponent, rng), snr))
        piece = pieces[i % len(pieces)]
        start = rng.integers(len(piece) - len(wave))
        sets["music"].append(mixed(wave, piece[start : start + len(wave)], snr))
    return sets


def wiener(noisy):
    """The classical enhancer that the model is compared with.

    Decision-directed a-priori SNR (weight 0.98), the noise of each bin from the 30 % quantile of its energies over
    time, gains of at least 0.1.
    """
    from scipy.signal import istft, stft

    options = {"fs": RATE, "nperseg": 256, "noverlap": 192}
    spectrum = stft(noisy, **options)[2]
    energy = np.abs(spectrum) ** 2
    # Energies of noise are exponentially distributed: their 30 % quantile is -ln 0.7 of the mean.
    noise = np.quantile(energy, 0.3, axis=1) / -np.log(0.7) + 1e-12
    found, before = np.empty_like(spectrum), np.zeros_like(noise)
    for frame in range(spectrum.shape[1]):
        prior = 0.98 * before / noise + 0.02 * np.maximum(energy[:, frame] / noise - 1, 0)
        found[:, frame] = np.maximum(prior / (1 + prior), 0.1) * spectrum[:, frame]
        before = np.abs(found[:, frame]) ** 2
    return istft(found, **options)[1][: len(noisy)].astype(np.float32)


def packages_folder(path):
    folder = Path(path)
    if not (folder / "usr/share/asterisk").is_dir():
        raise SystemExit(f"error: {folder} holds none of the packages; see benchmarks/sgmse/sets.py")
    return folder
