"""Further text-to-image pipelines with tiny components, beside the ten of the tests."""

import inspect

import diffusers
import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler

from tests.tiny_pipelines import (
    FAMILIES,
    VOCAB,
    autoencoder,
    clip,
    deep_compression_autoencoder,
    flux_2_autoencoder,
    flux_2_klein,
    gemma2,
    pixart_sigma,
    qwen3,
    qwen_image_autoencoder,
    qwen_vl,
    t5,
    unet,
)
from tests.tiny_tokenizers import clip_tokenizer, gemma_tokenizer, plain_tokenizer, qwen_tokenizer, t5_tokenizer

FLUX_VAE = {"shift_factor": 0.1159, "scaling_factor": 0.3611}


def flow(**config):
    return FlowMatchEulerDiscreteScheduler(**config)


def t5_parts(width=32):
    return {"text_encoder": t5(width), "tokenizer": t5_tokenizer()}


def qwen3_vl(width=16, cls=transformers.Qwen3VLForConditionalGeneration, layers=2):
    rope = {"mrope_section": [2, 1, 1], "rope_type": "default", "rope_theta": 1e6, "mrope_interleaved": True}
    text = {
        "vocab_size": VOCAB,
        "hidden_size": width,
        "intermediate_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_scaling": rope,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": width,
        "deepstack_visual_indexes": [0],
    }
    return cls(transformers.Qwen3VLConfig(text_config=text, vision_config=vision))


def mistral_3(width=16, layers=2, cls=transformers.Mistral3ForConditionalGeneration):
    text = transformers.MistralConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    vision = transformers.PixtralVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    return cls(transformers.Mistral3Config(text_config=text, vision_config=vision))


def llama(width=16, layers=3, cls=transformers.LlamaForCausalLM):
    return cls(
        transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=width,
            intermediate_size=16,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )


def flux_like(cls, **config):
    arguments = {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "axes_dims_rope": (4, 4, 8),
    }
    return cls(patch_size=1, **{**arguments, **config})


