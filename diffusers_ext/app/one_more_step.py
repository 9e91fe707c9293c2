"""The tab of One More Step."""

from __future__ import annotations

import functools
from typing import Any

import gradio as gr
import numpy as np
import pandas as pd

from diffusers_ext.data.assets import ASSETS
from diffusers_ext.training.callbacks import image_grid

from .parts import each_step, generator, load, picture, seed, shows_errors

__all__ = ["TITLE", "draw", "tab"]

TITLE = "One More Step"
TEXT = """Noise schedules keep a trace of the image at their last step, but sampling starts from pure noise: every
image comes out of medium brightness. One More Step puts the missing step in front of any pipeline, which stays as it
is ([paper](https://arxiv.org/abs/2311.15744)). {model}"""
SHIPPED = """Here: a model of 32x32 patches of photographs with eight classes. Ask for dark ones, and compare."""
GIVEN = "Here: `{base}` with the module `{module}`."
LEVELS = ("darkest", "dark", "bright", "brightest")
CLASSES = [f"{level}, {tone}" for level in LEVELS for tone in ("cold", "warm")]  # in the order of the labels
PLAIN, WITH, REAL = "without", "with One More Step", "photographs"
BINS = np.linspace(0, 1, 21)
COLOURS = {REAL: "#9ca3af", PLAIN: "#2563eb", WITH: "#dc2626"}


def tab(base: str | None = None, module: str | None = None) -> None:
    """Builds the tab.

    Args:
        base: folder or Hub repo of a text-to-image pipeline to draw with instead of the shipped model.
        module: folder or Hub repo of the One More Step module for it.
    """
    if (base is None) != (module is None):
        raise ValueError(f"`base` and `module` must be given together, got {base!r} and {module!r}.")
    gr.Markdown(TEXT.format(model=SHIPPED if base is None else GIVEN.format(base=base, module=module)))
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            if base is None:
                wanted: Any = gr.Dropdown(CLASSES, value=CLASSES[0], type="index", label="Class")
            else:
                wanted = gr.Textbox("a lighthouse at night", label="Prompt")
            count = gr.Slider(1, 64, 32 if base is None else 2, step=1, label="Images")
            steps = gr.Slider(2, 50, 16, step=1, label="Sampling steps")
            chosen = seed()
            button = gr.Button("Draw with and without", variant="primary")
        with gr.Column(scale=3):
            with gr.Row():
                plain, corrected = picture("Without", height=260), picture("With One More Step", height=260)
            figures = gr.Markdown()
            histogram = gr.LinePlot(
                x="mean brightness", y="images, %", color="of", color_map=COLOURS, x_lim=[0, 1],
                label="Histogram of the images' mean brightness", buttons=[],
            )  # fmt: skip
    function = shows_errors(functools.partial(draw, base=base, module=module) if base else draw)
    button.click(function, [wanted, count, steps, chosen], [plain, corrected, figures, histogram])


def draw(
    wanted: int | str,
    count: int,
    steps: int,
    seed: float,
    progress: Any = gr.Progress(),  # noqa: B008 - how Gradio passes it
    base: str | None = None,
    module: str | None = None,
) -> tuple[Any, ...]:
    """Draws images from the same seed without and with One More Step.

    Args:
        wanted: the class, or the prompt where `base` is given.
        count: number of images.
        steps: sampling steps.
        seed: of the noise.
        progress: the page's progress bar.
        base: as in `tab`.
        module: as in `tab`.

    Returns:
        Both grids, the mean brightness in a sentence, and its histogram as a table.
    """
    made = generator(seed)
    progress(0, desc="Loading the models")
    pipeline = load(module or "photos-oms", "OMSPipeline", base=load(base or "photos-base"))
    if base is None:
        condition: dict[str, Any] = {"class_labels": [wanted] * count}
    else:
        condition = {"prompt": wanted, "num_images_per_prompt": count}
    drawn = {}
    for title, added in ((PLAIN, False), (WITH, True)):
        drawn[title] = pipeline(
            **condition, oms=added, num_inference_steps=steps, generator=made.manual_seed(int(seed)),
            output_type="np", callback_on_step_end=each_step(progress, f"Drawing {title}"),
        ).images  # fmt: skip
    sets = drawn if base else {REAL: photographs(int(wanted)), **drawn}
    brightness = {title: pixels.mean((1, 2, 3)) for title, pixels in sets.items()}
    said = ", ".join(f"{title} {values.mean():.2f}" for title, values in brightness.items())
    grids = [image_grid(pipeline.sd_pipeline.image_processor.numpy_to_pil(images), 8) for images in drawn.values()]
    return *grids, f"Mean brightness from 0 (black) to 1 (white): {said}.", histogram_table(brightness)


def photographs(label: int) -> np.ndarray:
    """Returns the real images of a class, `(images, 32, 32, 3)` in [0, 1]."""
    file = np.load(ASSETS / "photos" / "photos.npz")
    return file["images"][file["labels"] == label] / 255


def histogram_table(brightness: dict[str, np.ndarray]) -> pd.DataFrame:
    """Counts how many per cent of each set's images fall into each twentieth of [0, 1]."""
    centres = (BINS[1:] + BINS[:-1]) / 2
    return pd.concat(
        pd.DataFrame(
            {"mean brightness": centres, "images, %": 100 * np.histogram(values, BINS)[0] / len(values), "of": title}
        )
        for title, values in brightness.items()
    )
