"""What samples are measured by, and the best that can be had: the posterior over the training signals themselves."""

import torch
from diffusers import DDIMScheduler

STEPS = 30


def distances(x, y):
    return torch.cdist(x.flatten(1).double(), y.flatten(1).double())


def energy_distance(samples, real):
    """Returns 2 E|X - Y| - E|X - X'| - E|Y - Y'|, unbiased, for `(n, ...)` and `(m, ...)`; 0 in the mean if alike."""
    n, m = len(samples), len(real)
    within = distances(samples, samples).sum() / (n * (n - 1)) + distances(real, real).sum() / (m * (m - 1))
    return (2 * distances(samples, real).mean() - within).item()


def energy(samples, real):
    """Returns the mean energy distance of `(contexts, samples, ...)`, one sample of each context at a time."""
    return sum(energy_distance(part, real) for part in samples.unbind(1)) / samples.shape[1]


def variance(samples):
    """Returns the variance given the context, a mean over contexts and numbers of a signal."""
    return samples.var(1).mean().item()


def log_likelihood(candidates, observations, which, std):
    """Returns `(n, N)` log-likelihoods of the candidates.

    Args:
        candidates: `(N, all views, ...)` what each candidate shows.
        observations: `(n, views, ...)`.
        which: `(n, views)` which of all views they are.
        std: of the observations' noise.
    """
    flat = candidates.flatten(2)
    found = 0
    for view in range(which.shape[1]):
        shown = flat[:, which[:, view]].movedim(1, 0)  # (n, N, pixels)
        found = found - (shown - observations[:, view].flatten(1)[:, None]).square().sum(-1) / (2 * std**2)
    return found


def ideal(signals, likelihood, samples, generator):
    """Draws `(n, samples, ...)` candidates by their likelihood."""
    return signals[torch.multinomial(likelihood.softmax(1), samples, replacement=True, generator=generator)]


def effective_number(likelihood):
    """Returns the mean over contexts of 1 / sum w^2."""
    return (1 / likelihood.softmax(1).square().sum(1)).mean().item()


@torch.no_grad()
def exact(signals, candidates, likelihood, targets, observe, scale, noise, generator):
    """Samples as the pipeline does, eta 1, with the training signals' E[S | x_t, context] in the network's place.

    Args:
        signals: `(N, ...)` candidates.
        candidates: `(N, all views, ...)` what they show.
        likelihood: `(n, N)` log-likelihoods given the context.
        targets: `(n, views)` which views are denoised, one after the other.
        observe: from signals and `(n,)` views to observations.
        scale: of observations, before noise is added.
        noise: standard deviation of that of sampled views in the context.
        generator: of the noise.

    Returns:
        `(views, n, ...)` the signals after one view, two, ...
    """
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="sample", clip_sample=False, timestep_spacing="trailing"
    )
    found = []
    for which in targets.unbind(1):
        shown = scale * candidates[:, which].movedim(1, 0).flatten(2)  # (n, N, pixels)
        squares = shown.square().sum(-1)
        sample = torch.randn(shown.shape[0], *candidates.shape[2:], generator=generator)
        scheduler.set_timesteps(STEPS)
        for t in scheduler.timesteps:
            kept = scheduler.alphas_cumprod[t]
            products = (shown @ sample.flatten(1)[:, :, None])[..., 0]
            fit = (2 * kept.sqrt() * products - kept * squares) / (2 * (1 - kept))
            mean = ((likelihood + fit).softmax(1) @ signals.flatten(1)).view(-1, *signals.shape[1:])
            sample = scheduler.step(scale * observe(mean, which), t, sample, eta=1.0, generator=generator).prev_sample
        found.append(mean)
        seen = sample / scale + noise * torch.randn(sample.shape, generator=generator)
        likelihood = likelihood + log_likelihood(candidates, seen[:, None], which[:, None], noise)
    return torch.stack(found)
