"""Makes the model of digits that ships with the package: it has seen rows of pixels only, from eight sides.

    python -m benchmarks.forward_models.ship     # five minutes on one core

What all cameras see of a few held-out digits goes into the folder too, for the demo.
"""

import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from PIL import Image

from benchmarks.forward_models.flatland import FURTHER_NOISE, NOISE, angles, camera, digits, views, write_views
from benchmarks.harness import RESULTS, made_portable
from benchmarks.small_models import train
from diffusers_ext import ForwardModelConfig, ForwardModelPipeline, ForwardModelRecipe, RepoCard, save_repo
from diffusers_ext.methods.forward_models.pictures import as_images
from diffusers_ext.training.callbacks import image_grid

ROOT = RESULTS.parents[1]
RUNS, FOLDER = ROOT / "runs" / "forward_models", ROOT / "diffusers_ext" / "assets" / "digits-flatland"
NETWORK = {"angle_harmonics": 4, "hidden_size": 156, "num_blocks": 4}
HELD_OUT = 64
SNIPPET = """import numpy as np
import diffusers_ext  # pip install diffusers-ext
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{repo_id}")
seen = np.load("{repo_id}/views.npz")  # held-out digits from 8 sides
one = seen["observations"][:1, :1] + 0.3 * np.random.default_rng(0).standard_normal((1, 1, 1, 12))
result = pipeline(one, seen["parameters"][:1, :1], num_views=4, num_samples=4, eta=1.0, output_type="pil")
result.signals[0].save("digit.png")"""


def figures(pipeline, signals):
    """Compares what is seen of samples with the context, and samples of one context with each other."""
    generator = torch.Generator().manual_seed(0)
    seen, where = views(signals)[:, :1], angles(len(signals))[:, :1]
    context = seen + NOISE * torch.randn(seen.shape, generator=generator)
    call = {"num_samples": 8, "num_inference_steps": 30, "eta": 1.0, "generator": generator}
    result = pipeline(context, where, num_views=4, **call).signals
    again = pipeline.render(result, where.repeat_interleave(8, 0))
    error = (again - seen.repeat_interleave(8, 0)).square().mean().sqrt()
    return result, {
        "rmse at the context view, whose noise was 0.3": float(error),
        "standard deviation of 8 signals of one context, mean": float(result.unflatten(0, (-1, 8)).std(1).mean()),
    }


def main():
    torch.set_num_threads(1)
    config = ForwardModelConfig(
        train_data_dir=str(write_views(RUNS / "flatland.npz")),
        output_dir=str(RUNS / "shipped"),
        network="mlp",
        unet_config=str(RUNS / "network.json"),
        signal_shape="1,8,8",
        signal_range="0,1",
        max_context_views=4,
        max_given_views=1,
        observation_noise=NOISE,
        context_noise=FURTHER_NOISE,
        train_batch_size=128,
        max_train_steps=8000,
        learning_rate=1e-3,
        lr_scheduler="cosine",
        lr_warmup_steps=100,
        ema_decay=0.995,
        checkpointing_steps=1000,
        checkpoints_total_limit=1,
        resume_from_checkpoint="latest",
        logging_steps=100,
        num_validation_images=0,
    )
    (RUNS / "network.json").write_text(json.dumps(NETWORK))
    recipe = ForwardModelRecipe(config, camera())
    if not (RUNS / "shipped" / "model_index.json").is_file():
        train(lambda _: recipe, config)
    pipeline = ForwardModelPipeline.from_pretrained(RUNS / "shipped")
    pipeline.set_progress_bar_config(disable=True)
    held_out = digits()[1][:HELD_OUT]
    samples, found = figures(pipeline, held_out)
    rows = samples.unflatten(0, (-1, 8))[:4, :3].transpose(0, 1)
    sample = image_grid(as_images(torch.cat([held_out[:4], rows.flatten(0, 1)]), (0.0, 1.0)))
    sample = sample.resize((sample.width * 8, sample.height * 8), Image.Resampling.NEAREST)
    card = RepoCard(
        method="Diffusion with forward models",
        description="Draws 8x8 digits that agree with one noisy row of 12 pixels, as a camera in their plane sees "
        "them: the nearer, the brighter. In training, too, only such rows were seen, never a digit. The picture shows "
        "four held-out digits and below them three samples of each, from one row.",
        data="The first 1,400 digits of scikit-learn's `load_digits` (UCI, E. Alpaydin and C. Kaynak, CC BY 4.0), as "
        "eight cameras see them. `views.npz` has what they see of the first held-out ones, and those digits.",
        license="apache-2.0",
        tags=["diffusers-ext", "inverse-problems"],
        paper="https://arxiv.org/abs/2306.11719",
        snippet=SNIPPET,
        arguments={"command": "python -m benchmarks.forward_models.ship", **config.to_dict()},
        results=found,
    )
    save_repo(pipeline, FOLDER, card=card, sample=sample)
    np.savez_compressed(
        FOLDER / "views.npz", observations=views(held_out[:16]).numpy(), parameters=angles(16).numpy(),
        digits=(held_out[:16] * 16).round().byte().numpy(),
    )  # fmt: skip
    print(f"{FOLDER}: {made_portable(FOLDER):.3f} MiB, {card.results}")


if __name__ == "__main__":
    main()
