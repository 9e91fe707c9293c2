"""What `make demo` shows: one panel per method, each one function in a file of its own that takes the output folder.

A panel loads what ships under `assets/`, prints its figures, writes its picture and
beside it the figures as JSON, and returns the picture's path.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from pathlib import Path

__all__ = ["PANELS", "run_demo"]

PANELS = [
    "ambient",
    "forward_models",
    "image_generation",
    "mmd_ddm",
    "noise2score",
    "noise_diffusion",
    "one_more_step",
    "pnnp",
    "q_diffusion",
    "score_frameworks",
    "sda",
    "speech_enhancement",
    "text_to_image",
]  # named as file and function


def run_demo(output_dir: Path, panels: Sequence[str] = PANELS) -> None:
    """Runs panels and says where their pictures are."""
    output_dir.mkdir(parents=True, exist_ok=True)
    for name in panels:
        start = time.perf_counter()
        try:
            path = getattr(importlib.import_module(f"{__name__}.{name}"), name)(output_dir)
        except ImportError as error:  # an extra that is not installed; the other panels are worth showing
            print(f"{name} is left out: {error}")
            continue
        print(f"{path}  ({time.perf_counter() - start:.0f} s)")
