"""Clean raw images, which no package ships: two photographs as a sensor would see them, made linear and mosaicked."""

import numpy as np
import torch

from diffusers_ext import unpack_bayer
from diffusers_ext.methods.pnnp.bayer import PATTERNS

WHITE, BLACK = 16383, 512
SIZE = (128, 192)  # of a test image


def mosaic(photo):
    """Returns `(height, width)` in [0, 1] of an sRGB photograph: inverse gamma of 2.2, then RGGB."""
    linear = (photo[: photo.shape[0] // 2 * 2, : photo.shape[1] // 2 * 2] / 255.0) ** 2.2
    planes = [linear[i::2, j::2, c] for (i, j), c in zip(PATTERNS["RGGB"], (0, 1, 2, 1), strict=True)]
    return unpack_bayer(torch.from_numpy(np.stack(planes)), "RGGB").numpy()


def photographs():
    """Returns scikit-learn's two photographs: the left two thirds to train on, parts of the right third to test on."""
    from sklearn.datasets import load_sample_image

    raws = [mosaic(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    train = [raw[:, :416] for raw in raws]
    tops = (0, 144, 288)
    test = [raw[top : top + SIZE[0], 432 : 432 + SIZE[1]] for raw in raws for top in tops]
    return train, test


def write_clean(folder):
    """Writes the training images as a camera would, without noise, once."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, raw in enumerate(photographs()[0]):
        if not (folder / f"{i}.npy").is_file():
            np.save(folder / f"{i}.npy", np.round(BLACK + raw * (WHITE - BLACK)).astype(np.uint16))


def psnr(found, clean):
    """Of linear raw images in [0, 1], in dB."""
    return float(-10 * np.log10(((found.clip(0, 1) - clean) ** 2).mean()))
