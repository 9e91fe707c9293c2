"""The frame of the page. A method adds its tab by a file with `TITLE` and `tab()`, and by a line in `TABS`."""

from __future__ import annotations

import importlib
from typing import Any

import gradio as gr

__all__ = ["TABS", "page", "serve"]

TABS = ["one_more_step", "noise_diffusion", "sda", "few_steps", "speech_enhancement"]  # named as their files

INTRODUCTION = """# diffusers-ext
Diffusion papers as Diffusers components. Every tab shows one method on a small model that ships with the package; the
models are loaded when a button is first pressed."""

# Small images fill their place, below its label, and stay sharp.
CSS = """.pixels img { width: 100%; height: 100%; padding-top: 34px; box-sizing: border-box; object-fit: contain;
image-rendering: pixelated; }"""
# Nothing is fetched from elsewhere: the fonts are the visitor's own.
LOOK: dict[str, Any] = {
    "theme": gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    "css": CSS,
    "footer_links": ["gradio", "settings"],
    "max_file_size": "8mb",
    "show_error": True,
}
FILES_KEPT = 3600
"""Seconds until uploads and pictures are deleted."""


def page(**options: dict[str, Any]) -> gr.Blocks:
    """Builds the page; no model is loaded.

    Args:
        **options: arguments of tabs, by the tab's name in `TABS`.
    """
    with gr.Blocks(title="diffusers-ext", analytics_enabled=False, delete_cache=(FILES_KEPT, FILES_KEPT)) as blocks:
        gr.Markdown(INTRODUCTION)
        for name in TABS:
            module = importlib.import_module(f"diffusers_ext.app.{name}")
            with gr.Tab(module.TITLE, id=name):
                module.tab(**options.get(name, {}))
    return blocks


def serve(port: int | None = None, **options: dict[str, Any]) -> None:
    """Serves the page on the loopback address until it is interrupted.

    Args:
        port: port to listen on, by default the first free one from 7860.
        **options: as in `page`.
    """
    page(**options).launch(server_name="127.0.0.1", server_port=port, **LOOK)


if __name__ == "__main__":  # as a Space, whose address Gradio reads from the environment
    page().launch(**LOOK)
