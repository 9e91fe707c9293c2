"""What `make demo` shows: one panel per method, each one function that takes the output folder.

A panel loads what ships under `assets/`, prints its figures and returns the path of its picture. To add one, write the
function and put it into `PANELS`.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw

from diffusers_ext.data.digits import CLASSIFIER, DIGITS
from diffusers_ext.data.sources import ImageDataset, load_images
from diffusers_ext.generation.pipeline import ImageGenerationPipeline
from diffusers_ext.immiscible.recipe import ImmiscibleConfig, ImmiscibleRecipe
from diffusers_ext.metrics.features import ImageClassifierFeatures, extract_features
from diffusers_ext.metrics.frechet import frechet_distance
from diffusers_ext.training.callbacks import image_grid
from diffusers_ext.training.engine import Trainer

__all__ = ["PANELS", "run_demo"]

MODEL = Path(__file__).parent / "assets" / "digits-flow"
STEPS = 16  # sampling steps
COUNT = 256  # images behind each Frechet distance


def titled(panels: dict[str, Image.Image], scale: int = 2) -> Image.Image:
    """Puts pictures side by side, enlarged, each under its title."""
    enlarged = {
        title: image.convert("RGB").resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
        for title, image in panels.items()
    }
    gap, head = 16, 28
    width = sum(image.width + gap for image in enlarged.values()) + gap
    canvas = Image.new("RGB", (width, max(image.height for image in enlarged.values()) + head + gap), "white")
    draw, x = ImageDraw.Draw(canvas), gap
    for title, image in enlarged.items():
        draw.text((x, 6), title, fill="black", font_size=15)
        canvas.paste(image, (x, head))
        x += image.width + gap
    return canvas


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
    noise = draw(ImageGenerationPipeline(untrained.eval(), pipeline.scheduler), COUNT)
    baseline = frechet_distance(extract_features(noise, classifier.features), real_features)
    print(f"Frechet distance to {len(real)} real digits: {distance:.1f}; of an untrained net: {baseline:.1f}")

    steps = 8
    print(f"Fine-tuning it for {steps} steps with accelerate")
    tuned = output_dir / "digits-finetuned"
    config = ImmiscibleConfig(
        output_dir=str(tuned),
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

    picked = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))[:64]
    path = output_dir / "image_generation.png"
    titled(
        {
            "real digits": grid(real[picked]),
            f"samples, {STEPS} steps (FD {distance:.0f})": grid(samples[:64]),
            f"untrained net (FD {baseline:.0f})": grid(noise[:64]),
        }
    ).save(path)
    return path


def draw(pipeline: ImageGenerationPipeline, count: int) -> torch.Tensor:
    """Returns `(count, channels, height, width)` samples in `[-1, 1]`."""
    generator = torch.Generator().manual_seed(0)
    images: Any = pipeline(count, num_inference_steps=STEPS, generator=generator, output_type="pt", return_dict=False)
    return images[0] * 2 - 1


def grid(images: torch.Tensor) -> Image.Image:
    """Arranges images in `[-1, 1]` in a square."""
    pixels = ((images + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).squeeze(-1).numpy()
    return image_grid([Image.fromarray(p) for p in pixels])


PANELS: list[Callable[[Path], Path]] = [image_generation]


def run_demo(output_dir: Path) -> None:
    """Runs every panel and says where its picture is."""
    output_dir.mkdir(parents=True, exist_ok=True)
    for panel in PANELS:
        start = time.perf_counter()
        path = panel(output_dir)
        print(f"{path}  ({time.perf_counter() - start:.0f} s)")
