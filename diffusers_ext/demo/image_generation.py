"""The panel of image generation and of training."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from diffusers_ext.data.assets import ASSETS
from diffusers_ext.data.digits import CLASSIFIER, DIGITS
from diffusers_ext.data.sources import ImageDataset, load_images
from diffusers_ext.generation.pipeline import ImageGenerationPipeline
from diffusers_ext.methods.immiscible.recipe import ImmiscibleConfig, ImmiscibleRecipe
from diffusers_ext.metrics.features import ImageClassifierFeatures, extract_features
from diffusers_ext.metrics.frechet import frechet_distance
from diffusers_ext.training.engine import Trainer

from .drawing import grid, saved, titled

__all__ = ["image_generation"]

MODEL = ASSETS / "digits-flow"
STEPS = 16  # sampling steps
COUNT, SHOWN = 256, 64  # images behind the Frechet distance, and those of a panel


def image_generation(output_dir: Path) -> Path:
    """Samples the shipped flow-matching model, measures it, fine-tunes it and loads the result in a new process."""
    print(f"Loading {MODEL.name} by DiffusionPipeline.from_pretrained and drawing {COUNT} images")
    pipeline = DiffusionPipeline.from_pretrained(MODEL)
    assert isinstance(pipeline, ImageGenerationPipeline)
    data = load_images(train_data_dir=str(DIGITS), resolution=28, channels=1)
    assert isinstance(data, ImageDataset)
    real = torch.stack([data[i]["pixel_values"] for i in range(len(data))])
    classifier = ImageClassifierFeatures.from_pretrained(CLASSIFIER).eval()
    real_features = extract_features(real, classifier.features)

    samples = draw(pipeline, COUNT)
    distance = frechet_distance(extract_features(samples, classifier.features), real_features)
    torch.manual_seed(0)
    untrained: Any = type(pipeline.unet).from_config(pipeline.unet.config)
    noise = draw(ImageGenerationPipeline(untrained.eval(), pipeline.scheduler), SHOWN)
    baseline = frechet_distance(extract_features(noise, classifier.features), real_features)
    print(f"Frechet distance to {len(real)} real digits: {distance:.1f}; of an untrained net: {baseline:.1f}")

    steps = 8
    print(f"Fine-tuning it for {steps} steps with accelerate")
    tuned = output_dir / "digits-finetuned"
    config = ImmiscibleConfig(
        output_dir=str(tuned),
        overwrite_output_dir=True,  # of an earlier demo
        pretrained_model_name_or_path=str(MODEL),
        train_data_dir=str(DIGITS),
        resolution=28,
        channels=1,
        train_batch_size=32,
        max_train_steps=steps,
        logging_steps=1,
        num_validation_images=16,
        validation_inference_steps=4,
    )
    Trainer(config, ImmiscibleRecipe(config)).train()
    print("Loading the result in a new process")
    script = (
        "import sys, diffusers_ext, torch; from diffusers import DiffusionPipeline;"
        "p = DiffusionPipeline.from_pretrained(sys.argv[1]); p.set_progress_bar_config(disable=True);"
        "x = p(4, num_inference_steps=4, output_type='pt', generator=torch.Generator().manual_seed(0)).images;"
        "print(f'  {type(p).__name__} drew {tuple(x.shape)}, mean {x.mean():.3f}')"
    )
    subprocess.run([sys.executable, "-c", script, str(tuned)], check=True)

    picked = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))[:SHOWN]
    picture = titled(
        {
            "real digits": grid(real[picked]),
            f"samples, {STEPS} steps (FD {distance:.0f})": grid(samples[:SHOWN]),
            f"untrained net (FD {baseline:.0f})": grid(noise),
        }
    )
    return saved(picture, output_dir / "image_generation.png", {"fd_samples": distance, "fd_untrained": baseline})


def draw(pipeline: ImageGenerationPipeline, count: int) -> torch.Tensor:
    """Returns `(count, channels, height, width)` samples in `[-1, 1]`."""
    generator = torch.Generator().manual_seed(0)
    images: Any = pipeline(count, num_inference_steps=STEPS, generator=generator, output_type="pt", return_dict=False)
    return images[0] * 2 - 1
