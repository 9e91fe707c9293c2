"""Makes the two models of digits that ship with the package: one that knows which digits are noisy, and by how much,
and one that takes all for clean.

    python -m benchmarks.ambient.ship     # in the folder of a clone, a few minutes on one core

The thousand digits of the package in 8x8 pixels; noise of level 0.4 for nine of ten, frozen. Weights are kept in
half precision.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from benchmarks.harness import made_portable
from benchmarks.small_models import train
from diffusers_ext import AmbientConfig, AmbientRecipe, FrozenNoise, RepoCard, load_images, save_repo
from diffusers_ext.data.digits import DIGITS
from diffusers_ext.training.callbacks import image_grid

RUNS = Path("runs/ambient-shipped")
SIZE, SIGMA, PART, STEPS = 8, 0.4, 0.9, 600
UNET = {
    "block_out_channels": [16, 32],
    "down_block_types": ["DownBlock2D"] * 2,
    "up_block_types": ["UpBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "add_attention": False,
}


def write_data():
    """Writes the noisy digits, their levels, and levels of 0 for those who do not know."""
    RUNS.mkdir(parents=True, exist_ok=True)
    data = load_images(train_data_dir=str(DIGITS), resolution=SIZE, channels=1)
    clean = torch.stack([data[i]["pixel_values"] for i in range(len(data))])
    noisy, levels = FrozenNoise(SIGMA, PART)(clean, torch.arange(len(clean)))
    arrays = {"images": noisy[:, 0].numpy(), "sigma": levels.numpy(), "unknown": np.zeros(len(clean))}
    np.savez(RUNS / "noisy.npz", **arrays)
    (RUNS / "unet.json").write_text(json.dumps(UNET))


def make(column, name, description):
    config = AmbientConfig(
        train_data_dir=str(RUNS / "noisy.npz"),
        value_range="-1,1",
        sigma_column=column,
        unet_config=str(RUNS / "unet.json"),
        output_dir=str(RUNS / column),
        resolution=SIZE,
        channels=1,
        train_batch_size=32,
        max_train_steps=STEPS,
        learning_rate=2e-3,
        lr_scheduler="cosine",
        lr_warmup_steps=100,
        ema_decay=0.998,
        checkpointing_steps=250,
        checkpoints_total_limit=1,
        resume_from_checkpoint="latest",
        logging_steps=50,
        num_validation_images=0,
    )
    if not (RUNS / column / "model_index.json").is_file():
        train(AmbientRecipe, config)
    pipeline: Any = DiffusionPipeline.from_pretrained(RUNS / column)
    pipeline.set_progress_bar_config(disable=True)
    sample = image_grid(pipeline(batch_size=64, generator=torch.Generator().manual_seed(0)).images)
    card = RepoCard(
        method="Ambient Diffusion",
        description=description,
        data="1,000 handwritten digits of MNIST (see assets/digits of the package), 900 of them with noise of level "
        f"{SIGMA} for a range of [-1, 1].",
        license="apache-2.0",
        tags=["diffusers-ext", "unconditional-image-generation", "ambient-diffusion"],
        arguments={"command": "python -m benchmarks.ambient.ship", **config.to_dict()},
        paper="https://arxiv.org/abs/2411.02780",
    )
    pipeline.unet.half()
    folder = Path("diffusers_ext/assets") / name
    save_repo(pipeline, folder, card=card, sample=sample)
    made_portable(folder)


def main():
    torch.set_num_threads(1)
    write_data()
    make("sigma", "digits-ambient", "Draws clean digits of 8x8 pixels, learned from noisy ones of known level.")
    make("unknown", "digits-ambient-naive", "Draws noisy digits of 8x8 pixels: it took noisy ones for clean ones.")


if __name__ == "__main__":
    main()
