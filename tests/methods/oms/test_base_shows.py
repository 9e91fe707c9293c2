"""One rule: what is not the added step's own is the base pipeline's, to read and to set, to load, move and offload."""

import copy

import pytest
import torch
from diffusers import (
    AutoPipelineForText2Image,
    DDIMInverseScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from diffusers.models.attention_processor import SlicedAttnProcessor
from diffusers.utils import is_peft_available

from diffusers_ext import ImageGenerationPipeline, OMSPipeline

from .tiny import WIDTH, case, module, pixel_module, pixels, quiet, stable_diffusion, text_encoder, tokenizer

CALL = {"prompt": "a cat", "num_inference_steps": 2, "output_type": "latent"}


def draw(pipeline, **call):
    return quiet(pipeline)(**{**CALL, **call}, generator=torch.Generator().manual_seed(0)).images


# ---------------------------------------------------------------- reading and setting


def test_reading():
    base, pipeline, _ = case("stable_diffusion")
    for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "image_processor", "vae_scale_factor"):
        assert getattr(pipeline, name) is getattr(base, name)
    draw(pipeline, guidance_scale=3.0)
    assert pipeline.guidance_scale == 3.0
    assert pipeline.config["requires_safety_checker"] is False
    with pytest.raises(AttributeError, match="nothing"):
        _ = pipeline.nothing
    with pytest.raises(AttributeError, match="unet"):
        _ = OMSPipeline(module()).unet
    assert copy.deepcopy(pipeline).unet is not base.unet


def test_setting():
    base, pipeline, _ = case("stable_diffusion")
    euler = EulerDiscreteScheduler.from_config(base.scheduler.config)
    before = draw(pipeline)
    pipeline.scheduler = euler
    assert base.scheduler is euler
    assert base.config["scheduler"] == ("diffusers", "EulerDiscreteScheduler")
    expected = draw(OMSPipeline(pipeline.oms_module, stable_diffusion(copy.deepcopy(euler))))
    assert torch.equal(draw(pipeline), expected)
    assert not torch.equal(expected, before)
    other = stable_diffusion().unet
    pipeline.unet = other
    assert base.unet is other
    pipeline.mine = 3  # nobody's, and so this one's
    assert not hasattr(base, "mine")
    network, encoder = module(seed=40), text_encoder(seed=41)
    pipeline.oms_module, pipeline.oms_text_encoder = network, encoder
    assert (pipeline.oms_module, pipeline.oms_text_encoder) == (network, encoder)
    assert not hasattr(base, "oms_module")


@pytest.mark.skipif(not is_peft_available(), reason="LoRA weights need peft")
def test_lora_is_loaded_into_the_base(tmp_path):
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(0)
    donor = stable_diffusion()
    donor.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = get_peft_model_state_dict(donor.unet)
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    _, pipeline, _ = case("stable_diffusion")
    before = draw(pipeline)
    pipeline.load_lora_weights(tmp_path)
    after = draw(pipeline)
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after, draw(OMSPipeline(pipeline.oms_module, donor)), atol=1e-5, rtol=1e-5)
    pipeline.unload_lora_weights()
    torch.testing.assert_close(draw(pipeline), before, atol=1e-5, rtol=0)


def test_attention_slicing_reaches_both():
    _, pipeline, _ = case("stable_diffusion")
    expected = draw(pipeline)

    def sliced():
        found = [network.attn_processors.values() for network in (pipeline.oms_module, pipeline.unet)]
        return [all(isinstance(processor, SlicedAttnProcessor) for processor in values) for values in found]

    pipeline.enable_attention_slicing()
    assert sliced() == [True, True]
    torch.testing.assert_close(draw(pipeline), expected, atol=1e-5, rtol=1e-5)
    pipeline.disable_attention_slicing()
    assert sliced() == [False, False]


