"""Stock pipelines with tiny random components, built from configurations: `build("FluxPipeline")`."""

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from tests.tiny_tokenizers import clip_tokenizer, gemma_tokenizer, qwen_tokenizer, t5_tokenizer

VOCAB = 700  # more than any tokenizer of tiny_tokenizers has


def clip(width=32, projection=32, cls=CLIPTextModelWithProjection, layers=2, positions=77):
    tokenizer = clip_tokenizer()
    return cls(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=32,
            num_attention_heads=4,
            num_hidden_layers=layers,
            projection_dim=projection,
            max_position_embeddings=positions,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def t5(width=32, cls=T5EncoderModel, config=T5Config):
    return cls(config(vocab_size=VOCAB, d_model=width, d_ff=32, d_kv=8, num_layers=2, num_heads=4))


def qwen3(width=16, cls=Qwen3Model, layers=2):
    return cls(
        Qwen3Config(
            vocab_size=VOCAB,
            hidden_size=width,
            intermediate_size=16,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
        )
    )


def qwen_vl(width=16, layers=2):
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6}
    text = {
        "vocab_size": VOCAB,
        "hidden_size": width,
        "intermediate_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_scaling": rope,
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": width}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def gemma2(width=8):
    return Gemma2Model(
        Gemma2Config(
            vocab_size=VOCAB,
            hidden_size=width,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
        )
    )


def autoencoder(channels=4, blocks=2, width=8, **config):
    return AutoencoderKL(
        block_out_channels=(width,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=channels,
        norm_num_groups=4,
        **config,
    )


def unet(**config):
    arguments = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
    }
    return UNet2DConditionModel(**{**arguments, **config})


def stable_diffusion():
    return StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=clip(cls=CLIPTextModel),
        tokenizer=clip_tokenizer(),
        unet=unet(),
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl():
    return StableDiffusionXLPipeline(
        vae=autoencoder(scaling_factor=0.13025, force_upcast=True),
        text_encoder=clip(cls=CLIPTextModel),
        text_encoder_2=clip(),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet(
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=80,
            cross_attention_dim=64,
        ),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear"),
        add_watermarker=False,
    )


def stable_diffusion_3():
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_projection_dim=32,
            joint_attention_dim=64,
            pooled_projection_dim=64,
            out_channels=4,
            pos_embed_max_size=64,
        ),
        text_encoder=clip(),
        text_encoder_2=clip(),
        text_encoder_3=t5(64),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        tokenizer_3=t5_tokenizer(),
        vae=autoencoder(shift_factor=0.0609, scaling_factor=1.5305),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def flux(guidance_embeds=False):
    return FluxPipeline(
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=guidance_embeds,
        ),
        text_encoder=clip(cls=CLIPTextModel),
        text_encoder_2=t5(32),
        tokenizer=clip_tokenizer(),
        tokenizer_2=t5_tokenizer(),
        vae=autoencoder(shift_factor=0.1159, scaling_factor=0.3611),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


def flux_2_autoencoder():
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    )
    vae.bn.running_mean.normal_(std=0.3)
    vae.bn.running_var.uniform_(0.5, 2)
    return vae


def flux_2_klein():
    return Flux2KleinPipeline(
        transformer=Flux2Transformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=48,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
        text_encoder=qwen3(16, Qwen3ForCausalLM, layers=28),
        tokenizer=qwen_tokenizer(),
        vae=flux_2_autoencoder(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def qwen_image_autoencoder():
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.0, 2.0, 0.5, 1.5],
    )


def qwen_image():
    return QwenImagePipeline(
        transformer=QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(8, 4, 4),
        ),
        vae=qwen_image_autoencoder(),
        text_encoder=qwen_vl(),
        tokenizer=qwen_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


def z_image():
    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    for token in (transformer.x_pad_token, transformer.cap_pad_token):  # made by `torch.empty`
        torch.nn.init.normal_(token, std=0.02)
    return ZImagePipeline(
        transformer=transformer,
        text_encoder=qwen3(),
        tokenizer=qwen_tokenizer(),
        vae=autoencoder(shift_factor=0.1159, scaling_factor=0.3611),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


def deep_compression_autoencoder():
    return AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )


def sana():
    return SanaPipeline(
        transformer=SanaTransformer2DModel(
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=4,
            num_cross_attention_heads=2,
            cross_attention_head_dim=4,
            cross_attention_dim=8,
            caption_channels=8,
            sample_size=8,
        ),
        vae=deep_compression_autoencoder(),
        text_encoder=gemma2(8),
        tokenizer=gemma_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def pixart_sigma():
    return PixArtSigmaPipeline(
        transformer=PixArtTransformer2DModel(
            sample_size=8,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=3,
            caption_channels=32,
            in_channels=4,
            cross_attention_dim=24,
            out_channels=8,
        ),
        vae=autoencoder(),
        text_encoder=t5(32),
        tokenizer=t5_tokenizer(),
        scheduler=DDIMScheduler(),
    )


def lumina_2():
    return Lumina2Pipeline(
        transformer=Lumina2Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            hidden_size=24,
            num_layers=2,
            num_attention_heads=3,
            num_kv_heads=1,
            multiple_of=16,
            scaling_factor=1.0,
            axes_dim_rope=(4, 2, 2),
            cap_feat_dim=8,
        ),
        vae=autoencoder(blocks=4, shift_factor=0.0609, scaling_factor=1.5035),
        text_encoder=gemma2(8),
        tokenizer=gemma_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def dit():
    return DiTPipeline(
        transformer=DiTTransformer2DModel(
            sample_size=8,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            in_channels=4,
            out_channels=8,
            num_embeds_ada_norm=1000,
        ),
        vae=autoencoder(),
        scheduler=DDPMScheduler(),
    )


FAMILIES = {
    "StableDiffusionPipeline": stable_diffusion,
    "StableDiffusionXLPipeline": stable_diffusion_xl,
    "StableDiffusion3Pipeline": stable_diffusion_3,
    "FluxPipeline": flux,
    "Flux2KleinPipeline": flux_2_klein,
    "QwenImagePipeline": qwen_image,
    "ZImagePipeline": z_image,
    "SanaPipeline": sana,
    "PixArtSigmaPipeline": pixart_sigma,
    "Lumina2Pipeline": lumina_2,
}


def seeded(make):
    """Returns a pipeline with the same weights at every call, ready to sample."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = make()
        for component in pipe.components.values():
            if isinstance(component, torch.nn.Module):
                component.eval().requires_grad_(False)
                for parameter in component.parameters():
                    if not parameter.any():  # layers that start at 0 would hide what goes into them
                        torch.nn.init.normal_(parameter, std=0.05)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build(name, **arguments):
    """Returns one of the `FAMILIES`, or `DiTPipeline`, which takes class labels."""
    return seeded(lambda: {**FAMILIES, "DiTPipeline": dit}[name](**arguments))