def latent_consistency():
    return diffusers.LatentConsistencyModelPipeline(
        vae=autoencoder(),
        text_encoder=clip(cls=transformers.CLIPTextModel),
        tokenizer=clip_tokenizer(),
        unet=unet(time_cond_proj_dim=32),
        scheduler=diffusers.LCMScheduler(beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def with_perturbed_attention(base, name):
    def build():
        pipe = FAMILIES[base]()
        known = {**pipe.components, "safety_checker": None, "feature_extractor": None, "image_encoder": None}
        cls = getattr(diffusers, name)
        taken = inspect.signature(cls.__init__).parameters
        extra = {"requires_safety_checker": False, "add_watermarker": False}
        return cls(**{k: v for k, v in {**known, **extra}.items() if k in taken})

    return build


def pixart_alpha():
    parts = pixart_sigma().components
    return diffusers.PixArtAlphaPipeline(**{**parts, "scheduler": diffusers.DPMSolverMultistepScheduler()})


def hunyuan_dit(cls=diffusers.HunyuanDiTPipeline):
    bert = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    return cls(
        transformer=diffusers.HunyuanDiT2DModel(
            sample_size=8,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            in_channels=4,
            hidden_size=16,
            cross_attention_dim=16,
            cross_attention_dim_t5=32,
            pooled_projection_dim=16,
            text_len=77,
            text_len_t5=256,
        ),
        vae=autoencoder(blocks=4),
        text_encoder=transformers.BertModel(bert),
        tokenizer=plain_tokenizer(),
        text_encoder_2=t5(32),
        tokenizer_2=t5_tokenizer(),
        scheduler=diffusers.DDPMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def aura_flow():
    return diffusers.AuraFlowPipeline(
        transformer=diffusers.AuraFlowTransformer2DModel(
            sample_size=8,
            patch_size=2,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pos_embed_max_size=1024,
        ),
        vae=autoencoder(),
        text_encoder=t5(32, transformers.UMT5EncoderModel, transformers.UMT5Config),
        tokenizer=t5_tokenizer(),
        scheduler=flow(),
    )


def bria():
    return diffusers.BriaPipeline(
        transformer=flux_like(diffusers.BriaTransformer2DModel, axes_dims_rope=[0, 8, 8]),
        vae=autoencoder(**FLUX_VAE),
        scheduler=flow(),
        **t5_parts(),
    )


def bria_fibo():
    config = transformers.SmolLM3Config(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    return diffusers.BriaFiboPipeline(
        transformer=flux_like(
            diffusers.BriaFiboTransformer2DModel, axes_dims_rope=[0, 8, 8], text_encoder_dim=16, in_channels=12
        ),
        vae=diffusers.AutoencoderKLWan(
            base_dim=8,
            z_dim=12,
            in_channels=12,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            out_channels=12,
            patch_size=2,
            scale_factor_spatial=16,
            latents_mean=[0.1] * 12,
            latents_std=[1.5] * 12,
        ),
        text_encoder=transformers.SmolLM3ForCausalLM(config),
        tokenizer=plain_tokenizer(),
        scheduler=flow(),
    )


def chroma():
    return diffusers.ChromaPipeline(
        transformer=flux_like(
            diffusers.ChromaTransformer2DModel,
            approximator_num_channels=8,
            approximator_hidden_dim=16,
            approximator_layers=1,
        ),
        vae=autoencoder(**FLUX_VAE),
        scheduler=flow(),
        **t5_parts(),
    )


def cogview_3():
    return diffusers.CogView3PlusPipeline(
        transformer=diffusers.CogView3PlusTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            text_embed_dim=32,
            time_embed_dim=8,
            condition_dim=2,
            pos_embed_max_size=32,
            sample_size=8,
        ),
        vae=autoencoder(),
        scheduler=diffusers.CogVideoXDDIMScheduler(),
        **t5_parts(),
    )


def cogview_4():
    config = transformers.GlmConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
    )
    return diffusers.CogView4Pipeline(
        transformer=diffusers.CogView4Transformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            text_embed_dim=32,
            time_embed_dim=8,
            condition_dim=4,
            sample_size=8,
            rope_axes_dim=(16, 16),
        ),
        vae=autoencoder(),
        text_encoder=transformers.GlmModel(config),
        tokenizer=plain_tokenizer("left"),
        scheduler=flow(use_dynamic_shifting=True),
    )


def flux_2():
    return diffusers.Flux2Pipeline(
        transformer=flux_like(
            diffusers.Flux2Transformer2DModel,
            joint_attention_dim=48,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
        ),
        vae=flux_2_autoencoder(),
        text_encoder=mistral_3(layers=31),
        tokenizer=plain_tokenizer(),
        scheduler=flow(),
    )


def flux_2_klein_kv():
    return diffusers.Flux2KleinKVPipeline(**flux_2_klein().components)


def hidream():
    pipe = diffusers.HiDreamImagePipeline(
        transformer=diffusers.HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_channels=[32, 16],
            text_emb_dim=64,
            axes_dims_rope=(4, 2, 2),
            max_resolution=(64, 64),
            llama_layers=(0, 1),
        ),
        vae=autoencoder(**FLUX_VAE),
        text_encoder=clip(positions=128),
        tokenizer=clip_tokenizer(128),
        text_encoder_2=clip(positions=128),
        tokenizer_2=clip_tokenizer(128),
        text_encoder_3=t5(32),
        tokenizer_3=t5_tokenizer(),
        text_encoder_4=llama(16),
        tokenizer_4=plain_tokenizer(),
        scheduler=flow(),
    )
    pipe.default_sample_size = 32  # the pipeline scales every size to as many pixels
    return pipe


def hunyuan_image():
    text = qwen_vl(16, layers=4)
    return diffusers.HunyuanImagePipeline(
        transformer=diffusers.HunyuanImageTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=4,
            attention_head_dim=8,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            text_embed_dim=16,
            text_embed_2_dim=32,
            rope_axes_dim=(4, 4),
        ),
        vae=diffusers.AutoencoderKLHunyuanImage(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            block_out_channels=(32, 64, 64, 64),
            layers_per_block=1,
            scaling_factor=0.476986,
            spatial_compression_ratio=8,
            sample_size=32,
        ),
        text_encoder=text,
        tokenizer=qwen_tokenizer(),
        text_encoder_2=t5(32),
        tokenizer_2=transformers.ByT5Tokenizer(),
        scheduler=flow(shift=7.0),
    )


