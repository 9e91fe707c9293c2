"""The mix against its equation, its limits and its statistics."""

import math

import pytest
import torch
from scipy import stats

from diffusers_ext import interpolate_embeddings, lerp, noise_diffusion_mix, noise_diffusion_weights, slerp

SHAPE = (2, 3, 4, 4)


def tensors(count, seed=0, dtype=torch.float64):
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_hand(z_0, z_1, x_0, x_1, w, alpha_cumprod, gamma=0.0, s=1.2, c=2.0, noise=None):
    """The equation for one frame, in Python's numbers."""
    alpha = math.sqrt(1 - gamma**2) * math.cos(w * math.pi / 2)
    beta = math.sqrt(1 - gamma**2) * math.sin(w * math.pi / 2)
    mu, nu = s * alpha / (alpha + beta), s * beta / (alpha + beta)
    z = alpha * z_0.clamp(-c, c) + beta * z_1.clamp(-c, c)
    z = z + (mu - alpha) * math.sqrt(alpha_cumprod) * x_0 + (nu - beta) * math.sqrt(alpha_cumprod) * x_1
    if gamma:
        z = z + gamma * math.sqrt(1 - alpha_cumprod) * noise
    return z.clamp(-c, c)


@pytest.mark.parametrize("gamma", [0.0, 0.3])
@pytest.mark.parametrize("w", [0.17, 0.5, 0.83])
def test_mix_is_the_equation(w, gamma):
    z_0, z_1, x_0, x_1, noise = tensors(5)
    found = noise_diffusion_mix(z_0, z_1, x_0, x_1, w, 0.6, 0.8, gamma=gamma, noise=noise)
    assert found.shape == (1, *SHAPE)
    torch.testing.assert_close(found[0], by_hand(z_0, z_1, x_0, x_1, w, 0.36, gamma, noise=noise), atol=1e-12, rtol=0)


def test_every_number_may_differ_by_frame():
    z_0, z_1, x_0, x_1, noise = tensors(5)
    w, gamma, s, c = [0.1, 0.6, 1.0], [0.0, 0.2, 0.5], [1.2, 1.0, 0.8], [1.0, 2.0, 3.0]
    options = {"gamma": gamma, "injection": torch.tensor(s), "boundary": c, "noise": noise}
    found = noise_diffusion_mix(z_0, z_1, x_0, x_1, w, 0.6, 0.8, **options)
    for i in range(3):
        expected = by_hand(z_0, z_1, x_0, x_1, w[i], 0.36, gamma[i], s[i], c[i], noise)
        torch.testing.assert_close(found[i], expected, atol=1e-7, rtol=0)  # s is given in float32
    one = noise_diffusion_mix(z_0, z_1, x_0, x_1, w, 0.6, 0.8, mu=[0.2, 0.3, 0.4], nu=0.1, boundary=None)
    alpha, beta, _, _ = noise_diffusion_weights(0.6)
    expected = alpha * z_0 + beta * z_1 + 0.6 * ((0.3 - alpha) * x_0 + (0.1 - beta) * x_1)
    torch.testing.assert_close(one[1], expected, atol=1e-12, rtol=0)


def test_weights_keep_their_sums_and_are_defined_at_the_ends():
    w = torch.linspace(0, 1, 11, dtype=torch.float64)
    for gamma in (0.0, 0.4, 1.0):
        alpha, beta, mu, nu = noise_diffusion_weights(w, gamma, 1.3)
        torch.testing.assert_close(
            alpha**2 + beta**2 + gamma**2, torch.ones(11, dtype=torch.float64), atol=1e-12, rtol=0
        )
        torch.testing.assert_close(mu + nu, torch.full((11,), 1.3, dtype=torch.float64), atol=1e-12, rtol=0)
    assert [round(float(v), 12) for v in noise_diffusion_weights(0.0)] == [1, 0, 1.2, 0]
    assert [round(float(v), 12) for v in noise_diffusion_weights(1.0)] == [0, 1, 0, 1.2]


