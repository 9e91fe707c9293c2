"""What the loss, samples of noise and noisy images cost, each beside something plain in the same run.

python -m benchmarks.pnnp.speed     # a minute on one core
"""

import resource
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from benchmarks.harness import figure, interleaved, write_result
from diffusers_ext import DistributionLoss, RawNoiseSynthesizer, SensorNoiseProxy, decouple_dark_frames

REPEATS = 9
VALUES, SETS = 16384, 16
SHAPE = (32, 4, 64, 64)
SENSOR, FRAMES = (4000, 6000), 12
SAYS = {
    "loss_over_sorts": "The loss of 16,384 values, with its gradient, costs {} times two sorts of as many.",
    "training_over_sorts": "With both networks and their gradients it is {} times.",
    "table_over_randn": "Noise from the tables costs {} times plain normal noise.",
    "network_over_randn": "By the networks themselves it is {} times.",
    "poisson_over_randn": "The light's own Poisson noise alone costs {} times plain normal noise.",
    "batch_over_crops": "Noisy images in a batch of 32, by tables, are {} times as fast as one by one by networks.",
    "table_crops_over_batch": "One by one with tables they cost {} times a batch.",
    "megapixels_per_second": "A batch makes {} megapixels of noisy raw image a second on one core.",
    "megapixels_per_second_two": "On two cores, a batch on each, it is {} megapixels a second.",
    "megapixels_per_second_networks": "With the networks themselves it is {} megapixels a second on one core.",
    "seconds_per_frame": "To take dark frames of 24 megapixels apart takes {} seconds of a core a frame, 12 an ISO.",
    "mib_of_frames": "It takes {:.0f} MiB of memory at most, one native gain, whatever the number of frames.",
}


def frames():
    """Takes frames of a large sensor apart: returns seconds a frame, and MiB at the peak."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    base, spent = np.random.default_rng(0).integers(500, 525, SENSOR, dtype=np.uint16), 0.0

    def one(iso):
        nonlocal spent
        for i in range(FRAMES):
            start = time.process_time()
            frame = np.roll(base, 7919 * i + iso)
            spent += time.process_time() - start
            yield frame

    start = time.process_time()
    decouple_dark_frames({iso: one(iso) for iso in (400, 1600)}, black_level=512)
    seconds = (time.process_time() - start - spent) / (2 * FRAMES)
    return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


class Networks:
    """The proxy without its tables, as in the authors' code."""

    def __init__(self, proxy):
        self.proxy = proxy

    @torch.no_grad()
    def sample(self, shape, iso, generator=None):
        # Planes are a batch of one channel there.
        z = torch.randn(2, shape[0] * shape[1], 1, *shape[2:], generator=generator)
        noise = self.proxy.gain(float(iso[0])) * self.proxy.nn_pre(z[0]) + self.proxy.nn_fol(z[1])
        return noise.reshape(shape)


def losses(proxy):
    """New values in every call: a processor that has sorted them before is faster."""
    generator, loss = torch.Generator().manual_seed(0), DistributionLoss()
    values = torch.randn(SETS, 2, VALUES, generator=generator)
    counts = dict.fromkeys(("sorts", "loss", "training"), 0)

    def next_pair(name):
        counts[name] += 1
        return values[counts[name] % SETS].clone()

    def sorts():
        one, other = next_pair("sorts")
        one.sort()
        other.sort()

    def alone():
        model, real = next_pair("loss")
        loss(model.requires_grad_(), real).backward()

    def training():
        z, real = next_pair("training")
        loss(proxy(z[None], z.flip(0)[None], 800)[0], real).backward()

    return {"sorts": sorts, "loss": alone, "training": training}


def main():
    torch.set_num_threads(1)
    start = time.perf_counter()
    seconds, mib = frames()  # first: a peak is one of the whole process
    torch.manual_seed(0)
    proxy = SensorNoiseProxy()
    proxy.start_at(2.2, 0.8)
    times = interleaved(losses(proxy), 5 * REPEATS)
    light, iso = torch.full(SHAPE, 30.0), torch.full((SHAPE[0],), 800.0)
    noise = interleaved(
        {
            "randn": lambda: [torch.randn(SHAPE) for _ in range(10)],  # once is too short on a busy machine
            "table": lambda: proxy.sample(SHAPE, iso),
            "network": lambda: proxy.sample(SHAPE, iso, table=None),
            "poisson": lambda: torch.poisson(light),
        },
        REPEATS,
    )
    tables = RawNoiseSynthesizer(proxy)
    networks = RawNoiseSynthesizer(proxy)
    networks.proxy = Networks(proxy)
    clean = torch.rand(SHAPE)
    pool, generators = ThreadPoolExecutor(2), [torch.Generator().manual_seed(i) for i in range(2)]
    made = interleaved(
        {
            "batch": lambda: tables(clean),
            "crops": lambda: [networks(crop[None]) for crop in clean],
            "table crops": lambda: [tables(crop[None]) for crop in clean],
            "networks": lambda: networks(clean),
            "two": lambda: list(pool.map(lambda g: tables(clean, generator=g), generators)),
        },
        REPEATS,
    )
    figures = {
        "loss_over_sorts": figure(times["loss"] / times["sorts"], "ratio", "<= 1.5"),
        "training_over_sorts": figure(times["training"] / times["sorts"], "ratio"),
        "table_over_randn": figure(10 * noise["table"] / noise["randn"], "ratio", "<= 20"),
        "network_over_randn": figure(10 * noise["network"] / noise["randn"], "ratio"),
        "poisson_over_randn": figure(10 * noise["poisson"] / noise["randn"], "ratio"),
        "batch_over_crops": figure(made["crops"] / made["batch"], "ratio", ">= 5"),
        "table_crops_over_batch": figure(made["table crops"] / made["batch"], "ratio"),
        "megapixels_per_second": figure(clean.numel() / 1e6 / made["batch"], "megapixels/s"),
        "megapixels_per_second_two": figure(2 * clean.numel() / 1e6 / made["two"], "megapixels/s"),
        "megapixels_per_second_networks": figure(clean.numel() / 1e6 / made["networks"], "megapixels/s"),
        "seconds_per_frame": figure(seconds, "s"),
        "mib_of_frames": figure(mib, "MiB", "<= 2048"),
    }
    command = "python -m benchmarks.pnnp.speed"
    write_result("pnnp/speed", command, figures, [0], time.perf_counter() - start, says=SAYS)


if __name__ == "__main__":
    main()
