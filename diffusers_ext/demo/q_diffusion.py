"""The panel of Q-Diffusion."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig

from diffusers_ext.data.assets import ASSETS
from diffusers_ext.methods.q_diffusion.config import QDiffConfig
from diffusers_ext.metrics.digits import distance_to_digits

from .drawing import grid, saved, titled

__all__ = ["q_diffusion"]

STEPS = 20
# Name -> title, what is loaded, and to how many bits it is rounded while it loads.
WAYS = {
    "fp32": ("fp32", "digits16-base", None),
    "8_nearest": ("8 bits, to nearest", "digits16-base", 8),
    "4_nearest": ("4 bits, to nearest", "digits16-base", 4),
    "4_learned": ("4 bits, learned", "digits16-4-bits", None),
}


def q_diffusion(output_dir: Path) -> Path:
    """Draws digits from the same noise with a network in fp32, and in 8 and 4 bits."""
    print("Loading a model of 16x16 digits in fp32, rounded to 8 and 4 bits, and in 4 bits with learned rounding")
    noise = torch.randn(100, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    panels, figures, whole = {}, {}, 1
    for name, (title, source, bits) in WAYS.items():
        config = None if bits is None else PipelineQuantizationConfig(quant_mapping={"unet": QDiffConfig(bits)})
        pipeline: Any = DiffusionPipeline.from_pretrained(ASSETS / source, quantization_config=config)
        pipeline.set_progress_bar_config(desc=title)
        start = time.perf_counter()
        images = pipeline(latents=noise, num_inference_steps=STEPS, output_type="pt").images * 2 - 1
        seconds, size = time.perf_counter() - start, pipeline.unet.get_memory_footprint()
        whole = size if name == "fp32" else whole
        figures[f"fd_{name}"], figures[f"size_{name}"] = distance_to_digits(images), size / whole
        print(
            f"{title}: {size / 1024:.0f} KiB, {size / whole:.2f} of fp32; {STEPS} steps in {seconds:.1f} s; "
            f"Frechet distance to real digits {figures[f'fd_{name}']:.0f}"
        )
        panels[f"{title}, {size / 1024:.0f} KiB"] = grid(images[:36])
    return saved(titled(panels, scale=2), output_dir / "q_diffusion.png", figures)
