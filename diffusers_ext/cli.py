"""The command `diffusers-ext`."""

from __future__ import annotations

import argparse
import platform
from importlib.metadata import version
from pathlib import Path

__all__ = ["main"]


def main(argv: list[str] | None = None) -> None:
    """Parses the command line and runs the chosen command."""
    parser = argparse.ArgumentParser(prog="diffusers-ext", description="Diffusion papers as Diffusers components.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="load the shipped models, show them at work and write pictures")
    demo.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="folder for the pictures")
    commands.add_parser("info", help="print the versions that a bug report needs, and the public names")
    arguments = parser.parse_args(argv)
    if arguments.command == "demo":
        from diffusers_ext.demo import run_demo

        run_demo(arguments.output_dir)
    else:
        info()


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
