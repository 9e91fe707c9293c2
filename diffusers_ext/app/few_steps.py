"""The tab of few-step sampling by MMD-DDM."""

from __future__ import annotations

from typing import Any

import gradio as gr

from diffusers_ext.training.callbacks import image_grid

from .parts import each_step, generator, load, picture, seed, shows_errors

__all__ = ["TITLE", "draw", "tab"]

TITLE = "Few-step sampling"
TEXT = """Few sampling steps give poor images. MMD-DDM tunes a pretrained model through its own sampler until the
features of what it draws match those of real images ([paper](https://arxiv.org/abs/2301.07969)). Here: a model of
16x16 digits before and after tuning for 5 steps, from the same noise. At other numbers of steps the tuned model is off
the timesteps that it was tuned for; the original one gets better with more."""
COUNT, COLUMNS = 144, 12


def tab() -> None:
    """Builds the tab."""
    gr.Markdown(TEXT)
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            steps = gr.Slider(1, 50, 5, step=1, label="Sampling steps", info="The tuned model is for 5.")
            chosen = seed()
            button = gr.Button("Draw before and after tuning", variant="primary")
        with gr.Column(scale=3):
            with gr.Row():
                before, after = picture("Before tuning", height=440), picture("After tuning", height=440)
            figures = gr.Markdown()
    button.click(shows_errors(draw), [steps, chosen], [before, after, figures])


def draw(
    steps: int,
    seed: float,
    progress: Any = gr.Progress(),  # noqa: B008 - how Gradio passes it
) -> tuple[Any, ...]:
    """Draws digits from the same noise by both models.

    Args:
        steps: sampling steps.
        seed: of the noise.
        progress: the page's progress bar.

    Returns:
        Both grids, and their distance to real digits in a sentence.
    """
    from diffusers_ext.metrics.digits import distance_to_digits  # imports that wait for the first button

    made = generator(seed)
    progress(0, desc="Loading the models")
    tuned = load("digits16-5-steps")
    base = load("digits16-base", scheduler=tuned.scheduler)  # both on the tuned one's timesteps
    grids, distances = [], []
    for title, pipeline in (("before", base), ("after", tuned)):
        pixels = pipeline(
            COUNT, num_inference_steps=int(steps), generator=made.manual_seed(int(seed)), output_type="pt",
            callback_on_step_end=each_step(progress, f"Drawing {title} tuning"),
        ).images  # fmt: skip
        grids.append(image_grid(pipeline.image_processor.postprocess(pixels, do_denormalize=[False] * COUNT), COLUMNS))
        distances.append(distance_to_digits(pixels.cpu() * 2 - 1))
    figures = (
        f"Frechet distance of {COUNT} images to real digits, in the features of a classifier: before "
        f"{distances[0]:.1f}, after {distances[1]:.1f}. Lower is better."
    )
    return *grids, figures
