"""Examples in docstrings run, and README.md says what the code and the results say."""

import doctest
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import diffusers_ext

ROOT = Path(__file__).resolve().parent.parent


def examples():
    """Every public object's doctest; a finder would skip classes that name the package as their module."""
    found = []
    for name in diffusers_ext.__all__:
        owner = getattr(diffusers_ext, name)
        documented = {name: owner}
        if isinstance(owner, type):
            members = {k: getattr(v, "__func__", v) for k, v in vars(owner).items() if not k.startswith("_")}
            documented |= {f"{name}.{k}": v for k, v in members.items() if callable(v)}
        for path, value in documented.items():
            test = doctest.DocTestParser().get_doctest(
                value.__doc__ or "", {name: owner for name, owner in vars(diffusers_ext).items()}, path, None, 0
            )
            if test.examples:
                found.append(pytest.param(test, id=path))
    return found


EXAMPLES = examples()


def test_the_examples_were_found():
    assert len(EXAMPLES) >= 15


@pytest.mark.parametrize("test", EXAMPLES)
def test_example(test):
    report: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=report.append)
    assert result.failed == 0, "".join(report)


@pytest.mark.parametrize("name", diffusers_ext.__all__)
def test_public_names_are_documented(name):
    doc = getattr(diffusers_ext, name).__doc__
    assert doc is not None
    assert len(doc.splitlines()[0]) > 10


def test_readme_tables_are_those_of_the_results():
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.report", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks" / "results").glob("*/*.json")), ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_results_are_whole(path):
    result = json.loads(path.read_text())
    assert result["name"] == f"{path.parent.name}/{path.stem}"
    module = result["command"].split()[2]
    assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file()
    for figure in result["figures"].values():
        assert isinstance(figure["value"], float | int)
        assert re.fullmatch(r"(<=|>=|<|>) [\d.]+", figure.get("goal", "<= 0"))


@pytest.mark.parametrize("document", ["README.md", "docs/results.md", "training/README.md"])
def test_linked_files_exist(document):
    path = ROOT / document
    links = re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text())
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_readme_python_runs(tmp_path):
    """The blocks that need nothing trained; the one that trains is shortened to two steps."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        code = block.replace("max_train_steps=20", "max_train_steps=2").replace("runs/", f"{tmp_path}/")
        code = code.replace('save("', f'save("{tmp_path}/')
        run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
