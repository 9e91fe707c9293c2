"""The panel of speech enhancement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from scipy.signal import butter, sosfilt

from diffusers_ext.data.assets import ASSETS
from diffusers_ext.data.audio import read_audio, resample, write_audio
from diffusers_ext.metrics.speech import si_sdr

from .drawing import saved, titled

__all__ = ["speech_enhancement"]

SNR = 0  # dB


def speech_enhancement(output_dir: Path) -> Path:
    """Adds noise, as strong as the speech, and takes it out by a network that never heard the speaker."""
    print("Loading a speech enhancer of 8 kHz")
    pipeline: Any = DiffusionPipeline.from_pretrained(ASSETS / "speech-enhancement")
    pipeline.set_progress_bar_config(disable=True)
    rate = pipeline.config["sample_rate"]
    wave, given = read_audio(ASSETS / "speech" / "sentence-1.flac")
    high_pass = butter(4, 100, "highpass", fs=rate, output="sos")  # below is no speech
    clean = resample(wave[0], given, rate)
    clean, noise = (np.asarray(sosfilt(high_pass, w)) for w in (clean, _noise(2 * len(clean))[: len(clean)]))
    noisy = clean + noise * np.linalg.norm(clean) / np.linalg.norm(noise) * 10 ** (-SNR / 20)
    sounds = {"noisy": noisy}
    for title, steps in (("1 call", 1), ("5 calls", 5)):
        generator = torch.Generator().manual_seed(0)
        sounds[title] = pipeline(noisy, rate, num_inference_steps=steps, generator=generator).audios[0]
    gain = np.abs(noisy).max()
    for name, wave in (("noisy", noisy), ("enhanced", sounds["1 call"])):
        write_audio(output_dir / f"speech-{name}.wav", 0.9 * wave / gain, rate)
    figures = {name: si_sdr(wave, clean) for name, wave in sounds.items()}
    print(
        f"A sentence of an unseen speaker in noise, SI-SDR: noisy {figures['noisy']:.2f} dB, after 1 call "
        f"{figures['1 call']:.2f} dB, after 5, which invent more, {figures['5 calls']:.2f} dB"
    )
    print(f"To listen: {output_dir / 'speech-noisy.wav'}, {output_dir / 'speech-enhanced.wav'}")
    sounds = {f"{name}, {figures[name]:.1f} dB": wave for name, wave in sounds.items()} | {"clean": clean}
    images = {title: pipeline.spectrogram.image(torch.from_numpy(wave / gain)) for title, wave in sounds.items()}
    return saved(titled(images, 1), output_dir / "speech_enhancement.png", figures)


def _noise(samples: int) -> np.ndarray:
    """Noise that falls with the root of the frequency, as between white and that of a machine."""
    spectrum = np.fft.rfft(np.random.default_rng(0).standard_normal(samples))
    return np.fft.irfft(spectrum / np.sqrt(np.arange(len(spectrum)).clip(1)), samples)
