"""A LoRA step of networks as large as SDXL's, SD 3's and Flux's, through the pipeline and by hand, on a GPU.

    python -m benchmarks.any_pipeline.on_gpu              # some minutes and 40 GB of a GPU
    python -m benchmarks.any_pipeline.on_gpu --tiny       # the same with tiny networks, on any machine, not written

Random weights in bf16, latents of 1024 pixels, one image, rank 16; Flux's network also in 4 bits (bitsandbytes). The
text encoders are tiny: what is measured is the network's step, once on recorded arguments, once through the pipeline's
own call. Time is that of the median of steps in turn; memory is the allocator's peak in a step.
"""

import argparse
import statistics
import time

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from peft import LoraConfig
from torch import nn

from benchmarks.any_pipeline.seam_speed import recorded
from benchmarks.harness import figure, write_result
from diffusers_ext import PipelineDenoiser
from tests.tiny_pipelines import build

STEPS, SIDE = 7, 256  # the tiny autoencoders halve each side: 128 x 128 latents, as of 1024 pixels
SAYS = {
    r"step_over_by_hand_(\w+)": r"A LoRA step through the pipeline (\1, bf16) takes {:.3f} times that by hand.",
    r"step_by_hand_(\w+)": r"By hand it takes {:.0f} ms (\1).",
    r"memory_over_by_hand_(\w+)": r"It needs {:.3f} times the memory (\1).",
    r"memory_by_hand_(\w+)": r"By hand it needs {:.1f} GB (\1).",
}


def sdxl():
    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        use_linear_projection=True,
        cross_attention_dim=64,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
    )


def sd3():
    return SD3Transformer2DModel(
        sample_size=128,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        caption_projection_dim=1536,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        pos_embed_max_size=192,
    )


def flux():
    return FluxTransformer2DModel(in_channels=16, joint_attention_dim=32, pooled_projection_dim=32)


NETWORKS = {
    "sdxl": ("StableDiffusionXLPipeline", "unet", sdxl),
    "sd3": ("StableDiffusion3Pipeline", "transformer", sd3),
    "flux": ("FluxPipeline", "transformer", flux),
    "flux_4bit": ("FluxPipeline", "transformer", flux),
}


def in_four_bits(network, device):
    """Puts 4-bit layers in the place of linear ones."""
    import bitsandbytes as bnb

    for name, layer in [(n, m) for n, m in network.named_modules() if type(m) is nn.Linear]:
        bias = layer.bias is not None
        new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias, torch.bfloat16, quant_type="nf4")
        new.weight = bnb.nn.Params4bit(layer.weight.data.cpu(), requires_grad=False, quant_type="nf4")
        new.bias = layer.bias
        network.set_submodule(name, new.to(device))


def made(name, tiny, device):
    """Returns a pipeline on the device, its network of random weights in bf16 with LoRA layers."""
    kind, part, network = NETWORKS[name]
    pipe = build(kind)
    if not tiny:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(device):
            setattr(pipe, part, network())
        torch.set_default_dtype(torch.float32)
    pipe.to(dtype=torch.bfloat16)
    if name == "flux_4bit" and not tiny:
        in_four_bits(pipe.transformer, device)
    pipe.to(device)
    network = getattr(pipe, part).requires_grad_(False)
    network.add_adapter(LoraConfig(r=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    return pipe


def measured(name, tiny, device):
    """Returns seconds and bytes of each way, step by step."""
    pipe = made(name, tiny, device)
    side = 32 if tiny else SIDE
    denoiser = PipelineDenoiser(pipe, height=side, width=side)
    network, conditions = denoiser.denoiser, denoiser.encode_prompts(["a red cat"])
    x, t = torch.randn(denoiser.latents_shape(1), device=device), torch.tensor([500], device=device)
    args, kwargs = recorded(network, lambda: denoiser(x, t, conditions))
    ways = {
        "hand": lambda: network(*args, **{**kwargs, "return_dict": False})[0],
        "seam": lambda: denoiser(x, t, conditions),
    }
    gpu, found = device == "cuda", {way: [] for way in ways}
    for i in range(STEPS + 2):
        for way in list(ways)[:: 1 if i % 2 else -1]:
            if gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            ways[way]().float().square().mean().backward()
            if gpu:
                torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() if gpu else 0
            found[way].append((time.perf_counter() - start, peak))
            network.zero_grad(set_to_none=True)
    return {way: [statistics.median(column) for column in zip(*rows[2:], strict=True)] for way, rows in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    arguments = parser.parse_args()
    if not (torch.cuda.is_available() or arguments.tiny):
        raise SystemExit("error: no GPU here; --tiny tries the script without one")
    device, figures, start = "cuda" if torch.cuda.is_available() else "cpu", {}, time.perf_counter()
    for name in arguments.networks:
        (hand, by_hand), (seam, through) = measured(name, arguments.tiny, device).values()
        figures[f"step_over_by_hand_{name}"] = figure(seam / hand, "ratio")
        figures[f"step_by_hand_{name}"] = figure(1000 * hand, "ms")
        if by_hand:
            figures[f"memory_over_by_hand_{name}"] = figure(through / by_hand, "ratio")
            figures[f"memory_by_hand_{name}"] = figure(by_hand / 1e9, "GB")
        print(
            name, {key: round(value["value"], 3) for key, value in figures.items() if key.endswith(name)}, flush=True
        )
        if device == "cuda":
            torch.cuda.empty_cache()
    if not arguments.tiny:
        card = torch.cuda.get_device_name()
        command = f"python -m benchmarks.any_pipeline.on_gpu    # {card}"
        write_result("any_pipeline/on_gpu", command, figures, [0], time.perf_counter() - start, says=SAYS)


if __name__ == "__main__":
    main()
