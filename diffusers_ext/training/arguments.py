"""Command line and configuration files: `transformers.HfArgumentParser` over a configuration dataclass."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers import HfArgumentParser

__all__ = ["parse_config"]

ConfigT = TypeVar("ConfigT")


def parse_config(config_class: type[ConfigT], argv: Sequence[str] | None = None) -> ConfigT:
    """Makes a configuration from the command line and, with `--config FILE`, from a YAML or JSON file.

    The file's entries are turned into command-line words in front of the user's own: they pass the same checks, and
    the command line wins.

    Args:
        config_class: a dataclass such as `TrainConfig`.
        argv: the words, by default `sys.argv[1:]`.

    Returns:
        An instance of `config_class`.

    Raises:
        ValueError: the file is missing or no mapping, or names an unknown argument.
        SystemExit: argparse refused a word (its message is on standard error).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(config_class, allow_abbrev=False)  # type: ignore[arg-type]
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file of arguments; the command line wins.")
    for position, word in enumerate(words):
        if word == "--config" or word.startswith("--config="):
            inline = "=" in word
            if not inline and position + 1 == len(words):
                parser.error("argument --config: expected one argument")
            path = word.split("=", 1)[1] if inline else words[position + 1]
            try:
                entries = _file_words(parser, Path(path))
            except ValueError as error:
                if argv is None:
                    parser.error(str(error))
                raise
            words = entries + words[:position] + words[position + (1 if inline else 2) :]
            break
    namespace, unknown = parser.parse_known_args(words)
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}{_nearest(parser, unknown[0])}")
    values = vars(namespace)
    values.pop("config")
    try:
        return config_class(**values)
    except ValueError as error:
        if argv is None:
            parser.error(str(error))
        raise


def _names(parser: HfArgumentParser) -> list[str]:
    return [option for action in parser._actions for option in action.option_strings]


def _nearest(parser: HfArgumentParser, word: str) -> str:
    near = difflib.get_close_matches(word.split("=")[0], _names(parser), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _file_words(parser: HfArgumentParser, path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f"`config` must be an existing YAML or JSON file, got {str(path)!r}.")
    try:
        text = path.read_text()
        entries: Any = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"`config` must be a YAML or JSON file, got {str(path)!r}: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"`config` must hold a mapping of argument names to values, got {type(entries).__name__}.")
    words: list[str] = []
    for name, value in entries.items():
        flag = f"--{name}"
        if flag not in _names(parser):
            raise ValueError(f"unknown argument {name!r} in {path}{_nearest(parser, flag)}.")
        if value is None:
            continue
        if isinstance(value, list):
            raise ValueError(f"`{name}` in {path} must be a single value, got the list {value!r}.")
        # One word, so that a value such as -1 is not taken for a flag.
        words.append(f"{flag}={json.dumps(value) if isinstance(value, dict) else value}")
    return words
