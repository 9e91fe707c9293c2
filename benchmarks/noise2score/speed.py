"""What Noise2Score costs beside supervised training and beside one call of the network.

    python -m benchmarks.noise2score.speed     # three minutes on one core

The network is the paper's U-Net. The authors' code calls it three times a step, and a blind search calls it once for
each parameter that it tries.
"""

import time

import torch

from benchmarks.harness import figure, interleaved, write_result
from diffusers_ext import Noise2ScoreConvNet, Noise2ScorePipeline, Noise2ScoreUNet, ar_dae_loss

REPEATS = 9
SAYS = {
    "step_over_supervised": "A step of training costs {} times one of supervised training of the same U-Net.",
    "three_calls_over_supervised": (
        "With two further calls for a logged figure, as in the authors' code, it is {} times."
    ),
    "blind_gaussian_over_call": (
        "Denoising with an unknown level of Gaussian noise costs {} times as much as with a known one."
    ),
    "blind_gamma_over_call": "With an unknown shape of Gamma noise it is {} times.",
    "blind_gaussian_over_call_small": (
        "With the small network of the experiment, whose call is far cheaper, an unknown level of Gaussian noise "
        "costs {} times as much as a known one."
    ),
    "blind_gamma_over_call_small": "And an unknown shape of Gamma noise costs {} times as much there.",
}


def steps():
    """Returns one step of each kind of training, of one network each."""
    torch.manual_seed(0)
    y, clean = torch.rand(4, 1, 64, 64), torch.rand(4, 1, 64, 64)

    def trained(loss):
        network = Noise2ScoreUNet(shared_blocks=True)
        optimizer = torch.optim.Adam(network.parameters(), 1e-4)

        def step():
            value = loss(network)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()

        return step

    def score_matching(network):
        return ar_dae_loss(lambda v: network(v).sample, y, torch.randn_like(y), 0.03)

    def watched(network):
        with torch.no_grad():
            network(y)
            network(clean)
        return score_matching(network)

    return {
        "supervised": trained(lambda network: (network(y).sample - clean).square().mean()),
        "noise2score": trained(score_matching),
        "three calls": trained(watched),
    }


def denoisers(network):
    """Returns a call of the pipeline with the parameter known, and without, for two families."""
    pipeline = Noise2ScorePipeline(network)
    pipeline.set_progress_bar_config(disable=True)
    image = 0.2 + 0.6 * torch.rand(1, 1, 256, 256, generator=torch.Generator().manual_seed(0))
    known = {"gaussian": 0.1, "gamma": 80.0}
    ranges = {"gaussian": (6 / 255, 55 / 255), "gamma": (40.5, 120.0)}
    calls = {}
    for noise in known:
        calls[noise] = lambda noise=noise: pipeline(image, noise, noise_parameter=known[noise])
        calls[f"blind {noise}"] = lambda noise=noise: pipeline(image, noise, blind_range=ranges[noise])
    return calls


def main():
    torch.set_num_threads(1)
    start = time.perf_counter()
    torch.manual_seed(0)
    times = interleaved(steps(), REPEATS)
    calls = interleaved(denoisers(Noise2ScoreUNet(shared_blocks=True).eval()), REPEATS)
    small = interleaved(denoisers(Noise2ScoreConvNet().eval()), REPEATS)
    figures = {
        "step_over_supervised": figure(times["noise2score"] / times["supervised"], "ratio", "<= 1.1"),
        "three_calls_over_supervised": figure(times["three calls"] / times["supervised"], "ratio"),
        "blind_gaussian_over_call": figure(calls["blind gaussian"] / calls["gaussian"], "ratio", "<= 1.5"),
        "blind_gamma_over_call": figure(calls["blind gamma"] / calls["gamma"], "ratio", "<= 1.5"),
        "blind_gaussian_over_call_small": figure(small["blind gaussian"] / small["gaussian"], "ratio"),
        "blind_gamma_over_call_small": figure(small["blind gamma"] / small["gamma"], "ratio"),
        "call_seconds": figure(calls["gaussian"], "s"),
    }
    command = "python -m benchmarks.noise2score.speed"
    write_result("noise2score/speed", command, figures, [0], time.perf_counter() - start, says=SAYS)


if __name__ == "__main__":
    main()
