"""Model cards."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

__all__ = ["RepoCard"]

SNIPPET = """{imports}from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{repo_id}"{trust})
image = pipeline({call}).images[0]
image.save("sample.png")"""


def default_snippet(own: bool = True, self_contained: bool = False, call: str = "") -> str:
    """Returns Python code that draws a picture; `{repo_id}` is still to be filled in.

    Args:
        own: whether the pipeline's class is of this package.
        self_contained: whether the repo names its own `pipeline.py`.
        call: arguments that the pipeline needs.
    """
    return (
        SNIPPET.replace("{imports}", "import diffusers_ext  # pip install diffusers-ext\n" if own else "")
        .replace("{trust}", ", trust_remote_code=True" if self_contained else "")
        .replace("{call}", call)
    )


def fill_in_repo_id(text: str, folder: Path, repo_id: str) -> str:
    """Lets the `from_pretrained` of a card load the repo where it loaded the folder."""

    def replace(match: re.Match) -> str:
        loaded = json.loads(match[1])
        same = loaded == str(folder) or Path(loaded).resolve() == folder.resolve()
        return "from_pretrained(" + json.dumps(repo_id) if same else match[0]

    return re.sub(r'from_pretrained\(("(?:[^"\\\n]|\\.)*")', replace, text)


@dataclass
class RepoCard:
    """What a repo's README.md says.

    Attributes:
        method: name of the method, the card's title.
        description: what the model is, in a sentence or two.
        data: what it was trained on.
        license: licence of the weights, as the Hub names it; `None` leaves it open.
        tags: tags beside the library's own.
        base_model: repo that was fine-tuned.
        datasets: data sets on the Hub.
        paper: link to the paper.
        arguments: what the training script was given.
        results: measured figures by name.
        snippet: Python code that draws something; `{repo_id}` is filled in. By default it fits the pipeline that is
            saved.
        notes: what a user must know.
        pipeline_tag: the task, as the Hub names it.
    """

    method: str
    description: str = ""
    data: str = ""
    license: str | None = None
    tags: list[str] = field(default_factory=list)
    base_model: str | None = None
    datasets: list[str] = field(default_factory=list)
    paper: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    results: dict[str, float | int | str] = field(default_factory=dict)
    snippet: str | None = None
    notes: list[str] = field(default_factory=list)
    pipeline_tag: str = "unconditional-image-generation"

    def render(self, repo_id: str, sample: str | None = None) -> str:
        """Returns the text of README.md.

        Args:
            repo_id: what the snippet loads, a Hub repo or a folder.
            sample: file name of the sample picture.
        """
        data = ModelCardData(
            library_name="diffusers",
            license=self.license,
            tags=["diffusers", *self.tags],
            # The Hub takes repos only.
            base_model=None if self.base_model is None or Path(self.base_model).exists() else self.base_model,
            datasets=self.datasets or None,
            pipeline_tag=self.pipeline_tag,
        )
        parts = [f"# {' '.join(self.method.split())}", self.description]
        if sample:
            parts.append(f"![samples]({sample})")
        snippet = (self.snippet or default_snippet()).replace("{repo_id}", json.dumps(repo_id)[1:-1])
        parts.append(f"## Use\n\n```python\n{snippet}\n```")
        parts += ["\n".join(f"> {line}".rstrip() for line in note.splitlines()) for note in self.notes]
        if self.data:
            parts.append(f"## Data\n\n{self.data}")
        if self.results:
            rows = "\n".join(f"| {_cell(name)} | {_cell(value)} |" for name, value in self.results.items())
            parts.append(f"## Results\n\n| figure | value |\n|---|---|\n{rows}")
        if self.arguments:
            parts.append(
                "## Training arguments\n\n```json\n" + json.dumps(self.arguments, indent=1, default=str) + "\n```"
            )
        if self.paper:
            parts.append(f"## Reference\n\n{self.paper}")
        return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"

    def model_card(self, repo_id: str, sample: str | None = None) -> ModelCard:
        """Returns the card as `huggingface_hub` knows it, its YAML checked."""
        return ModelCard(self.render(repo_id, sample))


def _cell(value: float | int | str) -> str:
    """Returns a value as it may stand in a cell of a table."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")
