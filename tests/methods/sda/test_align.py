"""Alignment against stock Diffusers, closed forms and finite differences."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from diffusers_ext import AlignConfig, LowPass, align
from diffusers_ext.methods.sda.align import _Schedule

from .tiny import GaussianDenoiser, unet

SCHEDULER = DDPMScheduler(timestep_spacing="linspace", variance_type="fixed_large")


def images(n=2, channels=1, size=8, seed=0):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def seeded(n, first=0):
    return [torch.Generator().manual_seed(first + i) for i in range(n)]


def test_respaced_timesteps_and_levels():
    schedule = _Schedule(SCHEDULER, 100)
    stock = DDPMScheduler(timestep_spacing="linspace")
    stock.set_timesteps(100)
    assert schedule.timesteps == stock.timesteps.tolist()[::-1]
    assert (schedule.timesteps[50], schedule.timesteps[49]) == (505, 494)
    assert math.sqrt(schedule.abar[50]) == pytest.approx(0.271917, abs=1e-6)
    assert math.sqrt(schedule.abar[49]) == pytest.approx(0.287467, abs=1e-6)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_without_guidance_it_is_the_stock_loop(kind, learned):
    net, x = unet(out=2 if learned else 1), images()
    variance = "learned_range" if learned else "fixed_large"
    stock = DDPMScheduler(timestep_spacing="linspace", variance_type=variance, prediction_type=kind)
    stock.set_timesteps(20)
    generator = torch.Generator().manual_seed(3)
    times = stock.timesteps.flip(0)
    z = stock.add_noise(x, torch.randn(x.shape, generator=generator), times[10].repeat(2))
    with torch.no_grad():
        for t in times[:10].flip(0):
            z = stock.step(net(z, t).sample, t, z, generator=generator).prev_sample
    config = AlignConfig(num_steps=20, strength=0.5, guidance_weight=0, factor=2)
    ours = align(net, stock, x, config, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(ours, z, atol=1e-5)


def test_strength_zero_changes_nothing():
    assert torch.equal(align(unet(), SCHEDULER, images(), AlignConfig(strength=0)), images())


@pytest.mark.parametrize("detach", [False, True])
def test_one_guided_step_on_gaussian_data_equals_the_closed_form(detach):
    """For a linear denoiser x0_hat = c z + k, so the gradient in z is c times that of the norm."""
    torch.manual_seed(0)
    mean, variance = 0.1 * torch.randn(1, 8, 8).double(), 0.005 + 0.01 * torch.rand(1, 8, 8).double()
    net, x, weight = GaussianDenoiser(SCHEDULER, mean, variance), 0.2 * images(), 0.05
    seen = []
    config = AlignConfig(num_steps=20, strength=0.2, guidance_weight=weight, factor=4, detach_unet=detach)
    align(net, SCHEDULER, x, config, generator=seeded(2), callback=lambda i, t, z: seen.append((t, z.clone())))
    (_, z), (t, after) = seen[-2:]
    assert t == 0
    a, z = SCHEDULER.alphas_cumprod[0].double(), z.double()
    slope = a.sqrt() * variance / (a * variance + 1 - a)
    x0 = slope * z + (1 - slope * a.sqrt()) * mean  # the posterior mean of Gaussian data
    assert x0.abs().max() < 1  # the clamp is out of play
    matrix = LowPass(8, 4, dtype=torch.float64)
    difference = matrix(x.double()) - matrix(x0)
    basis = torch.eye(64, dtype=torch.float64).reshape(64, 1, 8, 8)
    adjoint = torch.einsum("kij,bij->bk", matrix(basis)[:, 0], difference[:, 0]).reshape(2, 1, 8, 8)
    gradient = -adjoint / difference.flatten(1).norm(dim=1).reshape(2, 1, 1, 1)
    expected = x0 - weight * gradient * (1 / a.sqrt() if detach else slope)
    assert (after - expected).abs().max() < 1e-6


def test_gradient_through_the_network_equals_finite_differences():
    net, x = unet().double(), images(1).double()
    low_pass = LowPass(8, 2, dtype=torch.float64)
    from diffusers_ext.methods.sda.align import _guided

    class Double(torch.nn.Module):
        dtype = torch.float64

        def forward(self, z, t, return_dict=False):
            return (Same(net(z, t).sample),)

    class Same(torch.Tensor):
        """A tensor that `float()` leaves in double precision."""

        def float(self):
            return self

    schedule, config = _Schedule(SCHEDULER, 20), AlignConfig(factor=2, guidance_weight=1)
    z, direction = 0.3 * torch.randn_like(x), torch.randn_like(x)

    def distance(z):
        with torch.no_grad():
            x0 = schedule.estimate(3, z, net(z, schedule.timesteps[3]).sample).clamp(-1, 1)
        return low_pass.distance(low_pass.reduce(x), x0)[0].item()

    gradient = _guided(Double(), schedule, 3, z, low_pass, low_pass.reduce(x), config)[2]
    numeric = (distance(z + 1e-6 * direction) - distance(z - 1e-6 * direction)) / 2e-6
    assert float((gradient * direction).sum()) == pytest.approx(numeric, abs=1e-6)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_an_image_does_not_depend_on_its_batch(sampler):
    net, x = unet(), images(4)
    config = AlignConfig(num_steps=10, strength=0.5, guidance_weight=2, factor=2, sampler=sampler)
    together = align(net, SCHEDULER, x, config, generator=seeded(4))
    alone = [align(net, SCHEDULER, x[i : i + 1], config, generator=seeded(1, i)) for i in range(4)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)


def test_the_norm_over_a_batch_depends_on_it_and_equals_ours_alone():
    net, x = unet(), images(4)
    shared = AlignConfig(num_steps=10, strength=0.5, guidance_weight=2, factor=2, norm="batch")
    own = AlignConfig(num_steps=10, strength=0.5, guidance_weight=2, factor=2)
    together = align(net, SCHEDULER, x, shared, generator=seeded(4))
    alone = torch.cat([align(net, SCHEDULER, x[i : i + 1], shared, generator=seeded(1, i)) for i in range(4)])
    assert (together - alone).pow(2).mean().sqrt() > 0.01
    assert torch.allclose(alone, align(net, SCHEDULER, x, own, generator=seeded(4)), atol=1e-5)


def test_guidance_keeps_low_frequencies():
    net, x = unet(), images(3)
    low_pass = LowPass(8, 4)

    def distance(weight, **options):
        config = AlignConfig(num_steps=20, strength=0.5, guidance_weight=weight, factor=4, **options)
        return low_pass.distance(low_pass.reduce(x), align(net, SCHEDULER, x, config, generator=seeded(3)))[0].mean()

    assert distance(0.5) < 0.7 * distance(0)
    assert distance(0.5, detach_unet=True) < 0.7 * distance(0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite_and_near(dtype):
    x, config = images(), AlignConfig(num_steps=10, strength=0.3, guidance_weight=1, factor=2)
    exact = align(unet(), SCHEDULER, x, config, generator=seeded(2))
    half = align(unet().to(dtype), SCHEDULER, x.to(dtype), config, generator=seeded(2))
    assert half.dtype == dtype
    assert torch.isfinite(half).all()
    assert (half.float() - exact).abs().max() < 0.1


def test_the_gradient_goes_through_layerwise_casting():
    """Weights kept in fp8 between calls: as a network whose weights were rounded so."""
    net, rounded = unet(), unet()
    net.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    kept = {name for name, p in net.named_parameters() if p.dtype == torch.float8_e4m3fn}
    assert len(kept) > 10
    for name, p in rounded.named_parameters():
        if name in kept:
            p.data = p.data.to(torch.float8_e4m3fn).float()
    config = AlignConfig(num_steps=10, factor=2)
    found, expected = (align(it, SCHEDULER, images(), config, generator=seeded(2)) for it in (net, rounded))
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, align(unet(), SCHEDULER, images(), config, generator=seeded(2)), atol=1e-3)


def test_callback_counts_and_its_result_is_used():
    calls = []

    def callback(index, timestep, z):
        calls.append((index, timestep))
        return torch.zeros_like(z) if timestep == 0 else None

    out = align(unet(), SCHEDULER, images(), AlignConfig(num_steps=10, strength=0.3, factor=2), callback=callback)
    assert calls == [(0, 222), (1, 111), (2, 0)]
    assert out.abs().max() == 0


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_steps": 0}, "`num_steps` must be an integer >= 1"),
        ({"strength": 1.0}, "`strength` must be in"),
        ({"strength": 0.999}, "`strength` must be in"),
        ({"guidance_weight": -1.0}, "`guidance_weight` must be a number >= 0"),
        ({"norm": "none"}, "`norm` must be"),
        ({"sampler": "euler"}, "`sampler` must be"),
    ],
)
def test_settings_out_of_range(changes, match):
    with pytest.raises(ValueError, match=match):
        AlignConfig(**changes)


def test_images_that_do_not_fit():
    config = AlignConfig(num_steps=10, strength=0.2, factor=2)
    with pytest.raises(ValueError, match=r"`images` must have the shape \(batch, 1, 8, 8\)"):
        align(unet(), SCHEDULER, torch.zeros(1, 3, 8, 8), config)
    with pytest.raises(ValueError, match=r"`images` must be floats in \[-1, 1\]"):
        align(unet(), SCHEDULER, torch.zeros(1, 1, 8, 8, dtype=torch.uint8), config)
    with pytest.raises(ValueError, match="`generator` must be one generator or a list of 2"):
        align(unet(), SCHEDULER, images(), config, generator=seeded(3))
    with pytest.raises(ValueError, match="`num_steps` must be at most the schedule's 1000"):
        align(unet(), SCHEDULER, images(), AlignConfig(num_steps=1001, factor=2))
