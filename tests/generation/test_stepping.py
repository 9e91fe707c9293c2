"""A scheduler as it is used, not as it was asked for."""

import pytest
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler

from diffusers_ext.generation.stepping import current_config
from diffusers_ext.methods.mmd_ddm.checks import check_chain
from diffusers_ext.methods.noise_diffusion.levels import any_levels
from diffusers_ext.training.pretrained import check_inference_steps, converted


def test_the_configuration_is_the_present_one():
    """Diffusers' own `from_config` leaves out what was given by position or changed since."""
    scheduler = DDIMScheduler(500)
    scheduler.register_to_config(steps_offset=1)
    assert DDIMScheduler.from_config(scheduler.config).config.num_train_timesteps == 1000
    made = DDIMScheduler.from_config(current_config(scheduler))
    for each in (scheduler, made):
        each.set_timesteps(10)
    assert made.timesteps.tolist() == scheduler.timesteps.tolist() == [451, 401, 351, 301, 251, 201, 151, 101, 51, 1]
    euler = converted(EulerDiscreteScheduler, scheduler)
    assert (euler.config.num_train_timesteps, euler.config.steps_offset) == (500, 1)
    assert euler.config.timestep_spacing == "linspace"  # the class's own, where nobody chose


def test_checks_try_the_scheduler_as_it_is():
    scheduler = DDIMScheduler(clip_sample=False)
    check_inference_steps(scheduler, "validation_inference_steps", 1000)
    check_chain(scheduler, 5)
    scheduler.register_to_config(steps_offset=1)
    with pytest.raises(ValueError, match="`validation_inference_steps` must be .* DDIMScheduler takes .* got 1000"):
        check_inference_steps(scheduler, "validation_inference_steps", 1000)
    scheduler.register_to_config(steps_offset=0, timestep_spacing="linspace")
    with pytest.raises(ValueError, match="`timestep_spacing` must be 'leading' for 5 steps of DDIMScheduler"):
        check_chain(scheduler, 5)
    assert scheduler.num_inference_steps is None


def test_alphas_are_lent_with_the_present_offset():
    scheduler = DDPMScheduler()
    scheduler.register_to_config(steps_offset=1)
    assert any_levels(scheduler, 10, 0.3, {}).timesteps == (1, 101, 201)
