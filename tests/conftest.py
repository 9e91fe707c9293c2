"""Shared by all tests: one torch thread, accelerate's global state reset between tests, and seconds per folder."""

import gc
import os
from collections import Counter
from pathlib import PurePath

import pytest
import torch

torch.set_num_threads(1)
# Nothing that is loaded until the tests begin is ever freed: the collector need not look through it again and again.
gc.disable()

# Seconds of one core that the tests of a folder may take, or all of the files that stand in none; a folder that is not
# named here gets those of a method. With TEST_BUDGET=1, as .ci/run sets it, half as much again fails the run.
METHOD = 40
SECONDS = {
    "tests": 240,
    "tests/app": 50,  # a browser
    "tests/methods/noise_diffusion": 50,
    "tests/methods/oms": 100,
    "tests/methods/q_diffusion": 75,
    "tests/training": 140,
}
# Files that take long start first, so that at the end no process waits for one of them.
LONG = (
    "tests/test_demo.py",
    "tests/test_import.py",
    "tests/training/test_launch.py",
    "tests/training/test_text_to_image.py",
)
spent: Counter[str] = Counter()


def reset_accelerate():
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    reset_accelerate()


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("network"):
            item.add_marker(pytest.mark.skip(reason="needs the Hub"))


def pytest_runtest_logreport(report):
    """Adds up what the tests took; with xdist the process that prints the summary gets the reports of all."""
    spent[str(PurePath(report.nodeid.split("::")[0]).parent)] += report.duration


def too_slow():
    return [folder for folder, seconds in spent.items() if seconds > 1.5 * SECONDS.get(folder, METHOD)]


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("seconds per folder")
    for folder, seconds in sorted(spent.items()):
        note = ", above it by half" if folder in too_slow() else ""
        terminalreporter.line(f"{seconds:7.1f} of {SECONDS.get(folder, METHOD):3d}  {folder}{note}")
    terminalreporter.line(f"{sum(spent.values()):7.1f}         in all")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session):
    if os.environ.get("TEST_BUDGET") and too_slow() and not hasattr(session.config, "workerinput"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    return (yield)
