"""What the pipeline of forward models costs beside its parts, samples in a batch, and a training step.

    python -m benchmarks.forward_models.speed     # three minutes on one core

The pipeline draws two views of 32x32 images, of which the context is a window, with a UNet. Its time is compared with
that of its parts on fixed inputs: as many lifts of the noisy view, calls of the network and of the forward model and
steps of the scheduler, one after the other. Training is compared with a loop written by hand of the same parts; the
loops take turns in short stretches. All times are those of the processor, of one thread.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import statistics
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, UNet2DModel

from benchmarks.forward_models.flatland import angles, camera, digits, views
from benchmarks.forward_models.training import write_observations
from benchmarks.harness import figure, interleaved, write_result
from benchmarks.training.engine import STRETCH, Stretches
from diffusers_ext import (
    CropForwardModel,
    ForwardModelConfig,
    ForwardModelPipeline,
    ForwardModelRecipe,
    ObservationMLP,
    Trainer,
    forward_model_loss,
    lift_views,
    lifted_input,
    observe,
)

REPEATS, STEPS, VIEWS, ROUNDS, BATCH = 9, 10, 2, 12, 16
CLOCK = time.process_time  # of one thread: other work on the machine does not count
SAYS = {
    "pipeline_over_parts": (
        "Sampling takes {:.3f} times as long as its lifts, calls of the network and the forward model and scheduler "
        "steps alone."
    ),
    "network_call": "A call of that network takes {:.3f} seconds.",
    "context_lifts_a_view": "Each view of the context is lifted {:.0f} time(s), not at every step.",
    r"batch_of_8_(\w+)": r"Eight samples in one call are {:.1f} times as fast as in eight calls (\1).",
    "training_step_over_bare_loop": "A training step takes {:.3f} times as long as a loop of the same parts by hand.",
    "bare_step": "A step of that loop takes {:.2f} seconds.",
}


def scheduler():
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="sample", clip_sample=False, timestep_spacing="trailing"
    )


def unet(size, channels, blocks):
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=size, in_channels=channels, out_channels=1, block_out_channels=blocks, layers_per_block=1,
        norm_num_groups=8, down_block_types=("DownBlock2D",) * len(blocks), add_attention=False,
        up_block_types=("UpBlock2D",) * len(blocks),
    ).eval()  # fmt: skip


def made(network, forward_model):
    pipeline = ForwardModelPipeline(network, scheduler(), forward_model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class CountedCrop(CropForwardModel):
    """Counts the observations that are lifted."""

    lifted = 0

    def lift(self, observation, parameters, signal_shape):
        self.lifted += len(observation)
        return super().lift(observation, parameters, signal_shape)


@torch.no_grad()
def pipeline_and_parts():
    """Returns the ratio of the pipeline to its parts, the seconds of a network's call, and lifts of a context view."""
    model, batch = CountedCrop(size=16, sample_size=32), 4
    pipeline = made(unet(32, 6, (32, 48)), model)
    network, steps = pipeline.unet, scheduler()
    steps.set_timesteps(STEPS)
    corners = torch.tensor([[[0, 0], [8, 8], [16, 16]]]).expand(batch, -1, -1)
    seen, x_t = torch.rand(batch, 1, 1, 16, 16), torch.randn(batch, 1, 1, 16, 16)
    here, t, signal = corners[:, 1:2], steps.timesteps[5], torch.rand(batch, 1, 32, 32)

    def lift():
        return lifted_input(lift_views(network, model, x_t, here))

    inputs = lift()

    def parts():
        for _ in range(STEPS * VIEWS):
            network(lift(), t)
            steps.step(observe(signal, model, here), t, x_t, eta=1.0)

    generator = torch.Generator().manual_seed(0)

    def sample():
        return pipeline(seen, corners[:, :1], corners[:, 1:], num_inference_steps=STEPS, eta=1.0, generator=generator)

    model.lifted = 0
    sample()
    lifts = (model.lifted / batch - STEPS * VIEWS) / VIEWS  # the given view and the first sampled one
    times = interleaved({"pipeline": sample, "parts": parts, "call": lambda: network(inputs, t)}, REPEATS, CLOCK)
    return times["pipeline"] / times["parts"], times["call"], lifts


def batched(network, forward_model, context):
    """Returns how much faster 8 samples are in one call."""
    pipeline = made(network, forward_model)

    def draw(count):
        return pipeline(*context, num_views=2, num_inference_steps=STEPS, eta=1.0, num_samples=count)

    times = interleaved({"one": lambda: draw(8), "eight": lambda: [draw(1) for _ in range(8)]}, REPEATS, CLOCK)
    return times["eight"] / times["one"]


