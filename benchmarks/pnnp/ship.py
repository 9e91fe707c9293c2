"""Makes the raw denoiser that ships with the package, and the noise of the simulated camera that it was trained on.

    python -m benchmarks.pnnp.ship     # two minutes on one core

The noise is that of the first seed of benchmarks.pnnp.proxy. The denoiser learns on left parts of scikit-learn's two
photographs, made linear and mosaicked; a crop of a right part goes into the folder, for the demo.
"""

import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from PIL import Image

from benchmarks.harness import RESULTS, made_portable
from benchmarks.pnnp.photos import BLACK, SIZE, WHITE, mosaic, psnr, write_clean
from benchmarks.pnnp.proxy import trained
from benchmarks.small_models import train
from diffusers_ext import (
    CameraTruth,
    DarkFrameModel,
    PNNPConfig,
    PNNPRecipe,
    RawDenoisePipeline,
    RepoCard,
    save_repo,
    simulate_raw,
)

ROOT = RESULTS.parents[1]
RUNS, FOLDER = ROOT / "runs" / "pnnp", ROOT / "diffusers_ext" / "assets" / "photos-pnnp"
ISO, RATIO = 1600, 100.0
SNIPPET = """import diffusers_ext  # pip install diffusers-ext
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{repo_id}")
pipeline(raw, iso=1600, ratio=100.0, output_type="pil").images[0].save("clean.png")  # raw: (128, 192), uint16"""


def scene():
    """A crop that the denoiser has not seen, in sRGB."""
    from sklearn.datasets import load_sample_image

    return load_sample_image("china.jpg")[200 : 200 + SIZE[0], 432 : 432 + SIZE[1]]


def without_residuals(dark):
    """The same without what only learns from it."""
    c = dark.config
    small = DarkFrameModel(c.height, c.width, c.isos, (), 0, c.black_level, c.iso_to_gain, c.rounded)
    for name, value in small.named_buffers():
        value.copy_(
            getattr(dark, name)[: len(value), ..., : value.shape[-1]] if value.ndim > 1 else getattr(dark, name)
        )
    return small.eval()


def main():
    torch.set_num_threads(1)
    truth = CameraTruth(*SIZE)
    noise = trained(truth, 0, RUNS / "proxy" / "seed-0")
    write_clean(RUNS / "denoiser" / "clean")
    (RUNS / "shipped.json").write_text(json.dumps({"base_channels": 4}))
    config = PNNPConfig(
        train_data_dir=str(RUNS / "denoiser" / "clean"), noise_model=str(RUNS / "proxy" / "seed-0" / "noise"),
        output_dir=str(RUNS / "shipped"), unet_config=str(RUNS / "shipped.json"), resolution=64, iso=f"{ISO},{ISO}",
        ratio="50,150", loss="l1", augment_noise=False, max_train_steps=1000, learning_rate=2e-3, ema_decay=0.98,
        checkpointing_steps=250, checkpoints_total_limit=1, resume_from_checkpoint="latest", logging_steps=50,
    )  # fmt: skip
    if not (RUNS / "shipped" / "model_index.json").is_file():
        train(PNNPRecipe, config)
    pipeline = RawDenoisePipeline.from_pretrained(RUNS / "shipped")
    pipeline.set_progress_bar_config(disable=True)
    photo = scene()
    clean = mosaic(photo)
    raw = simulate_raw(truth, clean * (WHITE - BLACK) / RATIO, ISO, np.random.default_rng(5))
    noisy = ((raw.astype(float) - BLACK) * RATIO) / (WHITE - BLACK)
    denoised = (pipeline(raw, ISO, RATIO).images[0] - BLACK) / (WHITE - BLACK)

    noise.dark = pipeline.dark = without_residuals(noise.dark)
    card = RepoCard(
        method="PNNP raw denoising",
        description="Denoises raw images of a camera that does not exist: 128 x 192 pixels at ISO 1600, exposed 50 to "
        "150 times too short. A small network that shows the method; the folder noise holds the camera's noise, "
        "learned from 24 dark frames at each of three ISOs.",
        data="The left parts of scikit-learn's two photographs (china.jpg by danielbuechele and flower.jpg by "
        "vultilion, flickr, CC BY 2.0), made linear and mosaicked. `crop.png` is out of the right part of the first.",
        license="apache-2.0",
        tags=["diffusers-ext", "raw-images", "image-denoising"],
        paper="https://arxiv.org/abs/2310.09126",
        snippet=SNIPPET,
        arguments={"command": "python -m benchmarks.pnnp.ship", **config.to_dict()},
        results={"PSNR of the raw crop, noisy": psnr(noisy, clean), "denoised": psnr(denoised, clean)},
        pipeline_tag="image-to-image",
    )
    noise.register_modules(dark=noise.dark)
    pipeline.register_modules(dark=pipeline.dark)
    save_repo(pipeline, FOLDER, card=card)
    noise.save_pretrained(FOLDER / "noise")
    Image.fromarray(photo).save(FOLDER / "crop.png")
    print(f"{FOLDER}: {made_portable(FOLDER):.2f} MiB, {card.results}")


if __name__ == "__main__":
    main()