def test_group_offload_reaches_both():
    _, pipeline, _ = case("stable_diffusion")
    expected = draw(pipeline)
    pipeline.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    assert all(map(_is_group_offload_enabled, (pipeline.oms_module, pipeline.unet, pipeline.text_encoder)))
    torch.testing.assert_close(draw(pipeline), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("base_first", [False, True])
def test_model_offload_is_one_chain(base_first):
    """On the processor itself: the hooks and their order are those of a GPU."""
    base, pipeline, _ = case("stable_diffusion")
    expected = draw(pipeline)
    if base_first:
        base.enable_model_cpu_offload(device="cpu")
    pipeline.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        torch.testing.assert_close(draw(pipeline), expected, atol=1e-5, rtol=1e-5)
        hooks = [network._hf_hook for network in (pipeline.oms_module, base.text_encoder, base.unet, base.vae)]
        # Each sends away the one before it; Accelerate keeps that on the hook.
        assert [hook.prev_module_hook and hook.prev_module_hook.model for hook in hooks] == [
            None, pipeline.oms_module, base.text_encoder, base.unet,
        ]  # fmt: skip
    pipeline.remove_all_hooks()
    assert not any(hasattr(network, "_hf_hook") for network in (pipeline.oms_module, base.unet, base.vae))


# ---------------------------------------------------------------- out of it, and into it


def test_a_stock_pipeline_takes_the_base_out_again():
    base, pipeline, call = case("stable_diffusion_xl")
    base.register_to_config(force_zeros_for_empty_prompt=False)
    stock = StableDiffusionXLPipeline.from_pipe(pipeline)
    assert type(stock) is StableDiffusionXLPipeline
    assert {name: stock.components[name] is part for name, part in base.components.items()} == dict.fromkeys(
        base.components, True
    )
    assert stock.config["force_zeros_for_empty_prompt"] is False
    assert torch.equal(draw(stock), draw(base))
    base = pixels(4, image_scale=2.0)
    found = ImageGenerationPipeline.from_pipe(OMSPipeline(pixel_module(4), base))
    assert (found.unet, found.config["null_class_label"], found.config["image_scale"]) == (base.unet, 3, 2.0)


def test_auto_pipeline_knows_it(tmp_path):
    _, pipeline, _ = case("stable_diffusion")
    pipeline.save_pretrained(tmp_path)
    loaded = AutoPipelineForText2Image.from_pretrained(tmp_path)
    assert type(loaded) is OMSPipeline
    torch.testing.assert_close(draw(loaded), draw(pipeline), atol=1e-5, rtol=1e-5)


def test_a_compiled_module():
    _, pipeline, _ = case("stable_diffusion")
    expected = draw(pipeline)
    pipeline.oms_module = torch.compile(pipeline.oms_module)
    with torch.compiler.set_stance("force_eager"):  # the wrapper is what is tried here
        torch.testing.assert_close(draw(pipeline), expected, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- text


def test_an_encoder_with_a_projection_gives_its_tokens():
    """SDXL's second encoder alone: its pooled output, which comes first, has no tokens."""
    second, words = text_encoder(seed=10, projection=True), tokenizer()
    pipeline = OMSPipeline(module(), stable_diffusion(), second, words)
    texts = ["a cat", "red dogs"]
    ids = words(texts, padding="max_length", max_length=12, return_tensors="pt").input_ids
    embeds = second(ids).last_hidden_state.detach()
    assert embeds.shape == (2, 12, WIDTH)
    found = draw(pipeline, prompt=texts)
    torch.testing.assert_close(found, draw(pipeline, prompt=texts, oms_prompt_embeds=embeds), atol=1e-5, rtol=1e-5)
    other = draw(pipeline, prompt=["a cat", "a fish"])
    torch.testing.assert_close(other[0], found[0], atol=1e-5, rtol=1e-5)
    assert (other[1] - found[1]).abs().max() > 1e-3


def test_a_textual_inversion_of_several_vectors_reaches_the_step():
    base, pipeline, _ = case("stable_diffusion")
    torch.manual_seed(0)
    vectors = torch.randn(3, WIDTH)
    pipeline.load_textual_inversion({"<thing>": vectors})
    known = base.tokenizer.convert_tokens_to_ids(["<thing>", "<thing>_1", "<thing>_2"])
    table = base.text_encoder.get_input_embeddings().weight
    assert torch.equal(table[known], vectors)
    ids = base.tokenizer("a", padding="max_length", max_length=12, return_tensors="pt").input_ids
    ids[0, 2:5] = torch.tensor(known)
    ids[0, 5:] = base.tokenizer.eos_token_id
    embeds = base.text_encoder(ids).last_hidden_state.detach()
    found = draw(pipeline, oms_prompt="a <thing>")
    torch.testing.assert_close(found, draw(pipeline, oms_prompt_embeds=embeds), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- what is refused


def test_without_a_module_there_is_the_base_alone():
    base = stable_diffusion()
    pipeline = OMSPipeline(None, base)
    assert torch.equal(draw(pipeline, oms=False), draw(base))
    with pytest.raises(ValueError, match="`oms` must be False: the pipeline was made without `oms_module`"):
        draw(pipeline)


def test_no_prompts_are_refused():
    _, pipeline, _ = case("stable_diffusion")
    with pytest.raises(ValueError, match="`prompt` must hold at least one prompt, got none"):
        draw(pipeline, prompt=[])
    with pytest.raises(ValueError, match="`prompt_embeds` must hold at least one prompt, got none"):
        draw(pipeline, prompt=None, prompt_embeds=torch.zeros(0, 12, WIDTH))


def test_bases_that_go_the_other_way_or_have_the_step_are_refused():
    base, pipeline, _ = case("stable_diffusion")
    pipeline.scheduler = DDIMInverseScheduler.from_config(base.scheduler.config)
    with pytest.raises(ValueError, match="must go from noise to the image, got DDIMInverseScheduler"):
        draw(pipeline)
    with pytest.raises(ValueError, match="must be a pipeline without the added step, got OMSPipeline"):
        OMSPipeline(module(), pipeline)
