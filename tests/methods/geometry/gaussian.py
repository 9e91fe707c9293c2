"""Fields of Gaussian data, of which everything is known in closed form."""

import numpy as np
import torch
from diffusers import DDPMScheduler

from diffusers_ext import ScoreField

PLANE = torch.tensor([2.0, 1.0, 0.5, *[0.0] * 7], dtype=torch.float64)  # k = 3 in D = 10
TIMES = (0, 10, 50, 200, 600)


def scheduler():
    return DDPMScheduler()  # linear betas, 1000 timesteps, epsilon


def gaussian_field(eigenvalues):
    """The exact field of N(0, diag(eigenvalues)) by a model of (x, t) that knows only its timestep."""
    levels = ScoreField(lambda x, t: x, scheduler()).levels
    times, logs = levels.t.numpy(), levels.sigma.log().numpy()

    def model(x, t):
        sigma = torch.from_numpy(np.exp(np.interp(t.double().numpy(), times, logs)))
        sigma = sigma.view(-1, *[1] * (x.ndim - 1))
        y = x * (1 + sigma**2).sqrt()
        return sigma * y / (eigenvalues + sigma**2)

    return ScoreField(model, scheduler())


def sigma_of(field, t):
    return field.levels.sigma[t].item()


def plane_data(count, seed=0, eigenvalues=PLANE):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, len(eigenvalues), generator=generator, dtype=torch.float64) * eigenvalues.sqrt()


def antisymmetric(dim):
    """Q[i, D - 1 - i] is 1 in the upper half, -1 in the lower: orthogonal."""
    half = torch.ones(dim // 2, dtype=torch.float64)
    return torch.fliplr(torch.diag(torch.cat([half, -half])))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def expected_dimension(eigenvalues, sigma):
    """d(sigma), the data mean of `dsm` and `trace`."""
    return (eigenvalues / (eigenvalues + sigma**2)).sum().item()
