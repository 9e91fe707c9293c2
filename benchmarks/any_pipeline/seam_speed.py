"""What the way through a pipeline's call costs over calling its network by hand, on one thread.

    python -m benchmarks.any_pipeline.seam_speed

The network's arguments are recorded once; from then on the same network is called with them by hand, and through the
denoiser, in turn. Networks that answer at once show the seam itself in milliseconds, a larger one its share of a
training step.
"""

import statistics
import time

import torch
from diffusers import FluxTransformer2DModel

from benchmarks.harness import figure, write_result
from diffusers_ext import PipelineDenoiser
from tests.tiny_pipelines import build

TINY = {
    "sd3": "StableDiffusion3Pipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "flux": "FluxPipeline",
    "qwen_image": "QwenImagePipeline",
    "z_image": "ZImagePipeline",
}
PAIRS, STEPS = 100, 40
SAYS = {
    r"seam_(\w+)": r"A call of the network through its pipeline (\1) takes {:.2g} ms longer than by hand.",
    r"step_over_by_hand": "A training step of a network that takes some 100 ms costs {} times that by hand.",
    r"step_by_hand": "That step by hand takes {:.0f} ms.",
}


def recorded(network, call):
    found = []
    handle = network.register_forward_pre_hook(lambda _, args, kwargs: found.append((args, kwargs)), with_kwargs=True)
    call()
    handle.remove()
    return found[-1]


def in_turn(by_hand, through, pairs):
    """Returns processor seconds of each, pair by pair; who comes first alternates."""
    times = []
    for i in range(pairs + 3):
        pair = {}
        for name, function in [("hand", by_hand), ("seam", through)][:: 1 if i % 2 else -1]:
            start = time.thread_time()
            function()
            pair[name] = time.thread_time() - start
        times.append((pair["hand"], pair["seam"]))
    return times[3:]


def quiet(times):
    """Returns both as they are in the quietest fifth of the pairs: other work on the machine only adds."""
    return [statistics.quantiles(column, n=5)[0] for column in zip(*times, strict=True)]


def tiny(name):
    """Returns by how many milliseconds the denoiser is slower than the network."""
    denoiser = PipelineDenoiser(build(name), height=32, width=64)
    network, conditions = denoiser.denoiser, denoiser.encode_prompts(["a cat", "a red dog"])
    x, t = torch.randn(denoiser.latents_shape(2)), torch.tensor([900, 100])
    with torch.no_grad():
        args, kwargs = recorded(network, lambda: denoiser(x, t, conditions))
        output = network(*args, **kwargs)
        network.forward = lambda *args, **kwargs: output  # at once: its own time would hide what is measured
        times = in_turn(lambda: network(*args, **kwargs), lambda: denoiser(x, t, conditions), PAIRS)
    hand, seam = quiet(times)
    return 1000 * (seam - hand)


def step():
    """Returns the ratio and the milliseconds by hand of a training step of a larger network."""
    pipe = build("FluxPipeline")
    torch.manual_seed(0)
    pipe.transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=3,
        num_single_layers=6,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(8, 12, 12),
    )
    denoiser = PipelineDenoiser(pipe, height=32, width=64, max_sequence_length=64)
    network, conditions = denoiser.denoiser, denoiser.encode_prompts(["a cat", "a red dog"])
    x, t = torch.randn(denoiser.latents_shape(2)), torch.tensor([900, 100])
    args, kwargs = recorded(network, lambda: denoiser(x, t, conditions))

    def learn(output):
        output.square().mean().backward()
        network.zero_grad()

    times = in_turn(
        lambda: learn(network(*args, **{**kwargs, "return_dict": False})[0]),
        lambda: learn(denoiser(x, t, conditions)),
        STEPS,
    )
    hand, seam = quiet(times)
    return seam / hand, 1000 * hand


def main():
    torch.set_num_threads(1)
    start = time.perf_counter()
    figures = {f"seam_{key}": figure(tiny(name), "ms", goal="<= 1") for key, name in TINY.items()}
    ratio, by_hand = step()
    figures["step_over_by_hand"] = figure(ratio, "ratio", goal="<= 1.02")
    figures["step_by_hand"] = figure(by_hand, "ms")
    command = "python -m benchmarks.any_pipeline.seam_speed"
    write_result("any_pipeline/seam_speed", command, figures, [0], time.perf_counter() - start, says=SAYS)


if __name__ == "__main__":
    main()
