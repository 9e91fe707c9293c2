"""Writes the tables of measured results in README.md from the JSON files under benchmarks/results.

python benchmarks/report.py           # rewrites them
python benchmarks/report.py --check   # fails if they differ
"""

import argparse
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- results: python benchmarks/report.py -->\n", "<!-- end of results -->\n"


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


def brightness(result):
    """Returns a table of the experiment on brightness: one row a way of sampling, one column a measure."""
    figures = result["figures"]
    measures = {
        "brightness_w1": "brightness (W1)",
        "warmth_w1": "warmth (W1)",
        "frechet_distance": "FD",
        "class_reach": "reach of the classes",
    }
    rows = [name.removeprefix("brightness_w1_") for name in figures if name.startswith("brightness_w1_")]
    lines = [
        f"`{result['command']}` ({len(result['seeds'])} seeds, mean ± standard deviation):",
        "",
        "| sampling | " + " | ".join(measures.values()) + " |",
        "|---|" + "---|" * len(measures),
    ]
    for row in rows:
        cells = [shown(figures[f"{measure}_{row}"]) for measure in measures]
        lines.append(f"| {row.replace('_', ' ')} | " + " | ".join(cells) + " |")
    return lines


def tables():
    """Returns the text between the markers."""
    results = [json.loads(p.read_text()) for p in sorted((ROOT / "benchmarks" / "results").glob("*.json"))]
    parts = [goals(results)]
    parts += [distances(r) for r in results if any(name.startswith("fd_nfe") for name in r["figures"])]
    parts += [brightness(r) for r in results if r["name"] == "oms"]
    return "\n\n".join("\n".join(lines) for lines in parts) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail instead of writing")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, rest = text.split(START)
    new = before + START + tables() + END + rest.split(END)[1]
    if args.check:
        raise SystemExit(new != text and "README.md differs from benchmarks/results: run python benchmarks/report.py")
    readme.write_text(new)


if __name__ == "__main__":
    main()
