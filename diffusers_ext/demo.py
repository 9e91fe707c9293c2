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

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw
from scipy.stats import wasserstein_distance

from diffusers_ext.data.digits import CLASSIFIER, DIGITS
from diffusers_ext.data.sources import ImageDataset, load_images
from diffusers_ext.generation.pipeline import ImageGenerationPipeline
from diffusers_ext.immiscible.recipe import ImmiscibleConfig, ImmiscibleRecipe
from diffusers_ext.metrics.features import ImageClassifierFeatures, extract_features
from diffusers_ext.metrics.frechet import frechet_distance
from diffusers_ext.oms.pipeline import OMSPipeline
from diffusers_ext.training.callbacks import image_grid
from diffusers_ext.training.engine import Trainer

__all__ = ["PANELS", "run_demo"]

ASSETS = Path(__file__).parent / "assets"
MODEL = ASSETS / "digits-flow"
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


def one_more_step(output_dir: Path) -> Path:
    """Draws photographs without and with One More Step and compares their brightness with real ones."""
    print("Loading a model of photographs and its One More Step module")
    base = DiffusionPipeline.from_pretrained(ASSETS / "photos-base")
    pipeline = OMSPipeline.from_pretrained(ASSETS / "photos-oms", base=base)
    file = np.load(ASSETS / "photos" / "photos.npz")
    real, labels = file["images"] / 255, torch.tensor(file["labels"])

    def drawn(title: str, **options: Any) -> Any:
        pipeline.set_progress_bar_config(desc=title)
        generator = torch.Generator().manual_seed(0)
        return pipeline(
            class_labels=labels, num_inference_steps=STEPS, generator=generator, output_type="np", **options
        ).images

    images = {"photographs": real, "plain": drawn("plain", oms=False), "one more step": drawn("one more step")}
    brightness = {title: pixels.mean((1, 2, 3)) for title, pixels in images.items()}
    distance = {title: wasserstein_distance(b, brightness["photographs"]) for title, b in brightness.items()}
    print(
        "Wasserstein distance of mean brightness to that of photographs: "
        f"plain {distance['plain']:.3f}, one more step {distance['one more step']:.3f}"
    )
    path = output_dir / "one_more_step.png"
    order = np.argsort(labels.numpy(), kind="stable")[:: max(1, len(labels) // 64)][:64]
    grids = {
        title if title == "photographs" else f"{title} (W1 {distance[title]:.3f})": grid(
            torch.tensor(pixels[order]).permute(0, 3, 1, 2) * 2 - 1
        )
        for title, pixels in images.items()
    }
    titled({**grids, "mean brightness": histogram(brightness)}).save(path)
    return path


def histogram(values: dict[str, np.ndarray], size: int = 256) -> Image.Image:
    """Draws how often numbers in `[0, 1]` occur: the first set as an area, the others as lines."""
    canvas = Image.new("RGB", (size, size), "white")
    pen, colours = ImageDraw.Draw(canvas), ["lightgrey", "crimson", "royalblue"]
    counts = {title: np.histogram(v, 24, (0, 1), density=True)[0] for title, v in values.items()}
    top = max(c.max() for c in counts.values())
    for i, (title, count) in enumerate(counts.items()):
        corners = [(0.0, size - 1.0)]
        for j, c in enumerate(count):
            height = size - 1 - c / top * (size - 60)
            corners += [(j * size / 24, height), ((j + 1) * size / 24, height)]
        corners.append((size - 1.0, size - 1.0))
        if i == 0:
            pen.polygon(corners, fill=colours[0])
        else:
            pen.line(corners, fill=colours[i], width=2)
        pen.text((4, 2 + 14 * i), title, fill="dimgrey" if i == 0 else colours[i], font_size=12)
    return canvas


def draw(pipeline: ImageGenerationPipeline, count: int) -> torch.Tensor:
    """Returns `(count, channels, height, width)` samples in `[-1, 1]`."""
    generator = torch.Generator().manual_seed(0)
    images: Any = pipeline(count, num_inference_steps=STEPS, generator=generator, output_type="pt", return_dict=False)
    return images[0] * 2 - 1


def grid(images: torch.Tensor) -> Image.Image:
    """Arranges images in `[-1, 1]` in a square."""
    pixels = ((images + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).squeeze(-1).numpy()
    return image_grid([Image.fromarray(p) for p in pixels])


PANELS: list[Callable[[Path], Path]] = [image_generation, one_more_step]


def run_demo(output_dir: Path) -> None:
    """Runs every panel and says where its picture is."""
    output_dir.mkdir(parents=True, exist_ok=True)
    for panel in PANELS:
        start = time.perf_counter()
        path = panel(output_dir)
        print(f"{path}  ({time.perf_counter() - start:.0f} s)")
