"""Small images cut from photographs, for experiments."""

import numpy as np
from PIL import Image


def cut_patches(photos, count, size, draw):
    """Cuts square patches of random place and size, in random order, `(count, size, size, 3)` in uint8."""
    patches = []
    for i in range(count):
        photo = photos[i % len(photos)]
        side = int(draw.integers(size, 3 * size + 1))
        top, left = draw.integers(0, photo.shape[0] - side), draw.integers(0, photo.shape[1] - side)
        patch = Image.fromarray(photo[top : top + side, left : left + side])
        patches.append(np.asarray(patch.resize((size, size), Image.Resampling.LANCZOS)))
    return np.stack(patches)[draw.permutation(count)]
