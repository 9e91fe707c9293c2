"""What a LoRA step of a Stable Diffusion 1.5 costs, beside one in the order of work of Diffusers' own script.

    python -m benchmarks.any_pipeline.training_speed      # a quarter of an hour of one core, 10 GB of memory and disk

The network, the text encoder and the autoencoder have the sizes of Stable Diffusion 1.5 and random weights, in fp32;
images have 256 pixels a side, one to a batch. By hand: the autoencoder and the text encoder, noise, the network,
the loss, backward. Ours, in turn with it on the same batch, network and layers: the recipe as it is (it remembers
prompts), then with latents and prompts encoded before. Peak memory is each one's own process.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from datasets import load_dataset
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.nn.functional import mse_loss
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.harness import figure, write_result
from diffusers_ext import TextToImageConfig, TextToImageRecipe, Trainer
from tests.tiny_tokenizers import clip_tokenizer

SIDE, BATCH, RANK, PAIRS = 256, 1, 16, 6
# Written before the run.
GOALS = {"step_over_by_hand": "<= 1.05", "memory_over_by_hand": "<= 1", "encoding_over_cached": ">= 1.5"}
SAYS = {
    "step_over_by_hand": "A LoRA step of a network like Stable Diffusion 1.5's takes {:.3f} times that by hand.",
    "memory_over_by_hand": "Its process needs {:.3f} times the memory.",
    "memory_cached_over_by_hand": "With latents and prompts encoded before, {:.3f} times.",
    "encoding_over_cached": (
        "A step by hand, which encodes image and caption, takes {:.2f} times ours with both encoded before."
    ),
    "step_by_hand": "The step by hand takes {:.1f} s of one core.",
}


def make_pipeline(folder):
    """Writes a pipeline of Stable Diffusion 1.5's sizes with random weights."""
    torch.manual_seed(0)
    blocks = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        ),
        tokenizer=clip_tokenizer(),
        unet=UNet2DConditionModel(
            sample_size=64,
            cross_attention_dim=768,
            attention_head_dim=8,
            block_out_channels=(320, 640, 1280, 1280),
            down_block_types=blocks,
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        ),
        scheduler=DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def make_images(folder):
    """Writes crops of two photographs with captions."""
    folder.mkdir()
    lines = []
    for name, photograph in zip(("a temple", "a flower"), load_sample_images().images, strict=True):
        for i in range(4):
            file = f"{name[2:]}-{i}.png"
            Image.fromarray(photograph[30 * i : 30 * i + SIDE, 60 * i : 60 * i + SIDE]).save(folder / file)
            lines.append(json.dumps({"file_name": file, "text": name}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def loss_by_hand(vae, text_encoder, unet, scheduler, pixels, ids):
    """The order of work of Diffusers' script for LoRA."""
    latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
    noise = torch.randn_like(latents)
    t = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),))
    noisy = scheduler.add_noise(latents, noise, t)
    hidden = text_encoder(ids, return_dict=False)[0]
    output = unet(noisy, t, hidden, return_dict=False)[0]
    return mse_loss(output.float(), noise.float())


def config(folder, output, cached, steps):
    return TextToImageConfig(
        pretrained_model_name_or_path=str(folder / "pipeline"),
        train_data_dir=str(folder / "images"),
        output_dir=str(output),
        resolution=SIDE,
        lora_rank=RANK,
        train_batch_size=BATCH,
        max_train_steps=steps,
        num_validation_images=0,
        caption_dropout=0,
        cache_latents=cached,
        cache_prompts=cached,
    )


class InTurn(TextToImageRecipe):
    """Takes each step thrice: by hand, encoding, and from what was encoded before."""

    def setup(self, ctx):
        self.times = []
        self.model.release = lambda names: None  # two of the three ways need the encoders
        return super().setup(ctx)

    def training_step(self, batch, ctx):
        pipe, unet = self.model.pipe, self.denoiser.at().denoiser
        pixels = self.data.images.get(self.data.captions.index(batch["caption"][0]))["pixel_values"][None]
        tokens = pipe.tokenizer(batch["caption"], padding="max_length", truncation=True, return_tensors="pt").input_ids

        def ours(given):
            return super(InTurn, self).training_step(given, ctx).loss

        raw = {key: value for key, value in batch.items() if key != "latents"} | {"pixel_values": pixels}
        ways = {
            "hand": lambda: loss_by_hand(pipe.vae, pipe.text_encoder, unet, pipe.scheduler, pixels, tokens),
            "encoding": lambda: ours(raw),
            "cached": lambda: ours(batch),
        }
        found = {}
        for name in list(ways)[:: 1 if len(self.times) % 2 else -1]:
            start = time.thread_time()
            ways[name]().backward()
            found[name] = time.thread_time() - start
            unet.zero_grad(set_to_none=True)
        self.times.append(found)
        return super().training_step(batch, ctx)


def step_times(folder):
    """Returns processor seconds of the three, round by round."""
    arguments = config(folder, folder / "in-turn", True, PAIRS + 1)
    recipe = InTurn(arguments)
    Trainer(arguments, recipe).train()
    return recipe.times[1:]


def one_process(way, folder):
    """Trains two steps one way and prints the peak of this process's memory in MB."""
    torch.set_num_threads(1)
    if way != "hand":
        arguments = config(folder, folder / f"memory-{way}", way == "cached", 2)
        Trainer(arguments, TextToImageRecipe(arguments)).train()
    else:
        Accelerator()
        load_dataset("imagefolder", data_dir=str(folder / "images"), cache_dir=str(folder / "data"))
        pipe = StableDiffusionPipeline.from_pretrained(folder / "pipeline", local_files_only=True)
        vae, text_encoder, unet = (m.requires_grad_(False) for m in (pipe.vae, pipe.text_encoder, pipe.unet))
        unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
        unet.train()
        optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad])
        pixels = torch.randn(BATCH, 3, SIDE, SIDE)
        ids = pipe.tokenizer(
            ["a flower"] * BATCH, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        for _ in range(2):
            loss_by_hand(vae, text_encoder, unet, pipe.scheduler, pixels, ids).backward()
            optimizer.step()
            optimizer.zero_grad()
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def peak(way, folder):
    command = [sys.executable, "-m", "benchmarks.any_pipeline.training_speed", "--only", way, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split("peak")[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("hand", "encoding", "cached"))
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    if arguments.only:
        one_process(arguments.only, arguments.folder)
        return
    torch.set_num_threads(1)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_pipeline(folder / "pipeline")
        make_images(folder / "images")
        peaks = {way: peak(way, folder) for way in ("hand", "encoding", "cached")}
        times = step_times(folder)
    by = {way: statistics.median(t[way] for t in times) for way in times[0]}
    ratios = {
        "step_over_by_hand": [t["encoding"] / t["hand"] for t in times],
        "encoding_over_cached": [t["hand"] / t["cached"] for t in times],
    }
    figures = {
        name: figure(statistics.median(values), "ratio", GOALS[name], statistics.stdev(values))
        for name, values in ratios.items()
    }
    figures["memory_over_by_hand"] = figure(peaks["encoding"] / peaks["hand"], "ratio", GOALS["memory_over_by_hand"])
    figures["memory_cached_over_by_hand"] = figure(peaks["cached"] / peaks["hand"], "ratio")
    figures["step_by_hand"] = figure(by["hand"], "s")
    figures["memory_by_hand"] = figure(peaks["hand"], "MB")
    command = "python -m benchmarks.any_pipeline.training_speed"
    write_result("any_pipeline/training_speed", command, figures, [0], time.perf_counter() - start, says=SAYS)


if __name__ == "__main__":
    main()
