"""What likelihood and dimension cost in network calls, with their true errors beside, on Gaussian data.

    python -m benchmarks.geometry.cost     # three minutes

Log-likelihood in nats with exact traces, of normal data in a plane (3 of 6 directions) and of full-rank data: RK45 in
the angle arctan(sigma) (the default) and Heun, against RK45 (SciPy's) in sigma and in uniform t, and Euler in t.
Local dimension: calls an image for an rms error of 1.5, of the denoising loss and of the normal bundle, at D = 64 and
k = 8. Then probes in a batch against one by one on the shipped digits model, and the memory of the normal bundle's
Gram matrix against its rows.
"""

import math
import time

import numpy as np
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from scipy.integrate import solve_ivp

from benchmarks.harness import figure, interleaved, write_result
from diffusers_ext import ScoreField, jacobian_probes, local_dimension, log_likelihood
from diffusers_ext.data.assets import ASSETS

CASES = {"plane": (2.0, 1.0, 0.5, 0.0, 0.0, 0.0), "full": (2.0, 1.0, 0.5, 0.3, 0.2, 0.1)}
TOLERANCES = tuple(10 ** (-k / 2) for k in range(4, 13))
WANTED = 0.003  # nats
DIM, K, ERROR = 64, 8, 1.5
DSM_DRAWS = (4, 6, 8, 10, 12, 16, 24, 32)
NB_DRAWS = (1, 2, 3, 4, 6, 8)  # times D

# Written before the runs.
GOALS = {
    "plane_calls_over_rk45_in_t": "<= 0.5",
    "plane_calls_over_heun": "<= 0.6",
    "dsm_over_normal_bundle_calls": "<= 0.05",
}

SAYS = {
    "plane_calls_over_rk45_in_t": (
        "Log-likelihood on a plane within 0.003 nats takes {:.2f} times the calls of RK45 in uniform t."
    ),
    "plane_calls_over_rk45_in_t_scaled": "It takes {:.2f} times those of RK45 in t for the scheduler's own samples.",
    "plane_calls_over_rk45_in_sigma": "It takes {:.2f} times those of RK45 in sigma.",
    "plane_calls_over_heun": "It takes {:.2f} times those of Heun's method.",
    "full_calls_over_rk45_in_t": "On full-rank data it takes {:.2f} times the calls of RK45 in uniform t.",
    "(plane|full)_error_euler_in_t_200": "Euler's method in t is {:.2g} nats off after 200 calls (\\1).",
    "dsm_over_normal_bundle_calls": (
        "The denoising loss gets to an rms error of 1.5 in {:.3f} times the calls of the normal bundle at n = 8 D."
    ),
    "normal_bundle_least_calls": "The normal bundle needs {:.0f} calls for an rms error of 1.5, of 64 values.",
    "normal_bundle_error_there": "It is {:.2g} off there, and has no error at n = 8 D.",
    "probes_batched_over_single": "32 probes in a batch take {:.2f} times as long as one by one.",
    "gram_over_rows": "The normal bundle's matrix takes {:.3f} times the memory of its rows at n = 8 D.",
}


def gaussian(eigenvalues):
    """Returns the exact field of normal data, by a model that knows only its timestep."""
    levels = ScoreField(lambda x, t: x, DDPMScheduler()).levels
    times, logs = levels.t.numpy(), levels.sigma.log().numpy()

    def model(x, t):
        sigma = torch.from_numpy(np.exp(np.interp(t.double().numpy(), times, logs)))[:, None]
        return sigma * x * (1 + sigma**2).sqrt() / (eigenvalues + sigma**2)

    return ScoreField(model, DDPMScheduler())


def elsewhere(eigenvalues, tol, scaled=False, in_sigma=False):
    """Likelihood by the flow in other variables, by RK45 at a tolerance or, without one, by Euler in 200 steps.

    Args:
        eigenvalues: of the data's covariance.
        tol: relative and absolute tolerance.
        scaled: solve for the scheduler's own samples, a times y, instead of y.
        in_sigma: over sigma instead of uniform t; between timesteps ln sigma is linear, as for the method under test.

    Returns: error in nats, calls.
    """
    values = eigenvalues.numpy()
    levels = gaussian(eigenvalues).levels
    times, logs = levels.t.numpy(), levels.sigma.log().numpy()
    rates = np.diff(logs)

    def slope(at, state):
        sigma = at if in_sigma else np.exp(np.interp(at, times, logs))
        speed = 1.0 if in_sigma else sigma * rates[min(int(at), len(rates) - 1)]
        a = 1 / np.sqrt(1 + sigma**2) if scaled else 1.0
        eps, trace = sigma * state[:-1] / a / (values + sigma**2), (sigma / (values + sigma**2)).sum()
        if scaled:
            eps, trace = a * eps - a**2 * sigma * state[:-1], trace - len(values) * a**2 * sigma
        return speed * np.append(eps, trace)

    low, high = np.exp(logs[0]), np.exp(logs[-1])
    first, last = ((1 + s**2) ** -0.5 if scaled else 1.0 for s in (low, high))
    start = np.append(first * np.sqrt(values + low**2), 0.0)
    ends = (low, high) if in_sigma else (times[0], times[-1])
    if tol is None:
        end, calls = start, 200
        grid = np.linspace(*ends, calls + 1)
        for now, then in zip(grid, grid[1:], strict=False):
            end = end + (then - now) * slope(now, end)
    else:
        result = solve_ivp(slope, ends, start, rtol=tol, atol=tol)
        end, calls = result.y[:, -1], result.nfev
    variance, y = high**2 + 1, end[:-1] / last
    nats = -0.5 * (y @ y / variance + len(values) * math.log(2 * math.pi * variance)) + end[-1]
    return abs(nats + len(values) * math.log(first / last) - true_nats(values, low)), calls


