"""The wheel without the clone: everything imports, everything that a command names is there, and the demo runs.

The process that runs what was built is a fork that has nothing of this package loaded and cannot reach the clone.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from . import processes

ROOT = Path(__file__).resolve().parents[1]

# Runs in an empty folder. What an editable installation puts on the path is taken off it.
INSIDE = """
import importlib, pkgutil, sys
from pathlib import Path

wheel = sys.argv[1]
sys.path[:] = [wheel, *(p for p in sys.path if p and not (Path(p) / "diffusers_ext").is_dir())]
import diffusers_ext
from diffusers_ext.cli import main

assert diffusers_ext.__file__.startswith(wheel), diffusers_ext.__file__
assert importlib.util.find_spec("benchmarks") is None
for module in pkgutil.walk_packages(diffusers_ext.__path__, "diffusers_ext."):
    if ".assets" not in module.name:
        importlib.import_module(module.name)
for words in (["config", "ddp"], ["train", "immiscible", "--config", "digits", "--help"], ["demo", "mmd_ddm"]):
    try:
        main(words)
    except SystemExit as end:
        assert not end.code, (words, end.code)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    backend = pytest.importorskip("hatchling.build")
    before, folder = os.getcwd(), tmp_path_factory.mktemp("wheel")
    os.chdir(ROOT)
    try:
        return folder / backend.build_wheel(str(folder))
    finally:
        os.chdir(before)


def test_the_wheel_has_what_the_package_has(wheel):
    files = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(["git", "ls-files", "diffusers_ext"], cwd=ROOT, capture_output=True, text=True).stdout
    if not tracked:
        pytest.skip("not a clone")
    assert set(tracked.split()) <= files
    assert "diffusers_ext/training/configs/digits.yaml" in files


def test_the_wheel_works_without_the_clone(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "work").mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = processes.run(
        [sys.executable, "-c", INSIDE, tmp_path / "site"], cwd=tmp_path / "work", env=environment, timeout=900
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert f"{tmp_path}/site/diffusers_ext/training/configs/ddp.yaml" in run.stdout
    assert (tmp_path / "work" / "runs" / "demo" / "mmd_ddm.png").is_file()
