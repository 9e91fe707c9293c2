"""Which of Diffusers' pipelines become denoisers: each is built tiny, taken over and compared with its stock call.

    python -m benchmarks.any_pipeline.census            # some minutes on one core
    python -m benchmarks.any_pipeline.census NAME ...   # only these, printed and not kept

Classes of `AutoPipelineForText2Image` whose components cannot be built here are named with the reason. An adapter on
the attention's projections is saved by the pipeline, loaded by a new one and compared.
"""

import logging
import sys
import tempfile
import time

import diffusers
import torch
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from benchmarks.harness import figure, write_result
from diffusers_ext import PipelineDenoiser, PipelineNoiseDiffusion
from tests.tiny_pipelines import FAMILIES, dit, seeded

from . import tiny_images, tiny_videos

PROMPTS = ["a cat", "a red dog on the beach, eating a burger"]
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
IMAGES = {**FAMILIES, **tiny_images.BUILDERS}
# Arguments of the denoiser, where the usual ones do not do.
SIZES = {
    "Kandinsky3Pipeline": {"height": 64, "width": 64},
    "Kandinsky5T2IPipeline": {"height": 64, "width": 64},
    "HiDreamImagePipeline": {"height": 64, "width": 64},
    "LongCatImagePipeline": {"height": 64, "width": 32, "enable_prompt_rewrite": False},
    "SanaPipeline": {"height": 32, "width": 64},
    "SanaPAGPipeline": {"height": 32, "width": 64},
    "DiTPipeline": {},
}
NOT_BUILT = {  # by a part of the name, the first that fits
    "Control": "takes an image as its condition",
    "Kontext": "edits an image",
    "Omni": "takes images as its condition",
    "Kolors": "its tokenizer needs a SentencePiece model file",
    "StableCascade": "two diffusion models in one call",
    "Wuerstchen": "two diffusion models in one call",
    "Kandinsky": "two diffusion models in one call",
    "GlmImage": "a language model draws a first version in its call",
    "Helios": "makes videos, piece by piece",
    "Ideogram4": "a second network for guidance",
}
COLUMNS = {
    "equal": "equal to the stock call",
    "timesteps": "timesteps a call",
    "images": "images to latents",
    "lora": "LoRA in the stock pipeline",
    "noise_diffusion": "NoiseDiffusion",
}
SAYS = {
    r"text_to_image_classes": (
        "{:.0f} text-to-image pipelines of Diffusers become denoisers, equal to their stock calls."
    ),
    r"share_of_built": "They are {:.0%} of those whose components could be built here.",
    r"noise_diffusion_classes": "NoiseDiffusion returns to both images at its ends with {:.0f} of them.",
    r"text_to_video_classes": "{:.0f} text-to-video pipelines do, too.",
}


def reason(error):
    text = " ".join(str(error).split())
    return (text if len(text) <= 160 else text[:157] + "...").replace("|", "/")


def lora(make, denoiser, x, conditions, arguments):
    """Saves a random adapter by the pipeline and loads it into a new one."""
    pipe, network = denoiser.pipe, denoiser.denoiser
    if not hasattr(pipe, "save_lora_weights"):
        return "no loader"
    modules = [name for name, _ in network.named_modules()]
    targets = [t for t in TARGETS if any(name.endswith(f".{t}") for name in modules)]
    if not targets:
        return "no usual targets"
    torch.manual_seed(1)
    network.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=targets))
    part = next(name for name, module in pipe.components.items() if module is network)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        pipe.save_lora_weights(folder, **{f"{part}_lora_layers": get_peft_model_state_dict(network)})
        wanted = denoiser(x, 500, conditions)
        other = seeded(make)
        other_denoiser = PipelineDenoiser(other, **arguments)
        plain = other_denoiser(x, 500, conditions)
        other.load_lora_weights(folder)
        loaded = other_denoiser(x, 500, conditions)
    if torch.equal(plain, wanted):
        return "the adapter changes nothing"
    return "equal" if torch.equal(loaded, wanted) else f"off by {(loaded - wanted).abs().max():.1g}"


