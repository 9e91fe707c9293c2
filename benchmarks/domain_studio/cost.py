"""What DomainStudio adds to a step of plain fine-tuning, on one thread.

    python -m benchmarks.domain_studio.cost     # three minutes

Steps are timed in runs of the trainer that take turns. The batched pair loss is timed against a loop over all pairs of
images. Memory is counted on Stable Diffusion 1.5's UNet: weights of both models, gradients, Adam's moments and the
average, in fp32.
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel

from benchmarks.harness import figure, interleaved, small_unet, write_result
from diffusers_ext import (
    DomainStudioConfig,
    DomainStudioLoss,
    DomainStudioRecipe,
    ImageGenerationPipeline,
    Trainer,
    pairwise_similarity_loss,
    save_repo,
)
from diffusers_ext.training.callbacks import Callback
from diffusers_ext.training.lora import add_lora

SIZE, STEPS, ROUNDS = 16, 12, 4
PLAIN = {"pair_weight": 0.0, "hf_pair_weight": 0.0, "hf_mse_weight": 0.0}


class Clock(Callback):
    """Notes when every step ends."""

    def __init__(self):
        self.times = []

    def on_step_end(self, trainer):
        self.times.append(time.perf_counter())


def write_source(folder):
    unet = small_unet(SIZE, 3, (32, 64, 64), groups=8)
    save_repo(ImageGenerationPipeline(unet, DDPMScheduler()), folder / "source")
    images = np.random.default_rng(0).integers(0, 256, (64, SIZE, SIZE, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", images=images)


def step_seconds(folder, n, weights):
    """Returns the median time of a step with N images, the first two left out."""
    config = DomainStudioConfig(
        **weights,
        pretrained_model_name_or_path=str(folder / "source"),
        train_data_dir=str(folder / "images.npz"),
        output_dir=str(folder / "out"),
        overwrite_output_dir=True,
        resolution=SIZE,
        train_batch_size=n,
        max_train_steps=STEPS,
        checkpointing_steps=1000,
        logging_steps=1000,
        num_validation_images=0,
    )
    clock = Clock()
    Trainer(config, DomainStudioRecipe(config), [clock]).train()
    return statistics.median(np.diff(clock.times)[1:])


def looped(adapted, source):
    """The pair loss as a loop over images and pairs of them."""
    losses = []
    for i in range(len(adapted)):
        rows = []
        for images in (adapted, source):
            others = [j for j in range(len(images)) if j != i]
            rows.append(
                torch.stack([F.cosine_similarity(images[i].flatten(), images[j].flatten(), dim=0) for j in others])
            )
        losses.append(F.kl_div(rows[0].softmax(0).log(), rows[1].softmax(0), reduction="none"))
    return torch.stack(losses).mean()


def pair_times(n=64):
    """Returns seconds of all of DomainStudio's terms, and of one pair loss, batched and as a loop, with gradients."""
    draw = torch.Generator().manual_seed(0)
    adapted, source, target = torch.randn(3, n, 3, SIZE, SIZE, generator=draw)
    adapted.requires_grad_()
    terms, t = DomainStudioLoss(), torch.zeros(n, dtype=torch.long)
    difference = (pairwise_similarity_loss(adapted, source) - looped(adapted, source)).abs().item()
    assert difference < 1e-6
    return interleaved(
        {
            "terms": lambda: sum(terms(adapted, source, target, snr=torch.ones(n), timesteps=t).values()).backward(),
            "batched": lambda: pairwise_similarity_loss(adapted, source).backward(),
            "looped": lambda: looped(adapted, source).backward(),
        },
        5,
    )


def gibibytes(lora):
    """Returns the memory of what is kept of Stable Diffusion 1.5's UNet while it is adapted."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    whole = sum(p.numel() for p in unet.parameters())
    if not lora:
        return 4 * (whole + 5 * whole) / 2**30  # the source; the adapted, its gradient, two moments and the average
    with torch.device("meta"):
        add_lora(unet, 4)
    trained = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    return 4 * (whole + 5 * trained) / 2**30


# What each figure says, for docs/results.md: names as patterns, values for the braces.
SAYS = {
    r"step_over_plain_(\d+)_images": (
        r"A training step on \1 images takes {} times as long as one of plain fine-tuning."
    ),
    "terms_share_of_a_step_64_images": "The four terms of the loss themselves take {:.1%} of a step.",
    "looped_over_batched_64_images": (
        "Similarities of 64 images in one batch are computed {:.0f} times as fast as pair by pair."
    ),
    "memory_full": (
        "Tuning all weights of Stable Diffusion 1.5 with its source beside it needs {} GiB of memory for weights, "
        "gradients and optimizer."
    ),
    "memory_lora": "By LoRA, which is its own source, {} GiB are needed.",
}


def main():
    torch.set_num_threads(1)
    start, figures = time.perf_counter(), {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_source(folder)
        plain = {}
        for n in (10, 64):
            times = {"plain": [], "ours": []}
            for _ in range(ROUNDS):
                times["plain"].append(step_seconds(folder, n, PLAIN))
                times["ours"].append(step_seconds(folder, n, {}))
            plain[n] = statistics.median(times["plain"])
            ratios = [ours / other for ours, other in zip(times["ours"], times["plain"], strict=True)]
            figures[f"step_over_plain_{n}_images"] = figure(
                statistics.median(ratios), "ratio", "<= 1.6", statistics.stdev(ratios)
            )
    times = pair_times()
    figures["terms_share_of_a_step_64_images"] = figure(times["terms"] / plain[64], "ratio", "<= 0.03")
    figures["looped_over_batched_64_images"] = figure(times["looped"] / times["batched"], "ratio", ">= 20")
    full, lora = gibibytes(lora=False), gibibytes(lora=True)
    figures["memory_full"] = figure(full, "GiB")
    figures["memory_lora"] = figure(lora, "GiB")
    figures["memory_lora_over_full"] = figure(lora / full, "ratio")
    command = "python -m benchmarks.domain_studio.cost"
    write_result("domain_studio/cost", command, figures, [0], time.perf_counter() - start, says=SAYS)


if __name__ == "__main__":
    main()
