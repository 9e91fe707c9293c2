"""The two photographs that denoisers are compared on, the noises, and the small network with its training."""

import math

import numpy as np
import torch
from PIL import Image

from diffusers_ext import (
    AdditiveGaussianNoise,
    GammaNoise,
    Noise2ScoreConvNet,
    PoissonNoise,
    annealed_smoothing,
    ar_dae_loss,
    estimate_noise_std,
)

PHOTOS = ["china", "flower"]
LEVELS = {
    "gaussian_25": AdditiveGaussianNoise(25 / 255),
    "gamma_100": GammaNoise(100.0),
    "poisson_0.01": PoissonNoise(0.01),
    "gaussian_50": AdditiveGaussianNoise(50 / 255),
    "gamma_50": GammaNoise(50.0),
    "poisson_0.05": PoissonNoise(0.05),
}
BATCH, PATCH = 8, 32
STEPS = {"noise2score": 3000, "noise2noise": 1500, "supervised": 1500}


def photographs():
    """Returns the grey photographs in [0, 1]: left parts to train on, parts of the right to test on."""
    from sklearn.datasets import load_sample_image

    train, test = [], []
    for name in PHOTOS:
        grey = np.asarray(Image.fromarray(load_sample_image(f"{name}.jpg")).convert("L"), np.float32) / 255
        train.append(torch.from_numpy(grey[None, :, :416].copy()))
        test.append(torch.from_numpy(grey[None, 64:384, 416:640].copy()))
    return torch.stack(train), torch.stack(test)


def seeded(*words):
    return torch.Generator().manual_seed(int(np.random.SeedSequence(words).generate_state(1)[0]))


def patches(images, generator):
    """Cuts a batch of random patches, flipped and transposed, at the same places of every one of `images`."""
    count, _, height, width = images[0].shape
    batches = [[] for _ in images]
    for _ in range(BATCH):
        which, top, left, turn = (
            int(torch.randint(n, (1,), generator=generator)) for n in (count, height - PATCH, width - PATCH, 8)
        )
        for batch, image in zip(batches, images, strict=True):
            patch = image[which, :, top : top + PATCH, left : left + PATCH]
            patch = patch.flip(-1) if turn & 1 else patch
            patch = patch.flip(-2) if turn & 2 else patch
            batch.append(patch.transpose(-1, -2) if turn & 4 else patch)
    return [torch.stack(batch) for batch in batches]


def smoothing_of(noise):
    """Returns the smoothing at the beginning of training and at its end."""
    if isinstance(noise, PoissonNoise):
        return 1.5, 1.0
    std = noise.sigma if isinstance(noise, AdditiveGaussianNoise) else 1 / math.sqrt(noise.shape)
    return 0.3 * std, 0.3 * std


def make_network(method, noise, images):
    """Returns the new network of a method: all have the same layers."""
    if method != "noise2score":
        return Noise2ScoreConvNet()
    end = smoothing_of(noise)[1]
    std = math.hypot(estimate_noise_std(images), end)
    scale = noise.scale if isinstance(noise, PoissonNoise) else 1.0
    return Noise2ScoreConvNet(input_scale=scale, score_scale=1 / std, smoothing=end)


def loss_of(method, network, noise, sets, step, generator):
    """Returns the loss of a step; `sets` are the images to cut patches from, targets first."""
    batch = [part.contiguous(memory_format=torch.channels_last) for part in patches(sets, generator)]
    if method == "noise2score":
        v = batch[0]
        smoothing = annealed_smoothing(step * BATCH, *smoothing_of(noise), STEPS[method] * BATCH // 2)
        u = torch.randn(v.shape, generator=generator)
        return ar_dae_loss(lambda x: network(x).sample, v, u, smoothing)
    # Each of two noisy copies is the other's target in turn.
    target, given = batch[::-1] if method == "noise2noise" and step % 2 else batch
    return (given + network(given).sample - target).square().mean()


@torch.enable_grad()
def train(method, noise, clean, seed, steps=None):
    """Trains a method's network on a noisy copy of the photographs, Noise2Noise on two, supervised on it and them."""
    noisy = noise.corrupt(clean, seeded(seed, 1))
    sets = {
        "noise2score": [noise.score_input(noisy)],
        "noise2noise": [noise.corrupt(clean, seeded(seed, 2)), noisy],
        "supervised": [clean, noisy],
    }[method]
    torch.manual_seed(seed)
    # This layout of memory makes the steps faster by half on a CPU.
    network = make_network(method, noise, sets[0]).to(memory_format=torch.channels_last)
    generator = seeded(seed, 3)
    steps = steps or STEPS[method]
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, 1e-4)
    for step in range(steps):
        loss = loss_of(method, network, noise, sets, step, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()