def test_image_and_noise_are_decoupled():
    """Without clipping the mix is sqrt(abar) (mu x0 + nu x1) + sqrt(1 - abar) (alpha e0 + beta e1 + gamma n)."""
    x_0, x_1, e_0, e_1, n = tensors(5, dtype=torch.float64)
    z_0, z_1 = 0.6 * x_0 + 0.8 * e_0, 0.6 * x_1 + 0.8 * e_1
    found = noise_diffusion_mix(z_0, z_1, x_0, x_1, 0.3, 0.6, 0.8, gamma=0.2, boundary=None, noise=n)[0]
    alpha, beta, mu, nu = noise_diffusion_weights(0.3, 0.2)
    expected = 0.6 * (mu * x_0 + nu * x_1) + 0.8 * (alpha * e_0 + beta * e_1 + 0.2 * n)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_limits():
    z_0, z_1, x_0, x_1 = tensors(4)
    alpha, beta, _, _ = noise_diffusion_weights(0.3)
    mixed = noise_diffusion_mix(z_0, z_1, x_0, x_1, 0.3, 0.6, 0.8, injection=float(alpha + beta), boundary=None)[0]
    torch.testing.assert_close(mixed, alpha * z_0 + beta * z_1, atol=1e-12, rtol=0)
    end = noise_diffusion_mix(z_0, z_1, x_0, x_1, 0.0, 0.6, 0.8, injection=1.0, boundary=None)[0]
    torch.testing.assert_close(end, z_0, atol=1e-12, rtol=0)
    # The paper's injection does not lead to the end of the path.
    injected = noise_diffusion_mix(z_0, z_1, x_0, x_1, 0.0, 0.6, 0.8, boundary=None)[0]
    torch.testing.assert_close(injected, z_0 + 0.2 * 0.6 * x_0, atol=1e-12, rtol=0)
    swapped = noise_diffusion_mix(z_1, z_0, x_1, x_0, 0.7, 0.6, 0.8)
    torch.testing.assert_close(swapped, noise_diffusion_mix(z_0, z_1, x_0, x_1, 0.3, 0.6, 0.8), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("boundary", "beyond", "variance"), [(2.0, 0.0455, 0.920537), (1.5, 0.133614, 0.778465), (3.0, 0.0027, 0.995007)]
)
def test_clipping_of_normal_noise(boundary, beyond, variance):
    z = torch.randn(1, 1_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    zero = torch.zeros_like(z)
    clipped = noise_diffusion_mix(z, zero, zero, zero, 0.0, 0.6, 0.8, boundary=boundary)[0]
    assert (clipped.abs() == boundary).double().mean().item() == pytest.approx(beyond, abs=1e-3)
    assert clipped.var().item() == pytest.approx(variance, abs=4e-3)
    c = boundary  # the closed form behind the figure
    closed = 1 - 2 * stats.norm.sf(c) - 2 * c * stats.norm.pdf(c) + 2 * c**2 * stats.norm.sf(c)
    assert closed == pytest.approx(variance, abs=1e-6)


@pytest.mark.parametrize("rho", [0.0, 0.5])
def test_variance_of_the_mix(rho):
    """1 for independent noise, 1 + 2 alpha beta rho at correlation rho; half of it for lerp."""
    e_0, other = torch.randn(2, 1, 1_000_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    e_1, zero = rho * e_0 + math.sqrt(1 - rho**2) * other, torch.zeros_like(e_0)
    alpha, beta, _, _ = noise_diffusion_weights(0.5)
    mixed = noise_diffusion_mix(e_0, e_1, zero, zero, 0.5, 0.6, 0.8, boundary=None)
    assert mixed.var().item() == pytest.approx(float(1 + 2 * alpha * beta * rho), abs=5e-3)
    assert lerp(e_0, e_1, 0.5).var().item() == pytest.approx((1 + rho) / 2, abs=5e-3)


def test_noise_is_drawn_once_for_all_frames_and_only_if_needed():
    z_0, z_1, x_0, x_1 = tensors(4)
    generator = torch.Generator().manual_seed(3)
    state = generator.get_state()
    noise_diffusion_mix(z_0, z_1, x_0, x_1, [0.2, 0.8], 0.6, 0.8, generator=generator)
    assert torch.equal(generator.get_state(), state)
    found = noise_diffusion_mix(
        z_0, z_1, x_0, x_1, [0.2, 0.2], 0.6, 0.8, gamma=0.5, boundary=None, generator=generator
    )
    assert torch.equal(found[0], found[1])
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    given = noise_diffusion_mix(z_0, z_1, x_0, x_1, 0.2, 0.6, 0.8, gamma=0.5, boundary=None, noise=noise)
    torch.testing.assert_close(found[0], given[0], atol=1e-12, rtol=0)


def test_slerp():
    a, b = tensors(2)
    for i in range(2):  # one angle per sample
        u, v = a[i].flatten(), b[i].flatten()
        theta = torch.arccos(torch.dot(u, v) / (u.norm() * v.norm()))
        expected = (torch.sin(0.7 * theta) * u + torch.sin(0.3 * theta) * v) / torch.sin(theta)
        torch.testing.assert_close(slerp(a, b, 0.3)[i].flatten(), expected, atol=1e-12, rtol=0)
    unit_a, unit_b = (t / t.flatten(1).norm(dim=1)[:, None, None, None] for t in (a, b))
    norms = slerp(unit_a, unit_b, [0.0, 0.25, 0.5, 1.0]).flatten(2).norm(dim=2)
    torch.testing.assert_close(norms, torch.ones(4, 2, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(slerp(a, b, 0.0), a, atol=1e-9, rtol=0)
    torch.testing.assert_close(slerp(a, b, 1.0), b, atol=1e-9, rtol=0)
    torch.testing.assert_close(slerp(a, a, 0.4), a, atol=1e-6, rtol=0)  # no angle
    zero = torch.zeros_like(a)
    torch.testing.assert_close(slerp(zero, b, 0.25), 0.25 * b, atol=1e-12, rtol=0)
    assert slerp(a.half(), b.half(), 0.5).dtype == torch.float16
    assert slerp(a, b, 0.5).shape == SHAPE
    assert slerp(a, b, [0.5]).shape == (1, *SHAPE)


def test_embeddings():
    a, b = tensors(2)
    torch.testing.assert_close(interpolate_embeddings(a, b, [0.25]), (0.75 * a + 0.25 * b)[None], atol=1e-12, rtol=0)
    assert torch.equal(interpolate_embeddings(a, b, [0.25], "slerp"), slerp(a, b, [0.25]))
    with pytest.raises(ValueError, match="`mode` must be 'lerp' or 'slerp', got 'cubic'"):
        interpolate_embeddings(a, b, [0.5], "cubic")


def test_half_precision_is_kept_and_finite():
    z_0, z_1, x_0, x_1 = (t.half() for t in tensors(4))
    found = noise_diffusion_mix(z_0, z_1, x_0, x_1, [0.3, 0.6], 0.6, 0.8)
    assert found.dtype == torch.float16
    exact = noise_diffusion_mix(*(t.double() for t in (z_0, z_1, x_0, x_1)), [0.3, 0.6], 0.6, 0.8)
    torch.testing.assert_close(found.double(), exact, atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": 1.1}, r"`weights` must lie in \[0, 1\], got 1.1"),
        ({"weights": []}, "`weights` must be a number or a list of numbers"),
        ({"weights": float("nan")}, "`weights` must be a number or a list of numbers"),
        ({"gamma": -0.1}, r"`gamma` must lie in \[0, 1\], got -0.1"),
        ({"boundary": 0.0}, r"`boundary` must be > 0 or None, got 0.0"),
        ({"boundary": [1.0, -2.0], "weights": [0.1, 0.2]}, r"`boundary` must be > 0 or None"),
        ({"mu": 0.5}, "`mu` and `nu` must be given together or not at all, got mu=0.5 and nu=None"),
        ({"gamma": [0.1, 0.2, 0.3], "weights": [0.1, 0.2]}, "`weights` must be one number or 3, one per frame, got 2"),
        ({"x_1": torch.zeros(1, 2)}, r"`x_1` must have the shape \(batch, ...\) of `z_0`, got \(1, 2\)"),
        ({"noise": torch.zeros(1, 2), "gamma": 0.5}, "`noise` must have the shape"),
    ],
)
def test_refusals(change, message):
    z = torch.zeros(SHAPE)
    arguments = {"z_0": z, "z_1": z, "x_0": z, "x_1": z, "weights": 0.5, **change}
    with pytest.raises(ValueError, match=message):
        noise_diffusion_mix(**arguments, sqrt_alpha_prod=0.6, sqrt_one_minus_alpha_prod=0.8)
