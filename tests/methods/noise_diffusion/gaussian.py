"""The exact network for normal data, in each parametrisation, and the schedulers of the tests."""

from diffusers import DDIMScheduler

REFERENCE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}
"""Stable Diffusion's schedule, as the authors' sampler has it."""


def scheduler(**options):
    return DDIMScheduler(**{"clip_sample": False, **options})


def exact(scheduler, mean=0.0, std=1.0):
    """Returns the network that predicts what is best for data N(mean, std^2), in float64."""

    def model(x, t):
        alpha = scheduler.alphas_cumprod[t].double()
        variance = alpha * std**2 + 1 - alpha
        noise = (1 - alpha).sqrt() * (x - alpha.sqrt() * mean) / variance
        image = mean + alpha.sqrt() * std**2 * (x - alpha.sqrt() * mean) / variance
        kind = scheduler.config.prediction_type
        return {"epsilon": noise, "sample": image, "v_prediction": alpha.sqrt() * noise - (1 - alpha).sqrt() * image}[
            kind
        ]

    return model
