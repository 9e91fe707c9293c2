"""The tab of SDA test-time adaptation."""

from __future__ import annotations

from typing import Any

import gradio as gr
from PIL import Image

from diffusers_ext.data.corruptions import CORRUPTIONS, corrupt

from .parts import EXAMPLES, as_digit, each_step, generator, load, picture, seed, shows_errors, upload

__all__ = ["TITLE", "classify", "tab"]

TITLE = "SDA"
TEXT = """A classifier of clean images fails on corrupted ones. A diffusion model of clean images pulls each one back
before it is read, and a copy of the classifier that was fine-tuned on synthetic images which went the same way reads
it there ([SDA](https://arxiv.org/abs/2406.04295), after [DDA](https://arxiv.org/abs/2207.03442)). Here: 28x28 digits,
white on black; an upload is cut to its middle square."""
IMAGE = "Image of a digit"
NONE = "none"


def tab() -> None:
    """Builds the tab."""
    gr.Markdown(TEXT)
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            image = upload(IMAGE)
            gr.Examples([str(EXAMPLES / f"digit-{digit}.png") for digit in (0, 4, 5, 6)], image, label="Examples")
            corruption = gr.Dropdown(
                [NONE, *CORRUPTIONS], value="impulse_noise", label="Corruption",
                info="Of ImageNet-C; none for an image that is corrupted already.",
            )  # fmt: skip
            severity = gr.Slider(1, 5, 4, step=1, label="Severity")
            chosen = seed()
            button = gr.Button("Corrupt, adapt and classify", variant="primary")
        with gr.Column(scale=3), gr.Row():
            with gr.Column():
                corrupted = picture("Corrupted", height=320)
                before = gr.Label(label="Read before adaptation", num_top_classes=3)
            with gr.Column():
                adapted = picture("Adapted by the diffusion model", height=320)
                after = gr.Label(label="Read after adaptation", num_top_classes=3)
    button.click(shows_errors(classify), [image, corruption, severity, chosen], [corrupted, adapted, before, after])


def classify(
    image: Image.Image | None,
    corruption: str,
    severity: int,
    seed: float,
    progress: Any = gr.Progress(),  # noqa: B008 - how Gradio passes it
) -> tuple[Any, ...]:
    """Corrupts an image and classifies it before and after adaptation.

    Args:
        image: the upload.
        corruption: one of `CORRUPTIONS` or `"none"`.
        severity: 1 to 5.
        seed: of the corruption and of the adaptation.
        progress: the page's progress bar.

    Returns:
        The corrupted and the adapted image, and the probability of each label before and after.
    """
    pixels, made = as_digit(image, IMAGE), generator(seed)
    if corruption != NONE:
        pixels = corrupt(pixels, corruption, int(severity), seed=int(seed))
    progress(0, desc="Loading the models")
    from diffusers_ext.methods.sda.views import label_names  # brings Diffusers' pipelines, which take seconds

    pipeline = load("digits-sda")
    before = pipeline(pixels, ensemble="source")
    after = pipeline(pixels, generator=made, callback_on_step_end=each_step(progress, "Adapting"))
    names = label_names(pipeline.classifier, before.probabilities.shape[1])
    read = [dict(zip(names, output.probabilities[0].tolist(), strict=True)) for output in (before, after)]
    return Image.fromarray(pixels), after.images[0], *read
