r"""Trains the small classifier whose features measure generated images.

    python training/train_classifier.py --train_data runs/data/digits4k.npz \
        --test_data diffusers_ext/assets/digits/digits.npz

`training/data/make_digits.py` writes the training data.
"""

import argparse
import json

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm.auto import tqdm

from diffusers_ext import ImageClassifierFeatures, load_images


def stack(path: str, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns all images `(n, 1, size, size)` in `[-1, 1]` and labels `(n,)` of a data set."""
    data = load_images(train_data_dir=path, resolution=size, channels=1)
    items = [data[i] for i in range(len(data))]
    return torch.stack([item["pixel_values"] for item in items]), torch.tensor([item["label"] for item in items])


def main() -> None:
    """Trains, tests and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--train_data", required=True)
    parser.add_argument("--test_data", required=True)
    parser.add_argument("--output_dir", default="diffusers_ext/assets/digits-classifier")
    parser.add_argument("--size", type=int, default=28)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    set_seed(args.seed)
    accelerator = Accelerator()
    images, labels = stack(args.train_data, args.size)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(images, labels), args.batch_size, shuffle=True, drop_last=True
    )
    model = ImageClassifierFeatures(sample_size=args.size)
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, total_steps=args.epochs * len(loader)
    )
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for _ in tqdm(range(args.epochs), unit="epoch"):
        model.train()
        for batch, target in loader:
            # Small shifts, so that features do not hang on the position.
            shift = torch.randint(-2, 3, (2,)).tolist()
            loss = F.cross_entropy(model(batch.roll(shift, (2, 3))), target)
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model = accelerator.unwrap_model(model).eval().cpu()
    test_images, test_labels = stack(args.test_data, args.size)
    with torch.no_grad():
        accuracy = (model(test_images).argmax(1) == test_labels).float().mean().item()
    model.save_pretrained(args.output_dir, safe_serialization=True)
    print(json.dumps({"test accuracy": accuracy, "weights": sum(p.numel() for p in model.parameters())}))


if __name__ == "__main__":
    main()
