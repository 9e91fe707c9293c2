"""The command `diffusers-ext`."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

__all__ = ["main"]


def main(argv: list[str] | None = None) -> None:
    """Runs the command that the first word names, with the words behind it."""
    words = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="diffusers-ext",
        description="Diffusion papers as Diffusers components.",
        epilog="diffusers-ext COMMAND --help says more of a command.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name, (text, _) in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)  # for the list: each command parses its own words
    try:
        COMMANDS[parser.parse_args(words[:1]).command][1](words[1:])
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser(command: str) -> argparse.ArgumentParser:
    text = COMMANDS[command][0]
    return argparse.ArgumentParser(
        prog=f"diffusers-ext {command}",
        description=f"{text[0].upper()}{text[1:]}.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )


def demo(words: list[str]) -> None:
    """Shows the shipped models at work."""
    from diffusers_ext.demo import PANELS, run_demo

    parser = _parser("demo")
    parser.add_argument("panels", nargs="*", metavar="PANEL", help=f"some of {', '.join(PANELS)}; by default all")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="folder for the pictures")
    arguments = parser.parse_args(words)
    unknown = [name for name in arguments.panels if name not in PANELS]
    if unknown:
        parser.error(f"PANEL must be one of {PANELS}, got {unknown[0]!r}")
    run_demo(arguments.output_dir, arguments.panels or PANELS)


def app(words: list[str]) -> None:
    """Serves the web page."""
    parser = _parser("app")
    parser.add_argument("--port", type=int, help="port of the page, by default the first free one from 7860")
    parser.add_argument("--oms_base", help="text-to-image pipeline for One More Step: folder or Hub repo")
    parser.add_argument("--oms_module", help="One More Step module for it")
    arguments = parser.parse_args(words)
    try:
        from diffusers_ext.app.app import serve
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise SystemExit("error: the page needs Gradio: pip install 'diffusers-ext[app]'") from error
    if (arguments.oms_base is None) != (arguments.oms_module is None):
        raise SystemExit("error: `--oms_base` and `--oms_module` must be given together")
    serve(arguments.port, one_more_step={"base": arguments.oms_base, "module": arguments.oms_module})


def train(words: list[str]) -> None:
    """Trains a method."""
    from diffusers_ext.train import main as run

    run(words, "diffusers-ext train")


def config(words: list[str]) -> None:
    """Prints the path of a shipped configuration, or lists them."""
    from diffusers_ext.training.shipped import shipped_configs

    def described(name: str, path: Path) -> str:
        first = path.read_text().splitlines()[0]
        return f"{name:16} {first.lstrip('# ') if first.startswith('#') else 'Arguments of a `UNet2DModel`.'}"

    _shipped("config", words, shipped_configs(), described)


def asset(words: list[str]) -> None:
    """Prints the folder of a shipped model or data set, or lists them."""
    from diffusers_ext.data.assets import shipped_assets

    _shipped("asset", words, shipped_assets(), lambda name, path: name)


def _shipped(command: str, words: list[str], paths: dict[str, Path], described: Callable[[str, Path], str]) -> None:
    """Prints the path of what ships under a name, or a line for each without one."""
    parser = _parser(command)
    parser.add_argument("name", nargs="?", choices=paths, metavar="NAME", help=f"one of {', '.join(paths)}")
    name = parser.parse_args(words).name
    print(paths[name] if name is not None else "\n".join(described(*item) for item in paths.items()))


def inspect(words: list[str]) -> None:
    """Measures a model's geometry."""
    import diffusers_ext

    if words and not words[0].startswith("-"):
        words = ["--repo", *words]
    text = f"{COMMANDS['inspect'][0]}."
    try:
        config = diffusers_ext.parse_config(
            diffusers_ext.InspectConfig, words, prog="diffusers-ext inspect", description=text[0].upper() + text[1:]
        )
        print(diffusers_ext.inspect_model(config))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


