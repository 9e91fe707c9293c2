"""Puts the first seed's denoiser of brain slices among what ships with the package, in half precision.

    python -m benchmarks.score_frameworks.ship     # after benchmarks.score_frameworks.brain_models

A second, where the model is trained.
"""

import json

import torch

from benchmarks.harness import RESULTS, made_portable
from benchmarks.score_frameworks.brain_models import brain_model
from benchmarks.score_frameworks.reconstruction import NOISE, quality, scan
from diffusers_ext import ImageGenerationPipeline, ReconstructionPipeline, RepoCard, save_repo
from diffusers_ext.training.callbacks import image_grid

FOLDER = RESULTS.parents[1] / "diffusers_ext" / "assets" / "brains-base"
SNIPPET = """import numpy as np
import torch
from diffusers_ext import FourierSampling, ReconstructionPipeline, asset_path  # pip install diffusers-ext

truth = torch.tensor(np.load(asset_path("brains") / "brains.npz")["images"][35:36, None] / 255).float()
lines = torch.zeros(64)
lines[[0, 1, 2, 3, 5, 9, 13, 22, 29]] = 1  # of k-space, each tells its mirror too
operator = FourierSampling(lines)
pipeline = ReconstructionPipeline.from_pretrained("{repo_id}")
pipeline(operator.forward(truth), operator, noise_std=0.01).images[0].save("slice.png")"""


def main():
    torch.set_num_threads(1)
    folder = brain_model(0)
    arguments = json.loads((folder / "training_arguments.json").read_text())
    pipeline = ImageGenerationPipeline.from_pretrained(folder)
    pipeline.unet.half()
    generator = torch.Generator().manual_seed(0)
    truth, operator, kspace = scan(0, generator)
    pipeline.unet.float()  # with the rounded weights
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(16, num_inference_steps=50, generator=generator).images
    rebuilt = ReconstructionPipeline.from_pipe(pipeline)(
        kspace, operator, NOISE, generator=generator, output_type="pt"
    )
    filled = quality(operator.adjoint(operator.complete(kspace, NOISE)[0]), truth)["psnr"]
    pipeline.unet.half()
    card = RepoCard(
        method="A denoiser of slices of heads",
        description="Draws 64x64 axial slices of heads, T1-weighted. A small network that shows how anomalies are "
        "found and k-space is completed. For research, not for diagnosis: it has seen two heads.",
        data="Colin's head (ch2 of MRIcron, BSD 3-clause) and the slices without tumour of patient 1 of the test data "
        "of pyradiomics 3.0.1 (BSD 3-clause), turned, moved, scaled and with other contrast: "
        "`python -m benchmarks.score_frameworks.brains`.",
        license="apache-2.0",
        tags=["diffusers-ext", "medical-imaging"],
        paper="https://arxiv.org/abs/2211.07804",
        snippet=SNIPPET,
        arguments={**arguments, "command": "python -m benchmarks.score_frameworks.ship"},
        results={
            "PSNR of patient 2 from 17 of 64 lines, mean of four": quality(rebuilt.images, truth)["psnr"],
            "zero-filled": filled,
        },
    )
    save_repo(pipeline, FOLDER, card=card, sample=image_grid(drawn))
    print(f"{FOLDER}: {made_portable(FOLDER):.2f} MiB, {card.results}")


if __name__ == "__main__":
    main()
