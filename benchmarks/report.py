"""Writes the tables of measured results from the JSON files under benchmarks/results.

README.md gets every figure that has a goal, docs/results.md the tables of the experiments. A result says how its
figures make up a table: `"table": {"of": head of the first column, "rows": {key: title}, "columns": {key: title}}`;
a cell is the figure `{column key}_{row key}`.

python -m benchmarks.report           # rewrites them
python -m benchmarks.report --check   # fails if they differ
"""

import argparse
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- results: python -m benchmarks.report -->\n", "<!-- end of results -->\n"


def shown(entry):
    """Returns a figure as text, with its spread over seeds where there is one."""
    text = f"{entry['value']:.3g}"
    return f"{text} ± {entry['spread']:.2g}" if "spread" in entry else text


def goals(results):
    """Returns a table of every figure that has a goal."""
    lines = ["| figure | measured | goal | command |", "|---|---|---|---|"]
    for result in results:
        for name, entry in result["figures"].items():
            if "goal" in entry:
                unit = "" if entry["unit"] == "ratio" else f" {entry['unit']}"
                lines.append(
                    f"| {name.replace('_', ' ')} | {shown(entry)}{unit} | {entry['goal']} | `{result['command']}` |"
                )
    return lines


def distances(result):
    """Returns a table of an experiment's Frechet distances: one row a strategy, one column a number of steps."""
    figures = result["figures"]
    found = [re.fullmatch(r"fd_nfe(\d+)_(\w+)", name) for name in figures]
    numbers = list(dict.fromkeys(m[1] for m in found if m))
    variants = list(dict.fromkeys(m[2] for m in found if m))
    lines = [
        f"`{result['command']}` ({len(result['seeds'])} seeds, mean ± standard deviation):",
        "",
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
    lines = [
        f"`{result['command']}` ({len(result['seeds'])} seeds, mean ± standard deviation):",
        "",
        f"| {table['of']} | " + " | ".join(table["columns"].values()) + " |",
        "|---|" + "---|" * len(table["columns"]),
    ]
    for row, title in table["rows"].items():
        cells = [shown(figures[key]) if (key := f"{column}_{row}") in figures else "" for column in table["columns"]]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return lines


def texts():
    """Returns, for each file, what stands between its markers."""
    results = [json.loads(p.read_text()) for p in sorted((ROOT / "benchmarks" / "results").glob("*/*.json"))]
    parts = [distances(r) for r in results if any(name.startswith("fd_nfe") for name in r["figures"])]
    parts += [declared(r) for r in results if "table" in r]
    return {
        "README.md": "\n".join(goals(results)) + "\n",
        "docs/results.md": "\n\n".join("\n".join(lines) for lines in parts) + "\n",
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail instead of writing")
    args = parser.parse_args()
    for name, tables in texts().items():
        text = (ROOT / name).read_text()
        before, rest = text.split(START)
        new = before + START + tables + END + rest.split(END)[1]
        if args.check and new != text:
            raise SystemExit(f"{name} differs from benchmarks/results: run python -m benchmarks.report")
        (ROOT / name).write_text(new)


if __name__ == "__main__":
    main()
