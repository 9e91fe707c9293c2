"""Small autoencoders of digits, what the anomaly maps are compared with, three seeds of one training.

    python -m benchmarks.score_frameworks.autoencoder     # a few minutes of one core a seed

They have the size of the denoiser that makes the maps (0.27 M weights and 0.28 M) and are trained on 4,000 digits.
Between encoder and decoder an image is 24 numbers, as many as the principal components that are compared too.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.harness import chosen_seeds
from benchmarks.score_frameworks.brain_models import ROOT, RUNS, SEEDS

BOTTLENECK, EPOCHS, BATCH, LEARNING_RATE = 24, 40, 64, 2e-3


def training_digits():
    """Returns `(4000, 1, 28, 28)` digits in [0, 1]."""
    images = np.load(ROOT / "runs" / "data" / "digits4k.npz")["images"]
    return torch.from_numpy(images.astype(np.float32) / 255).view(-1, 1, 28, 28)


def network():
    """Returns an untrained autoencoder of images `(n, 1, 28, 28)`."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, 2, 1), nn.SiLU(),
        nn.Conv2d(32, 64, 3, 2, 1), nn.SiLU(),
        nn.Conv2d(64, 64, 3, 1, 1), nn.SiLU(),
        nn.Flatten(), nn.Linear(64 * 7 * 7, BOTTLENECK),
        nn.Linear(BOTTLENECK, 64 * 7 * 7), nn.Unflatten(1, (64, 7, 7)), nn.SiLU(),
        nn.Conv2d(64, 64, 3, 1, 1), nn.SiLU(), nn.Upsample(scale_factor=2),
        nn.Conv2d(64, 32, 3, 1, 1), nn.SiLU(), nn.Upsample(scale_factor=2),
        nn.Conv2d(32, 32, 3, 1, 1), nn.SiLU(), nn.Conv2d(32, 1, 3, 1, 1),
    )  # fmt: skip


def autoencoder(seed):
    """Returns the autoencoder of a seed, trained once on the mean squared error."""
    path = RUNS / f"autoencoder-{seed}.safetensors"
    torch.manual_seed(seed)
    model = network().to(memory_format=torch.channels_last)
    if not path.is_file():
        images = training_digits()
        steps = EPOCHS * (len(images) // BATCH)
        optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
        for epoch in range(EPOCHS):
            losses = []
            for rows in torch.randperm(len(images)).split(BATCH)[: len(images) // BATCH]:
                with torch.autocast("cpu", torch.bfloat16):  # as the denoisers are trained
                    made = model(images[rows])
                loss = F.mse_loss(made.float(), images[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
            print(f"seed {seed}, epoch {epoch + 1} of {EPOCHS}: {sum(losses) / len(losses):.5f}", flush=True)
        RUNS.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".tmp")
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, partial)
        partial.replace(path)
    model.load_state_dict(load_file(path))
    return model.eval()


def main():
    for seed in chosen_seeds("Trains the autoencoders of digits.", SEEDS):
        autoencoder(seed)


if __name__ == "__main__":
    main()
