"""The small denoisers of brain slices that the experiments use, three seeds of one training.

    python -m benchmarks.score_frameworks.brain_models     # a quarter of an hour of one core a seed

The data are made by benchmarks.score_frameworks.brains. A training that was stopped goes on where it was.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json

from benchmarks.harness import RESULTS, chosen_seeds
from benchmarks.small_models import train
from diffusers_ext import DenoisingConfig, DenoisingRecipe

ROOT = RESULTS.parents[1]
RUNS = ROOT / "runs" / "score_frameworks"
SEEDS = [0, 1, 2]
STEPS = 2000
UNET = {
    "block_out_channels": [12, 24, 40, 40],
    "down_block_types": ["DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
    "add_attention": False,
}


def brain_model(seed):
    """Returns the folder of the model of a seed, trained once."""
    folder = RUNS / f"brains-{seed}"
    if not (folder / "model_index.json").is_file():
        RUNS.mkdir(parents=True, exist_ok=True)
        path = RUNS / "unet.json"
        path.write_text(json.dumps(UNET))
        config = DenoisingConfig(
            train_data_dir=str(ROOT / "runs" / "data" / "brains.npz"),
            output_dir=str(folder),
            unet_config=str(path),
            resolution=64,
            channels=1,
            prediction_type="v_prediction",  # its clean estimate is good at every level of noise
            train_batch_size=16,
            max_train_steps=STEPS,
            learning_rate=2e-3,
            lr_scheduler="cosine",
            lr_warmup_steps=50,
            ema_decay=0.995,
            mixed_precision="bf16",
            checkpointing_steps=100,
            checkpoints_total_limit=1,
            resume_from_checkpoint="latest",
            num_validation_images=0,
            logging_steps=50,
            seed=seed,
        )
        train(DenoisingRecipe, config)
    return folder


def main():
    for seed in chosen_seeds("Trains the denoisers of brain slices.", SEEDS):
        brain_model(seed)


if __name__ == "__main__":
    main()
