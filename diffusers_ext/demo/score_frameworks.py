"""The panel of one denoiser under three frameworks, of anomalies and of reconstruction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from diffusers_ext.data.assets import ASSETS
from diffusers_ext.methods.score_frameworks.measurement import FourierSampling
from diffusers_ext.methods.score_frameworks.pipeline_anomaly import AnomalyDetectionPipeline
from diffusers_ext.methods.score_frameworks.pipeline_reconstruction import ReconstructionPipeline
from diffusers_ext.methods.score_frameworks.scheduling_annealed_langevin import AnnealedLangevinScheduler
from diffusers_ext.methods.score_frameworks.scheduling_score_sde import ScoreSDEScheduler
from diffusers_ext.metrics.detection import auroc
from diffusers_ext.training.callbacks import image_grid

from .drawing import psnr, saved, titled

__all__ = ["score_frameworks"]

DIGITS, PLACE, STRENGTH = 4, slice(4, 13), 0.4
SLICES, LINES, NOISE = (28, 35), (0, 1, 2, 3, 5, 9, 13, 22, 29), 0.01  # each line tells its mirror too


def score_frameworks(output_dir: Path) -> Path:
    """Draws digits under three frameworks, finds patches that do not belong, completes the k-space of a head."""
    print("Loading a model of digits, trained as a DDPM, and one of slices of heads")
    base: Any = DiffusionPipeline.from_pretrained(ASSETS / "digits-epsilon")
    base.set_progress_bar_config(disable=True)
    drawn = _frameworks(base)
    odd, denoised, maps = _anomalies(base)
    where = np.zeros(maps.shape, bool)
    where[:, :, PLACE, PLACE] = True
    right = auroc(where, maps)
    print(f"Foreign patches: their pixels are above the others in the map with probability {right:.2f}")
    truth, filled, rebuilt = _reconstructions()
    gain = psnr(rebuilt, truth) - psnr(filled, truth)
    print(f"17 of 64 lines of k-space: {gain:.1f} dB nearer to the truth than with zeros for the rest")
    picture = titled(
        {
            **drawn,
            "patched": _column(odd),
            "denoised": _column(denoised),
            "map": _column(2 * maps),
            "every line": _column(truth),
            "17 of 64": _column(filled),
            "mean of four": _column(rebuilt),
        },
        scale=3,
    )
    return saved(picture, output_dir / "score_frameworks.png", {"auroc": right, "psnr_gain": gain})


def _frameworks(pipeline: Any) -> dict[str, Image.Image]:
    """Returns digits that one network draws under each scheduler."""
    trained, drawn = pipeline.scheduler, {}
    ways = {
        "DDPM": trained,
        "NCSN": AnnealedLangevinScheduler.from_config(trained.config, steps_per_level=3),
        "VE": ScoreSDEScheduler.from_config(trained.config, sde="ve", predictor="ancestral", corrector_steps=0),
        "sub-VP": ScoreSDEScheduler.from_config(trained.config, sde="subvp", corrector_steps=0),
    }
    for name, scheduler in ways.items():
        pipeline.scheduler = scheduler
        generator = torch.Generator().manual_seed(1)
        steps = 30 if name == "NCSN" else 40  # of NCSN levels, three calls each: it needs more
        drawn[name] = image_grid(pipeline(DIGITS, num_inference_steps=steps, generator=generator).images, columns=1)
    pipeline.scheduler = trained
    return drawn


def _anomalies(base: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns digits with a patch of another one, their reconstructions and maps."""
    with np.load(ASSETS / "digits" / "digits.npz") as file:
        images = torch.from_numpy(file["images"][: 2 * DIGITS] / np.float32(255))[:, None]
    odd = images[:DIGITS].clone()
    odd[:, :, PLACE, PLACE] = images[DIGITS:, :, 10:19, 10:19]
    finder = AnomalyDetectionPipeline(base.unet, base.scheduler)
    finder.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    found: Any = finder(odd, STRENGTH, 10, num_samples=4, generator=generator, output_type="pt")
    return odd, found.reconstruction, found.anomaly_map


def _reconstructions() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns slices of a head that was not trained on, zero-filled and reconstructed ones."""
    with np.load(ASSETS / "brains" / "brains.npz") as file:
        truth = torch.from_numpy(file["images"][list(SLICES)] / np.float32(255))[:, None]
    lines = torch.zeros(64)
    for k in LINES:
        lines[[k, -k % 64]] = 1
    operator, generator = FourierSampling(lines), torch.Generator().manual_seed(0)
    kspace = operator.forward(truth)
    kspace = kspace + NOISE * operator.mask * torch.randn(kspace.shape, dtype=kspace.dtype, generator=generator)
    pipeline: Any = ReconstructionPipeline.from_pretrained(ASSETS / "brains-base")
    pipeline.set_progress_bar_config(disable=True)
    rebuilt = pipeline(kspace, operator, NOISE, num_inference_steps=15, generator=generator, output_type="pt").images
    return truth, operator.adjoint(kspace), rebuilt


def _column(images: torch.Tensor) -> Image.Image:
    return image_grid([Image.fromarray(p) for p in (images[:, 0].clamp(0, 1) * 255).byte().numpy()], columns=1)
