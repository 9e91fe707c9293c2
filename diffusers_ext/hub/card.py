"""Model cards."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

__all__ = ["RepoCard"]

SNIPPET = """import diffusers_ext  # pip install diffusers-ext
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{repo_id}")
image = pipeline().images[0]
image.save("sample.png")"""


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
        snippet: Python code that draws something; `{repo_id}` is filled in.
        notes: what a user must know.
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
    snippet: str = SNIPPET
    notes: list[str] = field(default_factory=list)

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
            base_model=self.base_model,
            datasets=self.datasets or None,
            pipeline_tag="unconditional-image-generation",
        )
        parts = [f"# {self.method}", self.description]
        if sample:
            parts.append(f"![samples]({sample})")
        parts.append("## Use\n\n```python\n" + self.snippet.replace("{repo_id}", repo_id) + "\n```")
        parts += [f"> {note}" for note in self.notes]
        if self.data:
            parts.append(f"## Data\n\n{self.data}")
        if self.results:
            rows = "\n".join(
                f"| {name} | {value:.4g} |" if isinstance(value, float) else f"| {name} | {value} |"
                for name, value in self.results.items()
            )
            parts.append(f"## Results\n\n| figure | value |\n|---|---|\n{rows}")
        if self.arguments:
            parts.append("## Training arguments\n\n```json\n" + json.dumps(self.arguments, indent=1) + "\n```")
        if self.paper:
            parts.append(f"## Reference\n\n{self.paper}")
        return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"

    def model_card(self, repo_id: str, sample: str | None = None) -> ModelCard:
        """Returns the card as `huggingface_hub` knows it, its YAML checked."""
        return ModelCard(self.render(repo_id, sample))
