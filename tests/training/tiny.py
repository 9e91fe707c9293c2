"""A training run of seconds: 8x8 digits and a UNet of a few thousand weights."""

import json
import os
import signal
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from diffusers_ext import Callback, ImmiscibleConfig, ImmiscibleRecipe, Trainer

UNET = {
    "block_out_channels": [4, 8],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "dropout": 0.1,
}


def write_data(folder, n=64, size=8):
    """Writes an .npz of `n` random images with three classes, and a UNet configuration."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, size, size), dtype=np.uint8)
    np.savez(folder / "data.npz", images=images, labels=np.arange(n) % 3)
    (folder / "unet.json").write_text(json.dumps(UNET))
    return folder


def make_config(data, output_dir, **changes):
    values = {
        "train_data_dir": str(Path(data) / "data.npz"),
        "unet_config": str(Path(data) / "unet.json"),
        "output_dir": str(output_dir),
        "resolution": 8,
        "channels": 1,
        "train_batch_size": 4,
        "max_train_steps": 6,
        "learning_rate": 1e-3,
        "lr_warmup_steps": 0,
        "noise": "gaussian",
        "ema_decay": 0.9,
        "logging_steps": 1,
        "num_validation_images": 2,
        "validation_inference_steps": 2,
        "dataloader_num_workers": 0,
    }
    return ImmiscibleConfig(**{**values, **changes})


class Record(Callback):
    """Keeps the losses, and can send this process a signal after a step."""

    def __init__(self, signal_at=None, number=signal.SIGTERM):
        self.losses, self.rates, self.logs = [], [], []
        self.signal_at, self.number = signal_at, number

    def on_step_end(self, trainer):
        if trainer.step == self.signal_at:
            os.kill(os.getpid(), self.number)

    def on_log(self, trainer, logs):
        self.losses.append(logs["loss"])
        self.rates.append(logs["lr"])
        self.logs.append(logs)


def run(data, output_dir, *, callback=None, **changes):
    """Trains and returns the result, the recorded losses and the trainer."""
    config = make_config(data, output_dir, **changes)
    record = callback or Record()
    trainer = Trainer(config, ImmiscibleRecipe(config), [record])
    return trainer.train(), record, trainer


def weights(output_dir):
    """The finished weights, which are the averaged ones."""
    return load_file(Path(output_dir) / "unet" / "diffusion_pytorch_model.safetensors")
