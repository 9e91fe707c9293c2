"""Writes what the documentation says of measured results, from the JSON files under benchmarks/results.

README.md and two pages of docs get one row a method with its headline (benchmarks/headlines.py), each method's page
the sentences of its figures, docs/results.md those and the whole tables of the experiments. A result says how its
figures make up a table: `"table": {"of": head of the first column, "rows": {key: title}, "columns": {key: title}}`;
a cell is the figure `{column key}_{row key}`, or a text of `"cells": {row key: {column key: text}}`.
The sentences stand in each benchmark's `SAYS`, from where they are
brought into its results file, so that a better sentence needs no new run.

python -m benchmarks.report           # rewrites them
python -m benchmarks.report --check   # fails if they differ
"""

import argparse
import ast
import json
import operator
import re
from pathlib import Path

from benchmarks.harness import described
from benchmarks.headlines import METHODS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
START, END = "<!-- results: python -m benchmarks.report -->\n", "<!-- end of results -->\n"
SHARED = {
    "any_pipeline": ("Any pipeline", "guides/any_pipeline.md"),
    "training": ("Training engine", "guides/train_and_resume.md"),
}
COMPARE = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}


class Shown(float):
    """A number that is printed with three digits unless a format says otherwise."""

    def __format__(self, spec):
        return super().__format__(spec or (".0f" if 1000 <= abs(self) < 1e6 else ".3g"))


def shown(entry):
    """Returns a figure as text, with its spread over seeds where there is one."""
    text = f"{Shown(entry['value'])}"
    return f"{text} ± {entry['spread']:.2g}" if "spread" in entry else text


def met(entry):
    """Returns whether a figure reached its goal."""
    sign, number = entry["goal"].split()
    return COMPARE[sign](entry["value"], float(number))


def sentences(result):
    """Returns a table of the figures that say something: the sentence, its spread, its goal and whether it was met."""
    figures = [entry for entry in result["figures"].values() if "says" in entry]
    if not figures:
        return []
    lines = ["| measured | spread | goal | |", "|---|---|---|---|"]
    for entry in figures:
        says = entry["says"].format(Shown(entry["value"]))
        spread = f"± {entry['spread']:.2g}" if "spread" in entry else ""
        goal, mark = entry.get("goal", ""), ""
        if goal:
            mark = "met" if met(entry) else "**missed**"
        lines.append(f"| {says} | {spread} | {goal} | {mark} |")
    return lines


def distances(result):
    """Returns a table of an experiment's Frechet distances: one row a strategy, one column a number of steps."""
    figures = result["figures"]
    found = [re.fullmatch(r"fd_nfe(\d+)_(\w+)", name) for name in figures]
    numbers = list(dict.fromkeys(m[1] for m in found if m))
    variants = list(dict.fromkeys(m[2] for m in found if m))
    lines = [
        "| noise | " + " | ".join(f"{n} steps" for n in numbers) + " | fewer training steps |",
        "|---|" + "---|" * (len(numbers) + 1),
    ]
    for variant in variants:
        speedup = figures.get(f"speedup_{variant}")
        last = "1 (baseline)" if speedup is None else f"{shown(speedup)} times" if speedup["value"] else "not reached"
        cells = [shown(figures[f"fd_nfe{n}_{variant}"]) for n in numbers]
        lines.append(f"| {variant} | " + " | ".join(cells) + f" | {last} |")
    return lines


def declared(result):
    """Returns the table that a result declares."""
    figures, table = result["figures"], result["table"]
    lines = [f"| {table['of']} | " + " | ".join(table["columns"].values()) + " |"]
    lines.append("|---|" + "---|" * len(table["columns"]))
    for row, title in table["rows"].items():
        if "cells" in table:
            lines.append(
                f"| {title} | " + " | ".join(table["cells"][row][column] for column in table["columns"]) + " |"
            )
            continue
        cells = [shown(figures[key]) if (key := f"{column}_{row}") in figures else "" for column in table["columns"]]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return lines


def command(result):
    """Returns the line above a result's tables."""
    seeds = len(result["seeds"])
    return f"`{result['command']}`" + (f" ({seeds} seeds, mean ± standard deviation)" if seeds > 1 else "") + ":"


def sections(results, whole):
    """Returns a method's results, each under its command; `whole` adds the experiments' tables."""
    parts = []
    for result in results:
        tables = [sentences(result)]
        if whole and any(name.startswith("fd_nfe") for name in result["figures"]):
            tables.append(distances(result))
        if whole and "table" in result:
            tables.append(declared(result))
        tables = ["\n".join(lines) for lines in tables if lines]
        if tables:
            parts.append("\n\n".join([command(result), *tables]))
    return "\n\n".join(parts)


def overview(results, folder):
    """Returns the table of methods, with links that start from a file beside `folder`."""
    lines = ["| method | what it gives you | measured here |", "|---|---|---|"]
    for name, method in METHODS.items():
        figures = {
            result["name"].split("/")[1]: {key: Shown(entry["value"]) for key, entry in result["figures"].items()}
            for result in results.get(name, [])
        }
        papers = ", ".join(f"[{paper}](https://arxiv.org/abs/{paper})" for paper in method["papers"])
        title = f"[{method['title']}]({folder}{name}.md) ({papers})"
        lines.append(f"| {title} | {method['gives']} | {method['headline'].format(**figures)} |")
    return "\n".join(lines)


def texts(results):
    """Returns, for each document, what stands between its markers."""
    folders = {"README.md": "docs/methods/", "docs/index.md": "methods/", "docs/methods/index.md": ""}
    found = {document: overview(results, folder) for document, folder in folders.items()}
    chapters = []
    for name, group in results.items():
        title, page = (METHODS[name]["title"], f"methods/{name}.md") if name in METHODS else SHARED[name]
        chapters.append(f"## {title}\n\nWhat the words mean and what it shows: [{title}]({page}).")
        chapters.append(sections(group, whole=True))
        if name in METHODS:
            found[f"docs/methods/{name}.md"] = sections(group, whole=False)
        if name == "any_pipeline":
            found[f"docs/{page}"] = sections(group, whole=True)
    return found | {"docs/results.md": "\n\n".join(chapters)}


def with_sentences(result):
    """Returns a result with the sentences of its benchmark, which is read without being run."""
    module = ROOT.joinpath(*result["command"].split()[2].split(".")).with_suffix(".py")
    says = {}
    for node in ast.parse(module.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SAYS":
            says = ast.literal_eval(node.value)
    return {**result, "figures": described(result["figures"], says)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail instead of writing")
    args = parser.parse_args(argv)
    new, results = {}, {}
    for path in sorted(RESULTS.glob("*/*.json")):
        result = with_sentences(json.loads(path.read_text()))
        results.setdefault(path.parent.name, []).append(result)
        new[path] = json.dumps(result, indent=1) + "\n"
    for name, text in texts(results).items():
        before, rest = (ROOT / name).read_text().split(START)
        new[ROOT / name] = before + START + "\n" + text + "\n\n" + END + rest.split(END)[1]
    for path, text in new.items():
        if args.check and path.read_text() != text:
            raise SystemExit(f"{path.relative_to(ROOT)} is not up to date: run python -m benchmarks.report")
        path.write_text(text)


if __name__ == "__main__":
    main()
