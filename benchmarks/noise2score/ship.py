"""Makes the denoiser of photographs that ships with the package.

    python -m benchmarks.noise2score.ship     # five minutes on one core

One copy with Gaussian noise of 25/255 of the left parts of scikit-learn's two photographs, grey, is cut into pieces,
from which the recipe learns the score. A crop of a right part goes into the folder too, for the demo.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from PIL import Image

from benchmarks.harness import RESULTS, made_portable
from benchmarks.noise2score.photos import LEVELS, photographs, seeded
from benchmarks.small_models import train
from diffusers_ext import Noise2ScoreConfig, Noise2ScorePipeline, Noise2ScoreRecipe, RepoCard, save_repo

ROOT = RESULTS.parents[1]
RUNS, FOLDER = ROOT / "runs" / "noise2score", ROOT / "diffusers_ext" / "assets" / "photos-noise2score"
NOISE, PIECE = LEVELS["gaussian_25"], 64
SNIPPET = """import diffusers_ext  # pip install diffusers-ext
from diffusers import DiffusionPipeline
from PIL import Image

pipeline = DiffusionPipeline.from_pretrained("{repo_id}")
noisy = Image.open("noisy.tif")  # grey; floats may leave [0, 1]
pipeline(noisy, noise_parameter=25 / 255).images[0].save("clean.png")"""


def write_data(clean):
    """Cuts noisy pieces of the photographs, once."""
    path = RUNS / "shipped.npz"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        noisy = NOISE.corrupt(clean, seeded(0, 1))[:, 0, : 427 // PIECE * PIECE, : 416 // PIECE * PIECE]
        pieces = noisy.unfold(1, PIECE, PIECE).unfold(2, PIECE, PIECE).reshape(-1, PIECE, PIECE)
        np.savez(path.with_suffix(".tmp.npz"), images=pieces.numpy())
        path.with_suffix(".tmp.npz").replace(path)
    return path


def psnr(x, truth):
    return float(-10 * (x.clamp(0, 1) - truth).square().mean((1, 2, 3)).log10().mean())


def main():
    torch.set_num_threads(1)
    clean, test = photographs()
    config = Noise2ScoreConfig(
        train_data_dir=str(write_data(clean)),
        output_dir=str(RUNS / "shipped"),
        network="conv",
        noise="gaussian",
        noise_parameter=NOISE.sigma,
        resolution=32,
        channels=1,
        max_train_steps=3000,
        learning_rate=1e-3,
        lr_scheduler="cosine",
        lr_warmup_steps=100,
        ema_decay=0.99,
        checkpointing_steps=1000,
        checkpoints_total_limit=1,
        resume_from_checkpoint="latest",
        logging_steps=100,
    )
    if not (RUNS / "shipped" / "model_index.json").is_file():
        train(Noise2ScoreRecipe, config)
    pipeline = Noise2ScorePipeline.from_pretrained(RUNS / "shipped")
    pipeline.set_progress_bar_config(disable=True)
    y = NOISE.corrupt(test, seeded(0, 4))
    known = pipeline(y, noise_parameter=NOISE.sigma, output_type="pt").images
    blind = pipeline(y, blind_range=(6 / 255, 55 / 255), output_type="pt").images
    crop = (slice(100, 228), slice(60, 220))
    rows = [torch.cat([image[0, 0][crop].clamp(0, 1) for image in (test, y, known)], 1)]
    sample = Image.fromarray((torch.cat(rows) * 255).round().byte().numpy())
    card = RepoCard(
        method="Noise2Score",
        description="Denoises grey photographs with Gaussian noise in one network call: 16,081 weights that learned "
        "the score of noisy images and have seen no clean one. The picture shows a clean crop, noisy, and denoised.",
        data="The left parts of scikit-learn's two photographs (china.jpg by danielbuechele and flower.jpg by "
        "vultilion, flickr, CC BY 2.0), grey, one copy each with Gaussian noise of 25/255. `crop.png` is out of the "
        "right part of the first.",
        license="apache-2.0",
        tags=["diffusers-ext", "image-denoising"],
        paper="https://arxiv.org/abs/2106.07009",
        snippet=SNIPPET,
        arguments={"command": "python -m benchmarks.noise2score.ship", **config.to_dict()},
        results={
            "PSNR of the right parts, noisy": psnr(y, test),
            "denoised": psnr(known, test),
            "denoised without knowing the noise's level": psnr(blind, test),
        },
        pipeline_tag="image-to-image",
    )
    save_repo(pipeline, FOLDER, card=card, sample=sample)
    Image.fromarray((test[0, 0][crop] * 255).round().byte().numpy()).save(FOLDER / "crop.png")
    print(f"{FOLDER}: {made_portable(FOLDER):.2f} MiB, {card.results}")


if __name__ == "__main__":
    main()
