"""What is refused by name: wrong types and ranges, and shapes that would be broadcast unseen; inputs stay as given."""

import math
import re

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel

from diffusers_ext import (
    ScoreField,
    SteinResidualCallback,
    conservativity,
    exact_jacobian,
    find_plateau,
    gauge_residual,
    gauge_transform,
    jacobian_probes,
    local_dimension,
    log_likelihood,
    probability_flow,
    rank_by_dimension,
    stein_residual,
)

from .gaussian import PLANE, antisymmetric, gaussian_field, seeded

FIELD, Q = gaussian_field(PLANE), antisymmetric(10)
X = torch.ones(2, 10, dtype=torch.float64)
NAN, SIGMAS = math.nan, torch.tensor([0.1, 0.2, 0.4])
FUNCTIONS = {
    "stein": lambda **k: stein_residual(**{"field": FIELD, "x": X, "sigmas": 0.5, **k}),
    "gauge": lambda **k: gauge_residual(**{"field": FIELD, "x": X, "sigmas": 0.5, **k}),
    "conservativity": lambda **k: conservativity(**{"field": FIELD, "x": X, "sigmas": 0.5, **k}),
    "dimension": lambda **k: local_dimension(**{"field": FIELD, "x": X, "sigmas": 0.5, **k}),
    "rank": lambda **k: rank_by_dimension(**{"field": FIELD, "x": X, "sigma": 0.5, **k}),
    "likelihood": lambda **k: log_likelihood(**{"field": FIELD, "x": X, **k}),
    "probes": lambda **k: jacobian_probes(**{"field": FIELD, "x": X, "sigma": 0.5, **k}),
    "jacobian": lambda **k: exact_jacobian(**{"field": FIELD, "x": X, "sigma": 0.5, **k}),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_measurement(name):
    for argument, values in {
        "field": (None, FIELD.eps),
        "x": (None, X.numpy(), X.long(), X + 0j, X * NAN, X[:0], X[:, :0], X[0]),
        "batch_size": (None, 0, 1.5, True),
    }.items():
        for value in values:
            with pytest.raises(ValueError, match=f"`{argument}` must be"):
                FUNCTIONS[name](**{argument: value})


@pytest.mark.parametrize(
    ("name", "argument", "values"),
    [
        ("stein", "sigmas", ("a", [], [0.5, 0.5], [0.5, 0.1], torch.tensor(1j))),
        ("stein", "num_draws", (0, 1.5, True)),
        ("stein", "generator", ("a", [seeded()])),
        ("rank", "sigma", ([0.1, 0.5], "a", NAN)),
        ("probes", "sigma", (torch.tensor([0.1, 0.5]), None)),
        ("jacobian", "sigma", ([0.1, 0.5], 0.0)),
        ("likelihood", "sigma_min", ("a", [0.1, 0.2], NAN, 0.0, 1e9)),
        ("likelihood", "bin_width", (None, 0, -1.0, NAN, True)),
        ("likelihood", "tol", (None, "a", True, 1)),
    ],
)
def test_an_argument(name, argument, values):
    for value in values:
        with pytest.raises(ValueError, match=f"`{argument}` must be"):
            FUNCTIONS[name](**{argument: value})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: probability_flow(FIELD.eps, X, [0.5, 0.1]), "`field` must be a ScoreField, got method"),
        (lambda: probability_flow(FIELD, X * NAN, [0.5, 0.1]), "`y` must be finite"),
        (lambda: probability_flow(FIELD, None, [0.5, 0.1]), "`y` must be floats of the shape"),
        (lambda: probability_flow(FIELD, X, [[0.5, 0.1]]), "`sigmas` must be two levels or more"),
        (lambda: FIELD.add_noise(X[:1], X, 0.5), "`noise` must have the shape of x0, (1, 10), got (2, 10)"),
        (lambda: FIELD.add_noise(X[:1], X[:1], torch.ones(2)), "`sigma` must be one level or 1, got the shape (2,)"),
        (lambda: FIELD.eps(X, 0.0, beyond=True), "`sigma` must be above 0 and finite, got 0.0"),
        (lambda: FIELD.eps(X, math.inf, beyond=True), "`sigma` must be above 0 and finite, got inf"),
        (lambda: gauge_transform(FIELD, Q + 0j), "`Q` must be an antisymmetric (D, D) matrix"),
        (lambda: gauge_transform(FIELD, Q.long()), "`Q` must be an antisymmetric (D, D) matrix"),
        (lambda: gauge_transform(FIELD, torch.zeros(0, 0)), "`Q` must be an antisymmetric (D, D) matrix"),
        (lambda: gauge_transform(FIELD, Q, True), "`beta` must be a finite number or a function"),
        (
            lambda: gauge_transform(FIELD, Q, lambda y, s: y.detach().sum(1)).eps(X, 0.5),
            "`beta` must return a function",
        ),
        (lambda: find_plateau(SIGMAS.flip(0), SIGMAS, 3), "`sigmas` must be rising numbers > 0"),
        (lambda: find_plateau(SIGMAS * 0, SIGMAS, 3), "`sigmas` must be rising numbers > 0"),
        (lambda: find_plateau(SIGMAS, SIGMAS, "a"), "`dim` must be an integer >= 1, got 'a'"),
        (lambda: find_plateau(SIGMAS, SIGMAS, 3, [True] * 3), "`masked` must be bool of the shape (3,)"),
        (lambda: find_plateau(SIGMAS, SIGMAS, 3, None, [0.1] * 3), "`slope_error` must have the shape (3,), got [0.1"),
        (lambda: SteinResidualCallback(every=True), "`every` must be an integer >= 1, got True"),
    ],
)
def test_shapes_and_numbers(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_nothing_given_is_changed():
    """Images that ask for a gradient, in training mode, under inference: measured, and left as they were."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=4, in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=2, layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    field, images = ScoreField(unet, DDPMScheduler()), torch.randn(2, 1, 4, 4)
    given, state = images.clone().requires_grad_(), torch.get_rng_state()

    def measured(x):
        few = {"num_draws": 2, "generator": seeded()}
        return [
            stein_residual(field, x, 0.5, generator=seeded()).value,
            gauge_residual(field, x, 0.5, generator=seeded()).value,
            conservativity(field, x, 0.5, 2, generator=seeded()).eps,
            local_dimension(field, x, "flipd", 0.5, **few).curve,
            local_dimension(field, x, "flow_map", 0.5, num_steps=2, **few).curve,
            log_likelihood(field, x, 50.0, tol=0.5, num_probes=2, generator=seeded()).nats,
            exact_jacobian(field, x, 0.5),
            probability_flow(field, x, [1.0, 0.5]),
        ]

    found = measured(given)
    assert torch.equal(given, images)
    assert given.grad is None
    assert unet.training
    assert all(p.requires_grad and p.grad is None for p in unet.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(value.requires_grad for value in found)
    with torch.inference_mode():
        for ours, theirs in zip(measured(images), found, strict=True):
            torch.testing.assert_close(ours, theirs)
        # A gauge whose factor has a gradient of its own.
        turned = gauge_transform(field, antisymmetric(16), lambda y, s: y.square().flatten(1).sum(1))
        inside = turned.eps(images, 0.5)
    torch.testing.assert_close(inside, turned.eps(images, 0.5))
    half = images.to(torch.bfloat16)  # half precision is measured in single
    for ours, theirs in zip(measured(half), measured(half.float()), strict=True):
        assert torch.equal(ours, theirs)


def test_fields_that_are_not_finite():
    broken = ScoreField(lambda x, t: x * NAN, DDPMScheduler())
    with pytest.warns(UserWarning, match="log-likelihood is -inf"):
        assert log_likelihood(broken, X, num_probes=2).nats.tolist() == [-math.inf] * 2
    with pytest.raises(ValueError, match="`field` must be finite at sigma 0.5"):
        local_dimension(broken, X, "normal_bundle", 0.5, num_draws=10)
    with pytest.raises(ValueError, match="`field` must be finite at sigma 0.5"):
        rank_by_dimension(broken, X, 0.5, num_draws=2)
