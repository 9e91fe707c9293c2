"""Shared by all tests: one torch thread, and accelerate's global state reset between tests."""

import pytest
import torch

torch.set_num_threads(1)


def reset_accelerate():
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    reset_accelerate()


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("network"):
            item.add_marker(pytest.mark.skip(reason="needs the Hub"))
