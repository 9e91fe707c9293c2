"""Trains by name of the method, with a clone of the repository or without.

python -m diffusers_ext.train METHOD ...
accelerate launch --config_file $(diffusers-ext config ddp) -m diffusers_ext.train METHOD ...
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

__all__ = ["FINISHED", "METHODS", "main"]

# Name on the command line -> recipe in the public index, and what it trains. A method adds its line here.
METHODS = {
    "ambient": ("AmbientRecipe", "a model of clean images from noisy ones"),
    "ambient_text": ("AmbientTextRecipe", "any text-to-image pipeline on noised images, also by LoRA"),
    "domain_studio": ("DomainStudioRecipe", "an image model adapted to about ten images"),
    "domain_studio_text": ("DomainStudioTextRecipe", "any text-to-image pipeline adapted to about ten, also by LoRA"),
    "forward_model": ("ForwardModelRecipe", "a model of signals from partial observations of them"),
    "immiscible": ("ImmiscibleRecipe", "image diffusion or flow matching, with plain or paired noise"),
    "mmd_ddm": ("MMDDDMRecipe", "a pretrained denoiser, for few sampling steps"),
    "noise2score": ("Noise2ScoreRecipe", "the score of noisy images from them alone, for denoising"),
    "oms": ("OMSRecipe", "a One More Step module for a base pipeline"),
    "pnnp": ("PNNPRecipe", "a raw denoiser, on clean raw images and a camera's noise"),
    "pnnp_noise": ("PNNPNoiseRecipe", "a camera's noise, from frames with the cap on"),
    "sda_classifier": ("SDAClassifierRecipe", "an image classifier on aligned synthetic images"),
    "sgmse": ("SGMSERecipe", "speech enhancement, from pairs of recordings or mixed on the fly"),
    "text_to_image": ("TextToImageRecipe", "any text-to-image pipeline of Diffusers, whole or by LoRA"),
}

# What works on a finished model and trains no weights: name -> configuration and function in the public index.
FINISHED = {
    "q_diffusion": ("QDiffusionConfig", "quantize_pipeline", "any pipeline's network in 4 or 8 bits, by calibration"),
}


def main(argv: Sequence[str] | None = None, prog: str = "python -m diffusers_ext.train") -> None:
    """Runs the training of the method that the first word names, with the words behind it.

    Args:
        argv: the words, by default `sys.argv[1:]`.
        prog: what the help calls the program.

    Raises:
        SystemExit: the method is unknown, or an argument is wrong; the message says how.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog=prog, description="Trains a method.", epilog=f"{prog} METHOD --help lists the arguments of a method."
    )
    methods = parser.add_subparsers(title="methods", metavar="METHOD", dest="method", required=True)
    for name, (*_, text) in {**METHODS, **FINISHED}.items():
        methods.add_parser(name, help=text, add_help=False)
    method = parser.parse_args(words[:1]).method

    import diffusers_ext

    if method in FINISHED:
        config_class, run, text = FINISHED[method]
        try:
            options = {"prog": f"{prog} {method}", "description": f"{text[0].upper()}{text[1:]}."}
            config = diffusers_ext.parse_config(getattr(diffusers_ext, config_class), words[1:], **options)
            sys.stdout.write(f"{getattr(diffusers_ext, run)(config)}\n")
        except ValueError as error:
            raise SystemExit(f"error: {error}") from error
        return
    diffusers_ext.run_training(getattr(diffusers_ext, METHODS[method][0]), words[1:], f"{prog} {method}")


if __name__ == "__main__":
    main()
