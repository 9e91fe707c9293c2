"""Examples in docstrings run, and the documentation says what the code and the results say."""

import ast
import doctest
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

import diffusers_ext
from benchmarks import report
from benchmarks.headlines import METHODS
from diffusers_ext import cli
from diffusers_ext.train import FINISHED
from diffusers_ext.train import METHODS as TRAINED

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


def test_what_is_written_of_results_is_what_was_measured():
    report.main(["--check"])


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
        assert "goal" not in figure or len(figure["says"]) > 20


DOCUMENTS = [*sorted(ROOT.glob("*.md")), ROOT / "training" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = sorted(p.name for p in (ROOT / "diffusers_ext" / "methods").iterdir() if (p / "__init__.py").is_file())


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_linked_files_exist(path):
    links = re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", path.read_text())
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_every_method_has_a_page_and_a_row():
    nav = (ROOT / "mkdocs.yml").read_text()
    assert sorted(METHODS) == FOLDERS
    for name in FOLDERS:
        page = (ROOT / "docs" / "methods" / f"{name}.md").read_text()
        assert f"methods/{name}.md" in nav
        assert "![" in page.split("\n## ")[0]  # the problem in a picture
        heads = ["The equation", "In five lines", "Training", "What it costs", "Measured results"]
        assert re.findall(r"^## (.*)$", page, re.MULTILINE) == [*heads, "When not to use it", "API"]
        assert f"(docs/methods/{name}.md)" in (ROOT / "README.md").read_text()


def test_every_training_stands_in_the_guide():
    guide = (ROOT / "docs" / "guides" / "train_and_resume.md").read_text()
    assert [name for name in {**TRAINED, **FINISHED} if f"[`{name}`]" not in guide] == []


def test_every_public_name_stands_on_one_page():
    marks = [m.split() for path in DOCUMENTS for m in re.findall(r"<!-- api: ([\w. ]+) -->", path.read_text())]
    parts = [part for mark in marks for part in mark]
    for module in diffusers_ext._PUBLIC:
        assert [p for p in parts if f"{module}.".startswith(f"{p}.")] != [], module
    assert len(parts) == len(set(parts))


def test_readme_is_one_screen_and_cites_its_papers():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == diffusers_ext.__version__
    cited = {reference["url"].split("/")[-1] for reference in citation["references"]}
    assert {paper for method in METHODS.values() for paper in method["papers"]} <= cited


def strings():
    """The texts that the package's code holds, what is filled in as an ellipsis."""
    found = set()
    for path in (ROOT / "diffusers_ext").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.add("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def test_messages_of_the_troubleshooting_page_are_the_code_s():
    def pieces(text):
        return [piece.strip() for piece in text.split("…") if len(piece) > 8]

    page = (ROOT / "docs" / "guides" / "troubleshooting.md").read_text()
    messages = re.findall(r"^(?:or )?\*\*`` ?(.+?) ?``\*\*", page, re.MULTILINE)
    assert len(messages) >= 50
    texts = strings()
    for message in messages:
        # `require` joins a name, " must be " and what is accepted, each a text of its own.
        wanted = [message, message.partition(" must be ")[2].removesuffix(", got …")]
        assert any(all(p in text for p in pieces(w)) for w in wanted if pieces(w) for text in texts), message


def blocks(language):
    """The code blocks of all documents, each once."""
    seen, found = set(), []
    for path in DOCUMENTS:
        text = path.read_text()
        for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            if match[1] not in seen:
                seen.add(match[1])
                line = text[: match.start()].count("\n") + 2
                found.append(pytest.param(match[1], id=f"{path.relative_to(ROOT)}:{line}"))
    return found


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A working folder like a clone's, where runs may be written."""
    for name in ("diffusers_ext", "pipelines", "training"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("block", blocks("python"))
def test_python_of_the_documents_runs(block, clone):
    """Those that say what they need are only compiled; training is shortened to two steps."""
    assert len(block.splitlines()) <= 100
    code = compile(block.replace("max_train_steps=20", "max_train_steps=2"), "block", "exec")
    if not block.startswith("# needs "):
        exec(code, {"__name__": "block"})


def lines(block):
    """The commands of a block as lists of words; variables are filled in, comments and `&&` taken apart."""
    variables = {}
    shipped = re.sub(r"\$\(diffusers-ext config (\w+)\)", r"training/configs/\1.yaml", block)
    shipped = re.sub(r"\$\(diffusers-ext asset ([\w-]+)\)", r"diffusers_ext/assets/\1", shipped)
    for line in shipped.replace("\\\n", " ").splitlines():
        for command in line.split("&&"):
            words = shlex.split(command, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                name, _, variables[name] = words.pop(0).partition("=")
            filled = [v for word in words for v in (variables[word[1:]].split() if word[:1] == "$" else [word])]
            if filled:
                yield filled


def check_command(words):
    """Fails on an unknown argument, target, script or file."""
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    if "--config_file" in words:
        assert (ROOT / words[words.index("--config_file") + 1]).is_file()
    if "--config" in words:  # by the name of a shipped one
        place = words.index("--config") + 1
        words[place] = str(ROOT / "training" / "configs" / f"{words[place]}.yaml")
        assert Path(words[place]).is_file()
    scripts = [word for word in words if word.endswith(".py")]
    assert all((ROOT / script).is_file() for script in scripts)
    if "diffusers_ext.train" in words and words[0] != "pkill":
        method, arguments = (
            words[words.index("diffusers_ext.train") + 1],
            words[words.index("diffusers_ext.train") + 2 :],
        )
    elif "diffusers-ext" in words:
        command, *arguments = words[words.index("diffusers-ext") + 1 :]
        if command in ("app", "asset", "config", "convert", "demo", "info"):
            return
        if command == "enhance":
            diffusers_ext.EnhanceConfig(**vars(cli.enhance_parser().parse_args(arguments)))
            return
        if command == "inspect":
            diffusers_ext.parse_config(diffusers_ext.InspectConfig, ["--repo", *arguments])
            return
        if command != "train":
            config = {"generate": "GenerateConfig", "align": "AlignSetConfig", "evaluate": "EvaluateConfig"}[command]
            diffusers_ext.parse_config(getattr(diffusers_ext, config), arguments)
            return
        method, *arguments = arguments
    else:
        assert words[0] in ("hf", "pip", "pkill", "pre-commit", "python", "source"), words
        return
    if method in FINISHED:
        diffusers_ext.parse_config(getattr(diffusers_ext, FINISHED[method][0]), arguments)
        return
    script = (ROOT / "training" / f"train_{method}.py").read_text()
    config = getattr(diffusers_ext, re.search(r"run_training\((\w+)\)", script)[1]).Config
    if "--help" not in arguments:
        diffusers_ext.parse_config(config, [word for word in arguments if word != "&"])


@pytest.mark.parametrize("block", blocks("bash"))
def test_commands_of_the_documents_are_understood(block, clone):
    commands = list(lines(block))
    assert commands
    for words in commands:
        check_command(words)


def test_a_wrong_command_is_found(clone):
    for line in (
        "make nothing",
        "diffusers-ext train oms --nonsense 1",
        "python no/such.py",
        "diffusers-ext train oms --config no_such",
    ):
        with pytest.raises((AssertionError, KeyError, SystemExit)):
            check_command(line.split())
