"""The panel of Q-Diffusion."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig

from diffusers_ext.data.assets import ASSETS
from diffusers_ext.methods.q_diffusion.config import QDiffConfig

from .drawing import grid, saved, titled

__all__ = ["q_diffusion"]

STEPS = 20


def q_diffusion(output_dir: Path) -> Path:
    """Draws digits from the same noise with a network in fp32, and in 8 and 4 bits, rounded while it loads."""
    print("Loading a model of 16x16 digits in fp32, and with weights of 8 and 4 bits")
    noise = torch.randn(36, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    panels, figures, first, whole = {}, {}, None, 1
    for title, bits in (("fp32", None), ("8 bits", 8), ("4 bits", 4)):
        config = None if bits is None else PipelineQuantizationConfig(quant_mapping={"unet": QDiffConfig(bits)})
        pipeline: Any = DiffusionPipeline.from_pretrained(ASSETS / "digits16-base", quantization_config=config)
        pipeline.set_progress_bar_config(desc=title)
        start = time.perf_counter()
        images = pipeline(latents=noise, num_inference_steps=STEPS, output_type="pt").images * 2 - 1
        seconds, size = time.perf_counter() - start, pipeline.unet.get_memory_footprint()
        if first is None:
            first, whole = images, size
        else:
            figures[f"size_{bits}_bits"] = size / whole
            figures[f"difference_{bits}_bits"] = (images - first).abs().mean().item()
        print(f"{title}: {size / 1024:.0f} KiB, {size / whole:.2f} of fp32; {STEPS} steps in {seconds:.1f} s")
        panels[f"{title}, {size / 1024:.0f} KiB"] = grid(images)
    return saved(titled(panels, scale=2), output_dir / "q_diffusion.png", figures)
