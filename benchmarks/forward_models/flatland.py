"""Flatland: 8x8 digits that are seen by eight cameras in their plane only, each a row of 12 pixels."""

import math

import numpy as np
import torch
from sklearn.datasets import load_digits

from diffusers_ext import VolumeForwardModel, observe

TRAIN, CAMERAS = 1400, 8
NOISE, FURTHER_NOISE = 0.3, 0.02  # of the measured context view, and of those that stand for sampled ones


def digits():
    """Returns 1,400 digits to train with and 397 to test with, `(n, 1, 8, 8)` in [0, 1]."""
    images = torch.from_numpy(load_digits().images).float()[:, None] / 16
    return images[:TRAIN], images[TRAIN:]


def camera():
    """Returns the forward model: the nearer, the brighter, on black."""
    return VolumeForwardModel(
        size=12, num_samples=16, near=0.0, far=2.6, background=-1.0, density_scale=4.0, output="brightness",
        extent=1.1, num_angles=CAMERAS,
    )  # fmt: skip


def angles(n):
    """Returns the angles of all cameras, `(n, 8)`."""
    return (torch.arange(CAMERAS) * (2 * math.pi / CAMERAS)).expand(n, -1)


@torch.no_grad()
def views(signals):
    """Returns what all cameras see, `(n, 8, 1, 12)` in [-1, 1]."""
    return observe(signals, camera(), angles(len(signals)))


def write_views(path):
    """Writes what all cameras see of the digits to train with, once."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        seen = views(digits()[0])
        np.savez(path.with_suffix(".tmp.npz"), observations=seen.numpy(), parameters=angles(len(seen)).numpy())
        path.with_suffix(".tmp.npz").replace(path)
    return path
