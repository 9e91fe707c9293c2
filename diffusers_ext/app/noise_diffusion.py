"""The tab of NoiseDiffusion."""

from __future__ import annotations

from typing import Any

import gradio as gr
from PIL import Image

from diffusers_ext.training.callbacks import image_grid

from .parts import EXAMPLES, as_digit, each_step, generator, load, picture, seed, shows_errors, upload

__all__ = ["TITLE", "make", "tab"]

TITLE = "NoiseDiffusion"
TEXT = """Frames between two real images: both are inverted to noise, mixed and denoised. Real images do not invert
to the noise that the model expects, so plain spherical interpolation (slerp) leaves artefacts; NoiseDiffusion corrects
the mixed states ([paper](https://arxiv.org/abs/2403.08840)). Here: a model of 28x28 digits, white on black; an upload
is cut to its middle square."""
METHODS = ["noise_diffusion", "slerp", "lerp", "noise"]
STEPS = 50
FIRST, SECOND = "First image", "Second image"
FIGURES = {
    "norm_ratio": ("norm / noise's", 1.0),
    "tail_2": ("share beyond 2", 0.0455),
    "excess_kurtosis": ("excess kurtosis", 0.0),
    "ks": ("KS distance", 0.0),
    "correlation": ("neighbours' correlation", 0.0),
}
"""Of `NoiseDiagnostics`: title, and the value for noise."""


def tab() -> None:
    """Builds the tab."""
    gr.Markdown(TEXT)
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            with gr.Row():
                first, second = upload(FIRST), upload(SECOND)
            gr.Examples(
                [[str(EXAMPLES / name) for name in pair] for pair in (
                    ("digit-4-noisy.png", "digit-6-noisy.png"), ("digit-4.png", "digit-6.png")
                )],
                [first, second], label="Examples: as a noisy camera sees them, and clean",
            )  # fmt: skip
            method = gr.Dropdown(METHODS, value=METHODS[0], label="Method")
            frames = gr.Slider(1, 15, 7, step=1, label="Frames")
            strength = gr.Slider(0.1, 1, 0.7, step=0.05, label="Strength", info="More changes the images more.")
            chosen = seed()
            button = gr.Button("Make the frames", variant="primary")
        with gr.Column(scale=3):
            strip = picture("First image, frames, second image", height=140)
            made = gr.State([], time_to_live=3600)
            place = gr.Slider(0, 8, 0, step=1, label="Frame", info="0 is the first image, the last the second.")
            shown = picture("The frame", height=320)
            table = gr.Markdown()
    inputs = [first, second, method, frames, strength, chosen]
    button.click(shows_errors(make), inputs, [strip, made, place, shown, table])
    place.input(show, [made, place], shown, show_progress="hidden", api_visibility="private")


@shows_errors
def show(made: list[Image.Image], place: int) -> Image.Image | None:
    """Returns one of the frames."""
    return made[int(place)] if made else None


def make(
    first: Image.Image | None,
    second: Image.Image | None,
    method: str,
    frames: int,
    strength: float,
    seed: float,
    progress: Any = gr.Progress(),  # noqa: B008 - how Gradio passes it
) -> tuple[Any, ...]:
    """Makes frames between two images.

    Args:
        first: the first upload.
        second: the second.
        method: as the pipeline's.
        frames: their number.
        strength: as the pipeline's.
        seed: of the noise that `"noise"` adds.
        progress: the page's progress bar.

    Returns:
        The strip, its images one by one, the slider over them, the middle one, and the diagnostics' table.
    """
    ends = [as_digit(first, FIRST), as_digit(second, SECOND)]
    drawn = generator(seed)
    progress(0, desc="Loading the model")
    output = load("digits-epsilon", "NoiseDiffusionPipeline")(
        *ends, frames, method=method, num_inference_steps=STEPS, strength=strength, generator=drawn,
        callback_on_step_end=each_step(progress, "Inverting and denoising"),
    )  # fmt: skip
    images = [Image.fromarray(ends[0]), *output.images, Image.fromarray(ends[1])]
    middle = len(images) // 2
    slider = gr.Slider(0, len(images) - 1, middle, step=1)
    return image_grid(images, len(images)), images, slider, images[middle], table_of(output.diagnostics)


def table_of(diagnostics: dict[str, Any]) -> str:
    """Writes the figures of the inverted images and of the frames in a table, with those of noise above."""
    rows = {"noise, as expected": {name: value for name, (_, value) in FIGURES.items()}}
    if "inverted" in diagnostics:
        for i, title in enumerate((FIRST, SECOND)):
            found = diagnostics["inverted"]
            rows[f"{title.lower()}, inverted"] = {name: float(getattr(found, name)[i]) for name in FIGURES}
    rows["frames, mixed"] = diagnostics["frames"].pooled
    head = ["How noise-like the states are", *(title for title, _ in FIGURES.values())]
    lines = [head, ["---", *["---:"] * len(FIGURES)]]
    lines += [[title, *(f"{row[name]:.3f}" for name in FIGURES)] for title, row in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