def kandinsky_3():
    return diffusers.Kandinsky3Pipeline(
        unet=diffusers.Kandinsky3UNet(
            time_embedding_dim=4,
            groups=2,
            attention_head_dim=4,
            layers_per_block=3,
            block_out_channels=(32, 64),
            cross_attention_dim=4,
            encoder_hid_dim=32,
        ),
        movq=diffusers.VQModel(
            block_out_channels=(32,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            norm_num_groups=8,
            norm_type="spatial",
            num_vq_embeddings=12,
            vq_embed_dim=4,
        ),
        scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        **t5_parts(),
    )


class Processor(transformers.PreTrainedTokenizerFast):
    """Stands in for a processor of texts and images where only texts come."""

    def __call__(self, text=None, images=None, videos=None, **kwargs):
        return super().__call__(text, **kwargs)


def processor():
    plain = plain_tokenizer()
    return Processor(
        tokenizer_object=plain.backend_tokenizer,
        pad_token=plain.pad_token,
        eos_token=plain.eos_token,
        model_max_length=512,
        chat_template=plain.chat_template,
    )


def kandinsky_5():
    pipe = diffusers.Kandinsky5T2IPipeline(
        transformer=diffusers.Kandinsky5Transformer3DModel(
            in_visual_dim=4,
            in_text_dim=16,
            in_text_dim2=32,
            time_dim=16,
            out_visual_dim=4,
            model_dim=16,
            ff_dim=32,
            num_text_blocks=1,
            num_visual_blocks=1,
            axes_dims=(1, 1, 2),
        ),
        vae=autoencoder(blocks=4, **FLUX_VAE),
        text_encoder=qwen_vl(16),
        tokenizer=processor(),
        text_encoder_2=clip(cls=transformers.CLIPTextModel),
        tokenizer_2=clip_tokenizer(),
        scheduler=flow(),
    )
    pipe.resolutions = [(64, 64)]
    return pipe


def krea_2():
    return diffusers.Krea2Pipeline(
        transformer=diffusers.Krea2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=32,
            timestep_embed_dim=16,
            text_hidden_dim=16,
            num_text_layers=2,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=16,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(4, 6, 6),
        ),
        vae=qwen_image_autoencoder(),
        text_encoder=qwen3_vl(16, transformers.Qwen3VLModel),
        tokenizer=qwen_tokenizer(),
        text_encoder_select_layers=(1, 2),
        scheduler=flow(use_dynamic_shifting=True),
    )


def longcat():
    return diffusers.LongCatImagePipeline(
        transformer=flux_like(
            diffusers.LongCatImageTransformer2DModel, joint_attention_dim=16, pooled_projection_dim=16, in_channels=64
        ),
        vae=autoencoder(16, **FLUX_VAE),
        text_encoder=qwen_vl(16),
        tokenizer=qwen_tokenizer(),
        text_processor=processor(),
        scheduler=flow(),
    )


def lumina():
    config = transformers.GemmaConfig(
        vocab_size=VOCAB,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=4,
    )
    return diffusers.LuminaPipeline(
        transformer=diffusers.LuminaNextDiT2DModel(
            sample_size=8,
            hidden_size=16,
            num_layers=2,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            cross_attention_dim=8,
        ),
        vae=autoencoder(blocks=4),
        text_encoder=transformers.GemmaModel(config),
        tokenizer=gemma_tokenizer(),
        scheduler=flow(),
    )


def nucleus():
    pipe = diffusers.NucleusMoEImagePipeline(
        transformer=diffusers.NucleusMoEImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            num_key_value_heads=1,
            joint_attention_dim=16,
            axes_dims_rope=(8, 4, 4),
            moe_enabled=True,
            dense_moe_strategy="leave_first_block_dense",
            num_experts=4,
            moe_intermediate_dim=16,
            capacity_factors=[2.0, 2.0],
        ),
        vae=qwen_image_autoencoder(),
        text_encoder=qwen3_vl(16, layers=9),
        processor=processor(),
        scheduler=flow(),
    )
    for name, parameter in pipe.transformer.named_parameters():
        if "experts" in name:  # made by `torch.empty`
            torch.nn.init.normal_(parameter, std=0.2)
    return pipe


def ovis():
    return diffusers.OvisImagePipeline(
        transformer=flux_like(diffusers.OvisImageTransformer2DModel, out_channels=16, joint_attention_dim=16),
        vae=autoencoder(**FLUX_VAE),
        text_encoder=qwen3(16),
        tokenizer=qwen_tokenizer(),
        scheduler=flow(),
    )


def prx(pixels=False):
    transformer = diffusers.PRXTransformer2DModel(
        in_channels=3 if pixels else 4,
        patch_size=4 if pixels else 1,
        context_in_dim=16,
        hidden_size=16,
        num_heads=2,
        depth=1,
        axes_dim=[4, 4],
        bottleneck_size=8 if pixels else None,
    )
    if pixels:
        return diffusers.PRXPixelPipeline(transformer, flow(), qwen3(16), qwen_tokenizer())
    return diffusers.PRXPipeline(
        transformer=transformer,
        scheduler=flow(),
        text_encoder=t5(16),
        tokenizer=gemma_tokenizer(),
        vae=autoencoder(**FLUX_VAE),
    )