def ends(denoiser, prompts, arguments):
    """Inverts two images and draws both again as the ends of NoiseDiffusion's frames."""
    height, width = denoiser.decode(torch.zeros(denoiser.latents_shape(1))).shape[-2:]
    images = list(torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)))
    call = {key: value for key, value in arguments.items() if key not in ("height", "width")}
    settings = {"num_inference_steps": 100, "strength": 0.03, "fixed_point_iterations": 8, "boundary": None}
    found = PipelineNoiseDiffusion(denoiser.pipe)(
        *images, *prompts, weights=[0.0, 1.0], injection=1.0, output_type="latent", **settings, **call
    ).images
    clean = denoiser.encode_images(torch.stack(images) * 2 - 1)
    error = (found - clean).abs().max() / clean.abs().max()
    return "yes" if error < 0.01 else f"ends off by {error:.1g}"


def tried(name, make, arguments):
    """Returns a row: what works, or why not."""
    row = dict.fromkeys(COLUMNS, "")
    prompts = [3, 7] if name == "DiTPipeline" else PROMPTS
    try:
        denoiser = PipelineDenoiser(seeded(make), **arguments)
        conditions = denoiser.encode_prompts(prompts)
        x = torch.randn(denoiser.latents_shape(2), generator=torch.Generator().manual_seed(0))
        denoiser.check(prompts)
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(denoiser(x, torch.tensor([900, 100]), conditions).sum(), x)
        if not gradient.abs().sum() > 0:
            raise ValueError("no gradient reaches the latents.")
    except Exception as error:  # noqa: BLE001 - the reason is what is wanted
        return {**row, "equal": f"refused: {reason(error)}"}
    row |= {"equal": "yes", "timesteps": "one" if denoiser.one_timestep else "one a sample"}
    try:
        images = denoiser.decode(x.detach()[:1])
        again = denoiser.decode(denoiser.encode_images(images.detach()))
        row["images"] = "yes" if again.shape == images.shape else "another shape"
    except Exception as error:  # noqa: BLE001
        row["images"] = f"no: {reason(error)}"
    try:
        video = name in tiny_videos.BUILDERS
        row["noise_diffusion"] = "makes images only" if video else ends(denoiser, prompts, arguments)
    except Exception as error:  # noqa: BLE001
        row["noise_diffusion"] = f"no: {reason(error)}"
    try:
        row["lora"] = lora(make, denoiser, x.detach(), conditions, arguments)
    except Exception as error:  # noqa: BLE001
        row["lora"] = f"no: {reason(error)}"
    return row


def not_built():
    """The text-to-image classes that Diffusers knows and that are not tried, with the reason."""
    names = sorted({cls.__name__ for cls in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values()} - set(IMAGES))
    return {name: next((why for part, why in NOT_BUILT.items() if part in name), "not tried") for name in names}


def main():
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    diffusers.utils.logging.set_verbosity_error()
    start, wanted = time.perf_counter(), sys.argv[1:]
    usual = {"height": 64, "width": 32}
    jobs = {name: (make, SIZES.get(name, usual)) for name, make in {**IMAGES, "DiTPipeline": dit}.items()}
    jobs |= {name: (make, {**usual, **more}) for name, (make, more) in tiny_videos.BUILDERS.items()}
    rows = {}
    for name, (make, arguments) in jobs.items():
        if not wanted or name in wanted:
            rows[name] = tried(name, make, arguments)
            print(name, rows[name], flush=True)
    if wanted:
        return
    works = {name for name, row in rows.items() if row["equal"] == "yes"}
    figures = {
        "text_to_image_classes": figure(len(works & set(IMAGES)), "classes", goal=">= 30"),
        "share_of_built": figure(len(works & set(IMAGES)) / len(IMAGES), "ratio", goal=">= 0.9"),
        "noise_diffusion_classes": figure(
            sum(rows[n]["noise_diffusion"] == "yes" for n in works & set(IMAGES)), "classes"
        ),
        "text_to_video_classes": figure(
            len({name.split(",")[0] for name in works & set(tiny_videos.BUILDERS)}), "classes"
        ),
    }
    for name, why in not_built().items():
        rows[name] = {**dict.fromkeys(COLUMNS, ""), "equal": f"not built here: {why}"}
    table = {
        "of": "pipeline",
        "rows": {name: f"`{name}`" for name in rows},
        "columns": COLUMNS,
        "cells": rows,
    }
    seconds = time.perf_counter() - start
    command = "python -m benchmarks.any_pipeline.census"
    write_result("any_pipeline/census", command, figures, [0], seconds, table, says=SAYS)


if __name__ == "__main__":
    main()
