"""Text-to-video pipelines with tiny components."""

import diffusers
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler

from tests.tiny_pipelines import FAMILIES, autoencoder, clip, t5
from tests.tiny_tokenizers import clip_tokenizer, plain_tokenizer, t5_tokenizer

from .tiny_images import llama, t5_parts


def wan(**arguments):
    return diffusers.WanPipeline(
        transformer=diffusers.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=32,
            freq_dim=16,
            ffn_dim=32,
            num_layers=1,
            rope_max_seq_len=32,
        ),
        vae=diffusers.AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.0, 2.0, 0.5, 1.5],
        ),
        text_encoder=t5(32, transformers.UMT5EncoderModel, transformers.UMT5Config),
        tokenizer=t5_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **arguments,
    )


def wan_2_2():
    return wan(expand_timesteps=True)  # a timestep a token, as in the 5B model


def ltx():
    return diffusers.LTXPipeline(
        transformer=diffusers.LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=4,
            attention_head_dim=8,
            cross_attention_dim=32,
            num_layers=1,
            caption_channels=32,
        ),
        vae=diffusers.AutoencoderKLLTXVideo(
            latent_channels=8,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            decoder_inject_noise=(False,) * 5,
            upsample_residual=(False,) * 4,
            upsample_factor=(1,) * 4,
            timestep_conditioning=False,
            patch_size=1,
            patch_size_t=1,
            encoder_causal=True,
            decoder_causal=False,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **t5_parts(),
    )


def hunyuan_video():
    return diffusers.HunyuanVideoPipeline(
        transformer=diffusers.HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=10,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            patch_size=1,
            patch_size_t=1,
            guidance_embeds=True,
            text_embed_dim=16,
            pooled_projection_dim=32,
            rope_axes_dim=(2, 4, 4),
        ),
        vae=diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4,
            down_block_types=("HunyuanVideoDownBlock3D",) * 4,
            up_block_types=("HunyuanVideoUpBlock3D",) * 4,
            block_out_channels=(8,) * 4,
            layers_per_block=1,
            norm_num_groups=4,
            mid_block_add_attention=True,
        ),
        text_encoder=llama(16, cls=transformers.LlamaModel),
        tokenizer=plain_tokenizer(),
        text_encoder_2=clip(cls=transformers.CLIPTextModel),
        tokenizer_2=clip_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


def cogvideo_x():
    return diffusers.CogVideoXPipeline(
        transformer=diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            time_embed_dim=2,
            text_embed_dim=32,
            num_layers=1,
            sample_width=4,
            sample_height=8,
            sample_frames=9,
            max_text_seq_length=226,
        ),
        vae=diffusers.AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8,) * 4,
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=4,
        ),
        scheduler=diffusers.CogVideoXDDIMScheduler(),
        **t5_parts(),
    )


def latte():
    return diffusers.LattePipeline(
        transformer=diffusers.LatteTransformer3DModel(
            sample_size=8,
            num_layers=1,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=3,
            caption_channels=32,
            in_channels=4,
            cross_attention_dim=24,
            out_channels=8,
            attention_bias=True,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            video_length=1,
        ),
        vae=autoencoder(),
        scheduler=diffusers.DDIMScheduler(),
        **t5_parts(),
    )


def allegro():
    return diffusers.AllegroPipeline(
        transformer=diffusers.AllegroTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            cross_attention_dim=24,
            sample_width=8,
            sample_height=8,
            sample_frames=8,
            caption_channels=32,
        ),
        vae=diffusers.AutoencoderKLAllegro(
            down_block_types=("AllegroDownBlock3D",) * 4,
            up_block_types=("AllegroUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=4,
        ),
        scheduler=diffusers.DDIMScheduler(),
        **t5_parts(),
    )


def animate_diff(xl=False):
    parts = FAMILIES["StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline"]().components
    parts = {k: v for k, v in parts.items() if k not in ("safety_checker", "image_encoder", "feature_extractor")}
    adapter = diffusers.MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_norm_num_groups=2,
        motion_num_attention_heads=2,
        use_motion_mid_block=not xl,
    )
    return (diffusers.AnimateDiffSDXLPipeline if xl else diffusers.AnimateDiffPipeline)(
        **parts, motion_adapter=adapter
    )


def animate_diff_xl():
    return animate_diff(xl=True)


def mochi():
    return diffusers.MochiPipeline(
        transformer=diffusers.MochiTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            pooled_projection_dim=16,
            in_channels=12,
            out_channels=None,
            text_embed_dim=32,
            time_embed_dim=4,
            max_sequence_length=256,
        ),
        vae=diffusers.AutoencoderKLMochi(
            latent_channels=12,
            out_channels=3,
            encoder_block_out_channels=(32,) * 4,
            decoder_block_out_channels=(32,) * 4,
            layers_per_block=(1,) * 5,
            latents_mean=[0.1] * 12,
            latents_std=[1.5] * 12,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **t5_parts(),
    )


BUILDERS = {
    "WanPipeline": (wan, {"num_frames": 9}),
    "WanPipeline, timesteps a token": (wan_2_2, {"num_frames": 9}),
    "LTXPipeline": (ltx, {"num_frames": 9}),
    "HunyuanVideoPipeline": (hunyuan_video, {"num_frames": 9}),
    "CogVideoXPipeline": (cogvideo_x, {"num_frames": 9}),
    "LattePipeline": (latte, {"video_length": 1}),
    "AllegroPipeline": (allegro, {"num_frames": 8}),
    "AnimateDiffPipeline": (animate_diff, {"num_frames": 2}),
    "AnimateDiffSDXLPipeline": (animate_diff_xl, {"num_frames": 2}),
    "MochiPipeline": (mochi, {"num_frames": 7}),
}