def prx_pixel():
    return prx(pixels=True)


def sana_sprint():
    return diffusers.SanaSprintPipeline(
        transformer=diffusers.SanaTransformer2DModel(
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
            qk_norm="rms_norm_across_heads",
            guidance_embeds=True,
        ),
        vae=deep_compression_autoencoder(),
        text_encoder=gemma2(8),
        tokenizer=gemma_tokenizer(),
        scheduler=diffusers.SCMScheduler(),
    )


def deep_floyd():
    return diffusers.IFPipeline(
        unet=unet(
            in_channels=3,
            out_channels=6,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            attention_head_dim=8,
            addition_embed_type="text",
            addition_embed_type_num_heads=2,
            cross_attention_dim=16,
            encoder_hid_dim=32,
            resnet_time_scale_shift="scale_shift",
            time_embedding_type="fourier",
            timestep_post_act="gelu",
            class_embed_type=None,
            sample_size=16,
        ),
        scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range"),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
        **t5_parts(),
    )


def ernie():
    return diffusers.ErnieImagePipeline(
        transformer=diffusers.ErnieImageTransformer2DModel(
            hidden_size=32,
            num_attention_heads=2,
            num_layers=1,
            ffn_hidden_size=32,
            in_channels=16,
            out_channels=16,
            text_in_dim=16,
            rope_axes_dim=(4, 6, 6),
        ),
        vae=flux_2_autoencoder(),
        text_encoder=mistral_3(16, cls=transformers.Mistral3Model),
        tokenizer=plain_tokenizer(),
        scheduler=flow(),
    )


def dream_lite():
    return diffusers.DreamLitePipeline(
        unet=diffusers.DreamLiteUNetModel(
            sample_size=8,
            block_out_channels=(16, 32, 32),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=16,
            attention_head_dim=8,
        ),
        vae=diffusers.AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4),
        text_encoder=qwen3_vl(16),
        tokenizer=qwen_tokenizer(),
        processor=processor(),
        scheduler=flow(),
    )


BUILDERS = {
    "LatentConsistencyModelPipeline": latent_consistency,
    "PixArtAlphaPipeline": pixart_alpha,
    "HunyuanDiTPipeline": hunyuan_dit,
    "AuraFlowPipeline": aura_flow,
    "BriaPipeline": bria,
    "BriaFiboPipeline": bria_fibo,
    "ChromaPipeline": chroma,
    "CogView3PlusPipeline": cogview_3,
    "CogView4Pipeline": cogview_4,
    "Flux2Pipeline": flux_2,
    "Flux2KleinKVPipeline": flux_2_klein_kv,
    "HiDreamImagePipeline": hidream,
    "HunyuanImagePipeline": hunyuan_image,
    "Kandinsky3Pipeline": kandinsky_3,
    "Kandinsky5T2IPipeline": kandinsky_5,
    "Krea2Pipeline": krea_2,
    "LongCatImagePipeline": longcat,
    "LuminaPipeline": lumina,
    "NucleusMoEImagePipeline": nucleus,
    "OvisImagePipeline": ovis,
    "PRXPipeline": prx,
    "PRXPixelPipeline": prx_pixel,
    "SanaSprintPipeline": sana_sprint,
    "IFPipeline": deep_floyd,
    "ErnieImagePipeline": ernie,
    "DreamLitePipeline": dream_lite,
    "StableDiffusionPAGPipeline": with_perturbed_attention("StableDiffusionPipeline", "StableDiffusionPAGPipeline"),
    "StableDiffusionXLPAGPipeline": with_perturbed_attention(
        "StableDiffusionXLPipeline", "StableDiffusionXLPAGPipeline"
    ),
    "StableDiffusion3PAGPipeline": with_perturbed_attention("StableDiffusion3Pipeline", "StableDiffusion3PAGPipeline"),
    "SanaPAGPipeline": with_perturbed_attention("SanaPipeline", "SanaPAGPipeline"),
    "PixArtSigmaPAGPipeline": with_perturbed_attention("PixArtSigmaPipeline", "PixArtSigmaPAGPipeline"),
    "HunyuanDiTPAGPipeline": lambda: hunyuan_dit(diffusers.HunyuanDiTPAGPipeline),
}
