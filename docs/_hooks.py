"""What the site needs beside its pages: the API of a part of the package, from the public index and the docstrings."""

import dataclasses
import inspect
import re
from typing import Any

import griffe

import diffusers_ext


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts one entry a public name of the index in the place of `<!-- api: PART ... -->`."""

    def entries(mark: re.Match[str]) -> str:
        parts = mark[1].split()
        found = [
            arguments(name) or f"::: diffusers_ext.{module}.{name}"
            for module, names in diffusers_ext._PUBLIC.items()
            for name in names
            if any(f"{module}.".startswith(f"{part}.") for part in parts)
        ]
        if not found:
            raise ValueError(f"no public names in {mark[1]!r}")
        return "\n\n".join(found)

    return re.sub(r"<!-- api: ([\w. ]+) -->", entries, markdown)


def arguments(name: str) -> str | None:
    """Returns the entry of a configuration of training, whose fields say themselves what they are, or `None`."""
    owner = getattr(diffusers_ext, name)
    if not (name.endswith("Config") and dataclasses.is_dataclass(owner)):
        return None
    # The fields that it has from classes without an entry of their own are shown here too.
    public = [base.__name__ for base in owner.__mro__[1:] if base.__name__ in diffusers_ext.__all__]
    own: dict[str, Any] = {}
    for part in reversed(owner.__mro__):
        if part.__name__ not in public:
            own |= inspect.get_annotations(part)
    rows = [
        f"| `{field.name}` | `{str(own[field.name]).replace(' | ', ' or ')}` | `{field.default!r}` | {text} |"
        for field in dataclasses.fields(owner)
        if (text := field.metadata.get("help")) and field.name in own
    ]
    if not rows:
        return None
    summary = inspect.getdoc(owner).split("\n\n")[0]
    beside = f"Beside these it takes those of `{public[0]}`. " if public else ""
    how = "In Python they are fields of the class, on the command line options with `--` in front."
    table = ["| name | type | default | what |", "|---|---|---|---|", *rows]
    return "\n".join([f"### {name}", "", summary, "", beside + how, "", *table])


class Examples(griffe.Extension):
    """Lets the examples of docstrings be shown as code: the parser knows the section by its plural only."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Renames the section."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"(?m)^( *)Example:$", r"\1Examples:", obj.docstring.value)
