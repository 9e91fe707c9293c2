"""Command line and configuration files: `transformers.HfArgumentParser` over a configuration dataclass."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

import yaml
from transformers import HfArgumentParser

from .config import GROUPS
from .shipped import find_config

__all__ = ["parse_config"]

ConfigT = TypeVar("ConfigT")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """One spelling of each argument, and defaults where there are any."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        name = max(action.option_strings[:2], key=lambda option: option.startswith("--"))
        kind = getattr(action.type, "__name__", "value").strip("<>").replace("lambda", "value")
        return name if action.nargs in (0, "?") else f"{name} {self._format_args(action, kind)}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if isinstance(action, argparse._StoreFalseAction):
            return f"Turn --{action.dest} off."
        return action.help if action.default in (None, "") else super()._get_help_string(action)


class _Parser(HfArgumentParser):
    """Says what is wrong in one line; the usage of fifty arguments would hide it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the arguments)\n")


def _grouped(config_class: Any) -> list[type]:
    """Splits the fields into one dataclass for each group, which is how the parser takes groups."""
    hints, groups = get_type_hints(config_class), {name: [] for name in GROUPS}
    for own in dataclasses.fields(config_class):
        # A recipe that changes a default says nothing of the group: that is for the class that declares it first.
        first = next(c for c in reversed(config_class.__mro__) if own.name in getattr(c, "__dataclass_fields__", {}))
        group = first.__dataclass_fields__[own.name].metadata.get("group", "method")
        copied = dataclasses.field(default=own.default, metadata={"help": own.metadata.get("help")})
        groups[group].append((own.name, hints[own.name], copied))
    return [
        dataclasses.make_dataclass("Group", found, namespace={"_argument_group_name": name})
        for name, found in groups.items()
        if found
    ]


def parse_config(
    config_class: type[ConfigT],
    argv: Sequence[str] | None = None,
    *,
    prog: str | None = None,
    description: str | None = None,
) -> ConfigT:
    """Makes a configuration from the command line and, with `--config`, from a YAML or JSON file.

    The file's entries are turned into command-line words in front of the user's own: they pass the same checks, and
    the command line wins.

    Args:
        config_class: a dataclass such as `TrainConfig`.
        argv: the words, by default `sys.argv[1:]`.
        prog: what the help calls the program, by default the script.
        description: what it does, for the help.

    Returns:
        An instance of `config_class`.

    Raises:
        ValueError: the file is missing or no mapping, or names an unknown argument.
        SystemExit: argparse refused a word (its message is on standard error).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    usage = "%(prog)s [--config NAME_OR_FILE] [--ARGUMENT VALUE ...]"
    parser = _Parser(
        _grouped(config_class),  # type: ignore[arg-type]
        allow_abbrev=False,
        prog=prog,
        usage=usage,
        description=description,
        formatter_class=partial(_Help, max_help_position=32),  # type: ignore[arg-type]
    )
    parser.add_argument(
        "--config",
        help="YAML or JSON file of arguments, or the name of a shipped one (`diffusers-ext config` lists them); the "
        "command line wins.",
    )
    for position, word in enumerate(words):
        if word == "--config" or word.startswith("--config="):
            inline = "=" in word
            if not inline and position + 1 == len(words):
                parser.error("argument --config: expected one argument")
            path = word.split("=", 1)[1] if inline else words[position + 1]
            try:
                entries = _file_words(parser, find_config("config", path))
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
