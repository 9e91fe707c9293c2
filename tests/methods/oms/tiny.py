"""Tiny pipelines with random weights, and modules that fit them."""

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    LCMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffusers_ext import ImageGenerationPipeline, OMSPipeline, OMSUNet2DConditionModel, OMSUNet2DModel

from .gaussian import STABLE_DIFFUSION

WIDTH = 8
BLOCKS = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 2}
TEXT_BLOCKS = {
    **BLOCKS,
    "attention_head_dim": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
PIXELS = {
    **BLOCKS,
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "down_block_types": ("DownBlock2D",) * 2,
    "up_block_types": ("UpBlock2D",) * 2,
}


def ddim(**options):
    return DDIMScheduler(**STABLE_DIFFUSION, clip_sample=False, set_alpha_to_one=False, steps_offset=1, **options)


def tokenizer():
    """Letters are the tokens: a vocabulary small enough to be written here."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=12)


def text_encoder(width=WIDTH, seed=0, projection=False):
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=60, hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=12, projection_dim=WIDTH, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    # Larger than usual weights, so that different words give clearly different features.
    config.initializer_factor = 20.0
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def vae(scaling_factor=0.18215):
    torch.manual_seed(1)
    return AutoencoderKL(
        **{**BLOCKS, "block_out_channels": (8, 8)}, latent_channels=4, sample_size=16, scaling_factor=scaling_factor,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip


def unet(width=WIDTH, **config):
    torch.manual_seed(2)
    return UNet2DConditionModel(**TEXT_BLOCKS, sample_size=8, cross_attention_dim=width, **config).eval()


def module(width=WIDTH, seed=3, **config):
    torch.manual_seed(seed)
    return OMSUNet2DConditionModel(**TEXT_BLOCKS, cross_attention_dim=width, **config).eval()


def stable_diffusion(scheduler=None, **parts):
    parts = {"vae": vae(), "text_encoder": text_encoder(), "tokenizer": tokenizer(), "unet": unet(), **parts}
    base = StableDiffusionPipeline(
        **parts, scheduler=scheduler or ddim(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    return quiet(base)


def lcm():
    return stable_diffusion(LCMScheduler(**STABLE_DIFFUSION, steps_offset=1))


def stable_diffusion_xl():
    second = text_encoder(WIDTH, seed=4, projection=True)
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 * 4 + WIDTH,
    }
    base = StableDiffusionXLPipeline(
        vae=vae(0.13025), text_encoder=text_encoder(), text_encoder_2=second, tokenizer=tokenizer(),
        tokenizer_2=tokenizer(), unet=unet(2 * WIDTH, **added), scheduler=ddim(), add_watermarker=False,
    )  # fmt: skip
    return quiet(base)


def control_net():
    torch.manual_seed(5)
    config = {k: v for k, v in TEXT_BLOCKS.items() if k != "up_block_types"}
    control = ControlNetModel(
        **config, cross_attention_dim=WIDTH, conditioning_embedding_out_channels=(8, 8)
    ).eval()  # the two embedding layers halve the image once
    parts = stable_diffusion().components
    return quiet(StableDiffusionControlNetPipeline(**parts, controlnet=control, requires_safety_checker=False))


def pixels(classes=None, **config):
    torch.manual_seed(6)
    network = UNet2DModel(**PIXELS, num_class_embeds=classes).eval()
    null = None if classes is None else classes - 1
    return quiet(ImageGenerationPipeline(network, ddim(), null_class_label=null, **config))


def pixel_module(classes=None):
    torch.manual_seed(7)
    return OMSUNet2DModel(**PIXELS, num_class_embeds=classes).eval()


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# Each base, the module that fits it and the arguments of a call.
PICTURE = torch.linspace(0, 1, 3 * 16 * 24).reshape(1, 3, 16, 24)
CASES = {
    "stable_diffusion": (stable_diffusion, module, {"prompt": "a cat"}),
    "stable_diffusion_xl": (stable_diffusion_xl, lambda: module(2 * WIDTH), {"prompt": "a cat"}),
    "control_net": (control_net, module, {"prompt": "a cat", "image": PICTURE}),
    "lcm": (lcm, module, {"prompt": "a cat", "guidance_scale": 1.0}),
    "pixels": (pixels, pixel_module, {}),
    "classes": (lambda: pixels(4), lambda: pixel_module(4), {"class_labels": [1]}),
}


def case(name):
    """Returns the base, the pipeline in front of it and the arguments of a quick call for latents."""
    base, network, arguments = CASES[name]
    base = base()
    return base, quiet(OMSPipeline(network(), base)), {**arguments, "num_inference_steps": 3, "output_type": "latent"}
