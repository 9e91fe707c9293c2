"""Captioned digits, a small VAE for them, and untrained text-to-image models: what the experiment starts from.

    python -m benchmarks.any_pipeline.digits     # 15 minutes on one core

Digits are MNIST's, padded from 28x28 to the 32x32 that every pipeline can draw. The VAE also sees them in colours,
inverted ones among them, so that its latents hold what a model of white digits is to be adapted to. Text encoders and
tokenizers are made here too: random weights tell ten words apart. Everything is made once and kept in
runs/any_pipeline.
"""

import json
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from PIL import Image
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "runs" / "any_pipeline"
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
PROMPTS = [f"a handwritten {word}" for word in WORDS]
VAE_STEPS, VAE_BATCH = 2000, 64
SIZE = 32


def mnist():
    """Returns 4,000 digits for training and 1,000 held out, uint8 `(n, 28, 28)`, with their labels."""
    import importlib.util

    with np.load(ROOT / "diffusers_ext" / "assets" / "digits" / "digits.npz") as file:
        held_out, held_labels = file["images"], file["labels"]
    path = ROOT / "runs" / "data" / "digits4k.npz"
    if not path.is_file():
        spec = importlib.util.spec_from_file_location("make_digits", ROOT / "training" / "data" / "make_digits.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.main()
    with np.load(path) as file:
        return file["images"], file["labels"], held_out, held_labels


def padded(images):
    """Pads digits `(n, 28, 28)` to 32x32."""
    return np.pad(images, ((0, 0), (2, 2), (2, 2)))


def coloured(grey, ink, paper):
    """Draws grey digits `(n, 28, 28)` in [0, 1] with ink on paper, colours `(n or 1, 3)`; returns `(n, 3, 28, 28)`."""
    grey = grey[:, None]
    return paper[:, :, None, None] + (ink - paper)[:, :, None, None] * grey


def write_folder(folder, images, prompts):
    """Writes images and metadata.jsonl as a captioned folder, once."""
    folder = Path(folder)
    if (folder / "metadata.jsonl").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        name = f"{i:05d}.png"
        Image.fromarray(image).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": prompt}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def captioned():
    """Returns the folder of the 4,000 training digits with their captions."""
    images, labels, _, _ = mnist()
    folder = RUNS / "digits"
    write_folder(
        folder, [np.repeat(image[:, :, None], 3, 2) for image in padded(images)], [PROMPTS[i] for i in labels]
    )
    return folder


def vae():
    """Returns the VAE of 28x28 images, 4x7x7 latents, trained once; an interrupted training starts again."""
    folder = RUNS / "vae"
    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        model = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(16, 24, 32),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=28,
        )
        grey = torch.tensor(mnist()[0]).float() / 255
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=VAE_STEPS, pct_start=0.1)
        plain = torch.arange(VAE_BATCH)[:, None] < VAE_BATCH // 2
        for step in range(VAE_STEPS):
            rows = torch.randint(len(grey), (VAE_BATCH,))
            ink = torch.where(plain, 1.0, torch.rand(VAE_BATCH, 3))
            paper = torch.where(plain, 0.0, torch.rand(VAE_BATCH, 3))
            images = coloured(grey[rows], ink, paper) * 2 - 1
            posterior = model.encode(images).latent_dist
            error = (model.decode(posterior.sample()).sample - images).square().mean()
            loss = error + 3e-4 * posterior.kl().mean() / images[0].numel()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 100 == 0 or step == VAE_STEPS - 1:
                print(f"VAE step {step}: squared error {error:.4f}", flush=True)
        model.eval()
        with torch.no_grad():
            every = torch.cat(
                [
                    model.encode(coloured(part, torch.ones(1, 3), torch.zeros(1, 3)) * 2 - 1).latent_dist.mean
                    for part in grey.split(250)
                ]
            )
        model.register_to_config(scaling_factor=float(1 / every.std()), shift_factor=float(every.mean()))
        model.save_pretrained(folder, safe_serialization=True)
    return AutoencoderKL.from_pretrained(folder).eval()


def clip_encoder(seed):
    """Returns a tokenizer and an untrained encoder that give each word of the captions a token of its own."""
    words = sorted({word for prompt in PROMPTS for word in prompt.split()})
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary = {token: i for i, token in enumerate(["<|startoftext|>", "<|endoftext|>"])}
    merges = []
    for token in [*letters, *(f"{letter}</w>" for letter in letters)]:
        vocabulary[token] = len(vocabulary)
    for word in words:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            pair = (parts[0], parts[1])
            if pair not in merges:
                merges.append(pair)
            vocabulary.setdefault("".join(pair), len(vocabulary))
            parts = ["".join(pair), *parts[2:]]
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=6)
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=8,
        projection_dim=32,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    encoder = CLIPTextModelWithProjection(config).eval()
    torch.nn.init.normal_(encoder.text_model.embeddings.token_embedding.weight)  # far apart, untrained as they stay
    return tokenizer, encoder


def t5_encoder():
    """Returns a tokenizer that knows the words of the captions and an untrained encoder."""
    words = sorted({f"\u2581{word}" for prompt in PROMPTS for word in prompt.split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((word, -2.0) for word in words), ("\u2581", -3.0)]
    pieces += [(chr(c), -8.0) for c in range(ord("a"), ord("z") + 1)]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=16)
    torch.manual_seed(3)
    config = T5Config(vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4)
    return tokenizer, T5EncoderModel(config).eval()


def sd3(seed):
    """Returns an untrained StableDiffusion3Pipeline of digits."""
    (tokenizer, encoder), (tokenizer_2, encoder_2), (tokenizer_3, encoder_3) = (
        clip_encoder(1),
        clip_encoder(2),
        t5_encoder(),
    )
    torch.manual_seed(seed)
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=4,
            num_attention_heads=5,
            attention_head_dim=16,
            joint_attention_dim=64,
            caption_projection_dim=80,
            pooled_projection_dim=64,
            pos_embed_max_size=4,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder_2,
        tokenizer_2=tokenizer_2,
        text_encoder_3=encoder_3,
        tokenizer_3=tokenizer_3,
    )


def pixart(seed):
    """Returns an untrained PixArtSigmaPipeline of digits."""
    tokenizer, encoder = t5_encoder()
    torch.manual_seed(seed)
    return PixArtSigmaPipeline(
        transformer=PixArtTransformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=8,
            num_layers=5,
            num_attention_heads=6,
            attention_head_dim=16,
            cross_attention_dim=96,
            caption_channels=64,
            use_additional_conditions=False,
        ),
        scheduler=DPMSolverMultistepScheduler(beta_schedule="linear"),
        vae=vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )


SHAPES = {"sd3": sd3, "pixart": pixart}
# Both pad their text to hundreds of tokens by default. PixArt masks them, so that it draws the same without this.
CALL = {"max_sequence_length": 6}


def untrained(shape, seed):
    """Returns the folder of an untrained pipeline, made once."""
    folder = RUNS / f"{shape}-untrained-{seed}"
    if not (folder / "model_index.json").is_file():
        SHAPES[shape](seed).save_pretrained(folder, safe_serialization=True)
    return folder


if __name__ == "__main__":
    torch.set_num_threads(1)
    captioned()
    model = vae()
    for shape in SHAPES:
        untrained(shape, 0)
    print(sum(p.numel() for p in model.parameters()), model.config.scaling_factor, model.config.shift_factor)