def true_nats(values, low):
    return -0.5 * (len(values) + np.log(2 * math.pi * (values + low**2)).sum())


def ours(eigenvalues, **kwargs):
    field = gaussian(eigenvalues)
    low = field.levels.sigma[0].item()
    x = (eigenvalues + low**2).sqrt()[None]
    found = log_likelihood(field, x, trace="exact", **kwargs)
    return abs(found.nats.item() - true_nats(eigenvalues.numpy(), low)), found.calls.item()


def likelihoods(figures):
    for name, values in CASES.items():
        eigenvalues = torch.tensor(values, dtype=torch.float64)
        tried = {
            "rk45": {tol: ours(eigenvalues, tol=tol) for tol in TOLERANCES},
            "rk45_in_sigma": {tol: elsewhere(eigenvalues, tol, in_sigma=True) for tol in TOLERANCES},
            "rk45_in_t": {tol: elsewhere(eigenvalues, tol) for tol in TOLERANCES},
            "rk45_in_t_scaled": {tol: elsewhere(eigenvalues, tol, scaled=True) for tol in TOLERANCES},
            "heun": {n: ours(eigenvalues, method="heun", num_steps=n) for n in (50, 100, 200)},
            "euler_in_t": {200: elsewhere(eigenvalues, None)},
        }
        for method, runs in tried.items():
            for setting, (error, calls) in runs.items():
                figures[f"{name}_error_{method}_{setting:.3g}"] = figure(error, "nats")
                figures[f"{name}_calls_{method}_{setting:.3g}"] = figure(calls, "calls")
        least = {method: least_calls(list(runs.values())) for method, runs in tried.items()}
        for method, calls in least.items():
            if calls is not None:
                figures[f"{name}_least_{method}"] = figure(calls, "calls")
        for other in ("rk45_in_t", "rk45_in_t_scaled", "rk45_in_sigma", "heun"):
            key = f"{name}_calls_over_{other}"
            figures[key] = figure(least["rk45"] / least[other], "ratio", GOALS.get(key))


def least_calls(runs):
    """Returns the calls of the first setting from which on all errors are within what is wanted, or `None`.

    A looser tolerance may hit the answer by chance.
    """
    good = 0
    while good < len(runs) and runs[-1 - good][0] <= WANTED:
        good += 1
    return runs[-good][1] if good else None


def dimensions(figures):
    eigenvalues = torch.cat([torch.ones(K), torch.zeros(DIM - K)]).double()
    field, sigma, generator = gaussian(eigenvalues), 0.05, torch.Generator().manual_seed(0)
    x = torch.randn(400, DIM, generator=generator, dtype=torch.float64) * eigenvalues.sqrt()

    def error(method, draws, images):
        found = local_dimension(field, x[:images], method, sigma, draws, 2048, generator)
        return (found.curve - K).square().mean().sqrt().item()

    dsm = {n: error("dsm", n, 400) for n in DSM_DRAWS}
    bundle = {n * DIM: error("normal_bundle", n * DIM, 40) for n in NB_DRAWS}
    for name, runs in (("dsm", dsm), ("normal_bundle", bundle)):
        for draws, value in runs.items():
            figures[f"{name}_error_{draws}_calls"] = figure(value, "dimensions")
    least = {name: min(n for n, e in runs.items() if e <= ERROR) for name, runs in (("dsm", dsm), ("nb", bundle))}
    figures["dsm_least_calls"] = figure(least["dsm"], "calls")
    figures["normal_bundle_least_calls"] = figure(least["nb"], "calls")
    figures["normal_bundle_error_there"] = figure(bundle[least["nb"]], "dimensions")
    goal = GOALS["dsm_over_normal_bundle_calls"]
    figures["dsm_over_normal_bundle_calls"] = figure(least["dsm"] / (8 * DIM), "ratio", goal)


def machine(figures):
    pipe = DiffusionPipeline.from_pretrained(ASSETS / "digits-epsilon")
    field = ScoreField.from_pipeline(pipe)
    x = torch.randn(1, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    times = interleaved(
        {n: lambda n=n: jacobian_probes(field, x, 0.5, 32, n, torch.Generator().manual_seed(0)) for n in (32, 1)}, 3
    )
    figures["probes_batched_over_single"] = figure(times[32] / times[1], "ratio")
    gram, rows = 8 * 784**2, 4 * 8 * 784 * 784  # float64 against float32 rows of n = 8 D
    figures["gram_over_rows"] = figure(gram / rows, "ratio")


def main():
    torch.set_num_threads(1)
    start, figures = time.perf_counter(), {}
    likelihoods(figures)
    dimensions(figures)
    machine(figures)
    seconds = time.perf_counter() - start
    write_result("geometry/cost", "python -m benchmarks.geometry.cost", figures, [0], seconds, says=SAYS)


if __name__ == "__main__":
    main()