def enhance_parser() -> argparse.ArgumentParser:
    """Returns the parser of `enhance`."""
    parser = _parser("enhance")
    parser.add_argument("files", nargs="+", metavar="FILE", help="sound files, or folders of them")
    parser.add_argument("--model", required=True, help="repo or folder of a SpeechEnhancementPipeline")
    parser.add_argument("--output_dir", required=True, help="folder of the results")
    parser.add_argument("--num_inference_steps", type=int, default=30, help="steps of the scheduler")
    parser.add_argument("--chunk_seconds", type=float, default=10.0, help="longest window")
    parser.add_argument("--overlap_seconds", type=float, default=1.0, help="time over which windows fade")
    parser.add_argument("--batch_size", type=int, default=8, help="windows at a time")
    parser.add_argument("--seed", type=int, default=0, help="each file has its own random numbers from it")
    return parser


def enhance(words: list[str]) -> None:
    """Enhances speech."""
    import diffusers_ext

    try:
        config = diffusers_ext.EnhanceConfig(**vars(enhance_parser().parse_args(words)))
        results = diffusers_ext.enhance_files(config)
    except (ImportError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{len(results)} files in {config.output_dir}")


def convert(words: list[str]) -> None:
    """Converts a published checkpoint."""
    import diffusers_ext

    parser = _parser("convert")
    parser.add_argument("checkpoint", type=Path, help=".ckpt file of SGMSE+")
    parser.add_argument("output_dir", help="folder of the pipeline")
    parser.add_argument("--no_ema", action="store_true", help="take the plain weights instead of the averaged ones")
    arguments = parser.parse_args(words)
    try:
        if not arguments.checkpoint.is_file():
            raise ValueError(f"`checkpoint` must be a file, got {str(arguments.checkpoint)!r}.")
        found = diffusers_ext.SpeechEnhancementPipeline.from_published(arguments.checkpoint, not arguments.no_ema)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    print(diffusers_ext.save_repo(found, arguments.output_dir))


def info(words: list[str]) -> None:
    """Prints versions and public names."""
    _parser("info").parse_args(words)
    import torch

    import diffusers_ext

    print(f"diffusers-ext {diffusers_ext.__version__}, Python {platform.python_version()}, {platform.platform()}")
    for name in ("diffusers", "transformers", "accelerate", "torch", "safetensors", "huggingface-hub", "datasets"):
        print(f"  {name} {version(name)}")
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "none"
    print(f"  accelerator: {accelerator}")
    print("public names:", ", ".join(sorted(diffusers_ext.__all__)))


def _sda(command: str, config_name: str) -> Callable[[list[str]], None]:
    """Makes a command of SDA test-time adaptation; a wrong argument ends it with one line that says which."""

    def run(words: list[str]) -> None:
        import diffusers_ext

        config_class, prog = getattr(diffusers_ext, config_name), f"diffusers-ext {command}"
        text = COMMANDS[command][0]
        try:
            arguments = diffusers_ext.parse_config(config_class, words, prog=prog, description=f"SDA: {text}.")
            result = getattr(diffusers_ext, command.replace("align", "align_set"))(arguments)
        except ValueError as error:
            raise SystemExit(f"error: {error}") from error
        if command != "evaluate":
            print(result)
            return
        for method, accuracy in result["accuracy"].items():
            print(f"{method}: clean {accuracy['clean']:.1f} %, mean over corruptions {accuracy['mean']:.1f} %")

    return run


# Name -> one line for the list, and what takes the words behind it.
COMMANDS: dict[str, tuple[str, Callable[[list[str]], None]]] = {
    "demo": ("load the shipped models, show them at work and write pictures", demo),
    "app": ("serve the shipped models as a web page on this machine", app),
    "train": ("train a method", train),
    "config": ("list the shipped configurations, or print the path of one", config),
    "asset": ("list the shipped models and data, or print the folder of one", asset),
    "generate": ("make a labelled synthetic set with a diffusion pipeline", _sda("generate", "GenerateConfig")),
    "align": ("take a labelled set through a diffusion model", _sda("align", "AlignSetConfig")),
    "evaluate": ("measure an SDATTAPipeline on clean and corrupted images", _sda("evaluate", "EvaluateConfig")),
    "inspect": ("measure how far a model is from a score, and the dimension of its images", inspect),
    "enhance": ("take noise or reverberation from recordings of speech", enhance),
    "convert": ("write a published SGMSE+ checkpoint as a Diffusers pipeline", convert),
    "info": ("print the versions that a bug report needs, and the public names", info),
}
