"""Networks of Gaussian data N(0, 0.25), which know their timestep alone, and the exact variance of samples."""

import torch

from diffusers_ext import sigma_of_timestep
from diffusers_ext.methods.score_frameworks import scheduling

DATA = 0.25


class GaussianNetwork:
    """Predicts the expected noise, or what stands for it, of N(0, 0.25) on a schedule."""

    def __init__(self, alphas_cumprod, prediction_type="epsilon"):
        self.alphas_cumprod, self.prediction_type = alphas_cumprod, prediction_type
        self.calls = 0

    def __call__(self, x, t):
        self.calls += 1
        t = torch.as_tensor(t, dtype=torch.float64).expand(len(x))
        sigma = sigma_of_timestep(self.alphas_cumprod, t).to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        a = (1 + sigma**2).rsqrt()
        eps = sigma * x / a / (DATA + sigma**2)
        x0 = (x - a * sigma * eps) / a
        return {"epsilon": eps, "sample": x0, "v_prediction": a * eps - a * sigma * x0}[self.prediction_type]


def run(scheduler, network, x, generator=None):
    """Runs a scheduler over its timesteps; yields the sample after every step."""
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(output, t, x, generator=generator).prev_sample
        yield x


def final_variances(scheduler, monkeypatch):
    """Returns the variance after every step, exact, since steps are linear: each draw's response has its own row."""
    draws = len(scheduler.timesteps)
    drawn = iter(range(1, draws + 1))

    def unit(shape, **kwargs):
        noise = torch.zeros(shape, dtype=torch.float64)
        noise[next(drawn)] = 1
        return noise

    monkeypatch.setattr(scheduling, "randn_tensor", unit)
    start = torch.zeros(draws + 1, 1, dtype=torch.float64)
    start[0] = scheduler.init_noise_sigma
    network = GaussianNetwork(scheduler.alphas_cumprod, scheduler.config.prediction_type)
    found = [x.square().sum().item() for x in run(scheduler, network, start)]
    assert network.calls == draws
    return found
