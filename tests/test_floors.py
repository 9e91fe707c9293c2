"""The floors of the package: who may import whom."""

import ast
import re
from pathlib import Path

import pytest

import diffusers_ext

PACKAGE = Path(diffusers_ext.__file__).parent

# From the top down. A module may import its own part and those on lower floors; parts that share a floor may not
# import each other, so that no method knows another. Docs show the same table (docs/guides/layout.md).
FLOORS = [
    ["cli"],
    ["demo", "app", "train"],
    ["methods.*"],
    ["training"],
    ["generation", "metrics"],
    ["data", "hub"],
    ["rng", "_diffusers_hook"],
]


def floor_of(part):
    for height, parts in enumerate(FLOORS):
        if part in parts or (part.startswith("methods.") and "methods.*" in parts):
            return height
    raise AssertionError(f"{part} stands on no floor: add it to FLOORS and to docs/guides/layout.md")


def part_of(module):
    """`diffusers_ext.methods.oms.step` -> `methods.oms`; `None` for the public index itself."""
    words = module.split(".")[1:]
    if not words:
        return None
    return ".".join(words[:2]) if words[0] == "methods" else words[0]


def imports(path):
    """The modules of this package that a file imports, at its top or inside functions; names of the index resolved."""
    package = ["diffusers_ext", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, node.module] if node.module else start)
            found = [module]
            for alias in node.names:
                inside = PACKAGE.joinpath(*module.split(".")[1:], alias.name)
                if module == "diffusers_ext" and alias.name in diffusers_ext._MODULES:
                    found.append(f"diffusers_ext.{diffusers_ext._MODULES[alias.name]}")
                elif inside.is_dir() or inside.with_suffix(".py").is_file():
                    found.append(f"{module}.{alias.name}")
        else:
            continue
        yield from (name for name in found if name.split(".")[0] == "diffusers_ext")


def violations(path):
    own = part_of(".".join(["diffusers_ext", *path.relative_to(PACKAGE).with_suffix("").parts]))
    found = []
    for module in imports(path):
        part = part_of(module)
        if part is None or part == own or part == "methods":
            continue
        if own is None or floor_of(part) <= floor_of(own):
            found.append(f"{path.relative_to(PACKAGE)} imports {module}")
    return found


def test_the_documented_floors_are_these():
    page = (PACKAGE.parent / "docs" / "guides" / "layout.md").read_text()
    rows = re.findall(r"^\| \d+ \| (.*?) \|", page, re.MULTILINE)
    assert [re.findall(r"`([\w.*]+)`", row) for row in rows] == FLOORS


FILES = sorted(p for p in PACKAGE.rglob("*.py") if "assets" not in p.parts and p != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_downwards(path):
    assert violations(path) == []


def test_a_wrong_import_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    methods = tmp_path / "methods" / "oms"
    methods.mkdir(parents=True)
    (tmp_path / "hub").mkdir()
    upwards, sideways, index = tmp_path / "hub" / "repo.py", methods / "step.py", tmp_path / "rng.py"
    upwards.write_text("def f():\n    from diffusers_ext.training.engine import Trainer\n")
    sideways.write_text("import diffusers_ext.methods.sda.align\n")
    index.write_text("from diffusers_ext import OMSPipeline\n")
    assert violations(upwards) == ["hub/repo.py imports diffusers_ext.training.engine"]
    assert violations(sideways) == ["methods/oms/step.py imports diffusers_ext.methods.sda.align"]
    assert violations(index) == ["rng.py imports diffusers_ext.methods.oms.pipeline"]


def test_modules_of_a_part_import_in_one_direction():
    """No two modules import each other, not even for types."""
    graph = {}
    for path in FILES:
        name = ".".join(["diffusers_ext", *path.relative_to(PACKAGE).with_suffix("").parts])
        graph[name.removesuffix(".__init__")] = set(imports(path))
    mutual = sorted((a, b) for a, found in graph.items() for b in found if a < b and a in graph.get(b, ()))
    assert mutual == []
