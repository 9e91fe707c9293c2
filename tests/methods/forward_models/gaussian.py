"""A signal of three numbers, normal with a known covariance, seen one number at a time, and its exact denoiser."""

import torch
from diffusers import DDIMScheduler, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config

from diffusers_ext import CropForwardModel, ForwardModelPipeline

COVARIANCE = torch.tensor([[1, 0.8, 0.3], [0.8, 1, 0.5], [0.3, 0.5, 1]], dtype=torch.float64)


class ExactDenoiser(ModelMixin, ConfigMixin):
    """E[S | x_t, context], read off what the network is shown: the context is exact, x_t has the schedule's noise.

    All samples of a batch must be seen from the same views.
    """

    @register_to_config
    def __init__(self, signal_shape=(1, 1, 3), scale=1.0):
        super().__init__()
        self.placeholder = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.levels = scheduler().alphas_cumprod.double()
        self.calls = 0

    def lift(self, observation, corners):
        """Puts each number in its place."""
        place = torch.nn.functional.one_hot(corners[:, 1], 3).to(observation)
        return place * observation.flatten(1), place

    def forward(self, sample, timestep, return_dict=False):
        self.calls += 1
        # Guided calls have two halves, with context and without.
        parts = sample.chunk(2) if len(sample[:, -1].unique()) == 2 else [sample]
        return (torch.cat([self.estimate(part, int(timestep)) for part in parts]),)

    def estimate(self, sample, timestep):
        context, covered, noisy, looked, _, _ = sample.split([3, 3, 3, 3, 3, 1], 1)
        alpha, eye = self.levels[timestep], torch.eye(3, dtype=torch.float64)
        known, seen = covered[0].nonzero()[:, 0], looked[0].nonzero()[:, 0]
        rows = torch.cat([eye[known], alpha.sqrt() * self.config.scale * eye[seen]])
        noise = torch.cat([torch.zeros(len(known)), (1 - alpha) * torch.ones(len(seen))]).double()
        solve = torch.linalg.solve(rows @ COVARIANCE @ rows.T + noise.diag(), rows @ COVARIANCE)
        data = torch.cat([context[:, known] / covered[0, known], noisy[:, seen]], 1)
        return (data @ solve)[:, None, None]


def scheduler():
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="sample", clip_sample=False, timestep_spacing="trailing"
    )


def pipeline(scale=1.0, **options):
    exact = ExactDenoiser(scale=scale)
    made = ForwardModelPipeline(exact, scheduler(), CropForwardModel(1, (1, 3)), observation_scale=scale, **options)
    made.set_progress_bar_config(disable=True)
    return made


def coordinates(batch, *places):
    """Parameters of views of these coordinates."""
    return torch.tensor([[0, place] for place in places]).expand(batch, -1, -1)


def observed(batch, value=1.0):
    """The first coordinate, seen."""
    return torch.full((batch, 1, 1, 1, 1), value, dtype=torch.float64)
