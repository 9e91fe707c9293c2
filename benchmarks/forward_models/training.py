"""Training and sampling that the experiments share: everything is made once and kept in runs/forward_models."""

import json

import numpy as np
import torch

from benchmarks.harness import RESULTS
from benchmarks.small_models import train
from diffusers_ext import ForwardModelConfig, ForwardModelPipeline, ForwardModelRecipe

RUNS = RESULTS.parents[1] / "runs" / "forward_models"
SEEDS = [0, 1, 2]
COMMON = {
    "network": "mlp", "train_batch_size": 128, "learning_rate": 1e-3, "lr_scheduler": "cosine", "lr_warmup_steps": 100,
    "ema_decay": 0.995, "checkpointing_steps": 500, "checkpoints_total_limit": 1, "resume_from_checkpoint": "latest",
    "logging_steps": 250, "num_validation_images": 0,
}  # fmt: skip


def write_observations(path, observations, parameters):
    """Writes a data set of observations, once; the signals are not in it."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".tmp.npz")
        np.savez(partial, observations=observations.numpy(), parameters=parameters.numpy())
        partial.replace(path)
    return path


def trained(task, name, seed, forward_model, network, recipe=ForwardModelRecipe, **arguments):
    """Returns the pipeline of a network that was trained once.

    Args:
        task: folder of the data.
        name: of the network among those of its seed.
        seed: of the training.
        forward_model: an object.
        network: arguments of the `ObservationMLP`.
        recipe: its class.
        **arguments: of `ForwardModelConfig`.
    """
    folder = RUNS / task / f"seed-{seed}" / name
    description = RUNS / task / "network.json"
    description.parent.mkdir(parents=True, exist_ok=True)
    description.write_text(json.dumps({"hidden_size": 256, "num_blocks": 4, **network}))
    config = ForwardModelConfig(
        train_data_dir=str(RUNS / task / "observations.npz"), unet_config=str(description), output_dir=str(folder),
        seed=seed, **COMMON, **arguments,
    )  # fmt: skip
    if not (folder / "model_index.json").is_file():
        train(lambda _: recipe(config, forward_model), config)
    pipeline = ForwardModelPipeline.from_pretrained(folder, forward_model=forward_model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(pipeline, context, targets, samples, generator):
    """Returns `(views, contexts, samples, ...)`: the signals after one sampled view, two, ...

    Args:
        pipeline: the pipeline.
        context: observations and their parameters, or `(None, None)`.
        targets: `(contexts, views, ...)` parameters of the views to denoise.
        samples: of each context.
        generator: of the noise.
    """
    steps, found = 30, []

    def keep(pipe, step, timestep, tensors):
        if (step + 1) % steps == 0:
            found.append(tensors["signals"].unflatten(0, (-1, samples)))
        return {}

    result = pipeline(
        *context, targets, num_samples=samples, num_inference_steps=steps, eta=1.0, generator=generator,
        callback_on_step_end=keep, callback_on_step_end_tensor_inputs=["signals"],
    )  # fmt: skip
    if not found:  # the regression calls its network once
        found.append(result.signals.unflatten(0, (-1, samples)))
    return torch.stack(found)