def bare_loop(network, observations, parameters, model):
    """Returns a function that makes `STRETCH` steps of the loop one would write by hand, and returns its seconds."""
    accelerator, noiser = Accelerator(), scheduler()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    data = torch.utils.data.TensorDataset(observations, parameters)
    loader = torch.utils.data.DataLoader(data, BATCH, shuffle=True, drop_last=True)
    network, optimizer, loader = accelerator.prepare(network, optimizer, loader)

    def batches():
        while True:
            yield from loader

    stream = batches()

    def run():
        start = CLOCK()
        for _ in range(STRETCH):
            seen, where = next(stream)
            order = torch.rand(seen.shape[:2]).argsort(1)
            rows = torch.arange(len(seen))[:, None]
            (some, at), (target, there), (novel, beyond) = (
                (seen[rows, order[:, i : i + 1]], where[rows, order[:, i : i + 1]]) for i in range(3)
            )
            t = torch.randint(1000, (len(seen),))
            noisy = noiser.add_noise(4 * target, torch.randn_like(target), t)
            kept = (torch.rand(len(seen), 1) >= 0.1).float()
            context = lift_views(network, model, some, at, kept)
            inputs = lifted_input(lift_views(network, model, noisy, there), context)
            with accelerator.accumulate(network):
                signal = network(inputs, t, return_dict=False)[0]
                loss = forward_model_loss(signal, model, target, there, novel, beyond)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        return CLOCK() - start

    return run


def training_ratio():
    """Returns the ratio of a step to that of the bare loop, its spread, and the bare step's seconds."""
    model = CropForwardModel(size=16, sample_size=32)
    generator = torch.Generator().manual_seed(0)
    parameters = model.sample_parameters(256 * 3, generator).unflatten(0, (256, 3))
    images = torch.rand(256, 1, 32, 32, generator=generator)
    observations = observe(images, model, parameters)
    with tempfile.TemporaryDirectory() as folder:
        path = write_observations(Path(folder) / "views.npz", observations, parameters)
        (Path(folder) / "unet.json").write_text(
            '{"block_out_channels": [32, 48], "layers_per_block": 1, "norm_num_groups": 8, "add_attention": false, '
            '"down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"]}'
        )
        config = ForwardModelConfig(
            train_data_dir=str(path), unet_config=str(Path(folder) / "unet.json"), output_dir=f"{folder}/out",
            signal_shape="1,32,32", max_context_views=1, train_batch_size=BATCH, max_train_steps=STRETCH * ROUNDS,
            use_ema=False,
            checkpointing_steps=10**9, num_validation_images=0,
        )  # fmt: skip
        network = unet(32, 6, (32, 48)).train()
        stretches = Stretches(lambda trainer: bare_loop(network, observations, parameters, model), CLOCK)
        Trainer(config, ForwardModelRecipe(config, model), [stretches]).train()
    ratios = [a / b for a, b in zip(stretches.ours[1:], stretches.other[1:], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    return statistics.median(ratios), quartiles[2] - quartiles[0], statistics.median(stretches.other) / STRETCH


def main():
    torch.set_num_threads(1)
    start = time.perf_counter()
    ratio, call, lifts = pipeline_and_parts()
    small = digits()[1][:1]
    row = (views(small)[:, :1], angles(1)[:, :1])
    mlp = ObservationMLP((1, 8, 8), (12,), angle_harmonics=4, signal_range=(0.0, 1.0)).eval()
    corner = torch.zeros(1, 1, 2, dtype=torch.long)
    crop = (torch.rand(1, 1, 1, 4, 4), corner)
    step, spread, bare = training_ratio()
    figures = {
        "pipeline_over_parts": figure(ratio, "ratio", "<= 1.05"),
        "network_call": figure(call, "seconds", ">= 0.01"),
        "context_lifts_a_view": figure(lifts, "lifts", "<= 1"),
        "batch_of_8_unet": figure(batched(unet(8, 6, (16, 16)), CropForwardModel(4, 8), crop), "ratio", ">= 3"),
        "batch_of_8_mlp": figure(batched(mlp, camera(), row), "ratio", ">= 3"),
        "training_step_over_bare_loop": figure(step, "ratio", "<= 1.05", spread),
        "bare_step": figure(bare, "seconds", ">= 0.02"),
    }
    command = "python -m benchmarks.forward_models.speed"
    write_result("forward_models/speed", command, figures, [0], time.perf_counter() - start, says=SAYS)


if __name__ == "__main__":
    main()
