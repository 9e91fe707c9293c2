"""The tab of speech enhancement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch

from diffusers_ext.data.audio import audio_info, read_audio, resample

from .parts import EXAMPLES, generator, load, picture, seed, shows_errors

__all__ = ["TITLE", "enhance", "tab"]

TITLE = "Speech enhancement"
TEXT = """A recording goes in, speech with less noise comes out: a diffusion process that drifts from clean to noisy
speech is run backwards from the recording ([SGMSE+](https://arxiv.org/abs/2208.05830)). Here: a small model of 8 kHz
that has heard three voices; any file or what your microphone hears is resampled there and back."""
RECORDING = "Recording"
LONGEST = 60
"""Seconds that a recording may have."""


def tab() -> None:
    """Builds the tab."""
    gr.Markdown(TEXT)
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            # As a path: Gradio would read it with ffmpeg.
            recording = gr.Audio(label=RECORDING, sources=["upload", "microphone"], type="filepath", buttons=[])
            gr.Examples([str(EXAMPLES / "speech-noisy.flac")], recording, label="Example: a sentence in noise")
            steps = gr.Slider(
                1, 30, 1, step=1, label="Calls of the network", info="More sound clearer, and invent more."
            )
            chosen = seed()
            button = gr.Button("Enhance", variant="primary")
        with gr.Column(scale=3):
            heard = gr.Audio(label="Enhanced", interactive=False, buttons=["download"])
            with gr.Row():
                before, after = picture("Spectrogram before", height=240), picture("Spectrogram after", height=240)
            said = gr.Markdown()
    button.click(shows_errors(enhance), [recording, steps, chosen], [heard, before, after, said])


def enhance(
    path: str | None,
    steps: int,
    seed: float,
    progress: Any = gr.Progress(),  # noqa: B008 - how Gradio passes it
) -> tuple[Any, ...]:
    """Enhances a recording.

    Args:
        path: of the upload.
        steps: calls of the network.
        seed: of its noise.
        progress: the page's progress bar.

    Returns:
        Rate and samples of the enhanced recording, the spectrograms before and after, and a sentence.
    """
    if path is None:
        raise gr.Error("Upload or record something first, or take the example below.", title=RECORDING)
    try:
        info = audio_info(path)
    except ValueError as error:
        raise gr.Error("This file is no sound that can be read, or it is damaged.", title=RECORDING) from error
    seconds = info.frames / info.samplerate
    if seconds > LONGEST:
        raise gr.Error(f"At most {LONGEST} seconds, got {seconds:.0f}.", title=RECORDING)
    made = generator(seed)
    progress(0, desc="Loading the model")
    pipeline = load("speech-enhancement")

    def report(_: Any, step: int, __: Any, values: dict) -> dict:
        progress((step + 1, int(steps)), desc="Enhancing")
        return values

    found = pipeline(path, num_inference_steps=int(steps), generator=made, callback_on_step_end=report).audios[0]
    waves = [_mono(w, info.samplerate, pipeline.spectrogram.sample_rate) for w in (read_audio(path)[0], found)]
    gain = max(float(waves[0].abs().max()), 1e-8)
    before, after = (pipeline.spectrogram.image(wave / gain) for wave in waves)
    samples = (found.clip(-1, 1) * 32767).astype(np.int16)  # Gradio would make floats as loud as can be
    text = f"{seconds:.1f} s at {info.samplerate} Hz, {info.channels} channel{'s' * (info.channels > 1)}."
    return (info.samplerate, samples.T), before, after, f"{Path(path).name}: {text}"


def _mono(wave: np.ndarray, rate: int, new_rate: int) -> torch.Tensor:
    return torch.from_numpy(resample(np.atleast_2d(wave).mean(axis=0), rate, new_rate))
