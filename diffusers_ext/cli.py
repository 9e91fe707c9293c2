"""The command `diffusers-ext`."""

from __future__ import annotations

import argparse
import platform
import sys
from importlib.metadata import version
from pathlib import Path

__all__ = ["main"]

# Commands of SDA test-time adaptation: help, class of the arguments, function.
SDA = {
    "generate": ("make a labelled synthetic set with a diffusion pipeline", "GenerateConfig", "generate"),
    "align": ("take a labelled set through a diffusion model", "AlignSetConfig", "align_set"),
    "evaluate": ("measure an SDATTAPipeline on clean and corrupted images", "EvaluateConfig", "evaluate"),
}


def main(argv: list[str] | None = None) -> None:
    """Parses the command line and runs the chosen command."""
    parser = argparse.ArgumentParser(prog="diffusers-ext", description="Diffusion papers as Diffusers components.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="load the shipped models, show them at work and write pictures")
    demo.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="folder for the pictures")
    page = commands.add_parser("app", help="serve the shipped models as a web page on this machine")
    page.add_argument("--port", type=int, help="port of the page, by default the first free one from 7860")
    page.add_argument("--oms_base", help="text-to-image pipeline for One More Step: folder or Hub repo")
    page.add_argument("--oms_module", help="One More Step module for it")
    commands.add_parser("info", help="print the versions that a bug report needs, and the public names")
    for name, (text, *_) in SDA.items():
        commands.add_parser(name, help=text)  # for the list only: its own parser has the arguments
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] in SDA:
        run_sda(words[0], words[1:])
        return
    arguments = parser.parse_args(words)
    if arguments.command == "demo":
        from diffusers_ext.demo import run_demo

        run_demo(arguments.output_dir)
    elif arguments.command == "app":
        run_app(arguments)
    else:
        info()


def run_app(arguments: argparse.Namespace) -> None:
    """Serves the web page."""
    try:
        from diffusers_ext.app.app import serve
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise SystemExit("error: the page needs Gradio: pip install 'diffusers-ext[app]'") from error
    if (arguments.oms_base is None) != (arguments.oms_module is None):
        raise SystemExit("error: `--oms_base` and `--oms_module` must be given together")
    serve(arguments.port, one_more_step={"base": arguments.oms_base, "module": arguments.oms_module})


def run_sda(command: str, words: list[str]) -> None:
    """Runs a command of SDA; a wrong argument ends it with one line that says which."""
    import diffusers_ext

    _, config, function = SDA[command]
    sys.argv[0] = f"diffusers-ext {command}"  # what the parser calls the program
    try:
        result = getattr(diffusers_ext, function)(diffusers_ext.parse_config(getattr(diffusers_ext, config), words))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    if command != "evaluate":
        print(result)
        return
    for method, accuracy in result["accuracy"].items():
        print(f"{method}: clean {accuracy['clean']:.1f} %, mean over corruptions {accuracy['mean']:.1f} %")


def info() -> None:
    """Prints versions and public names."""
    import torch

    import diffusers_ext

    print(f"diffusers-ext {diffusers_ext.__version__}, Python {platform.python_version()}, {platform.platform()}")
    for name in ("diffusers", "transformers", "accelerate", "torch", "safetensors", "huggingface-hub", "datasets"):
        print(f"  {name} {version(name)}")
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "none"
    print(f"  accelerator: {accelerator}")
    print("public names:", ", ".join(sorted(diffusers_ext.__all__)))
