"""What the site needs beside its pages: the API of a part of the package, from the public index and the docstrings."""

import re
from typing import Any

import griffe

import diffusers_ext


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts one mkdocstrings entry a public name of the index in the place of `<!-- api: PART -->`."""

    def entries(mark: re.Match[str]) -> str:
        parts = mark[1].split()
        found = [
            f"::: diffusers_ext.{module}.{name}"
            for module, names in diffusers_ext._PUBLIC.items()
            for name in names
            if any(f"{module}.".startswith(f"{part}.") for part in parts)
        ]
        if not found:
            raise ValueError(f"no public names in {mark[1]!r}")
        return "\n\n".join(found)

    return re.sub(r"<!-- api: ([\w. ]+) -->", entries, markdown)


class Examples(griffe.Extension):
    """Lets the examples of docstrings be shown as code: the parser knows the section by its plural only."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Renames the section."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"(?m)^( *)Example:$", r"\1Examples:", obj.docstring.value)
